"""config.json of both layouts: flat as LLaVA writes it, nested as transformers' own classes do.

Special here: the two directions stand side by side and are each other's inverse. What the nested
layout has no key for (template, plan, image mode, tower's name) travels in a block of it, `llava`,
which transformers ignores. Image grids are (width, height) in LLaVA and (height, width) in
transformers, so each pair is turned around; the order of the list, which breaks ties, stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING

from llava.mm_utils import parse_grid_pinpoints
from llava.model.multimodal_encoder.builder import published_name, vision_config
from llava.reduction.plan import FASTV_KEY
from llava.reduction.yopo import CHECKPOINT_KEYS

# model_type of a decoder -> model_type of LLaVA over it (keys of `builder.FAMILIES`).
DECODERS = {
    "llama": "llava_llama",
    "mistral": "llava_mistral",
    "qwen2": "llava_qwen",
    "qwen3": "llava_qwen3",
}
# Which of the tower's tokens are features; a tower without class token keeps all of them.
_STRATEGIES = {
    "clip_vision_model": {"default": "patch", "full": "cls_patch"},
    "siglip_vision_model": {"full": "patch"},
}
CARRIED_KEY = "llava"
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
    "sprompt_len",
    *CHECKPOINT_KEYS,
)


@contextmanager
def described_by(where: str) -> Iterator[None]:
    """Within the block, which makes a config or an empty model of what config.json (`where`) says,
    everything that transformers' classes raise over its values becomes a ValueError."""
    try:
        yield
    except Exception as error:  # transformers raises whatever comes of the values
        last = (str(error).strip().splitlines() or [""])[-1].strip()
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{last}") from error


def flatten(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LLaVA's flat config (with its `model_type`) of a nested one. where: for messages.

    ValueError for what LLaVA's layout cannot say: another decoder, several feature layers, a
    projector without bias or with another activation.
    """
    kind = raw.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ValueError(f"{where}: model_type {kind!r} is nested; accepted: llava, llava_next")
    with described_by(where):
        config = CONFIG_MAPPING[kind].from_dict(dict(raw))
    text, vision = config.text_config, config.vision_config
    vision_dict = vision_config(vision, where)
    feature = _check_nested(config, where)
    flat: dict[str, Any] = {
        **text.to_dict(),
        "model_type": DECODERS[text.model_type],
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or text.dtype,
        "mm_vision_tower": published_name(vision_dict) or vision.model_type,
        "mm_vision_config": vision_dict,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": feature,
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
    carried = raw.get(CARRIED_KEY) or {}
    return {**flat, **{key: carried[key] for key in CARRIED if key in carried}}


def _check_nested(config: Any, where: str) -> str:
    """LLaVA's name of the feature choice. ValueError for what LLaVA's layout cannot say."""
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
    strategies, strategy = _STRATEGIES[vision.model_type], config.vision_feature_select_strategy
    if strategy not in strategies:
        raise ValueError(
            f"{where}: vision_feature_select_strategy {strategy!r} would leave out a patch of a "
            f"{vision.model_type}; accepted: {', '.join(strategies)}"
        )
    return strategies[strategy]


def nest(config: Any, where: str) -> dict[str, Any]:
    """The nested config (llava or llava_next) of one of our config objects; `image_token_index` is
    left to the caller. ValueError for what transformers' classes cannot do."""
    families = {ours: theirs for theirs, ours in DECODERS.items()}
    decoder, vision = families[config.model_type], dict(config.mm_vision_config)
    kind = _nested_kind(config, where)
    text = CONFIG_MAPPING[decoder]()
    own = config.to_dict()
    text_config = {key: own[key] for key in text.to_dict() if key in own}
    text_config |= {"model_type": decoder, "architectures": None}
    strategies = {ours: theirs for theirs, ours in _STRATEGIES[vision["model_type"]].items()}
    side = vision["image_size"] // vision["patch_size"]
    nested: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "text_config": text_config,
        "vision_config": vision,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": strategies[config.mm_vision_select_feature or "patch"],
        "image_seq_length": side * side,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "dtype": own.get("dtype"),
    }
    if kind == "llava_next":
        pairs = parse_grid_pinpoints(config.image_grid_pinpoints, vision["image_size"])
        nested["image_grid_pinpoints"] = [[h, w] for w, h in pairs]
    nested[CARRIED_KEY] = {key: own.get(key) for key in CARRIED if own.get(key) is not None}
    if own.get(FASTV_KEY) is not None:
        nested[FASTV_KEY] = own[FASTV_KEY]
    if kind == "llava_next" and "mm_unpad_rounding" not in nested[CARRIED_KEY]:
        nested[CARRIED_KEY]["mm_unpad_rounding"] = "llava"
    return nested


_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}


def _nested_kind(config: Any, where: str) -> str:
    projector = config.mm_projector_type
    if projector != "mlp2x_gelu":
        raise ValueError(
            f"{where}: mm_projector_type {projector!r} has no place in transformers' classes; "
            "accepted: mlp2x_gelu"
        )
    aspect = getattr(config, "image_aspect_ratio", None)
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    kinds = {("anyres", "spatial_unpad"): "llava_next"}
    kinds |= {(mode, "flat"): "llava" for mode in (None, "square", "pad")}
    if (aspect, merge) not in kinds:
        raise ValueError(
            f"{where}: image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r} has no "
            "place in transformers' classes; accepted: anyres with spatial_unpad, pad or square "
            "with flat"
        )
    return kinds[aspect, merge]
