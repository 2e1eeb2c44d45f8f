"""LLaVA's long-answer entry point under its own name: `llava answer` with up to 1,024 new tokens.

python -m llava.eval.model_vqa --model-path M --question-file Q --image-folder I
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.eval import answer_file


def main(argv: Sequence[str] | None = None) -> int:
    """`llava answer`; a --max_new_tokens of the command line wins."""
    words = list(sys.argv[1:] if argv is None else argv)
    return answer_file.main(["--max_new_tokens", "1024", *words])


if __name__ == "__main__":
    raise SystemExit(main())
