"""In which order samples are seen: LLaVA's ``group_by_modality_length``, and batches by tokens.

LLaVA's sampler makes batches of one modality that are evenly long across ranks. A batch itself
holds long and short samples: a megabatch is dealt out so that every rank gets about the same total.
(transformers' ``group_by_length`` is the one that saves padding.) `TokenBudgetBatches` fills packed
batches up to a number of tokens instead of a number of samples.

Special here: given its random draws the LLaVA order equals LLaVA-1.5's LengthGroupedSampler draw by
draw (without a generator the global torch generator is used, once per shuffle, in the same order);
with a generator every shuffle comes from it, which makes the order independent of anything else
that draws numbers. Checked against recorded orders: ``python tests/parity/reference_cases.py
tests/data/pyramiddrop``.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Sampler

from llava.utils import json_sha256

LOOK_AHEAD = 512
"""Samples among which the ones that fill a batch are looked for."""


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
        return iter(self.epoch_order(self.epoch))

    def epoch_order(self, epoch: int) -> list[int]:
        """The indices of an epoch."""
        return list(self.order(torch.Generator().manual_seed(self.seed + epoch)))

    def order_hash(self) -> str:
        """SHA-256 of the first epoch's order."""
        return json_sha256(self.epoch_order(0))


def by_chance(size: int, generator: torch.Generator) -> list[int]:
    """Every index once; given its generator the order of transformers' own Trainer."""
    return torch.randperm(size, generator=generator).tolist()


def in_turn(size: int, generator: torch.Generator) -> range:
    """Every index once, as the files have them."""
    return range(size)


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of as many samples as fit into `budget` tokens, for packed training.

    lengths [N]: tokens of each sample; those of 0 are left out. Batches come in groups of
    `group_size` (ranks times accumulation steps), one group an optimizer step, so every rank gets
    equally many and a step is the same however it is split over ranks. What is in a batch follows
    from the seed, the order of the groups from (seed, epoch). Batch i of a group belongs to rank i
    modulo ranks, which is how accelerate deals batches out; a batch sampler without ``batch_size``
    is one of batches that differ in size there.

    Raises ValueError for a sample longer than the budget (named by `describe`) or no sample at all.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        budget: int,
        group_size: int,
        seed: int = 0,
        describe: Callable[[int], str] = "sample {}".format,
    ) -> None:
        sizes = np.asarray(lengths, dtype=np.int64)
        if not len(sizes) or not sizes.max():
            raise ValueError("not one sample can be trained on")
        if sizes.max() > budget:
            longest = int(sizes.argmax())
            raise ValueError(
                f"--token_budget {budget} is below the longest sample: {describe(longest)} has "
                f"{sizes[longest]} tokens"
            )
        tokens = sizes.tolist()
        batches = fill_batches(tokens, budget, np.random.default_rng(abs(seed)))
        complete_groups(batches, tokens, budget, group_size)
        self.budget = budget
        self.groups = [batches[i : i + group_size] for i in range(0, len(batches), group_size)]
        self.totals = [int(sizes[batch].sum()) for batch in batches]
        self.sampler = EpochSeeded(seed, len(self.groups), partial(by_chance, len(self.groups)))

    def __len__(self) -> int:
        return len(self.totals)

    def __iter__(self) -> Iterator[list[int]]:
        for group in self.sampler:
            yield from self.groups[group]

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    @property
    def fill(self) -> float:
        """Tokens of an epoch over the room that its batches have."""
        return sum(self.totals) / (self.budget * len(self.totals))

    def order_hash(self) -> str:
        """SHA-256 of the first epoch's batches."""
        return json_sha256([self.groups[group] for group in self.sampler.epoch_order(0)])

    def summary(self) -> str:
        """A line about how full the batches are."""
        counts = [len(batch) for group in self.groups for batch in group]
        return (
            f"token budget {self.budget}: {len(self)} micro-batches of {min(counts)} to "
            f"{max(counts)} samples, {100 * self.fill:.1f} % full (the emptiest "
            f"{100 * min(self.totals) / self.budget:.1f} %)"
        )


def fill_batches(
    lengths: Sequence[int], budget: int, rng: np.random.Generator, look_ahead: int = LOOK_AHEAD
) -> list[list[int]]:
    """Every index of a length above 0 once, in batches of at most `budget`.

    Samples are taken in a random order until one does not fit; the room that is left then goes to
    the longest ones that do, among the next `look_ahead` of the order.
    """
    order = [int(i) for i in rng.permutation(len(lengths)) if lengths[i] > 0]
    incoming = iter(order)
    waiting: deque[int] = deque()
    by_size: list[tuple[int, int]] = []  # (length, index) of those waiting, sorted
    batches: list[list[int]] = []

    def refill() -> None:
        while len(by_size) < look_ahead and (index := next(incoming, None)) is not None:
            waiting.append(index)
            bisect.insort(by_size, (lengths[index], index))

    def take(batch: list[int], place: int) -> int:
        """Move the sample at a place of `by_size` into the batch; its length."""
        length, index = by_size.pop(place)
        taken.add(index)
        batch.append(index)
        return length

    taken: set[int] = set()
    refill()
    while by_size:
        batch: list[int] = []
        room = budget
        while waiting:
            if waiting[0] in taken:
                taken.discard(waiting.popleft())
                continue
            head = (lengths[waiting[0]], waiting[0])
            if head[0] > room:
                break
            room -= take(batch, bisect.bisect_left(by_size, head))
            refill()
        while (place := bisect.bisect_right(by_size, (room, len(lengths))) - 1) >= 0:
            room -= take(batch, place)
            refill()
        batches.append(batch)
    return batches


def complete_groups(
    batches: list[list[int]], lengths: Sequence[int], budget: int, group_size: int
) -> None:
    """Bring the number of batches to a multiple of `group_size`, in place.

    The samples of the last group are dealt out evenly, to the batch that is shortest so far. Where
    that does not do (one would be too long, or stay empty), batches are halved, those of the last
    group first; where none can be, batches from the front are repeated.
    """
    start = len(batches) - (len(batches) % group_size or group_size)
    left = sorted((i for batch in batches[start:] for i in batch), key=lambda i: -lengths[i])
    even: list[list[int]] = [[] for _ in range(group_size)]
    totals = [0] * group_size
    for index in left:
        shortest = totals.index(min(totals))
        even[shortest].append(index)
        totals[shortest] += lengths[index]
    if min(totals) > 0 and max(totals) <= budget:
        batches[start:] = even
    repeated = 0
    while len(batches) % group_size:
        order = [(len(batch) > 1, i >= start, len(batch), i) for i, batch in enumerate(batches)]
        fullest = max(order)[-1]
        whole = batches[fullest]
        if len(whole) > 1:
            batches[fullest] = whole[::2]
            batches.append(whole[1::2])
        else:
            batches.append(list(batches[repeated]))
            repeated += 1


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
    """As `by_length`, each megabatch from one modality (the sign of the length).

    Data of one kind goes to `by_length` as it is, signs and all, as in the original: of text alone
    the shortest come first in a megabatch, and its chunks are not even.
    """
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        return by_length(lengths, batch_size, world_size, generator)
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
