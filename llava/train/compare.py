"""``--compare_steps N``: what the plan saves, measured against the same recipe without it.

Special here: the same steps of the same command are timed twice, first without the plan in a
process of its own (`llava.train.without_plan`), then as the first steps of the run. The end says
how much faster they were, how much the FLOPs of the language model allow, and where most of the
difference went. Warm-up steps are left out.

What there is beside the decoder: waiting for data, tower and projector, the optimizer's step
(`llava.train.step_times`), and communication (`llava.train.communication`), profiled over a few
further steps without the plan. The plan does not change what is communicated, so that figure stands
for both sides.

    llava train --layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]" \\
        --compare_steps 50 ...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.reduction.plan import resolve_plan
from llava.train.step_times import StepTime, StepWatch, mean_step, over_ranks, watch_steps
from llava.train.telemetry import Meter
from llava.utils import get_logger, json_dump

logger = get_logger(__name__)

FOLDER = ".compare"
RESULT_FILE = "compare.json"
NONE_FILE = "none.json"
LEAST_STEPS = 3
"""Measured steps below which nothing is said."""
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
        sides[name] = mean_step(steps[warm_up:stop])
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


# --------------------------------------------------------------------------------- in the run
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
