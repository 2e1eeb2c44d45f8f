"""What a run measures: FLOPs against torch's own counter, sums over ranks and over a resume."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smoke"))
from test_train import command, pictures  # noqa: E402
from tiny import batch, prompts, tiny_model  # noqa: E402
from train_fixtures import write_all  # noqa: E402

from llava.reduction import ReductionPlan, flops  # noqa: E402
from llava.reduction.plan import StageFacts  # noqa: E402
from llava.train.callbacks import _speed  # noqa: E402
from llava.train.telemetry import (  # noqa: E402
    BatchCost,
    Meter,
    Work,
    count_tiles,
    over_ranks,
    peak_flops,
)
from llava.train.train import main  # noqa: E402

CPU = torch.device("cpu")
PLAN = "uniform:layers=[2,4],ratios=[0.5,0.25]"


def sequence_of(model, side="right"):
    """A packed batch with labels, laid out already, whose embeddings take a gradient."""
    made = batch(prompts(), side)
    made["labels"] = made["input_ids"].masked_fill(made["input_ids"] < 3, -100)
    with torch.no_grad():
        sequence = model.build_sequence(**made, kind="packed")
    return replace(sequence, hidden=sequence.hidden.detach().requires_grad_())


@pytest.mark.parametrize("frozen", [False, True])
def test_counted_flops_are_those_of_the_matrix_products(frozen):
    """torch counts every product with a weight, forward and backward; a plan that scores nothing
    adds none of its own."""
    model = tiny_model(backend="varlen").train()
    model.config.visual_token_reduction = ReductionPlan.parse(PLAN).to_dict()
    model.requires_grad_(not frozen)
    sequence = sequence_of(model)
    with FlopCounterMode(display=False) as counter:
        model(sequence=sequence, logits_to_keep="targets").loss.backward()
    ops = counter.get_flop_counts()["Global"]
    measured = sum(count for op, count in ops.items() if str(op) in ("aten.mm", "aten.addmm"))
    cost = BatchCost.of_model(model, checkpointing=False)
    work = cost.work(sequence.layout, tiles=0)
    shape = cost.shape
    stages = cost.plan.schedule(sequence.layout, shape.layers)
    attention = sum(
        3 * (s.stop - s.start) * 4 * shape.heads * shape.head_dim * n * (n + 1) // 2
        for s in stages
        for n in s.lengths
    )
    norm = (2 if frozen else 3) * 4 * shape.hidden * sum(sequence.layout.targets)
    assert work.flops - attention - norm == pytest.approx(measured, rel=1e-9)
    assert ("language" in cost.trained) is not frozen


def test_tokens_before_and_after_the_cuts_are_those_that_ran():
    model = tiny_model().eval()
    sequence = sequence_of(model)
    out = model(sequence=sequence, reduction=PLAN, return_trace=True)
    ran: tuple[StageFacts, ...] = out.stages
    cost = BatchCost(
        flops.ModelShape.from_config(model.config), ReductionPlan.parse(PLAN), frozenset()
    )
    work = cost.work(sequence.layout, tiles=3)
    assert work.samples == 4
    assert work.tokens_in == sequence.hidden.shape[1]
    layers = [sum(stage.lengths) for stage in ran for _ in range(stage.start, stage.stop)]
    assert work.tokens_computed == pytest.approx(sum(layers) / len(layers))
    assert work.tokens_computed < work.tokens_in
    again = replace(cost, checkpointing=True).work(sequence.layout, tiles=3)
    assert work.again_flops == 0
    assert again.flops == work.flops
    head = 3 * flops.head_flops(cost.shape, sum(sequence.layout.targets))
    full = replace(cost, trained=frozenset({"language"}))
    assert 3 * again.again_flops == full.work(sequence.layout, 3).flops - head


def test_the_tower_counts_its_backward_where_it_is_trained():
    shape = flops.get_preset("cpu-512").shape
    tower, projector = flops.tower_flops(shape, 2), flops.projector_flops(shape, 2 * 576)
    for trained, checkpointing, passes in (
        ((), False, (1, 1)),
        (("projector",), True, (1, 3)),
        (("projector", "tower"), False, (3, 3)),
        (("projector", "tower"), True, (4, 3)),
    ):
        cost = BatchCost(shape, ReductionPlan(), frozenset(trained), checkpointing)
        assert cost.tower(2) == passes[0] * tower + passes[1] * projector
    assert count_tiles(torch.zeros(3, 3, 8, 8)) == 3
    assert count_tiles(torch.zeros(2, 5, 3, 8, 8)) == 10  # the same number of tiles in each
    assert count_tiles([torch.zeros(3, 8, 8), torch.zeros(5, 3, 8, 8)]) == 6
    assert count_tiles(None) == 0


def test_ranks_add_their_work_and_share_their_time():
    one = Work(steps=2, samples=4, tokens_in=100, flops=1e9, seconds=2.0, wait_seconds=1.0)
    two = Work(steps=2, samples=6, tokens_in=50, flops=3e9, seconds=2.2, wait_seconds=0.0)
    both = over_ranks([one.values(), two.values()])
    assert both == Work(
        steps=2, samples=10, tokens_in=150, flops=4e9, seconds=2.1, wait_seconds=0.5
    )
    rates = Meter(None, CPU, ranks=2, peak=1e9).rates(both)
    assert rates["samples_per_second"] == pytest.approx(10 / 2.1)
    assert rates["mfu"] == pytest.approx(4e9 / 2.1 / 2e9)
    assert "mfu" not in Meter(None, CPU, ranks=2, peak=None).rates(both)


def test_a_peak_is_known_or_there_is_none(monkeypatch):
    assert peak_flops(CPU, True, None) is None
    assert peak_flops(CPU, False, 1.5) == 1.5e12
    cuda = torch.device("cuda")
    for name, half, peak in (
        ("NVIDIA H100 80GB HBM3", True, 989e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA A100-SXM4-80GB", True, 312e12),
        ("NVIDIA A100-SXM4-80GB", False, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", True, None),
        ("NVIDIA L40", True, 181e12),
        ("NVIDIA GH200 480GB", True, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, half, None) == peak


def test_validation_and_saving_are_no_part_of_a_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("llava.train.telemetry.time.perf_counter", lambda: now[0])
    meter = Meter(None, CPU, ranks=1, peak=None)

    def passes(seconds):
        now[0] += seconds

    passes(50)  # set-up
    for _ in range(2):
        with meter.waiting():
            passes(1)
        meter.count({"input_ids": torch.zeros(3, 5)})
        passes(4)
        with meter.left_out():
            passes(30)
    work = meter.flush()
    assert work == Work(steps=2, samples=6, seconds=10, wait_seconds=2)
    with meter.left_out():  # behind a logging step: no step has begun
        passes(1000)
    assert meter.flush() == Work()
    with meter.waiting():
        passes(3)
    assert meter.flush() == Work(steps=1, seconds=3, wait_seconds=3)


def test_a_line_shows_what_is_known():
    logs = {"samples_per_second": 12.34, "tokens_per_second": 9000.4}
    logs |= {"computed_tokens_per_second": 5000.0, "data_wait_share": 0.01}
    assert _speed(logs) == ["12.3 samples/s", "9000 tokens/s (5000 after cuts)"]
    logs |= {"computed_tokens_per_second": 9000.0, "data_wait_share": 0.5, "mfu": 0.41}
    assert _speed(logs)[1:] == ["9000 tokens/s", "MFU 41%", "waits for data 50%"]


SERIES = {
    *("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "train/mfu"),
    *("train/samples_per_second", "train/samples_seen", "train/total_tflops"),
    *("train/tokens_per_second", "train/computed_tokens_per_second", "train/tflops_per_second"),
    *("train/tower_tflops_per_second", "train/data_wait_share", "train/memory_rss_gib"),
    *("eval/loss", "eval/runtime", "eval/samples_per_second", "eval/steps_per_second"),
    "train/train_loss",
}


def test_tensorboard_has_one_curve_of_a_run_that_was_interrupted(tmp_path, monkeypatch):
    """Read back with tensorboard's own reader: which series, at which steps, finite, once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    write_all(tmp_path)
    out = tmp_path / "out"
    flags = command(
        init_from_config=tmp_path / "config", output_dir=out, max_steps=4, report_to="tensorboard",
        per_device_train_batch_size=2, save_strategy="steps", save_steps=2, peak_tflops=0.001,
        layer_list="[1,2]", image_token_ratio_list="[0.5,0.25]", eval_strategy="steps",
        eval_steps=2, eval_data_path=tmp_path / "data" / "mixed.json", **pictures(tmp_path),
    )  # fmt: skip
    main(flags)
    for path in (out / "checkpoint-4", out / "model.safetensors"):  # as if killed behind step 3
        path.rename(tmp_path / path.name)
    main(flags)
    (folder,) = (out / "runs").iterdir()
    assert len(list(folder.iterdir())) == 2
    found = reader.EventAccumulator(str(folder)).Reload()
    tags = found.Tags()
    assert set(tags["scalars"]) == SERIES
    points = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    for tag, series in points.items():
        steps = [step for step, _ in series]
        assert steps == ([4] if tag == "train/train_loss" else [2, 4] if "eval/" in tag else
                         [1, 2, 3, 4]), tag  # fmt: skip
        assert all(math.isfinite(number) for _, number in series), tag
    summary = json.loads((out / "train_summary.json").read_text())
    assert points["train/samples_seen"][-1] == (4, summary["samples_seen"])
    assert points["train/total_tflops"][-1][1] == pytest.approx(summary["total_tflops"], rel=1e-4)
    text = found.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    facts = json.loads(text.strip("`"))
    assert facts["plan"] == "pyramiddrop:layers=[1,2],ratios=[0.5,0.25]"
    assert facts["data_hash"] == summary["data_hash"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_resumed_run_adds_up_its_parts(tmp_path, packed):
    write_all(tmp_path)
    flags = command(
        init_from_config=tmp_path / "config", output_dir=tmp_path / "out", max_steps=4,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=2, peak_tflops=0.001,
        layer_list="[1,2]", image_token_ratio_list="[0.5,0.25]", packed=packed,
        **pictures(tmp_path),
    )  # fmt: skip
    main(flags)
    first = json.loads((tmp_path / "out" / "train_summary.json").read_text())
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert entry["tokens_per_second"] >= entry["computed_tokens_per_second"] > 0
        assert 0 < entry["mfu"] == pytest.approx(entry["tflops_per_second"] / 0.001)
        assert 0 <= entry["data_wait_share"] <= 1
        assert entry["memory_rss_gib"] > 0
    assert first["samples_seen"] == 8
    assert first["tokens"] > first["computed_tokens"] > 0
    assert first["flags"]["max_steps"] == 4
    assert len(first["data_hash"]) == len(first["order_hash"]) == 64
    for name in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "out" / name
        path.rename(tmp_path / name)
    main(flags)
    again = json.loads((tmp_path / "out" / "train_summary.json").read_text())
    for name in ("samples_seen", "tokens", "computed_tokens", "total_tflops", "data_hash", "plan"):
        assert again[name] == first[name], name
    assert len(again["parts_seconds"]) == 2
    assert again["seconds"] == pytest.approx(sum(again["parts_seconds"]), abs=0.2)
    assert again["process_hours"] == pytest.approx(again["seconds"] / 3600, abs=1e-3)
