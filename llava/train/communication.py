"""How long collectives run while nothing else does, from torch's profiler.

Special here: what hides behind computing costs nothing and is not counted; waiting for other ranks
is. ``python -m llava.train.train --compare_steps 50 ...`` (`llava.train.compare`)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

PROBED = 3
"""Steps under the profiler."""


def exposed_seconds(events: Iterable[tuple[str, float, float, bool]]) -> float:
    """How long collectives ran while nothing else was computed.

    events: name, start, end (seconds), whether it ran on a device. Where there are events of a
    device those alone count: kernels whose name holds "nccl" against all others. On a CPU gloo's
    operations count against torch's (``aten::``).
    """
    events = list(events)
    on_device = any(device for *_, device in events)
    collective, other = [], []
    for name, start, end, device in events:
        if device != on_device:
            continue
        if ("nccl" in name.lower()) if on_device else name.startswith("gloo:"):
            collective.append((start, end))
        elif on_device or name.startswith("aten::"):
            other.append((start, end))
    return _covered([*collective, *other]) - _covered(other)


def profiled(events: Iterable[Any]) -> Iterator[tuple[str, float, float, bool]]:
    """A profiler's events as `exposed_seconds` takes them. What is named on a device's timeline
    (``FSDP::pre_forward``, ``Optimizer.step``) spans kernels and is none, so it is left out."""
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if not (on_device and event.is_user_annotation):
            span = event.time_range
            yield event.name, span.start / 1e6, span.end / 1e6, on_device


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reach = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


class CommunicationProbe(TrainerCallback):
    """Profiles the steps first .. first + PROBED - 1; `seconds` of exposed communication a step."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.seconds: float | None = None
        self._profiler: Any = None

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.first and self._profiler is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._profiler is None or state.global_step != self.first + PROBED:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        self.seconds = exposed_seconds(profiled(self._profiler.events())) / PROBED
