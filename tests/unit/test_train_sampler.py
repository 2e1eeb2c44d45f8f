"""The orders of training: permutations, grouped or filled by tokens, and reproducible."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from torch.utils.data import BatchSampler

from llava.train.callbacks import FollowEpochs
from llava.train.sampler import (
    EpochSeeded,
    LengthGroupedSampler,
    TokenBudgetBatches,
    by_chance,
    by_length,
    fill_batches,
)


def lengths(n: int, seed: int = 0, mixed: bool = True) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 200, (n,), generator=generator).tolist()
    text_only = torch.rand(n, generator=generator) < (0.4 if mixed else 0.0)
    return [-w if text else w for w, text in zip(words, text_only.tolist(), strict=True)]


@pytest.mark.parametrize("n", [5, 16, 37])
@pytest.mark.parametrize("by_modality", [True, False])
def test_every_sample_once(n, by_modality):
    sampler = LengthGroupedSampler(2, 2, lengths(n), group_by_modality=by_modality)
    torch.manual_seed(0)
    assert sorted(sampler) == list(range(n))
    assert len(sampler) == n


def test_megabatches_hold_one_modality():
    values = lengths(64)
    torch.manual_seed(1)
    order = list(LengthGroupedSampler(2, 2, values, group_by_modality=True))
    batches = [order[i : i + 4] for i in range(0, 64, 4)]
    kinds = [{values[i] > 0 for i in batch} for batch in batches]
    assert sum(len(kind) == 2 for kind in kinds) <= 2  # the leftovers at the end
    assert all(len(kind) == 1 for kind in kinds[:-2])


def test_ranks_get_evenly_long_chunks():
    values = lengths(256, mixed=False)

    def spread(order):
        totals = [sum(values[i] for i in order[s : s + 4]) for s in range(0, 256, 4)]
        return max(max(totals[s : s + 8]) - min(totals[s : s + 8]) for s in range(0, 64, 8))

    torch.manual_seed(2)
    assert spread(by_length(values, 4, 8)) < 0.5 * spread(list(range(256)))


@pytest.mark.parametrize("seed", range(40))
def test_ranks_make_equal_steps_and_see_every_sample(seed):
    """Through accelerate's own sharding, of any size, fewer samples than ranks included."""
    rng = np.random.default_rng(seed)
    count, size, ranks, accumulate = (int(rng.integers(1, top)) for top in (30, 4, 6, 4))
    values = lengths(count, seed, mixed=bool(seed % 3))
    order = partial(LengthGroupedSampler, size, ranks * accumulate, values, True)
    sampler = EpochSeeded(seed, count, order)
    sampler.set_epoch(seed % 2)
    batches = BatchSampler(sampler, size, drop_last=False)
    budget = TokenBudgetBatches(np.abs(values), 250, ranks * accumulate, seed)
    for dealt, steps in ((batches, None), (budget, len(budget) // ranks)):
        shares = [list(BatchSamplerShard(dealt, ranks, rank)) for rank in range(ranks)]
        assert {len(share) for share in shares} == {steps or len(shares[0])}
        assert {i for share in shares for batch in share for i in batch} == set(range(count))


def test_a_generator_makes_the_order_its_own():
    sampler = LengthGroupedSampler(
        2, 2, lengths(32), group_by_modality=True, generator=torch.Generator().manual_seed(7)
    )
    other = LengthGroupedSampler(
        2, 2, lengths(32), group_by_modality=True, generator=torch.Generator().manual_seed(7)
    )
    first = list(sampler)
    torch.rand(3)
    assert list(other) == first
    assert list(other) != first  # the next epoch draws anew


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="batch_size 0"):
        LengthGroupedSampler(0, 1, [1])
    with pytest.raises(ValueError, match="length is 0"):
        LengthGroupedSampler(1, 1, [1, 0], group_by_modality=True)


def test_the_plain_order_is_the_trainers_own():
    """transformers hands a RandomSampler to accelerate, which makes it this one."""
    own, same, other = (EpochSeeded(seed, 50, partial(by_chance, 50)) for seed in (5, 5, 6))
    theirs = SeedableRandomSampler(range(50), data_seed=5)
    for epoch in range(3):
        own.set_epoch(epoch)
        assert list(own) == list(theirs)  # it counts epochs by itself
    assert own.order_hash() == same.order_hash() != other.order_hash()


# ------------------------------------------------------------------------------- batches by tokens
def token_lengths(n: int, seed: int = 0) -> np.ndarray:
    """As mix665k has them: 576 visual tokens and a long-tailed text, some text alone."""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(5, 0.8, n), 20, 1400).astype(int)
    return text + 576 * (rng.random(n) < 0.94)


def first_fit_decreasing(lengths: np.ndarray, budget: int) -> int:
    """Batches that the classical packing needs, which sorts by length."""
    rooms = np.full(len(lengths), budget)
    for length in sorted(lengths, reverse=True):
        rooms[np.argmax(rooms >= length)] -= length
    return int((rooms < budget).sum())


@pytest.mark.parametrize("budget", [2048, 8192, 32768])
def test_batches_are_full_and_hold_every_sample_once(budget):
    lengths = token_lengths(4000)
    lengths[[7, 70]] = 0  # cannot be trained on
    batches = TokenBudgetBatches(lengths, budget, group_size=8)
    seen = [i for batch in batches for i in batch]
    assert sorted(seen) == [i for i in range(4000) if i not in (7, 70)]
    assert all(lengths[batch].sum() <= budget for batch in batches)
    assert len(batches) == len(list(batches))
    assert len(batches) % 8 == 0
    assert len(batches) <= 1.04 * first_fit_decreasing(lengths, budget) + 8
    assert batches.fill == pytest.approx(lengths.sum() / (budget * len(batches)))
    assert f"{len(batches)} micro-batches" in batches.summary()
    last = [sum(lengths[i] for i in batch) for batch in batches.groups[-1]]
    assert max(last) - min(last) < lengths.max()  # the last step is shared evenly


def test_batches_are_drawn_not_sorted():
    """Long and short samples mix: the longest are no batch of their own, and neighbours part."""
    lengths = token_lengths(4000)
    batches = fill_batches(lengths, 8192, np.random.default_rng(0))
    means = np.array([lengths[batch].mean() for batch in batches])
    expected = lengths.std() / np.sqrt(8192 / lengths.mean())
    assert means[:-10].std() < 1.5 * expected


def test_batches_depend_on_seed_and_epoch_alone():
    lengths = token_lengths(300)
    one, again = (TokenBudgetBatches(lengths, 4096, 4, seed=1) for _ in range(2))
    other = TokenBudgetBatches(lengths, 4096, 4, seed=2)
    first = list(one)
    assert list(again) == first != list(other)
    assert one.order_hash() == again.order_hash() != other.order_hash()
    one.set_epoch(1)
    assert list(one) != first
    assert sorted(map(sorted, one)) == sorted(map(sorted, first))
    assert one.order_hash() == again.order_hash()


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_rank_gets_its_batches_and_resumes_with_them(ranks):
    """Through accelerate's own wrappers, in a later epoch, and as the Trainer tells it."""
    batches = TokenBudgetBatches(token_lengths(400), 4096, group_size=2 * ranks)
    shares = [BatchSamplerShard(batches, ranks, rank) for rank in range(ranks)]
    assert len({len(list(share)) for share in shares}) == 1
    assert len(shares[0]) == len(batches) // ranks
    dealt = [list(share) for share in shares]
    assert [dealt[i % ranks][i // ranks] for i in range(len(batches))] == list(batches)
    trainer = SimpleNamespace(train_order=batches)
    begin = FollowEpochs(trainer).on_epoch_begin
    begin(None, SimpleNamespace(epoch=1.0), None)
    second = [list(share) for share in shares]
    assert second != dealt
    begin(None, SimpleNamespace(epoch=0.0), None)
    begin(None, SimpleNamespace(epoch=1.4), None)  # resumes there
    assert [list(SkipBatchSampler(share, 3)) for share in shares] == [own[3:] for own in second]


@pytest.mark.parametrize(
    ("lengths", "group_size", "expected"),
    [
        ([9, 9, 9], 2, 4),  # nothing to halve: one is repeated
        ([3, 3, 3, 3], 4, 4),  # two batches, dealt out to four
        ([9], 4, 4),
        ([1, 0, 9, 1], 1, 2),
    ],
)
def test_the_last_step_is_whole(lengths, group_size, expected):
    batches = TokenBudgetBatches(lengths, 10, group_size)
    found = list(batches)
    assert len(found) == len(batches) == expected
    assert {i for batch in found for i in batch} == {i for i, n in enumerate(lengths) if n}


@pytest.mark.parametrize("seed", range(6))
def test_what_cannot_be_dealt_out_evenly_stays_within_the_budget(seed):
    """Longest first, 5 5 3 3 3 would become 8 and 11."""
    batches = TokenBudgetBatches([5, 5, 3, 3, 3], 10, 2, seed)
    lengths = [sum((5, 5, 3, 3, 3)[i] for i in batch) for batch in batches]
    assert max(lengths) <= 10
    assert sum(lengths) == 19
    assert len(lengths) in (2, 4)


def test_a_budget_below_the_longest_sample_names_it():
    with pytest.raises(ValueError, match="--token_budget 10 .*: sample 1 has 11 tokens"):
        TokenBudgetBatches([5, 11], 10, 1)
    with pytest.raises(ValueError, match="not one sample"):
        TokenBudgetBatches([0, 0], 10, 1)
