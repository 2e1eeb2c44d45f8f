"""Recorded training cases: label masks and the order of the length-grouped sampler.

Special here: paths are relative to the folder that is given, so the same rule runs on any folder
with these files. Called by tests/parity/reference_cases.py:
``python tests/parity/reference_cases.py tests/data/pyramiddrop``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

LABELS_FILE = "preprocess_labels.json"
SAMPLER_FILE = "length_grouped_sampler.json"

Result = tuple[str, str | None]
"""(name of the case, None if it holds or what differs)"""


def label_cases(folder: Path) -> Iterator[Result]:
    """Every record of `folder`/preprocess_labels.json against ``label_mode="legacy"``.

    The tokenizers are the folders tokenizer_legacy and tokenizer_nonlegacy beside the file.
    """
    records = json.loads((folder / LABELS_FILE).read_text())["records"]
    for record in records:
        kind = "legacy" if record["legacy"] else "nonlegacy"
        name = f"labels/{record['name']}/{record['template']}/{kind}"
        yield name, _check_labels(record, folder / f"tokenizer_{kind}")


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _check_labels(record: dict[str, Any], tokenizer_folder: Path) -> str | None:
    from llava.conversation import get_conversation
    from llava.train.preprocess import legacy_labels, legacy_multimodal

    conv = get_conversation(record["template"])
    turns = record["conversations"]
    if record["has_image"]:
        turns = legacy_multimodal(turns, conv.version, record.get("mm_use_im_start_end", False))
    moved = [turn["value"] for turn in turns]
    if moved != record["after_preprocess_multimodal"]:
        return f"turns are {moved}, recorded {record['after_preprocess_multimodal']}"
    try:
        got = legacy_labels(
            turns, _tokenizer(tokenizer_folder), conv, has_image=record["has_image"]
        )
    except ValueError as error:
        return None if "error" in record else f"raised {error}"
    if "error" in record:
        return f"no error; recorded {record['error']}"
    for what in ("input_ids", "labels"):
        mine = getattr(got, what)
        if mine != record[what]:
            return f"{what} are {mine}, recorded {record[what]}"
    if (got.warning or None) != (record["warning"] or None):
        return f"warning is {got.warning!r}, recorded {record['warning']!r}"
    return None


def sampler_cases(folder: Path) -> Iterator[Result]:
    """Every case of `folder`/length_grouped_sampler.json against the sampler's legacy mode."""
    cases = json.loads((folder / SAMPLER_FILE).read_text())["cases"]
    for case in cases:
        kind = "modality" if case["group_by_modality"] else "length"
        name = (
            f"sampler/{kind}/n{len(case['lengths'])}-b{case['batch_size']}-w{case['world_size']}"
            f"-seed{case['torch_seed']}"
        )
        yield name, _check_sampler(case)


def _check_sampler(case: dict[str, Any]) -> str | None:
    import torch

    from llava.train.sampler import LengthGroupedSampler

    sampler = LengthGroupedSampler(
        case["batch_size"],
        case["world_size"],
        lengths=case["lengths"],
        group_by_modality=case["group_by_modality"],
    )
    torch.manual_seed(case["torch_seed"])
    got = list(sampler)
    return None if got == case["indices"] else f"order is {got}, recorded {case['indices']}"


def run(folder: str | Path) -> list[Result]:
    """All training cases found in `folder` (a ``preprocess`` folder); empty if there are none."""
    folder = Path(folder)
    results: list[Result] = []
    if (folder / LABELS_FILE).is_file():
        results += label_cases(folder)
    if (folder / SAMPLER_FILE).is_file():
        results += sampler_cases(folder)
    return results
