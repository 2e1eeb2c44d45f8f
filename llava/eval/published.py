"""Scores that were published for known checkpoints, to hold an own run against.

Special here: a checkpoint is recognised by the shape its config describes, never by a name; models
fine-tuned from one of these have the same shape and other scores. Source: LLaVA's
docs/MODEL_ZOO.md, full fine-tuning, no dropping; columns as there (`Benchmark.published`). MME is
perception alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_V15 = (
    "VQAv2", "GQA", "VizWiz", "SQA", "TextVQA", "POPE", "MME", "MMB", "MMB-CN", "SEED", "LLaVA-W",
    "MM-Vet",
)  # fmt: skip
_V16 = (
    "MMMU", "MathVista", "VQAv2", "GQA", "VizWiz", "SQA", "TextVQA", "POPE", "MME", "MMB", "MMB-CN",
    "SEED-IMG", "LLaVA-W", "MM-Vet",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A checkpoint's name on the hub, the shape of its decoder, its image mode and its scores by
    column."""

    name: str
    model_type: str
    layers: int
    hidden: int
    anyres: bool
    scores: dict[str, float]


PUBLISHED: tuple[Published, ...] = (
    Published(
        "liuhaotian/llava-v1.5-7b", "llava_llama", 32, 4096, False,
        dict(zip(_V15, (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1),
                 strict=True)),
    ),
    Published(
        "liuhaotian/llava-v1.5-13b", "llava_llama", 40, 5120, False,
        dict(zip(_V15, (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1),
                 strict=True)),
    ),
    Published(
        "liuhaotian/llava-v1.6-vicuna-7b", "llava_llama", 32, 4096, True,
        dict(zip(_V16, (35.8, 34.6, 81.8, 64.2, 57.6, 70.1, 64.9, 86.5, 1519.0, 67.4, 60.6, 70.2,
                        81.6, 43.9), strict=True)),
    ),
    Published(
        "liuhaotian/llava-v1.6-vicuna-13b", "llava_llama", 40, 5120, True,
        dict(zip(_V16, (36.2, 35.3, 82.8, 65.4, 60.5, 73.6, 67.1, 86.2, 1575.0, 70.0, 64.4, 71.9,
                        87.3, 48.4), strict=True)),
    ),
    Published(
        "liuhaotian/llava-v1.6-mistral-7b", "llava_mistral", 32, 4096, True,
        dict(zip(_V16, (35.3, 37.7, 82.2, 64.8, 60.0, 72.8, 65.7, 86.7, 1498.0, 68.7, 61.2, 72.2,
                        83.2, 47.3), strict=True)),
    ),
    Published(
        "liuhaotian/llava-v1.6-34b", "llava_llama", 60, 7168, True,
        dict(zip(_V16, (51.1, 46.5, 83.7, 67.1, 63.8, 81.8, 69.5, 87.7, 1631.0, 79.3, 79.0, 75.9,
                        89.6, 57.4), strict=True)),
    ),
)  # fmt: skip


def published_for(config: Any) -> Published | None:
    """The published checkpoint of this shape, or None."""
    anyres = getattr(config, "image_aspect_ratio", None) == "anyres"
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size, anyres)
    for entry in PUBLISHED:
        if (entry.model_type, entry.layers, entry.hidden, entry.anyres) == shape:
            return entry
    return None
