"""`llava bench eval`: its figures, and what sharing must save."""

from __future__ import annotations

import json

import pytest
import torch
from places import ROOT

from llava.digits.build import build_eval
from llava.eval import bench_eval
from llava.eval.speed import build_workload
from llava.eval.speed import main as llava_bench
from llava.reduction import flops
from llava.utils import set_seed


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    build_eval(out, seed=5)
    return out / "eval"


def test_picture_by_picture_beats_one_question_at_a_time(data_root, tmp_path, capsys):
    """At least four times the questions a second, without a plan and with PyramidDrop."""
    out = tmp_path / "bench.json"
    llava_bench([
        "eval", "--data-root", str(data_root), "--pictures", "2", "--repeats", "2",
        "--model-path", str(ROOT / "checkpoints" / "llava-digits"), "--parts", "run",
        "--json", str(out),
    ])  # fmt: skip
    result = json.loads(out.read_text())
    assert [row["plan"].split(":")[0] for row in result["run"]] == ["none", "pyramiddrop"]
    for row in result["run"]:
        assert row["questions"] == 36
        assert row["speedup"] >= 4
    assert "prefill" not in result
    assert "one at a time" in capsys.readouterr().out


def test_sharing_makes_the_prefill_faster():
    """Nine questions at `cpu-512` size: 3.5 times without a plan, 1.5 times with PyramidDrop."""
    torch.set_num_threads(1)
    set_seed(0)
    preset = flops.get_preset("cpu-512")
    work = build_workload(preset, batch=1)
    plans = ("none", preset.plan)
    none, plan = bench_eval.measure_prefill(work, preset, plans, 9, 1, warmup=0)
    assert none["speedup"] >= 3.5
    assert plan["speedup"] >= 1.5
    assert (none["shared_layers"], plan["shared_layers"]) == (16, 4)
    # With this many questions, what drops by the question is slower than no plan: it shares less.
    assert plan["shared_ms"] > none["shared_ms"]
    assert plan["whole_ms"] < none["whole_ms"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--parts", "runs"], "'runs'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--dtype", "int8"], "int8"),
        (["--data-root", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_one_line(more, says, capsys):
    with pytest.raises(SystemExit) as stop:
        llava_bench(["eval", *more])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
