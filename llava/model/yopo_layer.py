"""YOPO's layers: visual rows run with fewer heads and neurons, through ``layer(hidden, via=...)``.

Special here: in `renorm` mode nothing that is left out is computed. Text rows go through the
layer's own modules; visual rows through slices of the same weights (views where the kept heads lie
side by side, else one gather a call). Attention is two calls: the kept heads over all tokens, the
other heads over the text. The cache keeps text keys of all heads and visual keys of the kept ones.
What does not depend on the layer - row indices, rotary tables, masks - is made once a stage.

A module that is no plain `nn.Linear` on the device of its input (adapters, quantised or offloaded
weights) runs in full and its output is sliced: right, but nothing is saved there.

Settings, paper and differences from the original: `llava.reduction.yopo`. The simulation of the
original: `llava.model.yopo_leaky`.

Shape suffixes: B samples · R rows, W width of the sequence · L longest sample · T longest text of a
sample · N most visual tokens of a sample · t, n text and visual rows of the batch · H query heads ·
K key heads · k kept query heads · D hidden · d head size · q new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from llava.model.attention_kinds import FULL, SLIDING, attention_kind
from llava.model.staged_cache import SplitLayer, StagedCache, StageRecord
from llava.reduction.yopo import YOPO
from llava.sequence import BLANK, COLUMN, GRID, GROUP, ORIGIN, ROW, Layout, TokenSequence

Rotary = tuple[Tensor, Tensor]


# ----------------------------------------------------------------------------- heads and slices
@dataclass(frozen=True)
class Pick:
    """Some places of a dimension. A run of neighbours is taken as a view, without an index."""

    places: tuple[int, ...]

    @cached_property
    def run(self) -> bool:
        first = self.places[0] if self.places else 0
        return self.places == tuple(range(first, first + len(self.places)))

    def take(self, tensor: Tensor, dim: int, index: Tensor) -> Tensor:
        """index: `places` on the device of `tensor`."""
        if not self.run:
            return tensor.index_select(dim, index)
        return tensor.narrow(dim, self.places[0] if self.places else 0, len(self.places))


class HeadIndex(NamedTuple):
    """The places of each `Pick` of `Heads` on the device."""

    kept: Tensor
    others: Tensor
    keys: Tensor
    of_kept: Tensor
    of_others: Tensor
    block: Tensor
    in_block: Tensor
    order: Tensor


@dataclass(frozen=True)
class Heads:
    """The heads of one layer. kept, others: query heads. keys: the key heads that a kept head
    uses. of_kept: the place of each kept head's key head among `keys`; of_others: each other head's
    key head. block: all query heads of `keys`; in_block: where the kept ones stand there. order:
    place of each query head in (kept, others)."""

    kept: Pick
    others: Pick
    keys: Pick
    of_kept: Pick
    of_others: Pick
    block: Pick
    in_block: Pick
    order: Pick

    @classmethod
    def of(cls, kept: Sequence[int], heads: int, key_heads: int) -> Heads:
        group = heads // key_heads
        others = sorted(set(range(heads)) - set(kept))
        keys = sorted({head // group for head in kept})
        block = [key * group + i for key in keys for i in range(group)]
        both = [*kept, *others]
        places = (
            kept,
            others,
            keys,
            [keys.index(head // group) for head in kept],
            [head // group for head in others],
            block,
            [block.index(head) for head in kept],
            [both.index(head) for head in range(heads)],
        )
        return cls(*(Pick(tuple(each)) for each in places))

    @property
    def picks(self) -> tuple[Pick, ...]:
        return tuple(getattr(self, name) for name in HeadIndex._fields)


def take_rows(module: nn.Module, x: Tensor, pick: Pick, index: Tensor, block: int) -> Tensor:
    """Output blocks `pick` of a linear layer [..., len(pick), block]."""
    if not _sliceable(module, x):
        return pick.take(module(x).unflatten(-1, (-1, block)), -2, index)
    weight = pick.take(module.weight.unflatten(0, (-1, block)), 0, index).flatten(0, 1)
    bias = module.bias
    if bias is not None:
        bias = pick.take(bias.unflatten(0, (-1, block)), 0, index).flatten()
    return F.linear(x, weight, bias).unflatten(-1, (-1, block))


def take_columns(module: nn.Module, x: Tensor, pick: Pick, index: Tensor) -> Tensor:
    """A linear layer of x [n, len(pick), block], whose blocks are its input blocks `pick`."""
    block = x.shape[-1]
    if not _sliceable(module, x):
        whole = x.new_zeros(x.shape[0], module.in_features // block, block)
        return module(whole.index_copy(1, index, x).flatten(1))
    weight = pick.take(module.weight.unflatten(1, (-1, block)), 1, index).flatten(1)
    return F.linear(x.flatten(1), weight, module.bias)


def _sliceable(module: nn.Module, x: Tensor) -> bool:
    return type(module) is nn.Linear and module.weight.device == x.device


def visual_mlp(mlp: Any, x: Tensor, neurons: int) -> Tensor:
    """The feed-forward network with its first `neurons` neurons."""
    if not all(_sliceable(each, x) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        unused = torch.arange(inner.shape[-1], device=x.device) >= neurons
        return mlp.down_proj(inner.masked_fill(unused, 0))
    gate, up = (
        F.linear(x, each.weight[:neurons], None if each.bias is None else each.bias[:neurons])
        for each in (mlp.gate_proj, mlp.up_proj)
    )
    return F.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight[:, :neurons], mlp.down_proj.bias)


# ----------------------------------------------------------------------------- tables of a stage
class Dense(NamedTuple):
    """Rows of a flat list [n] as [B, width], one sample below the other.

    table [B * width]: the row in each slot, 0 at padding. place [n]: the slot of each row. valid
    bool [B, width]. All None when there is nothing to move: then it is a view.
    """

    batch: int
    width: int
    table: Tensor | None = None
    place: Tensor | None = None
    valid: Tensor | None = None

    def spread(self, flat: Tensor) -> Tensor:
        """[n, ...] -> [B, width, ...]"""
        if self.table is not None:
            flat = flat.index_select(0, self.table)
        return flat.view(self.batch, self.width, *flat.shape[1:])

    def collect(self, dense: Tensor) -> Tensor:
        """[B, width, ...] -> [n, ...]"""
        flat = dense.flatten(0, 1)
        return flat if self.place is None else flat.index_select(0, self.place)

    def slots(self, rows: Tensor) -> Tensor:
        """Where rows stand in [B * width]."""
        return rows if self.place is None else self.place[rows]


class Tables(NamedTuple):
    """Where the rows of a stage stand; nothing here depends on the layer.

    samples: the flattened sequence as a batch [B, L]; a padded sequence is one already. text [t],
    visual [n]: rows of the flattened sequence; text_slot, visual_slot: the same in [B * L]. texts,
    visuals: those rows alone as batches. is_full: no slot of [B * L] is padding.
    """

    samples: Dense
    text: Tensor
    visual: Tensor
    text_slot: Tensor
    visual_slot: Tensor
    text_rotary: Rotary
    visual_rotary: Rotary
    texts: Dense
    visuals: Dense
    is_full: bool

    def merge(self, text: Tensor, visual: Tensor) -> Tensor:
        """Text rows [t, ...] and visual rows [n, ...] in one dense batch [B, L, ...]."""
        batch, width, *_ = self.samples
        out = self._blank(text, batch * width)
        out = out.index_copy_(0, self.text_slot, text).index_copy_(0, self.visual_slot, visual)
        return out.view(batch, width, *text.shape[1:])

    def join(self, text: Tensor, visual: Tensor, like: Tensor) -> Tensor:
        """Text rows [t, D] and visual rows [n, D] as the sequence [R, W, D] they came from."""
        out = self._blank(text, like.shape[0] * like.shape[1])
        return out.index_copy_(0, self.text, text).index_copy_(0, self.visual, visual).view_as(like)

    def _blank(self, like: Tensor, rows: int) -> Tensor:
        size = (rows, *like.shape[1:])
        return like.new_empty(size) if self.is_full else like.new_zeros(size)


def stage_tables(
    sequence: TokenSequence, rotary: Rotary, more: np.ndarray
) -> tuple[Tables, Tensor, Tensor]:
    """The tables of a stage, the facts of its tokens as a batch [B, L, F], and the integers `more`
    on the device. One copy to the device, no host read."""
    layout, device = sequence.layout, sequence.facts.device
    is_packed, left = layout.kind == "packed", layout.kind == "left"
    visual = layout.visual
    text = tuple(n - v for n, v in zip(layout.lengths, visual, strict=True))
    slots = [dense_slots(counts, left) for counts in (text, visual, layout.lengths)]
    places = [np.flatnonzero(each >= 0) for each in slots]
    *found, more_there = upload([*slots, *places, more], device)
    texts, visuals, samples = (
        Dense(*table.shape)
        if len(place) == table.numel()
        else Dense(*table.shape, table.clamp_min(0).flatten(), place, table >= 0)
        for table, place in zip(found[:3], found[3:], strict=True)
    )
    flat = sequence.facts.flatten(0, 1)
    # A stable sort puts text rows first, then visual ones, each in their order, then padding.
    kind = torch.where(flat[:, GROUP] >= 0, 1, torch.where(flat[:, ORIGIN] >= 0, 0, 2))
    order = kind.sort(stable=True).indices
    text_rows, visual_rows, _ = order.split(
        [sum(text), sum(visual), len(order) - sum(layout.lengths)]
    )
    facts = sequence.facts
    if is_packed:
        facts = samples.spread(flat)
        if samples.valid is not None:
            blank = torch.tensor(BLANK).to(device, non_blocking=True)
            facts = torch.where(samples.valid[..., None], facts, blank)
    else:
        samples = Dense(layout.rows, layout.width)
    cos, sin = (table.expand(*sequence.facts.shape[:2], -1).flatten(0, 1) for table in rotary)
    tables = Tables(
        samples,
        text=text_rows,
        visual=visual_rows,
        text_slot=samples.slots(text_rows),
        visual_slot=samples.slots(visual_rows),
        text_rotary=(cos[text_rows], sin[text_rows]),
        visual_rotary=(cos[visual_rows], sin[visual_rows]),
        texts=texts,
        visuals=visuals,
        is_full=sum(layout.lengths) == samples.batch * samples.width,
    )
    return tables, facts, more_there


def dense_slots(counts: Sequence[int], left: bool) -> np.ndarray:
    """[B, max] number of the row in each slot, -1 at padding, which stands on the left or right."""
    width = max(counts, default=0)
    slots = np.full((len(counts), width), -1, dtype=np.int64)
    first = 0
    for sample, count in enumerate(counts):
        start = width - count if left else 0
        slots[sample, start : start + count] = np.arange(first, first + count)
        first += count
    return slots


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Integer arrays on the device, in one copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int64))
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


# ----------------------------------------------------------------------------- masks
def seen_by(settings: YOPO, facts_BLF: Tensor, span: int | None) -> Tensor:
    """Bool [B, L, L]: which keys (last) a query sees where nothing is left out.

    Causal, over `span` tokens back (a sliding window) or all; between visual tokens the
    neighbourhood takes the place of that.
    """
    column = torch.arange(facts_BLF.shape[1], device=facts_BLF.device)
    causal = column[:, None] >= column
    seen = causal if span is None else causal & (column[:, None] - column < span)
    valid = (facts_BLF[..., ORIGIN] >= 0)[:, None]
    if settings.window is None:
        return seen & valid
    # Small integers: thousands of tokens squared are a lot of pairs.
    grid, *axes = (facts_BLF[..., each].to(torch.int16) for each in (GRID, ROW, COLUMN))
    near = grid[:, :, None] == grid[:, None]
    for axis in axes:
        near &= (axis[:, :, None] - axis[:, None]).abs() <= settings.reach
    if settings.window_causal:
        near = near & causal
    visual = facts_BLF[..., GROUP] >= 0
    return torch.where(visual[:, :, None] & visual[:, None], near, seen) & valid


def in_order(query: Tensor, key: Tensor, valid: Tensor | None, span: int | None) -> Tensor:
    """Bool [B, 1, queries, keys] from their columns [B, ...]: no key behind the query, none out of
    the span, none that is not `valid` [B, keys]."""
    distance = query[:, :, None] - key[:, None]
    seen = distance >= 0
    if span is not None:
        seen = seen & (distance < span)
    if valid is not None:
        seen = seen & valid[:, None]
    return seen[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as a term of the scores. Finite, in float32 too, where the softmax is taken, so
    that a padding row that sees nothing gets numbers, not NaN."""
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, max(torch.finfo(dtype).min, torch.finfo(torch.float32).min))


def span_of(config: Any, kind: str) -> int | None:
    return config.sliding_window if kind == SLIDING else None


# ----------------------------------------------------------------------------- the runner
@lru_cache(maxsize=32)
def heads_of(settings: YOPO, layers: int, heads: int, key_heads: int) -> tuple[Heads, ...]:
    """The heads of each layer that the program runs."""
    stop = layers if settings.first_free is None else settings.first_free
    return tuple(Heads.of(settings.kept_heads(i, heads), heads, key_heads) for i in range(stop))


Masks = tuple[Tensor | None, Tensor | None]


class Stage(NamedTuple):
    """What the layers of a stage share. masks by kind of layer: at prefill over all tokens
    [B, 1, L, L] and over the text [B, 1, T, T] (None = causal); in a step over the stored text keys
    and over the visual keys (None = all). indices: of each layer's heads. tables: None in a step.
    """

    masks: dict[str, Masks]
    indices: dict[int, HeadIndex]
    tables: Tables | None = None


class YopoRunner:
    """A `LayerRunner` (`llava.model.layer_programs`) for one request, mode `renorm`."""

    def __init__(self, settings: YOPO, config: Any) -> None:
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        settings.validate(layers, heads)
        self.settings, self.config = settings, config
        self.heads = heads_of(settings, layers, heads, config.num_key_value_heads)
        self.neurons = settings.neurons(config.intermediate_size)
        self.eager = config._attn_implementation == "eager"
        # Of each stage, by its first layer: whether stored keys have to be masked in later steps.
        self.masked: dict[int, bool] = {}
        self.indices: dict[int, HeadIndex] = {}

    def runs(self, index: int) -> bool:
        return self.settings.runs(index)

    def kinds(self, layers: Iterable[int]) -> list[str]:
        return sorted({attention_kind(self.config, index) for index in layers})

    def open(
        self, sequence: TokenSequence, rotary: Rotary, layers: range, record: StageRecord | None
    ) -> Stage | None:
        mine = [index for index in layers if self.runs(index)]
        if not mine:
            return None
        places = [pick.places for index in mine for pick in self.heads[index].picks]
        every = np.fromiter(chain.from_iterable(places), np.int64)
        tables, facts, flat = stage_tables(sequence, rotary, every)
        parts = iter(flat.split([len(each) for each in places]))
        indices = {i: HeadIndex(*(next(parts) for _ in HeadIndex._fields)) for i in mine}
        masks = {
            kind: self._masks(tables, facts, sequence, span_of(self.config, kind))
            for kind in self.kinds(mine)
        }
        if record is not None:
            self._remember(tables, record, mine)
            self.indices |= indices
        return Stage(masks, indices, tables)

    def _masks(
        self, tables: Tables, facts: Tensor, sequence: TokenSequence, span: int | None
    ) -> Masks:
        """A causal kernel needs no mask when nothing but order decides; padding on the right is
        never seen by a causal row."""
        dtype, left = sequence.hidden.dtype, sequence.layout.kind == "left"
        exact = self.eager or span is not None
        whole = text = None
        window = self.settings.window is not None and bool(sum(sequence.layout.visual))
        if exact or window or (left and not tables.is_full):
            whole = additive(seen_by(self.settings, facts, span), dtype)[:, None]
        if exact or (left and tables.texts.valid is not None):
            column = tables.texts.spread(tables.text_slot % tables.samples.width)
            text = additive(in_order(column, column, tables.texts.valid, span), dtype)
        return whole, text

    def _remember(self, tables: Tables, record: StageRecord, mine: list[int]) -> None:
        """Columns of the stored keys in the left-padded sequence, for the masks of later steps."""
        sliding = self.kinds(mine) != [FULL]
        self.masked[record.start] = sliding or any(
            dense.valid is not None for dense in (tables.texts, tables.visuals)
        )
        for name, slot, dense in (
            ("text", tables.text_slot, tables.texts),
            ("visual", tables.visual_slot, tables.visuals),
        ):
            column = dense.spread(slot % tables.samples.width)
            if dense.valid is not None:
                column = column.masked_fill(~dense.valid, -1)
            record.extra[f"{name}_column"] = column

    def step(self, record: StageRecord, seen: int, count: int, like: Tensor) -> Stage | None:
        mine = [index for index in range(record.start, record.stop) if self.runs(index)]
        if not mine:
            return None
        kinds = self.kinds(mine)
        if count == 1 and not self.masked.get(record.start):
            return Stage(dict.fromkeys(kinds, (None, None)), self.indices)
        text, visual = record.extra["text_column"], record.extra["visual_column"]
        new = torch.arange(record.length, record.length + seen + count, device=text.device)
        text = torch.cat([text, new.expand(text.shape[0], -1)], 1)
        query = text[:, -count:]
        masks = {}
        for kind in kinds:
            span = span_of(self.config, kind)
            masks[kind] = tuple(
                additive(in_order(query, keys, keys >= 0, span), like.dtype)
                for keys in (text, visual)
            )
        return Stage(masks, self.indices)

    def copy(self) -> YopoRunner:
        other = copy(self)
        other.masked, other.indices = dict(self.masked), dict(self.indices)
        return other

    def relay(
        self, cache: StagedCache, record: StageRecord, column_BW: Tensor, layout: Layout
    ) -> None:
        """Text columns are laid anew in the cache; visual ones stay, under their new numbers."""
        mine = [index for index in range(record.start, record.stop) if self.runs(index)]
        if not mine:
            return
        text, visual = record.extra["text_column"], record.extra["visual_column"]
        count = cache.layers[mine[0]].keys.shape[-2] - text.shape[1]
        later = torch.arange(record.length, record.length + count, device=text.device)
        text = torch.cat([text, later.expand(text.shape[0], -1)], 1)
        new = self._moved(column_BW, record, record.length + count)
        text, visual = (
            torch.where(old >= 0, new.gather(1, old.clamp_min(0)), -1) for old in (text, visual)
        )
        # What is left of the text, side by side: as many columns as in a prompt that ran whole.
        counts = [n - v for n, v in zip(layout.lengths, layout.visual, strict=True)]
        order = (text >= 0).sort(stable=True).indices[:, -max(counts) :]
        record.extra |= {"text_column": text.gather(1, order), "visual_column": visual}
        for index in mine:
            cache.layers[index].relay(order, layout.width)
        self.masked[record.start] |= len(set(counts)) > 1

    @staticmethod
    def _moved(column_BW: Tensor, record: StageRecord, width: int) -> Tensor:
        """[B, width]: the new column of each old one, -1 for those that are gone."""
        batch, place = column_BW.shape[0], torch.arange(column_BW.shape[1], device=column_BW.device)
        old = column_BW if record.valid is None else column_BW.where(record.valid, width)
        new = column_BW.new_full((batch, width + 1), -1)
        return new.scatter(1, old, place.expand(batch, -1))[:, :width]

    def extra(self, index: int, prepared: Stage) -> dict[str, Any]:
        if not self.runs(index):
            return {}
        common = {
            "heads": self.heads[index],
            "mask": prepared.masks[attention_kind(self.config, index)],
            "index": prepared.indices[index],
        }
        if prepared.tables is None:
            return {"via": step_layer, **common}
        via = partial(run_layer, neurons=self.neurons, eager=self.eager)
        return {"via": via, "tables": prepared.tables, **common}


# ----------------------------------------------------------------------------- in a layer's call
def run_layer(
    layer: Any,
    hidden: Tensor,
    *,
    heads: Heads,
    index: HeadIndex,
    tables: Tables,
    mask: Masks,
    neurons: int,
    eager: bool,
    past_key_values: Any = None,
    **_: Any,
) -> Tensor:
    """A decoder layer over a whole stage: [R, W, D] -> [R, W, D]; padding becomes 0."""
    flat = hidden.flatten(0, 1)
    text, visual = flat.index_select(0, tables.text), flat.index_select(0, tables.visual)
    attention = layer.self_attn
    text_out, visual_out = attend(
        attention,
        layer.input_layernorm(text),
        layer.input_layernorm(visual),
        heads=heads,
        index=index,
        tables=tables,
        mask=mask,
        eager=eager,
        cache=past_key_values,
        length=hidden.shape[1],
    )
    text, visual = text + text_out, visual + visual_out
    if neurons == layer.mlp.down_proj.in_features:
        joined = tables.join(text, visual, hidden)
        return joined + layer.mlp(layer.post_attention_layernorm(joined))
    text = text + layer.mlp(layer.post_attention_layernorm(text))
    visual = visual + visual_mlp(layer.mlp, layer.post_attention_layernorm(visual), neurons)
    return tables.join(text, visual, hidden)


def attend(
    attention: Any,
    text: Tensor,
    visual: Tensor,
    *,
    heads: Heads,
    index: HeadIndex,
    tables: Tables,
    mask: Masks,
    eager: bool,
    cache: Any,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Self-attention of text rows [t, D] and visual rows [n, D]: the outputs of both.

    Kept heads run over all tokens, the others over the text alone.
    """
    size = attention.head_dim
    query_t, key_t, value_t = project(attention, text, tables.text_rotary)
    query_v, key_v, value_v = (
        take_rows(module, visual, pick, where, size)
        for module, pick, where in (
            (attention.q_proj, heads.kept, index.kept),
            (attention.k_proj, heads.keys, index.keys),
            (attention.v_proj, heads.keys, index.keys),
        )
    )
    query_v = rotate(head_norm(attention, "q", query_v), tables.visual_rotary)
    key_v = rotate(head_norm(attention, "k", key_v), tables.visual_rotary)
    if cache is not None:
        visual_kv = (tables.visuals.spread(each).transpose(1, 2) for each in (key_v, value_v))
        text_kv = (tables.texts.spread(each).transpose(1, 2) for each in (key_t, value_t))
        cache.layers[attention.layer_idx] = SplitLayer(*visual_kv, length=length)
        cache.update(*text_kv, attention.layer_idx)
    parts, visual_out = [], query_v
    if heads.kept.places:
        query = tables.merge(heads.kept.take(query_t, 1, index.kept), query_v)
        key, value = (
            tables.merge(heads.keys.take(one, 1, index.keys), other)
            for one, other in ((key_t, key_v), (value_t, value_v))
        )
        if len(heads.kept.places) > len(heads.keys.places):
            key, value = (each.index_select(2, index.of_kept) for each in (key, value))
        out = softmax_attention(attention, query, key, value, mask[0], eager).flatten(0, 1)
        visual_out = out.index_select(0, tables.visual_slot)
        parts.append(out.index_select(0, tables.text_slot))
    if heads.others.places:
        query = tables.texts.spread(heads.others.take(query_t, 1, index.others))
        key, value = (
            tables.texts.spread(heads.of_others.take(each, 1, index.of_others))
            for each in (key_t, value_t)
        )
        out = softmax_attention(attention, query, key, value, mask[1], eager)
        parts.append(tables.texts.collect(out))
    text_out = heads.order.take(torch.cat(parts, 1), 1, index.order).flatten(1)
    return (
        attention.o_proj(text_out),
        take_columns(attention.o_proj, visual_out, heads.kept, index.kept),
    )


def softmax_attention(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, eager: bool
) -> Tensor:
    """[B, L, heads, d] each; mask additive [B, 1, L, L], None = causal."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    dropout = attention.attention_dropout if attention.training else 0.0
    if eager:
        scores = query @ key.transpose(2, 3) * attention.scaling + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        out = F.dropout(weights, dropout) @ value
    else:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=attention.scaling,
        )
    return out.transpose(1, 2)


def project(attention: Any, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys and the values [..., heads, d] of rows x [..., D], all heads."""
    query, key, value = (
        getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        for name in "qkv"
    )
    query, key = head_norm(attention, "q", query), head_norm(attention, "k", key)
    return rotate(query, rotary), rotate(key, rotary), value


def head_norm(attention: Any, name: str, heads: Tensor) -> Tensor:
    """Queries or keys normed per head where the family does (Qwen3)."""
    norm = getattr(attention, f"{name}_norm", None)
    return heads if norm is None else norm(heads)


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """[..., heads, d] with cos and sin [..., d]."""
    cos, sin = (table.unsqueeze(-2) for table in rotary)
    return heads * cos + rotate_half(heads) * sin


def step_layer(
    layer: Any,
    hidden: Tensor,
    *,
    heads: Heads,
    index: HeadIndex,
    mask: Masks,
    past_key_values: Any,
    position_embeddings: Rotary,
    **_: Any,
) -> Tensor:
    """A decoder layer over new text tokens [B, q, D] on a filled cache.

    The stored parts are read where they lie: scores against the text keys and against the visual
    ones, one softmax over both. Softmax in float32.
    """
    attention = layer.self_attn
    query, key, value = project(attention, layer.input_layernorm(hidden), position_embeddings)
    keys, values = past_key_values.update(
        key.transpose(1, 2), value.transpose(1, 2), attention.layer_idx
    )
    out = step_attention(attention, query.transpose(1, 2), keys, values, heads, index, mask)
    hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def step_attention(
    attention: Any,
    query_BHqd: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    heads: Heads,
    index: HeadIndex,
    mask: Masks,
) -> Tensor:
    """[B, H, q, d]. keys, values: (text [B, K, T, d], visual [B, kept K, N, d])."""
    scores = grouped(query_BHqd, keys[0].transpose(2, 3)) * attention.scaling
    scores = scores if mask[0] is None else scores + mask[0]
    stored = keys[1].shape[2] if heads.kept.places else 0
    if stored:
        # A stored key head scores all of its query heads; those that are not kept see nothing.
        block = heads.block.take(query_BHqd, 1, index.block)
        visual = grouped(block, keys[1].transpose(2, 3)) * attention.scaling
        visual = visual if mask[1] is None else visual + mask[1]
        unseen = scores.new_full((*scores.shape[:-1], stored), -torch.inf)
        visual = heads.in_block.take(visual, 1, index.in_block)
        scores = torch.cat([unseen.index_copy(1, index.kept, visual), scores], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query_BHqd.dtype)
    visual, text = weights.split([stored, weights.shape[-1] - stored], -1)
    out = grouped(text, values[0])
    if stored:
        visual = grouped(heads.block.take(visual, 1, index.block), values[1])
        out = out.index_add(1, index.block, visual)
    return out


def grouped(rows_BHqx: Tensor, by_Kxy: Tensor) -> Tensor:
    """Rows of each query head times the matrix of its key head [B, K, x, y]: [B, H, q, y]."""
    group = rows_BHqx.shape[1] // by_Kxy.shape[1]
    rows = rows_BHqx.unflatten(1, (-1, group))
    product = rows.flatten(2, 3) @ by_Kxy
    return product.unflatten(2, rows.shape[2:4]).flatten(1, 2)
