"""The conformance checker: recorded runs of the original implementations against this package.

    python tests/parity/reference_cases.py DIR...

Walks folders laid out like `<method>/<case>/{meta.json, config.json, ...}`, runs every case on
every backend that applies, prints one line a case with the largest deviation, and exits 1 if a case
fails or if nothing was run. Names that start with "_" and files that are no case are skipped. A
folder of a method that the package does not have is reported as such and fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import adaptprune_cases
import eval_cases
import fastv_cases
import preprocess_cases
import pyramiddrop_cases
import recorded
import simignore_cases
import torch
import training_cases
import yopo_cases
from on_device import DEVICE, gpu_allocations
from transformers.utils import logging as transformers_logging

from llava.reduction import REDUCERS

# Subjects that recorded folders exist for; those without a checker here are not built yet.
SUBJECTS = ("pyramiddrop", "fastv", "simignore", "adaptprune", "yopo", "eval")
# Of each method, the module whose `run_case(folder)` runs a case: [(variant, Check)].
CHECKERS = {
    "pyramiddrop": pyramiddrop_cases,
    "fastv": fastv_cases,
    "simignore": simignore_cases,
    "adaptprune": adaptprune_cases,
    "yopo": yopo_cases,
}
PREPROCESS_FILES = (
    *preprocess_cases.CHECKS,
    training_cases.LABELS_FILE,
    training_cases.SAMPLER_FILE,
)
Line = tuple[bool, str]


def subject_of(folder: Path) -> str | None:
    """The method a folder belongs to: its own name, or the nearest parent's."""
    for part in reversed(folder.resolve().parts):
        if part in SUBJECTS:
            return part
    return None


def case_subject(folder: Path) -> str | None:
    """The method of a case folder: what meta.json shows, else the folder's name.

    PyramidDrop's cases alone have both of its lists in meta.json.
    """
    meta = json.loads((folder / "meta.json").read_text())
    if {"layer_list", "image_token_ratio_list"} <= set(meta):
        return "pyramiddrop"
    return meta.get("method") or subject_of(folder)


def walk(folder: Path) -> Iterator[Path]:
    """The folder and all below it, but for names that start with an underscore or a dot."""
    yield folder
    for child in sorted(folder.iterdir()):
        if child.is_dir() and child.name[0] not in "_.":
            yield from walk(child)


def run_model_case(folder: Path, name: str) -> Iterator[Line]:
    subject = case_subject(folder)
    if subject not in CHECKERS:
        known = "not in this package" if subject not in REDUCERS else "without a checker"
        yield False, f"FAIL  {name}: the method {subject!r} is {known}"
        return
    for variant, check in CHECKERS[subject].run_case(folder):
        if check.count == 0:
            check.failures.append("nothing was compared")
        detail = f"{check.worst:.2e} {check.worst_name}".strip()
        line = f"{name} [{variant}] {check.count} comparisons, largest deviation {detail}"
        if check.failures:
            yield False, f"FAIL  {line}\n      " + "\n      ".join(check.failures)
        else:
            yield True, f"ok    {line}"


def run_preprocess(folder: Path, name: str) -> Iterator[Line]:
    for line, deviation in preprocess_cases.run_case(folder):
        good = math.isfinite(deviation) and deviation <= pyramiddrop_cases.ATOL
        yield (
            good,
            f"{'ok   ' if good else 'FAIL '} {name} {line} largest deviation {deviation:.2e}",
        )
    for line, problem in training_cases.run(folder):
        text = "equal" if problem is None else problem
        yield problem is None, f"{'ok   ' if problem is None else 'FAIL '} {name} {line}: {text}"


def run(folders: list[Path]) -> Iterator[Line]:
    """(passed, line) for every case below the folders. Nothing is yielded where there is none."""
    for root in folders:
        if not root.is_dir():
            yield False, f"FAIL  {root}: no such folder"
            continue
        for folder in walk(root):
            name = str(folder.relative_to(root.parent))
            try:
                if recorded.is_case(folder):
                    before = gpu_allocations()
                    yield from run_model_case(folder, name)
                    if DEVICE.type == "cuda" and gpu_allocations() == before:
                        yield False, f"FAIL  {name}: nothing of it ran on the GPU"
                elif any((folder / file).is_file() for file in PREPROCESS_FILES):
                    yield from run_preprocess(folder, name)
                elif (folder / "expected.json").is_file():
                    yield from eval_cases.run_case(folder, name)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                yield (
                    False,
                    f"FAIL  {name}: {type(error).__name__}: {error} "
                    f"({Path(where.filename).name}:{where.lineno})",
                )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    passed = failed = 0
    for good, line in run(arguments.folders):
        passed, failed = passed + good, failed + (not good)
        print(line, flush=True)
    if passed + failed == 0:
        print("no recorded case was found", file=sys.stderr)
        return 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
