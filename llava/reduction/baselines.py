"""What a method has to beat: tokens kept at random, and tokens kept at an even stride.

Both take the same cuts and shares as PyramidDrop. `random` is a hash of (seed, sample, token), not
a generator shared by the batch: a sample keeps the same tokens alone and in a batch, and a later
cut keeps a subset of what an earlier one kept.

    llava eval digits-pope --model-path checkpoints/llava-digits \\
        --reduction "random:layers=[2,4,6],ratios=[0.5,0.25,0.125]"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llava.reduction.base import Selection, Signal, View, check_ratio, keep_highest
from llava.reduction.forms import Staged
from llava.sequence import Per


def hash_uniform(seed_G: Tensor, index_GN: Tensor) -> Tensor:
    """Numbers in [0, 1) [G, N] that depend on (seed, index) alone, on every device.

    Two multiply-xorshift rounds on 31 bits; products stay below 2**62, so no overflow is used.
    """
    mask = (1 << 31) - 1
    value = (index_GN * 0x27D4EB2F + seed_G[:, None] * 0x165667B1 + 0x3C6EF372) & mask
    for factor in (0x2C1B3C6D, 0x297A2D39):
        value = value ^ (value >> 15)
        value = (value * factor) & mask
    value = value ^ (value >> 16)
    return value.float() / (mask + 1)


@dataclass(frozen=True)
class Random(Staged):
    """Keep `int(N * ratio)` tokens by hash. seed: another draw."""

    ratio: float
    seed: int = 0
    per: Per = "image"
    name: ClassVar[str] = "random"
    positions: ClassVar[str] = "renumber"
    reads_text: ClassVar[bool] = False
    signals: ClassVar[tuple[Signal, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed {self.seed!r} is not accepted; give an integer >= 0")

    def budget(self, now: int, original: int) -> int:
        return min(now, int(original * self.ratio))

    def select(self, view: View) -> Selection:
        seed = (view.seed * 1_000_003 + self.seed * 7_919) & ((1 << 31) - 1)
        return keep_highest(hash_uniform(seed, view.origin), view)

    def options(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "seed": self.seed, "per": self.per}


@dataclass(frozen=True)
class Uniform(Staged):
    """Keep `int(N * ratio)` tokens at an even stride over those that are left."""

    ratio: float
    per: Per = "image"
    name: ClassVar[str] = "uniform"
    positions: ClassVar[str] = "renumber"
    reads_text: ClassVar[bool] = False
    signals: ClassVar[tuple[Signal, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio))

    def budget(self, now: int, original: int) -> int:
        return min(now, int(original * self.ratio))

    def select(self, view: View) -> Selection:
        rank = torch.arange(view.valid.shape[1], device=view.valid.device)
        count, budget = view.count[:, None].clamp_min(1), view.budget[:, None]
        steps_up = ((rank + 1) * budget) // count - (rank * budget) // count
        return keep_highest(steps_up.float(), view)

    def options(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "per": self.per}
