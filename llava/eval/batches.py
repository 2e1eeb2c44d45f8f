"""Which questions are answered together: a function of the question file and the settings alone.

Special here: the unit of batching and of sharding is the picture with all its questions, which
share its pass through the tower and the prefill of what their prompts have in common. Batches are
numbered; a process takes whole ones (number modulo number of processes), and after a kill an
unfinished one is run again whole. So neither the number of processes nor a restart changes what is
computed together, and answers come out equal to the last bit.

    batches = plan_batches(questions, batch_size=32)
    mine = [batch for batch in batches if batch.number % ranks.world == ranks.rank]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava.eval.questions import Question


@dataclass(frozen=True)
class Batch:
    """number: its place in the plan. pictures: for each picture (or set of pictures shown together)
    the places of its questions in the question file."""

    number: int
    pictures: tuple[tuple[int, ...], ...]

    @property
    def places(self) -> tuple[int, ...]:
        """All questions of the batch, in the order of its rows."""
        return tuple(place for own in self.pictures for place in own)


def plan_batches(
    questions: Sequence[Question],
    batch_size: int,
    visual_tokens: Callable[[Question], int] = lambda question: 0,
) -> tuple[Batch, ...]:
    """Batches of up to `batch_size` questions, longest prompts first, pictures kept whole.

    A picture with more questions than that is split evenly. visual_tokens: what a question's
    pictures add to the length of its prompt. ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; accepted: 1 and more")
    by_picture: dict[tuple[str, ...], list[int]] = {}
    for place, question in enumerate(questions):
        key = question.images or ("", question.uid)
        by_picture.setdefault(key, []).append(place)
    units: list[tuple[int, ...]] = []
    for places in by_picture.values():
        parts = -(-len(places) // batch_size)
        bounds = [part * len(places) // parts for part in range(parts + 1)]
        units += [tuple(places[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]

    def length(unit: tuple[int, ...]) -> tuple[int, int]:
        visual = visual_tokens(questions[unit[0]])
        return visual, max(len(questions[place].text) for place in unit)

    lengths = {unit: length(unit) for unit in units}
    units.sort(key=lambda unit: (*(-part for part in lengths[unit]), unit))
    return _pack(units, batch_size)


def _pack(units: Sequence[tuple[int, ...]], batch_size: int) -> tuple[Batch, ...]:
    """Units in their order, as many in a batch as it holds."""
    batches: list[Batch] = []
    held: list[tuple[int, ...]] = []
    for unit in units:
        if held and sum(map(len, held)) + len(unit) > batch_size:
            batches.append(Batch(len(batches), tuple(held)))
            held = []
        held.append(unit)
    if held:
        batches.append(Batch(len(batches), tuple(held)))
    return tuple(batches)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Ids that all rows begin with; each row keeps at least one of its own."""
    if not rows:
        return 0
    low, high = min(rows), max(rows)
    most = min(map(len, rows)) - 1
    differ = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return max(0, min(most, next(differ, most)))
