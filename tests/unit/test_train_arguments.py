"""Old flags are translated, missing features refused, nothing waits for a login."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import warnings
from typing import Any

import pytest
import torch
import transformers

from llava.train import arguments, flag_help, legacy_flags
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_args,
    parse_pinpoints,
    usable_reports,
)
from llava.train.flag_checks import RANGES, check_environment, check_launcher

BASE = ["--model_name_or_path", "base", "--data_path", "data.json"]


def parse(tmp_path, *flags: str):
    return parse_args([*BASE, "--output_dir", str(tmp_path / "out"), *flags])


def refused(tmp_path, *flags: str) -> str:
    """What training says of flags, and with the same words an estimate, which prepares nothing."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the words
        parse(tmp_path, *flags)
    with pytest.raises(ValueError, match=f"^{re.escape(str(caught.value))}$"):
        parse_args([*BASE, *flags], prepared=False)
    return str(caught.value)


# Every flag that the originals add to transformers' own: default, another value as text, as parsed.
# LLaVA 1.2 train.py, PyramidDrop pdrop_train.py (the lists), Open-LLaVA-NeXT (the last three).
LEGACY: dict[str, tuple[Any, str, Any]] = {
    "model_name_or_path": ("base", "other", "other"),
    "version": ("v0", "v1", "v1"),
    "freeze_backbone": (False, "True", True),
    "tune_mm_mlp_adapter": (False, "True", True),
    "vision_tower": (None, "clip", "clip"),
    "mm_vision_select_layer": (-1, "-2", -2),
    "pretrain_mm_mlp_adapter": (None, "p.bin", "p.bin"),
    "mm_projector_type": ("linear", "mlp2x_gelu", "mlp2x_gelu"),
    "mm_use_im_start_end": (False, "True", True),
    "mm_use_im_patch_token": (True, "False", False),
    "mm_patch_merge_type": ("flat", "spatial_unpad", "spatial_unpad"),
    "mm_vision_select_feature": ("patch", "cls_patch", "cls_patch"),
    "layer_list": (None, "[8,16]", "[8,16]"),
    "image_token_ratio_list": (None, "[0.5,0.25]", "[0.5,0.25]"),
    "data_path": ("data.json", "other.json", "other.json"),
    "lazy_preprocess": (False, "True", True),
    "is_multimodal": (False, "True", True),
    "image_folder": (None, "images", "images"),
    "image_aspect_ratio": ("square", "pad", "pad"),
    "cache_dir": (None, "cache", "cache"),
    "optim": ("adamw_torch_fused", "adamw_torch", "adamw_torch"),  # LLaVA: adamw_torch, same steps
    "remove_unused_columns": (False, "False", False),
    "freeze_mm_mlp_adapter": (False, "True", True),
    "mpt_attn_impl": ("triton", "torch", "torch"),
    "model_max_length": (512, "2048", 2048),
    "double_quant": (True, "False", False),
    "quant_type": ("nf4", "fp4", "fp4"),
    "bits": (16, "4", 4),
    "lora_enable": (False, "True", True),
    "lora_r": (64, "128", 128),
    "lora_alpha": (16, "256", 256),
    "lora_dropout": (0.05, "0.1", 0.1),
    "lora_weight_path": ("", "w", "w"),
    "lora_bias": ("none", "all", "all"),
    "mm_projector_lr": (None, "2e-5", 2e-5),
    "group_by_modality_length": (False, "True", True),
    "unfreeze_mm_vision_tower": (False, "True", True),
    "mm_vision_tower_lr": (None, "2e-6", 2e-6),
    "lora_qv_proj_only": (False, "True", True),
}
BESIDE = {"bits": ["--lora_enable", "True"], "layer_list": ["--image_token_ratio_list", "[1,1]"],
          "image_token_ratio_list": ["--layer_list", "[1,2]"]}  # fmt: skip


def value(parsed: tuple, name: str) -> Any:
    found = next(vars(part)[name] for part in parsed if name in vars(part))
    return getattr(found, "value", found)


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_flags_keep_name_type_and_default(name: str, tmp_path):
    """LLaVA's flags, given and left out, in both spellings that argparse knows."""
    default, text, wanted = LEGACY[name]
    assert value(parse(tmp_path), name) == default
    beside = BESIDE.get(name, [])
    for words in ([f"--{name}", text], [f"--{name}={text}"]):
        found = value(parse(tmp_path, *beside, *words), name)
        assert (found, type(found)) == (wanted, type(wanted))


def test_help_has_every_flag_of_ours_once_under_its_subject():
    theirs = transformers.TrainingArguments.__dataclass_fields__
    ours = {
        name
        for part in (
            arguments.ModelArguments, arguments.DataArguments, arguments.TrainingArguments
        )
        for name, field in part.__dataclass_fields__.items()
        if name not in theirs or field.metadata.get("help") != theirs[name].metadata.get("help")
    }  # fmt: skip
    shown = [name for names in flag_help.SUBJECTS.values() for name in names.split()]
    listed = [*shown, *flag_help.OLD.split()]
    parser = arguments.build_parser()
    assert len(listed) == len(set(listed))
    assert ours <= set(listed) <= {action.dest for action in parser._actions}
    assert set(flag_help.TEXTS) <= set(shown)
    page = parser.format_help()
    for name in shown:
        assert len(re.findall(rf"^  --{name}\b", page, re.M)) == 1, name
    assert len(page.splitlines()) < 250


def test_help_of_all_documents_every_legacy_flag():
    said = " ".join(arguments.build_parser().format_help(everything=True).split())
    for name in (*LEGACY, *legacy_flags.RENAMED, *legacy_flags.REFUSED):
        assert re.search(rf"--{name}\b", said), name
    for action in arguments.build_parser()._actions:
        if action.dest in LEGACY:
            assert len(action.help or "") > 5, action.dest


def test_old_names_mean_the_new_ones(tmp_path, monkeypatch):
    for old, new in legacy_flags.RENAMED.items():
        text = "3" if "batch_size" in old else "x" if "hub" in old else "True"
        more = ["--eval_data_path", "x"] if "evaluation" in old else []
        text = "epoch" if more else text
        assert value(parse(tmp_path, *more, f"--{old}", text), new) == value(
            parse(tmp_path, *more, f"--{new}={text}"), new
        )
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    parse(tmp_path, "--logging_dir", "boards")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "boards"
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


@pytest.mark.parametrize("name", legacy_flags.REFUSED)
def test_flags_without_their_feature_are_never_passed_over(name: str):
    refused = legacy_flags.REFUSED[name]
    for text in refused.accepted:
        for words in ([f"--{name}", text], [f"--{name.replace('_', '-')}={text}"]):
            assert legacy_flags.translate(["--seed", "1", *words, "--bf16"]) == [
                "--seed", "1", "--bf16",
            ]  # fmt: skip
    with pytest.raises(ValueError, match=f"--{name} -7 is not offered") as caught:
        legacy_flags.translate([f"--{name}", "-7"])
    assert refused.instead in str(caught.value)
    assert name not in {action.dest for action in arguments.build_parser()._actions}


def test_flags_of_the_library_llava_was_written_for_are_all_known():
    """The arguments of transformers 4.37 that its successors dropped, and those dropped since
    that are fields here."""
    fields = set(arguments.TrainingArguments.__dataclass_fields__)
    dropped = [
        "per_gpu_train_batch_size", "per_gpu_eval_batch_size", "use_mps_device",
        "jit_mode_eval", "use_ipex", "fp16_opt_level", "half_precision_backend",
        "tpu_num_cores", "tpu_metrics_debug", "past_index", "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap", "adafactor", "torchdynamo", "ray_scope",
        "use_legacy_prediction_loop", "include_inputs_for_metrics", "fp16_backend",
        "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
        "mp_parameters", "dispatch_batches", "split_batches", "include_tokens_per_second",
        "evaluation_strategy",
    ]  # fmt: skip
    kept = [
        "overwrite_output_dir", "warmup_ratio", "logging_dir",
        "no_cuda", "save_safetensors", "group_by_length", "local_rank",
    ]  # fmt: skip
    known = {*legacy_flags.RENAMED, *legacy_flags.REFUSED}
    assert [name for name in dropped if name not in known] == []
    assert not known & fields
    assert [name for name in kept if name not in fields] == []


def test_flags_without_effect_are_said(tmp_path, caplog):
    words = ["--cache_dir", "x", "--mpt_attn_impl", "torch", "--lora_weight_path", "y",
             "--save_safetensors", "False"]  # fmt: skip
    with caplog.at_level("WARNING", logger="llava"):
        parse(tmp_path, *words)
    for name in arguments.NO_EFFECT:
        assert f"--{name} has no effect" in caplog.text


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
        (["--fsdp", "half_shard"], "fsdp half_shard: unknown; accepted: full_shard"),
        (["--fsdp", "full_shard", "--fsdp_config", '{"version": 1}'], "accepted: version 2"),
        (["--fsdp", "full_shard", "--deepspeed", "{}"], "exclude each other"),
        (["--warmup_ratio", "3"], "warmup_ratio 3.0"),
        (["--lyer_list", "[1]"], "unknown flag.*did you mean --layer_list?"),
        (["--zzzz", "1"], "--help_all lists all flags"),
        (["--reduction", "none", "--layer_list", "[1]"], "exclude each other"),
        (["--image_token_ratio_list", "[1]"], "belong together"),
        (["--init_from_config", "x"], "give one of"),
        (["--eval_strategy", "epoch"], "--eval_data_path"),
        (["--remove_unused_columns", "True"], "remove_unused_columns"),
        (["--label_mode", "guess"], "label_mode"),
        (["--train_sampling_strategy", "batch_rebalance"], "accepted: random, sequential"),
        (["--token_budget", "-1", "--packed", "True"], "token_budget -1; accepted: 0"),
        (["--layer_list", "[1,", "2]"], "a list with spaces needs quotes"),
        (["--bf16", "True", "--fp16", "True"], "exclude each other"),
        (["--reduction", " "], '--reduction is empty; give a plan, or "none"'),
        (["--max_steps", "0"], "max_steps 0; accepted: 1 or more, or -1"),
        (["--num_train_epochs", "0"], "nothing to do"),
        (["--label_smoothing_factor", "0.1"], "plain cross-entropy"),
        (["--save_on_each_node", "True"], "on a disk that they share"),
        (["--prediction_loss_only", "False"], "computes the loss only"),
        (["--image_aspect_ratio", "round"], "image_aspect_ratio round; accepted: square, pad"),
        (["--mm_patch_merge_type", "heap"], "mm_patch_merge_type heap; accepted: flat"),
        (["--optim", "sgdx"], "--optim sgdx; accepted: adamw_torch"),
        (["--report_to", "wandbb"], "--report_to wandbb; accepted: none, all"),
        (["--packed", "True", "--attn_implementation", "flex_attention"], "would mix the samples"),
        (["--token_budget", "64"], "--token_budget needs --packed"),
        (["--probe_samples", "1"], "--probe_samples 1 needs --probe_steps"),
        (["--lora_enable", "True", "--tune_mm_mlp_adapter", "True"], "has no use there"),
        (["--lora_enable", "True", "--bits", "4", "--deepspeed",
          '{"zero_optimization": {"stage": 3}}'], "quantised weights cannot be split by ZeRO-3"),
        (["--fsdp", "full_shard", "--fsdp_config", "[1]"], "there is no such file"),
        (["--mm_use_im_start_end", "True", "--tune_mm_mlp_adapter", "True"],
         "cannot be trained with --tune_mm_mlp_adapter"),
        (
            ["--tune_mm_mlp_adapter", "True", "--mm_tunable_parts",
             "mm_mlp_adapter,mm_language_model"],
            "saves the projector alone; leave it out",
        ),
        (
            ["--tune_mm_mlp_adapter", "True", "--freeze_mm_mlp_adapter", "True"],
            "leave out --freeze_mm_mlp_adapter",
        ),
        (
            ["--tune_mm_mlp_adapter", "True", "--unfreeze_mm_vision_tower", "True"],
            "leave out --unfreeze_mm_vision_tower",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(tmp_path, flags, message):
    assert re.search(message, refused(tmp_path, *flags))


@pytest.mark.parametrize("name", RANGES)
def test_figures_out_of_their_range_are_named(tmp_path, name):
    """What is no number, and one beyond either end that the range has."""
    accepted = RANGES[name]
    field = next(
        f for group in (ModelArguments, DataArguments, TrainingArguments)
        for f in dataclasses.fields(group) if f.name == name
    )  # fmt: skip
    whole = "float" not in str(field.type)
    wrong = [accepted.low - 1] if accepted.ends[0] == "[" else [accepted.low]
    wrong += [accepted.high + 1] if accepted.high < float("inf") else []
    wrong += [] if whole else [float("nan"), float("inf")]
    for value in wrong:
        text = str(int(value)) if whole else str(value)
        assert name in refused(tmp_path, f"--{name}={text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
        ("", "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "is no text"),
        (None, "there is no such file"),
        ('{"zero_optimization": {"stage": 9}}', "give an object with a stage of 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "two"}}', "give an object with a stage"),
        ('{"zero_optimization": [2]}', "give an object with a stage"),
    ],
)
def test_settings_are_json_objects(tmp_path, text, message):
    file = tmp_path / "settings.json"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    names = ["deepspeed"]
    if "stage" not in message:
        names += ["lr_scheduler_kwargs", "accelerator_config", "gradient_checkpointing_kwargs"]
    for name in names:
        assert re.search(f"--{name} .*{message}", refused(tmp_path, f"--{name}", str(file)))


def test_flags_without_their_partner_are_said(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="llava"):
        parse(tmp_path, "--lora_r", "8", "--image_grid_pinpoints", "[[1,1]]")
        parse(tmp_path, "--mm_vision_tower_lr", "1e-5", "--freeze_mm_mlp_adapter", "True")
    said = [record.message for record in caplog.records if "no effect" in record.message]
    assert said == [
        "--lora_r has no effect without --lora_enable True",
        "--image_grid_pinpoints has no effect without --image_aspect_ratio anyres",
        "--mm_vision_tower_lr has no effect without --unfreeze_mm_vision_tower True",
    ]


@pytest.mark.parametrize(
    ("variables", "check", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, check_environment, "RANK is 'x'; accepted: a whole"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, check_environment, "WORLD_SIZE is '-2'"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, check_environment, "RANK=5 does not fit WORLD_SIZE=2"),
        ({"MASTER_PORT": "99999"}, check_environment, "MASTER_PORT is '99999'; accepted: 1 to"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, check_environment, "scripts/slurm/task.sh"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, check_environment, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, check_environment, None),
        ({}, check_environment, None),
        ({}, check_launcher, "--deepspeed needs a launcher; start with: torchrun"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, check_launcher, None),
    ],
)
def test_launchers_variables_are_judged_before_anybody_waits(
    monkeypatch, variables, check, message
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        check()


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
    assert usable_reports(["wandb"]) == []
    present.add("wandb")
    assert usable_reports(["wandb"]) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert usable_reports("wandb") == ["wandb"]
    monkeypatch.setenv("WANDB_MODE", "online")
    assert usable_reports("wandb") == []
    (tmp_path / "netrc").write_text("machine wandb.local login user password k\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert usable_reports("wandb") == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.local:8080")
    assert usable_reports("wandb") == ["wandb"]
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert usable_reports(["wandb", "tensorboard"]) == ["wandb"]
    present.add("tensorboard")
    assert usable_reports("tensorboard,wandb,none") == ["tensorboard", "wandb"]
    with pytest.raises(ValueError, match="--report_to wandbb; accepted: none, all"):
        usable_reports("wandbb")


def test_the_last_of_an_old_and_a_new_name_wins(tmp_path):
    """As it does with one name: flags behind a script's own stand last."""
    old, new = ["--evaluation_strategy", "no"], ["--eval_strategy", "steps"]
    more = ["--eval_data_path", "x", "--report_to", "none"]
    assert parse(tmp_path, *more, *old, *new)[2].eval_strategy.value == "steps"
    assert parse(tmp_path, *more, *new, *old)[2].eval_strategy.value == "no"


def test_pinpoints():
    assert parse_pinpoints(None, 10) == [[10, 20], [20, 10], [20, 20], [30, 10], [10, 30]]
    assert parse_pinpoints("[[336,672]]", 336) == [[336, 672]]
