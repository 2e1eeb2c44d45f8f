"""Stopping a run in time: a step that is not finite, or a signal of the scheduler.

Special here: once a step, in front of the optimizer's update, the ranks put three flags together
(a loss that is not finite, a gradient that is not, a signal) and read them back: one reduction of
three integers and one host read, in place of transformers' ``logging_nan_inf_filter``, which reads
every micro-batch's loss and hides what it finds. So one rank's NaN or signal stops all of them at
the same step, and the weights are still those that the batch met. (DeepSpeed's engine makes its
update in the backward pass. It leaves out one whose norm is not finite, under every stage of ZeRO
and in bfloat16 too from 0.19.8 on, so an older one is not accepted.)

``enable_jit_checkpoint`` of transformers is not used: each rank there follows its own flag, set by
a timer, so ranks that see the signal in different steps wait for each other; it knows SIGTERM
alone, saves in front of the update, and ends as if the run were complete.
``srun --signal=USR1@300 python -m llava.train.train ...``
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.train.ranks import several_ranks
from llava.utils import get_logger

logger = get_logger(__name__)

EXIT_PREEMPTED = 75
"""Exit code after a signal: a checkpoint is saved, the same command goes on (sysexits' EX_TEMPFAIL,
"try again later")."""
EXIT_NOT_FINITE = 3
"""Exit code after a loss or gradient that is not finite."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RunStopped(SystemExit):
    """The run ends here on purpose, on every rank, with this exit code."""


class Verdict(NamedTuple):
    """What the ranks agree on in a step."""

    loss: bool = False
    gradient: bool = False
    signal: bool = False

    @property
    def not_finite(self) -> bool:
        return self.loss or self.gradient


# -------------------------------------------------------------------------------------------- step
class StepGuard:
    """Collects what a step did and has the ranks judge it together.

    nan_guard: judge losses and gradients. scaled: the loss is scaled for float16, whose gradients
    overflow on purpose from time to time; then the loss alone is judged.
    """

    def __init__(self, device: torch.device, *, nan_guard: bool = True, scaled: bool = False):
        self.device = device
        self.nan_guard = nan_guard
        self.scaled = scaled
        self.caught: int | None = None
        """Number of the signal that this process got."""
        self.stopping = False
        """The ranks agreed to save and stop behind this step."""
        self.batches: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []

    def saw(self, batch: dict[str, Any], loss: Tensor) -> None:
        """A micro-batch and its loss; nothing is read from the device."""
        if self.nan_guard:
            self.batches.append(batch)
            self.losses.append(loss.detach().float())

    def judge(self, grad_norm: Tensor | float | None) -> Verdict:
        """The ranks' verdict on this step, called by all of them in front of the update."""
        if not self.nan_guard and not several_ranks():
            return Verdict(signal=self.caught is not None)
        judged = None if self.scaled or not self.nan_guard else grad_norm
        flags = torch.stack(
            [
                self._flag(torch.stack(self.losses) if self.losses else None),
                self._flag(judged),
                torch.full((), int(self.caught is not None), device=self.device),
            ]
        ).to(torch.int32)
        if several_ranks():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return Verdict(*(bool(flag) for flag in flags.tolist()))

    def _flag(self, value: Tensor | float | None) -> Tensor:
        """1 where something of `value` is not finite, on the device."""
        if isinstance(value, Tensor):
            tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
            return (~tensor.detach().isfinite().all()).long().to(self.device)
        bad = value is not None and not math.isfinite(value)
        return torch.full((), int(bad), device=self.device)

    def forget(self) -> None:
        """Behind a step: let go of its batches."""
        self.batches, self.losses = [], []

    # -- signals -----------------------------------------------------------------------------------
    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Within the block SIGTERM and SIGUSR1 are noted instead of ending the process; later ones
        too, since Slurm sends SIGTERM twice."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: Any) -> None:
        self.caught = number  # nothing else: a handler may run in the middle of anything

    def name_of_signal(self) -> str:
        return "another rank's signal" if self.caught is None else signal.Signals(self.caught).name


class StopOnSignal(TrainerCallback):
    """Behind the step in which the ranks agreed on a signal: a full checkpoint, then the end."""

    def __init__(self, guard: StepGuard) -> None:
        self.guard = guard

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.guard.stopping:
            return
        if state.global_step >= state.max_steps:  # nothing is left to go on with
            self.guard.stopping = False
            return
        logger.warning(
            "%s: saving after step %d, then stopping",
            self.guard.name_of_signal(),
            state.global_step,
        )
        args.save_only_model = False
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # there may be a minute left

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.guard.stopping:
            control.should_save = control.should_evaluate = control.should_log = False


# ----------------------------------------------------------------------------------------- workers
def in_own_groups(loader: DataLoader) -> DataLoader:
    """The loader, whose workers leave the process group of the run: a signal to the group would
    end them (torch restores SIGTERM in a worker) and with them the run, before it can save."""
    own = getattr(loader, "base_dataloader", loader)  # accelerate's reads through to it
    own.worker_init_fn = functools.partial(_start_worker, own.worker_init_fn)
    return loader


def _start_worker(start: Callable[[int], None] | None, number: int) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the loader ends its workers with it
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # some schedulers signal every process there is
    if start is not None:
        start(number)
