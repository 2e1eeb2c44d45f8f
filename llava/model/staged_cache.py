"""A KV cache whose layers hold different numbers of tokens, and which alone knows lengths.

After a cut the layers behind it store fewer tokens. `open` records, once a stage at prefill, which
slots are real and which rotary position comes next; `step` answers both for every later token. The
decoder asks nothing else, so no counter has to be kept in step and beams can be reordered freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llava.sequence import TokenSequence

if TYPE_CHECKING:
    from llava.model.shared_prefix import Prefix


class PrefillLayer(DynamicLayer):
    """A growing layer that takes over the prefill's keys and values without copying them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.get_seq_length() > 0:
            return super().update(key_states, value_states, *args, **kwargs)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True
        return key_states, value_states


class SplitLayer(PrefillLayer):
    """Text keys and values of all heads, growing, beside visual ones of some heads, fixed.

    visual_keys, visual_values: [B, kept heads, N, head_dim]. length: slots of the prefill's
    sequence, padding included. `get_seq_length` counts in those, so that stages, positions and
    beams need no special case.
    """

    def __init__(self, visual_keys: Tensor, visual_values: Tensor, length: int) -> None:
        super().__init__()
        self.visual_keys, self.visual_values, self.length = visual_keys, visual_values, length
        self.prefilled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes text keys and values; returns ((text, visual) keys, (text, visual) values)."""
        if not self.is_initialized:
            self.prefilled = key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return (keys, self.visual_keys), (values, self.visual_values)

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return self.length + self.keys.shape[-2] - self.prefilled

    def relay(self, column_BT: Tensor, length: int) -> None:
        """Lay the text columns anew by one gather; the whole counts as `length` slots then."""
        column = column_BT.to(self.keys.device)[:, None, :, None]
        for name in ("keys", "values"):
            old = getattr(self, name)
            size = (old.shape[0], old.shape[1], column.shape[2], old.shape[3])
            setattr(self, name, old.gather(2, column.expand(size)))
        self.length, self.prefilled = length, column.shape[2]

    def _map_visual(self, change: Callable[[Tensor], Tensor]) -> None:
        self.visual_keys, self.visual_values = change(self.visual_keys), change(self.visual_values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_visual(lambda each: each.index_select(0, beam_idx.to(each.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_visual(lambda each: each.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_visual(lambda each: each[indices.to(each.device)])

    def offload(self) -> None:
        super().offload()
        self._map_visual(lambda each: each.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._map_visual(lambda each: each.to(self.device, non_blocking=True))


@dataclass
class StageRecord:
    """Layers start .. stop-1. length: slots filled at prefill (padding included). valid: bool
    [B, length] or None when no slot is padding. next_position: [B], of the first new token. extra:
    what a layer program needs in later steps, tensors [B, ...]."""

    start: int
    stop: int
    length: int
    valid: Tensor | None
    next_position: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class StagedCache(DynamicCache):
    """transformers' dynamic cache plus one `StageRecord` a stage.

    config: the decoder's config (sliding-window layers get their own kind of cache layer).
    offloading: keep the layers on the CPU between uses, as transformers' "offloaded" cache.
    """

    def __init__(self, config: Any, offloading: bool = False) -> None:
        super().__init__(config=config, offloading=offloading)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = PrefillLayer()
        self._stock = list(self.layers)
        self.stages: list[StageRecord] = []
        # What the first forward continues, when the batch shares its beginning.
        self.prefix: Prefix | None = None
        # Runs the later tokens as it ran the prompt (`llava.model.layer_programs.LayerRunner`).
        self.runner: Any = None

    def open(self, start: int, stop: int, sequence: TokenSequence) -> StageRecord:
        """Record what the layers start .. stop-1 are about to store. Left-padded sequences only:
        a right-padded cache is wrong as soon as a sliding window fills."""
        layout = sequence.layout
        assert layout.kind == "left" or (layout.kind == "right" and not layout.is_padded)
        next_position = sequence.position.amax(1) + 1
        self.stages.append(StageRecord(start, stop, layout.width, sequence.valid, next_position))
        return self.stages[-1]

    def seen(self, stage: StageRecord) -> int:
        """Tokens that the stage has stored behind the prompt."""
        return self.get_seq_length(stage.start) - stage.length

    def prompt_keys(self, index: int) -> Tensor | None:
        """Rotated keys [B, key heads, length, head_dim] that layer `index` has just stored for the
        whole prompt; None where the layer keeps another selection of them (a sliding window, a
        program of its own) or keeps them elsewhere."""
        layer = self.layers[index]
        if type(layer) is not PrefillLayer or self.offloading:
            return None
        return layer.keys

    def step(self, stage: StageRecord, count: int) -> tuple[Tensor, Tensor | None]:
        """Positions [B, count] of the next `count` tokens and the validity of all keys they may
        see [B, stored + count] (None: all real). Call before the layers store the tokens."""
        seen = self.seen(stage)
        steps = torch.arange(seen, seen + count, device=stage.next_position.device)
        positions = stage.next_position[:, None] + steps
        if stage.valid is None:
            return positions, None
        new = stage.valid.new_ones(stage.valid.shape[0], seen + count)
        return positions, torch.cat([stage.valid, new], 1)

    def adopt(self, index: int, layer: Any, rows: Callable[[Tensor], Tensor]) -> None:
        """Begin layer `index` with what another cache's layer holds, taken row by row."""
        if isinstance(layer, SplitLayer):
            visual = (rows(layer.visual_keys), rows(layer.visual_values))
            self.layers[index] = SplitLayer(*visual, length=layer.length)
        elif type(layer) is PrefillLayer:
            self.layers[index] = PrefillLayer()
        self.update(rows(layer.keys), rows(layer.values), index)

    def relay(self, layers: Sequence[int], column_BW: Tensor) -> None:
        """Gather the stored columns of some layers: slot w of row b becomes column_BW[b, w].

        Only before anything is dropped: a window must hold all columns.
        """
        for index in layers:
            layer = self.layers[index]
            column = column_BW.to(layer.keys.device)[:, None, :, None]
            for name in ("keys", "values"):
                old = getattr(layer, name)
                shape = (old.shape[0], old.shape[1], column.shape[2], old.shape[3])
                setattr(layer, name, old.gather(2, column.expand(shape)))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = column.shape[2]

    def _map_stages(self, change: Any) -> None:
        for stage in self.stages:
            stage.next_position = change(stage.next_position)
            if stage.valid is not None:
                stage.valid = change(stage.valid)
            stage.extra = {name: change(value) for name, value in stage.extra.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_stages(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_stages(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_stages(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        self.layers[:] = self._stock  # a layer program may have put others in their place
        super().reset()
        self.stages, self.runner = [], None
