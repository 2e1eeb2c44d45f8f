"""LLaVA's MMBench entry point under its own name.

    python -m llava.eval.model_vqa_mmbench --model-path M --answers-file answers.jsonl \\
        --question-file mmbench_dev_20230712.tsv --single-pred-prompt --conv-mode vicuna_v1

Special here: `llava answer` over MMBench's table. A record's prompt is the question without the
sentence that asks for a letter, as LLaVA writes it, with `round_id`, `options` and `option_char`.
--all-rounds asks each row as often as it has options, turned by one more each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answer_file import answer_chunk, build_parser
from llava.eval.layouts import LETTER, LETTER_CN, read_mmbench
from llava.utils import user_errors

SUFFIXES = {"en": LETTER, "cn": LETTER_CN}


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Answer MMBench's rows (or one chunk) and write LLaVA's answers file."""
    flags = build_parser("python -m llava.eval.model_vqa_mmbench")
    flags.add_argument("--all-rounds", action="store_true", help="each row with its options turned")
    flags.add_argument(
        "--single-pred-prompt", action="store_true", help="ask for the option's letter"
    )
    flags.add_argument(
        "--lang", choices=SUFFIXES, default="en", help="language of that sentence (default en)"
    )
    flags.set_defaults(max_new_tokens=1024)
    args = flags.parse_args(argv)
    path = Path(args.question_file)
    suffix = SUFFIXES[args.lang] if args.single_pred_prompt else ""
    questions = [
        dataclasses.replace(question, recorded=question.text.removesuffix(suffix))
        for question in read_mmbench(path, path.stem, suffix, args.all_rounds)
    ]
    return answer_chunk(args, questions, suffix=suffix, all_rounds=args.all_rounds)


if __name__ == "__main__":
    raise SystemExit(main())
