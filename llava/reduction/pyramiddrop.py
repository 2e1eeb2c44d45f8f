"""PyramidDrop: after chosen layers, keep the share of image tokens that the instruction looks at.

Paper: arXiv 2410.17247, section 3. Original: llava/model/modeling_llama_pdrop.py,
`pdrop_rank_drop`. The queries of the scoring rows and the keys of all tokens come from the layer
behind the cut (its input norm, its projections, rotated with the positions the uncut sequence has);
the softmax runs over all keys; the score of an image token is the mean over heads and scoring rows.
`int(N * ratio)` tokens of the original N stay, in their order.

In inference the scoring row is the last prompt token; in training every row in front of an answer
(the mean of their attention). Differs from the original: means are taken in float32 (there in the
model's dtype, where ties are possible), each picture of a sample is ranked (there only the first),
and an image token whose next token is supervised stays (the `plain` template).

    llava eval digits_pope --model-path checkpoints/llava-digits \\
        --layer_list "[2,4,6]" --image_token_ratio_list "[0.5,0.25,0.125]"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llava.reduction.base import Selection, Signal, View, check_ratio, keep_highest
from llava.reduction.forms import Staged
from llava.sequence import Per


@dataclass(frozen=True)
class PyramidDrop(Staged):
    """One cut. ratio: share of the original image tokens that stays. rope: rank with rotated
    queries and keys, as published. per: tokens of one "image" or of the whole "sample" compete."""

    ratio: float
    rope: bool = True
    per: Per = "image"
    name: ClassVar[str] = "pyramiddrop"
    positions: ClassVar[str] = "renumber"
    lowest: ClassVar[int] = 1
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio))

    @property
    def signals(self) -> tuple[Signal, ...]:
        return (Signal("attention", offset=0, rope=self.rope),)

    def budget(self, now: int, original: int) -> int:
        return min(now, int(original * self.ratio))

    def select(self, view: View) -> Selection:
        return keep_highest(view.signals[self.signals[0]], view)

    def options(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "rope": self.rope, "per": self.per}
