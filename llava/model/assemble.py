"""From checkpoint folders to one flat config and one dict of weights under LLaVA's names.

Special here: whatever lies on disk (full weights in any spelling, a projector over a base, a LoRA
run over a base, a tower inside or elsewhere) ends up as the same two things, before any model is
built; loading and `llava convert` start from there. Every weight is there once, with the shape the
config says, or the folder is refused by name.

    parts = assemble("llava-v1.5-7b-lora", model_base="vicuna-7b-v1.5")
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model.checkpoint_layout import (
    BASE_KEY,
    NON_LORA_FILE,
    CheckpointFiles,
    inspect_checkpoint,
    read_json,
    read_weights,
    resolve_folder,
)
from llava.model.choices import Choice
from llava.model.hf_config import CARRIED_KEY, DECODERS, described_by, flatten
from llava.model.key_maps import (
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    adapter_names,
    rename_all,
    shortened,
)
from llava.model.multimodal_encoder.builder import read_tower, tower_class, tower_structure
from llava.reduction.plan import CONFIG_KEY

# model_type or architecture in a flat config.json -> key of `builder.FAMILIES`.
MODEL_TYPES = {**DECODERS, **{name: name for name in DECODERS.values()}, "llava": "llava_llama"}
ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llava_llama",
    "LlavaLlamaForCausalLM_PDrop": "llava_llama",
    "LlavaMistralForCausalLM": "llava_mistral",
    "LlavaQwenForCausalLM": "llava_qwen",
    "LlavaQwen2ForCausalLM": "llava_qwen",
    "LlavaQwen3ForCausalLM": "llava_qwen3",
}


@dataclass
class Parts:
    """config: flat, with a `model_type` of `builder.FAMILIES` and, for a model with a tower,
    `mm_vision_config`. weights: {LLaVA's name: tensor}. folders: where tokenizer and processor may
    lie, first one first. processor: that of a tower read from its own folder."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    origin: Choice
    tower: Choice
    folders: tuple[Path, ...]
    processor: Any = None


def assemble(
    model_path: str | Path,
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    merge_dtype: torch.dtype | None = None,
) -> Parts:
    """Read a checkpoint. model_base: what a LoRA or projector-only folder was trained over.
    vision_tower: replaces the tower that the checkpoint holds or names. merge_dtype: of the
    language model's weights that a LoRA changes (default: the base's).

    ValueError, by name, for anything missing, damaged or contradictory.
    """
    files = inspect_checkpoint(model_path)
    config = flat_config(files)
    folders = (files.path,)
    if files.kind == "full":
        if model_base is not None:
            raise ValueError(
                f"{files.path} is a full checkpoint; model_base {str(model_base)!r} is for LoRA "
                "and projector-only folders"
            )
        weights = rename_all(read_weights(files.weights))
        origin = Choice(files.describe(), "files and config.json")
    else:
        base = _base(files, model_base)
        folders = (files.path, base.path)
        weights = rename_all(read_weights(base.weights))
        _overlay(files, weights, merge_dtype)
        origin = Choice(f"{files.describe()} over {base.path}", "files and config.json")
    parts = Parts(config, weights, origin, Choice("none", "config.json"), folders)
    if config.get("mm_vision_tower"):
        _check_projector(files.path, parts)
        _add_tower(files.path, parts, vision_tower)
    elif vision_tower is not None:
        raise ValueError(f"{files.path} has no vision tower; {str(vision_tower)!r} has no use")
    return parts


def flat_config(files: CheckpointFiles) -> dict[str, Any]:
    """The folder's config in LLaVA's layout, its `model_type` one of `builder.FAMILIES`."""
    return in_llava_layout(files.config, str(files.path / "config.json"))


_TEXT, _DICT, _WHOLE, _SWITCH = (str,), (dict,), (int,), (bool,)
# What the keys of config.json may hold beside null that are read before any config class sees them.
_TYPES: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "model_type": _TEXT,
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
    "text_config": _DICT,
    "vision_config": _DICT,
    CARRIED_KEY: _DICT,
    "conv_mode": _TEXT,
    "image_aspect_ratio": _TEXT,
    "mm_hidden_size": _WHOLE,
    "mm_patch_merge_type": _TEXT,
    "mm_projector_type": _TEXT,
    "mm_use_im_patch_token": _SWITCH,
    "mm_use_im_start_end": _SWITCH,
    "mm_vision_config": _DICT,
    "mm_vision_select_feature": _TEXT,
    "mm_vision_select_layer": _WHOLE,
    "mm_vision_tower": _TEXT,
    "tokenizer_model_max_length": (int, float),
    CONFIG_KEY: (str, dict),
}


def check_types(
    values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str
) -> None:
    """ValueError for a value of another type than `types` says; null is of any."""
    for key, accepted in types.items():
        value = values.get(key)
        if value is not None and not isinstance(value, accepted):
            names = " or ".join(kind.__name__ for kind in accepted)
            raise ValueError(f"{where}: {key} is {value!r}; accepted: {names}")


def in_llava_layout(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json of either layout as `flat_config` gives it. ValueError for one that cannot be
    read."""
    check_types(config, _TYPES, where)
    if "text_config" in config:
        return flatten(config, where)
    kind = config.get("model_type")
    named = config.get("architectures") or [None]
    family = ARCHITECTURES.get(str(named[0])) if kind == "llava" else None
    family = family or MODEL_TYPES.get(str(kind))
    if family is None:
        raise ValueError(f"{where} has model_type {kind!r}; accepted: {', '.join(MODEL_TYPES)}")
    return {**config, "model_type": family}


# ------------------------------------------------------------------------------- base and adapters
def _base(files: CheckpointFiles, model_base: str | Path | None) -> CheckpointFiles:
    """The full checkpoint that an adapter belongs to."""
    what = "LoRA adapter" if files.kind == "lora" else "projector without its language model"
    if model_base is None:
        named = files.config.get(BASE_KEY)
        if files.kind == "lora":
            named = adapter_settings(files.path).get(BASE_KEY) or named
        try:
            model_base = resolve_folder(named or "")
            found = named and model_base.is_dir()
        except ValueError:  # a hub id that is not to be had
            found = False
        if not found:
            hint = f"; it was trained over {named!r}" if named else ""
            raise ValueError(f"{files.path} is a {what}: give its base (--model-base){hint}")
    assert model_base is not None
    base = inspect_checkpoint(model_base)
    if base.kind != "full":
        raise ValueError(f"model_base {base.path} is no full checkpoint but a {base.kind}")
    _check_base(files, base)
    return base


# What a base must share with what was trained over it. Two models with other heads can have weights
# of the same shapes.
_SHARED = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


def _check_base(files: CheckpointFiles, base: CheckpointFiles) -> None:
    """ValueError for a base of another architecture or size."""
    own, given = flat_config(files), flat_config(base)
    for key in _SHARED:
        wanted, found = own.get(key), given.get(key)
        if None not in (wanted, found) and wanted != found:
            raise ValueError(
                f"{files.path} was trained over a model with {key} {wanted!r}; the base "
                f"{base.path} has {found!r}"
            )


def _overlay(files: CheckpointFiles, weights: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Put an adapter's weights over the base's."""
    if files.kind == "projector":
        weights |= adapter_names(read_weights(files.weights))
        return
    if files.is_multimodal or (files.path / NON_LORA_FILE).is_file():
        weights |= read_non_lora(files.path)
    settings = adapter_settings(files.path)
    merge_lora(weights, read_weights(files.weights), settings, str(files.path), dtype)


def read_non_lora(folder: Path) -> dict[str, Tensor]:
    """What a LoRA run trained beside its adapter, under LLaVA's names. ValueError where it is
    missing: the base may hold another projector, which would fit and be wrong."""
    file = folder / NON_LORA_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: {NON_LORA_FILE} is missing, and with it the trained projector")
    return adapter_names(read_weights([file]))


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. ValueError for values that cannot be meant."""
    file = folder / "adapter_config.json"
    settings = read_json(file)
    check_types(settings, {BASE_KEY: _TEXT, "lora_alpha": (int, float)}, str(file))
    return settings


_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
_SAVED = re.compile(r"\.modules_to_save(\.default)?|\.base_layer")


def merge_lora(
    weights: dict[str, Tensor],
    adapter: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    where: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Add `scale * B @ A` to the weights that a peft LoRA adapter changes, in float32, in place.

    settings: adapter_config.json. Both of peft's spellings (with and without `.default`) are read.
    The scale is alpha / r, or alpha / sqrt(r) with use_rslora. ValueError for another kind of
    adapter, a half without its other half, and a weight that the base does not have.
    """
    _plain_lora(settings, where)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in adapter.items():
        match = _LORA.fullmatch(key)
        bare = match["module"] + ".weight" if match else _SAVED.sub("", key)
        (name,) = adapter_names({bare: value})
        if name not in weights:
            raise ValueError(f"{where}: the adapter changes {key!r}, which its base does not have")
        if match:
            halves.setdefault(name, {})[match["half"]] = value
        else:
            weights[name] = value
    for name, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{where}: LoRA of {name} is half there: only {', '.join(pair)}")
        old, (rank, width) = weights[name], pair["A"].shape
        if (pair["B"].shape[0], width) != tuple(old.shape):
            raise ValueError(
                f"{where}: LoRA of {name} is for {pair['B'].shape[0]} x {width}, the base has "
                f"{tuple(old.shape)}"
            )
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        merged = old.float() + scale * (pair["B"].float() @ pair["A"].float())
        weights[name] = merged.to(dtype or old.dtype)


# Ways of starting an adapter that also change the weights it lies over, which no file here holds.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def _plain_lora(settings: Mapping[str, Any], where: str) -> None:
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{where}: peft_type {settings['peft_type']!r}; accepted: 'LORA'")
    for key in ("use_dora", "fan_in_fan_out", "alpha_pattern"):
        if settings.get(key):
            raise ValueError(f"{where}: {key} is {settings[key]!r}; only plain LoRA can be merged")
    start = settings.get("init_lora_weights")
    if str(start).lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which changes the base too; convert the "
            "adapter to plain LoRA with peft first"
        )
    if settings.get("lora_alpha") is None:
        raise ValueError(f"{where}: adapter_config.json has no lora_alpha")


# ----------------------------------------------------------------------------- projector and tower
def _check_projector(folder: Path, parts: Parts) -> None:
    """A missing projector type would silently mean `linear`; say what the weights look like."""
    if parts.config.get("mm_projector_type"):
        return
    names = [key.removeprefix(PROJECTOR_PREFIX) for key in parts.weights if PROJECTOR_PREFIX in key]
    layers = len({name for name in names if name.endswith(".weight")})
    guess = "linear" if "weight" in names else f"mlp{layers}x_gelu" if layers else "unknown"
    raise ValueError(
        f"{folder / 'config.json'} has no mm_projector_type; the weights look like {guess!r}"
    )


_USUAL = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}


def _add_tower(folder: Path, parts: Parts, vision_tower: str | Path | None) -> None:
    """Settle the tower's structure and weights: the given one, else the checkpoint's own, else the
    one that the config names."""
    config, weights = parts.config, parts.weights
    for key, usual in _USUAL.items():
        if config.get(key) is None:
            config[key] = usual
    name = str(vision_tower or config["mm_vision_tower"])
    inside = any(key.startswith(TOWER_PREFIX) for key in weights)
    if vision_tower is None and inside:
        structure = config.get("mm_vision_config") or tower_structure(name, folder)
        cls = tower_class(structure.get("model_type", "clip_vision_model"), name)
        for key in [key for key in weights if key.startswith(cls.ignored)]:
            del weights[key]
        config["mm_vision_config"] = {**structure, **cls.settings}
        _leave_out_layers(config, weights)
        parts.tower = Choice("weights in the checkpoint", "checkpoint")
    else:
        structure, own, parts.processor = read_tower(name)
        for key in [key for key in weights if key.startswith(TOWER_PREFIX)]:
            del weights[key]
        weights |= {TOWER_PREFIX + key: value for key, value in own.items()}
        config["mm_vision_config"] = structure
        parts.tower = Choice(name, "flag" if vision_tower else "config.json, mm_vision_tower")
    _check_layer(folder, config)
    width = config["mm_vision_config"].get("hidden_size")
    if config.setdefault("mm_hidden_size", width) != width:
        raise ValueError(
            f"{folder}: the vision tower {name} has features of width {width}, the projector takes "
            f"{config['mm_hidden_size']} (mm_hidden_size)"
        )


def _check_layer(folder: Path, config: Mapping[str, Any]) -> None:
    """ValueError unless the tower has the layer whose output is read."""
    layers = config["mm_vision_config"].get("num_hidden_layers")
    select = config["mm_vision_select_layer"]
    if isinstance(layers, int) and not -layers - 1 <= select <= layers:
        raise ValueError(
            f"{folder}: mm_vision_select_layer is {select}; the tower has the layers {-layers - 1} "
            f"to {layers}"
        )


def _leave_out_layers(config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """LLaVA-NeXT cuts off the tower's layers behind the one whose output it reads; say so."""
    pattern = re.compile(re.escape(TOWER_PREFIX) + r"encoder\.layers\.(\d+)\.")
    matches = [pattern.match(key) for key in weights]
    have = 1 + max((int(match[1]) for match in matches if match), default=-1)
    structure = config["mm_vision_config"]
    layers, select = structure.get("num_hidden_layers"), config["mm_vision_select_layer"]
    if layers and select < -1 and have == layers + 1 + select:
        config["mm_vision_config"] = {**structure, "num_hidden_layers": have}
        config["mm_vision_select_layer"] = -1


def empty_model(family: Any, config: Any, where: str) -> Any:
    """A model on the meta device. ValueError where config.json (`where`) describes none."""
    with described_by(where), torch.device("meta"):
        return family(config)


def check_weights(weights: Mapping[str, Tensor], model: Any, where: str) -> list[str]:
    """Compare names and shapes with a model on the meta device; returns the names not used.

    ValueError that names the weights that are missing or of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = expected.keys() - weights.keys() - set(getattr(model, "all_tied_weights_keys", ()))
    shapes = [
        f"{name} ({tuple(weights[name].shape)}, config.json says {shape})"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if missing or shapes:
        raise ValueError(
            f"checkpoint {where} does not fit its config.json; missing: {shortened(missing)}; "
            f"of another shape: {shortened(shapes)}"
        )
    return sorted(weights.keys() - expected.keys())
