"""The answer generator: a question file in, LLaVA's answers file out.

Special here: real batches (left padding, any mix of pictures and lengths), greedy by default, and
the plan that drops visual tokens is an argument of the call, not of the model. Every other way to
run a benchmark goes through `answer_questions`.

    llava answer --model-path CHECKPOINT --question-file questions.jsonl --image-folder images \\
        --answers-file answers.jsonl --conv-mode vicuna_v1 --reduction none

The flags are those of LLaVA's `model_vqa_loader`, and the records have its keys (`question_id,
prompt, text, answer_id, model_id, metadata`) with `uid, finish, n_out` beside them. Two defaults
differ: the temperature is 0, and without --conv-mode the checkpoint's template is used.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.conversation import get_conversation, resolve_conv_mode
from llava.decoding import Decoding, answer_text, cut_at_eos, eos_ids
from llava.eval.questions import (
    Question,
    check_images_exist,
    first,
    get_chunk,
    read_questions,
)
from llava.mm_utils import (
    check_context,
    count_visual_tokens,
    crop_side,
    get_model_name_from_path,
    load_image,
)
from llava.prompting import (
    blind_image,
    build_prompt,
    move_batch,
    pad_token_id,
    prepare_batch,
    tokenize_prompt,
)
from llava.reduction import ReductionPlan, resolve_plan
from llava.reduction.flags import add_reduction_flags, plan_from_args
from llava.utils import atomic_write, get_logger, progress, set_seed, user_errors

log = get_logger(__name__)


def answer_questions(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    questions: Sequence[Question],
    *,
    image_folder: str | Path = "",
    conv_mode: str | None = None,
    reduction: ReductionPlan | str | dict | None = None,
    batch_size: int = 8,
    decoding: Decoding | None = None,
    max_new_tokens: int | None = None,
    blind: bool = False,
    model_id: str = "",
    desc: str = "answering",
) -> list[dict[str, Any]]:
    """Answer questions with one model; one record a question, in their order.

    reduction: None for the checkpoint's own plan, "none" for no dropping. max_new_tokens: shorthand
    for a greedy `Decoding`. blind: each picture is replaced by a grey one of its size.
    Raises FileNotFoundError for missing pictures (before anything is run), ValueError for damaged
    ones, an unknown template, a prompt longer than the context, or a plan that does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; accepted: 1 and more")
    if decoding is not None and max_new_tokens is not None:
        raise ValueError("give decoding or max_new_tokens, not both")
    if decoding is None:
        decoding = Decoding() if max_new_tokens is None else Decoding(max_new_tokens)
    plan, source = resolve_plan(reduction, model.config)
    plan.validate(model.config.num_hidden_layers)
    conv_mode, conv_source = resolve_conv_mode(conv_mode, model.config)
    check_images_exist(questions, image_folder)
    log.info("plan: %s (%s); template: %s (%s)", plan, source, conv_mode, conv_source)
    run = _Run(
        model, tokenizer, image_processor, Path(image_folder), conv_mode, plan, decoding, blind,
        model_id,
    )  # fmt: skip
    start = time.perf_counter()
    records = list(progress(run.records(questions, batch_size), desc, len(questions)))
    seconds = time.perf_counter() - start
    rate = len(records) / seconds if seconds else 0.0
    log.info("%d answers in %.1f s: %.2f questions/s", len(records), seconds, rate)
    return records


class _Run:
    """What stays the same over the batches of one call."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        image_folder: Path,
        conv_mode: str,
        plan: ReductionPlan,
        decoding: Decoding,
        blind: bool,
        model_id: str,
    ):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.conv_mode, self.plan, self.decoding = conv_mode, plan, decoding
        self.model_id = model_id
        self.image_folder, self.blind = image_folder, blind
        self.stop = get_conversation(conv_mode).stop_string
        self.eos = eos_ids(model, tokenizer)
        self.im_start_end = getattr(model.config, "mm_use_im_start_end", False)
        # Questions about one picture mostly follow one another.
        self.picture = functools.lru_cache(maxsize=32)(self._picture)
        # answer_id is a hash of what made the answer: the same run gives the same id.
        settings = [str(plan), conv_mode, asdict(decoding), blind, model_id]
        self.settings = json.dumps(settings)

    def records(self, questions: Sequence[Question], batch_size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, len(questions), batch_size):
            yield from self.answer_batch(questions[start : start + batch_size])

    def answer_batch(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Records of one batch."""
        prompts = [self.prompt(question) for question in questions]
        pictures = [[self.picture(image) for image in q.images] for q in questions]
        for question, prompt, own in zip(questions, prompts, pictures, strict=True):
            self.check_length(question, prompt, own)
        config = self.model.config
        batch = prepare_batch(self.tokenizer, self.image_processor, config, prompts, pictures)
        batch = move_batch(batch, _device(self.model), self.model.dtype)
        with torch.inference_mode():
            out = self.model.generate(
                inputs=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                images=batch["images"],
                image_sizes=batch["image_sizes"],
                texts=batch["texts"],
                reduction=self.plan,
                pad_token_id=pad_token_id(self.tokenizer),
                **self.decoding.generate_kwargs(),
            )
        return [self.record(q, ids) for q, ids in zip(questions, out.tolist(), strict=True)]

    def prompt(self, question: Question) -> str:
        return build_prompt(
            question.text, self.conv_mode, len(question.images), self.im_start_end, self.tokenizer
        )

    def _picture(self, image: str) -> Image.Image:
        picture = load_image(self.image_folder / image)
        return blind_image(picture.size, self.image_processor) if self.blind else picture

    def check_length(self, question: Question, prompt: str, own: list[Image.Image]) -> None:
        """A prompt that does not fit ends the run with a message that names the question."""
        counts: list[int] = []
        if own:
            side = math.isqrt(self.model.get_vision_tower().num_patches)
            tile = crop_side(self.image_processor)
            sizes = [picture.size for picture in own]
            counts = count_visual_tokens(sizes, self.model.config, tile, side)
        ids = tokenize_prompt(prompt, self.tokenizer)
        try:
            check_context(ids, counts, self.model.context_length)
        except ValueError as err:
            raise ValueError(f"question {question.question_id!r}: {err}") from err

    def record(self, question: Question, ids: list[int]) -> dict[str, Any]:
        """LLaVA's answer record; `ids` are the new tokens with whatever pads them."""
        ids, ended = cut_at_eos(ids, self.eos)
        answer_id = hashlib.sha1(f"{question.uid} {self.settings}".encode()).hexdigest()[:22]
        return {
            "question_id": question.question_id,
            "prompt": question.text,
            "text": answer_text(ids, self.tokenizer, self.stop),
            "answer_id": answer_id,
            "model_id": self.model_id,
            "metadata": {},
            "uid": question.uid,
            "finish": "eos" if ended else "length",
            "n_out": len(ids),
        }


def _device(model: Any) -> torch.device:
    return torch.device(model.device)


def write_answers(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write an answers file, one JSON object a line; whole or not at all."""
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# --- command line --------------------------------------------------------------------------------
def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model answers and how (shared with `llava eval`)."""
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="base model of a LoRA or projector-only checkpoint")
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--blind", action="store_true", help="show a grey picture instead")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="for sampling")
    add_reduction_flags(parser)
    parser.add_argument("--pdrop_infer", nargs="?", help="accepted from old scripts, has no effect")


def load_from_flags(args: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    """(tokenizer, model, image processor, model name) of the model flags."""
    from llava.model.builder import load_pretrained_model

    path = Path(args.model_path).expanduser()
    name = get_model_name_from_path(str(path))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(args.seed)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(path), args.model_base, name, device_map=None, device=device
    )
    return tokenizer, model.eval(), image_processor, name


def decoding_from_flags(args: argparse.Namespace, max_new_tokens: int) -> Decoding:
    """The decoding that the flags ask for."""
    return Decoding(max_new_tokens, args.temperature, args.top_p, args.num_beams)


def parser() -> argparse.ArgumentParser:
    """The command line of `llava answer`."""
    flags = argparse.ArgumentParser(prog="llava answer", description="Answer a question file.")
    add_model_flags(flags)
    flags.add_argument("--image-folder", default="")
    flags.add_argument("--question-file", required=True)
    flags.add_argument("--answers-file", default="answer.jsonl")
    flags.add_argument("--num-chunks", type=int, default=1)
    flags.add_argument("--chunk-idx", type=int, default=0)
    flags.add_argument("--max_new_tokens", type=int, default=128)
    flags.add_argument("--limit", type=int, help="only the first so many questions")
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Answer a question file (or one chunk of it) and write the answers file."""
    args = parser().parse_args(argv)
    # Everything that can be wrong with the input is looked at before the model is loaded.
    plan = plan_from_args(args)
    decoding = decoding_from_flags(args, args.max_new_tokens)
    questions = first(read_questions(args.question_file), args.limit)
    questions = get_chunk(questions, args.num_chunks, args.chunk_idx)
    check_images_exist(questions, args.image_folder)
    tokenizer, model, image_processor, name = load_from_flags(args)
    records = answer_questions(
        model,
        tokenizer,
        image_processor,
        questions,
        image_folder=args.image_folder,
        conv_mode=args.conv_mode,
        reduction=plan,
        batch_size=args.batch_size,
        decoding=decoding,
        blind=args.blind,
        model_id=name,
    )
    write_answers(args.answers_file, records)
    log.info("wrote %s", args.answers_file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
