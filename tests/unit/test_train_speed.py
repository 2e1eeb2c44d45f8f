"""`llava bench train`: the same work on all sides, ideals by hand, and the file it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llava.eval import train_speed
from llava.eval.speed import build_workload
from llava.eval.speed import main as llava_bench
from llava.reduction import ReductionPlan, flops
from llava.utils import set_seed

STEPS = ("hf_padded_none", "padded_none", "padded_plan", "packed_none", "packed_plan")
SHAPE = flops.get_preset("tiny").shape


def by_hand(lengths: list[list[int]], rows: int) -> float:
    """FLOPs of a step, forward and twice that backward, from every layer's sample lengths: four
    projections, three of the MLP, the lower triangle of the attention, the head on `rows`."""
    d, m = SHAPE.hidden, SHAPE.mlp
    multiplied = rows * d * SHAPE.vocab
    for layer in lengths:
        for n in layer:
            multiplied += n * (4 * d * d + 3 * d * m) + 2 * d * n * (n + 1) // 2
    return 3 * 2 * multiplied


def test_ideals_are_those_of_the_lengths() -> None:
    """Packed, padded, with and without a cut, against arithmetic over the batch's own lengths."""
    set_seed(0)
    work = build_workload(flops.get_preset("tiny"), batch=1)
    plan = ReductionPlan.parse("pyramiddrop:layers=[2],ratios=[0.5]")
    work.model.train()
    found = train_speed.steps(work, plan)
    assert tuple(found) == STEPS
    text = [count for count, _ in train_speed.SAMPLES]
    visual = [SHAPE.patches * has for _, has in train_speed.SAMPLES]
    whole = [t + v for t, v in zip(text, visual, strict=True)]
    cut = [t + v // 2 for t, v in zip(text, visual, strict=True)]
    rows = sum(t // 2 for t in text)
    wide, wide_cut = [max(whole)] * 4, [max(cut)] * 4
    expected = {
        "hf_padded_none": by_hand([wide] * 6, 4 * max(whole)),
        "padded_none": by_hand([wide] * 6, rows),
        "padded_plan": by_hand([wide] * 2 + [wide_cut] * 4, rows),
        "packed_none": by_hand([whole] * 6, rows),
        "packed_plan": by_hand([whole] * 2 + [cut] * 4, rows),
    }
    for name, step in found.items():
        assert step.ideal == pytest.approx(expected[name], rel=0.02), name


def test_the_command_writes_what_it_measured(tmp_path, capsys) -> None:
    out = tmp_path / "train.json"
    llava_bench(["train", "--preset", "tiny", "--repeats", "2", "--json", str(out)])
    result = json.loads(out.read_text())
    assert {f"{name}_ms" for name in STEPS} <= set(result)
    for short, name in (("packed", "packed_none"), ("hf", "hf_padded_none")):
        measured = result[f"{name}_ms"] / result["packed_plan_ms"]
        assert result[f"ideal_{short}"] > 1
        assert result[f"share_{short}"] == pytest.approx(measured / result[f"ideal_{short}"])
    assert result["losses"]["packed_none"] == pytest.approx(result["losses"]["hf_padded_none"])
    assert result["losses"]["packed_plan"] == pytest.approx(result["losses"]["padded_plan"])
    assert result["losses"]["packed_plan"] != pytest.approx(result["losses"]["packed_none"])
    text = capsys.readouterr().out
    assert "packed with the plan against transformers' model, padded" in text
    assert f"{result['share_packed']:.1%} of it" in text


def test_different_work_is_not_timed() -> None:
    """A step whose loss is not that of the others ends the benchmark."""
    set_seed(0)
    work = build_workload(flops.get_preset("tiny"), batch=1)
    work.model.train()
    found = train_speed.steps(work, ReductionPlan())
    other = replace(found["packed_none"].region, run=lambda _: torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="do not compute the same loss"):
        train_speed.check_losses(
            found | {"packed_none": replace(found["packed_none"], region=other)}
        )
