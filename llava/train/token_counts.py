"""How many tokens each sample brings into the model, counted once and kept.

Special here: counts are exact (the ids that training will see, pictures by their size, after the
cut to the context) and made by data workers, on one rank of a machine while the others wait. They
are kept beside the Arrow files, named by everything that they depend on: the data's hash, the
tokenizer, the template and the picture settings.
``python -m llava.train.train --packed True --token_budget 16384 ...``
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from llava.train.dataset import LazySupervisedDataset
from llava.train.records import cache_folder, made_once
from llava.utils import atomic_write, get_logger, json_sha256, progress

logger = get_logger(__name__)

FORMAT = "tokens-v2"
MAX_WORKERS = 32
FEW = 4096
"""Fewer samples than this are counted without workers, which take longer to start."""
_PICTURE_SETTINGS = (
    "image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints", "mm_unpad_rounding",
    "mm_vision_select_feature",
)  # fmt: skip


class _Calls(Dataset):
    """`function` of every index, as a data set."""

    def __init__(self, function: Callable[[int], Any], count: int) -> None:
        self.function, self.count = function, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


def processors() -> int:
    """Processors that this process may use, where the system says so, else all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def in_workers(
    function: Callable[[int], Any], count: int, workers: int | None = None, desc: str = ""
) -> Iterator[Any]:
    """`function(i)` for i below `count`, in order. workers: processes; by default as many as this
    machine has processors for us, none for few samples."""
    if workers is None:
        workers = 0 if count < FEW else min(processors(), MAX_WORKERS)
    loader = DataLoader(
        _Calls(function, count), batch_size=64, num_workers=workers, collate_fn=list
    )
    yield from progress((item for batch in loader for item in batch), desc, count)


def count_tokens(
    dataset: LazySupervisedDataset,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> np.ndarray:
    """Text and visual tokens of every sample, int32 [N, 2], mapped from the cache.

    A sample that cannot be trained on has 0 and 0 if `dataset` skips such samples, else it is a
    ValueError that names it (pictures are not opened for this, see `ImageReader.sizes`).
    """
    target = cache_folder(cache_dir) / f"{FORMAT}-{_fingerprint(dataset)[:32]}.npy"

    def write() -> None:
        counts = _count(dataset, workers)
        with atomic_write(target, "wb") as file:
            np.save(file, counts)

    made_once(target, write)
    return np.load(target, mmap_mode="r")


def _count(dataset: LazySupervisedDataset, workers: int | None) -> np.ndarray:
    counts = np.zeros((len(dataset), 2), np.int32)
    cut = bad = 0
    measured = in_workers(partial(_measure, dataset), len(dataset), workers, "counting tokens")
    for index, found in enumerate(measured):
        if isinstance(found, str):
            message = f"{dataset.describe(index)}: {found}"
            if not dataset.skip_bad_samples:
                raise ValueError(message)
            bad += 1
            logger.warning("left out: %s", message)
        else:
            counts[index] = found[:2]
            cut += found.cut > 0
    logger.info(
        "%d samples: %d text and %d visual tokens; %d are cut to --model_max_length, %d left out",
        len(dataset), *counts.sum(0, dtype=np.int64), cut, bad,
    )  # fmt: skip
    return counts


def _measure(dataset: LazySupervisedDataset, index: int) -> Any:
    """The sample's `Measured`, or what is wrong with it."""
    try:
        return dataset.measure(index)
    except (ValueError, OSError) as error:
        return str(error)


def _fingerprint(dataset: LazySupervisedDataset) -> str:
    """A hash of everything that the counts depend on."""
    conv = dataclasses.asdict(dataclasses.replace(dataset.conv, tokenizer=None))
    facts: dict[str, Any] = {
        "data": dataset.records.data_hash,
        "tokenizer": _tokenizer_text(dataset.tokenizer),
        "template": {name: str(value) for name, value in conv.items()},
        "label_mode": dataset.label_mode,
        "im_start_end": dataset.use_im_start_end,
        "max_length": dataset.max_length,
        "skip": dataset.skip_bad_samples,
    }
    if dataset.reader is not None:
        reader = dataset.reader
        folders = [reader.folder, *dataset.records.image_folders]
        facts["pictures"] = {
            "settings": [str(getattr(reader.model_cfg, n, None)) for n in _PICTURE_SETTINGS],
            "side": reader.patches_per_side,
            "crop": str(reader.image_processor.crop_size),
            "folders": [folder and str(Path(folder).resolve()) for folder in folders],
        }
    return json_sha256(facts)


def _tokenizer_text(tokenizer: Any) -> str:
    """All of a tokenizer that decides on ids, as text."""
    table = getattr(tokenizer, "backend_tokenizer", None)
    content = table.to_str() if table is not None else json.dumps(tokenizer.get_vocab())
    flags = [getattr(tokenizer, name, None) for name in ("legacy", "add_bos_token")]
    return f"{type(tokenizer).__name__} {flags} {tokenizer.special_tokens_map} {content}"
