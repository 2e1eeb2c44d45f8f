"""What a run tells while it goes: a line a logging step, curves in tensorboard, facts for both.

Special here: plain lines instead of bars, the same on a terminal, in a log file and under Slurm.
The figures come from `llava.train.telemetry`, so they are those that wandb and tensorboard get. A
run that was interrupted has one curve in tensorboard, without the steps that were lost.
``python -m llava.train.train --logging_steps 10 --report_to tensorboard ...``
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from llava.utils import get_logger

logger = get_logger(__name__)


class ProgressLines(TrainerCallback):
    """One line a logging step: step, loss, learning rate, speed, what is short, time left."""

    def __init__(self) -> None:
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()
        self.first_step = state.global_step

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or not ({"loss", "eval_loss"} & set(logs)):
            return
        done = state.global_step - self.first_step
        seconds = time.monotonic() - self.started
        per_step = seconds / done if done else 0.0
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if "eval_loss" in logs:
            parts.append(f"validation loss {logs['eval_loss']:.4f}")
        else:
            parts += [
                f"loss {logs['loss']:.4f}",
                f"grad {float(logs.get('grad_norm', 0.0)):.2f}",
                f"lr {logs.get('learning_rate', 0.0):.2e}",
                *_speed(logs),
                f"{_clock(per_step * (state.max_steps - state.global_step))} left",
            ]
        logger.info("  ".join(parts))


WAIT_TO_TELL = 0.05
"""Share of a step spent waiting for data from which on a line says so."""


def _speed(logs: Mapping[str, float]) -> list[str]:
    """Samples and tokens a second, and how many of the tokens are left after the cuts when a plan
    drops some; MFU where the peak is known; a GPU's peak memory; waiting for data when there is
    much of it."""
    parts = []
    if "samples_per_second" in logs:
        rate = logs["samples_per_second"]
        parts.append(f"{rate:.1f} samples/s" if rate >= 1 else f"{rate:.2g} samples/s")
    if "tokens_per_second" in logs:
        names = ("tokens_per_second", "computed_tokens_per_second")
        before, after = (f"{logs[name]:.0f}" for name in names)
        cut = "" if after == before else f" ({after} after cuts)"
        parts.append(f"{before} tokens/s{cut}")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.0%}")
    if "memory_peak_gib" in logs:
        parts.append(f"peak {logs['memory_peak_gib']:.1f} GiB")
    if logs.get("data_wait_share", 0.0) >= WAIT_TO_TELL:
        parts.append(f"waits for data {logs['data_wait_share']:.0%}")
    return parts


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class OneCurve(TensorBoardCallback):
    """transformers' tensorboard reporter, but a run that goes on from a checkpoint continues the
    curves of its earlier part, in the newest folder below ``runs/`` (or in
    $TENSORBOARD_LOGGING_DIR); what that part wrote behind the checkpoint is hidden. The epoch is
    written once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.next_step: int | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            self.next_step = state.global_step + 1
            earlier = sorted(Path(args.output_dir, "runs").glob("*/events.out.tfevents.*"))
            if self.logging_dir is None and earlier:
                newest = max(earlier, key=lambda file: file.stat().st_mtime)
                self.logging_dir = str(newest.parent)
        super().on_train_begin(args, state, control, **kwargs)

    def _init_summary_writer(self, args: Any) -> None:
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self.next_step)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = dict(logs or {})
        if "loss" not in logs:
            logs.pop("epoch", None)
        super().on_log(args, state, control, logs=logs, **kwargs)


class TellFacts(TrainerCallback):
    """Gives tensorboard (the text `run`) and wandb (its config) what the training arguments do not
    say: the plan, the data, the base."""

    def __init__(self, trainer: Any, facts: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.facts = facts

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, OneCurve):
                text = json.dumps(self.facts, indent=2, ensure_ascii=False)
                callback.tb_writer.add_text("run", f"```\n{text}\n```", state.global_step)
        wandb = sys.modules.get("wandb") if "wandb" in args.report_to else None
        if wandb is not None and wandb.run is not None:
            wandb.run.config.update(dict(self.facts), allow_val_change=True)


class FollowEpochs(TrainerCallback):
    """Tells the trainer's `train_order` which epoch begins: where a run of several ranks resumes
    within an epoch, accelerate's wrappers hide it from the Trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.train_order is not None:
            self.trainer.train_order.set_epoch(int(state.epoch or 0))
