"""`llava data check NAME|all`: is a set on disk what its scores will be taken for?

    llava data check pope mme --json report.json
    llava data check all --no-decode

Special here: what goes wrong quietly is looked for: a question file that was cut, pictures that are
missing or do not decode (every one is opened, in all its bytes), questions that stand twice, labels
that do not belong to the questions. `all` means every set whose folder is there. The exit code is 1
where a problem was found.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.benchmarks import (
    BENCHMARKS,
    DATA_ROOT,
    benchmark_folder,
    get_benchmark,
    load_benchmark,
    load_references,
    resolve_names,
)
from llava.eval.questions import Question
from llava.utils import environment, json_dump, progress, user_errors

NAMED = 20
"""So many of the missing, broken or repeated are listed by name."""


@dataclass
class Report:
    """What was found. expected: questions of the full set, None where it has no fixed size; the
    lists name the first few, the counts are of all."""

    name: str
    questions: int = 0
    expected: int | None = None
    images: int = 0
    labels: int | None = None
    missing_images: int = 0
    broken_images: int = 0
    repeated_questions: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, kind: str, found: Sequence[str], what: str) -> int:
        """Count a kind of problem, with examples."""
        if found:
            self.examples[kind] = list(found[:NAMED])
            self.problems.append(f"{what}: {len(found)}")
        return len(found)


def check_benchmark(
    name: str, data_root: str | Path = DATA_ROOT, decode: bool = True, workers: int | None = None
) -> Report:
    """Look at one set. Whatever its files do wrong is in the report, nothing is raised.

    decode: open every picture, not only look for it.
    """
    report = Report(name, expected=get_benchmark(name).count)
    try:
        loaded = load_benchmark(name, data_root)
        labels = load_references(loaded) if loaded.benchmark.judged else loaded.labels
    except (ValueError, OSError, KeyError) as err:
        report.problems.append(" ".join(str(err).split()) or type(err).__name__)
        return report
    report.questions = len(loaded.questions)
    report.labels = None if labels is None else len(labels)
    if report.expected is not None and report.questions != report.expected:
        report.problems.append(f"{report.questions} questions, the full set has {report.expected}")
    report.repeated_questions = report.note(
        "repeated_questions", _repeated(loaded.questions), "questions that stand more than once"
    )
    images = list(dict.fromkeys(i for question in loaded.questions for i in question.images))
    report.images = len(images)
    files = [image for image in images if not image.startswith("data:")]
    missing = [image for image in files if not (loaded.image_folder / image).is_file()]
    report.missing_images = report.note("missing_images", missing, "missing pictures")
    if decode:
        gone = set(missing)
        there = [image for image in images if image not in gone]
        broken = _broken(there, loaded.image_folder, name, workers)
        report.broken_images = report.note("broken_images", broken, "pictures that do not decode")
    return report


def _repeated(questions: Iterable[Question]) -> list[str]:
    """Questions with the id, the words and the pictures of another one."""
    asked = Counter((str(q.question_id), q.text, q.images) for q in questions)
    return [own for (own, _, _), count in asked.items() if count > 1]


def _broken(images: Sequence[str], folder: Path, name: str, workers: int | None) -> list[str]:
    workers = workers or min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        reasons = pool.map(lambda image: _reason(image, folder), images)
        found = list(progress(reasons, f"pictures of {name}", len(images)))
    return [
        f"{image[:60]}: {reason}" for image, reason in zip(images, found, strict=True) if reason
    ]


def _reason(image: str, folder: Path) -> str:
    """Why a picture cannot be used; empty for a good one."""
    try:
        source: Any = folder / image
        if image.startswith("data:"):
            source = io.BytesIO(base64.b64decode(image.partition(",")[2], validate=True))
        with Image.open(source) as picture:
            picture.load()
    except Exception as err:  # PIL raises whatever its decoders do
        return f"{type(err).__name__}: {err}"
    return ""


def chosen_names(names: Sequence[str], data_root: str | Path) -> list[str]:
    """Benchmarks to look at; `all` stands for those whose folder is there."""
    if "all" not in names:
        return resolve_names(names)
    there = [n for n, row in BENCHMARKS.items() if benchmark_folder(row, data_root).is_dir()]
    found = [
        name
        for name in there
        if (benchmark_folder(BENCHMARKS[name], data_root) / BENCHMARKS[name].questions).is_file()
    ]
    if not found:
        raise ValueError(f"no benchmark lies in {data_root}; see docs/Evaluation.md")
    return found


def report_lines(reports: Sequence[Report]) -> list[str]:
    """A table with a line a set, and the problems below it."""
    head = ("set", "questions", "expected", "labels", "pictures", "missing", "broken", "twice")
    rows = [
        (
            report.name, report.questions, report.expected, report.labels, report.images,
            report.missing_images, report.broken_images, report.repeated_questions,
        )
        for report in reports
    ]  # fmt: skip
    cells = [head, *(tuple("-" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(f"{cell:>{width}}" if place else f"{cell:<{width}}"
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]  # fmt: skip
    for report in reports:
        lines += [f"{report.name}: {problem}" for problem in report.problems]
    good = sum(not report.problems for report in reports)
    return [*lines, f"{good} of {len(reports)} sets without a problem"]


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Check the named benchmarks."""
    flags = argparse.ArgumentParser(prog="llava data check", description="Check sets on disk.")
    flags.add_argument("benchmarks", nargs="+", metavar="NAME", help="benchmark, group, or `all`")
    flags.add_argument(
        "--data-root",
        default=str(DATA_ROOT),
        help="folder of the benchmarks (default playground/data/eval)",
    )
    flags.add_argument("--no-decode", action="store_true", help="look for pictures, open none")
    flags.add_argument("--json", metavar="FILE", help="write the report there as well")
    flags.add_argument("--workers", type=int, help="pictures opened at a time")
    args = flags.parse_args(argv)
    names = chosen_names(args.benchmarks, args.data_root)
    reports = [
        check_benchmark(name, args.data_root, not args.no_decode, args.workers) for name in names
    ]
    sys.stdout.write("\n".join(report_lines(reports)) + "\n")
    if args.json:
        content = {"data_root": args.data_root, "sets": [asdict(report) for report in reports]}
        json_dump(args.json, {**content, "environment": environment()})
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
