"""CLIP vision tower: patch features of the layer before the last, without the class token.

Source: LLaVA-1.5, `mm_vision_select_layer` -2 and `mm_vision_select_feature` "patch".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging

from llava.mm_utils import clip_image_processor_class


def unreadable(name: str, error: Exception) -> ValueError:
    """What is said of a tower whose config, weights or image processor cannot be read."""
    return ValueError(
        f"vision tower {name!r} cannot be read; give a folder with config.json, weights and "
        f"preprocessor_config.json, or a hub id ({str(error).splitlines()[0]})"
    )


class CLIPVisionTower(nn.Module):
    """A frozen CLIP vision model.

    name: a local folder or a hub id. config: reads mm_vision_select_layer, mm_vision_select_feature
    and, for a checkpoint that holds its own tower, `mm_vision_config` (the CLIP config as a dict):
    then the structure is built at once and the checkpoint fills it. Otherwise the weights are read
    by `load_model`, which must run outside any meta-device context.
    """

    model_class: ClassVar[Any] = CLIPVisionModel
    config_class: ClassVar[Any] = CLIPVisionConfig
    class_tokens: ClassVar[int] = 1
    settings: ClassVar[dict[str, Any]] = {}  # of the vision config, whatever the checkpoint says
    ignored: ClassVar[tuple[str, ...]] = ()  # weights that no feature of a patch goes through

    def __init__(self, name: str, config: Any, delay_load: bool = True) -> None:
        super().__init__()
        self.vision_tower_name = name
        self.select_layer = getattr(config, "mm_vision_select_layer", -2)
        self.select_feature = getattr(config, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"mm_vision_select_feature {self.select_feature!r} is unknown; accepted: patch, "
                "cls_patch"
            )
        self.image_processor: Any = None
        self.is_loaded = False
        own = getattr(config, "mm_vision_config", None)
        if own is not None:
            self._adopt(self.model_class(self.config_class(**{**own, **self.settings})))
            self.image_processor = self.default_processor(self.config)
        elif not delay_load:
            self.load_model()

    @staticmethod
    def processor_class() -> Any:
        """The image processor's class; imported late, it needs Pillow."""
        return clip_image_processor_class()

    @classmethod
    def default_processor(cls, config: Any) -> Any:
        """The image processor (its usual mean and deviation) for a tower's picture size."""
        return processor_for(config)

    @classmethod
    def read(cls, name: str, device_map: Any = None) -> tuple[Any, Any]:
        """(vision model, image processor) from a folder or the hub. ValueError when they cannot be
        read, or when a weight is missing."""
        verbosity = logging.get_verbosity()
        try:
            config = cls.config_class.from_pretrained(name)
            for key, value in cls.settings.items():
                setattr(config, key, value)
            logging.set_verbosity_error()  # hub folders hold a text model too, and a long report
            model, report = cls.model_class.from_pretrained(
                name, config=config, device_map=device_map, output_loading_info=True
            )
            processor = cls.processor_class().from_pretrained(name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise unreadable(name, error) from error
        finally:
            logging.set_verbosity(verbosity)
        if report["missing_keys"]:
            raise ValueError(
                f"vision tower {name!r} lacks weights: {', '.join(sorted(report['missing_keys']))}"
            )
        return model, processor

    def _adopt(self, tower: Any) -> None:
        self.vision_tower = tower.requires_grad_(False)
        self.is_loaded = True

    def load_model(self, device_map: Any = None) -> None:
        """Read weights and image processor from `name`. ValueError when it is not there."""
        tower, self.image_processor = self.read(self.vision_tower_name, device_map)
        self._adopt(tower)

    def forward(self, images: Tensor) -> Tensor:
        """images [T, 3, H, W] -> features [T, P, C] in the dtype of the images.

        Without a graph where nothing wants a gradient: under checkpointing transformers makes the
        first embeddings ask for one, and a frozen tower would keep all its layers' inputs, be
        computed twice and run through backwards for nothing.
        """
        pixels = images.to(dtype=self.dtype)
        if self.device.type != "meta":  # offloaded weights come to the pixels (accelerate's hooks)
            pixels = pixels.to(self.device)
        wanted = pixels.requires_grad or any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            outputs = self.vision_tower(pixels, output_hidden_states=True)
        features = outputs.hidden_states[self.select_layer]
        if self.select_feature == "patch":
            features = features[:, self.class_tokens :]
        return features.to(images.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.vision_tower.parameters()).device

    @property
    def config(self) -> Any:
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @property
    def tokens_per_tile(self) -> int:
        """Rows of `forward`'s output a tile: the patches, and the class token if it is kept."""
        return self.num_patches + self.class_tokens * (self.select_feature == "cls_patch")


def processor_for(config: CLIPVisionConfig) -> Any:
    """The CLIP image processor (its usual mean and deviation) for a tower's picture size."""
    size = config.image_size
    return clip_image_processor_class()(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
