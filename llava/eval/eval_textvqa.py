"""LLaVA's TextVQA script: a few lines over `llava.eval.legacy`; `llava score` says more.

python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file A.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.legacy import textvqa_lines
from llava.utils import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Print the accuracy of one answers file, or of all in a folder."""
    flags = argparse.ArgumentParser(description="TextVQA accuracy of answers files.")
    flags.add_argument("--annotation-file", required=True)
    flags.add_argument("--result-file")
    flags.add_argument("--result-dir")
    args = flags.parse_args(argv)
    files = [args.result_file] if args.result_file else []
    files += sorted(map(str, Path(args.result_dir).glob("*.jsonl"))) if args.result_dir else []
    if not files:
        raise ValueError("give --result-file, or --result-dir with answers files (*.jsonl)")
    for file in files:
        sys.stdout.write("\n".join(textvqa_lines(args.annotation_file, file)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
