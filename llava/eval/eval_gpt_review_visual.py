"""LLaVA's reviews of LLaVA-QA90 answers by a judge: a few lines over `llava.eval.legacy`.

    export OPENAI_API_KEY=...
    python llava/eval/eval_gpt_review_visual.py -q questions.jsonl -c context.jsonl \\
        -a answers_gpt4.jsonl answers.jsonl -r rule.json -o reviews.jsonl

`llava judge` does the same for a run, and works without a network.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.eval.layouts import llava_qa90
from llava.eval.legacy import review_flags, write_reviews
from llava.utils import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Ask the judge for every review that is not there yet."""
    args = review_flags("Reviews of LLaVA-QA90 answers by a judge model.").parse_args(argv)
    write_reviews(args, llava_qa90, prefix="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
