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
G groups of visual tokens that compete · N largest group · Q largest number of scoring rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX

Kind = Literal["left", "right", "packed"]
Per = Literal["image", "sample"]
KINDS: tuple[str, ...] = ("left", "right", "packed")


@dataclass(frozen=True)
class Group:
    """A run of visual tokens that is ranked together.

    sample: index of the sample in the batch. image: index of the picture within the sample, -1 when
    the pictures of a sample were joined. count: tokens that are left. original: tokens before any
    cut. protected: tokens that must stay, because the token behind them is supervised (in the
    `plain` template the last image token predicts the first word of the caption).
    """

    sample: int
    image: int
    count: int
    original: int
    protected: int = 0


@dataclass(frozen=True)
class Layout:
    """What the host knows about a batch.

    lengths: real tokens of each sample. groups: visual runs in the order of the sequence.
    queries: scoring rows of each sample. kind: where the padding is, or "packed". targets: rows of
    each sample whose next token is supervised, () without labels; no cut removes one.
    """

    lengths: tuple[int, ...]
    groups: tuple[Group, ...]
    queries: tuple[int, ...]
    kind: Kind = "left"
    targets: tuple[int, ...] = ()

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
        """Join the groups that compete under `per`; also the new index of each old group."""
        if per == "image":
            return self, tuple(range(len(self.groups)))
        merged: dict[int, Group] = {}
        for group in self.groups:
            old = merged.get(group.sample)
            merged[group.sample] = (
                replace(group, image=-1)
                if old is None
                else replace(
                    old,
                    count=old.count + group.count,
                    original=old.original + group.original,
                    protected=old.protected + group.protected,
                )
            )
        index = {sample: i for i, sample in enumerate(merged)}
        return (
            replace(self, groups=tuple(merged.values())),
            tuple(index[group.sample] for group in self.groups),
        )

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

    def group_starts(self) -> tuple[int, ...]:
        """Visual tokens that precede each group in its row."""
        counts = [group.count for group in self.groups]
        before = [0, *accumulate(counts)][:-1] if counts else []
        if self.kind == "packed":
            return tuple(before)
        first: dict[int, int] = {}
        for group, start in zip(self.groups, before, strict=True):
            first.setdefault(group.sample, start)
        return tuple(
            start - first[group.sample] for group, start in zip(self.groups, before, strict=True)
        )

    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(first column, length) of each sample in its row."""
        if self.kind == "packed":
            starts = [0, *accumulate(self.lengths)][:-1]
        elif self.kind == "left":
            starts = [self.width - n for n in self.lengths]
        else:
            starts = [0] * len(self.lengths)
        return tuple(zip(starts, self.lengths, strict=True))

    def repeat(self, n: int) -> Layout:
        """Each sample n times in a row (beam search)."""
        groups = tuple(
            replace(group, sample=sample * n + copy)
            for sample in range(len(self.lengths))
            for copy in range(n)
            for group in self.groups
            if group.sample == sample
        )
        return replace(
            self,
            lengths=tuple(x for x in self.lengths for _ in range(n)),
            queries=tuple(x for x in self.queries for _ in range(n)),
            targets=tuple(x for x in self.targets for _ in range(n)),
            groups=groups,
        )


# Token-aligned fields and the value they have at padding.
_FILL = {"position": 0, "origin": -1, "target": IGNORE_INDEX, "query": False, "cell": -1}


@dataclass
class TokenSequence:
    """Token-aligned tensors of a batch, all on one device.

    hidden    [R, W, D]  hidden state
    position  [R, W]     rotary position
    origin    [R, W]     index of the token in its uncut sample, -1 = padding
    cell      [R, W, 3]  (group, row, column) of a visual token; group -1 = text or padding
    target    [R, W]     label of the NEXT token, shifted once before any cut; -100 = none
    query     [R, W]     bool, rows whose attention ranks the visual tokens
    extra                further token-aligned tensors [R, W, ...]
    inputs                tensors [B, ...], one row a sample (`seed`)
    layout               the host's integers
    """

    hidden: Tensor
    position: Tensor
    origin: Tensor
    cell: Tensor
    target: Tensor
    query: Tensor
    extra: dict[str, Tensor]
    inputs: dict[str, Tensor]
    layout: Layout

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
        if self.layout.kind == "packed":
            raise ValueError("a packed sequence cannot be repeated for beams; accepted: padded")
        out = self._map(
            lambda tensor: tensor.repeat_interleave(n, 0),
            lambda tensor: tensor.repeat_interleave(n, 0),
        )
        out.layout = self.layout.repeat(n)
        if self.layout.groups:
            # A repeated sample has groups of its own: renumber them in the new order.
            per_sample = [0] * len(self.layout.lengths)
            for group in self.layout.groups:
                per_sample[group.sample] += 1
            shift, old_start, new_start = [], 0, 0
            for count in per_sample:
                for _ in range(n):
                    shift.append(new_start - old_start)
                    new_start += count
                old_start += count
            offset = torch.tensor(shift).to(out.cell.device, non_blocking=True)
            group_RW = out.cell[..., 0]
            moved = torch.where(group_RW >= 0, group_RW + offset[:, None], group_RW)
            out.cell = torch.cat([moved[..., None], out.cell[..., 1:]], -1)
        return out

    def _map(
        self, tokens: Callable[[Tensor], Tensor], samples: Callable[[Tensor], Tensor]
    ) -> TokenSequence:
        return TokenSequence(
            hidden=tokens(self.hidden),
            position=tokens(self.position),
            origin=tokens(self.origin),
            cell=tokens(self.cell),
            target=tokens(self.target),
            query=tokens(self.query),
            extra={name: tokens(value) for name, value in self.extra.items()},
            inputs={name: samples(value) for name, value in self.inputs.items()},
            layout=self.layout,
        )

    def group_table(self, starts_G: Tensor, counts_G: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Where the visual tokens of each group stand: flat indices [G, N] and validity [G, N].

        starts_G: visual tokens before the group in its row; counts_G: its size; width: N.
        Works from `cell` alone, so groups need not be contiguous. No host read.
        """
        groups = counts_G.shape[0]
        group_RW = self.cell[..., 0]
        is_visual = group_RW >= 0
        rank_RW = is_visual.cumsum(1) - 1
        safe = group_RW.clamp_min(0)
        if groups == 0:
            empty = torch.zeros(0, width, dtype=torch.long, device=group_RW.device)
            return empty, empty.bool()
        slot = safe * width + rank_RW - starts_G[safe]
        slot = torch.where(is_visual, slot, groups * width).flatten()
        flat = torch.arange(slot.shape[0], device=slot.device)
        table = torch.zeros(groups * width + 1, dtype=torch.long, device=slot.device)
        table = table.scatter(0, slot, flat)[:-1].view(groups, width)
        valid = torch.arange(width, device=slot.device) < counts_G[:, None]
        return table, valid

    def keep(
        self,
        table_GN: Tensor,
        valid_GN: Tensor,
        keep_GN: Tensor,
        new_layout: Layout,
        bounds_B2: Tensor,
        *,
        renumber: bool,
    ) -> TokenSequence:
        """Drop the visual tokens that were not selected, in one static-shape gather.

        table_GN, valid_GN: from `group_table`. keep_GN: bool, exactly the budgeted number a group.
        bounds_B2: `new_layout.bounds()` on the device. renumber: positions count 0 .. n-1 again;
        otherwise a token keeps the position it had. Text and the order of the tokens stay.
        """
        rows, width = self.origin.shape
        new_width = new_layout.width
        keep_flat = (self.origin >= 0).flatten()
        if table_GN.numel():
            # Slots of a group that is smaller than N point nowhere: send them to a dump slot.
            where = torch.where(valid_GN, table_GN, rows * width).flatten()
            dumped = torch.cat([keep_flat, keep_flat.new_zeros(1)])
            keep_flat = dumped.scatter(0, where, keep_GN.flatten())[:-1]
        keep_RW = keep_flat.view(rows, width)
        column = keep_RW.cumsum(1) - 1
        if new_layout.kind == "left" and new_layout.is_padded:
            column = column + bounds_B2[:, :1]
        column = torch.where(keep_RW, column, new_width)
        source = torch.zeros(rows, new_width + 1, dtype=torch.long, device=column.device)
        arange = torch.arange(width, device=column.device).expand(rows, width)
        source = source.scatter(1, column, arange)[:, :-1]
        out = self._map(lambda tensor: gather_tokens(tensor, source), lambda tensor: tensor)
        out.layout = new_layout
        if new_layout.is_padded:
            out._blank_padding(bounds_B2)
        if renumber:
            out.position = dense_positions(new_layout, bounds_B2)
        return out

    def mixed(self, table_GN: Tensor, valid_GN: Tensor, mix_GNN: Tensor) -> TokenSequence:
        """Replace the visual tokens of each group by ``mix @ tokens`` (merging methods)."""
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
        is_pad = (column < 0) | (column >= bounds_B2[:, 1:])
        self.hidden = self.hidden.masked_fill(is_pad[..., None], 0)
        for name, fill in _FILL.items():
            tensor = getattr(self, name)
            mask = is_pad[..., None] if tensor.dim() == 3 else is_pad
            setattr(self, name, tensor.masked_fill(mask, fill))


def gather_tokens(tensor: Tensor, source_RC: Tensor) -> Tensor:
    """tensor [R, W, ...], source_RC [R, C] -> [R, C, ...]."""
    if tensor.dim() == 2:
        return tensor.gather(1, source_RC)
    rows, width = tensor.shape[:2]
    first = torch.arange(0, rows * width, width, device=tensor.device)
    taken = tensor.flatten(0, 1).index_select(0, (source_RC + first[:, None]).flatten())
    return taken.view(*source_RC.shape, *tensor.shape[2:])


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
