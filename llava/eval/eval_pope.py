"""LLaVA's POPE script: a few lines over `llava.eval.legacy`; `llava score` says more.

    python -m llava.eval.eval_pope --annotation-dir coco --question-file llava_pope_test.jsonl \\
        --result-file answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.eval.legacy import pope_lines
from llava.utils import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Print counts and shares of each category."""
    flags = argparse.ArgumentParser(description="POPE's counts, category by category.")
    flags.add_argument("--annotation-dir", required=True)
    flags.add_argument("--question-file", required=True)
    flags.add_argument("--result-file", required=True)
    args = flags.parse_args(argv)
    lines = pope_lines(args.annotation_dir, args.question_file, args.result_file)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
