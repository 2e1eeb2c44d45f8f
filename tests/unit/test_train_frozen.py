"""Frozen weights: what is left out of a state dict, and what counts as the same base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llava.train.frozen import FROZEN_FILE, check_frozen, hashes, left_out, may_be_missing
from llava.utils import json_dump


class Quantised(nn.Linear):
    """As bitsandbytes does, with what belongs to a weight under the weight's name."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = torch.ones(1)


def half_frozen() -> nn.Module:
    """Frozen and trained weights, a buffer, and a frozen weight with two names."""
    model = nn.Module()
    model.base, model.adapter, model.norm = Quantised(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
    model.tied = nn.Linear(4, 4, bias=False)
    model.base.requires_grad_(False)
    model.tied.weight = model.base.weight
    return model


def test_a_state_dict_without_frozen_weights_is_strict_with_the_trained_ones() -> None:
    model = half_frozen()
    whole = model.state_dict()
    with left_out(model):
        trained = model.state_dict()
    assert whole.keys() - trained.keys() == {
        "base.weight", "base.weight.absmax", "base.bias", "tied.weight"
    }  # fmt: skip
    assert model.state_dict().keys() == whole.keys()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(trained)
    may_be_missing(model)
    for state in (trained, whole):
        model.load_state_dict(state)
    del trained["adapter.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "adapter.bias". $'):
        model.load_state_dict(trained)


def test_every_bit_of_a_frozen_weight_counts_and_no_trained_one(tmp_path: Path) -> None:
    model = half_frozen()
    json_dump(tmp_path / FROZEN_FILE, hashes(model))
    model.adapter.weight.data.add_(1)
    model.norm.running_mean.add_(1)
    assert check_frozen(model, tmp_path) == hashes(model)
    weight = model.base.weight.data
    weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0))
    with pytest.raises(ValueError, match=r"2 of 3 are not those of this run, e.g. base.weight;"):
        check_frozen(model, tmp_path)


def test_a_checkpoint_from_before_says_nothing_of_its_base(tmp_path: Path, caplog) -> None:
    model = half_frozen()
    with caplog.at_level("WARNING", "llava"):
        assert check_frozen(model, tmp_path) is None  # it holds them itself
        assert not caplog.records
        assert check_frozen(model, tmp_path, universal=True) is None
        assert "cannot be checked" in caplog.text
        caplog.clear()
        check_frozen(model.requires_grad_(True), tmp_path, universal=True)
    assert not caplog.records


def test_a_frozen_weight_may_be_held_in_half_where_its_rounding_is_the_same(tmp_path: Path) -> None:
    model = half_frozen()
    json_dump(tmp_path / FROZEN_FILE, hashes(model))
    model.base.bfloat16()
    check_frozen(model, tmp_path)
    model.base.float()  # rounded by now
    with pytest.raises(ValueError, match="3 of 3"):
        check_frozen(model, tmp_path)
    json_dump(tmp_path / FROZEN_FILE, hashes(model))
    model.base.requires_grad_(True)
    with pytest.raises(ValueError, match="3 of 3"):
        check_frozen(model, tmp_path)
