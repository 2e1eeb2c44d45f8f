"""MME's calculation script: python scripts/calculation.py --results_dir eval_tool/answers/NAME"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.legacy import mme_lines
from llava.utils import user_errors


@user_errors()
def main() -> None:
    flags = argparse.ArgumentParser(description="MME's points from a table a category.")
    flags.add_argument("--results_dir", required=True)
    args = flags.parse_args()
    print("\n".join(mme_lines(args.results_dir)))


if __name__ == "__main__":
    main()
