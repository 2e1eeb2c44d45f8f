"""What a reduction method is: what it asks to be shown, what it is shown, what it answers.

A method sees groups of visual tokens as dense ``[G, N]`` tensors and answers which of them stay. It
knows no batch, no padding, no decoder layer and no module, so one implementation serves training,
prefill, padded and packed batches, and every decoder family.

Shape suffixes: G groups that compete (pictures or samples) · N tokens of the largest group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from llava.sequence import Per


@dataclass(frozen=True)
class Signal:
    """A measurement at the input of one decoder layer, made with that layer's weights.

    kind: "attention" = probability mass that the scoring rows put on each visual token, mean over
    the rows [G, N] (with heads=True [G, N, H]); "keys" = key vectors without rotation
    [G, N, kv_heads * head_dim]; "hidden" = hidden states [G, N, D]; "extra" = the token-aligned
    tensor `name` of the sequence; "embeds" = the rows that entered the language model [G, N, D],
    at any cut; "text" = input embeddings of the sample's text `name` (`View.texts`).
    offset: 0 = the layer behind the cut, -1 = the layer in front of it.
    rope: rotate queries and keys. norm: apply the layer's input norm first.
    over: the softmax runs over "all" keys of the sample or over its "visual" ones only.
    """

    kind: Literal["attention", "keys", "hidden", "extra", "embeds", "text"]
    offset: Literal[0, -1] = 0
    rope: bool = True
    norm: bool = True
    over: Literal["all", "visual"] = "all"
    heads: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind in ("extra", "text") and not self.name:
            raise ValueError(f"a signal of kind {self.kind!r} needs a name")
        if self.kind in ("extra", "embeds", "text") and self.offset:
            raise ValueError(f"a signal of kind {self.kind!r} belongs to no layer; offset is 0")

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Names of a text, "options|question" being the first of them that a sample has."""
        return tuple(self.name.split("|"))


@dataclass
class SideText:
    """A text of each group's sample, which need not be part of the prompt.

    embeds [G, T, D]: input embeddings; valid bool [G, T]: real tokens.
    """

    embeds: Tensor
    valid: Tensor


@dataclass
class View:
    """The visual tokens of a batch as a method sees them.

    valid      bool [G, N]     real tokens
    protected  bool [G, N]     tokens that must stay (their next token is supervised)
    cell       long [G, N, 2]  (row, column) in the picture
    grid       long [G, N]     which 2-D field of the sample the cell lies in: a picture, one tile
                               of a picture of loose tiles, or of an anyres picture the whole image
                               and behind it the tile field
    origin     long [G, N]     index of the token in its uncut sample
    seed       long [G]        seed of the sample
    count      long [G]        tokens of the group now
    budget     long [G]        tokens to keep
    max_budget int             largest budget, known on the host
    signals                    the measurements the method asked for
    texts                      the texts the method asked for
    """

    valid: Tensor
    protected: Tensor
    cell: Tensor
    grid: Tensor
    origin: Tensor
    seed: Tensor
    count: Tensor
    budget: Tensor
    max_budget: int
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    texts: Mapping[Signal, SideText] = field(default_factory=dict)


@dataclass
class Selection:
    """The answer: keep bool [G, N] with exactly `budget` tokens a group (at most that many where
    `counts_known` is False); mix [G, N, N] replaces the
    kept rows by ``mix @ old rows`` (merging methods); score [G, N] is what the ranking used."""

    keep: Tensor
    mix: Tensor | None = None
    score: Tensor | None = None


@runtime_checkable
class Reducer(Protocol):
    """A method. `name` is its key in `llava.reduction.REDUCERS`.

    For its text form a method in the table also has `positions`, what it does to rotary positions
    when it is used alone, and the class methods `from_options` and `to_options`
    (`llava.reduction.forms` has both ready for the usual forms).

    A method that may keep fewer tokens than its budget also has ``host_counts = False``
    (`counts_known`): the loop then reads the counts, once a cut.
    """

    @property
    def name(self) -> str: ...
    @property
    def signals(self) -> tuple[Signal, ...]: ...
    @property
    def per(self) -> Per: ...
    @property
    def reads_text(self) -> bool:
        """False: the cut is the same for every question about a picture."""
        ...

    def budget(self, now: int, original: int) -> int:
        """Tokens to keep of a group that has `now` tokens and had `original` before any cut."""
        ...

    def select(self, view: View) -> Selection: ...
    def options(self) -> dict[str, Any]:
        """The constructor's arguments: enough to build the same method again."""
        ...


@runtime_checkable
class LayerProgram(Protocol):
    """Settings of a method that runs some layers in another way than their own forward (heads or
    channels left out). Numbers only: `llava.model.layer_programs` has the code that runs them.

    `name` is its key in `llava.reduction.REDUCERS`. `first_free` is the first layer that the
    program leaves alone, None when it runs them all: no cut may lie inside it. reads_text: False
    when it does the same for every question about a picture.
    """

    @property
    def name(self) -> str: ...
    @property
    def first_free(self) -> int | None: ...
    @property
    def reads_text(self) -> bool: ...

    def validate(self, num_layers: int, heads: int | None = None) -> None:
        """ValueError when it does not fit a decoder of that depth (and number of query heads)."""
        ...

    def layer_cost(self, shape: Any, index: int, length: int, visual: int) -> LayerCost | None:
        """What layer `index` costs for a sample; None where it runs as usual. shape: a
        `llava.reduction.flops.ModelShape`."""
        ...

    def notes(self, shape: Any, visual_macs: float, without: float) -> tuple[str, ...]:
        """Lines for `llava flops`, e.g. published figures. visual_macs, without: the papers' count
        of a whole plan with this program, and of none."""
        ...

    def options(self) -> dict[str, Any]:
        """The constructor's arguments: enough to build the same program again."""
        ...


@dataclass(frozen=True)
class LayerCost:
    """One layer over one sample. visual_macs: multiply-accumulates over visual tokens, as papers
    count them. flops: what the hardware does, 2 a multiply-accumulate. keys: stored key/value
    pairs, one a token and key head. pairs: query-key products of one later token, one a key and
    query head."""

    visual_macs: float
    flops: int
    keys: int
    pairs: int


def check_texts(wanted: Iterable[Signal], texts: Mapping[str, Sequence[int]]) -> None:
    """ValueError for a sample with a picture that has none of the alternatives of a text. texts:
    ids by name; "all", the prompt's own words, is never missing."""
    for signal in wanted:
        if not any(name == "all" or texts.get(name) for name in signal.alternatives):
            raise ValueError(missing_text(signal))


def missing_text(signal: Signal) -> str:
    """What to say of a sample that has none of a text's alternatives."""
    return (
        f"has no text {signal.name!r} for the plan to compare its pictures with; another text may "
        f"stand in for it: text={signal.name}|all"
    )


def counts_known(reducer: Reducer) -> bool:
    """Whether the method keeps exactly its budget, so that nothing has to be read on the host."""
    return bool(getattr(reducer, "host_counts", True))


def check_ratio(ratio: object) -> float:
    """A kept share in [0, 1]; ValueError otherwise."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise ValueError(f"kept share {ratio!r} is not accepted; give a number in [0, 1]")
    return float(ratio)


def check_count(name: str, value: object) -> int:
    """A number of tokens, an integer >= 0; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} {value!r} is not accepted; give a number of tokens, 0 or more")
    return value


def keep_highest(score: Tensor, view: View) -> Selection:
    """Keep the `budget` tokens of each group with the highest score [G, N].

    Protected tokens come first, then the score; equal scores go to the earlier token, so that the
    result does not depend on the device. No host read.
    """
    ranked = score.float().masked_fill(view.protected, torch.inf)
    ranked = ranked.masked_fill(~view.valid, -torch.inf)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(score.shape[1], device=score.device)
    stays = (rank < view.budget[:, None]).expand(score.shape)
    keep = torch.zeros_like(view.valid).scatter(1, order, stays)
    return Selection(keep=keep, score=score)
