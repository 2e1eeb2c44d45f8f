"""Which class a vision tower is: the only place that names tower classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, unreadable
from llava.model.multimodal_encoder.siglip_encoder import SiglipVisionTower

TOWERS: dict[str, type[CLIPVisionTower]] = {
    "clip_vision_model": CLIPVisionTower,
    "clip": CLIPVisionTower,
    "siglip_vision_model": SiglipVisionTower,
    "siglip": SiglipVisionTower,
}
# The structure of published towers, for checkpoints that hold the weights and name the tower: with
# it nothing needs to be downloaded. Values: the config.json of the hub repository.
_CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP_SO: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "google/siglip-so400m-patch14-384": {**_SIGLIP_SO, "image_size": 384},
}


def build_vision_tower(config: Any, delay_load: bool = True) -> Any:
    """The tower that `config.mm_vision_tower` names.

    A local folder is recognised by the `model_type` of its config.json; a checkpoint that holds its
    own tower by `mm_vision_config`; a published hub id by `PUBLISHED`; another hub id is taken as
    CLIP. ValueError for another type.
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
        kind = PUBLISHED.get(name, _CLIP_L)["model_type"]
    return tower_class(kind, name)(name, config, delay_load)


def tower_class(kind: Any, name: str) -> type[CLIPVisionTower]:
    """The class for a `model_type`. ValueError for one that is not known."""
    if kind not in TOWERS:
        raise ValueError(f"vision tower {name!r} is a {kind!r}; accepted: {', '.join(TOWERS)}")
    return TOWERS[kind]


def tower_structure(name: str, holder: str | Path | None = None) -> dict[str, Any]:
    """The vision config, as a dict, of the tower `name`: a folder, a published id, or a hub id.

    holder: the checkpoint that holds the weights, if one does, for the message. ValueError when it
    is not to be had.
    """
    if not Path(name).is_dir() and name in PUBLISHED:
        return dict(PUBLISHED[name])
    try:
        return read_structure(name)
    except ValueError as error:
        if holder is None:
            raise
        raise ValueError(
            f"{holder} holds the weights of its vision tower but not its structure (give it with "
            f"--vision-tower): {error}"
        ) from error


def tower_config(structure: Mapping[str, Any], name: str) -> Any:
    """The library's config object of a `tower_structure`, which leaves out what is its default."""
    cls = tower_class(structure.get("model_type", "clip_vision_model"), name)
    return cls.config_class(**{**structure, **cls.settings})


def published_name(structure: dict[str, Any]) -> str | None:
    """The hub id of the published tower with this structure, or None."""
    for name, facts in PUBLISHED.items():
        if all(structure.get(key) == value for key, value in facts.items()):
            return name
    return None


def vision_config(config: Any, name: str) -> dict[str, Any]:
    """The vision part of a tower's config, as a dict with its `model_type`."""
    tower_class(config.model_type, name)
    config = getattr(config, "vision_config", config)
    structure = {**config.to_diff_dict(), "model_type": config.model_type}
    structure.pop("transformers_version", None)
    return {**structure, **tower_class(config.model_type, name).settings}


def read_structure(name: str) -> dict[str, Any]:
    """The vision config, as a dict, of a tower in its own folder or on the hub. ValueError when it
    cannot be read, or is of another kind."""
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises whatever its config classes do
        raise unreadable(name, error) from error
    structure = vision_config(config, name)
    tower = tower_config(structure, name)
    if not 0 < tower.patch_size <= tower.image_size:
        raise ValueError(
            f"vision tower {name!r} has patch_size {tower.patch_size} with image_size "
            f"{tower.image_size}"
        )
    return structure


def read_tower(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """(vision config as a dict, weights, image processor) of a tower in its own folder or on the
    hub. ValueError when it cannot be read, or lacks a weight."""
    structure = read_structure(name)
    model, processor = tower_class(structure["model_type"], name).read(name)
    return structure, model.state_dict(), processor
