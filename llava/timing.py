"""Timing that cannot mislead: warmed up, synchronised, interleaved, medians with their spread.

Special here: what is compared runs in turn (A B, B A, A B, ...), so that a machine that slows down
slows both sides; on a CPU the figure is the process's own CPU time (other users of the machine do
not count) with wall time beside it, on a GPU CUDA events. Set-up that must not be timed is handed
over apart. ``llava bench --preset cpu-512`` uses it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava.utils import progress


@dataclass(frozen=True)
class Sample:
    """One run: ``ms`` is the figure (CPU time or CUDA events), ``wall_ms`` what a clock shows."""

    ms: float
    wall_ms: float


class Clock:
    """Measures one call on one kind of device.

    >>> Clock("cpu").measure(lambda _: None, None).ms >= 0
    True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"timing on device {str(device)!r}; accepted: cpu, cuda")

    def synchronise(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, function: Callable[[Any], Any], argument: Any) -> Sample:
        """Time ``function(argument)``, from an idle device to an idle device."""
        self.synchronise()
        if self.device.type == "cuda":
            return self._measure_cuda(function, argument)
        wall, cpu = time.perf_counter(), time.process_time()
        function(argument)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Sample(1e3 * cpu, 1e3 * wall)

    def _measure_cuda(self, function: Callable[[Any], Any], argument: Any) -> Sample:
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        wall = time.perf_counter()
        start.record()
        function(argument)
        stop.record()
        torch.cuda.synchronize(self.device)
        return Sample(start.elapsed_time(stop), 1e3 * (time.perf_counter() - wall))


@dataclass(frozen=True)
class Region:
    """Something to time. ``prepare`` runs before every call, untimed; ``run`` takes its result."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Series:
    """The runs of one side, in the order they were made."""

    samples: tuple[Sample, ...]

    @property
    def ms(self) -> float:
        """Median of the figure."""
        return statistics.median(sample.ms for sample in self.samples)

    @property
    def wall_ms(self) -> float:
        """Median wall time."""
        return statistics.median(sample.wall_ms for sample in self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the figure."""
        return quartiles([sample.ms for sample in self.samples])


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile (inclusive method; one value is both)."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def interleave(
    regions: Mapping[str, Region], clock: Clock, repeats: int, warmup: int = 1, desc: str = ""
) -> dict[str, Series]:
    """Run all regions in turn, the order reversed every time, and return each one's series.

    Args:
        repeats: timed runs of each region; ``warmup`` untimed ones come before.
        desc: what a bar on stderr calls the turns, for regions that take seconds; "": no bar.

    Raises:
        ValueError: no run asked for, or no region.
    """
    if repeats < 1 or warmup < 0 or not regions:
        raise ValueError(
            f"{repeats} repeats, {warmup} warm-up runs of {len(regions)} regions; "
            "accepted: at least 1, 0 and 1"
        )
    names = list(regions)
    taken: dict[str, list[Sample]] = {name: [] for name in names}
    turns: Iterable[int] = range(-warmup, repeats)
    for turn in progress(turns, desc, warmup + repeats, unit="turn") if desc else turns:
        for name in names if turn % 2 == 0 else reversed(names):
            argument = regions[name].prepare()
            sample = clock.measure(regions[name].run, argument)
            if turn >= 0:
                taken[name].append(sample)
    return {name: Series(tuple(samples)) for name, samples in taken.items()}


def compare(none: Series, plan: Series, ideal: float | None, per: int = 1) -> dict[str, Any]:
    """The figures of one region with and without a plan, ready for JSON.

    Args:
        ideal: speed-up if every counted operation took its share of the time; None if unknown.
        per: runs are divided by this, e.g. decode steps in one run.
    """
    speedup = none.ms / plan.ms
    ratios = [a.ms / b.ms for a, b in zip(none.samples, plan.samples, strict=True)]
    return {
        "none_ms": none.ms / per,
        "plan_ms": plan.ms / per,
        "none_spread_ms": [value / per for value in none.spread],
        "plan_spread_ms": [value / per for value in plan.spread],
        "none_wall_ms": none.wall_ms / per,
        "plan_wall_ms": plan.wall_ms / per,
        "speedup": speedup,
        "speedup_spread": list(quartiles(ratios)),
        "ideal": ideal,
        "share_of_ideal": None if ideal is None else speedup / ideal,
        "repeats": len(none.samples),
    }


# ----------------------------------------------------------------------------- kernels
@dataclass
class Kernels:
    """Operations that would each launch a kernel: matrix products apart from everything else."""

    products: int = 0
    other: int = 0

    def __sub__(self, less: Kernels) -> Kernels:
        return Kernels(self.products - less.products, self.other - less.other)


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution")
_FREE = (
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
)


class _KernelCounter(TorchDispatchMode):
    """Counts dispatched operations; views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Kernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in _PRODUCTS:
            self.count.products += 1
        elif name not in _FREE and not is_view(func):
            self.count.other += 1
        return func(*args, **(kwargs or {}))


def is_view(func: Any) -> bool:
    """True for operations that only look at their input's memory in another way."""
    infos = [result.alias_info for result in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def count_kernels(function: Callable[[], Any]) -> Kernels:
    """Kernels one call launches, counted at the dispatcher; any device, the meta device included.

    A fused kernel counts as one operation; on a GPU a library may split one into several.
    """
    with _KernelCounter() as counter:
        function()
    return counter.count


def count_cuda_launches(function: Callable[[], Any]) -> int:
    """Kernels one call really launches on the GPU, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        function()
        torch.cuda.synchronize()
    kinds = ("memcpy", "memset")
    return sum(
        1
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.lower().startswith(kinds)
    )
