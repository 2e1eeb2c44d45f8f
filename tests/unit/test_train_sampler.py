"""The length-grouped sampler: a permutation, grouped, and reproducible."""

from __future__ import annotations

import pytest
import torch

from llava.train.sampler import LengthGroupedSampler, by_length


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
