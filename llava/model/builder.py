"""Load a checkpoint with its tokenizer and image processor.

A checkpoint is recognised by its files and config keys, never by the name of its folder. Read here:
folders in LLaVA's layout (flat config.json with `mm_vision_tower`, one or several safetensors or
.bin files, with or without the tower's weights).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPVisionConfig

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava.model.language_model.llava_qwen3 import LlavaQwen3Config, LlavaQwen3ForCausalLM
from llava.model.multimodal_encoder.clip_encoder import processor_for
from llava.reduction.plan import CONFIG_KEY, ReductionPlan
from llava.utils import get_logger

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llava_llama": (LlavaConfig, LlavaLlamaForCausalLM),
    "llava": (LlavaConfig, LlavaLlamaForCausalLM),
    "llava_mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
    "llava_qwen": (LlavaQwen2Config, LlavaQwen2ForCausalLM),
    "llava_qwen3": (LlavaQwen3Config, LlavaQwen3ForCausalLM),
}
TOWER_PREFIX = "model.vision_tower."


def load_pretrained_model(
    model_path: str | os.PathLike[str],
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | torch.device | None = None,
    *,
    reduction: Any = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any, Any, int]:
    """(tokenizer, model in eval mode, image processor or None, context length).

    LLaVA's signature; model_name is accepted and not read. device: default CUDA when there is one,
    else the CPU; device_map is used on CUDA alone. dtype: default float32 on the CPU, else the
    checkpoint's. reduction: a plan that replaces the checkpoint's. Raises ValueError when the
    folder, a weight or an option is missing, by name.
    """
    if model_base is not None or load_8bit or load_4bit:
        raise ValueError(
            "model_base (LoRA, projector only), load_8bit and load_4bit are not supported yet; "
            "give the path of a full checkpoint"
        )
    path = Path(model_path)
    config, model_class = _read_config(path)
    if reduction is not None:
        setattr(config, CONFIG_KEY, ReductionPlan.parse(reduction).to_dict())
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cuda = torch.device(device).type == "cuda"
    if dtype is None:
        dtype = getattr(config, "dtype", None) if on_cuda else torch.float32
    placement = device_map if on_cuda and device_map is not None else None
    options = {"dtype": dtype, "device_map": placement, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model, report = model_class.from_pretrained(path, config=config, **options)
    _complete(model, report, path)
    if placement is None:
        model.to(device)
    tower = model.get_vision_tower()
    processor = None
    if tower is not None:
        if (path / "preprocessor_config.json").is_file():
            tower.image_processor = type(processor_for(tower.config)).from_pretrained(path)
        processor = tower.image_processor
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer, model.eval(), processor, model.context_length


def _read_config(path: Path) -> tuple[Any, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is no checkpoint: config.json is missing")
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from None
    if kind not in FAMILIES:
        raise ValueError(
            f"{file} has model_type {kind!r}; accepted: {', '.join(FAMILIES)} (LLaVA's layout)"
        )
    config_class, model_class = FAMILIES[kind]
    config = config_class.from_pretrained(path)
    tower = getattr(config, "mm_vision_tower", None)
    own = getattr(config, "mm_vision_config", None)
    if tower and own is None and (Path(tower) / "config.json").is_file():
        # With the tower's structure known, weights that the checkpoint may hold are used.
        config.mm_vision_config = CLIPVisionConfig.from_pretrained(tower).to_diff_dict()
    return config, model_class


def _complete(model: Any, report: dict[str, Any], path: Path) -> None:
    """Read the tower from its own folder if the checkpoint has none; refuse any other gap."""
    missing = sorted(report["missing_keys"])
    tower = model.get_vision_tower()
    other = [key for key in missing if not key.startswith(TOWER_PREFIX)]
    mismatched = [str(entry[0]) for entry in report.get("mismatched_keys", ())]
    if other or mismatched:
        raise ValueError(
            f"checkpoint {path} does not fit its config.json; missing: {other or 'none'}, of "
            f"another shape: {mismatched or 'none'}"
        )
    unexpected = sorted(report.get("unexpected_keys", ()))
    if unexpected:
        get_logger(__name__).warning("checkpoint %s: keys not used: %s", path, unexpected)
    if tower is not None and (missing or not tower.is_loaded):
        dtype, device = model.dtype, model.device
        tower.load_model()
        tower.to(device=device, dtype=dtype)
