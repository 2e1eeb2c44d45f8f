"""Two gloo ranks for the tests of this folder: started once, then given one command after another.

And the recipe that the ranks and the single process train alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from test_train import command, losses, pictures  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
RANKS, TIMEOUT, STEPS = 2, 300, 8
ENDED = 1
"""Exit code of torchrun when one of its processes has failed."""


class Ranks:
    """Two processes that wait for training commands in `folder` (see worker.py)."""

    def __init__(self, home: Path) -> None:
        self.home, self.launches = home, 0
        # DeepSpeed builds its operators once. In the user's own folder a lock that a killed build
        # has left would hang the job; here the first launch removes it, when nobody else builds.
        build = Path(os.environ["TORCH_EXTENSIONS_DIR"])  # tests/conftest.py
        build.mkdir(parents=True, exist_ok=True)
        self.builds = (build / ".launches").open("w")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.builds, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lock in build.glob("**/lock"):
                lock.unlink()
        fcntl.flock(self.builds, fcntl.LOCK_SH)
        self._launch()

    def _launch(self) -> None:
        self.folder, self.jobs = self.home / f"launch-{self.launches}", 0
        self.launches += 1
        self.folder.mkdir()
        beside = Path(sys.executable).parent
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
        worker = [str(Path(__file__).with_name("worker.py")), str(self.folder)]
        self.output = (self.folder / "launcher.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *worker],
            cwd=ROOT, env=environment, stdout=self.output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def codes(
        self,
        arguments: list[str],
        kill: dict[str, Any] | None = None,
        ranks: int = RANKS,
        machines: Sequence[Path] = (),
    ) -> list[int]:
        """Run a command on both ranks, or on one; the exit codes. Behind the first that fails
        the other has five seconds. machines: folders in which the ranks run, each as the only one
        of its machine."""
        job = {"command": arguments, "kill": kill, "ranks": ranks, "last": False}
        base = self._hand_out({**job, "machines": [str(machine) for machine in machines]})
        files = [Path(f"{base}.{rank}.done") for rank in range(RANKS)]
        end = time.monotonic() + TIMEOUT
        while True:
            texts = [file.read_text() if file.exists() else "" for file in files]
            if all(texts):
                return [int(text) for text in texts]
            if any(text not in ("", "0") for text in texts):
                end = min(end, time.monotonic() + 5)
            if time.monotonic() > end:
                Path(f"{base}.cancel").touch()
            if self.process.poll() is not None:
                log = (self.folder / "launcher.log").read_text()
                raise RuntimeError(f"the launcher ended: {log}")
            time.sleep(0.02)

    def launcher_code(self, arguments: list[str], kill: dict[str, Any]) -> int:
        """Run a command in the launcher's own processes: the launcher's exit code. Others take
        their place if there are more commands."""
        job = {"command": arguments, "kill": kill, "ranks": RANKS, "machines": [], "last": True}
        self._hand_out(job)
        return self.process.wait(TIMEOUT)

    def _hand_out(self, job: dict[str, Any]) -> Path:
        """Tell the ranks of a job; the path in front of its files' endings."""
        if self.process.poll() == ENDED:
            self.output.close()
            self._launch()
        base, self.jobs = self.folder / f"job-{self.jobs}", self.jobs + 1
        draft = base.with_suffix(".draft")
        draft.write_text(json.dumps({**job, "port": free_port()}))
        draft.rename(base.with_suffix(".json"))
        return base

    def logs(self) -> list[str]:
        """What the ranks wrote during the last command."""
        base = self.folder / f"job-{self.jobs - 1}"
        logs = [Path(f"{base}.{rank}.log") for rank in range(RANKS)]
        return [log.read_text() if log.exists() else "" for log in logs]

    def run(self, arguments: list[str], ranks: int = RANKS) -> str:
        """Run a command to its end; its output. AssertionError if a rank fails or does not end."""
        codes = self.codes(arguments, ranks=ranks)
        ends = "".join(f"\n--- rank {rank}\n{log[-4000:]}" for rank, log in enumerate(self.logs()))
        assert codes == [0] * RANKS, f"exit codes {codes}{ends}"
        return "".join(self.logs())

    def close(self) -> None:
        (self.folder / "stop").touch()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
        self.output.close()
        self.builds.close()


def recipe(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run in which a rank's batch is one sample. SGD: an error of a gradient's size
    shows, which Adam's first steps would hide."""
    flags = dict(flags)
    return {
        "model_name_or_path": folder / flags.pop("model_name_or_path", "base"),
        "pretrain_mm_mlp_adapter": folder / "mm_projector.bin",
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "optim": "sgd",
        "use_cpu": True,
        "ddp_timeout": 200,  # worker.py looks for it
        **pictures(folder, flags.pop("data_path", "mixed.json")),
        **flags,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has saved: the projector's file, LoRA's two, or the whole model's."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.name in ("mm_projector.bin", "non_lora_trainables.bin"):
            found |= torch.load(file, weights_only=True)
    return found


def need_deepspeed() -> None:
    """Skip by name without DeepSpeed or a compiler for its operators; in CI that is a failure."""
    lacking = []
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        lacking.append("deepspeed")
    lacking += [tool for tool in ("g++", "ninja") if _find_tool(tool) is None]
    if lacking:
        text = f"ZeRO is not tested here: no {', '.join(lacking)}"
        if os.environ.get("LLAVA_REQUIRE_DEEPSPEED") == "1":
            pytest.fail(text)
        pytest.skip(text)


def _find_tool(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)
