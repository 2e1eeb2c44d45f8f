"""LLaVA's extraction: python scripts/extract_mm_projector.py --model-path DIR --output FILE

Reads .bin and safetensors, whole or in shards, in LLaVA's and in transformers' layout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.model.convert import extract_projector
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="A checkpoint's projector as mm_projector.bin.")
    flags.add_argument("--model-path", required=True, help="checkpoint folder of any layout")
    flags.add_argument("--output", required=True, help="file to write, as mm_projector.bin")
    args = flags.parse_args()
    names = extract_projector(args.model_path, args.output)
    sys.stdout.write(f"{args.output}: {', '.join(names)}\n")


if __name__ == "__main__":
    main()
