"""Tiny random models of every decoder family, and a batch that mixes all kinds of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMistralConfig,
    LlavaMistralForCausalLM,
    LlavaQwen2Config,
    LlavaQwen2ForCausalLM,
    LlavaQwen3Config,
    LlavaQwen3ForCausalLM,
)
from llava.prompting import pad_texts
from llava.reduction import Cut, PyramidDrop, Random, ReductionPlan, Uniform

LAYERS, TILE, VISUAL, VOCAB = 6, 28, 16, 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "mm_vision_tower": "random weights",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 24,
    "mm_vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 7,
    },
}
# Mistral's window is shorter than a prompt with its pictures, so it fills; Qwen2 mixes both kinds.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlavaConfig, LlavaLlamaForCausalLM, {}),
    "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM, {"sliding_window": 21}),
    "qwen2": (
        LlavaQwen2Config,
        LlavaQwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 23, "max_window_layers": 2},
    ),
    "qwen3": (LlavaQwen3Config, LlavaQwen3ForCausalLM, {}),
}
PLANS: dict[str, ReductionPlan] = {
    "none": ReductionPlan(),
    "pyramiddrop": ReductionPlan.pyramid([1, 3, 4], [0.7, 0.4, 0.15]),
    "pyramiddrop, original positions": ReductionPlan.pyramid(
        [2, 4], [0.5, 0.2], positions="original"
    ),
    "pyramiddrop, whole sample": ReductionPlan.pyramid([2, 4], [0.5, 0.2], per="sample"),
    "random then uniform": ReductionPlan((Cut(0, Random(0.6)), Cut(3, Uniform(0.3)))),
    "fastv": ReductionPlan.parse("fastv:k=2,r=0.6"),
    "simignore": ReductionPlan.parse("simignore:keep=9,text=options|question,offset=1"),
    "simignore, fastv, pyramiddrop": ReductionPlan.parse(
        "simignore:ratio=0.7,text=all+fastv:k=2,r=0.5"
        "+pyramiddrop:layers=[4],ratios=[0.2],per=sample,rope=False,positions=original"
    ),
    "adaptprune": ReductionPlan.parse("adaptprune:k=2,keep=0.4,sigma_s=0.4"),
    "yopo": ReductionPlan.parse(
        "yopo:layers=4,heads=['1111','1011','0001','0000','1111','1111'],window=3,ffn=2"
    ),
    "yopo, leaky": ReductionPlan.parse(
        "yopo:layers=4,heads=['1111','1011','0001','0000','0110','1111'],window=3,ffn=3,mode=leaky"
    ),
    "random, then yopo in all layers": ReductionPlan.parse(
        "random:layers=[0],ratios=[0.6],per=sample+yopo:heads=0.5,positions=renumber"
    ),
    "all dropped": ReductionPlan((Cut(2, PyramidDrop(0.4)), Cut(4, PyramidDrop(0.0)))),
}


def tiny_model(family: str = "llama", backend: str = "sdpa", **changes: Any) -> Any:
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(**{**SIZES, **VISION, **extra, **changes})
    config._attn_implementation = backend
    torch.manual_seed(7)
    model = model_class(config).eval()
    if getattr(model.model, "image_newline", None) is not None:
        torch.nn.init.normal_(model.model.image_newline)
    return model


def prompts(seed: int = 0) -> list[tuple[list[int], int]]:
    """(ids, pictures) of text-only, one-picture, two-picture and multi-turn samples."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    mark = [IMAGE_TOKEN_INDEX]
    return [
        ([1, *text(4), *mark, *text(7)], 1),
        ([1, *text(9)], 0),
        ([1, *mark, *text(3), *mark, *text(5)], 2),
        ([1, *text(2), *mark, *text(14)], 1),
    ]


def batch(samples: list[tuple[list[int], int]], side: str = "right") -> dict[str, Any]:
    """ids, attention_mask, images and texts of samples, padded on one side. The text "options",
    which half of them have, is not in the prompt."""
    width = max(len(ids) for ids, _ in samples)
    rows, masks = [], []
    for ids, _ in samples:
        padding = [0] * (width - len(ids))
        ones = [1] * len(ids)
        rows.append(padding + ids if side == "left" else ids + padding)
        masks.append(padding + ones if side == "left" else ones + padding)
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "images": pictures(samples),
        "texts": pad_texts(
            [
                {"question": ids[-4:], "options": [1, *ids[-2:], 5] if sum(ids) % 2 else []}
                for ids, _ in samples
            ]
        ),
    }


def pictures(samples: list[tuple[list[int], int]]) -> Tensor | None:
    """One picture a mark; a picture depends on its prompt and place alone."""
    out = []
    for ids, count in samples:
        for place in range(count):
            generator = torch.Generator().manual_seed(1000 * sum(ids) + place)
            out.append(torch.randn(3, TILE, TILE, generator=generator))
    return torch.stack(out) if out else None


def labels_of(inputs: dict[str, Any]) -> Tensor:
    """Two supervised spans a sample, as in a dialogue of two turns."""
    labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    for row, mask in enumerate(inputs["attention_mask"]):
        real = mask.nonzero()[:, 0]
        spans = [int(real[-1]), int(real[-2]), int(real[-5])]
        labels[row, spans] = inputs["input_ids"][row, spans]
    return labels.masked_fill(inputs["input_ids"] < 0, IGNORE_INDEX)
