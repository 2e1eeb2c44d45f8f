"""LLaVA's converter: answers to MMBench -> the server's spreadsheet.

    python scripts/convert_mmbench_for_submission.py --annotation-file mmbench_dev_20230712.tsv \\
        --result-dir answers/SPLIT --upload-dir answers_upload/SPLIT --experiment NAME
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.legacy import mmbench_upload
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="Answers to MMBench -> the server's spreadsheet.")
    flags.add_argument("--annotation-file", required=True)
    flags.add_argument("--result-dir", required=True)
    flags.add_argument("--upload-dir", required=True)
    flags.add_argument("--experiment", required=True)
    args = flags.parse_args()
    mmbench_upload(args.annotation_file, args.result_dir, args.upload_dir, args.experiment)


if __name__ == "__main__":
    main()
