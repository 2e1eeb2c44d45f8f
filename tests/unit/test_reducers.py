"""Methods on dense groups: exactly the budget, in any batch, with padding and protected tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.reduction import AdaptPrune, FastV, PyramidDrop, Random, Uniform, View
from llava.reduction.base import keep_highest
from llava.reduction.baselines import hash_uniform


def view_of(counts, budgets, protected=(), scores=None, reducer=None, seeds=None):
    width = max(counts)
    valid = torch.arange(width) < torch.tensor(counts)[:, None]
    flags = torch.zeros_like(valid)
    for group, token in protected:
        flags[group, token] = True
    origin = torch.arange(width).expand(valid.shape) + 5
    signals = {} if scores is None else {reducer.signals[0]: scores}
    return View(
        valid=valid,
        protected=flags,
        cell=torch.zeros(*valid.shape, 2, dtype=torch.long),
        grid=torch.zeros(valid.shape, dtype=torch.long),
        origin=origin,
        seed=torch.arange(len(counts)) if seeds is None else torch.tensor(seeds),
        count=torch.tensor(counts),
        budget=torch.tensor(budgets),
        max_budget=max(budgets),
        signals=signals,
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_exactly_the_budget_stays_and_padding_never(data):
    counts = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    ratio = data.draw(st.floats(0, 1))
    methods = (PyramidDrop, Random, Uniform, lambda share: FastV(r=share), AdaptPrune)
    for reducer in (method(ratio) for method in methods):
        protected = [(0, counts[0] - 1)]
        budgets = [max(reducer.budget(n, n), int(g == 0)) for g, n in enumerate(counts)]
        scores = torch.rand(len(counts), max(counts)).round(decimals=1)  # with ties
        view = view_of(counts, budgets, protected, scores if reducer.signals else None, reducer)
        for signal in reducer.signals[1:]:  # AdaptPrune's key vectors
            view.signals[signal] = torch.rand(*view.valid.shape, 3).round(decimals=1)
        keep = reducer.select(view).keep
        assert keep.sum(1).tolist() == budgets
        assert not bool((keep & ~view.valid).any())
        assert bool(keep[protected[0]])


def test_ties_go_to_the_earlier_token():
    view = view_of([6], [3])
    keep = keep_highest(torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.0, 0.5]]), view).keep
    assert keep.tolist() == [[True, True, True, False, False, False]]


def test_budget_is_of_the_original_count_and_truncates():
    assert PyramidDrop(0.125).budget(18, 36) == 4
    assert [PyramidDrop(r).budget(16, 16) for r in (0.7, 0.33, 0.1)] == [11, 5, 1]
    assert Random(0.9).budget(3, 36) == 3


def test_random_is_a_property_of_the_sample_alone():
    alone = Random(0.5).select(view_of([20], [10], seeds=[4])).keep[0]
    together = Random(0.5).select(view_of([20, 13, 20], [10, 6, 10], seeds=[9, 1, 4])).keep[2]
    assert torch.equal(alone, together)
    other_sample = Random(0.5).select(view_of([20], [10], seeds=[5])).keep[0]
    other_draw = Random(0.5, seed=1).select(view_of([20], [10], seeds=[4])).keep[0]
    assert not torch.equal(alone, other_sample)
    assert not torch.equal(alone, other_draw)


def test_a_later_random_cut_keeps_a_subset():
    few = Random(0.2).select(view_of([50], [10])).keep
    many = Random(0.6).select(view_of([50], [30])).keep
    assert not bool((few & ~many).any())


def test_hash_is_uniform_and_stays_in_range():
    values = hash_uniform(torch.tensor([3, 2**31 - 1]), torch.arange(4000).expand(2, 4000))
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    counts = torch.histc(values[0], 10, 0, 1)
    assert int(counts.min()) > 320
    assert int(counts.max()) < 480
    correlation = torch.corrcoef(torch.stack([values[0], values[1]]))[0, 1]
    assert abs(float(correlation)) < 0.06


def test_uniform_has_an_even_stride():
    keep = Uniform(0.25).select(view_of([16], [4])).keep[0]
    assert keep.nonzero()[:, 0].diff().tolist() == [4, 4, 4]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, "half", None, True, float("nan")])
@pytest.mark.parametrize("method", [PyramidDrop, Random, Uniform])
def test_bad_shares_are_named(method, ratio):
    with pytest.raises(ValueError, match="kept share"):
        method(ratio)
