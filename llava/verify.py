"""`llava verify`: is this checkpoint read as it was meant, and does it see?

Special here: everything that costs accuracy without an error is said in one place, with where it
came from (layout, tower, template, image mode, dtype, plan), and checked where there is something
to check against: names and numbers of the weights, ids of fixed prompts, a forward pass with and
without the plan, and a published score. Exit code 1 if a check fails, 2 if the checkpoint cannot be
loaded.

    llava verify --model-path llava-v1.5-7b
    llava verify --model-path llava-v1.5-7b --benchmark pope --json verify.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from llava.conversation import get_conversation
from llava.decoding import Decoding, answer_text, cut_at_eos, eos_ids
from llava.eval.answer import answer_questions
from llava.eval.benchmarks import DATA_ROOT, LoadedBenchmark, load_benchmark
from llava.eval.published import published_for
from llava.eval.questions import check_images_exist
from llava.loading_flags import add_loading_flags, loading_options
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import Loaded, load_checkpoint
from llava.prompting import (
    blind_image,
    build_prompt,
    move_batch,
    pad_token_id,
    prepare_batch,
    tokenize_prompt,
)
from llava.reduction import ReductionPlan
from llava.reduction.flags import add_reduction_flags, plan_from_args
from llava.utils import check_output, environment, json_dump, quiet, user_errors

Status = Literal["pass", "FAIL", "warn", "info"]
QUESTION = "What is shown in this picture?"
_NEW_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<12} {self.detail}"


def verify(loaded: Loaded) -> Iterator[Check]:
    """The checks of a loaded checkpoint, one after the other."""
    for name, choice in loaded.choices.to_dict().items():
        yield Check(name.replace("_", " "), "info", f"{choice['value']} (from {choice['origin']})")
    yield check_names(loaded)
    yield check_numbers(loaded.model)
    tokens = list(check_tokenizer(loaded))
    yield from tokens
    yield from check_vicuna_ids(loaded.tokenizer)
    if any(check.status == "FAIL" for check in tokens):
        yield Check("forward", "info", "not run: the tokenizer does not fit")
        return
    yield from check_forward(loaded)


# ----------------------------------------------------------------------------- weights
def check_names(loaded: Loaded) -> Check:
    """Missing and misshapen weights are errors of loading; what is left are names without use."""
    count = len(loaded.model.state_dict())
    if loaded.unused:
        return Check("keys", "FAIL", f"no place in the model for: {', '.join(loaded.unused)}")
    return Check("keys", "pass", f"{count} weights, none missing, none left over")


def check_numbers(model: Any) -> Check:
    """NaN, infinity, and weights that are all zero where that cannot be."""
    bad, empty, skipped = [], [], 0
    for name, value in model.named_parameters():
        if value.is_meta or not value.is_floating_point():  # offloaded or quantised
            skipped += 1
        elif not bool(torch.isfinite(value).all()):
            bad.append(name)
        elif name.endswith("weight") and not bool(value.any()):
            empty.append(name)
    if bad or empty:
        said = [f"not finite: {', '.join(bad[:4])}"] * bool(bad)
        said += [f"all zero: {', '.join(empty[:4])}"] * bool(empty)
        return Check("numbers", "FAIL", "; ".join(said))
    note = f" ({skipped} offloaded or quantised weights not looked at)" if skipped else ""
    return Check("numbers", "pass", f"all weights are finite{note}")


# ----------------------------------------------------------------------------- tokenizer
def check_tokenizer(loaded: Loaded) -> Iterator[Check]:
    """A prompt of the template: one BOS, one mark, ids within the embeddings."""
    tokenizer, model = loaded.tokenizer, loaded.model
    ids = tokenize_prompt(_prompt(loaded), tokenizer)
    rows = model.config.vocab_size
    problems = []
    if tokenizer.bos_token_id is not None and ids.count(tokenizer.bos_token_id) > 1:
        problems.append("the prompt has more than one BOS")
    if sum(i < 0 for i in ids) != 1:
        problems.append("the prompt does not have one picture")
    if max(ids) >= rows or pad_token_id(tokenizer) >= rows:
        problems.append(f"ids beyond the {rows} rows of the embeddings")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in tokenize_prompt(_prompt(loaded, ""), tokenizer):
        problems.append("the template's own text holds unknown tokens")
    ends = eos_ids(model, tokenizer)
    if not ends:
        problems.append("nothing ends an answer: no eos_token_id")
    detail = "; ".join(problems) or f"{len(ids)} ids, eos {sorted(ends)}, {rows} rows"
    yield Check("tokenizer", "FAIL" if problems else "pass", detail)
    last = _stop_id(loaded)
    if last is not None and last not in ends:
        yield Check(
            "stop", "warn", f"the template ends an answer with id {last}, generation with {ends}"
        )


def _stop_id(loaded: Loaded) -> int | None:
    """The id that the template puts behind an answer, where it is one token."""
    conv = get_conversation(loaded.choices.template.value)
    text = conv.sep2 or conv.sep
    if conv.stop_string is not None or not text.strip():
        return None
    known = loaded.tokenizer.get_vocab()
    return known.get(text.strip())


_SYSTEM = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889,
    3148, 1001, 29901, 29871, -200, 29871, 13,
]  # fmt: skip
_ASSISTANT = [319, 1799, 9047, 13566, 29901]
VICUNA_PIECES = {319: "▁A", 13563: "▁chat", 3148: "▁US", 29871: "▁", 13: "<0x0A>"}
VICUNA_PROMPTS: dict[str, list[int]] = {
    "What is the evident theme in the video?": [
        5618, 338, 278, 13602, 10929, 297, 278, 4863, 29973,
    ],
    "Where should my hand move to if I want to {}?": [
        11921, 881, 590, 1361, 4337, 304, 565, 306, 864, 304, 6571, 29973,
    ],
}  # fmt: skip
"""Ids of LLaVA-1.5's tokenizer in public logs of independent projects: the question's, behind
`_SYSTEM` (vicuna_v1, on which three logs agree) and in front of `_ASSISTANT`."""
_HUMAN = [
    1, 319, 13563, 1546, 263, 12758, 5199, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 5199, 29915, 29879, 5155, 29889,
    3148, 1001, 29901, 29871, -200, 29871, 13,
]  # fmt: skip
VICUNA_BEHIND_EOS = [
    *_HUMAN, 30810, 30392, 231, 190, 131, 31882, *_ASSISTANT, 29871, 30810, 30392, 30861, 2, 22933,
    9047, 13566, 29901,
]  # fmt: skip
"""The same for `VICUNA_TURNS`, which goes on behind `</s>` (`legacy: false`)."""
VICUNA_TURNS = "<image>\n这是什么 ASSISTANT: 这是图</s>ASSISTANT:"


def check_vicuna_ids(tokenizer: Any) -> Iterator[Check]:
    """Ids of fixed prompts against recorded ones, where the vocabulary is Llama's."""
    size = len(tokenizer)
    pieces = {i: tokenizer.convert_ids_to_tokens(i) for i in VICUNA_PIECES if i < size}
    if pieces != VICUNA_PIECES:
        yield Check("ids", "info", "no Vicuna vocabulary: no recorded ids to compare with")
        return
    wrong = []
    for question, recorded in VICUNA_PROMPTS.items():
        ids = tokenize_prompt(build_prompt(question, "vicuna_v1"), tokenizer)
        expected = [*_SYSTEM, *recorded, *_ASSISTANT]
        if ids != expected:
            wrong.append(_difference(question, ids, expected))
    detail = "; ".join(wrong) or f"{len(VICUNA_PROMPTS)} prompts have Vicuna's recorded ids"
    yield Check("ids", "FAIL" if wrong else "pass", detail)
    system = get_conversation("llava_v1").system
    ids = tokenizer_image_token(f"{system} USER: {VICUNA_TURNS}", tokenizer)
    if ids != VICUNA_BEHIND_EOS:
        where = _difference("a second turn", ids, VICUNA_BEHIND_EOS)
        yield Check("ids, turn 2", "warn", f"{where}; LLaVA-1.5 has `legacy: false` there")


def _difference(name: str, ids: Sequence[int], expected: Sequence[int]) -> str:
    shorter = min(len(ids), len(expected))
    place = next((i for i in range(shorter) if ids[i] != expected[i]), shorter)
    got, wanted = list(ids[place : place + 4]), list(expected[place : place + 4])
    return f"{name!r} differs from token {place} on: {got}, recorded {wanted}"


# ----------------------------------------------------------------------------- forward
def _prompt(loaded: Loaded, question: str = QUESTION) -> str:
    start_end = getattr(loaded.model.config, "mm_use_im_start_end", False)
    template = loaded.choices.template.value
    return build_prompt(question, template, 1, start_end, loaded.tokenizer)


def fixed_picture() -> Image.Image:
    """A wide picture with colours, edges and shapes, the same everywhere."""
    picture = Image.new("RGB", (640, 400), (70, 130, 180))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 260, 640, 400), fill=(60, 140, 60))
    draw.ellipse((470, 40, 570, 140), fill=(250, 210, 60))
    draw.polygon([(90, 260), (200, 120), (310, 260)], fill=(150, 60, 50))
    draw.rectangle((120, 260, 280, 370), fill=(220, 200, 170))
    return picture


def check_forward(loaded: Loaded) -> Iterator[Check]:
    """One prompt without dropping and with the plan: finite logits, the scheduled lengths, and a
    picture that matters."""
    if loaded.image_processor is None:
        yield Check("forward", "info", "no vision tower: nothing to look at")
        return
    picture = fixed_picture()
    full, stages, answer = _run(loaded, picture, ReductionPlan())
    yield _forward_check("no plan", full, stages, answer)
    plan = loaded.choices.plan.value
    if plan.cuts or plan.program is not None:
        logits, stages, answer = _run(loaded, picture, plan)
        yield _forward_check("plan", logits, stages, answer)
    grey = blind_image(picture.size, loaded.image_processor)
    blind = _run(loaded, grey, ReductionPlan(), answer=False)[0]
    change = float((full - blind).abs().max())
    seen = change > 1e-3 * float(full.abs().max())
    detail = f"the next token's logits move by {change:.3g} against a grey picture"
    yield Check("picture", "pass" if seen else "FAIL", detail)


def _run(
    loaded: Loaded, picture: Image.Image, plan: ReductionPlan, answer: bool = True
) -> tuple[Tensor, Any, str]:
    """(logits of the next token [V], stages, the first words of the answer)."""
    model = loaded.model
    batch = prepare_batch(
        loaded.tokenizer, loaded.image_processor, model.config, [_prompt(loaded)], [picture]
    )
    batch = move_batch(batch, torch.device(model.device), model.dtype)
    with torch.inference_mode():
        out = model(**batch, reduction=plan, return_trace=True)
        if not answer:
            return out.logits[0, -1].float().cpu(), out.stages, ""
        inputs = batch.pop("input_ids")
        new = model.generate(
            inputs, **batch, reduction=plan, pad_token_id=pad_token_id(loaded.tokenizer),
            **Decoding(_NEW_TOKENS).generate_kwargs(),
        )  # fmt: skip
    ids, _ = cut_at_eos(new[0].tolist(), eos_ids(model, loaded.tokenizer))
    stop = get_conversation(loaded.choices.template.value).stop_string
    return out.logits[0, -1].float().cpu(), out.stages, answer_text(ids, loaded.tokenizer, stop)


def _forward_check(name: str, logits: Tensor, stages: Any, answer: str) -> Check:
    lengths = ", ".join(
        f"layers {stage.start}-{stage.stop - 1}: {stage.visual[0]} visual tokens"
        for stage in stages
    )
    if not bool(torch.isfinite(logits).all()):
        return Check(name, "FAIL", f"logits are not finite; try --dtype bfloat16. {lengths}")
    return Check(name, "pass", f"{lengths}; answers {answer!r}")


# ----------------------------------------------------------------------------- benchmark
def check_benchmark(loaded: Loaded, benchmark: LoadedBenchmark, batch_size: int) -> Check:
    """The score with its interval beside the published one of the same shape.

    A published score outside of the interval is a failure where nothing is dropped and the whole
    set was asked; else there is nothing published to compare with.
    """
    plan = loaded.choices.plan.value
    records = answer_questions(
        loaded.model,
        loaded.tokenizer,
        loaded.image_processor,
        benchmark.questions,
        image_folder=benchmark.image_folder,
        conv_mode=loaded.choices.template.value,
        reduction=plan,
        batch_size=batch_size,
        max_new_tokens=benchmark.benchmark.max_new_tokens,
    )
    scores = benchmark.score(records)
    said = f"{scores.metric} {scores.value:.2f} [{scores.low:.2f}, {scores.high:.2f}] n={scores.n}"
    known, column = published_for(loaded.model.config), benchmark.benchmark.published
    published = None if known is None or column is None else known.scores.get(column)
    name = benchmark.benchmark.name
    if published is None:
        return Check(name, "info", f"{said}; nothing published for a model of this shape")
    said += f"; published for {known.name}: {published}"
    whole = benchmark.benchmark.count in (None, len(benchmark.questions))
    if plan.cuts or plan.program is not None or not whole:
        why = "with dropping" if whole else "a part of the set"
        return Check(name, "info", f"{said} ({why}: not comparable)")
    fits = scores.low <= published <= scores.high
    return Check(name, "pass" if fits else "FAIL", said)


# ----------------------------------------------------------------------------- command line
def parser() -> argparse.ArgumentParser:
    """The command line of `llava verify`."""
    flags = argparse.ArgumentParser(
        prog="llava verify", description="Check that a checkpoint is read as it was meant."
    )
    add_loading_flags(flags)
    add_reduction_flags(flags)
    flags.add_argument("--benchmark", help="answer this set and compare with the published score")
    flags.add_argument(
        "--data-root",
        default=str(DATA_ROOT),
        help="folder of the benchmarks (default playground/data/eval)",
    )
    flags.add_argument("--limit", type=int, help="about so many of its questions")
    flags.add_argument("--batch-size", type=int, default=8, help="of --benchmark (default 8)")
    flags.add_argument("--json", metavar="FILE", help="write the report there as well")
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Print the checks; 0 if none failed, else 1."""
    args = parser().parse_args(argv)
    plan = plan_from_args(args)
    check_output(args.json)
    if args.limit is not None and not args.benchmark:
        raise ValueError(f"--limit {args.limit} is about the questions of a --benchmark; give one")
    benchmark = None
    if args.benchmark:
        benchmark = load_benchmark(args.benchmark, args.data_root, args.limit)
        check_images_exist(benchmark.questions, benchmark.image_folder)
    with quiet():  # the choices are the report's first lines
        loaded = load_checkpoint(
            args.model_path,
            args.model_base,
            conv_mode=args.conv_mode,
            reduction=plan,
            **loading_options(args),
        )
    checks = []
    sources: list[Callable[[], Iterator[Check]]] = [lambda: verify(loaded)]
    if benchmark is not None:
        found = benchmark
        sources.append(lambda: iter([check_benchmark(loaded, found, args.batch_size)]))
    for source in sources:
        for check in source():
            checks.append(check)
            sys.stdout.write(f"{check}\n")
            sys.stdout.flush()
    failed = [check.name for check in checks if check.status == "FAIL"]
    sys.stdout.write(f"{'FAILED: ' + ', '.join(failed) if failed else 'all checks passed'}\n")
    if args.json:
        report = {
            "model_path": str(Path(args.model_path)),
            "ok": not failed,
            "choices": loaded.choices.to_dict(),
            "checks": [asdict(check) for check in checks],
            "environment": environment(),
        }
        json_dump(args.json, report)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
