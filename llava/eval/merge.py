"""Join the answers of a run's processes: ``python -m llava.eval.merge RUN``.

`llava eval` and `llava answer` do it themselves when the last batch is answered; this is for a run
whose last process died between answering and joining, and says what a run still lacks. RUN is the
run's folder, or the answers file of `llava answer`. Exit code 2 when answers are missing or two
processes disagree; nothing is written then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.run_folder import RunFolder, write_answers
from llava.utils import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Join a run."""
    flags = argparse.ArgumentParser(prog="python -m llava.eval.merge", description=__doc__)
    flags.add_argument("run", help="folder of the run, or the answers file of `llava answer`")
    path = Path(flags.parse_args(argv).run)
    beside = path.with_name(f"{path.name}.run")
    folder = RunFolder.at(beside if beside.is_dir() else path)
    merged = folder.merge()
    if merged.missing:
        total = len(merged.records) + len(merged.missing)
        raise ValueError(
            f"{folder.path}: {len(merged.missing)} of {total} questions have no answer "
            f"({', '.join(merged.missing[:3])}{', ...' * (len(merged.missing) > 3)}); start the "
            "run's command again"
        )
    write_answers(folder.answers, merged.records)
    sys.stdout.write(f"{len(merged.records)} answers in {folder.answers}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
