"""What a run tells while it goes: one line a logging step.

Special here: plain lines instead of bars, the same on a terminal, in a log file and under Slurm.
``python -m llava.train.train --logging_steps 10 ...``
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.utils import get_logger

logger = get_logger(__name__)


class ProgressLines(TrainerCallback):
    """One line a logging step: step, loss, learning rate, samples per second, time left."""

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
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if "eval_loss" in logs:
            parts.append(f"validation loss {logs['eval_loss']:.4f}")
        else:
            parts += [
                f"loss {logs['loss']:.4f}",
                f"grad {float(logs.get('grad_norm', 0.0)):.2f}",
                f"lr {logs.get('learning_rate', 0.0):.2e}",
                f"{batch / per_step if per_step else 0.0:.1f} samples/s",
                f"left {_clock(per_step * (state.max_steps - state.global_step))}",
            ]
        logger.info("  ".join(parts))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
