"""What a training step of compare.sh costs in each arm: FLOPs, and time measured in turn.

Special here: one process, one model and the same batches for all arms; the arms take turns, and the
figure is the process's own CPU time (`llava.timing`), so other work on the machine slows all alike.
A step is what the trainer does with a batch that is ready: forward, backward, clipping, optimizer.

    python scripts/digits/compare_cost.py checkpoints/digits-work/compare
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from llava.eval.run_folder import read_object
from llava.reduction.plan import ReductionPlan
from llava.timing import Clock, Region, interleave
from llava.train.arguments import parse_args
from llava.train.telemetry import Work
from llava.train.train import make_trainer
from llava.utils import environment, json_dump, user_errors

FILE = "cost.json"


def arms_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> train_summary.json of the arms of seed 0, "none" among them; in both comparisons the
    arms of a name have the same model, data and plan. ValueError when there are none."""
    found = {
        path.parent.name: read_object(path)
        for path in sorted(folder.glob("*/seed-0/*/train_summary.json"))
    }
    if "none" not in found:
        raise ValueError(f"{folder} holds no finished arm */seed-0/none; run compare.sh")
    return found


class Stepper:
    """The trainer of the arm without dropping, and its first batches."""

    def __init__(self, command: Sequence[str], scratch: str, batches: int) -> None:
        trainer, _ = make_trainer(*parse_args([*command, "--output_dir", scratch]))
        assert trainer is not None
        self.trainer = trainer
        trainer.current_gradient_accumulation_steps = 1
        self.model = trainer.accelerator.prepare_model(trainer.model)
        self.optimizer = trainer.create_optimizer()
        self.batches = list(islice(iter(trainer.get_train_dataloader()), batches))

    def step(self, plan: dict[str, Any] | None) -> None:
        """All batches once under a plan, an optimizer step each."""
        trainer, device = self.trainer, self.trainer.args.device
        trainer.model.config.visual_token_reduction = plan
        for batch in self.batches:
            items = trainer._get_num_items_in_batch([batch], device)
            trainer.training_step(self.model, dict(batch), items)
            trainer.accelerator.clip_grad_norm_(
                trainer.model.parameters(), trainer.args.max_grad_norm
            )
            self.optimizer.step()
            self.optimizer.zero_grad()

    def work(self, plan: dict[str, Any] | None) -> Work:
        """What the batches cost under a plan."""
        cost = replace(self.trainer.meter.cost, plan=ReductionPlan.parse(plan))
        works = [self.trainer.meter.count(batch, cost) for batch in self.batches]
        return sum(works[1:], works[0])


def measure(folder: Path, repeats: int, batches: int) -> dict[str, Any]:
    """Costs of a step of every arm: {"arms": {name: ...}, "environment": ...}."""
    arms = arms_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        stepper = Stepper(arms["none"]["command"], scratch, batches)
        plans = {name: arm["plan"] for name, arm in arms.items()}
        regions = {
            name: Region(lambda _, plan=plan: stepper.step(plan)) for name, plan in plans.items()
        }
        series = interleave(regions, Clock("cpu"), repeats)
        works = {name: stepper.work(plan) for name, plan in plans.items()}
    found = {}
    for name, plan in plans.items():
        ratios = sorted(
            one.ms / none.ms
            for one, none in zip(series[name].samples, series["none"].samples, strict=True)
        )
        found[name] = {
            "plan": str(ReductionPlan.parse(plan)),
            "ms": series[name].ms / batches,
            "ms_of_none": ratios[len(ratios) // 2],
            "ms_of_none_range": [ratios[0], ratios[-1]],
            "gflops": works[name].flops / 1e9 / batches,
            "tower_gflops": works[name].tower_flops / 1e9 / batches,
            "tokens": works[name].tokens_in / batches,
            "computed_tokens": works[name].tokens_computed / batches,
        }
    return {"arms": found, "repeats": repeats, "batches": batches, "environment": environment()}


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write FOLDER/cost.json."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("folder", type=Path, help="compare/ in the folder of the stages")
    flags.add_argument("--repeats", type=int, default=10, help="turns of every arm")
    flags.add_argument("--batches", type=int, default=3, help="batches a turn")
    args = flags.parse_args(argv)
    json_dump(args.folder / FILE, measure(args.folder, args.repeats, args.batches))


if __name__ == "__main__":
    main(sys.argv[1:])
