"""Old flags are translated, missing features refused, nothing waits for a login."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from llava.train import arguments
from llava.train.arguments import ModelArguments, parse_args, parse_pinpoints, usable_reports

BASE = ["--model_name_or_path", "base", "--data_path", "data.json"]


def parse(tmp_path, *flags: str):
    return parse_args([*BASE, "--output_dir", str(tmp_path / "out"), *flags])


def test_legacy_defaults_are_llavas(tmp_path):
    model, data, training = parse(tmp_path)
    assert (model.version, model.mm_vision_select_layer, model.mm_projector_type) == (
        "v0", -1, "linear",
    )  # fmt: skip
    assert (model.mm_use_im_patch_token, model.mm_patch_merge_type) == (True, "flat")
    assert (data.image_aspect_ratio, data.lazy_preprocess) == ("square", False)
    assert (training.model_max_length, training.bits, training.lora_r) == (512, 16, 64)
    assert (training.lora_alpha, training.lora_dropout, training.quant_type) == (16, 0.05, "nf4")
    assert training.loss_mean == "batch"


def test_dropped_flags_are_translated(tmp_path):
    _, _, training = parse(
        tmp_path,
        "--warmup_ratio", "0.03", "--evaluation_strategy", "no", "--overwrite_output_dir", "True",
        "--logging_dir", "x", "--save_safetensors", "True", "--no_cuda", "True",
        "--gradient_checkpointing", "True",
    )  # fmt: skip
    assert training.get_warmup_steps(1000) == 30
    assert training.gradient_checkpointing is True
    assert training.use_cpu is True
    _, _, both = parse(tmp_path, "--warmup_ratio", "0.03", "--warmup_steps", "7")
    assert both.get_warmup_steps(1000) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        parse(tmp_path, "--gradient_checkpointing", "True")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_only_flags_are_turned_off_without_one(tmp_path):
    _, _, training = parse(tmp_path, "--bf16", "True", "--tf32", "True")
    assert (training.bf16, training.tf32, training.use_cpu) == (False, None, True)
    _, _, named = parse(tmp_path, "--bf16", "True", "--tf32", "True", "--use_cpu", "True")
    assert (named.bf16, named.tf32, named.use_cpu) == (True, None, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "8"], "bits 8 trains adapters only"),
        (["--fsdp", "full_shard"], "fsdp full_shard is not available yet"),
        (["--warmup_ratio", "3"], "warmup_ratio 3.0"),
        (["--lyer_list", "[1]"], "unknown flag"),
        (["--reduction", "none", "--layer_list", "[1]"], "exclude each other"),
        (["--image_token_ratio_list", "[1]"], "belong together"),
        (["--init_from_config", "x"], "give one of"),
        (["--eval_strategy", "epoch"], "--eval_data_path"),
        (["--remove_unused_columns", "True"], "remove_unused_columns"),
        (["--label_mode", "guess"], "label_mode"),
    ],
)
def test_what_cannot_be_done_is_named(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *flags)


def test_data_and_base_are_needed(tmp_path):
    with pytest.raises(ValueError, match="--data_path"):
        parse_args(["--model_name_or_path", "base", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="give one of"):
        parse_args(["--data_path", "x.json", "--output_dir", str(tmp_path)])


def test_the_plan_flags_make_a_plan():
    plan = ModelArguments(layer_list="[8,16]", image_token_ratio_list="[0.5,0.25]").plan()
    assert [cut.at for cut in plan.cuts] == [8, 16]
    assert ModelArguments().plan() is None
    assert ModelArguments(reduction="none").plan().cuts == ()


def test_wandb_is_never_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    present = set()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in present else None
    )
    assert usable_reports(["wandb"]) == "none"
    present.add("wandb")
    assert usable_reports(["wandb"]) == "none"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert usable_reports("wandb") == ["wandb"]
    monkeypatch.setenv("WANDB_MODE", "online")
    assert usable_reports("wandb") == "none"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert usable_reports(["wandb", "tensorboard"]) == ["wandb"]


def test_pinpoints():
    assert parse_pinpoints(None, 10) == [[10, 20], [20, 10], [20, 20], [30, 10], [10, 30]]
    assert parse_pinpoints("[[336,672]]", 336) == [[336, 672]]


def test_refused_flags_exist():
    """The list of refusals must not outlive the flags it names."""
    fields = arguments.TrainingArguments.__dataclass_fields__
    assert set(arguments.NOT_AVAILABLE_YET) <= set(fields)
