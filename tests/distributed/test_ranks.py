"""Two gloo ranks give the single process's losses and weights, however the work is split.

A rank's batch is one sample (two or three under a token budget), so that in most steps one rank has
a picture and the other text alone, or another number of them: a rank that skipped a call would hang
the job here. SGD in float32; the single process accumulates the two batches that the ranks share
out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from two_ranks import ROOT, Ranks, command, losses, need_deepspeed, recipe, weights

from llava.train.arguments import parse_args
from llava.train.train import main, make_trainer

CUTS = {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"}
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "cuts": {**CUTS, "loss_mean": "tokens"},  # over all ranks' targets, whose numbers differ
    "cuts, packed": {**CUTS, "packed": True},
    # A text is looked up in the embeddings at the cut: sharded weights alone can notice.
    "words": {"reduction": "simignore:ratio=0.75,text=question+fastv:k=2,r=0.5"},
    "projector": {"tune_mm_mlp_adapter": True, "gradient_checkpointing": True},
    # Steps under the plan with soft tokens, and steps on all tokens with a teacher.
    "two speeds": {
        "reduction": "pyramiddrop:layers=[1,2],ratios=[0.5,0.25]",
        "dual_speed": 0.3,
        "loss_mean": "tokens",
    },
    # One rank has two texts and the other three pictures, in every step.
    "uneven": {**CUTS, "packed": True, "token_budget": 40, "data_path": "uneven.json"},
    "LoRA": {**CUTS, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.0},
    # Its projector is split while the base is read, then overwritten from a file.
    "LLaVA base": {**CUTS, "model_name_or_path": "first"},
}
LEAVES = {"classes": ["StagedLlamaDecoderLayer", "CLIPVisionTower"]}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "scripts/zero2.json"},
    "zero3": {"deepspeed": "scripts/zero3.json"},
    "zero3, leaves": {"deepspeed": "with leaf modules"},
    "fsdp2": {"fsdp": "full_shard"},
}
RUNS = {
    "ddp": ("none", "cuts", "uneven"),
    "zero2": ("none", "cuts", "LoRA"),
    # Split weights: whatever touches a weight outside its unit's call fails.
    "zero3": tuple(RECIPES),
    "zero3, leaves": ("uneven",),
    "fsdp2": tuple(name for name in RECIPES if name != "LLaVA base"),
}
"""What each engine runs: the same code paths twice would tell nothing new."""


def with_leaves(folder: Path) -> Path:
    """zero3.json with whole decoder layers and the whole tower gathered at once."""
    settings = json.loads((ROOT / "scripts" / "zero3.json").read_text())
    settings["zero_optimization"]["leaf_module"] = LEAVES
    (folder / "leaves.json").write_text(json.dumps(settings))
    return folder / "leaves.json"


@pytest.fixture(scope="module")
def single(start: Path) -> Path:
    """The single process's run of each recipe."""
    for name, flags in RECIPES.items():
        out = start / "single" / name
        flags = {**flags, "data_cache_dir": start / "cache"}
        main(command(**recipe(start, flags), output_dir=out, gradient_accumulation_steps=2))
    return start / "single"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine, names in RUNS.items() for name in names]
)
def test_ranks_learn_what_one_process_learns(
    start: Path, single: Path, ranks: Ranks, tmp_path: Path, engine: str, name: str
) -> None:
    flags = {**ENGINES[engine], **RECIPES[name], "data_cache_dir": start / "cache"}
    if "deepspeed" in flags:
        need_deepspeed()
    if engine == "zero3, leaves":
        flags["deepspeed"] = with_leaves(tmp_path)
    out = tmp_path / "out"
    ranks.run(command(**recipe(start, flags), output_dir=out))
    assert "is deprecated" not in "".join(ranks.logs())  # for each collective of each step
    assert losses(out) == pytest.approx(losses(single / name), abs=1e-5)
    found, expected = weights(out), weights(single / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


def test_the_uneven_step_is_two_texts_and_three_pictures(start: Path, tmp_path: Path) -> None:
    flags = {**recipe(start, RECIPES["uneven"]), "data_cache_dir": tmp_path}
    arguments = parse_args(command(**flags, output_dir=tmp_path, gradient_accumulation_steps=2))
    trainer, _ = make_trainer(*arguments)
    trainer.get_train_dataloader()
    for epoch in range(3):
        trainer.train_order.set_epoch(epoch)
        assert sorted(map(sorted, trainer.train_order)) == [[0, 1], [2, 3, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("adam", ["torch", "deepspeed"])
def test_zero3_offload_trains_the_same_recipe(
    start: Path, ranks: Ranks, tmp_path: Path, adam: str
) -> None:
    """One rank, with torch's AdamW on the offloaded shards or DeepSpeed's own on the CPU, against
    plain torch. Learning rates in the log: the command line's schedule."""
    need_deepspeed()
    settings = json.loads((ROOT / "scripts" / "zero3_offload.json").read_text())
    if adam == "torch":
        settings["zero_force_ds_cpu_optimizer"] = False
    elif not os.environ.get("LLAVA_TEST_CPU_ADAM"):
        pytest.skip("DeepSpeed's AdamW takes minutes to build; LLAVA_TEST_CPU_ADAM=1 does so")
    (tmp_path / "zero3_offload.json").write_text(json.dumps(settings))
    flags = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    flags = recipe(start, {**flags, "max_steps": 4, "max_grad_norm": 0.5})
    main(command(**flags, output_dir=tmp_path / "torch"))
    offload = {"deepspeed": tmp_path / "zero3_offload.json"}
    ranks.run(command(**flags, **offload, output_dir=tmp_path / "offload"), ranks=1)
    assert losses(tmp_path / "offload") == pytest.approx(losses(tmp_path / "torch"), abs=1e-4)
    rates = [logged(tmp_path / name, "learning_rate") for name in ("offload", "torch")]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0][1] > rates[0][2] > rates[0][3]


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]
