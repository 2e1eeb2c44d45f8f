"""A complete checkpoint with random weights, small enough for any test, and a picture for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PATCHES = 16


def save_tiny_checkpoint(
    folder: Path, *, layers: int = 4, reduction: dict | None = None, **changes: Any
) -> Path:
    """Write model, digits tokenizer and image processor to `folder`: 4x4 tokens a picture.

    changes: entries of config.json with another value.
    """
    from llava.digits.tokenizer import build_tokenizer
    from llava.model import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import processor_for

    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlavaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        conv_mode="mistral_instruct",
        image_aspect_ratio="square",
        mm_vision_tower="random weights",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=32,
        mm_vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
    )
    if reduction is not None:
        config.visual_token_reduction = reduction
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM(config)
    model.save_pretrained(folder)
    processor_for(model.get_vision_tower().config).save_pretrained(folder)
    return folder
