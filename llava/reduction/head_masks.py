"""Head masks for YOPO: which heads of which layers look at visual tokens, and how that is found.

A mask is bool [layers, heads], True = kept. The rule of the original (arXiv 2410.06169,
`gen_mask_llava.py`): for each sample and head, the ratio of the attention that visual columns get
to what text columns get; a sample votes for a head where the ratio is above a threshold; a head is
kept if more than 40 % of the samples vote for it; the first two layers keep all heads. So each head
has one critical ratio, its smallest ratio among the best voters, and is kept if that is above the
threshold. A wanted average number of heads is then a matter of sorting.

The original looked at all rows of stored L x L maps, by code that was not published for LLaVA; here
the row of the last prompt token counts, in float32, as in its code for Qwen2-VL (one row).

    llava calibrate-heads --model-path CHECKPOINT --benchmark digits --average-heads 3 --output m
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.reduction.base import Selection, Signal, View
from llava.sequence import Per
from llava.utils import atomic_write

MASK_FILES: tuple[str, ...] = (".npy", ".pth", ".pt", ".safetensors")
VOTES = 0.4
"""A head needs more than this share of the votes. The original's comment says majority, its code 40
of 100."""
ALWAYS = 2
"""The first layers, which keep all heads."""
MASK_KEY, RATIO_KEY = "head_mask", "critical_ratio"


# ----------------------------------------------------------------------------- measuring
class WatchHeads:
    """A cut that keeps everything and remembers what each head of the layer behind it looks at.

    One of these in front of each layer, in one forward pass, gives the attention of the last prompt
    token through the loop's own signal. seen: one tensor [samples with a picture, heads] a batch,
    the mass on visual tokens in float32.
    """

    name = "watch_heads"
    signals = (Signal("attention", heads=True),)
    per: Per = "sample"
    reads_text = True

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def budget(self, now: int, original: int) -> int:
        return now

    def select(self, view: View) -> Selection:
        mass_GNH = view.signals[self.signals[0]].float()
        self.seen.append((mass_GNH * view.valid[..., None]).sum(1))
        return Selection(keep=view.valid)

    def options(self) -> dict[str, Any]:
        return {}


def ratios_of(watched: Sequence[WatchHeads]) -> np.ndarray:
    """[samples, layers, heads]: mass on visual tokens over mass on text, from one `WatchHeads` a
    layer."""
    visual = torch.stack([torch.cat(each.seen) for each in watched], 1).double().cpu().numpy()
    return visual / np.maximum(1 - visual, np.finfo(np.float32).tiny)


# ----------------------------------------------------------------------------- the rule
def critical_ratios(ratios: np.ndarray, votes: float = VOTES) -> np.ndarray:
    """The threshold below which each head is kept [layers, heads].

    ratios: [samples, layers, heads]. A head with more than `votes` of the samples above a threshold
    is kept, so its critical ratio is the one of rank ``int(votes * samples) + 1`` from above.
    """
    if not 0 <= votes < 1:
        raise ValueError(f"votes {votes!r} is not accepted; give a share in [0, 1)")
    rank = int(votes * len(ratios) + 1e-9)
    return -np.sort(-ratios, axis=0)[rank]


def mask_above(critical: np.ndarray, threshold: float, always: int = ALWAYS) -> np.ndarray:
    """Bool [layers, heads]: heads whose critical ratio is above the threshold, and the first
    layers."""
    mask = critical > threshold
    mask[:always] = True
    return mask


def threshold_for(critical: np.ndarray, average: float, always: int = ALWAYS) -> float:
    """The smallest threshold that keeps at most `average` heads a layer, all layers counted.

    ValueError for an average that the first layers alone exceed, or more than there are.
    """
    layers, heads = critical.shape
    least = always * heads / layers
    if not least <= average <= heads:
        raise ValueError(
            f"{average:g} heads a layer on average; the first {always} of {layers} layers keep all "
            f"{heads}, so {least:.3g} to {heads} are accepted"
        )
    free = np.sort(critical[always:], axis=None)[::-1]
    count = int(round(average * layers, 6)) - always * heads
    return float(free[count]) if count < len(free) else -1.0


# ----------------------------------------------------------------------------- masks and files
def head_rows(heads: Any) -> float | tuple[str, ...]:
    """What `heads` may be given as, in the form `YOPO` keeps. ValueError for anything else."""
    if isinstance(heads, str):
        return head_rows(load_head_mask(heads))
    if isinstance(heads, (int, float)) and not isinstance(heads, bool):
        if not 0 <= heads <= 1:
            raise ValueError(f"heads {heads!r} is not accepted; give a share in [0, 1] or a mask")
        return float(heads)
    if isinstance(heads, torch.Tensor):
        heads = heads.cpu().numpy()
    rows = [_head_row(row) for row in heads] if isinstance(heads, Sequence | np.ndarray) else []
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            f"heads {heads!r} is no mask; give one row of 0 and 1 a layer, a file "
            f"({', '.join(MASK_FILES)}) or a share"
        )
    return tuple(rows)


def _head_row(row: Any) -> str:
    if isinstance(row, str) and set(row) <= {"0", "1"}:
        return row
    flags = np.asarray(row) if not isinstance(row, str) else np.array([])
    if flags.ndim != 1 or not np.isin(flags, (0, 1)).all() or isinstance(row, str):
        raise ValueError(f"row {row!r} of the head mask is not accepted; give 0 and 1 a head")
    return "".join("1" if flag else "0" for flag in flags)


def load_head_mask(path: str | Path) -> np.ndarray:
    """Bool [layers, heads], True = kept, from the original's .npy or .pth or from ours.

    Nothing in the file is executed. ValueError for a file that is missing, of another kind or of
    another shape.
    """
    file = Path(path)
    if file.suffix not in MASK_FILES:
        raise ValueError(f"head mask {path}: accepted are {', '.join(MASK_FILES)} files")
    if not file.is_file():
        raise ValueError(f"head mask {path} does not exist")
    try:
        mask = _read_mask(file)
    except Exception as error:
        raise ValueError(f"head mask {path} cannot be read: {error}") from error
    if mask.ndim != 2 or not mask.size or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"head mask {path} holds shape {mask.shape} of {mask.dtype}; needed: [layers, heads] "
            "of 0 and 1"
        )
    return mask.astype(bool)


def _read_mask(file: Path) -> np.ndarray:
    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False)
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = load_file(file)
        if MASK_KEY not in tensors:
            raise ValueError(f"it holds {sorted(tensors)}; {MASK_KEY!r} is needed")
        return tensors[MASK_KEY]
    return np.asarray(torch.load(file, map_location="cpu", weights_only=True))


def save_head_mask(
    path: str | Path, mask: np.ndarray, critical: np.ndarray, origin: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write PATH.npy, as the original reads it, and PATH.safetensors with the critical ratios and,
    as metadata, how it was made. Each whole or not at all."""
    from safetensors.numpy import save

    stem = Path(path)
    array, rich = (stem.with_name(stem.name + suffix) for suffix in (".npy", ".safetensors"))
    buffer = io.BytesIO()
    np.save(buffer, mask.astype(bool), allow_pickle=False)
    tensors = {MASK_KEY: mask.astype(bool), RATIO_KEY: critical.astype(np.float32)}
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in origin.items()
    }
    for target, data in ((rich, save(tensors, metadata)), (array, buffer.getvalue())):
        with atomic_write(target, "wb") as file:
            file.write(data)
    return array, rich


def read_origin(path: str | Path) -> dict[str, str]:
    """How a .safetensors mask was made."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})
