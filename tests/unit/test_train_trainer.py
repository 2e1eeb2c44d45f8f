"""Optimizer groups, the sampler hook, and files that are whole or absent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Adafactor

from llava.train import callbacks
from llava.train.callbacks import ProgressLines
from llava.train.llava_trainer import LLaVATrainer
from llava.train.parts import optimizer_bytes, optimizer_groups, part_of
from llava.train.saving import load_projector_state, projector_state, staging_folder


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(mm_use_im_start_end=False)
        self.embed_tokens = nn.Embedding(3, 2)
        self.mm_projector = nn.Linear(2, 2)
        self.vision_tower = nn.Linear(2, 2)
        self.image_newline = nn.Parameter(torch.ones(2))


def names(model: nn.Module, group: dict) -> set[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(parameter)] for parameter in group["params"]}


def test_groups_have_their_rate_and_decay():
    model = Toy()
    decay = {"embed_tokens.weight", "mm_projector.weight", "vision_tower.weight"}
    groups = optimizer_groups(
        model, decay=decay, weight_decay=0.1, rates={"projector": 1e-5, "tower": 2e-6}
    )
    found = {frozenset(names(model, g)): (g["weight_decay"], g.get("lr")) for g in groups}
    assert found == {
        frozenset({"embed_tokens.weight"}): (0.1, None),
        frozenset({"mm_projector.weight"}): (0.1, 1e-5),
        frozenset({"mm_projector.bias", "image_newline"}): (0.0, 1e-5),
        frozenset({"vision_tower.weight"}): (0.1, 2e-6),
        frozenset({"vision_tower.bias"}): (0.0, 2e-6),
    }


def test_without_rates_every_trained_parameter_is_in_one_of_two_groups():
    model = Toy()
    model.vision_tower.requires_grad_(False)
    groups = optimizer_groups(model, decay={"embed_tokens.weight"}, weight_decay=0.0, rates={})
    assert len(groups) == 2
    assert set().union(*(names(model, group) for group in groups)) == {
        "embed_tokens.weight", "mm_projector.weight", "mm_projector.bias", "image_newline",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adafactor", lambda p: Adafactor(p, lr=1e-3, relative_step=False)),
        ("sgd", torch.optim.SGD),
    ],
)
def test_an_optimizer_keeps_what_is_counted(name, make):
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((4, 6), (5,), (2, 3, 4))]
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values()]
    expected = sum(v.nbytes for v in kept if isinstance(v, torch.Tensor) and v.dim())
    assert optimizer_bytes([weight.shape for weight in weights], name) == expected


def test_eight_bits_are_for_large_tensors_and_an_unknown_optimizer_is_refused():
    assert optimizer_bytes([(64, 64), (64,)], "paged_adamw_8bit") == 2 * 64 * 64 + 2 * 4 * 64
    assert optimizer_bytes([(64, 64), (64,)], "lion_8bit") == 64 * 64 + 4 * 64
    with pytest.raises(ValueError, match="galore"):
        optimizer_bytes([], "galore_adamw")


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        optimizer_groups(Toy().requires_grad_(False), decay=set(), weight_decay=0.0, rates={})


def test_parts_of_a_checkpoint():
    assert part_of("model.mm_projector.0.weight") == "projector"
    assert part_of("model.image_newline") == "projector"
    assert part_of("model.vision_tower.vision_tower.encoder.layers.0.x") == "tower"
    assert part_of("model.layers.0.mlp.up_proj.weight") == "language"
    assert part_of("lm_head.weight") == "language"


def test_projector_state_goes_round(tmp_path):
    model, other = Toy(), Toy()
    torch.save(projector_state(model), tmp_path / "mm_projector.bin")
    load_projector_state(other, tmp_path / "mm_projector.bin")
    assert torch.equal(model.mm_projector.weight, other.mm_projector.weight)
    assert not torch.equal(model.embed_tokens.weight, other.embed_tokens.weight)
    torch.save({"mm_projector.weight": torch.zeros(2, 2)}, tmp_path / "part.bin")
    with pytest.raises(ValueError, match=r"part\.bin"):
        load_projector_state(other, tmp_path / "part.bin")


def test_a_failing_save_leaves_the_old_files(tmp_path):
    (tmp_path / "config.json").write_text("old")

    def fail() -> None:
        with staging_folder(tmp_path) as staging:
            (staging / "config.json").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert (tmp_path / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with staging_folder(tmp_path) as staging:
        (staging / "config.json").write_text("new")
    assert (tmp_path / "config.json").read_text() == "new"


class Lengths:
    """A data set that knows its lengths only."""

    modality_lengths = [1, -2, 3, -4] * 4
    lengths = [1, 2, 3, 4] * 4

    def __len__(self) -> int:
        return 16


@pytest.mark.parametrize("flag", ["group_by_modality_length", "group_by_length"])
def test_grouping_flags_give_an_order_of_seed_and_epoch(flag):
    args = SimpleNamespace(
        train_batch_size=2, world_size=1, gradient_accumulation_steps=2, seed=3, data_seed=None,
        group_by_modality_length=False, group_by_length=False,
    )  # fmt: skip
    setattr(args, flag, True)
    sampler = LLaVATrainer._get_train_sampler(SimpleNamespace(args=args), Lengths())
    first = list(sampler)
    torch.rand(5)
    assert list(sampler) == first
    assert sorted(first) == list(range(16))
    sampler.set_epoch(1)
    assert list(sampler) != first
    if flag == "group_by_modality_length":
        kinds = [
            {Lengths.modality_lengths[i] > 0 for i in first[s : s + 2]} for s in range(0, 8, 2)
        ]
        assert all(len(kind) == 1 for kind in kinds)


def test_sequential_is_the_order_of_the_files():
    args = SimpleNamespace(
        group_by_modality_length=False, group_by_length=False, gradient_accumulation_steps=1,
        train_sampling_strategy="sequential", seed=3, data_seed=None,
    )  # fmt: skip
    trainer = SimpleNamespace(args=args)
    assert list(LLaVATrainer._get_train_sampler(trainer, Lengths())) == list(range(16))
    args.train_sampling_strategy = "random"
    assert list(LLaVATrainer._get_train_sampler(trainer, Lengths())) != list(range(16))


def test_items_of_a_step_leave_out_what_is_never_predicted():
    batch = {"labels": torch.tensor([[5, 6, -100], [-100, 7, 8]])}
    count = LLaVATrainer._get_num_items_in_batch
    two_ranks = SimpleNamespace(gather=lambda number: torch.stack([number, number + 1]))
    tokens = SimpleNamespace(args=SimpleNamespace(loss_mean="tokens"), accelerator=two_ranks)
    means = SimpleNamespace(args=SimpleNamespace(loss_mean="batch"))
    assert count(tokens, [batch, batch], torch.device("cpu")) == 6 + 7
    assert count(means, [batch], torch.device("cpu")) is None


def test_a_progress_line_a_logging_step(monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(callbacks.logger, "info", shown.append)
    lines = ProgressLines()
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=1, world_size=1)
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    lines.on_train_begin(args, state, None)
    state.global_step = 5
    lines.on_log(args, state, None, {"loss": 1.25, "grad_norm": 0.5, "learning_rate": 1e-3})
    lines.on_log(args, state, None, {"train_runtime": 3.0})
    (line,) = shown
    assert line.startswith("step 5/10  loss 1.2500  grad 0.50  lr 1.00e-03")
