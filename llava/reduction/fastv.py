"""FastV: in front of layer K, keep the image tokens that layer K-1's last prompt row attends to.

Paper: arXiv 2403.06764. Originals: FastV's modeling_llama.py (in-place and masked), its HF LLaVA
with a cache, and fastv_kvcache.py for lmms-eval. The score of an image token is the attention that
the last prompt row pays it in layer K-1 (which the sequence in front of the cut runs anyway), mean
over the query heads. `round(N * (1 - R))` of a sample's N image tokens stay, halves to even, or an
absolute count; tokens keep the rotary positions of the uncut sequence. The choice is made once, at
prefill, and holds while tokens are generated; ``rerank=True`` makes it anew for every token.

Differs from the originals: every sample of a batch is ranked by itself, padding does not count, all
pictures of a sample compete (there one span at a fixed place), text-only samples are left alone,
scores are float32 with ties to the earlier token, and only one attention row is computed, so any
attention backend serves. In training PyramidDrop's scoring rows rank (those in front of answers).

    llava eval digits_pope --model-path checkpoints/llava-digits --reduction "fastv:k=2,r=0.5"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llava.reduction.base import Selection, Signal, View, check_count, keep_highest
from llava.reduction.forms import OneCut
from llava.sequence import Per


@dataclass(frozen=True)
class FastV(OneCut):
    """One cut. Exactly one of r, the share of the image tokens that goes, and keep, the number that
    stays of each group. rope: rank with rotated queries and keys, as published. per: all tokens of
    a "sample" or those of each "image" compete."""

    r: float | None = None
    keep: int | None = None
    rope: bool = True
    per: Per = "sample"
    name: ClassVar[str] = "fastv"
    positions: ClassVar[str] = "original"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.r is None) == (self.keep is None):
            raise ValueError(
                f"fastv needs r (share that goes) or keep (number that stays), one of them; got "
                f"r={self.r!r} and keep={self.keep!r}"
            )
        if self.keep is not None:
            check_count("keep", self.keep)
            return
        number = isinstance(self.r, (int, float)) and not isinstance(self.r, bool)
        if not number or not 0 <= self.r <= 1:  # type: ignore[operator]
            raise ValueError(f"r {self.r!r} is not accepted; give the share that goes, in [0, 1]")
        object.__setattr__(self, "r", float(self.r))  # type: ignore[arg-type]

    @classmethod
    def share_options(cls, share: float) -> dict[str, Any]:
        return {"r": round(1 - share, 12)}

    @property
    def signals(self) -> tuple[Signal, ...]:
        return (Signal("attention", offset=-1, rope=self.rope),)

    def budget(self, now: int, original: int) -> int:
        """ValueError when `keep` is above the group's original number of tokens."""
        if self.r is not None:
            return min(now, round(original * (1 - self.r)))
        assert self.keep is not None
        if self.keep > original:
            raise ValueError(
                f"fastv: keep={self.keep} is above the {original} visual tokens there are; give a "
                "smaller number, or a share with r"
            )
        return min(now, self.keep)

    def select(self, view: View) -> Selection:
        return keep_highest(view.signals[self.signals[0]], view)

    def options(self) -> dict[str, Any]:
        return {"r": self.r, "keep": self.keep, "rope": self.rope, "per": self.per}
