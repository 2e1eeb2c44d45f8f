"""From tower features to the language model's width. Source: LLaVA-1.5, `mm_projector_type`."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


class IdentityMap(nn.Module):
    """Features pass through unchanged; their width must be the language model's."""

    def forward(self, x: Any) -> Any:
        return x


def build_vision_projector(config: Any) -> nn.Module:
    """`linear`, `mlp{n}x_gelu` (n linear layers with exact GELU between them) or `identity`.

    Checkpoint keys of an MLP are 0, 2, 4, ... as in LLaVA. ValueError for another type.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        if config.mm_hidden_size != config.hidden_size:
            raise ValueError(
                f"mm_projector_type 'identity' needs equal widths; the tower has "
                f"{config.mm_hidden_size}, the language model {config.hidden_size}"
            )
        return IdentityMap()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(
            f"mm_projector_type {kind!r} is unknown; accepted: linear, mlp2x_gelu (any number of "
            "layers), identity"
        )
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(match.group(1)) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
