"""Which layers see the whole sequence and which a sliding window of it."""

from __future__ import annotations

from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


def attention_kind(config: Any, index: int) -> str:
    """ "full_attention" or "sliding_attention" of layer `index`."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types[index]
    return SLIDING if getattr(config, "sliding_window", None) is not None else FULL
