"""The original's simulation of YOPO: everything is computed, then masked behind the softmax.

A text token's weights on the visual tokens of a head that is not kept, or of a layer behind the
last visual one, are set to zero and not given to anybody else, so its weights add up to less than
one. Visual rows of such a head put out zero. Exact for checkpoints that were trained this way; it
saves nothing but feed-forward neurons, and makes L x L maps. Source: YOPO_MLLM_Pruning,
`modeling_llama_prune.py`, `LlamaAttention.forward`, `LlamaMLP.forward`.

Differs from the original: visual tokens are those of the batch, not positions 35 to 610; padding is
hidden again where the neighbourhood overwrote it; in decoding every row of the batch is masked.

    llava eval digits_pope --model-path checkpoints/llava-digits \\
        --reduction "yopo:layers=4,heads=mask.npy,window=5,ffn=2,mode=leaky"

Shape suffixes as in `llava.model.yopo_layer`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.attention_kinds import attention_kind
from llava.model.staged_cache import PrefillLayer, StagedCache, StageRecord
from llava.model.yopo_layer import (
    Rotary,
    Tables,
    YopoRunner,
    additive,
    grouped,
    in_order,
    project,
    seen_by,
    span_of,
    stage_tables,
    visual_mlp,
)
from llava.sequence import GROUP, Layout, TokenSequence


class LeakyStage(NamedTuple):
    """What the layers of a stage share. masks: by kind of layer, additive [B, 1, queries, keys].
    visual: bool [B, keys]. kept: bool [layers, H], which heads are kept. tables: None in a step."""

    masks: dict[str, Tensor]
    visual: Tensor
    kept: Tensor
    tables: Tables | None = None


class LeakyRunner(YopoRunner):
    """A `LayerRunner` (`llava.model.layer_programs`) for one request, modes `leaky` and
    `renorm_layers`."""

    def _kept(self) -> np.ndarray:
        count = self.config.num_attention_heads
        kept = np.zeros((len(self.heads), count), dtype=np.int64)
        for index, heads in enumerate(self.heads):
            kept[index, list(heads.kept.places)] = 1
        return kept

    def open(
        self, sequence: TokenSequence, rotary: Rotary, layers: range, record: StageRecord | None
    ) -> LeakyStage | None:
        if not any(map(self.runs, layers)):
            return None
        tables, facts, kept = stage_tables(sequence, rotary, self._kept())
        masks = {}
        for kind in self.kinds(filter(self.runs, layers)):
            seen = seen_by(self.settings, facts, span_of(self.config, kind))
            masks[kind] = additive(seen, sequence.hidden.dtype)[:, None]
        visual, kept = facts[..., GROUP] >= 0, kept > 0
        if record is not None:
            record.extra["visual"] = visual
            self.kept = kept
        return LeakyStage(masks, visual, kept, tables)

    def step(self, record: StageRecord, seen: int, count: int, like: Tensor) -> LeakyStage | None:
        mine = [index for index in range(record.start, record.stop) if self.runs(index)]
        if not mine:
            return None
        visual = record.extra["visual"]
        batch, device = visual.shape[0], visual.device
        visual = torch.cat([visual, visual.new_zeros(batch, seen + count)], 1)
        valid = None
        if record.valid is not None:
            valid = torch.cat([record.valid, record.valid.new_ones(batch, seen + count)], 1)
        column = torch.arange(visual.shape[1], device=device)[None]
        masks = {}
        for kind in self.kinds(mine):
            span = span_of(self.config, kind)
            masks[kind] = additive(in_order(column[:, -count:], column, valid, span), like.dtype)
        return LeakyStage(masks, visual, self.kept)

    def relay(
        self, cache: StagedCache, record: StageRecord, column_BW: Tensor, layout: Layout
    ) -> None:
        layers = [index for index in range(record.start, record.stop) if self.runs(index)]
        if not layers:
            return
        cache.relay(layers, column_BW)
        # What came later is text, and so is padding.
        visual = F.pad(record.extra["visual"], (0, int(column_BW.shape[1])))
        visual = visual.gather(1, column_BW)
        record.extra["visual"] = visual if record.valid is None else visual & record.valid

    def extra(self, index: int, prepared: Any) -> dict[str, Any]:
        if not self.runs(index):
            return {}
        via = partial(
            leaky_layer, neurons=self.neurons, sees_visual=self.settings.sees_visual(index)
        )
        return {
            "via": via,
            "mask": prepared.masks[attention_kind(self.config, index)],
            "visual": prepared.visual,
            "kept": prepared.kept[index],
            "tables": prepared.tables,
        }


def leaky_layer(
    layer: Any,
    hidden: Tensor,
    *,
    mask: Tensor,
    visual: Tensor,
    kept: Tensor,
    tables: Tables | None,
    neurons: int,
    sees_visual: bool,
    past_key_values: Any = None,
    position_embeddings: Rotary,
    **_: Any,
) -> Tensor:
    """A decoder layer over a stage [R, W, D], or over new text [B, q, D] when `tables` is None."""
    attention = layer.self_attn
    rotary = tuple(table.expand(*hidden.shape[:2], -1) for table in position_embeddings)
    states = project(attention, layer.input_layernorm(hidden), rotary)
    if tables is not None:  # a pack is spread into samples
        states = tuple(tables.samples.spread(each.flatten(0, 1)) for each in states)
    query, key, value = (each.transpose(1, 2) for each in states)
    if past_key_values is not None:
        if tables is not None:
            past_key_values.layers[attention.layer_idx] = PrefillLayer()
        key, value = past_key_values.update(key, value, attention.layer_idx)
    out = leaky_attention(attention, query, key, value, mask, visual, kept & sees_visual)
    if tables is not None:  # a head that is not kept puts out nothing at visual rows
        out = out * (kept[:, None] | ~visual[:, None]).unsqueeze(-1)
    out = out.transpose(1, 2).flatten(2)
    if tables is None:
        hidden = hidden + attention.o_proj(out)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    out = tables.samples.collect(out).view(*hidden.shape[:2], -1)
    hidden = hidden + attention.o_proj(out)
    if neurons == layer.mlp.down_proj.in_features:
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    x = layer.post_attention_layernorm(hidden.flatten(0, 1))
    text = layer.mlp(x.index_select(0, tables.text))
    return hidden + tables.join(
        text, visual_mlp(layer.mlp, x.index_select(0, tables.visual), neurons), hidden
    )


def leaky_attention(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    visual: Tensor,
    seen: Tensor,
) -> Tensor:
    """[B, H, q, d]. visual: bool [B, keys]; seen: bool [H], heads whose weights on visual keys
    stay. Softmax in float32, in front of that."""
    scores = grouped(query, key.transpose(2, 3)) * attention.scaling + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = weights * (seen[:, None] | ~visual[:, None]).unsqueeze(2)
    dropout = attention.attention_dropout if attention.training else 0.0
    return grouped(F.dropout(weights, dropout), value)
