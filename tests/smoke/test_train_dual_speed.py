"""DualSpeed training: the draw of the mode, the teacher, the isolator, and whole runs."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model.multimodal_prep import with_soft_tokens
from llava.reduction import ReductionPlan
from llava.sequence import GROUP, ORIGIN, POSITION, TARGET
from llava.train.dual_speed import DualSpeed, SoftTokens, divergence
from llava.train.train import main

sys.path.insert(0, str(Path(__file__).parent))
from test_train import command, losses, pictures  # noqa: E402
from train_fixtures import write_all  # noqa: E402

SLOW_OF_SEED_0 = [3, 7, 18, 23, 24, 31, 37, 41, 52]
PLAN = "pyramiddrop:layers=[1,2],ratios=[0.5,0.25]"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dual")
    write_all(folder)
    return folder


def run(files: Path, out: Path, **flags: object) -> dict[str, torch.Tensor]:
    """A run from random weights; what it wrote."""
    merged = {"init_from_config": files / "config", "reduction": PLAN, **pictures(files), **flags}
    main(command(output_dir=out, **merged))
    return load_file(out / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def dual(share: float, **more) -> DualSpeed:
    return DualSpeed(ReductionPlan.parse(PLAN), share, **more)


def test_the_mode_is_drawn_from_seed_and_step_alone():
    random.seed(1)
    torch.manual_seed(1)
    drawn = [step for step in range(60) if dual(0.1).slow(step)]
    assert drawn == SLOW_OF_SEED_0
    random.seed(2)
    assert [step for step in reversed(range(60)) if dual(0.1).slow(step)] == drawn[::-1]
    assert [step for step in range(60) if dual(0.1, seed=1).slow(step)] != drawn
    assert dual(0.1).facts(20_000)["slow_steps"] == pytest.approx(2000, abs=150)
    assert not any(dual(0.0).slow(step) for step in range(200))
    assert all(dual(1.0).slow(step) for step in range(200))
    # A larger share only adds slow steps.
    assert set(drawn) < {step for step in range(60) if dual(0.3).slow(step)}


def test_the_teacher_gets_no_gradient_and_the_student_the_right_one():
    torch.manual_seed(0)
    student = torch.randn(5, 7, requires_grad=True)
    teacher = torch.randn(5, 7, requires_grad=True)
    p, q = teacher.detach().softmax(-1), student.detach().softmax(-1)
    expected = (p * (p.log() - q.log())).sum()
    for items, rows in ((None, 5), (torch.tensor(20), 20)):
        student.grad = None
        loss = divergence(student, teacher, items)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected / rows)
        torch.testing.assert_close(student.grad, (q - p) / rows)
        assert teacher.grad is None
    assert divergence(student[:0], teacher[:0], None) == 0


def test_a_slow_step_is_taught_by_the_model_under_the_plan():
    """The loss is the student's own plus weight x divergence, and the teacher ran without a graph,
    under the plan and with the isolator."""
    calls = []

    class Out:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits, self.loss = logits, logits.square().mean()

    scale = torch.tensor(2.0, requires_grad=True)

    def forward(reduction, soft_tokens=False):
        calls.append((bool(reduction.cuts), soft_tokens, torch.is_grad_enabled()))
        return Out(scale * torch.eye(3) if reduction.cuts else scale * torch.ones(3, 3))

    slow = dual(1.0, weight=0.5)
    loss = slow(forward, 0).loss
    assert calls == [(True, True, False), (False, False, True)]
    apart = divergence(torch.full((3, 3), 2.0), 2.0 * torch.eye(3), None)
    torch.testing.assert_close(loss.detach(), 4.0 + 0.5 * apart)
    calls.clear()
    dual(0.0)(forward, 0)
    dual(1.0, weight=0.0, isolator=0)(forward, 0)
    assert calls == [(True, True, True), (False, False, True)]


def test_soft_tokens_stand_in_front_of_each_picture(files):
    """Padded and packed, none, one and two pictures; taken out again, nothing else has changed."""
    from llava.train.arguments import parse_args
    from llava.train.train import make_trainer

    merged = {"init_from_config": files / "config", **pictures(files), "output_dir": files / "x"}
    for packed in (False, True):
        trainer, _ = make_trainer(*parse_args(command(**merged, packed=packed)))
        plan = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])["splice"]
        soft = with_soft_tokens(plan, 2)
        assert [b - a for a, b in zip(plan.layout.lengths, soft.layout.lengths, strict=True)] == [
            0, 2, 4,
        ]  # fmt: skip
        assert soft.layout.groups == plan.layout.groups
        assert soft.layout.targets == plan.layout.targets
        places = [(i if not packed else 0, *b) for i, b in enumerate(soft.layout.bounds())]
        before = [(i if not packed else 0, *b) for i, b in enumerate(plan.layout.bounds())]
        for (row, start, length), (old_row, old_start, old_length) in zip(
            places, before, strict=True
        ):
            own = soft.table[row, start : start + length]
            is_soft = own[:, 0] < 0
            assert (own[:, 1 + POSITION] == range(length)).all()
            assert (own[:, 1 + ORIGIN] == range(length)).all()
            assert (own[is_soft, 1 + GROUP] == -1).all()
            assert (own[is_soft, 1 + TARGET] == -100).all()
            follows = own[1:][is_soft[:-1] & ~is_soft[1:], 1 + GROUP]
            assert (follows >= 0).all()
            old = plan.table[old_row, old_start : old_start + old_length]
            kept = [c for c in range(own.shape[1]) if c not in (1 + POSITION, 1 + ORIGIN)]
            assert (own[~is_soft][:, kept] == old[:, kept]).all()


def test_no_slow_step_is_plain_training_and_all_slow_is_training_without_a_plan(files, tmp_path):
    more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "packed": True}
    plain = run(files, tmp_path / "plan", **more)
    fast = {"dual_speed": 0.0, "dual_speed_isolator": 0}
    assert same(run(files, tmp_path / "fast", **fast, **more), plain)
    whole = run(files, tmp_path / "none", reduction="none")
    slow = {"dual_speed": 1.0, "dual_speed_isolator": 0, "dual_speed_weight": 0.0}
    assert same(run(files, tmp_path / "slow", **slow), whole)
    taught = run(files, tmp_path / "taught", **{**slow, "dual_speed_weight": 1.0})
    assert not same(taught, whole)
    isolated = run(files, tmp_path / "isolated", **{**fast, "dual_speed_isolator": 4}, **more)
    assert isolated.keys() == plain.keys()
    assert not same(isolated, plain)


def test_layout_and_micro_batches_change_nothing(files, tmp_path):
    """Fast and slow steps, padded, packed, and in two micro-batches with the mean over a step."""
    flags = {"dual_speed": 0.5, "max_steps": 6, "optim": "sgd", "loss_mean": "tokens", "seed": 3}
    assert 0 < dual(0.5, seed=3).facts(6)["slow_steps"] < 6
    run(files, tmp_path / "padded", **flags)
    curve = losses(tmp_path / "padded")
    run(files, tmp_path / "packed", packed=True, **flags)
    assert losses(tmp_path / "packed") == pytest.approx(curve, abs=1e-5)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run(files, tmp_path / "split", **split, **flags)
    assert losses(tmp_path / "split") == pytest.approx(curve, abs=2e-4)


def test_a_resumed_run_is_the_undisturbed_one_and_the_model_is_meant_for_all_tokens(
    files, tmp_path
):
    flags = {"dual_speed": 0.3, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    assert {dual(0.3, seed=42).slow(step) for step in range(3)} == {True, False}
    out = tmp_path / "run"
    whole, curve = run(files, out, **flags), losses(out)
    assert not [name for name in whole if "isolator" in name]
    assert json.loads((out / "config.json").read_text())["visual_token_reduction"] is None
    facts = json.loads((out / "train_summary.json").read_text())["dual_speed"]
    assert facts["slow_steps"] == dual(0.3, seed=42).facts(6)["slow_steps"] in range(1, 6)
    assert ReductionPlan.from_dict(facts["plan"]) == ReductionPlan.parse(PLAN)
    kept = load_file(out / "checkpoint-3" / "model.safetensors")
    start = SoftTokens(4, 16, seed=42).weight.detach()
    assert kept["model.mode_isolator.weight"].shape == start.shape
    assert not torch.allclose(kept["model.mode_isolator.weight"], start, atol=1e-3)
    shutil.rmtree(out / "checkpoint-6")
    (out / "model.safetensors").unlink()
    assert same(run(files, out, **flags), whole)
    assert losses(out) == curve


def test_with_adapters(files, tmp_path):
    """The isolator is trained beside LoRA's adapters and left out of what a finished run holds."""
    pytest.importorskip("peft")
    main(command(init_from_config=files / "config", output_dir=tmp_path / "base", max_steps=1,
                 **pictures(files)))  # fmt: skip
    base = {"model_name_or_path": tmp_path / "base", "lora_enable": True, "lora_r": 2}
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "dual_speed": 0.0}
    out = tmp_path / "out"
    main(command(reduction=PLAN, output_dir=out, **base, **saving, **pictures(files)))
    held = [
        {name.rsplit("mode_isolator", 1)[-1] for name in torch.load(file) if "isolator" in name}
        for file in (out / "non_lora_trainables.bin",
                     out / "checkpoint-2" / "non_lora_trainables.bin")
    ]  # fmt: skip
    assert held == [set(), {".weight"}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reduction": "none", "dual_speed": 0.1}, "needs a plan"),
        ({"dual_speed": 1.5}, "0 to 1"),
        ({"dual_speed": 0.1, "dual_speed_weight": -1}, "0 or more"),
        ({"dual_speed": 0.1, "tune_mm_mlp_adapter": True}, "projector stage is always fast"),
    ],
)
def test_what_cannot_be_meant_is_refused(files, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(files, tmp_path, **flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
