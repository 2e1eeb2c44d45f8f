"""``--compare_steps N``: what the plan saves, measured against the same recipe without it.

Special here: before this process joins the others or reads a weight, it runs the first N steps
without the plan in a process of its own: same command, data, order, ranks and launcher, so a model
that needs ZeRO-3 is measured under ZeRO-3, and the run itself starts afterwards as if nothing had
been. (Restoring weights and optimizer behind steps in place would need room for both.) The child
writes no checkpoint. Then the first N steps of the run are timed in the same way, and the end says
how much faster they were, how much the FLOPs of the language model allow, and where most of the
difference went. Warm-up steps are left out.

What there is beside the decoder: waiting for data, tower and projector (their forward pass is
timed, a backward pass taken to cost as their FLOPs say), the optimizer's step, and communication:
how long collectives ran while nothing else did, waiting for other ranks included, from torch's
profiler over `PROBED` further steps without the plan. The plan does not change what is
communicated, so that figure stands for both sides.

    llava train --layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]" \\
        --compare_steps 50 ...
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.reduction.plan import resolve_plan
from llava.train.arguments import ModelArguments, build_parser, group_of, parse_args
from llava.train.resume import last_whole, what_to_resume
from llava.train.safety import EXIT_PREEMPTED, STOP_SIGNALS, RunStopped
from llava.train.setup import read_config
from llava.train.telemetry import Meter, Work
from llava.utils import Ranks, get_logger, json_dump, rank, user_errors

logger = get_logger("llava.train.compare")

FOLDER = ".compare"
RESULT_FILE = "compare.json"
NONE_FILE = "none.json"
PROBED = 3
"""Further steps under the profiler, for several ranks."""
LEAST_STEPS = 3
"""Measured steps below which nothing is said."""
OVERRIDES = {
    "compare_steps": 0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "save_rehearsal": False,
    "probe_samples": 0,
    "report_to": "none",
}
"""Flags of the run without the plan, beside --max_steps and --output_dir."""
PARTS = {
    "data": "waiting for data",
    "tower": "tower and projector",
    "optimizer": "optimizer",
    "communication": "communication and waiting for other ranks",
    "decoder": "the decoder itself",
}


def warm_up_of(steps: int) -> int:
    """How many of the first `steps` are left out: a fifth, ten at most."""
    return min(10, max(1, steps // 5))


# ---------------------------------------------------------------------------------------- timing
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
    return [_mean(step) for step in zip(*ranks, strict=True)]


# --------------------------------------------------------------------------------- communication
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


# ------------------------------------------------------------------------------------ the result
def compare(
    none: Sequence[StepTime], plan: Sequence[StepTime], communication: float | None, warm_up: int
) -> dict[str, Any] | None:
    """Both sides over the steps that both made, behind `warm_up`; None when they are too few.

    communication: exposed seconds a step, of either side; None for one rank.
    ideal: how many times fewer FLOPs the language model has; of a part is missing what it takes
    beyond its time without the plan over the ideal.
    """
    stop = min(len(none), len(plan))
    count = stop - warm_up
    if count < LEAST_STEPS:
        return None
    sides = {}
    for name, steps in (("none", none), ("plan", plan)):
        sides[name] = _mean(steps[warm_up:stop])
    ideal = sides["none"].flops / sides["plan"].flops
    measured = sides["none"].seconds / sides["plan"].seconds
    parts = {name: _parts(step, communication) for name, step in sides.items()}
    missing = {part: parts["plan"][part] - parts["none"][part] / ideal for part in parts["plan"]}
    return {
        "steps": count,
        "warm_up": warm_up,
        "measured": measured,
        "ideal": ideal,
        "share_of_ideal": measured / ideal,
        "missing_seconds": sides["plan"].seconds - sides["none"].seconds / ideal,
        "largest": max(missing, key=lambda part: missing[part]),
        "missing_parts_seconds": missing,
        "none_parts_seconds": parts["none"],
        "plan_parts_seconds": parts["plan"],
        "none_step_seconds": sides["none"].seconds,
        "plan_step_seconds": sides["plan"].seconds,
    }


def _mean(steps: Sequence[StepTime]) -> StepTime:
    columns = zip(*(step.values() for step in steps), strict=True)
    return StepTime(*(sum(column) / len(steps) for column in columns))


def _parts(step: StepTime, communication: float | None) -> dict[str, float]:
    parts = {"data": step.wait, "tower": step.tower, "optimizer": step.optimizer}
    if communication is not None:
        parts["communication"] = communication
    return parts | {"decoder": step.seconds - sum(parts.values())}


def format_line(result: Mapping[str, Any]) -> str:
    """The one line at the end of a run."""
    text = (
        f"against no plan over {result['steps']} steps: {result['measured']:.2f}x, "
        f"ideal {result['ideal']:.2f}x (FLOPs of the language model), "
        f"{result['share_of_ideal']:.0%} of it"
    )
    if result["missing_seconds"] <= 0:
        return f"{text}; nothing is missing"
    part = result["largest"]
    return (
        f"{text}; missing {1e3 * result['missing_seconds']:.0f} ms a step, most of it in "
        f"{PARTS[part]} ({1e3 * result['missing_parts_seconds'][part]:.0f} ms)"
    )


class Comparison:
    """The run's side: times its first steps and puts them beside those without the plan."""

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        self.meter: Meter = trainer.meter
        self.folder = Path(args.output_dir)
        self.first = args.process_index == 0
        self.result: dict[str, Any] | None = None
        self.none: dict[str, Any] | None = None
        self.watch: StepWatch | None = None
        self.about = {
            "plan": str(resolve_plan(None, trainer.model.config)[0]),
            "asked_steps": args.compare_steps,
            "processes": args.world_size,
        }
        if not args.compare_steps:
            return
        if self.first:
            self.none = _read(self.folder / FOLDER / NONE_FILE)
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
            earlier = _read(self.folder / RESULT_FILE) or {}
            if self.none is None and self.about.items() <= earlier.items():
                self.result = earlier
        # Only the first rank has read the file; all must agree on what is gathered below.
        if self.meter.gather([float(self.none is not None)])[0][0]:
            self.watch = watch_steps(trainer, args.compare_steps)
            self.watch.when_done = self._complete

    def finish(self) -> dict[str, Any] | None:
        """Behind the last step: the result, on the first rank; None where there is none. A
        collective call."""
        if self.watch is not None:
            self.watch.finish()
        return self.result

    def _complete(self, steps: Sequence[StepTime]) -> None:
        joined = over_ranks(self.meter, steps)
        if self.none is None:
            return
        none = [StepTime(**step) for step in self.none["steps"]]
        found = compare(none, joined, self.none["communication"], self.none["warm_up"])
        if found is None:
            logger.warning("--compare_steps: %d steps are too few to compare", len(joined))
            return
        self.result = {**self.about, **found}
        json_dump(self.folder / RESULT_FILE, self.result)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------ the run without the plan
def run_without_plan(argv: Sequence[str]) -> None:
    """Measure the first steps of this command without its plan, in a process of its own, if it asks
    for that and has a plan. Every rank calls it before it joins the others.

    Raises ValueError for a negative number of steps, or too few to measure.
    """
    flags, _ = build_parser().parse_known_args(list(argv))
    steps = flags.compare_steps
    if not steps:
        return
    if steps < warm_up_of(steps) + LEAST_STEPS:
        raise ValueError(f"--compare_steps {steps}; accepted: 0, or at least {LEAST_STEPS + 1}")
    reason = _nothing_to_compare(flags)
    if reason:
        if rank() == 0:
            logger.info("--compare_steps %d: %s", steps, reason)
        return
    folder = Path(flags.output_dir or "trainer_output") / FOLDER
    more = {**OVERRIDES, "output_dir": folder, "max_steps": steps}
    words = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llava.train.compare", *argv, *words]
    started = time.monotonic()
    if rank() == 0:
        logger.info("measuring %d steps without the plan first, in processes of their own", steps)
    code = _run_child(command, folder / f"failed-{_launch()}")
    if rank() == 0 and code == 0:
        logger.info("measured without the plan in %.0f s", time.monotonic() - started)
    if code != 0:
        logger.warning(
            "without the plan the run ended with exit code %s (it may need more memory); "
            "nothing is compared",
            code,
        )


def _nothing_to_compare(flags: Any) -> str | None:
    if flags.dry_run_data:
        return "no step is made"
    model_args = group_of(ModelArguments, flags)
    config = SimpleNamespace(**read_config(model_args)[1])
    if not resolve_plan(model_args.plan(), config)[0]:
        return "the run has no plan, there is nothing to compare it with"
    wanted = what_to_resume(flags)
    if wanted is None:
        wanted = last_whole(Path(flags.output_dir or "trainer_output"))
    if wanted:
        return "the run goes on from a checkpoint; only its first part can be compared"
    return None


def _launch() -> str:
    """A name of this launch that its ranks have in common."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    names += ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    return re.sub(r"\W+", "-", "-".join(os.environ.get(name, "") for name in names)).strip("-")


def _fresh(path: Path, began: float) -> bool:
    """Whether there is such a file and this launch made it (ranks start within a minute)."""
    try:
        return path.stat().st_mtime > began - 60
    except OSError:
        return False


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the children of several ranks meet: at the port that their parents will use later; or,
    where a launcher (torchrun) has a store there, at a new one that the parents agree on in it."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, is_master=False)
    key = f"llava.train.compare/{environment.get('TORCHELASTIC_RESTART_COUNT')}"
    if rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, str(free.getsockname()[1]))
    found = store.get(key).decode()
    return {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": found}


def _stop(number: int, frame: Any) -> None:
    raise RunStopped(EXIT_PREEMPTED)  # nothing is lost: the run has not begun


def _run_child(command: Sequence[str], failed: Path) -> int:
    """Run the command to its end; its exit code. When another rank's child has failed, this one is
    ended too: it would wait for the other for ever. `failed`: the file that says so."""
    several = Ranks.from_environment().world > 1
    environment = dict(os.environ)
    environment.setdefault("LLAVA_LOG", "warning")
    began = time.time()
    before = {number: signal.signal(number, _stop) for number in STOP_SIGNALS}
    if several:
        environment |= _meeting_point(environment)
    with subprocess.Popen(command, env=environment) as child:
        try:
            while child.poll() is None:
                if several and _fresh(failed, began):
                    child.kill()
                time.sleep(0.2)
        except BaseException:
            child.kill()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if child.returncode != 0 and several:
        failed.parent.mkdir(parents=True, exist_ok=True)
        failed.touch()
    return child.returncode


def _die_with_parent() -> None:
    """End this process when the one that started it is gone (killed by a launcher, say)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """The child of `run_without_plan`: a training command without its plan, timed, nothing saved.

    Writes ``none.json`` into its output folder.
    """
    from llava.train.train import fit, make_trainer

    _die_with_parent()
    model_args, data_args, training_args = parse_args(sys.argv[1:] if argv is None else argv)
    model_args.layer_list = model_args.image_token_ratio_list = None
    model_args.reduction = "none"
    training_args.dual_speed = None
    steps = training_args.max_steps
    several = training_args.world_size > 1
    training_args.max_steps += PROBED if several else 0
    trainer, _ = make_trainer(model_args, data_args, training_args)
    assert trainer is not None
    watch = watch_steps(trainer, steps)
    probe = CommunicationProbe(steps)
    if several:
        trainer.add_callback(probe)
    fit(trainer)
    joined = over_ranks(trainer.meter, watch.finish())
    waits = trainer.meter.gather([probe.seconds or 0.0])
    if training_args.process_index == 0:
        found = {
            "steps": [dict(zip(_NAMES, step.values(), strict=True)) for step in joined],
            "communication": sum(w[0] for w in waits) / len(waits) if several else None,
            "warm_up": warm_up_of(steps),
        }
        json_dump(Path(training_args.output_dir) / NONE_FILE, found)


_NAMES = [field.name for field in fields(StepTime)]

if __name__ == "__main__":
    main()
