"""AdaptPrune: non-maximum suppression over image tokens with three cues, in front of layer K.

Paper: arXiv 2503.08019. Original: llava/model/language_model/adaptprune.py of its repository. The
score of a token is the attention that the last prompt row pays it in layer K-1, times a Gaussian
around the middle of its grid. The highest score is kept, time after time, and each pick j lowers
the others: s_i *= 1 - exp(-d_ij^2 / 2 sigma_d^2) exp(-(1 - cos_ij)^2 / 2 sigma_s^2) for tokens
within `distance` cells, where cos compares key vectors of layer K. So a token that is both near and
alike is passed over. Every tile is a grid of its own; `int(N * keep)` of its N tokens stay, or an
absolute count; tokens keep the rotary positions of the uncut sequence.

The factors of all pairs are made first, in one matrix product; a pick is then four operations for
the whole batch and reads nothing on the host.

Differs from the original: key vectors of layer K alone are made, once (there q, k and v of every
layer and step); a picked token cannot be picked again when scores underflow; the cues are float32;
padding, batches, several pictures, non-square and odd grids are taken care of, text-only samples
left alone. In training PyramidDrop's scoring rows rank.

    llava eval digits_pope --model-path checkpoints/llava-digits \\
        --reduction "adaptprune:k=2,keep=0.1"

Shape suffixes: G groups (tiles) · N tokens of the largest · E size of a key vector · S picks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llava.reduction.base import Selection, Signal, View, check_count, check_ratio
from llava.reduction.forms import OneCut
from llava.sequence import Per

KEY_SOURCES: tuple[str, ...] = ("raw", "normed")
SMALLEST = 1e-30


@dataclass(frozen=True)
class AdaptPrune(OneCut):
    """One cut.

    keep: share of each tile's tokens that stays (a float in [0, 1]) or their number (an integer).
    sigma_c: width of the Gaussian around the middle, in cells; None = half the grid along each
    axis, as published for 24 x 24. sigma_d, sigma_s: widths of suppression in distance (cells) and
    in likeness (1 - cosine). distance: cells beyond which nothing is suppressed. key_source: key
    vectors of the "raw" hidden state, as the original takes them, or of the "normed" one, which are
    the layer's own before rotation. rope: rank with rotated queries and keys, as published.
    """

    keep: float | int
    sigma_c: float | None = None
    sigma_d: float = 1.5
    sigma_s: float = 0.05
    distance: float = 5.0
    key_source: Literal["raw", "normed"] = "raw"
    rope: bool = True
    name: ClassVar[str] = "adaptprune"
    positions: ClassVar[str] = "original"
    per: ClassVar[Per] = "tile"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.keep, int) and not isinstance(self.keep, bool):
            check_count("keep", self.keep)
        else:
            object.__setattr__(self, "keep", check_ratio(self.keep))
        if self.sigma_c is not None:
            _check_number("sigma_c", self.sigma_c, zero=False)
        _check_number("sigma_d", self.sigma_d, zero=False)
        _check_number("sigma_s", self.sigma_s, zero=False)
        _check_number("distance", self.distance, zero=True)
        if self.key_source not in KEY_SOURCES:
            raise ValueError(
                f"key_source {self.key_source!r} is unknown; accepted: {', '.join(KEY_SOURCES)}"
            )

    @classmethod
    def share_options(cls, share: float) -> dict[str, Any]:
        return {"keep": float(share)}

    @property
    def signals(self) -> tuple[Signal, ...]:
        return (
            Signal("attention", offset=-1, rope=self.rope),
            Signal("keys", norm=self.key_source == "normed"),
        )

    def budget(self, now: int, original: int) -> int:
        """ValueError when the number to keep is above the tile's original number of tokens."""
        if isinstance(self.keep, float):
            return min(now, int(original * self.keep))
        if self.keep > original:
            raise ValueError(
                f"adaptprune: keep={self.keep} is above the {original} visual tokens of a tile; "
                "give a smaller number, or a share like keep=0.25"
            )
        return min(now, self.keep)

    def select(self, view: View) -> Selection:
        attention_GN, keys_GNE = (view.signals[signal] for signal in self.signals)
        place_GN2, extent_G2 = grid_places(view.cell, view.valid)
        score_GN = attention_GN.float() * centre_weight(place_GN2, extent_G2, self.sigma_c)
        factor_GNN = self.suppression(place_GN2, keys_GNE)
        order_GS = greedy(score_GN, factor_GNN, view)
        rank = torch.arange(view.max_budget, device=order_GS.device)
        taken = (rank < view.budget[:, None]).int()
        keep = torch.zeros(view.valid.shape, dtype=torch.int32, device=taken.device)
        return Selection(keep=keep.scatter_add(1, order_GS, taken) > 0, score=score_GN)

    def suppression(self, place_GN2: Tensor, keys_GNE: Tensor) -> Tensor:
        """What a pick j leaves of the score of i, in (0, 1] [G, N (j), N (i)], float32."""
        unit = torch.nn.functional.normalize(keys_GNE.float(), dim=-1)
        unlike = 1 - unit @ unit.transpose(1, 2)
        row_GN, column_GN = place_GN2.float().unbind(-1)
        squared = (row_GN[:, :, None] - row_GN[:, None]).square_()
        squared += (column_GN[:, :, None] - column_GN[:, None]).square_()
        exponent = unlike.square_().mul_(-0.5 / self.sigma_s**2)
        exponent = exponent.add_(squared, alpha=-0.5 / self.sigma_d**2)
        exponent = exponent.masked_fill_(squared > self.distance**2, -torch.inf)
        # Above 0, so that a picked token's -inf stays what it is.
        return exponent.expm1_().neg_().clamp_min_(SMALLEST)

    def options(self) -> dict[str, Any]:
        names = ("keep", "sigma_c", "sigma_d", "sigma_s", "distance", "key_source", "rope")
        return {name: getattr(self, name) for name in names}


def _check_number(name: str, value: Any, zero: bool) -> None:
    """ValueError for what is no finite number above 0 (or 0, where that has a meaning)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        wanted = "a number from 0 on" if zero else "a number above 0"
        raise ValueError(f"{name} {value!r} is not accepted; give {wanted}")


def grid_places(cell_GN2: Tensor, valid_GN: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of each token within the box of cells that its group spans, long [G, N, 2], and
    the box's (rows, columns) [G, 2]."""
    far = torch.iinfo(torch.long).max
    first = cell_GN2.masked_fill(~valid_GN[..., None], far).amin(1)
    last = cell_GN2.masked_fill(~valid_GN[..., None], -1).amax(1)
    return cell_GN2 - first[:, None], last - first + 1


def centre_weight(place_GN2: Tensor, extent_G2: Tensor, sigma: float | None) -> Tensor:
    """Gaussian around the middle of the grid, 1 at its highest cell [G, N].

    G cells of an axis lie at linspace(-G/2, G/2, G). sigma None: G/2 along each axis.
    """
    size = extent_G2.float()[:, None]
    spacing = size / (size - 1).clamp_min(1)
    offset = (place_GN2.float() - (size - 1) / 2) * spacing
    nearest = torch.where(extent_G2[:, None] % 2 == 0, spacing / 2, 0.0)
    width = size / 2 if sigma is None else sigma
    return ((nearest.square() - offset.square()) / (2 * width**2)).sum(-1).exp()


def greedy(score_GN: Tensor, factor_GNN: Tensor, view: View) -> Tensor:
    """Indices in the order of picking [G, max_budget]; those behind a group's budget mean nothing.

    Protected tokens come first. Equal scores: the earlier token.
    """
    groups = torch.arange(len(score_GN), device=score_GN.device)
    left = score_GN.masked_fill(view.protected, torch.inf).masked_fill(~view.valid, -torch.inf)
    order_SG1 = groups.new_empty(view.max_budget, len(groups), 1)
    for pick_G1 in order_SG1:
        torch.argmax(left, 1, keepdim=True, out=pick_G1)
        left.mul_(factor_GNN[groups, pick_G1[:, 0]])
        left.scatter_(1, pick_G1, -torch.inf)
    return order_SG1[..., 0].T
