"""``llava calibrate-heads``: which heads look at pictures, measured on a user's own questions.

Special here: one forward pass a batch measures every layer through the staged loop's own signal
(`WatchHeads` in front of each layer), one row a sample, never an L x L map; the vote of
`llava.reduction.head_masks` turns that into one mask for each wanted threshold or average. The
.safetensors beside each .npy says how it was made and holds the critical ratios, so another
threshold needs no new run.

    llava calibrate-heads --model-path checkpoints/llava-digits --benchmark digits \\
        --average-heads 3 --output heads                                 # seconds on one CPU core
    llava eval digits_pope --model-path checkpoints/llava-digits \\
        --reduction "yopo:layers=4,heads=heads.npy,window=5,ffn=2"
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.conversation import resolve_conv_mode
from llava.eval.benchmarks import DATA_ROOT, load_benchmark, resolve_names
from llava.eval.layouts import read_question_file
from llava.eval.questions import Question, check_images_exist
from llava.loading_flags import add_loading_flags, loading_options
from llava.mm_utils import decode_image, get_model_name_from_path
from llava.prompting import build_prompt, move_batch, prepare_batch
from llava.reduction import Cut, ReductionPlan
from llava.reduction.head_masks import (
    ALWAYS,
    VOTES,
    WatchHeads,
    critical_ratios,
    mask_above,
    ratios_of,
    save_head_mask,
    threshold_for,
)
from llava.utils import environment, get_logger, progress, user_errors

log = get_logger(__name__)
Sample = tuple[Question, Path]


# ----------------------------------------------------------------------------- measuring
def head_ratios(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    samples: Sequence[Sample],
    *,
    conv_mode: str | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """[samples, layers, heads]: the last prompt token's attention to the pictures over that to
    text, without any reduction. Each sample is a question with a picture and its image folder."""
    conv_mode, _ = resolve_conv_mode(conv_mode, model.config)
    watched = [WatchHeads() for _ in range(model.config.num_hidden_layers)]
    cuts = tuple(Cut(layer, each) for layer, each in enumerate(watched))
    plan = ReductionPlan(cuts, positions="original")
    start_end = getattr(model.config, "mm_use_im_start_end", False)
    for batch in progress(_batches(samples, batch_size), "batches", -(-len(samples) // batch_size)):
        prompts = [
            build_prompt(q.text, conv_mode, len(q.images), start_end, tokenizer) for q, _ in batch
        ]
        pictures = [[open_picture(image, folder) for image in q.images] for q, folder in batch]
        inputs = prepare_batch(tokenizer, image_processor, model.config, prompts, pictures)
        inputs = move_batch(inputs, model.device, model.dtype)
        ids = inputs.pop("input_ids")
        with torch.inference_mode():
            model(ids, **inputs, reduction=plan, use_cache=False, logits_to_keep=1)
    return ratios_of(watched)


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def choose_samples(sets: Sequence[tuple[Sequence[Question], Path]], count: int) -> list[Sample]:
    """`count` questions with a picture, about as many of each set, evenly spaced in it.

    ValueError when there are not so many.
    """
    with_picture = [[(q, folder) for q in questions if q.images] for questions, folder in sets]
    total = sum(map(len, with_picture))
    if not 1 <= count <= total:
        raise ValueError(
            f"{count} samples are asked for; the questions given hold {total} with a picture"
        )
    taken: list[Sample] = []
    # The smallest set first: what it lacks is taken from the others.
    for left, own in zip(
        range(len(with_picture), 0, -1), sorted(with_picture, key=len), strict=True
    ):
        share = min(len(own), -(-(count - len(taken)) // left))
        taken += [own[(2 * i + 1) * len(own) // (2 * share)] for i in range(share)]
    return taken[:count]


def picture_bytes(image: str, folder: Path) -> bytes:
    """The file of a picture, or what a `data:` address holds."""
    if image.startswith("data:"):
        return base64.b64decode(image.partition(",")[2])
    return (folder / image).read_bytes()


def open_picture(image: str, folder: Path) -> Image.Image:
    """A picture of a question. ValueError, naming it, for a damaged one."""
    return decode_image(io.BytesIO(picture_bytes(image, folder)), image[:60])


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of the questions and pictures that were used."""
    found = hashlib.sha256()
    for question, folder in samples:
        found.update(question.text.encode() + b"\0")
        for image in question.images:
            found.update(hashlib.sha256(picture_bytes(image, folder)).digest())
    return found.hexdigest()


# ----------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava calibrate-heads``."""
    parser = argparse.ArgumentParser(
        prog="llava calibrate-heads",
        description="Head masks for YOPO, from the attention of a model on questions of yours.",
    )
    add_loading_flags(parser)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="questions run together (default %(default)s)"
    )
    data = parser.add_argument_group("questions (with pictures; their answers are not needed)")
    data.add_argument("--question-file", action="append", default=[], help="may be repeated")
    data.add_argument("--image-folder", default="", help="folder that the image paths start from")
    data.add_argument("--benchmark", help="sets by name, e.g. digits, instead of files")
    data.add_argument(
        "--data-root", default=str(DATA_ROOT), help="of --benchmark (default %(default)s)"
    )
    data.add_argument("--samples", type=int, default=100, help="questions to use (default 100)")
    rule = parser.add_argument_group(
        "the mask (--threshold or --average-heads; several numbers: several masks)"
    )
    rule.add_argument(
        "--threshold", type=float, nargs="+", help="attention to pictures over that to text"
    )
    rule.add_argument("--average-heads", type=float, nargs="+", help="heads a layer, on average")
    rule.add_argument(
        "--votes",
        type=float,
        default=VOTES,
        help=f"share of the samples that must be above it (default {VOTES})",
    )
    rule.add_argument(
        "--always",
        type=int,
        default=ALWAYS,
        help="first layers that keep all heads (default %(default)s)",
    )
    parser.add_argument("--output", required=True, help="file name without .npy and .safetensors")
    return parser


def load(args: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    """(tokenizer, model, image processor, model name) of the loading flags, without a plan."""
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(
        args.model_path,
        args.model_base,
        conv_mode=args.conv_mode,
        reduction="none",
        **loading_options(args),
    )
    return *loaded[:3], get_model_name_from_path(str(args.model_path))


def load_sets(args: argparse.Namespace) -> list[tuple[Sequence[Question], Path]]:
    """The questions and image folders that the flags name; ValueError for none or both kinds."""
    if bool(args.question_file) == bool(args.benchmark):
        raise ValueError("give --question-file or --benchmark, and not both")
    sets: list[tuple[Sequence[Question], Path]] = []
    for path in args.question_file:
        sets.append((read_question_file(path), Path(args.image_folder)))
    for name in resolve_names(args.benchmark.split(",")) if args.benchmark else ():
        loaded = load_benchmark(name, args.data_root)
        sets.append((loaded.questions, loaded.image_folder))
    return sets


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for what cannot be, before the model is loaded."""
    if (args.threshold is None) == (args.average_heads is None):
        raise ValueError("give --threshold or --average-heads, and not both")
    if args.batch_size < 1 or args.always < 0:
        raise ValueError(
            f"--batch-size {args.batch_size}, --always {args.always}; accepted: from 1, from 0"
        )
    if not 0 <= args.votes < 1:
        raise ValueError(f"--votes {args.votes}; accepted: a share from 0 to below 1")


def thresholds(args: argparse.Namespace, critical: np.ndarray) -> list[tuple[str, float]]:
    """(file name, threshold) of each wanted mask."""
    wanted = args.threshold or args.average_heads
    found = args.threshold or [threshold_for(critical, n, args.always) for n in wanted]
    if len(wanted) == 1:
        return [(args.output, found[0])]
    return [(f"{args.output}_{number:g}", each) for number, each in zip(wanted, found, strict=True)]


def describe(name: str, threshold: float, mask: np.ndarray) -> str:
    """The lines a terminal shows for one mask."""
    kept = mask.sum(1)
    rows = [
        f"  layer {layer:>3}: {count:>3} of {mask.shape[1]}  "
        + "".join("#" if flag else "." for flag in mask[layer])
        for layer, count in enumerate(kept)
    ]
    half = kept[: -(-len(kept) // 2)].mean()
    head = (
        f"{name}.npy, {name}.safetensors: threshold {threshold:.4g}, {kept.mean():.3g} heads a "
        f"layer on average ({half:.3g} in the first half)"
    )
    return "\n".join([head, *rows])


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava calibrate-heads``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    samples = choose_samples(load_sets(args), args.samples)
    for question, folder in samples:
        check_images_exist([question], folder)
    tokenizer, model, image_processor, name = load(args)
    ratios = head_ratios(
        model,
        tokenizer,
        image_processor,
        samples,
        conv_mode=args.conv_mode,
        batch_size=args.batch_size,
    )
    critical = critical_ratios(ratios, args.votes)
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    origin = {
        "made_by": "llava calibrate-heads",
        "model": name,
        "model_config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "data": [*args.question_file, *([args.benchmark] if args.benchmark else [])],
        "data_sha256": digest(samples),
        "samples": len(samples),
        "votes": args.votes,
        "always": args.always,
        "measured": "attention of the last prompt token, float32, no reduction",
        "environment": environment(),
    }
    for path, threshold in thresholds(args, critical):
        mask = mask_above(critical, threshold, args.always)
        own = {"threshold": threshold, "average_heads": float(mask.sum(1).mean())}
        save_head_mask(path, mask, critical, {**origin, **own})
        sys.stdout.write(describe(path, threshold, mask) + "\n")


if __name__ == "__main__":
    main()
