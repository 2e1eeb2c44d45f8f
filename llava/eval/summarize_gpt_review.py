"""LLaVA's table of judge reviews: a few lines over `llava.eval.scorers.review`.

python llava/eval/summarize_gpt_review.py -f reviews/llava-v1.5-13b.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.judge import read_reviews
from llava.eval.scorers.review import summary_lines
from llava.utils import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Print one table a file of reviews."""
    flags = argparse.ArgumentParser(description="Tables of judge reviews.")
    flags.add_argument("-d", "--dir", help="folder of files of reviews")
    flags.add_argument("-v", "--version", help="only files of this judge (0613; others are 0314)")
    flags.add_argument("-s", "--select", nargs="*", help="only files with all of this in the name")
    flags.add_argument("-f", "--files", nargs="*", default=[])
    flags.add_argument("-i", "--ignore", nargs="*", type=int, default=[], help="question ids")
    args = flags.parse_args(argv)
    files = [Path(file) for file in args.files]
    if not files:
        if not args.dir:
            raise ValueError("give files of reviews (-f), or a folder with them (-d)")
        files = sorted(Path(args.dir).glob("*.jsonl"))
    for file in sorted(files):
        name = file.stem.replace("gpt4_text_", "")
        if args.select and not all(word in name for word in args.select):
            continue
        if args.version and args.version != ("0613" if "0613" in name else "0314"):
            continue
        lines = [name, *summary_lines(read_reviews(file), args.ignore), "=" * 33]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
