"""LLaVA's converter: python scripts/convert_mmvet_for_eval.py --src answers.jsonl --dst out.json"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.legacy import convert
from llava.eval.submit import mmvet_upload
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="Answers -> the file of MM-Vet's server.")
    flags.add_argument("--src", required=True)
    flags.add_argument("--dst", required=True)
    args = flags.parse_args()
    convert(mmvet_upload, args.src, args.dst)


if __name__ == "__main__":
    main()
