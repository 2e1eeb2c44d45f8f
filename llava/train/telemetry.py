"""What a run costs and how fast it goes, from the host's own integers.

Special here: tokens and FLOPs of every micro-batch are read off its `Splice` and the plan's
schedule, so nothing is read back from the device; ranks meet once a logging step, in one small
gather. What is computed again under gradient checkpointing and what the vision tower does are
counted apart from the language model's FLOPs, whose share of the data sheet's peak is the MFU; a
device whose peak is not known has none. Time spent on validation and on saving is left out of all
rates. Sums survive a resume: they are kept with each checkpoint.

``python -m llava.train.train --logging_steps 10 --report_to tensorboard ...``
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from llava.model.multimodal_prep import tile_counts
from llava.reduction import ReductionPlan, flops
from llava.reduction.flops import TERA, ModelShape
from llava.reduction.plan import resolve_plan
from llava.sequence import Layout
from llava.train.parts import part_of

GIB = 2**30


# ------------------------------------------------------------------------------------- one batch
@dataclass(frozen=True)
class Work:
    """Sums over micro-batches, steps or ranks.

    tokens_in: tokens that enter the decoder, padding left out. tokens_computed: tokens of a layer,
    averaged over the layers. flops: forward and backward of the language model. again_flops: its
    layers a second time under gradient checkpointing. tower_flops: tower and projector.
    seconds: time of the steps. wait_seconds: the part of it spent waiting for data.
    """

    steps: float = 0
    samples: float = 0
    tokens_in: float = 0
    tokens_computed: float = 0
    flops: float = 0
    again_flops: float = 0
    tower_flops: float = 0
    seconds: float = 0
    wait_seconds: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> list[float]:
        """The figures in the order of the fields."""
        return [float(getattr(self, field.name)) for field in fields(self)]


_TOGETHER = frozenset({"steps", "seconds", "wait_seconds"})
"""Fields that ranks spend at the same time: their mean stands for all; the rest is summed."""


def over_ranks(ranks: Sequence[Sequence[float]]) -> Work:
    """One `Work` for all ranks from the `values` of each: work adds up, time does not."""
    sums = [sum(column) for column in zip(*ranks, strict=True)]
    names = [field.name for field in fields(Work)]
    return Work(
        *(
            total / len(ranks) if name in _TOGETHER else total
            for name, total in zip(names, sums, strict=True)
        )
    )


@dataclass(frozen=True)
class BatchCost:
    """What a micro-batch costs. trained: the parts of the model that are (`part_of`); "language"
    is not among them when adapters alone are trained. teacher: the plan of a further forward
    without a gradient (`llava.train.dual_speed`)."""

    shape: ModelShape
    plan: ReductionPlan
    trained: frozenset[str]
    checkpointing: bool = False
    teacher: ReductionPlan | None = None

    @classmethod
    def of_model(cls, model: Any, checkpointing: bool) -> BatchCost:
        """Read off a model whose parts are frozen as they will be trained."""
        tower = model.get_vision_tower()
        adapters = any("lora_" in name for name, _ in model.named_parameters())
        trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
        return cls(
            shape=ModelShape.from_config(model.config, None if tower is None else tower.config),
            plan=resolve_plan(None, model.config)[0],
            trained=frozenset(trained - ({"language"} if adapters else set())),
            checkpointing=checkpointing,
        )

    def work(self, layout: Layout, tiles: int) -> Work:
        """One micro-batch of this layout with so many tiles (a dummy is not counted)."""
        layers = self.shape.layers
        stages = self.plan.schedule(layout, layers)
        rows = sum(layout.targets)
        frozen = "language" not in self.trained
        once = flops.train_flops(self.shape, stages, rows, frozen=frozen)
        twice = sum(flops.stage_flops(self.shape, stage) for stage in stages)
        if self.teacher is not None:
            taught = self.teacher.schedule(layout, layers)
            once += flops.prefill_flops(self.shape, taught, rows)
        return Work(
            samples=len(layout.lengths),
            tokens_in=sum(layout.lengths),
            tokens_computed=sum((s.stop - s.start) * sum(s.lengths) for s in stages) / layers,
            flops=once,
            again_flops=twice if self.checkpointing else 0,
            tower_flops=self.tower(tiles),
        )

    def vision_passes(self) -> tuple[float, float]:
        """Forward passes that a step of the tower and of the projector is worth."""
        tower = 1.0
        if "tower" in self.trained:
            tower = 4.0 if self.checkpointing else 3.0
        return tower, 3.0 if self.trained & {"tower", "projector"} else 1.0

    def tower(self, tiles: int) -> float:
        """Tower and projector, forward (a teacher's too) and, where they are trained, backward."""
        tower_passes, projector_passes = self.vision_passes()
        if self.teacher is not None:
            tower_passes, projector_passes = tower_passes + 1, projector_passes + 1
        projector = flops.projector_flops(self.shape, tiles * self.shape.patches)
        return tower_passes * flops.tower_flops(self.shape, tiles) + projector_passes * projector


# ---------------------------------------------------------------------------------- peaks, memory
def peak_flops(device: torch.device, half: bool, given_tflops: float | None) -> float | None:
    """Peak FLOP/s of one device: the user's figure, else the data sheet's for a known GPU computing
    in 16 bit (``half``), else None."""
    if given_tflops is not None:
        return given_tflops * TERA
    if device.type != "cuda" or not half:
        return None
    machine = flops.find_machine(torch.cuda.get_device_name(device))
    return None if machine is None else machine.flops


def memory_bytes(device: torch.device) -> dict[str, float]:
    """Memory of this process: of the GPU's allocator, or resident in the host's memory."""
    if device.type != "cuda":
        return {"rss": float(psutil.Process().memory_info().rss)}
    return {
        "allocated": float(torch.cuda.memory_allocated(device)),
        "reserved": float(torch.cuda.memory_reserved(device)),
        "peak": float(torch.cuda.max_memory_allocated(device)),
    }


# --------------------------------------------------------------------------------------- the meter
class Totals(TrainerCallback, ExportableState):
    """Sums over all ranks and all parts of a run; saved in trainer_state.json, found there again
    by a resumed run."""

    def __init__(self) -> None:
        self.work: dict[str, float] = asdict(Work())
        self.parts: list[float] = []
        """Seconds from the start of training to the last figure, one entry a part."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (`ExportableState`)."""
        return {"args": {}, "attributes": {"work": self.work, "parts": self.parts}}

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__)
        kept = stored["attributes"] if isinstance(stored, Mapping) else {}
        self.work = {**asdict(Work()), **kept.get("work", {})}
        self.parts = [*kept.get("parts", []), 0.0]

    def add(self, work: Work, seconds: float) -> None:
        """A stretch of this part, which has lasted `seconds` so far."""
        self.work = asdict(Work(**self.work) + work)
        if self.parts:
            self.parts[-1] = seconds

    def sums(self) -> Work:
        """The sums as `Work`."""
        return Work(**self.work)


class Watch(Protocol):
    """Who wants to see the steps one by one (`llava.train.compare`)."""

    def begin(self) -> None: ...
    def waited(self, seconds: float) -> None: ...
    def counted(self, work: Work) -> None: ...
    def left_out(self, seconds: float) -> None: ...


class Meter:
    """Counts what the steps of a trainer do and how long they take.

    `cost` is None for a model whose shape is not known; then there are samples and seconds alone.
    `peak`: FLOP/s of one device, None = unknown. `gather` takes [k] numbers of this rank to
    [ranks, k]; it is called by all ranks at the same places.
    """

    def __init__(
        self, cost: BatchCost | None, device: torch.device, ranks: int, peak: float | None
    ) -> None:
        self.cost = cost
        self.device = device
        self.ranks = ranks
        self.peak = peak
        self.totals = Totals()
        self.watch: Watch | None = None
        self.started = time.perf_counter()
        self._now = Work()
        self._began: float | None = None
        self._left_out = 0.0

    # -- while it goes -----------------------------------------------------------------------------
    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of a step's batches, with which a step begins."""
        if self.watch is not None:
            self.watch.begin()
        start = time.perf_counter()
        if self._began is None:
            self._began = start
        yield
        waited = time.perf_counter() - start
        self._now += Work(steps=1, wait_seconds=waited)
        if self.watch is not None:
            self.watch.waited(waited)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Around validation and saving, which are no part of a step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the step's own work is the step's
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            if self._began is not None:
                self._left_out += spent
            if self.watch is not None:
                self.watch.left_out(spent)

    def count(self, batch: Mapping[str, Any], cost: BatchCost | None = None) -> Work:
        """Add a micro-batch, from its `Splice`; returns what it costs. cost: of this batch, where
        it is not that of all."""
        splice, cost = batch.get("splice"), self.cost if cost is None else cost
        if cost is None or splice is None:
            work = Work(samples=len(batch["input_ids"]))
        else:
            work = cost.work(splice.layout, count_tiles(batch.get("images")))
        self._now += work
        if self.watch is not None:
            self.watch.counted(work)
        return work

    # -- figures -----------------------------------------------------------------------------------
    def flush(self) -> Work:
        """What all ranks did since the last call, added to the totals. A collective call."""
        now = time.perf_counter()
        seconds = 0.0 if self._began is None else now - self._began - self._left_out
        mine = self._now + Work(seconds=max(seconds, 0.0))
        self._now, self._began, self._left_out = Work(), None, 0.0
        work = over_ranks(self.gather(mine.values()))
        self.totals.add(work, now - self.started)
        return work

    def report(self) -> dict[str, float]:
        """The figures of a logging step, for every reporter. A collective call."""
        work = self.flush()
        so_far = self.totals.sums()
        found = self.rates(work) | {"samples_seen": so_far.samples}
        if so_far.flops:
            found["total_tflops"] = so_far.flops / TERA
        memory = memory_bytes(self.device)
        worst = [max(column) for column in zip(*self.gather(list(memory.values())), strict=True)]
        return found | {
            f"memory_{name}_gib": value / GIB for name, value in zip(memory, worst, strict=True)
        }

    def rates(self, work: Work) -> dict[str, float]:
        """Rates of all ranks together; those that are not known are left out."""
        if not work.seconds:
            return {}
        found = {
            "samples_per_second": work.samples / work.seconds,
            "data_wait_share": work.wait_seconds / work.seconds,
        }
        if work.tokens_in:
            found |= {
                "tokens_per_second": work.tokens_in / work.seconds,
                "computed_tokens_per_second": work.tokens_computed / work.seconds,
                "tflops_per_second": work.flops / work.seconds / TERA,
                "tower_tflops_per_second": work.tower_flops / work.seconds / TERA,
            }
            if work.again_flops:
                found["recomputed_tflops_per_second"] = work.again_flops / work.seconds / TERA
            if self.peak:
                found["mfu"] = work.flops / work.seconds / (self.ranks * self.peak)
        return found

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank."""
        if self.ranks == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        all_ranks = [torch.empty_like(mine) for _ in range(self.ranks)]
        torch.distributed.all_gather(all_ranks, mine)
        return [rank.tolist() for rank in all_ranks]


def count_tiles(images: Any) -> int:
    """Tiles in a batch's pictures, as `tile_counts` knows them; a picture that is not tiled is
    one."""
    return sum(1 if tiles is None else tiles for tiles in tile_counts(images))


def meter_of(model: nn.Module, args: Any) -> Meter:
    """The meter of a trainer with these arguments; a model without `get_vision_tower` (a toy of a
    test) has no cost."""
    cost = None
    if hasattr(model, "get_vision_tower"):
        cost = BatchCost.of_model(model, bool(args.gradient_checkpointing))
    peak = peak_flops(args.device, args.bf16 or args.fp16, getattr(args, "peak_tflops", None))
    return Meter(cost, args.device, args.world_size, peak)


REPLACED = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
"""What transformers logs behind the last step: rates that count validation and saving as training,
and FLOPs that know of no cut. `Meter.report` and train_summary.json have what stands for them."""


# --------------------------------------------------------------------------------------- summary
def run_figures(meter: Meter) -> dict[str, Any]:
    """What train_summary.json says about all parts of a run, from the last `flush`.

    seconds: from the start of training to its end, the parts of a resumed run added up (steps that
    an interruption lost are not in it). The rates are over the steps alone.
    """
    work, parts = meter.totals.sums(), meter.totals.parts
    device = "gpu" if meter.device.type == "cuda" else "process"
    figures: dict[str, Any] = {
        "seconds": round(sum(parts), 1),
        "parts_seconds": [round(seconds, 1) for seconds in parts],
        "processes": meter.ranks,
        f"{device}_hours": round(sum(parts) * meter.ranks / 3600, 4),
        "step_seconds": round(work.seconds, 1),
        "samples_seen": round(work.samples),
        "tokens": round(work.tokens_in),
        "computed_tokens": round(work.tokens_computed),
    }
    more = {
        "total_tflops": work.flops / TERA,
        "total_recomputed_tflops": work.again_flops / TERA,
        "total_tower_tflops": work.tower_flops / TERA,
        **meter.rates(work),
    }
    return figures | {name: float(f"{value:.5g}") for name, value in more.items()}


def changed_flags(*groups: Any) -> dict[str, Any]:
    """The flags of argument dataclasses that are not at their default, as JSON values; what is
    derived from them and no plain value is left out."""
    found: dict[str, Any] = {}
    for group in groups:
        for each in fields(group):
            value = getattr(group, each.name, None)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            value = value.value if isinstance(value, Enum) else value
            if each.init and value != default and (value or default):
                with contextlib.suppress(TypeError):
                    found[each.name] = json.loads(json.dumps(value))
    return found
