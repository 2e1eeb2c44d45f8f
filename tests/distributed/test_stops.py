"""What one of two ranks meets stops both at the same step: a signal, a layer that is not finite, a
folder that it cannot write to. The probe answers on the ranks that it needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from two_ranks import ENDED, ROOT, Ranks, command, losses, need_deepspeed, recipe, weights

from llava.train.safety import EXIT_NOT_FINITE, EXIT_PREEMPTED

CUTS = {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "scripts/zero2.json"},
    "zero3": {"deepspeed": "scripts/zero3.json"},
    "fsdp2": {"fsdp": "full_shard"},
}


def flags_of(start: Path, engine: str) -> dict[str, Any]:
    if "deepspeed" in ENGINES[engine]:
        need_deepspeed()
    return recipe(start, {**ENGINES[engine], **CUTS, "optim": "adamw_torch"})


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_signal_to_one_rank_saves_on_both_and_the_run_goes_on(
    start: Path, ranks: Ranks, tmp_path: Path, engine: str
) -> None:
    """The second half answers a probe, so it must not disturb the curve of the run without one."""
    flags = flags_of(start, engine)
    ranks.run(command(**flags, output_dir=tmp_path / "whole"))
    stopped = command(**flags, output_dir=tmp_path / "run")
    signalled = {"step": 3, "where": "signal", "rank": 1}
    codes = ranks.codes(stopped, kill=signalled, machines=(ROOT, ROOT))  # on two with one disk
    assert codes == [EXIT_PREEMPTED] * 2, ranks.logs()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    ranks.run([*stopped, "--probe_samples", "2", "--probe_steps", "2"])
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "probe_exact" in entry] == [6, 8]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    found, expected = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert [key for key in expected if not found[key].equal(expected[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_what_is_not_finite_on_one_rank_is_named_and_stops_both(
    start: Path, ranks: Ranks, tmp_path: Path, engine: str
) -> None:
    flags = {**flags_of(start, engine), "save_strategy": "steps", "save_steps": 2}
    codes = ranks.codes(
        command(**flags, output_dir=tmp_path), kill={"step": 3, "where": "nan", "rank": 1}
    )
    assert codes == [EXIT_NOT_FINITE] * 2, ranks.logs()
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert (report["step"], report["not_finite"]) == (4, "loss")
    assert report["checkpoints"] == ["checkpoint-2"]
    first, second = report["ranks"]
    assert first["first_bad"] is None
    assert second["first_bad"]["tensor"] == "output of model.layers.1.mlp"
    assert second["samples_alone"] == second["samples"]
    assert len(second["samples"]) == 1
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_gradient_that_is_not_finite_is_named(
    start: Path, ranks: Ranks, tmp_path: Path, engine: str
) -> None:
    """Split weights; the loss is as it should be. FSDP2 knows the ranks' sum alone, and a layer's
    norms stand behind its other weights."""
    flags = flags_of(start, engine)
    codes = ranks.codes(
        command(**flags, output_dir=tmp_path), kill={"step": 1, "where": "gradient", "rank": 1}
    )
    assert codes == [EXIT_NOT_FINITE] * 2, ranks.logs()
    report = json.loads((tmp_path / "nan_report.json").read_text())
    assert (report["step"], report["not_finite"]) == (2, "gradient")
    named = [(found["first_bad"] or {}).get("tensor") for found in report["ranks"]]
    if engine == "fsdp2":
        assert named == ["gradient of model.layers.1.post_attention_layernorm.weight"] * 2
    else:
        assert named == [None, "gradient of model.layers.1.mlp.down_proj.weight"]


@pytest.mark.slow
def test_a_rank_that_cannot_write_ends_both_before_the_first_step(
    start: Path, ranks: Ranks, tmp_path: Path
) -> None:
    kill = {"step": 0, "where": "unwritable", "rank": 1}
    codes = ranks.codes(command(**flags_of(start, "ddp"), output_dir=tmp_path), kill=kill)
    assert codes == [2, 2]
    assert "".join(ranks.logs()).count("(rank 1): PermissionError") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchrun_ends_with_a_rank_that_is_killed(
    start: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """The other one hears SIGTERM from torchrun, which it takes for a wish to save and stop; it
    ends all the same, long before torchrun would kill it. The last test here: its ranks are gone.
    """
    flags = {**flags_of(start, "ddp"), "save_strategy": "steps", "save_steps": 2}
    killed = {"step": 3, "where": "step", "rank": 1}
    code = ranks.launcher_code(command(**flags, output_dir=tmp_path), killed)
    assert code == ENDED, ranks.logs()
    log = (ranks.folder / "launcher.log").read_text()
    assert "closing signal SIGTERM" in log
    assert "forcefully" not in log
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(tmp_path.glob("*.safetensors"))
