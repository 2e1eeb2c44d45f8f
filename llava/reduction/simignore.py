"""Simignore: before the language model, keep the image tokens that resemble words of the question.

Paper: arXiv 2412.09817 (AAAI 2025). Originals: Simignore's llava_arch.py (similarity) and its copy
of FastV. The similarity of an image token and a text token is the cosine of the projected image
feature and the row of the input embedding table, in float32; no layer has run yet. The original
sorts all pairs and walks down the list, from pair `offset` in steps of `step`, collecting the image
tokens it meets until `keep` are found. For step 1 and offset 0 these are the tokens whose largest
similarity over the text is highest. Tokens keep the rotary positions of the uncut sequence.
Published is this cut followed by FastV; the settings of the two published models are presets:

    llava answer ... --reduction "simignore:preset=7b+fastv:k=5,keep=144"
    llava answer ... --reduction "simignore:preset=13b+fastv:k=4,keep=144"
    llava eval digits_pope --model-path checkpoints/llava-digits \\
        --reduction "simignore:ratio=0.5,text=question"

The text is one of "options" (the block of answer options in the prompt), "option_words" (BOS and
the options without their letters), "question" (the user's last turn; in training the first) and
"all" (the whole prompt up to the first answer). "options|question" takes the first of them that a
sample has; a sample with a picture that has none is an error.

Differs from the original: the prompt's ids stay as they are (there it is tokenised in pieces, with
the text marked by sentinel ids or appended behind it); dropped tokens leave the sequence instead of
being masked, which gives the same result because FastV's layer K keeps positions; every sample of a
batch and every picture is ranked; equal similarities go to the earlier token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.base import Selection, Signal, View, check_count, check_ratio, keep_highest
from llava.reduction.forms import OneCut, Parts
from llava.sequence import Per

EMBEDS = Signal("embeds")
TEXTS = ("options", "option_words", "question", "all")
PRESETS: dict[str, dict[str, Any]] = {
    "7b": {"keep": 452, "text": "option_words", "offset": 1},
    "13b": {"keep": 451, "text": "options", "step": 2},
}
"""What the original's two ScienceQA scripts set."""


@dataclass(frozen=True)
class Simignore(OneCut):
    """One cut. Exactly one of keep, the number of image tokens that stays of each group, and ratio,
    the share that stays. text, step, offset: see the module. per: tokens of one "image" or of the
    whole "sample" compete.

    With a step above 1 the list may end before `keep` tokens are met; then fewer stay, and the loop
    reads their number (`counts_known`). With step 1 the tokens met never fall short, but for a text
    of no more than `offset` tokens; then the tokens that are not met fill up the number, in their
    order.
    """

    keep: int | None = None
    ratio: float | None = None
    text: str = "question"
    step: int = 1
    offset: int = 0
    per: Per = "image"
    name: ClassVar[str] = "simignore"
    positions: ClassVar[str] = "original"
    reads_text: ClassVar[bool] = True
    usual: ClassVar[tuple[int, ...]] = (0,)

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError(
                "simignore needs keep (number that stays) or ratio (share that stays), one of "
                f"them; got keep={self.keep!r} and ratio={self.ratio!r}"
            )
        if self.keep is not None:
            check_count("keep", self.keep)
        else:
            object.__setattr__(self, "ratio", check_ratio(self.ratio))
        unknown = set(str(self.text).split("|")) - set(TEXTS)
        if unknown:
            raise ValueError(
                f"text {self.text!r} is not accepted; give one of {', '.join(TEXTS)}, or several "
                'in the order of preference, as "options|question"'
            )
        for name, lowest in (("step", 1), ("offset", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} {value!r} is not accepted; give an integer >= {lowest}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Parts:
        """One cut before the first layer, or at `k`; `preset` gives options that are not said."""
        rest = {"k": 0, **options}
        preset = rest.pop("preset", None)
        if preset is not None and str(preset).lower() not in PRESETS:
            raise ValueError(f"preset {preset!r} is unknown; accepted: {', '.join(PRESETS)}")
        given = {} if preset is None else dict(PRESETS[str(preset).lower()])
        if "ratio" in rest:
            given.pop("keep", None)
        return super().from_options({**given, **rest})

    @classmethod
    def to_options(cls, cuts: Sequence[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        """One dict a cut."""
        for options in super().to_options(cuts):
            if options["k"] == 0:
                del options["k"]
            yield options

    @classmethod
    def share_options(cls, share: float) -> dict[str, Any]:
        return {"ratio": share}

    @property
    def signals(self) -> tuple[Signal, ...]:
        return (EMBEDS, self.text_signal)

    @property
    def text_signal(self) -> Signal:
        return Signal("text", name=self.text)

    @property
    def host_counts(self) -> bool:
        return self.step == 1

    def budget(self, now: int, original: int) -> int:
        """ValueError when `keep` is above the group's original number of tokens."""
        if self.ratio is not None:
            return min(now, round(original * self.ratio))
        assert self.keep is not None
        if self.keep > original:
            raise ValueError(
                f"simignore: keep={self.keep} is above the {original} visual tokens there are; "
                "give a smaller number, or a share with ratio"
            )
        return min(now, self.keep)

    def select(self, view: View) -> Selection:
        text = view.texts[self.text_signal]
        pairs_GNT = cosine(view.signals[EMBEDS], text.embeds)
        real_GNT = view.valid[:, :, None] & text.valid[:, None]
        score_GN = self.walked(pairs_GNT.masked_fill(~real_GNT, -torch.inf))
        selection = keep_highest(score_GN, view)
        if not self.host_counts:
            # A group that is not cut keeps everything, whatever the walk meets.
            whole_G1 = (view.budget >= view.count)[:, None]
            selection.keep &= (score_GN > -torch.inf) | view.protected | whole_G1
        return selection

    def walked(self, pairs_GNT: Tensor) -> Tensor:
        """Similarity at which the walk down the sorted pairs first meets each image token [G, N],
        -inf for a token that it never meets. Pairs that do not exist are -inf."""
        if self.step == 1 and self.offset == 0:
            return pairs_GNT.amax(2)
        flat = pairs_GNT.flatten(1)
        order = flat.sort(dim=1, descending=True, stable=True).indices
        place = torch.arange(flat.shape[1], device=flat.device)
        visited = (place >= self.offset) & ((place - self.offset) % self.step == 0)
        visited = torch.zeros_like(flat, dtype=torch.bool).scatter(
            1, order, visited.expand(order.shape)
        )
        return flat.masked_fill(~visited, -torch.inf).view_as(pairs_GNT).amax(2)

    def options(self) -> dict[str, Any]:
        return {
            "keep": self.keep,
            "ratio": self.ratio,
            "text": self.text,
            "step": self.step,
            "offset": self.offset,
            "per": self.per,
        }


def cosine(image_GND: Tensor, text_GTD: Tensor) -> Tensor:
    """Cosine similarity of every image and text embedding in float32 [G, N, T]."""
    return F.normalize(image_GND.float(), dim=-1) @ F.normalize(text_GTD.float(), dim=-1).mT
