"""Which class a vision tower is: the only place that names tower classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

TOWERS: dict[str, type[nn.Module]] = {"clip_vision_model": CLIPVisionTower, "clip": CLIPVisionTower}


def build_vision_tower(config: Any, delay_load: bool = True) -> Any:
    """The tower that `config.mm_vision_tower` names.

    A local folder is recognised by the `model_type` of its config.json; a checkpoint that holds its
    own tower by `mm_vision_config`; a hub id is taken as CLIP. ValueError for another type.
    """
    name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
    if not name:
        raise ValueError("mm_vision_tower is not set; give a folder or a hub id")
    own = getattr(config, "mm_vision_config", None)
    file = Path(name) / "config.json"
    if own is not None:
        kind = own.get("model_type", "clip_vision_model")
    elif file.is_file():
        kind = json.loads(file.read_text()).get("model_type")
    else:
        kind = "clip_vision_model"
    if kind not in TOWERS:
        raise ValueError(f"vision tower {name!r} is a {kind!r}; accepted: {', '.join(TOWERS)}")
    return TOWERS[kind](name, config, delay_load)
