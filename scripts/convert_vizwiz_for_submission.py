"""LLaVA's converter: python scripts/convert_vizwiz_for_submission.py --annotation-file A \\
    --result-file answers.jsonl --result-upload-file upload
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.legacy import vizwiz_upload
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="Answers -> the server's file.")
    flags.add_argument("--annotation-file", required=True)
    flags.add_argument("--result-file", required=True)
    flags.add_argument("--result-upload-file", required=True)
    args = flags.parse_args()
    vizwiz_upload(args.annotation_file, args.result_file, args.result_upload_file)


if __name__ == "__main__":
    main()
