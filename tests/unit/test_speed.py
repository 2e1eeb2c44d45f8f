"""The timing harness on fakes: order, medians, what is timed and what is not; `llava bench`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from llava import timing
from llava.eval import speed
from llava.reduction import ReductionPlan, flops
from llava.timing import Clock, Kernels, Region, Sample, Series


class FakeClock(Clock):
    """Takes the time a run says it took."""

    def measure(self, function, argument):  # noqa: ANN001, ANN201
        ms = function(argument)
        return Sample(ms, 2 * ms)


def test_runs_are_interleaved_and_reversed_every_turn() -> None:
    seen: list[str] = []
    regions = {
        name: Region(lambda ms, name=name: seen.append(name) or ms, lambda: 1.0) for name in "ab"
    }
    series = timing.interleave(regions, FakeClock(), repeats=3, warmup=1)
    assert "".join(seen) == "ba" + "ab" + "ba" + "ab"
    assert all(len(one.samples) == 3 for one in series.values())


def test_set_up_is_not_timed() -> None:
    def slow() -> float:
        time.sleep(0.02)
        return 0.0

    region = Region(lambda _: None, slow)
    series = timing.interleave({"x": region}, Clock(), repeats=3, warmup=0)["x"]
    assert series.wall_ms < 10


def test_cpu_time_does_not_count_waiting() -> None:
    sample = Clock().measure(lambda _: time.sleep(0.05), None)
    assert sample.wall_ms >= 49
    assert sample.ms < 25


def test_median_and_spread() -> None:
    series = Series(tuple(Sample(ms, 10 * ms) for ms in (5.0, 1.0, 100.0, 2.0, 3.0)))
    assert series.ms == 3.0
    assert series.wall_ms == 30.0
    assert series.spread == (2.0, 5.0)


def test_compare_is_a_ratio_beside_its_ideal() -> None:
    none = Series((Sample(10.0, 11.0), Sample(12.0, 13.0), Sample(11.0, 12.0)))
    plan = Series((Sample(5.0, 6.0), Sample(6.0, 7.0), Sample(5.5, 6.5)))
    found = timing.compare(none, plan, ideal=2.5, per=2)
    assert found["speedup"] == pytest.approx(2.0)
    assert found["share_of_ideal"] == pytest.approx(0.8)
    assert (found["none_ms"], found["plan_ms"]) == (5.5, 2.75)
    assert found["speedup_spread"] == pytest.approx([2.0, 2.0])
    assert timing.compare(none, plan, ideal=None)["share_of_ideal"] is None


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (3, -1)])
def test_nothing_to_run_is_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="accepted"):
        timing.interleave({"x": Region(lambda _: None)}, Clock(), repeats, warmup)
    with pytest.raises(ValueError, match="0 regions"):
        timing.interleave({}, Clock(), 1)


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        Clock("meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_launch_nothing_and_products_are_apart(device: str) -> None:
    x = torch.zeros(4, 6, device=device)

    def work() -> torch.Tensor:
        y = x.t().reshape(3, 8)[None].expand(2, 3, 8).transpose(0, 1)
        z = x @ x.t()
        return z + z.exp(), y

    assert timing.count_kernels(work) == Kernels(products=1, other=3)  # copy in reshape, exp, add


def test_kernel_counts_subtract() -> None:
    assert Kernels(5, 9) - Kernels(2, 4) == Kernels(3, 5)


# ----------------------------------------------------------------------------- llava bench
def _bench(*words: str) -> dict:
    return speed.bench(speed.build_parser().parse_args(list(words)))


def test_bench_writes_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    words = ["--preset", "tiny", "--batch", "2", "--repeats", "1", "--device", "cpu"]
    speed.main([*words, "--json", str(path)])
    found = json.loads(path.read_text())
    for key in ("prefill", "decode", "train_step", "end_to_end"):
        part = found[key]
        assert part["none_ms"] > 0
        assert part["plan_ms"] > 0
        assert part["speedup"] == pytest.approx(part["none_ms"] / part["plan_ms"])
        assert part["share_of_ideal"] == pytest.approx(part["speedup"] / part["ideal"])
    assert 0 < found["prefill"]["selection_share"] < 1
    assert found["kept_tokens"] == [64, 32, 16, 8]
    assert found["environment"]["torch"] == torch.__version__
    assert found["tower"]["ms"] > 0
    assert "share" in capsys.readouterr().out


def test_bench_takes_another_plan_and_parts() -> None:
    found = _bench(
        "--preset", "tiny", "--batch", "1", "--repeats", "1", "--device", "cpu",
        "--parts", "prefill", "--reduction", "random:layers=[1],ratios=[0.25]",
    )  # fmt: skip
    assert found["plan"] == "random:layers=[1],ratios=[0.25]"
    assert found["kept_tokens"] == [64, 16]
    assert "decode" not in found
    assert "train_step" not in found


def test_ideals_count_what_ran() -> None:
    """From the batch's own lengths, equal to the closed form of the preset."""
    preset = flops.get_preset("cpu-512")
    work = speed.build_workload(preset, device="cpu")
    plan = ReductionPlan.parse(preset.plan)
    best = speed.ideals(work)
    ideal = best.prefill(ReductionPlan()) / best.prefill(plan)
    assert ideal == flops.report(preset, plan)["ideal_prefill_speedup"]
    assert 1.95 <= ideal <= 2.03
    assert best.end_to_end(ReductionPlan()) > best.prefill(ReductionPlan())
    assert 1 < best.decode(ReductionPlan()) / best.decode(plan) < 1.2
    assert best.train_step(ReductionPlan()) > 3 * best.prefill(ReductionPlan())


def test_ideals_on_a_gpu_are_a_roofline() -> None:
    work = speed.build_workload(flops.get_preset("tiny"), device="cpu", batch=1)
    slow_memory = flops.Machine("x", flops=1e30, bandwidth=1.0)
    best = speed.ideals(work, slow_memory)
    ratio = best.prefill(ReductionPlan()) / best.prefill(ReductionPlan.parse("none"))
    assert ratio == 1.0
    plan = ReductionPlan.parse(flops.get_preset("tiny").plan)
    weights_only = best.prefill(ReductionPlan()) / best.prefill(plan)
    assert weights_only < best.stages(plan)[0].lengths[0] / 32  # weights do not get fewer
    assert weights_only < 1.3


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_cut_launches_few_kernels(backend: str) -> None:
    """Besides its matrix products (projections, scores), at most 80, without and with padding."""
    preset = flops.get_preset("tiny")
    work = speed.build_workload(preset, device="cpu", batch=2, backend=backend)
    plan = ReductionPlan.parse(preset.plan)
    found = speed.kernels_per_cut(work, plan)
    assert found["products"] <= 4
    assert 10 < found["other"] <= 80


def test_time_plans_compares_with_none() -> None:
    work = speed.build_workload(flops.get_preset("tiny"), device="cpu", batch=1)
    plans = {"none": ReductionPlan(), "u": ReductionPlan.parse("uniform:layers=[1],ratios=[0.5]")}
    found = speed.time_plans(work, plans, repeats=1)
    assert found["none"]["ideal"] == 1.0
    assert found["u"]["ideal"] > 1.3
    assert all(part["decode_ms"] > 0 for part in found.values())
    with pytest.raises(ValueError, match="lack 'none'"):
        speed.time_plans(work, {"u": plans["u"]})


def test_timed_runs_leave_the_workload_as_it_was() -> None:
    """A region gives the same logits every time it runs: no run sees what another left."""
    work = speed.build_workload(flops.get_preset("tiny"), device="cpu", batch=2)
    region = speed.prefill_region(work, ReductionPlan.parse(flops.get_preset("tiny").plan))
    first = region.run(region.prepare()).logits
    assert torch.equal(region.run(region.prepare()).logits, first)


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["--preset", "huge"], "cpu-512"),
        (["--threads", "0"], "--threads 0"),
        (["--dtype", "int8"], "bfloat16"),
        (["--preset", "tiny", "--backend", "nosuch"], "nosuch"),
        (["--device", "tpu"], "accepted: cpu, cuda"),
        (["--preset", "tiny", "--parts", "all"], "prefill"),
        (["--preset", "tiny", "--reduction", "uniform:layers=[30],ratios=[0.5]"], "30"),
    ],
)
def test_bench_refuses_bad_flags(
    words: list[str], needle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        speed.main(words)
    assert stop.value.code == 2
    assert needle in capsys.readouterr().err


@pytest.mark.gpu
def test_bench_on_a_gpu() -> None:
    found = _bench("--preset", "tiny", "--repeats", "2", "--device", "cuda")
    assert found["kernels_per_cut"]["cuda_launches"] > 0
