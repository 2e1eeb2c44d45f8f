"""What is trained and what flags may not ask for; what the probe leaves out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from llava.constants import IGNORE_INDEX
from llava.mm_utils import clip_image_processor_class
from llava.train.arguments import ModelArguments
from llava.train.probe import Probe, first_question
from llava.train.setup import check_plan, check_vision, freeze, load_tokenizer
from llava.train.train import check_output

sys.path.insert(0, str(Path(__file__).parents[1] / "smoke"))
from train_fixtures import write_all  # noqa: E402


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
        (True, {"tune_mm_mlp_adapter": True}, {"unfreeze_mm_vision_tower": True}, "leave out"),
        (
            True,
            {"tune_mm_mlp_adapter": True, "mm_tunable_parts": "mm_language_model"},
            {},
            "leave it out with --mm_tunable_parts",
        ),
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
    clip_image_processor_class()().save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "model.safetensors").touch()  # read later
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


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_all(tmp_path)
    (tmp_path / "base").symlink_to(tmp_path / "config")
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def args(files: Path) -> ModelArguments:
    return ModelArguments(
        init_from_config=str(files / "config"), vision_tower=str(files / "tower"),
        mm_vision_select_layer=-2, mm_projector_type="mlp2x_gelu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "big"}, {"hidden_size": 0}, {"hidden_size": None},
        {"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"num_hidden_layers": "4"},
        {"num_attention_heads": 0}, {"hidden_act": "wild"}, {"dtype": "float99"},
        {"rope_parameters": {"rope_type": "wild"}}, {"rope_parameters": "x"},
    ],
)  # fmt: skip
def test_a_config_that_describes_no_model_is_named(files, changes):
    check_plan(args(files))
    edit(files / "config" / "config.json", **changes)
    with pytest.raises(ValueError, match="no model can be made of the config.json in .*config"):
        check_plan(args(files))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(files):
    assert load_tokenizer(args(files), 64).pad_token == "<pad>"
    edit(files / "config" / "config.json", vocab_size=3)
    with pytest.raises(ValueError, match="has 17 tokens, the model 3"):
        load_tokenizer(args(files), 64)
    (files / "config" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer in .*config cannot be read"):
        load_tokenizer(args(files), 64)


def test_a_pad_token_without_a_row_gives_way(files):
    tokenizer = load_tokenizer(args(files), 64)
    tokenizer.add_special_tokens({"pad_token": "<none>"})
    tokenizer.save_pretrained(files / "config")
    assert load_tokenizer(args(files), 64).pad_token == "<unk>"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"patch_size": 0}, "patch_size 0 with image_size 28"),
        ("config.json", {"image_size": "x"}, "cannot be read"),
        ("config.json", {"model_type": "llama"}, "is a 'llama'; accepted"),
        ("model.safetensors", None, "has no weights"),
        ("preprocessor_config.json", None, r"preprocessor_config\.json is missing"),
        ("preprocessor_config.json", {"crop_size": {"height": 9, "width": 9}}, "of 9 pixels"),
    ],
)
def test_a_tower_that_cannot_be_used_is_named_before_the_base_is_read(
    files, file, changes, message
):
    data, length = SimpleNamespace(image_aspect_ratio="pad"), SimpleNamespace(model_max_length=64)
    check_vision(args(files), data, length)
    if changes is None:
        (files / "tower" / file).unlink()
    else:
        edit(files / "tower" / file, **changes)
    with pytest.raises(ValueError, match=message):
        check_vision(args(files), data, length)


def test_a_run_does_not_write_over_what_it_starts_from(files):
    for name in ("config", "base", "tower", "tower/../config"):
        with pytest.raises(ValueError, match="would be overwritten; give another"):
            check_output(str(files / name), args(files))
    with pytest.raises(ValueError, match="--output_dir is empty"):
        check_output(" ", args(files))
    for name in ("config/config.json", "config/config.json/out"):
        with pytest.raises(ValueError, match=r"config\.json is no folder"):
            check_output(str(files / name), args(files))
    check_output(str(files / "new" / "out"), args(files))
    check_output(None, args(files))
    if os.getuid():
        (files / "data").chmod(0o500)
        with pytest.raises(ValueError, match="cannot be written to"):
            check_output(str(files / "data" / "out"), args(files))
