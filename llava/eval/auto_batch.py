"""`--batch-size auto`: the most questions together that fit, decided once a run and written down.

Special here: sizes are tried before anything is answered, on the longest of the fullest batches,
and halved while the device's memory is too small. The first process to know writes the size beside
the run's plan (`RunFolder.batch_size`); other processes and restarts take it, on whatever machine,
so batches stay a function of what the folder says. Nothing is split on the way: in half precision
answers may depend on who is answered together.

    answerer.batch_size = folder.batch_size(lambda: fitting_size(answerer, questions))
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llava.eval.questions import Question
from llava.eval.throughput import Stopwatch
from llava.utils import get_logger

if TYPE_CHECKING:
    from llava.eval.answer import Answerer

AUTO = "auto"
LARGEST = 64
"""Tried first where a device says when it is full; a CPU does not, and gets half of it."""
log = get_logger(__name__)


def batch_size(text: str) -> int | str:
    """The value of a flag: "auto", or a number."""
    return AUTO if text == AUTO else int(text)


def fitting_size(answerer: Answerer, questions: Sequence[Question]) -> int:
    """The largest size, halved from `LARGEST` on, whose costliest batch fits the device.

    ValueError when a single question does not. The answerer keeps its size.
    """
    before = answerer.batch_size
    tells = tells_when_full(answerer.device)
    size = LARGEST if tells else LARGEST // 2
    try:
        while tells and not _fits(answerer, questions, size):
            if size == 1:
                raise ValueError("the device's memory is too small for one question")
            size //= 2
    finally:
        answerer.batch_size = before
    log.info("batch size: %d (auto)", size)
    return size


def tells_when_full(device: torch.device) -> bool:
    """Whether too large a batch is an error there, and not a process that is killed."""
    return device.type != "cpu"


def _fits(answerer: Answerer, questions: Sequence[Question], size: int) -> bool:
    answerer.batch_size = size
    # Batches come longest first, so the first of the fullest is the costliest.
    batch = max(answerer.batches(questions), key=lambda each: len(each.places))
    ready = answerer.prepare(batch, questions)
    try:
        answerer.answer_batch(ready, Stopwatch(answerer.device), "")
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    del ready
    gc.collect()
    torch.cuda.empty_cache()
    return fits
