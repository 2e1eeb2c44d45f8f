"""LLaVA's converter: answers to MME -> the files of its calculation script.

cd playground/data/eval/MME
python ../../../../scripts/convert_answer_to_mme.py --experiment NAME
python ../../../../scripts/calculation.py --results_dir eval_tool/answers/NAME
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.legacy import mme_files, write_files
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="Answers to MME -> one table a category.")
    flags.add_argument("--experiment", required=True)
    flags.add_argument("--dir", default=".", help="the folder MME")
    args = flags.parse_args()
    base = Path(args.dir)
    files = mme_files(
        str(base / "answers" / f"{args.experiment}.jsonl"), base / "MME_Benchmark_release_version"
    )
    write_files(base / "eval_tool" / "answers" / args.experiment, files)


if __name__ == "__main__":
    main()
