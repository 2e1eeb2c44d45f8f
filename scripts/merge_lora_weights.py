"""LLaVA's merge: python scripts/merge_lora_weights.py --model-path LORA --model-base BASE
--save-model-path OUT

The same as `llava convert LORA OUT --to llava --model-base BASE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.model.convert import convert
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="A LoRA run and its base as one checkpoint.")
    flags.add_argument("--model-path", required=True, help="folder of the LoRA run")
    flags.add_argument("--model-base", help="default: what adapter_config.json names")
    flags.add_argument("--save-model-path", required=True, help="folder to make")
    args = flags.parse_args()
    convert(args.model_path, args.save_model_path, "llava", args.model_base)


if __name__ == "__main__":
    main()
