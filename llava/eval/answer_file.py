"""`llava answer`: a question file in, LLaVA's answers file out.

    llava answer --model-path CHECKPOINT --question-file questions.jsonl --image-folder images \\
        --answers-file answers.jsonl --conv-mode vicuna_v1 --reduction none

Special here: the flags of LLaVA's `model_vqa_loader`. Two defaults differ: the temperature is 0,
and without --conv-mode the checkpoint's template is used. Killed and started again it goes on: the
run's state lies in `<answers file>.run/`, and a file that other settings made is not written over.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.answer import Answerer, answer_in_folder, finish
from llava.eval.flags import (
    add_model_flags,
    answerer_options,
    decoding_from_flags,
    load_from_flags,
    model_settings,
)
from llava.eval.questions import (
    Question,
    check_images_exist,
    first,
    get_chunk,
    read_questions,
)
from llava.eval.run_folder import RunFolder
from llava.eval.throughput import format_line
from llava.reduction.flags import check_plan_flags, plan_for_model
from llava.utils import Ranks, check_output, file_sha256, get_logger, user_errors

log = get_logger(__name__)


def build_parser(prog: str = "llava answer") -> argparse.ArgumentParser:
    """The command line of `llava answer`, which LLaVA's other entry points share."""
    flags = argparse.ArgumentParser(prog=prog, description="Answer a question file.")
    add_model_flags(flags)
    flags.add_argument("--image-folder", default="", help="folder that the image paths start from")
    flags.add_argument("--question-file", required=True, help="JSON lines, as LLaVA's")
    flags.add_argument("--answers-file", default="answer.jsonl", help="default answer.jsonl")
    flags.add_argument(
        "--num-chunks", type=int, default=1, help="parts that the file is cut into (default 1)"
    )
    flags.add_argument("--chunk-idx", type=int, default=0, help="the part to answer, from 0")
    flags.add_argument(
        "--max_new_tokens", type=int, default=128, help="longest answer (default %(default)s)"
    )
    flags.add_argument("--limit", type=int, help="only the first so many questions")
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Answer a question file (or one chunk of it) and write the answers file."""
    args = build_parser().parse_args(argv)
    return answer_chunk(args, read_questions(args.question_file))


def answer_chunk(args: argparse.Namespace, questions: Sequence[Question], **asked: Any) -> int:
    """Answer the part of the questions that the flags of `build_parser` name. asked: what else the
    prompts depend on. Everything that can be wrong with the input is looked at before the model is
    loaded."""
    check_plan_flags(args)  # a plan that cannot be read ends the run here
    check_output(args.answers_file, [args.question_file])
    ranks = Ranks.from_environment()
    decoding = decoding_from_flags(args, args.max_new_tokens)
    questions = get_chunk(first(questions, args.limit), args.num_chunks, args.chunk_idx)
    check_images_exist(questions, args.image_folder)
    tokenizer, model, image_processor, name = load_from_flags(args, ranks)
    answerer = Answerer(
        model,
        tokenizer,
        image_processor,
        model_id=name,
        image_folder=args.image_folder,
        decoding=decoding,
        reduction=plan_for_model(args, model.config),
        **answerer_options(args),
    )
    settings = {
        **answerer.settings(),
        **model_settings(args),
        "questions_sha256": file_sha256(args.question_file),
        "part": [args.limit, args.num_chunks, args.chunk_idx],
        **asked,
    }
    path = Path(args.answers_file)
    folder = RunFolder(path.with_name(f"{path.name}.run"), settings)
    speed = finish(folder, answer_in_folder(answerer, folder, questions, ranks), ranks)
    if speed is not None:
        log.info("wrote %s: %s", path, format_line(speed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
