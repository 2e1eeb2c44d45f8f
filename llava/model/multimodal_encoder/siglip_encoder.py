"""SigLIP vision tower: patch features of the layer before the last; there is no class token.

Source: LLaVA-NeXT's SigLIP towers, `mm_vision_select_layer` -2. The pooling head is left out: no
feature of a patch goes through it.
"""

from __future__ import annotations

from typing import Any

from transformers import SiglipVisionConfig, SiglipVisionModel

from llava.mm_utils import siglip_image_processor_class
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


class SiglipVisionTower(CLIPVisionTower):
    """A frozen SigLIP vision model; arguments as `CLIPVisionTower`."""

    model_class = SiglipVisionModel
    config_class = SiglipVisionConfig
    class_tokens = 0
    settings = {"vision_use_head": False}
    ignored = ("model.vision_tower.vision_tower.head.",)

    @staticmethod
    def processor_class() -> Any:
        return siglip_image_processor_class()

    @classmethod
    def default_processor(cls, config: SiglipVisionConfig) -> Any:
        size = config.image_size
        return cls.processor_class()(size={"height": size, "width": size})
