"""Where the time of a training step goes: data, tower and projector, optimizer, the rest.

Special here: the first steps of a run are timed part by part from outside, by hooks on the tower,
the projector and the optimizer that are taken away again; on a GPU parts are timed by events. A
forward pass of tower and projector is timed, its backward pass taken to cost as the FLOPs say.
``python -m llava.train.train --compare_steps 50 ...`` (`llava.train.compare`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from llava.train.telemetry import Meter, Work


@dataclass
class StepTime:
    """One step. seconds: from the fetching of its batches to the next step's; wait, tower,
    optimizer: parts of it; flops: of the language model, recomputation included. Over ranks all are
    means."""

    seconds: float = 0.0
    wait: float = 0.0
    tower: float = 0.0
    optimizer: float = 0.0
    flops: float = 0.0

    def values(self) -> list[float]:
        """The figures in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


class StepWatch:
    """Times the first `limit` steps part by part (`Meter.watch`).

    On a GPU parts are timed by events and each step begins on an idle device. `when_done` gets the
    steps as soon as they are complete, at the latest in `finish`.
    """

    def __init__(self, model: Any, device: torch.device, limit: int, passes: Sequence[float]):
        """passes: forward passes that a step of tower and projector is worth, its own included."""
        self.device, self.limit = device, limit
        self.steps: list[StepTime] = []
        self.when_done: Callable[[list[StepTime]], None] = lambda steps: None
        self._now = StepTime()
        self._start: float | None = None
        self._spans: list[tuple[str, float, Any, Any]] = []
        self._open: dict[str, Any] = {}
        self._handles = []
        modules = (model.get_vision_tower(), getattr(model.get_model(), "mm_projector", None))
        for module, weight in zip(modules, passes, strict=True):
            if module is not None:
                key = f"tower{id(module)}"
                self._handles += [
                    module.register_forward_pre_hook(lambda *_, key=key: self._opened(key)),
                    module.register_forward_hook(
                        lambda *_, key=key, weight=weight: self._closed(key, "tower", weight)
                    ),
                ]
        self._handles += [
            torch_optimizer.register_optimizer_step_pre_hook(lambda *_: self._opened("optimizer")),
            torch_optimizer.register_optimizer_step_post_hook(
                lambda *_: self._closed("optimizer", "optimizer", 1.0)
            ),
        ]

    # -- called by the meter -----------------------------------------------------------------------
    def begin(self) -> None:
        """A step begins, and with it the one before ends."""
        if not self._handles:
            return
        now = self._end_step()
        if len(self.steps) >= self.limit:
            self._leave()
        else:
            self._start = now

    def waited(self, seconds: float) -> None:
        self._now.wait += seconds

    def counted(self, work: Work) -> None:
        self._now.flops += work.flops + work.again_flops

    def left_out(self, seconds: float) -> None:
        self._now.seconds -= seconds

    # -- inside ------------------------------------------------------------------------------------
    def finish(self) -> list[StepTime]:
        """The steps; a last one that no other followed ends here."""
        if self._handles:
            self._end_step()
            self._leave()
        return self.steps

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.when_done(self.steps)

    def _end_step(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._start is not None:
            self._now.seconds += now - self._start
            for part, weight, start, stop in self._spans:
                spent = weight * self._between(start, stop)
                setattr(self._now, part, getattr(self._now, part) + spent)
            self.steps.append(self._now)
        self._now, self._start, self._spans = StepTime(), None, []
        return now

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(start: Any, stop: Any) -> float:
        return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3

    def _opened(self, key: str) -> None:
        self._open[key] = self._mark()

    def _closed(self, key: str, part: str, weight: float) -> None:
        if key in self._open:
            self._spans.append((part, weight, self._open.pop(key), self._mark()))


def watch_steps(trainer: Any, limit: int) -> StepWatch:
    """Have the trainer's meter time its first `limit` steps."""
    cost = trainer.meter.cost
    passes = (1.0, 1.0) if cost is None else cost.vision_passes()
    trainer.meter.watch = StepWatch(trainer.model, trainer.meter.device, limit, passes)
    return trainer.meter.watch


def over_ranks(meter: Meter, steps: Sequence[StepTime]) -> list[StepTime]:
    """The steps of all ranks as one. A collective call."""
    flat = [value for step in steps for value in step.values()]
    width = len(fields(StepTime))
    ranks = [
        [StepTime(*row[at : at + width]) for at in range(0, len(row), width)]
        for row in meter.gather(flat)
    ]
    return [mean_step(step) for step in zip(*ranks, strict=True)]


def mean_step(steps: Sequence[StepTime]) -> StepTime:
    """Their mean, field by field."""
    columns = zip(*(step.values() for step in steps), strict=True)
    return StepTime(*(sum(column) / len(steps) for column in columns))
