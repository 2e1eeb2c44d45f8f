"""Two gloo ranks give the single process's losses and weights, however the work is split.

A rank's batch is one sample, so that in most steps one rank has a picture and the other text alone,
or another number of them: a rank that skipped a call would hang the job here. SGD in float32; the
single process accumulates the two batches that the ranks share out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from two_ranks import Ranks, command, losses, need_deepspeed, recipe, weights

from llava.train.train import main

RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "cuts": {
        "layer_list": "[1,2]",
        "image_token_ratio_list": "[0.5,0.25]",
        "loss_mean": "tokens",  # over all ranks' targets, whose numbers differ
    },
    "cuts, packed": {
        "layer_list": "[1,2]",
        "image_token_ratio_list": "[0.5,0.25]",
        "packed": True,
    },
    # A text is looked up in the embeddings at the cut: sharded weights alone can notice.
    "words": {"reduction": "simignore:ratio=0.75,text=question+fastv:k=2,r=0.5"},
    "projector": {"tune_mm_mlp_adapter": True, "gradient_checkpointing": True},
    # Steps under the plan with soft tokens, and steps on all tokens with a teacher.
    "two speeds": {
        "reduction": "pyramiddrop:layers=[1,2],ratios=[0.5,0.25]",
        "dual_speed": 0.3,
        "loss_mean": "tokens",
    },
    # Batches of 1 to 3 samples; a step is the same two of them, on two ranks or accumulated.
    "token budget": {"packed": True, "token_budget": 20},
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "scripts/zero2.json"},
    "zero3": {"deepspeed": "scripts/zero3.json"},
    "fsdp2": {"fsdp": "full_shard"},
}
SPLIT = ("zero3", "fsdp2")
"""Engines that split the weights over the ranks."""
ONLY = {"words": SPLIT, "projector": SPLIT, "two speeds": SPLIT, "token budget": ("ddp",)}
"""Recipes that run on some engines only."""


@pytest.fixture(scope="module")
def single(start: Path) -> Path:
    """The single process's run of each recipe."""
    for name, flags in RECIPES.items():
        out = start / "single" / name
        flags = {**flags, "data_cache_dir": start / "cache"}
        main(command(**recipe(start, flags), output_dir=out, gradient_accumulation_steps=2))
    return start / "single"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_learn_what_one_process_learns(
    start: Path, single: Path, ranks: Ranks, tmp_path: Path, engine: str
) -> None:
    flags = ENGINES[engine]
    if "deepspeed" in flags:
        need_deepspeed()
    for name, more in RECIPES.items():
        if engine not in ONLY.get(name, ENGINES):
            continue
        more = {**more, "data_cache_dir": tmp_path / "cache"}
        ranks.run(command(**recipe(start, {**flags, **more}), output_dir=tmp_path / name))
        assert losses(tmp_path / name) == pytest.approx(losses(single / name), abs=1e-5), name
        found, expected = weights(tmp_path / name), weights(single / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
