"""What is trained and what flags may not ask for; what the probe leaves out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from llava.constants import IGNORE_INDEX
from llava.train.arguments import ModelArguments
from llava.train.probe import Probe, first_question
from llava.train.setup import check_vision, freeze


class Model(nn.Module):
    """Parameters with the names of a LLaVA model's."""

    def __init__(self, tower: bool = True) -> None:
        super().__init__()
        self.layers = nn.Linear(2, 3)
        if tower:
            self.vision_tower = nn.Linear(2, 4)
            self.mm_projector = nn.Linear(4, 2)


def training(**flags: Any) -> Any:
    """The training arguments that decide on it."""
    defaults = {
        "freeze_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False, "lora_enable": False,
        "bf16": False, "deepspeed": None, "fsdp": None,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **flags})


@pytest.mark.parametrize(
    ("model_flags", "training_flags", "trained"),
    [
        ({}, {}, "language projector"),
        ({"freeze_backbone": True}, {}, "projector"),
        ({"tune_mm_mlp_adapter": True}, {}, "projector"),
        ({}, {"freeze_mm_mlp_adapter": True}, "language"),
        ({}, {"unfreeze_mm_vision_tower": True}, "language projector tower"),
        ({"mm_tunable_parts": "mm_mlp_adapter"}, {"unfreeze_mm_vision_tower": True}, "projector"),
        ({"mm_tunable_parts": "mm_vision_tower"}, {"freeze_mm_mlp_adapter": True}, "tower"),
        ({"tune_mm_mlp_adapter": True, "mm_tunable_parts": "mm_language_model"}, {}, "language"),
    ],
)
def test_flags_say_what_is_trained(model_flags, training_flags, trained):
    model = Model()
    counts = freeze(model, ModelArguments(**model_flags), training(**training_flags))
    assert {part for part, count in counts.items() if count} == set(trained.split())
    own = {"language": model.layers, "projector": model.mm_projector, "tower": model.vision_tower}
    for part, module in own.items():
        sizes = [p.numel() for p in module.parameters() if p.requires_grad]
        assert sum(sizes) == counts[part]


@pytest.mark.parametrize(
    ("tower", "model_flags", "training_flags", "message"),
    [
        (False, {"tune_mm_mlp_adapter": True}, {}, "the projector is to be trained"),
        (False, {}, {"unfreeze_mm_vision_tower": True}, "the tower is to be trained"),
        (False, {"mm_tunable_parts": "mm_vision_tower,mm_language_model"}, {}, "the tower is to"),
        (True, {"tune_mm_mlp_adapter": True}, {"unfreeze_mm_vision_tower": True}, "leave one out"),
        (True, {"freeze_backbone": True}, {"freeze_mm_mlp_adapter": True}, "nothing to train"),
    ],
)
def test_what_flags_may_not_ask_for(tower, model_flags, training_flags, message):
    with pytest.raises(ValueError, match=message):
        freeze(Model(tower), ModelArguments(**model_flags), training(**training_flags))


def test_a_sample_in_which_nothing_is_learned_is_no_question():
    """Legacy masking may leave a sample without a target: the probe must not end the run."""
    masked = {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX] * 3, "images": []}
    assert first_question(masked, "sample 0") is None
    asked = first_question({**masked, "labels": [IGNORE_INDEX, 2, 3]}, "sample 0")
    assert asked.inputs["inputs"].tolist() == [[1]]
    assert asked.reference == [2, 3]

    class Samples(list):
        def describe(self, index: int) -> str:
            return f"sample {index}"

    trainer = SimpleNamespace(
        eval_dataset=None, train_dataset=Samples([masked]), model=nn.Linear(1, 1),
        args=SimpleNamespace(process_index=0, device=torch.device("cpu")),
    )  # fmt: skip
    Probe(trainer, 4, 1).run()  # nothing is asked, nothing is logged


def test_a_tower_that_leaves_out_defaults_is_judged_like_any_other(tmp_path):
    """CLIP-B/32's config.json says neither width nor geometry nor layers."""
    CLIPVisionConfig().save_pretrained(tmp_path / "tower")
    LlamaConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "base")
    flags = {"init_from_config": str(tmp_path / "base"), "vision_tower": str(tmp_path / "tower")}
    data = SimpleNamespace(image_aspect_ratio="pad")

    def judge(limit: int, **more: Any) -> None:
        length = SimpleNamespace(model_max_length=limit)
        check_vision(ModelArguments(**{**flags, **more}), data, length)

    judge(50)
    with pytest.raises(ValueError, match="49 visual tokens"):
        judge(49)
    with pytest.raises(ValueError, match="has 12 layers"):
        judge(50, mm_vision_select_layer=-14)
