"""LLaVA's ScienceQA script: a few lines over `llava.eval.legacy`; `llava score` says more.

    python llava/eval/eval_science_qa.py --base-dir scienceqa --result-file answers.jsonl \\
        --output-file output.jsonl --output-result result.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.eval.legacy import scienceqa_line, scienceqa_result, write_scienceqa
from llava.utils import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Print the accuracies over a split and write both result files."""
    flags = argparse.ArgumentParser(description="ScienceQA accuracy of an answers file.")
    flags.add_argument("--base-dir", required=True)
    flags.add_argument("--result-file", required=True)
    flags.add_argument("--output-file", required=True)
    flags.add_argument("--output-result", required=True)
    flags.add_argument("--split", default="test")
    flags.add_argument("--options", nargs="+", default=["A", "B", "C", "D", "E"])
    args = flags.parse_args(argv)
    if args.options != ["A", "B", "C", "D", "E"]:
        raise ValueError(f"--options {' '.join(args.options)}; accepted: A B C D E")
    scores, output, result = scienceqa_result(args.base_dir, args.result_file, args.split)
    sys.stdout.write(scienceqa_line(scores) + "\n")
    write_scienceqa(args.output_file, output, args.output_result, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
