"""The published figures come out, and the full convention agrees with counting by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.reduction import ReductionPlan, flops
from llava.sequence import Layout

SEVEN_B = flops.get_preset("llava-1.5-7b").shape


def _ladder(count: int, share: float, stages: int = 4) -> list[int]:
    """Visual tokens in each of 32 layers with equal stages and shares share^k, as published."""
    return [int(count * share**stage) for stage in range(stages) for _ in range(32 // stages)]


@pytest.mark.parametrize(
    ("count", "share", "published"),
    [
        (576, 1.0, 3.817),
        (576, 0.5, 1.777),
        (576, 0.4, 1.538),
        (576, 0.6, 2.060),
        (2880, 1.0, 20.825),
        (2880, 0.5, 9.465),
        (2880, 0.4, 8.217),
        (2880, 0.6, 10.980),
        (5184, 1.0, 40.616),
        (5184, 0.5, 18.076),
    ],
)
def test_visual_macs_are_the_papers(count: int, share: float, published: float) -> None:
    tera = flops.visual_macs(SEVEN_B, _ladder(count, share)) / 1e12
    assert tera == pytest.approx(published, abs=5.1e-4)


@pytest.mark.parametrize(
    ("layers", "ratios", "published"),
    [
        ([8, 16, 24], [0.5, 0.25, 0.125], 1.777),
        ([10, 20], [0.5, 0.25], 2.134),
        ([6, 12, 18, 24], [0.5, 0.25, 0.125, 0.0625], 1.391),
        ([2], [0.5], 2.007),
    ],
)
def test_plans_give_the_published_figures(
    layers: list[int], ratios: list[float], published: float
) -> None:
    preset = flops.get_preset("llava-1.5-7b")
    result = flops.cost(preset, ReductionPlan.pyramid(layers, ratios))
    assert result.visual_tmacs == pytest.approx(published, abs=5.1e-4)


@pytest.mark.parametrize(
    ("preset", "published"), [("llava-1.5-7b", 2.007), ("llava-next-7b", 10.554)]
)
def test_fastv_gives_the_published_macs(preset: str, published: float) -> None:
    result = flops.cost(flops.get_preset(preset), ReductionPlan.parse("fastv:k=2,r=0.5"))
    assert result.visual_tmacs == pytest.approx(published, abs=5.1e-4)


@pytest.mark.parametrize(
    ("plan", "text", "percent"),
    [
        ("fastv:k=3,r=0.5", 0, 54.2),
        ("fastv:k=3,r=0.5", 35, 56.7),
        ("fastv:k=3,r=0.5", 64, 58.7),
        ("adaptprune:k=2,keep=0.1", 0, 100 - 84.7),
        ("adaptprune:k=2,keep=0.1", 35, 100 - 79.9),
    ],
)
def test_shares_of_all_tokens_are_the_published_ones(
    plan: str, text: int, percent: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FastV's README: 57 % for K=3, R=50 %; AdaptPrune: about 81 % saved at 90 %."""
    out = tmp_path / "flops.json"
    flops.main(["--reduction", plan, "--text-tokens", str(text), "--json", str(out)])
    result = json.loads(out.read_text())
    share = 100 * result["token_tmacs"] / result["none"]["token_tmacs"]
    assert share == pytest.approx(percent, abs=0.051)
    assert f"{share:.1f}%" in capsys.readouterr().out
    if not text:
        assert result["token_tmacs"] == result["visual_tmacs"]


def test_without_a_cache_every_token_costs_a_prefill() -> None:
    preset = flops.get_preset("llava-1.5-7b")
    cached = flops.cost(preset, ReductionPlan.parse("fastv:k=2,r=0.5"))
    anew = flops.cost(preset, ReductionPlan.parse("fastv:k=2,r=0.5,rerank=True"))
    assert (anew.full_tflops, anew.kv_mib) == (cached.full_tflops, 0)
    assert anew.full_tflops < anew.decode_gflops / 1e3 < 1.01 * anew.full_tflops


@pytest.mark.parametrize(
    ("preset", "full", "ideal", "end_to_end", "kv"),
    [
        ("llava-1.5-7b", 4.31, 1.93, 1.86, 165),
        ("llava-next-7b", 19.03, 2.12, 2.02, 705),
    ],
)
def test_full_convention(
    preset: str, full: float, ideal: float, end_to_end: float, kv: float
) -> None:
    shape = flops.get_preset(preset)
    result = flops.report(shape, ReductionPlan.parse(shape.plan))
    assert result["full_tflops"] == pytest.approx(full, abs=0.006)
    assert result["ideal_prefill_speedup"] == pytest.approx(ideal, abs=0.006)
    assert result["ideal_end_to_end_speedup"] == pytest.approx(end_to_end, abs=0.006)
    assert result["kv_cache_mib_16bit"] == pytest.approx(kv, abs=1)


def test_cpu_512_ideal_lies_where_the_issue_says() -> None:
    preset = flops.get_preset("cpu-512")
    assert (preset.text_before, preset.visual, preset.text_after) == (32, 576, 32)
    plan = ReductionPlan.pyramid([4, 8, 12], [0.5, 0.25, 0.125])
    assert ReductionPlan.parse(preset.plan) == plan
    assert 1.95 <= flops.report(preset, plan)["ideal_prefill_speedup"] <= 2.03


def test_every_preset_plan_fits_and_saves() -> None:
    for name, preset in flops.PRESETS.items():
        result = flops.report(preset, ReductionPlan.parse(preset.plan))
        assert result["ideal_prefill_speedup"] > 1.2, name
        assert result["kept_tokens"][0] == preset.visual
        assert preset.visual == preset.tiles * preset.shape.patches


def test_no_plan_costs_what_none_costs() -> None:
    result = flops.report(flops.get_preset("llava-next-7b"), ReductionPlan())
    assert result["ideal_prefill_speedup"] == 1.0
    assert result["kept_tokens"] == [2880]
    assert result["none"]["full_tflops"] == result["full_tflops"]
    assert result["visual_tmacs"] == pytest.approx(20.825, abs=5e-4)


def test_counts_must_be_one_a_layer() -> None:
    with pytest.raises(ValueError, match="31 counts for 32 layers"):
        flops.visual_macs(SEVEN_B, [576] * 31)


def _small(**changes: int) -> flops.ModelShape:
    shape = flops.ModelShape(layers=3, hidden=16, heads=4, kv_heads=2, head_dim=8, mlp=24, vocab=50)
    return replace(shape, **changes)


def test_prefill_flops_equal_counted_matrix_products() -> None:
    """torch's own counter over the same products, grouped heads included (full attention there)."""
    shape, length = _small(), 10
    x = torch.zeros(length, shape.hidden)
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def layer() -> None:
        q = (x @ torch.zeros(16, wide)).view(length, shape.heads, 8).transpose(0, 1)
        for _ in "kv":
            x @ torch.zeros(16, narrow)
        probability = q @ torch.zeros(shape.heads, 8, length)
        rows = (probability @ torch.zeros(shape.heads, length, 8)).transpose(0, 1)
        rows.reshape(length, wide) @ torch.zeros(wide, 16)
        for _ in "gu":
            x @ torch.zeros(16, 24)
        torch.zeros(length, 24) @ torch.zeros(24, 16)

    with FlopCounterMode(display=False) as counter:
        for _ in range(shape.layers):
            layer()
        torch.zeros(1, 16) @ torch.zeros(16, 50)
    stages = ReductionPlan().schedule(Layout.simple(3, 5, 2), shape.layers)
    causal_away = shape.layers * 4 * wide * (length * length - length * (length + 1) // 2)
    norm = 4 * shape.hidden
    assert flops.prefill_flops(shape, stages) == counter.get_total_flops() - causal_away + norm


def test_batches_add_up_and_lengths_are_the_stages() -> None:
    shape = _small()
    plan = ReductionPlan.parse("uniform:layers=[1],ratios=[0.5]")
    one = plan.schedule(Layout.simple(3, 8, 2), shape.layers)
    four = plan.schedule(Layout.simple(3, 8, 2, batch=4), shape.layers)
    assert flops.prefill_flops(shape, four) == 4 * flops.prefill_flops(shape, one)
    assert flops.mean_visual_macs(shape, four) == flops.mean_visual_macs(shape, one)
    assert [stage.lengths[0] for stage in one] == [13, 9]
    by_hand = 13 * 1 + 9 * 2
    assert flops.kv_bytes(shape, one, width=2) == 2 * 2 * 2 * 8 * by_hand


def test_decode_grows_with_what_each_layer_reached() -> None:
    shape = _small()
    plan = ReductionPlan.parse("uniform:layers=[1],ratios=[0.5]")
    stages = plan.schedule(Layout.simple(3, 8, 2), shape.layers)
    step = flops.decode_flops(shape, stages, 2) - flops.decode_flops(shape, stages, 1)
    assert step == shape.layers * 4 * shape.heads * shape.head_dim
    none = ReductionPlan().schedule(Layout.simple(3, 8, 2), shape.layers)
    gone = flops.decode_flops(shape, none) - flops.decode_flops(shape, stages)
    assert gone == 2 * 4 * 4 * shape.heads * shape.head_dim


def test_training_units() -> None:
    shape = _small()
    stages = ReductionPlan().schedule(Layout.simple(3, 8, 2), shape.layers)
    forward = flops.prefill_flops(shape, stages, logit_rows=4)
    assert flops.train_flops(shape, stages, 4) == 3 * forward
    layers = sum(flops.stage_flops(shape, stage) for stage in stages)
    assert flops.train_flops(shape, stages, 4, checkpointing=True) == 3 * forward + layers


def test_published_training_ceiling() -> None:
    """LLaVA-1.5 with 250 text tokens: 44.6 -> 28.0 TFLOP a sample with checkpointing."""
    layout = Layout.simple(125, 576, 125)
    plan = ReductionPlan.pyramid([8, 16, 24], [0.5, 0.25, 0.125])
    vision = flops.tower_flops(SEVEN_B, 1) + 3 * flops.projector_flops(SEVEN_B, 576)
    totals = []
    for each in (ReductionPlan(), plan):
        stages = each.schedule(layout, 32)
        rows = stages[-1].lengths[0]
        totals.append(vision + flops.train_flops(SEVEN_B, stages, rows, checkpointing=True))
    assert totals[0] / 1e12 == pytest.approx(44.6, abs=0.05)
    assert totals[1] / 1e12 == pytest.approx(28.0, abs=0.05)


def test_tower_and_projector() -> None:
    assert flops.tower_flops(SEVEN_B, 1) / 1e12 == pytest.approx(0.366, abs=5e-4)
    assert flops.projector_flops(SEVEN_B, 576) == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert flops.tower_flops(_small(), 3) == 0


def test_roofline_is_the_larger_of_the_two() -> None:
    shape = _small()
    stages = ReductionPlan().schedule(Layout.simple(3, 8, 2), shape.layers)
    fast_math = flops.Machine("x", float("inf"), 1e9)
    seconds = flops.prefill_seconds(shape, stages, fast_math)
    moved = flops.weight_bytes(shape) + flops.kv_bytes(shape, stages)
    assert seconds == pytest.approx(moved / 1e9)
    fast_memory = flops.Machine("y", 1e9, float("inf"))
    assert flops.prefill_seconds(shape, stages, fast_memory) == pytest.approx(
        flops.prefill_flops(shape, stages) / 1e9
    )
    assert flops.find_machine("NVIDIA H200").bandwidth == 4.8e12
    assert flops.find_machine("unknown") is None


def test_shape_from_configs() -> None:
    config = SimpleNamespace(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32,
        intermediate_size=11008, vocab_size=32000, mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
    )  # fmt: skip
    tower = SimpleNamespace(
        image_size=336, patch_size=14, num_hidden_layers=24, hidden_size=1024,
        intermediate_size=4096,
    )  # fmt: skip
    assert flops.ModelShape.from_config(config, tower) == SEVEN_B
    assert flops.ModelShape.from_config(config).tower is None


def test_projector_kinds() -> None:
    assert flops.projector_widths("linear", 4, 8) == (4, 8)
    assert flops.projector_widths("mlp3x_gelu", 4, 8) == (4, 8, 8, 8)
    assert flops.projector_widths("identity", 4, 8) == ()
    for kind in ("mlp0x_gelu", "mlpx_gelu", "resampler"):
        with pytest.raises(ValueError, match="mlpNx_gelu"):
            flops.projector_widths(kind, 4, 8)


def test_main_writes_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.json"
    words = ["--preset", "llava-next-7b", "--visual-tokens", "5184", "--json", str(path)]
    lists = ["--layer_list", "[8,16,24]", "--image_token_ratio_list", "[0.5,0.25,0.125]"]
    flops.main([*words, *lists])
    found = json.loads(path.read_text())
    assert found["visual_tmacs"] == pytest.approx(18.076, abs=5e-4)
    assert found["none"]["visual_tmacs"] == pytest.approx(40.616, abs=5e-4)
    assert found["kept_tokens"] == [5184, 2592, 1296, 648]
    assert found["full_tflops"] > found["visual_tmacs"]
    assert found["ideal_prefill_speedup"] > 2
    assert "18.08 T" in capsys.readouterr().out
    flops.main([*words, "--reduction", "pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]"])
    assert json.loads(path.read_text()) == found
    flops.main(words)
    assert json.loads(path.read_text())["kept_tokens"] == [5184]


def test_a_shared_prefix_is_paid_once() -> None:
    """Two prompts share one prefix, a third has its own: written out token by token."""
    shape = replace(SEVEN_B, layers=4)
    plan = ReductionPlan.pyramid([2], [0.5])
    heads = plan.schedule(Layout.simple(5, 16, 3, batch=2), 4)
    groups = Layout.simple(5, 16, 3, batch=3).groups
    whole = plan.schedule(Layout((26, 31, 25), groups, (1, 1, 1)), 4)
    assert [stage.lengths for stage in whole] == [(26, 31, 25), (18, 23, 17)]

    def token(place: int) -> int:
        return 2 * shape.layer_weights + 4 * shape.heads * shape.head_dim * (place + 1)

    def run(*tokens: range) -> int:
        return sum(token(place) for part in tokens for place in part)

    first = run(range(24), range(24, 26), range(24, 31)) + run(range(25))
    second = run(range(18), range(23), range(17))
    head = flops.head_flops(shape, 3)
    found = [
        flops.shared_prefill_flops(shape, whole, heads, (0, 0, 1), depth) for depth in (0, 1, 2)
    ]
    unshared = run(range(26), range(31), range(25))
    assert found[2] == 2 * first + 2 * second + head
    assert found[1] == first + unshared + 2 * second + head
    assert found[0] == flops.prefill_flops(shape, whole)
