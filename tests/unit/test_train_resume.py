"""What a run goes on from, without running one (with ranks: tests/distributed/test_resume.py)."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava.train.resume import checkpoint_to_resume, last_whole
from llava.train.saving import STAGING, publish


def checkpoint(folder: Path, kind: str = "plain", ranks: int = 2) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    if kind == "FSDP":
        (folder / "fsdp_state").mkdir()
    if kind == "DeepSpeed":
        shards = folder / "global_step4"
        shards.mkdir()
        (folder / "latest").write_text(shards.name)
        for rank in range(ranks):
            (shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    return folder


def arguments(folder: Path, **changes: Any) -> SimpleNamespace:
    defaults = {
        "output_dir": str(folder), "resume_from_checkpoint": None, "overwrite_output_dir": False,
        "deepspeed": None, "fsdp": None, "world_size": 2, "process_index": 0,
        "local_process_index": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


def test_the_last_whole_checkpoint_is_taken(tmp_path, caplog):
    assert checkpoint_to_resume(arguments(tmp_path)) is None
    for step in (8, 9, 10):
        checkpoint(tmp_path / f"checkpoint-{step}", "DeepSpeed")
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"cut off')
    (tmp_path / "checkpoint-10" / "latest").write_text("global_step10")
    with caplog.at_level(logging.INFO, "llava"):
        assert last_whole(tmp_path) == tmp_path / "checkpoint-8"
    assert "checkpoint-10 is left out: not a whole checkpoint (no global_step10)" in caplog.text
    assert "checkpoint-9 is left out" in caplog.text
    run = arguments(tmp_path, deepspeed="zero2.json")
    assert checkpoint_to_resume(run) == str(tmp_path / "checkpoint-8")
    run.overwrite_output_dir = True
    assert checkpoint_to_resume(run) is None
    run.resume_from_checkpoint = str(tmp_path / "checkpoint-8")
    assert checkpoint_to_resume(run) == str(tmp_path / "checkpoint-8")
    run.resume_from_checkpoint = "False"
    assert checkpoint_to_resume(run) is None


def test_what_a_kill_left_is_removed_and_named(tmp_path, caplog):
    checkpoint(tmp_path / "checkpoint-2")
    checkpoint(tmp_path / STAGING / "checkpoint-4")
    with caplog.at_level(logging.INFO, "llava"):
        assert checkpoint_to_resume(arguments(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 was not complete when the run ended and is removed" in caplog.text
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (None, {"resume_from_checkpoint": "True"}, "no whole checkpoint in"),
        (None, {"resume_from_checkpoint": "nowhere"}, "nowhere: there is no such folder"),
        ("plain", {"deepspeed": "x"}, "written with neither --deepspeed nor --fsdp, this run has"),
        ("plain", {"fsdp": True}, "go on with what it was written with, or start anew"),
        ("DeepSpeed", {}, "written with --deepspeed, this run has neither"),
        ("DeepSpeed", {"fsdp": True}, "written with --deepspeed, this run has --fsdp"),
        ("FSDP", {"deepspeed": "x"}, "written with --fsdp, this run has --deepspeed"),
    ],
)
def test_what_cannot_be_gone_on_from_is_said(tmp_path, kind, changes, message):
    if kind:
        checkpoint(tmp_path / "checkpoint-4", kind)
    with pytest.raises(ValueError, match=message):
        checkpoint_to_resume(arguments(tmp_path, **changes))


def test_plain_training_reads_what_fsdp_wrote(tmp_path):
    checkpoint(tmp_path / "checkpoint-4", "FSDP")
    assert checkpoint_to_resume(arguments(tmp_path)) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_replaces_one_of_its_name(tmp_path):
    checkpoint(tmp_path / "checkpoint-4", "FSDP")
    publish(checkpoint(tmp_path / STAGING / "checkpoint-4"), tmp_path / "checkpoint-4")
    assert [path.name for path in (tmp_path / "checkpoint-4").iterdir()] == ["trainer_state.json"]
    assert not list((tmp_path / STAGING).iterdir())
