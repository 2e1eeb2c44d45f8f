"""Batches of one modality, evenly long across ranks (LLaVA's ``group_by_modality_length``).

A batch itself holds long and short samples: a megabatch is dealt out so that every rank gets about
the same total. (transformers' ``group_by_length`` is the one that saves padding.)

Special here: the order equals LLaVA-1.5's LengthGroupedSampler draw by draw when no generator is
given (the global torch generator is used, once per shuffle, in the same order); with a generator
every shuffle comes from it, which makes the order independent of anything else that draws numbers.
Checked against recorded orders: ``python tests/parity/reference_cases.py
tests/data/pyramiddrop``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Indices of a whole epoch, in megabatches of ``world_size * batch_size`` samples, each dealt
    out to `world_size` chunks of about the same total length.

    `world_size` counts ranks times accumulation steps. `lengths` are positive for samples with a
    picture and negative for text-only ones when `group_by_modality` is set; megabatches then hold
    one kind only (but for the last one).
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int],
        group_by_modality: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if batch_size < 1 or world_size < 1:
            raise ValueError(
                f"batch_size {batch_size} and world_size {world_size} must be at least 1"
            )
        if group_by_modality and any(length == 0 for length in lengths):
            raise ValueError("a length is 0: its sign cannot say whether the sample has a picture")
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = list(lengths)
        self.group_by_modality = group_by_modality
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        group = by_modality_and_length if self.group_by_modality else by_length
        return iter(group(self.lengths, self.batch_size, self.world_size, self.generator))


class EpochSeeded(Sampler[int]):
    """An order that depends on (seed, epoch) alone, so that a resumed run continues the same one.

    `order` gives the indices of an epoch from its generator; the trainer calls `set_epoch`.
    """

    def __init__(
        self, seed: int, size: int, order: Callable[[torch.Generator], Iterable[int]]
    ) -> None:
        self.seed = seed
        self.size = size
        self.order = order
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(torch.Generator().manual_seed(self.seed + self.epoch)))


def by_length(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """A permutation of all indices in which the chunks of a megabatch are evenly long."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    return [i for batch in _megabatches(order, lengths, batch_size, world_size) for i in batch]


def by_modality_and_length(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
) -> list[int]:
    """As `by_length`, each megabatch from one modality (the sign of the length)."""
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        return by_length([abs(length) for length in lengths], batch_size, world_size, generator)
    batches: list[list[int]] = []
    leftover: list[int] = []
    for sign in (1, -1):  # pictures first: the order of the draws is part of the recorded order
        chosen = [i for i, length in enumerate(lengths) if length * sign > 0]
        own = [abs(lengths[i]) for i in chosen]
        order = torch.randperm(len(own), generator=generator).tolist()
        mine = [
            [chosen[i] for i in batch] for batch in _megabatches(order, own, batch_size, world_size)
        ]
        batches += mine[:-1]
        leftover += mine[-1]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    ordered = [i for n in shuffled for i in batches[n]]
    return ordered + sorted(leftover)


def _megabatches(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, world_size: int
) -> list[list[int]]:
    """Cut `order` into megabatches; inside each, ranks get chunks of about the same total."""
    size = batch_size * world_size
    megabatches = []
    for start in range(0, len(order), size):
        batch = sorted(order[start : start + size], key=lambda i: lengths[i], reverse=True)
        chunks = _even_chunks(batch, lengths, world_size)
        megabatches.append([i for chunk in chunks for i in chunk])
    return megabatches


def _even_chunks(indices: Sequence[int], lengths: Sequence[int], n_chunks: int) -> list[list[int]]:
    """Split `indices` (longest first) into `n_chunks` of equal count and similar total length.

    Each index goes to the chunk that is shortest so far; if the count is no multiple of
    `n_chunks`, they are dealt out in turn.
    """
    if len(indices) % n_chunks:
        return [list(indices[i::n_chunks]) for i in range(n_chunks)]
    room = len(indices) // n_chunks
    chunks: list[list[int]] = [[] for _ in range(n_chunks)]
    totals: list[float] = [0.0] * n_chunks
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) == room:
            totals[shortest] = float("inf")
    return chunks
