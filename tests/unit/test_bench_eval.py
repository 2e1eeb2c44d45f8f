"""`llava bench eval`: its figures, and what sharing saves, counted."""

from __future__ import annotations

import json

import pytest
import torch
from places import ROOT
from torch.utils.flop_counter import FlopCounterMode

from llava.digits.build import build_eval
from llava.eval import bench_eval
from llava.eval.benchmarks import load_benchmark
from llava.eval.speed import build_workload
from llava.eval.speed import main as llava_bench
from llava.model.builder import load_pretrained_model
from llava.reduction import ReductionPlan, flops
from llava.utils import quiet, set_seed


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    build_eval(out, seed=5)
    return out / "eval"


def test_picture_by_picture_runs_the_decoder_less(data_root):
    """The same answers from at most a quarter of the decoder's runs, without a plan and with."""
    each = load_benchmark("digits_pope", data_root, 36)
    with quiet():
        tokenizer, model, processor, _ = load_pretrained_model(
            str(ROOT / "checkpoints" / "llava-digits"), device="cpu", dtype=torch.float32
        )
    calls = []
    model.get_model().norm.register_forward_hook(lambda *_: calls.append(1))
    for plan in bench_eval.RUN_PLANS:
        regions, answers = bench_eval.run_regions((tokenizer, model, processor), each, plan)
        count = {}
        for name, region in regions.items():
            calls.clear()
            region.run(region.prepare())
            count[name] = len(calls)
        assert len(answers["one"]) == 36
        assert answers["one"] == answers["together"]
        assert 4 * count["together"] <= count["one"]


def test_the_command_prints_both_ways(data_root, tmp_path, capsys):
    out = tmp_path / "bench.json"
    llava_bench([
        "eval", "--data-root", str(data_root), "--pictures", "1", "--repeats", "1",
        "--model-path", str(ROOT / "checkpoints" / "llava-digits"), "--parts", "run",
        "--json", str(out),
    ])  # fmt: skip
    result = json.loads(out.read_text())
    assert [row["plan"].split(":")[0] for row in result["run"]] == ["none", "pyramiddrop"]
    for row in result["run"]:
        assert row["questions"] == 18
        measured = row["together_per_second"] / row["one_per_second"]
        assert row["speedup"] == pytest.approx(measured)
    assert "prefill" not in result
    assert "one at a time" in capsys.readouterr().out


def test_sharing_computes_what_its_ideal_says():
    """Matrix products of both ways, counted by torch as the layers run; nine questions."""
    set_seed(0)
    preset = flops.get_preset("tiny")
    work = build_workload(preset, batch=1)
    prompts = bench_eval.Prompts(work, preset, 9)
    prompts.tails = [tail[:20] for tail in prompts.tails]  # no padding on either side
    for text, layers in (("none", 6), (preset.plan, 2)):
        plan = ReductionPlan.parse(text)
        assert plan.shared_depth(work.shape.layers) == layers
        done = {}
        for name, region in bench_eval.prefill_regions(prompts, plan).items():
            with FlopCounterMode(display=False) as counter:
                region.run(region.prepare())
            done[name] = counter.get_total_flops()
        ideal = bench_eval.ideal_sharing(prompts, plan)
        assert done["whole"] / done["shared"] == pytest.approx(ideal, rel=0.05)


def test_what_sharing_can_save_at_a_real_size():
    """Nine questions at `cpu-512`: the ideals, from the lengths of the prompts."""
    set_seed(0)
    preset = flops.get_preset("cpu-512")
    prompts = bench_eval.Prompts(build_workload(preset, batch=1), preset, 9)
    none, plan = (ReductionPlan.parse(text) for text in ("none", preset.plan))
    assert bench_eval.ideal_sharing(prompts, none) > 6
    assert 1.6 < bench_eval.ideal_sharing(prompts, plan) < 2
    with pytest.raises(ValueError, match="questions"):
        bench_eval.check_flags(bench_eval.build_parser().parse_args(["--questions", "0"]))


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
