"""What a run tells while it goes: one line a logging step.

Special here: plain lines instead of bars, the same on a terminal, in a log file and under Slurm.
The figures come from `llava.train.telemetry`, so they are those that wandb and tensorboard get.
``python -m llava.train.train --logging_steps 10 ...``
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

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
                f"left {_clock(per_step * (state.max_steps - state.global_step))}",
            ]
        logger.info("  ".join(parts))


WAIT_TO_TELL = 0.05
"""Share of a step spent waiting for data from which on a line says so."""


def _speed(logs: Mapping[str, float]) -> list[str]:
    """Samples a second; tokens a second, those computed behind the arrow when a plan drops some;
    MFU and peak memory on a GPU that is known; waiting for data when there is much of it."""
    parts = []
    if "samples_per_second" in logs:
        parts.append(f"{logs['samples_per_second']:.1f} samples/s")
    if "tokens_per_second" in logs:
        tokens = [logs["tokens_per_second"], logs["computed_tokens_per_second"]]
        shown = dict.fromkeys(f"{value:.0f}" for value in tokens)
        parts.append(f"{'>'.join(shown)} tokens/s")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.0%}")
    if "memory_peak_gib" in logs:
        parts.append(f"{logs['memory_peak_gib']:.1f} GiB")
    if logs.get("data_wait_share", 0.0) >= WAIT_TO_TELL:
        parts.append(f"waits for data {logs['data_wait_share']:.0%}")
    return parts


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


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
