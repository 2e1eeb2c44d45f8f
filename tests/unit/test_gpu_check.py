"""`scripts/gpu_check.sh` without a GPU: its commands, its table, and its rows on the CPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from places import ROOT

for folder in ("gpu", "parity", "smoke"):
    sys.path.insert(0, str(ROOT / "tests" / folder))
import gpu_check  # noqa: E402
import on_device  # noqa: E402
import pyramiddrop_cases  # noqa: E402
import ranks  # noqa: E402
import recorded  # noqa: E402
import rows  # noqa: E402
from gpu_check import Row  # noqa: E402

CPU = torch.device("cpu")
SCRIPT = ["bash", "scripts/gpu_check.sh"]


def python(code: str, name: str = "row", seconds: float = 20, **more) -> Row:
    return Row(name, (sys.executable, "-c", code, "FILE"), seconds, **more)


FOUND = "import json, sys; json.dump({found}, open(sys.argv[1], 'w'))"


# --- the script --------------------------------------------------------------------------------
def test_a_dry_run_prints_commands_that_exist():
    env = {**os.environ, "DRY_RUN": "1", "PY": sys.executable}
    done = subprocess.run(SCRIPT, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    names = []
    for line in done.stdout.splitlines():
        words = [word for word in shlex.split(line) if "=" not in word]
        assert words[0] == sys.executable
        if words[1] == "tests/gpu/rows.py":
            assert words[2] in rows.ROWS
        elif words[1] == "tests/parity/reference_cases.py":
            assert words[2:]
            assert all((ROOT / folder).is_dir() for folder in words[2:])
        elif words[2] == "llava.cli":
            from llava.eval.speed import PARTS, build_parser
            from llava.reduction.flops import get_preset

            assert words[3] == "bench"
            args = build_parser().parse_args(words[4:])
            assert set(args.parts.split(",")) <= set(PARTS)
            get_preset(args.preset)
        else:
            assert words[1:3] == ["-m", "pytest"]
        names.append(words[2])
    assert len(names) == len(gpu_check.plan_of_work())
    assert {"backends", "half", "generate-7b", "train-7b", "zero2", "zero3"} <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2():
    done = subprocess.run(SCRIPT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr


# --- the table ---------------------------------------------------------------------------------
def results(*table: Row, minutes: float = 1.0) -> list[gpu_check.Result]:
    return list(gpu_check.check(table, 1, minutes, lambda result: None))


def test_every_outcome_of_a_row():
    found = results(
        python(FOUND.format(found={"a": 1}) + "; print('fine')"),
        python("raise SystemExit('it broke')"),
        python(FOUND.format(found={"skipped": "too small"})),
        python("", gpus=2),
        python("import time; print('began', flush=True); time.sleep(60)", seconds=2),
    )
    assert [result.status for result in found] == ["pass", "fail", "skip", "skip", "fail"]
    assert found[0].found == {"a": 1}
    assert [result.detail for result in found] == [
        "fine", "it broke", "too small", "needs 2 GPUs, there is 1", "not done after 2 s; began",
    ]  # fmt: skip
    late = results(python("print(1)"), minutes=0.01)
    assert late[0].status == "fail"
    assert "time was used up" in late[0].detail
    assert len({len(gpu_check.line(result).split("  ")[0]) for result in found}) == 1


def test_nothing_of_a_row_survives_its_limit(tmp_path):
    file = tmp_path / "pid"
    child = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(file)!r}, 'w')"
    (late,) = results(python(f"{child}.write(str(p.pid)); p.wait()", seconds=2))
    assert late.status == "fail"
    deadline = time.monotonic() + 5
    stat = Path("/proc") / file.read_text() / "stat"
    while stat.is_file() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.is_file() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("gpus", "code", "status"), [(1, "print(7)", 0), (1, "raise SystemExit(3)", 1), (0, "", 2)]
)
def test_exit_status_and_file(gpus, code, status, monkeypatch, tmp_path, capsys):
    first = python(
        FOUND.format(found={"gpus": gpus, "names": ["NVIDIA X 1"] * gpus}), "environment"
    )
    monkeypatch.setattr(gpu_check, "plan_of_work", lambda: [first, python(code, "second")])
    assert gpu_check.main(["--json", str(tmp_path / "out.json")]) == status
    if status == 2:
        assert "nothing was checked" in capsys.readouterr().err
        return
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["passed"] is (status == 0)
    assert summary["failed"] == ["second"] * status
    assert [row["row"] for row in summary["rows"]] == ["environment", "second"]
    assert gpu_check.where([gpu_check.Result("e", "pass", 0, "", summary["environment"])]) == (
        ROOT / "docs" / "benchmarks" / "gpu_check_NVIDIA-X-1.json"
    )


# --- the rows, on the CPU ----------------------------------------------------------------------
@pytest.fixture
def one_family(monkeypatch):
    """Mistral, whose window fills, and two plans."""
    monkeypatch.setattr(rows, "FAMILIES", {"mistral": rows.FAMILIES["mistral"]})
    monkeypatch.setattr(rows, "FEW", ("pyramiddrop",))
    names = ("none", "pyramiddrop")
    monkeypatch.setattr(rows, "PLANS", {name: rows.PLANS[name] for name in names})


def test_rows_hold_on_the_cpu(one_family):
    assert rows.backends(CPU)["largest difference, varlen"] < rows.EXACT
    assert rows.half(CPU)["sdpa, left"] < rows.HALF
    assert rows.generation(CPU) == {"sequences": 8}
    assert rows.training(CPU)["loss"] < rows.EXACT
    assert rows.device_map(CPU)["difference"] == 0
    assert rows.generate_7b(CPU, "tiny")["none: tokens"] == 16
    found = rows.train_7b(CPU, "tiny")
    assert found["none: loss"] != found["plan: loss"]
    assert "skipped" in rows.flex(CPU)
    assert "skipped" in rows.sync_free(CPU)
    assert rows.environment_row(CPU)["gpus"] == torch.cuda.device_count()


def test_a_window_that_is_off_by_one_is_noticed(one_family, monkeypatch):
    use = rows.use

    def wrong_in_half_precision(model, backend):
        if model.dtype == torch.bfloat16:
            model.config.sliding_window = 22
        return use(model, backend)

    monkeypatch.setattr(rows, "use", wrong_in_half_precision)
    with pytest.raises(AssertionError, match=r"mistral, none, eager, left: off by 0\.[1-9]"):
        rows.half(CPU)


def test_recorded_cases_in_half_precision(monkeypatch):
    others = ("n36_k2_r50_gqa", "g6_s3_gqa2", "n16_k2_r75", "g6_all_gqa2")
    keep = ("b_infer_b1_sdpa", "d4_train_anyres_b1", *others)
    monkeypatch.setattr(recorded, "is_case", lambda folder: folder.name in keep)
    found = rows.cases_half(CPU)
    ran = ("b_infer_b1_sdpa", *others)  # no training step
    assert list(found) == [f"{name}, {backend}" for name in ran for backend in ("eager", "sdpa")]
    assert max(found.values()) < rows.HALF


def test_recorded_cases_hold_through_the_device_wrapper(monkeypatch):
    """The wrapper moves inputs and outputs; what the checks read of it is what the model gave."""
    wrapped = []

    def wrap(model):
        wrapped.append(on_device.OnDevice(model, CPU))
        return wrapped[-1]

    monkeypatch.setattr(pyramiddrop_cases, "on_device", wrap)
    # The trainer's own step is the CPU's alone.
    monkeypatch.setattr(pyramiddrop_cases.training_cases, "through_trainer", lambda case: [])
    for name in ("c_batch3", "d4_train_anyres_b1"):
        outcomes = pyramiddrop_cases.run_case(ROOT / "tests" / "data" / "pyramiddrop" / name)
        assert all(check.count > 10 and not check.failures for _, check in outcomes)
    assert len(wrapped) == 4


def test_what_the_wrapper_moves():
    model = rows.tiny_model()
    call = {**rows.batch(rows.prompts()), "reduction": rows.PLANS["fastv"], "return_trace": True}
    output = model(**call, use_cache=True)
    there = on_device.moved(dict(output.items()), torch.device("meta"))
    assert there["logits"].is_meta
    assert there["sequence"].facts.is_meta
    assert there["trace"][0].keep.is_meta
    assert there["trace"][0].layout == output.trace[0].layout
    assert there["past_key_values"] is output.past_key_values


# --- several ranks -----------------------------------------------------------------------------
def test_the_ranks_train_on_pictures_and_text_in_turn(tmp_path):
    from llava.train.arguments import build_parser

    ranks.write_all(tmp_path)
    ranks.half_text(tmp_path / "data")
    samples = json.loads((tmp_path / "data" / "half.json").read_text())
    assert ["image" in sample for sample in samples] == [True, False] * ranks.STEPS
    for name, stage in (("base", None), ("one", None), ("two", 2), ("two", 3)):
        flags = ranks.train_command(tmp_path, name, CPU, stage)
        build_parser().parse_args(flags)
        if stage:
            assert (ROOT / "scripts" / f"zero{stage}.json").is_file()
