"""``--compare_steps``: the run without the plan leaves no trace, and the arithmetic of its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_train import command, losses, pictures  # noqa: E402
from train_fixtures import write_all  # noqa: E402

from llava.train import step_times, without_plan  # noqa: E402
from llava.train.communication import exposed_seconds, profiled  # noqa: E402
from llava.train.compare import compare, format_line, warm_up_of  # noqa: E402
from llava.train.step_times import StepTime, StepWatch  # noqa: E402
from llava.train.train import main  # noqa: E402
from llava.train.without_plan import run_without_plan  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PLAN = {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_all(folder)
    return folder


def recipe(files: Path, out: Path, **flags: object) -> list[str]:
    return command(
        init_from_config=files / "config", output_dir=out, max_steps=7, use_cpu=True,
        per_device_train_batch_size=2, **{**PLAN, **pictures(files), **flags},
    )  # fmt: skip


def test_a_compared_run_is_the_run_itself(files, tmp_path, monkeypatch, caplog):
    """Same losses, same bytes; between them only a measurement."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    main(recipe(files, tmp_path / "without"))
    with caplog.at_level("INFO", "llava"):
        main(recipe(files, tmp_path / "with", compare_steps=5))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    name = "model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    new = {p.name for p in (tmp_path / "with").iterdir()}
    new -= {p.name for p in (tmp_path / "without").iterdir()}
    assert new == {"compare.json"}
    summary = json.loads((tmp_path / "with" / "train_summary.json").read_text())
    found = summary["compare"]
    assert (found["steps"], found["warm_up"], found["processes"]) == (4, 1, 1)
    assert found["ideal"] > 1
    assert found["measured"] == pytest.approx(
        found["none_step_seconds"] / found["plan_step_seconds"]
    )
    for side in ("none", "plan"):
        parts = found[f"{side}_parts_seconds"]
        assert set(parts) == {"data", "tower", "optimizer", "decoder"}
        assert sum(parts.values()) == pytest.approx(found[f"{side}_step_seconds"])
        assert min(parts.values()) > 0
    assert caplog.messages[-1] == format_line(found)
    # A run that goes on keeps what its first part found, and measures nothing anew.
    flags = {"compare_steps": 5, "resume_from_checkpoint": "True"}
    called: list = []
    monkeypatch.setattr(without_plan, "_run_child", lambda *a: called.append(a) or 0)
    run_without_plan(recipe(files, tmp_path / "with", **flags))
    assert not called


def test_there_may_be_nothing_to_compare(files, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(without_plan, "_run_child", lambda *a: pytest.fail("started a child"))
    none = {"layer_list": None, "image_token_ratio_list": None, "compare_steps": 5}
    with caplog.at_level("INFO", "llava"):
        run_without_plan(recipe(files, tmp_path, **none))
        run_without_plan(recipe(files, tmp_path, **none, reduction="none"))
    assert sum("no plan, there is nothing to compare" in m for m in caplog.messages) == 2
    run_without_plan(recipe(files, tmp_path))
    (tmp_path / "checkpoint-2").mkdir()
    whole = tmp_path / "checkpoint-2" / "trainer_state.json"
    for text, more, goes_on in (
        ("{", {}, False),
        ("{}", {}, True),
        ("{}", {"overwrite_output_dir": True}, False),
        ("{}", {"resume_from_checkpoint": "False"}, False),
        ("{", {"resume_from_checkpoint": "elsewhere"}, True),
    ):
        whole.write_text(text)
        started: list[object] = []
        monkeypatch.setattr(without_plan, "_run_child", lambda *a, to=started: to.append(a) or 0)
        run_without_plan(recipe(files, tmp_path, compare_steps=5, **more))
        assert goes_on != bool(started)
    for steps in (-1, 3):
        with pytest.raises(ValueError, match=f"compare_steps {steps}"):
            run_without_plan(recipe(files, tmp_path, compare_steps=steps))


def test_a_failing_child_ends_those_of_the_other_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    failed = tmp_path / "failed"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    old = time.time() - 3600
    failed.touch()
    os.utime(failed, (old, old))  # of an earlier launch: does not count
    assert without_plan._run_child([sys.executable, "-c", ""], failed) == 0
    assert without_plan._run_child([sys.executable, "-c", "raise SystemExit(3)"], failed) == 3
    start = time.monotonic()
    assert without_plan._run_child(sleep, failed) < 0
    assert time.monotonic() - start < 20


def test_what_is_missing_is_named():
    """10 steps of 1 s without the plan, half the FLOPs with it; tower and optimizer stay."""
    none = [StepTime(seconds=1.0, wait=0.1, tower=0.2, optimizer=0.1, flops=4e9)] * 10
    plan = [StepTime(seconds=0.8, wait=0.1, tower=0.2, optimizer=0.1, flops=2e9)] * 12
    slow = [StepTime(seconds=9.0, flops=4e9)] * 2
    found = compare(slow + none[2:], slow + plan[2:], None, warm_up=2)
    assert found is not None
    assert found["steps"] == 8
    assert found["measured"] == pytest.approx(1.25)
    assert found["ideal"] == pytest.approx(2)
    assert found["missing_seconds"] == pytest.approx(0.3)
    missing = {"data": 0.05, "tower": 0.1, "optimizer": 0.05, "decoder": 0.1}
    assert found["missing_parts_seconds"] == pytest.approx(missing)
    with_ranks = compare(none, plan, 0.25, warm_up=2)
    assert with_ranks is not None
    assert with_ranks["missing_parts_seconds"] == pytest.approx(
        {**missing, "communication": 0.125, "decoder": -0.025}
    )
    assert with_ranks["largest"] == "communication"
    assert format_line(with_ranks) == (
        "against no plan over 8 steps: 1.25x, ideal 2.00x (FLOPs of the language model), "
        "62% of it; missing 300 ms a step, most of it in communication and waiting for other "
        "ranks (125 ms)"
    )
    assert format_line({**found, "missing_seconds": -0.1}).endswith("nothing is missing")
    assert compare(none[:4], plan, None, warm_up=2) is None
    assert [warm_up_of(steps) for steps in (4, 5, 50, 500)] == [1, 1, 10, 10]


def test_communication_counts_where_nothing_hides_it():
    events = [
        ("ncclDevKernel_AllReduce", 0.0, 4.0, True),
        ("gemm", 1.0, 2.0, True),
        ("gemm", 1.5, 3.0, True),
        ("ncclDevKernel_AllGather", 3.5, 5.0, True),
        ("aten::mm", 0.0, 5.0, False),  # the host's view of the same
    ]
    assert exposed_seconds(events) == pytest.approx(3.0)
    host = [("gloo:all_reduce", 0.0, 2.0, False), ("aten::mm", 1.0, 3.0, False)]
    assert exposed_seconds(host) == pytest.approx(1.0)
    assert exposed_seconds([]) == 0

    def event(name: str, start: float, end: float, device: bool, named: bool) -> SimpleNamespace:
        kind = torch.autograd.DeviceType.CUDA if device else torch.autograd.DeviceType.CPU
        span = SimpleNamespace(start=1e6 * start, end=1e6 * end)
        return SimpleNamespace(
            name=name, time_range=span, device_type=kind, is_user_annotation=named
        )

    recorded = [event(*each, named=False) for each in events]
    recorded.append(event("FSDP::pre_forward", 0.0, 5.0, True, named=True))
    recorded.append(event("gloo:all_reduce", 0.0, 5.0, False, named=True))
    assert exposed_seconds(profiled(recorded)) == pytest.approx(3.0)


def test_a_step_is_split_into_its_parts(monkeypatch):
    """The clock moves only where the test says so."""
    now = [5.0]
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])

    class Part(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            now[0] += self.seconds
            return x

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.mm_projector = Part(2.0), Part(1.0)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def get_vision_tower(self):
            return self.tower

        def get_model(self):
            return self

    model = Model()
    watch = StepWatch(model, torch.device("cpu"), limit=2, passes=(1.0, 3.0))
    done: list = []
    watch.when_done = done.append
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        watch.begin()
        watch.waited(0.5)
        now[0] += 0.5
        model.mm_projector(model.tower(torch.zeros(1)))
        now[0] += 10
        optimizer.step()
        now[0] += 7
        watch.left_out(4.0)
    expected = StepTime(seconds=16.5, wait=0.5, tower=5.0)
    assert watch.finish() == [expected, expected]
    assert done == [[expected, expected]]
    assert not model.tower._forward_hooks


@pytest.mark.slow
def test_two_ranks_measure_together(files, tmp_path):
    """FSDP2 under torchrun; the file of the side without is gone, communication has a figure."""
    words = recipe(files, tmp_path / "run", compare_steps=5, packed=True, fsdp="full_shard")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "llava.train.train", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "run" / "train_summary.json").read_text())["compare"]
    assert found["processes"] == 2
    assert found["none_parts_seconds"]["communication"] > 0
    assert found["ideal"] > 1
    assert "against no plan over 4 steps" in done.stderr
    assert not (tmp_path / "run" / ".compare").exists()
