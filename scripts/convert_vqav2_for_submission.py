"""LLaVA's converter: python scripts/convert_vqav2_for_submission.py --split SPLIT --ckpt NAME"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.legacy import vqav2_upload
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="Answers to VQAv2 -> the server's file.")
    flags.add_argument("--dir", default="./playground/data/eval/vqav2")
    flags.add_argument("--ckpt", required=True)
    flags.add_argument("--split", required=True)
    args = flags.parse_args()
    print(vqav2_upload(args.dir, args.ckpt, args.split))


if __name__ == "__main__":
    main()
