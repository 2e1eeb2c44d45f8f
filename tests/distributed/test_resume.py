"""Two ranks, or one of them, are killed at a random step or while they save, or one hangs, and they
go on: bit for bit the undisturbed run, under every engine and in every stage; and with another
number of ranks the same curve. What a run does not train is in no engine's part of a checkpoint,
and can come from its own base alone.

The step is drawn from a seed that a failure prints; ``LLAVA_KILL_SEED=N`` repeats it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from two_ranks import Ranks, command, losses, need_deepspeed, recipe, weights

CUTS = {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"}
LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1, **CUTS}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "scripts/zero2.json", **CUTS},
    "zero3": {"deepspeed": "scripts/zero3.json", **CUTS},
    "fsdp2": {"fsdp": "full_shard", **CUTS},
    "zero3, projector": {"deepspeed": "scripts/zero3.json", "tune_mm_mlp_adapter": True},
    "zero2, LoRA": {"deepspeed": "scripts/zero2.json", **LORA},
}
KILLED_ALONE = {"ddp": 1, "zero3": 0, "fsdp2": 1, "zero2, LoRA": 0}
"""The only rank that is killed; the other has to end by itself, and not well."""
HANGS = ("zero2, LoRA",)
"""Where that rank hangs instead, until the other has ended: DeepSpeed reduces in its own group."""
RUN = {
    "optim": "adamw_torch",  # with a state to lose
    "learning_rate": 1e-3,
    "mm_projector_lr": 5e-4,
    "weight_decay": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_undisturbed(
    start: Path, ranks: Ranks, tmp_path: Path, case: str
) -> None:
    flags = recipe(start, {**CASES[case], **RUN})
    if "deepspeed" in flags:
        need_deepspeed()
    ranks.run(command(**flags, output_dir=tmp_path / "whole"))

    seed = int(os.environ.get("LLAVA_KILL_SEED", time.time_ns() % 10**6))
    draw = random.Random(seed)
    kill = {"step": draw.randint(3, 7), "where": draw.choice(["step", "saving"])}
    kill["rank"] = alone = KILLED_ALONE.get(case)
    wait = {}
    if case in HANGS:
        kill["where"], wait = "hang", {"ddp_timeout": 20}
    sys.stdout.write(f"LLAVA_KILL_SEED={seed}: {kill}\n")
    out = tmp_path / "killed"
    codes = ranks.codes(command(**{**flags, **wait}, output_dir=out), kill=kill)
    assert ("Timed out waiting 20000ms" in "".join(ranks.logs())) == bool(wait)
    assert [code == -signal.SIGKILL for code in codes] == [alone in (None, rank) for rank in (0, 1)]
    assert all(codes), codes
    assert not list(out.glob("*.safetensors")) + list(out.glob("*.bin"))
    last = (kill["step"] - 1) // 2 * 2 if kill["where"] == "saving" else kill["step"] // 2 * 2
    names = [f"checkpoint-{step}" for step in (last - 2, last) if step > 0]
    assert [name for name in checkpoints(out) if name.startswith("checkpoint")] == names
    log = ranks.run(command(**flags, output_dir=out))
    assert f"going on from {out / names[-1]}" in log
    if kill["where"] == "saving" and alone != 1:  # the first rank has had no time to tidy up
        assert f"checkpoint-{last + 2} was not complete" in log
    assert checkpoints(out) == ["checkpoint-6", "checkpoint-8"]
    assert losses(out) == losses(tmp_path / "whole")
    found, expected = weights(out), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    frozen = held_as_frozen(out / "checkpoint-8")
    assert ("model.layers.0.mlp.up_proj" in str(frozen)) == ("," in case)
    assert any("vision_tower" in name for name in frozen)
    if "lora_dropout" not in flags:  # with dropout one rank draws other numbers
        one_rank_goes_on(ranks, tmp_path, {**flags, "gradient_accumulation_steps": 2})
    if "fsdp" in flags:  # each rank has written its own share
        shares = {path.name[:4] for path in out.glob("checkpoint-8/fsdp_state/*.distcp")}
        assert shares == {"__0_", "__1_"}


def held_as_frozen(checkpoint: Path) -> set[str]:
    """Names of the weights that the checkpoint says are frozen; DeepSpeed's part of it holds none
    of them."""
    frozen = set(json.loads((checkpoint / "frozen.json").read_text()))
    assert not frozen & engine_weights(checkpoint)
    return frozen


def engine_weights(checkpoint: Path) -> set[str]:
    """Names of all weights of which DeepSpeed's part of a checkpoint holds something."""
    found: set[str] = set()
    for file in checkpoint.glob("global_step*/*_states.pt"):
        state = torch.load(file, weights_only=False)
        found |= {key for key, value in state.get("module", {}).items() if value.numel()}
        found |= set(state.get("frozen_param_fragments") or ())
        for shapes in state.get("param_shapes") or ():
            found |= set(shapes)
    return found


@pytest.mark.slow
def test_frozen_weights_come_from_the_base(start: Path, ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO-3 with LoRA. A checkpoint as they were written before holds the base, so its run goes on
    over another one; those that it writes then do not, so theirs goes on over its own alone. Two
    ranks, then one, then two."""
    need_deepspeed()
    lora = {**CASES["zero3"], **LORA, **RUN, "lora_dropout": 0.0}
    flags = recipe(start, {**lora, "max_steps": 6, "save_total_limit": 3})
    shutil.copytree(start / "base", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    changed = "model.layers.2.mlp.up_proj.weight"
    tensors[changed][0, 0] += 1e-3
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    other = {**flags, "model_name_or_path": tmp_path / "other"}
    changed = changed.replace(".weight", ".base_layer.weight")  # beside its adapter

    whole, run = tmp_path / "whole", tmp_path / "run"
    before = {"step": 0, "where": "as before"}
    assert ranks.codes(command(**flags, output_dir=whole), kill=before) == [0, 0], ranks.logs()
    assert changed in engine_weights(whole / "checkpoint-2")
    resume = {"resume_from_checkpoint": whole / "checkpoint-2"}
    ranks.run(command(**{**other, **resume}, output_dir=run))
    assert losses(run) == losses(whole)
    found, expected = weights(run), weights(whole)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []

    middle = {"resume_from_checkpoint": run / "checkpoint-4", "gradient_accumulation_steps": 2}
    assert changed in held_as_frozen(run / "checkpoint-4")
    ranks.run(command(**{**flags, **middle}, output_dir=tmp_path / "one rank"), ranks=1)
    assert losses(tmp_path / "one rank") == pytest.approx(losses(whole), abs=1e-5)
    up = {"resume_from_checkpoint": tmp_path / "one rank" / "checkpoint-6", "max_steps": 8}
    last = command(**{**other, **up}, output_dir=tmp_path / "last")
    assert ranks.codes(last) == [2, 2]
    assert "was written by 1 ranks, here are 2" in ranks.logs()[0]
    for log in ranks.logs():
        assert "trained over other frozen weights: 1 of" in log
        assert f"e.g. {changed}" in log


@pytest.mark.slow
def test_machines_that_share_no_disk(start: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Each keeps its part of a checkpoint. The first alone could go on from it, so none does."""
    machines = [tmp_path / name for name in ("first", "second")]
    for machine in machines:
        machine.mkdir()
    flags = recipe(start, {**RUN, "max_steps": 2})
    codes = ranks.codes(command(**flags, output_dir="run"), machines=machines)
    assert codes == [0, 0], ranks.logs()
    assert "this machine does not see rank 0's --output_dir run" in ranks.logs()[1]
    first, second = (machine / "run" / "checkpoint-2" for machine in machines)
    assert {"optimizer.pt", "rng_state_0.pth"} < {file.name for file in first.iterdir()}
    assert [file.name for file in second.iterdir()] == ["rng_state_1.pth"]
    again = command(**{**flags, "max_steps": 4}, output_dir="run")
    assert ranks.codes(again, machines=machines) == [2, 2]
    for log in ranks.logs():
        assert "rank 0 goes on from checkpoint-2, another rank finds None" in log


@pytest.mark.slow
def test_the_space_that_is_asked_for_leaves_the_base_out(
    start: Path, ranks: Ranks, tmp_path: Path
) -> None:
    need_deepspeed()
    config = json.loads((start / "config" / "config.json").read_text())
    shutil.copytree(start / "config", tmp_path / "config")
    config |= {"hidden_size": 256, "intermediate_size": 512}
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    flags = {**RUN, "deepspeed": "scripts/zero2.json", "tune_mm_mlp_adapter": True, "max_steps": 2}
    flags |= {"model_name_or_path": None, "init_from_config": tmp_path / "config"}
    flags = {**recipe(start, RUN), **flags, "pretrain_mm_mlp_adapter": None}
    log = ranks.run(command(**flags, output_dir=tmp_path / "out"), ranks=1)
    asked = re.search(r"1 checkpoint\(s\) of ([\d.]+) GB .*, the model of ([\d.]+) GB", log)
    files = (tmp_path / "out" / "checkpoint-2").rglob("*")
    written = sum(file.stat().st_size for file in files if file.is_file())
    base = 4 * 1_700_000  # in float32
    assert 1e9 * float(asked[1]) == pytest.approx(written, abs=0.03 * base)
    assert 1e9 * float(asked[2]) < 1e9 * float(asked[1]) < base / 4


def one_rank_goes_on(ranks: Ranks, folder: Path, flags: dict[str, Any]) -> None:
    """The last two steps by one rank: ZeRO through a universal checkpoint, FSDP2's files read by
    plain training. The sums of two ranks are then made in another order."""
    middle, out = folder / "whole" / "checkpoint-6", folder / "one rank"
    flags = {**flags, "fsdp": None, "resume_from_checkpoint": middle}
    log = ranks.run(command(**flags, output_dir=out), ranks=1)
    assert ("was written by 2 ranks, here are 1" in log) == bool(flags.get("deepspeed"))
    assert losses(out) == pytest.approx(losses(folder / "whole"), abs=1e-5)
    found, expected = weights(out), weights(folder / "whole")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
