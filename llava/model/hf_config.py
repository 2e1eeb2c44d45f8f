"""config.json of both layouts: flat as LLaVA writes it, nested as transformers' own classes do.

Special here: the two directions stand side by side and are each other's inverse. What the nested
layout has no key for (template, plan, image mode, tower's name) travels in a block of it, `llava`,
which transformers ignores. Image grids are (width, height) in LLaVA and (height, width) in
transformers, so each pair is turned around; the order of the list, which breaks ties, stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from llava.model.multimodal_encoder.builder import vision_config
from llava.reduction.plan import FASTV_KEY

# model_type of a decoder -> model_type of LLaVA over it (keys of `builder.FAMILIES`).
DECODERS = {
    "llama": "llava_llama",
    "mistral": "llava_mistral",
    "qwen2": "llava_qwen",
    "qwen3": "llava_qwen3",
}
_STRATEGIES = {"default": "patch", "full": "cls_patch"}
# Keys that transformers' nested layout has no place for.
CARRIED = (
    "conv_mode",
    "visual_token_reduction",
    "image_aspect_ratio",
    "mm_vision_tower",
    "mm_unpad_rounding",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
)


def flatten(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LLaVA's flat config (with its `model_type`) of a nested one. where: for messages.

    ValueError for what LLaVA's layout cannot say: another decoder, several feature layers, a
    projector without bias or with another activation.
    """
    kind = raw.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ValueError(f"{where}: model_type {kind!r} is nested; accepted: llava, llava_next")
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(raw))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no config of transformers' {kind}: {error}") from error
    text, vision = config.text_config, config.vision_config
    if text.model_type not in DECODERS:
        raise ValueError(
            f"{where}: the decoder is a {text.model_type!r}; accepted: {', '.join(DECODERS)}"
        )
    wanted = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"{where}: {key} is {getattr(config, key)!r}; accepted: {value!r}")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"{where}: vision_feature_layer is {config.vision_feature_layer!r}; accepted: one layer"
        )
    flat: dict[str, Any] = {
        **text.to_dict(),
        "model_type": DECODERS[text.model_type],
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or text.dtype,
        "mm_vision_tower": getattr(vision, "_name_or_path", "") or vision.model_type,
        "mm_vision_config": vision_config(vision, where),
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": _STRATEGIES[config.vision_feature_select_strategy],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_token_index": config.image_token_index,
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
    }
    for key in ("architectures", "_name_or_path", "transformers_version"):
        flat.pop(key, None)
    if kind == "llava_next":
        flat["image_aspect_ratio"] = "anyres"
        flat["mm_patch_merge_type"] = "spatial_unpad"
        flat["mm_unpad_rounding"] = "transformers"  # LLaVA truncates where transformers rounds
        flat["image_grid_pinpoints"] = [[w, h] for h, w in config.image_grid_pinpoints]
    if raw.get(FASTV_KEY) is not None:
        flat[FASTV_KEY] = raw[FASTV_KEY]
    carried = raw.get("llava") or {}
    return {**flat, **{key: carried[key] for key in CARRIED if key in carried}}
