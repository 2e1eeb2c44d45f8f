"""LLaVA's ScienceQA entry point under its own name.

    python -m llava.eval.model_vqa_science --model-path M --question-file llava_test_CQM-A.json \\
        --image-folder images/test --answers-file answers.jsonl --single-pred-prompt \\
        --conv-mode vicuna_v1

Special here: `llava answer` over ScienceQA's list of conversations. The template is llava_v0 unless
--conv-mode says otherwise, as in LLaVA; --answer-prompter is accepted and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava.eval.answer_file import answer_chunk, build_parser
from llava.eval.layouts import LETTER, read_scienceqa
from llava.utils import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Answer ScienceQA's questions (or one chunk) and write LLaVA's answers file."""
    flags = build_parser("python -m llava.eval.model_vqa_science")
    flags.add_argument("--answer-prompter", action="store_true", help="accepted, has no effect")
    flags.add_argument(
        "--single-pred-prompt", action="store_true", help="ask for the option's letter"
    )
    flags.set_defaults(conv_mode="llava_v0", max_new_tokens=1024)
    args = flags.parse_args(argv)
    suffix = LETTER if args.single_pred_prompt else ""
    path = Path(args.question_file)
    return answer_chunk(args, read_scienceqa(path, path.stem, suffix), suffix=suffix)


if __name__ == "__main__":
    raise SystemExit(main())
