"""One structure for everything that belongs to a token, and the integers the host knows about it.

A visual token carries its hidden state, its rotary position, the picture cell it came from and the
label of the token behind it. When a method removes tokens, all of that has to move together;
here it does, in one place: `TokenSequence.keep`.

Two layouts are supported. Padded: ``[samples, width]``, padding on the left or on the right.
Packed: ``[1, total]``, samples one behind the other. Only this file and
`llava.model.staged_decoder.attend` know which one is used; reduction methods never do.

`Layout` holds plain Python integers from tokenisation and image geometry. Lengths and counts after
a cut follow from them and from the plan, so no value is read back from a device.

Shape suffixes: B samples · R rows (B padded, 1 packed) · W width of a row · D hidden size ·
G groups of visual tokens that compete · N largest group · V all visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX

Kind = Literal["left", "right", "packed"]
Per = Literal["tile", "image", "sample"]
KINDS: tuple[str, ...] = ("left", "right", "packed")
PER: tuple[str, ...] = ("tile", "image", "sample")  # from fine to coarse


@dataclass(frozen=True)
class Group:
    """Visual tokens that are ranked together.

    sample: index of the sample in the batch. image: index of the picture within the sample, -1 when
    the pictures of a sample were joined. count: tokens that are left. original: tokens before any
    cut. protected: tokens that must stay, because the token behind them is supervised (in the
    `plain` template the last image token predicts the first word of the caption). tile: index of
    the tile within the picture, -1 when its tiles were joined; the rows of the tiles of an anyres
    picture alternate in the sequence.
    """

    sample: int
    image: int
    count: int
    original: int
    protected: int = 0
    tile: int = 0


@dataclass(frozen=True)
class Layout:
    """What the host knows about a batch.

    lengths: real tokens of each sample. groups: visual tokens that compete, in the order of their
    first token; before any cut one a tile.
    queries: scoring rows of each sample. kind: where the padding is, or "packed". targets: rows of
    each sample whose next token is supervised, () without labels; no cut removes one.
    texts: (name, tokens of each sample) of the texts in `TokenSequence.inputs`; 0 = it has none.
    """

    lengths: tuple[int, ...]
    groups: tuple[Group, ...]
    queries: tuple[int, ...]
    kind: Kind = "left"
    targets: tuple[int, ...] = ()
    texts: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout kind {self.kind!r} is unknown; accepted: {', '.join(KINDS)}")
        assert len(self.lengths) == len(self.queries)

    @staticmethod
    def simple(
        text_before: int, visual: int, text_after: int, *, batch: int = 1, kind: Kind = "left"
    ) -> Layout:
        """One picture a sample and one scoring row: what FLOP counts and benchmarks need."""
        groups = tuple(Group(s, 0, visual, visual) for s in range(batch) if visual)
        return Layout((text_before + visual + text_after,) * batch, groups, (1,) * batch, kind)

    @property
    def rows(self) -> int:
        return 1 if self.kind == "packed" else len(self.lengths)

    @property
    def width(self) -> int:
        if self.kind == "packed":
            return sum(self.lengths)
        return max(self.lengths, default=0)

    @property
    def is_padded(self) -> bool:
        """True when some row holds padding; then kernels need a mask."""
        return self.kind != "packed" and any(n != self.width for n in self.lengths)

    @property
    def visual(self) -> tuple[int, ...]:
        """Visual tokens of each sample."""
        counts = [0] * len(self.lengths)
        for group in self.groups:
            counts[group.sample] += group.count
        return tuple(counts)

    def coarsen(self, per: Per) -> tuple[Layout, tuple[int, ...]]:
        """Join the groups that compete under `per`; also the new index of each old group.

        Groups that are joined already stay so.
        """
        if per == "tile":
            return self, tuple(range(len(self.groups)))
        merged: dict[tuple[int, int], Group] = {}
        keys = []
        for group in self.groups:
            joined = replace(group, tile=-1, image=group.image if per == "image" else -1)
            key = (joined.sample, joined.image)
            keys.append(key)
            old = merged.get(key)
            merged[key] = joined if old is None else _joined(old, joined)
        index = {key: number for number, key in enumerate(merged)}
        return replace(self, groups=tuple(merged.values())), tuple(index[key] for key in keys)

    def after(self, budgets: Sequence[int]) -> Layout:
        """The layout once every group is cut to its budget."""
        assert len(budgets) == len(self.groups)
        lengths = list(self.lengths)
        groups = []
        for group, budget in zip(self.groups, budgets, strict=True):
            assert 0 <= budget <= group.count
            lengths[group.sample] -= group.count - budget
            groups.append(replace(group, count=budget))
        return replace(self, lengths=tuple(lengths), groups=tuple(groups))

    def slots(self) -> np.ndarray:
        """Index of token n of group g among all visual tokens sorted by group [G, N]; -1 = none."""
        counts = np.array([group.count for group in self.groups], dtype=np.int64)
        step = np.arange(counts.max(initial=0))
        first = np.cumsum(counts) - counts
        return np.where(step < counts[:, None], first[:, None] + step, -1)

    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(first column, length) of each sample in its row."""
        if self.kind == "packed":
            starts = [0, *accumulate(self.lengths)][:-1]
        elif self.kind == "left":
            starts = [self.width - n for n in self.lengths]
        else:
            starts = [0] * len(self.lengths)
        return tuple(zip(starts, self.lengths, strict=True))

    def take(self, samples: Sequence[int]) -> Layout:
        """The named samples, in that order; one may be named several times."""
        groups: list[list[Group]] = [[] for _ in self.lengths]
        for group in self.groups:
            groups[group.sample].append(group)
        return replace(
            self,
            lengths=tuple(self.lengths[old] for old in samples),
            queries=tuple(self.queries[old] for old in samples),
            targets=tuple(self.targets[old] for old in samples) if self.targets else (),
            texts=tuple(
                (name, tuple(counts[old] for old in samples)) for name, counts in self.texts
            ),
            groups=tuple(
                replace(group, sample=new)
                for new, old in enumerate(samples)
                for group in groups[old]
            ),
        )

    def append(self, text: Layout) -> tuple[Layout, np.ndarray]:
        """Each sample with a text behind it, left-padded, and where each column comes from.

        The second value [B, W] counts the columns of ``[self | text]``, where this layout is padded
        on the left and `text` on the right, so that what belongs together is adjacent; 0 at
        padding. The scoring rows are those of the text.
        """
        assert self.kind == "left"
        assert text.kind == "right" or not text.is_padded
        lengths = tuple(a + b for a, b in zip(self.lengths, text.lengths, strict=True))
        layout = replace(self, lengths=lengths, queries=text.queries)
        place = np.arange(layout.width) - (layout.width - np.array(lengths)[:, None])
        column = place + (self.width - np.array(self.lengths)[:, None])
        return layout, np.where(place < 0, 0, column)


def _joined(one: Group, other: Group) -> Group:
    return replace(
        one,
        count=one.count + other.count,
        original=one.original + other.original,
        protected=one.protected + other.protected,
    )


# Columns of `TokenSequence.facts`, and the values they have at padding.
POSITION, ORIGIN, TARGET, QUERY, GRID, GROUP, ROW, COLUMN = range(8)
BLANK = (0, -1, IGNORE_INDEX, 0, -1, -1, -1, -1)


@dataclass
class TokenSequence:
    """Token-aligned tensors of a batch, all on one device.

    hidden  [R, W, D]  hidden state
    facts   [R, W, 8]  long, one gather moves them all; read them through
        position  rotary position
        origin    index of the token in its uncut sample, -1 = padding
        target    label of the NEXT token, shifted once before any cut; -100 = none
        query     1 for rows whose attention ranks the visual tokens
        grid      which 2-D field of cells of its sample a visual token lies in
        cell      (group, row, column) of a visual token; group -1 = text or padding
    extra              further token-aligned tensors [R, W, ...]
    inputs             tensors [B, ...], one row a sample: `seed`; `text:NAME` [B, T], ids of a text
                       that a method may compare with, -1 = filling
    layout             the host's integers
    """

    hidden: Tensor
    facts: Tensor
    extra: dict[str, Tensor]
    inputs: dict[str, Tensor]
    layout: Layout

    @property
    def position(self) -> Tensor:
        return self.facts[..., POSITION]

    @property
    def origin(self) -> Tensor:
        return self.facts[..., ORIGIN]

    @property
    def target(self) -> Tensor:
        return self.facts[..., TARGET]

    @property
    def query(self) -> Tensor:
        return self.facts[..., QUERY]

    @property
    def grid(self) -> Tensor:
        return self.facts[..., GRID]

    @property
    def cell(self) -> Tensor:
        return self.facts[..., GROUP:]

    @property
    def valid(self) -> Tensor | None:
        """Bool [R, W], or None when no row is padded (kernels then need no mask)."""
        return self.origin >= 0 if self.layout.is_padded else None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenSequence:
        """The whole batch on another device (accelerate calls this with its own arguments)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._map(move, move)

    def repeat_interleave(self, n: int) -> TokenSequence:
        """Each sample n times (beam search, num_return_sequences). Padded layouts only."""
        return self.take([sample for sample in range(len(self.layout.lengths)) for _ in range(n)])

    def take(self, samples: Sequence[int]) -> TokenSequence:
        """The named samples, in that order; one may be named several times. Padded layouts only."""
        layout = self.layout
        if layout.kind == "packed":
            raise ValueError("a packed sequence cannot be repeated for beams; accepted: padded")
        # Each copy of a sample has groups of its own: number them in the new order.
        per_sample = [0] * len(layout.lengths)
        for group in layout.groups:
            per_sample[group.sample] += 1
        old_start = [0, *accumulate(per_sample)]
        new_start = [0, *accumulate(per_sample[sample] for sample in samples)]
        shift = [new - old_start[sample] for new, sample in zip(new_start, samples, strict=False)]
        table = torch.tensor([list(samples), shift]).to(self.facts.device, non_blocking=True)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, table[0].to(tensor.device))

        out = self._map(rows, rows)
        out.layout = layout.take(samples)
        group_RW = out.facts[..., GROUP]
        out.facts[..., GROUP] = torch.where(group_RW >= 0, group_RW + table[1][:, None], group_RW)
        return out

    def append(
        self, text: TokenSequence, layout: Layout, column_BW: Tensor, bounds_B2: Tensor
    ) -> TokenSequence:
        """Each sample with a text behind it; `layout` and `column_BW` from `Layout.append`.

        Positions and origins of the text are taken as they are. Extra tensors of the text are 0.
        What belongs to a sample comes from the text, but the seed, which belongs to the pictures.
        """
        width, more = self.layout.width, text.layout.width

        def join(own: Tensor, behind: Tensor | None) -> Tensor:
            if behind is None:
                behind = own.new_zeros(own.shape[0], more, *own.shape[2:])
            index = column_BW.view(*column_BW.shape, *[1] * (own.dim() - 2))
            index = index.expand(*column_BW.shape, *own.shape[2:])
            return torch.cat([own, behind], 1).gather(1, index)

        assert column_BW.shape == (len(layout.lengths), layout.width)
        assert width + more >= layout.width
        out = TokenSequence(
            hidden=join(self.hidden, text.hidden),
            facts=join(self.facts, text.facts),
            extra={name: join(value, text.extra.get(name)) for name, value in self.extra.items()},
            inputs={**self.inputs, **text.inputs, "seed": self.inputs["seed"]},
            layout=layout,
        )
        if layout.is_padded:
            out._blank_padding(bounds_B2)
        return out

    def extended(self, hidden_BTD: Tensor) -> TokenSequence:
        """T further text tokens behind each sample, the last of which alone scores. Left-padded or
        unpadded, uncut sequences. Extra tensors of the new tokens are 0."""
        layout, count = self.layout, hidden_BTD.shape[1]
        assert layout.kind == "left" or (layout.kind == "right" and not layout.is_padded)
        step = torch.arange(1, count + 1, device=self.facts.device)
        fresh = torch.tensor(BLANK).to(step.device, non_blocking=True)
        fresh = fresh.repeat(len(layout.lengths), count, 1)
        fresh[..., POSITION] = self.position[:, -1:] + step
        fresh[..., ORIGIN] = self.origin[:, -1:] + step
        facts = torch.cat([self.facts, fresh], 1)
        facts[..., QUERY] = 0
        facts[:, -1, QUERY] = 1
        more = {
            name: torch.cat([value, value.new_zeros(value.shape[0], count, *value.shape[2:])], 1)
            for name, value in self.extra.items()
        }
        lengths = tuple(length + count for length in layout.lengths)
        layout = replace(layout, lengths=lengths, queries=(1,) * len(lengths))
        hidden = torch.cat([self.hidden, hidden_BTD.to(self.hidden)], 1)
        return replace(self, hidden=hidden, facts=facts, extra=more, layout=layout)

    def _map(
        self, tokens: Callable[[Tensor], Tensor], samples: Callable[[Tensor], Tensor]
    ) -> TokenSequence:
        return TokenSequence(
            hidden=tokens(self.hidden),
            facts=tokens(self.facts),
            extra={name: tokens(value) for name, value in self.extra.items()},
            inputs={name: samples(value) for name, value in self.inputs.items()},
            layout=self.layout,
        )

    def regroup(self, index: Tensor, layout: Layout) -> TokenSequence:
        """Give the groups the numbers `index` [old groups] says (`Layout.coarsen`)."""
        group_RW = self.facts[..., GROUP]
        facts = self.facts.clone()
        facts[..., GROUP] = torch.where(group_RW >= 0, index[group_RW.clamp_min(0)], -1)
        return replace(self, facts=facts, layout=layout)

    def visual_order(self) -> Tensor:
        """Flat indices of all visual tokens, sorted by group and then by place [visual tokens]."""
        text = self.layout.rows * self.layout.width - sum(self.layout.visual)
        return self.facts[..., GROUP].flatten().sort(stable=True).indices[text:]

    def keep(
        self,
        order_V: Tensor,
        keep_V: Tensor,
        new_layout: Layout,
        bounds_B2: Tensor,
        *,
        renumber: bool,
    ) -> TokenSequence:
        """Drop the visual tokens that were not selected, in one static-shape gather.

        order_V: `visual_order()`; keep_V: bool, which of those stay, as many as `new_layout` says.
        bounds_B2: `new_layout.bounds()` on the device. renumber: positions count 0 .. n-1 again;
        otherwise a token keeps the position it had. Text and the order of the tokens stay.
        """
        stays = (self.origin >= 0).flatten().scatter(0, order_V, keep_V)
        out = self._take(stays.view(self.origin.shape), new_layout, bounds_B2)
        if renumber:
            out.facts[..., POSITION] = dense_positions(new_layout, bounds_B2)
        return out

    def relayout(self, kind: Kind) -> TokenSequence:
        """The same padded batch with its padding on the other side."""
        if self.layout.kind == kind:
            return self
        assert "packed" not in (self.layout.kind, kind)
        moved = replace(self.layout, kind=kind)
        if not self.layout.is_padded:
            return replace(self, layout=moved)
        bounds = torch.tensor(moved.bounds()).to(self.facts.device, non_blocking=True)
        return self._take(self.origin >= 0, moved, bounds)

    def _take(self, stays_RW: Tensor, new_layout: Layout, bounds_B2: Tensor) -> TokenSequence:
        """Gather the tokens that stay; the number of each sample is known from `new_layout`.

        A stable sort puts them next to each other in their order: behind everything else for
        padding on the left, in front of it otherwise.
        """
        is_left = new_layout.kind == "left"
        source = stays_RW.sort(dim=1, descending=not is_left, stable=True).indices
        source = source[:, -new_layout.width :] if is_left else source[:, : new_layout.width]
        rows, width = stays_RW.shape
        if rows > 1:
            source = source + torch.arange(0, rows * width, width, device=source.device)[:, None]
        flat = source.flatten()

        def gather(tensor: Tensor) -> Tensor:
            taken = tensor.flatten(0, 1).index_select(0, flat)
            return taken.view(*source.shape, *tensor.shape[2:])

        out = self._map(gather, lambda tensor: tensor)
        out.layout = new_layout
        if new_layout.is_padded:
            out._blank_padding(bounds_B2)
        return out

    def mixed(self, table_GN: Tensor, valid_GN: Tensor, mix_GNN: Tensor) -> TokenSequence:
        """Replace the visual tokens of each group by ``mix @ tokens`` (merging methods).

        table_GN: flat index of each token, valid_GN: whether there is one.
        """
        rows, width, size = self.hidden.shape
        flat = self.hidden.flatten(0, 1)
        merged = mix_GNN.to(flat.dtype) @ flat[table_GN]
        where = torch.where(valid_GN, table_GN, rows * width).flatten()
        dumped = torch.cat([flat, flat.new_zeros(1, size)])
        hidden = dumped.index_copy(0, where, merged.flatten(0, 1))[:-1].view(rows, width, size)
        return replace(self, hidden=hidden)

    def _blank_padding(self, bounds_B2: Tensor) -> None:
        """Give the padding slots of a freshly gathered sequence their neutral values."""
        column = torch.arange(self.layout.width, device=bounds_B2.device) - bounds_B2[:, :1]
        is_pad = ((column < 0) | (column >= bounds_B2[:, 1:]))[..., None]
        self.hidden = self.hidden.masked_fill(is_pad, 0)
        blank = torch.tensor(BLANK).to(bounds_B2.device, non_blocking=True)
        self.facts = torch.where(is_pad, blank, self.facts)


def dense_positions(layout: Layout, bounds_B2: Tensor) -> Tensor:
    """Positions [R, W] that count the tokens of each sample from 0; 0 at padding.

    bounds_B2: `layout.bounds()` on the device.
    """
    columns = torch.arange(layout.width, device=bounds_B2.device)
    if layout.kind == "packed":
        first = bounds_B2[:, 0].repeat_interleave(bounds_B2[:, 1], output_size=layout.width)
        return (columns - first)[None]
    position = columns - bounds_B2[:, :1]
    if not layout.is_padded:
        return position
    return torch.where(position < bounds_B2[:, 1:], position, 0).clamp_min(0)
