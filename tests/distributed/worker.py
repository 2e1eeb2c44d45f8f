"""One rank: runs the training commands that the test asks for, each in a process of its own.

Started once by torch.distributed.run, because importing everything costs more than a run does. A
job is a forked child with a process group of its own, so it may be killed, and the next one starts
from nothing. ``worker.py FOLDER``: job-N.json there is a job,

    {"command": [...], "port": n, "ranks": n, "machines": [], "kill": null or {"step": n, ...},
     "last": false}

What goes wrong may also be a signal to one rank, a rank that hangs, or a layer of one rank that is
not finite. A rank that ends well has given --ddp_timeout to every process group there is.

job-N.RANK.log is its output, job-N.RANK.done its exit code (0 from a rank that a smaller job leaves
out). A file called stop ends the worker, job-N.cancel the job.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d
from transformers import Trainer

from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import main

RANK = os.environ["RANK"]
for package in ("deepspeed", "wandb"):  # or each job would import it anew
    with contextlib.suppress(ImportError):
        importlib.import_module(package)


class NotFiniteBehind(torch.autograd.Function):
    """Its input as it is, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / 0


def go_wrong_at(step: int, where: str, rank: int | None = None) -> None:
    """From now on the process kills itself in front of training step `step` ("step"), or while the
    checkpoint behind it is being written ("saving"); or it sleeps ("hang") or gets SIGUSR1
    ("signal"), or a layer gives what is not finite ("nan") or hands back such a gradient
    ("gradient"), or a folder cannot be written ("unwritable"); or checkpoints hold the frozen
    weights, as they once did ("as before").
    rank: the only one that this happens to."""
    if rank is not None and rank != int(RANK):
        return
    if where == "as before":
        LLaVATrainer._save_optimizer_and_scheduler = Trainer._save_optimizer_and_scheduler
        LLaVATrainer._note_frozen = lambda *_: None
        return
    method = "_save_rng_state" if where in ("saving", "unwritable") else "training_step"
    original = getattr(LLaVATrainer, method)

    def going_wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= step and where in ("nan", "gradient"):
            layer = next(m for name, m in self.model.named_modules() if name.endswith("1.mlp"))
            fault = NotFiniteBehind.apply if where == "gradient" else lambda output: output / 0
            layer.register_forward_hook(lambda module, args, output: fault(output))
        elif where == "unwritable":
            raise PermissionError("no writing here")
        elif self.state.global_step >= step and where == "hang":
            time.sleep(10**6)
        elif self.state.global_step >= step:
            os.kill(os.getpid(), signal.SIGUSR1 if where == "signal" else signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(LLaVATrainer, method, going_wrong)


def check_timeouts(command: list[str]) -> None:
    """AssertionError if a process group waits for another time than the command asks for."""
    asked = float(command[command.index("--ddp_timeout") + 1])
    for group in distributed_c10d._world.pg_map:
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout.total_seconds() == asked, (group.group_desc, options._timeout)


def run(job: dict[str, Any], log: Path) -> int:
    """In the child: the command, with output in `log`; its exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ["MASTER_PORT"] = str(job["port"])
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(job["ranks"])
    if job["machines"]:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.chdir(job["machines"][int(RANK)])
    if job["kill"]:
        go_wrong_at(**job["kill"])
    try:
        main(job["command"])
        if job["ranks"] > 1:
            check_timeouts(job["command"])
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def child_of(job: dict[str, Any], base: Path) -> int:
    """Fork the job, wait for its end or its cancellation: its exit code (128 + signal)."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(run(job, Path(f"{base}.{RANK}.log")))

    def stop(*_: Any) -> None:
        os.kill(child, signal.SIGKILL)
        sys.exit(1)

    signal.signal(signal.SIGTERM, stop)  # the launcher ends its workers with it
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if Path(f"{base}.cancel").exists():
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def serve(folder: Path) -> None:
    """Take jobs in their order until there is a stop file, or the test process is gone."""
    number, parent = 0, os.getppid()
    while not (folder / "stop").exists() and os.getppid() == parent:
        base = folder / f"job-{number}"
        if not base.with_suffix(".json").exists():
            time.sleep(0.02)
            continue
        job = json.loads(base.with_suffix(".json").read_text())
        if job["last"]:  # as the launcher's own process
            sys.exit(run(job, Path(f"{base}.{RANK}.log")))
        code = child_of(job, base) if int(RANK) < job["ranks"] else 0
        Path(f"{base}.{RANK}.done").write_text(str(code))
        number += 1


if __name__ == "__main__":
    gc.freeze()  # accelerate and DeepSpeed collect in every job: 0.6 s for what was imported here
    serve(Path(sys.argv[1]))
