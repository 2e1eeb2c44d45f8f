"""`llava data check-train`: would a training run get through its data, and what would it learn?

    llava data check-train --data_path mix665k.json --image_folder playground/data \\
        --model_name_or_path vicuna-7b-v1.5 --version v1 --model_max_length 2048 \\
        --json report.json --skip_list bad.json

Special here: a sample is judged by the code that trains on it. Errors are what would end a run
(a picture that is missing or does not decode, image marks that do not fit the pictures, turns that
cannot be read, nothing to learn); warnings what a run would do in silence (answers cut off at the
context's end, empty answers, ids that stand twice, pictures that training sees otherwise than
people do). Every picture is opened in all its bytes, by several processes. The exit code is 1 where
an error was found. Training leaves out what ``--skip_list`` wrote when it is asked to:
``--skip_samples bad.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from llava.mm_utils import (
    ASPECT_RATIOS,
    EXTREME_RATIO,
    MERGE_TYPES,
    check_image_file,
    check_scaled_size,
    opened_image,
    size_problems,
)
from llava.model.multimodal_encoder.builder import tower_class, tower_config, tower_structure
from llava.reduction.flags import add_reduction_flags, plan_from_args
from llava.reduction.plan import ReductionPlan
from llava.sequence import Group, Layout
from llava.train.arguments import ModelArguments, parse_pinpoints
from llava.train.dataset import ImageReader, LazySupervisedDataset, Measured
from llava.train.preprocess import ANSWER_NAMES, check_turns, count_image_marks, training_template
from llava.train.records import Records, image_names, parse_sources
from llava.train.setup import load_tokenizer, read_config
from llava.train.token_counts import in_workers
from llava.utils import check_output, environment, json_dump, user_errors

NAMED = 20
"""So many samples of a kind are listed by name."""
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif")
ERRORS = {
    "missing_image": "picture is missing",
    "broken_image": "picture does not decode",
    "long_image": "picture is too long to be scaled without padding or tiles",
    "image_field": "'image' is neither a path nor a list of paths",
    "image_marks": "<image> marks and pictures differ in number, or a mark stands in an answer",
    "turns": "turns cannot be read",
    "too_long": "first answer lies behind --model_max_length",
    "untrainable": "cannot be trained on",
}
WARNINGS = {
    "cut": "cut off at --model_max_length",
    "empty_answer": "has an empty answer; what follows it is not learned",
    "answer_first": "opens with an answer, which is left out",
    "repeated_id": "has the id of another sample",
    "extreme_image": f"picture has sides of more than {EXTREME_RATIO} to 1",
    "large_image": "picture is so large that Pillow warns of it",
    "turned_image": "picture says that it is to be turned; it is taken as it is stored",
    "deep_image": "picture has more than 8 bits a value; values above 255 become 255",
    "transparent_image": "picture is transparent; the colours behind that are taken",
    "animated_image": "picture has several frames; the first is taken",
}
UNLIMITED = 10**9


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one sample showed. problems: (kind, text); measured: None where it cannot be counted, or
    without a tokenizer; images: visual tokens of its pictures, as far as they are kept."""

    ident: str
    problems: tuple[tuple[str, str], ...]
    measured: Measured | None
    images: int


@dataclasses.dataclass(frozen=True)
class Checker:
    """Looks at a sample of `dataset`, whose tokenizer may be None: then nothing is counted."""

    dataset: LazySupervisedDataset
    decode: bool = True

    def __call__(self, index: int) -> Finding:
        record = self.dataset.records[index]
        problems: list[tuple[str, str]] = []
        try:
            names = image_names(record)
        except ValueError as error:
            names, problems = [], [("image_field", str(error))]
        for path in self._paths(index, names):
            problems += picture_problems(path, self.decode, self._scaled_by())
        images = None if problems and problems[0][0] == "image_field" else len(names)
        problems += turn_problems(record.get("conversations"), images)
        measured = None
        if self.dataset.tokenizer is not None and not any(kind in ERRORS for kind, _ in problems):
            measured, more = self._measure(index)
            problems += more
        ident = json.dumps(record.get("id"), ensure_ascii=False)
        ident = ident.encode(errors="backslashreplace").decode()
        return Finding(ident, tuple(problems), measured, len(names))

    def _scaled_by(self) -> Any:
        """The processor, where pictures are not padded or tiled before."""
        reader = self.dataset.reader
        if reader is None or reader.model_cfg.image_aspect_ratio in ("pad", "anyres"):
            return None
        return reader.image_processor

    def _paths(self, index: int, names: Sequence[str]) -> list[str]:
        reader = self.dataset.reader
        folder = self.dataset.records.image_folder(index) or ""
        return [os.path.join(reader.folder if reader else "", folder, name) for name in names]

    def _measure(self, index: int) -> tuple[Measured | None, list[tuple[str, str]]]:
        try:
            measured = self.dataset.measure(index)
        except (ValueError, OSError) as error:
            return None, [(self._why(index), str(error))]
        cut = [("cut", f"{measured.cut} tokens")] if measured.cut else []
        return measured, cut

    def _why(self, index: int) -> str:
        """Whether it is the length alone that keeps a sample from being trained on."""
        whole = self.dataset.with_max_length(UNLIMITED)
        try:
            whole.measure(index)
        except (ValueError, OSError):
            return "untrainable"
        return "too_long"


def picture_problems(
    path: str, decode: bool = True, scaled_by: Any = None
) -> list[tuple[str, str]]:
    """What is wrong with a picture file, and what of it training does not take as it looks; a
    missing one is looked for under other endings. decode: read all its bytes. scaled_by: a
    processor that gets the picture as it is."""
    try:
        check_image_file(path)
    except FileNotFoundError as error:
        return [("missing_image", f"{error}{_under_another_name(path)}")]
    except ValueError as error:
        return [("missing_image", str(error))]
    try:
        with open(path, "rb") as file, opened_image(file, path) as picture:
            if decode:
                picture.load()
            size = picture.size
            notes = size_problems(size)
            with contextlib.suppress(Exception):  # damage where training does not look
                notes += picture_notes(picture, decode)
    except (ValueError, OSError) as error:
        return [("broken_image", str(error))]
    try:
        if scaled_by is not None:
            check_scaled_size(size, scaled_by)
    except ValueError as error:
        return [("long_image", f"{path}: {error}")]
    return [(kind, f"{path} {text}") for kind, text in notes]


def _under_another_name(path: str) -> str:
    stem = os.path.splitext(path)[0]
    names = [stem + ending for own in ENDINGS for ending in (own, own.upper())]
    names += [unicodedata.normalize(form, path) for form in ("NFC", "NFD")]
    there = [name for name in names if os.path.isfile(name)]
    return f" (there is {os.path.basename(there[0])})" if there else ""


def picture_notes(picture: Image.Image, decoded: bool) -> list[tuple[str, str]]:
    """(kind, text) of what a run makes of an open picture without a word."""
    notes = []
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if turned in range(2, 9):
        notes.append(("turned_image", f"has EXIF orientation {turned}"))
    if picture.mode[0] in "IF":
        low, high = picture.getextrema() if decoded else (0, 256)
        if high > 255:
            notes.append(("deep_image", f"has mode {picture.mode}, values {low:g} to {high:g}"))
    if decoded and ("A" in picture.getbands() or "transparency" in picture.info):
        least, _ = picture.convert("RGBA").getchannel("A").getextrema()
        if least < 255:
            notes.append(("transparent_image", f"has mode {picture.mode} with opacity {least}/255"))
    frames = getattr(picture, "n_frames", 1) if picture.format != "MPO" else 1
    if frames > 1:
        notes.append(("animated_image", f"has {frames} frames"))
    return notes


def turn_problems(turns: Any, images: int | None) -> list[tuple[str, str]]:
    """What is wrong with the turns of a sample that has so many pictures (None: nobody knows)."""
    try:
        kept = check_turns(turns)
    except ValueError as error:
        return [("turns", str(error))]
    problems = []
    marks = count_image_marks(kept)
    answers = [turn["value"] for turn in kept if turn["from"] in ANSWER_NAMES]
    if images is not None and marks != images:
        problems.append(("image_marks", f"{marks} <image> marks, {images} pictures"))
    elif any("<image>" in answer for answer in answers):
        problems.append(("image_marks", "a mark stands in an answer"))
    if not all(answer.strip() for answer in answers):
        problems.append(("empty_answer", f"{sum(not a.strip() for a in answers)} empty"))
    if len(kept) < len(turns):
        problems.append(("answer_first", turns[0]["value"][:60]))
    return problems


# ----------------------------------------------------------------------------- report
def check_training_data(
    dataset: LazySupervisedDataset,
    *,
    plan: ReductionPlan | None = None,
    layers: int = 32,
    decode: bool = True,
    workers: int | None = None,
) -> dict[str, Any]:
    """Look at every sample once.

    plan, layers: what the token counts behind the cuts are for. decode: open pictures in all their
    bytes, not only their headers. Returns a report that JSON can say; nothing is raised for what
    the samples do wrong.
    """
    records = dataset.records
    chosen = records.once()
    checker = Checker(dataset, decode)
    findings = in_workers(partial(_check_at, checker, chosen), len(chosen), workers, "samples")
    kinds = {**ERRORS, **WARNINGS}
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    bad: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    measured: list[tuple[Measured, int]] = []
    for index, finding in zip(chosen, findings, strict=True):
        place = records.place(index)
        problems = list(finding.problems)
        if finding.ident != "null" and finding.ident in seen:
            problems.append(("repeated_id", f"sample {seen[finding.ident]}"))
        seen.setdefault(finding.ident, place.number)
        where = f"{place.name}, sample {place.number} (id {finding.ident})"
        for kind, text in dict(reversed(problems)).items():
            counts[kind] += 1
            if len(examples.setdefault(kind, [])) < NAMED:
                examples[kind].append(f"{where}: {text}")
        errors = [(kind, text) for kind, text in problems if kind in ERRORS]
        if errors:
            bad.append(
                {"source": place.source, "number": place.number, "file": place.name,
                 "id": finding.ident, "kind": errors[0][0], "reason": errors[0][1]}
            )  # fmt: skip
        if finding.measured is not None:
            measured.append((finding.measured, finding.images))
    return {
        "data_hash": records.data_hash,
        "samples": len(chosen),
        "with_images": int(records.pictured[chosen].sum()),
        "errors": {kind: counts[kind] for kind in ERRORS if counts[kind]},
        "warnings": {kind: counts[kind] for kind in WARNINGS if counts[kind]},
        "examples": {kind: examples[kind] for kind in kinds if kind in examples},
        "bad_samples": bad,
        "max_length": dataset.max_length,
        "tokens": token_statistics(measured, plan, layers),
    }


def _check_at(checker: Checker, chosen: Sequence[int], number: int) -> Finding:
    return checker(chosen[number])


def token_statistics(
    measured: Sequence[tuple[Measured, int]], plan: ReductionPlan | None, layers: int
) -> dict[str, Any] | None:
    """Tokens of the samples as they enter the model, and how many a layer sees on average."""
    if not measured:
        return None
    text, visual, cut = (np.array([row[i] for row, _ in measured]) for i in range(3))
    found: dict[str, Any] = {
        "counted_samples": len(measured),
        "text": _spread(text),
        "visual": _spread(visual),
        "all": _spread(text + visual),
        "cut_off": int(cut.sum()),
        "visual_share": round(float(visual.sum() / (text + visual).sum()), 4),
    }
    if plan is not None and plan.cuts:
        kept = mean_visual_tokens([(row.visual, images) for row, images in measured], plan, layers)
        after = float(text.mean()) + kept
        found["after_plan"] = {
            "plan": str(plan),
            "layers": layers,
            "mean_visual_per_layer": round(kept, 1),
            "mean_all_per_layer": round(after, 1),
            "share_of_tokens": round(after / float((text + visual).mean()), 4),
        }
    return found


def _spread(values: np.ndarray) -> dict[str, float | int]:
    low, half, high, top = np.percentile(values, (5, 50, 95, 99)).round().astype(int).tolist()
    return {
        "total": int(values.sum()), "mean": round(float(values.mean()), 1),
        "min": int(values.min()), "p5": low, "p50": half, "p95": high, "p99": top,
        "max": int(values.max()),
    }  # fmt: skip


def mean_visual_tokens(
    samples: Iterable[tuple[int, int]], plan: ReductionPlan, layers: int
) -> float:
    """Visual tokens of a sample in a layer, averaged over layers and samples.

    samples: (visual tokens, pictures). A sample's tokens are taken to be spread evenly over its
    pictures, which changes what rounding does and no more.
    """
    total = count = 0.0
    for (visual, images), times in Counter(samples).items():
        layout = _one_sample(visual, images)
        stages = plan.schedule(layout, layers)
        seen = sum((s.stop - s.start) * sum(g.count for g in s.layout.groups) for s in stages)
        total += times * seen / layers
        count += times
    return total / count


def _one_sample(visual: int, images: int) -> Layout:
    images = min(images, visual)
    sizes = [visual // images + (i < visual % images) for i in range(images)] if images else []
    groups = tuple(Group(0, number, size, size) for number, size in enumerate(sizes))
    return Layout((visual + 2,), groups, (1,))


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    lines = [
        f"{report['samples']} samples, {report['with_images']} with pictures "
        f"(data hash {report['data_hash'][:12]})"
    ]
    for title, kinds in (("error", ERRORS), ("warning", WARNINGS)):
        for kind, count in report[f"{title}s"].items():
            lines.append(f"{title}: {kinds[kind]}: {count}")
            lines += [f"    {example}" for example in report["examples"][kind][:3]]
    tokens = report["tokens"]
    if tokens:
        for name in ("text", "visual", "all"):
            row = tokens[name]
            lines.append(
                f"{name:>6} tokens of a sample: mean {row['mean']}, median {row['p50']}, 95 % "
                f"{row['p95']}, 99 % {row['p99']}, longest {row['max']}"
            )
        lines.append(
            f"cut off at --model_max_length {report['max_length']}: {tokens['cut_off']} tokens"
        )
    if tokens and "after_plan" in tokens:
        after = tokens["after_plan"]
        lines.append(
            f"with {after['plan']}: {after['mean_visual_per_layer']} visual tokens in a layer on "
            f"average; with the text, {100 * after['share_of_tokens']:.1f} % of all tokens are left"
        )
    bad = len(report["bad_samples"])
    lines.append(f"{bad or 'no'} sample{'s' if bad > 1 else ''} would end a run")
    return lines


# ----------------------------------------------------------------------------- command
def picture_settings(args: argparse.Namespace) -> ImageReader:
    """What is needed to count visual tokens; the geometry is the tower's, CLIP-L/14 at 336 pixels
    without --vision_tower. Pictures are not processed with it. ValueError for a tower that cannot
    be read."""
    name = args.vision_tower or "openai/clip-vit-large-patch14-336"
    structure = tower_structure(name)
    tower = tower_config(structure, name)
    side = tower.image_size
    settings = SimpleNamespace(
        image_aspect_ratio=args.image_aspect_ratio,
        mm_patch_merge_type=args.mm_patch_merge_type,
        image_grid_pinpoints=parse_pinpoints(args.image_grid_pinpoints, side),
    )
    kind = tower_class(structure.get("model_type", "clip_vision_model"), name)
    processor = kind.default_processor(tower)
    return ImageReader(
        processor, settings, side // tower.patch_size, folder=args.image_folder or ""
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava data check-train``; flags that training has are called the same."""
    flags = argparse.ArgumentParser(
        prog="llava data check-train", description="Check training files before a run."
    )
    flags.add_argument("--data_path", required=True, help="as in training: file, list or mixture")
    flags.add_argument("--image_folder", help="folder that the image paths start from")
    flags.add_argument("--model_name_or_path", help="base model: its tokenizer and its layers")
    flags.add_argument("--tokenizer_path", help="folder of the tokenizer, if it is not the model's")
    flags.add_argument("--version", default="v1", help="conversation template (default v1)")
    flags.add_argument("--model_max_length", type=int, default=2048, help="default 2048")
    flags.add_argument("--vision_tower", help="folder (or hub id) of the tower (default: "
                       "CLIP-L/14, 336 px)")  # fmt: skip
    flags.add_argument("--image_aspect_ratio", default="pad", choices=ASPECT_RATIOS[1:],
                       help="default pad")  # fmt: skip
    flags.add_argument("--mm_patch_merge_type", default="flat", choices=MERGE_TYPES,
                       help="default flat")  # fmt: skip
    flags.add_argument("--image_grid_pinpoints", help="anyres: sizes to choose from")
    flags.add_argument("--seed", type=int, default=42, help="of a mixture's draws (default 42)")
    flags.add_argument("--data_cache_dir", help="as in training")
    flags.add_argument("--num_layers", type=int, help="of the model (default: its own, else 32)")
    flags.add_argument("--no-decode", action="store_true", help="read headers of pictures only")
    flags.add_argument("--workers", type=int, help="processes (default: one a processor)")
    flags.add_argument("--json", metavar="FILE", help="write the report there as well")
    flags.add_argument("--skip_list", metavar="FILE", help="write the bad samples there, for "
                       "training's --skip_samples")  # fmt: skip
    add_reduction_flags(flags)
    return flags


def check_outputs(args: argparse.Namespace) -> None:
    """ValueError or OSError for a report or a list that cannot be written, would lie over the data,
    or over one another. The check of all pictures takes long."""
    read = [source.path for source in parse_sources(args.data_path)]
    read += [Path(args.data_path)] if Path(args.data_path).is_file() else []  # a mixture
    for written in (args.json, args.skip_list):
        check_output(written, read)
    if args.json and args.skip_list and Path(args.json).resolve() == Path(args.skip_list).resolve():
        raise ValueError(f"--json and --skip_list are both {args.json}; give two files")


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Check training files; 1 where a sample would end a run."""
    args = build_parser().parse_args(argv)
    plan = plan_from_args(args)
    check_outputs(args)
    tokenizer, layers = None, args.num_layers or 32
    if args.model_name_or_path or args.tokenizer_path:
        named = ModelArguments(args.model_name_or_path, tokenizer_path=args.tokenizer_path)
        tokenizer = load_tokenizer(named, args.model_max_length)
    if args.model_name_or_path and not args.num_layers:
        layers = int(read_config(ModelArguments(args.model_name_or_path))[1]["num_hidden_layers"])
    if plan is not None:
        plan.validate(layers)
    if args.image_folder and not Path(args.image_folder).is_dir():
        raise FileNotFoundError(f"image folder not found: {args.image_folder}")
    dataset = LazySupervisedDataset(
        Records.open(args.data_path, seed=args.seed, cache_dir=args.data_cache_dir),
        tokenizer,
        training_template(args.version),
        reader=picture_settings(args),
        max_length=args.model_max_length,
    )
    report = check_training_data(
        dataset, plan=plan, layers=layers, decode=not args.no_decode, workers=args.workers
    )
    if tokenizer is None:
        sys.stdout.write("tokens are not counted: no --model_name_or_path or --tokenizer_path\n")
    sys.stdout.write("\n".join(report_lines(report)) + "\n")
    if args.json:
        json_dump(args.json, {"data_path": args.data_path, **report, "environment": environment()})
    if args.skip_list:
        listed = {"data_hash": report["data_hash"], "samples": report["bad_samples"]}
        json_dump(args.skip_list, listed)
        if report["bad_samples"]:
            sys.stdout.write(f"training leaves them out with --skip_samples {args.skip_list}\n")
    return 1 if report["bad_samples"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
