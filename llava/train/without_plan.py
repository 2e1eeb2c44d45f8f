"""The first steps of a training command without its plan, for ``--compare_steps N``.

Special here: before a process joins the others or reads a weight, it runs those steps in a process
of its own: same command, data, order, ranks and launcher, so a model that needs ZeRO-3 is measured
under ZeRO-3, and the run itself starts afterwards as if nothing had been. (Restoring weights and
optimizer behind steps in place would need room for both.) The child writes no checkpoint, only its
times, which `llava.train.compare` reads; it ends with its parent, or with another rank's child.

    llava train --layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]" \\
        --compare_steps 50 ...
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llava.reduction.plan import resolve_plan
from llava.train.arguments import ModelArguments, build_parser, group_of, parse_args
from llava.train.communication import PROBED, CommunicationProbe
from llava.train.compare import FOLDER, LEAST_STEPS, NONE_FILE, warm_up_of
from llava.train.resume import last_whole, what_to_resume
from llava.train.safety import EXIT_PREEMPTED, STOP_SIGNALS, RunStopped
from llava.train.setup import read_config
from llava.train.step_times import over_ranks, watch_steps
from llava.utils import Ranks, get_logger, json_dump, rank, user_errors

logger = get_logger("llava.train.without_plan")

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
    command = [sys.executable, "-m", "llava.train.without_plan", *argv, *words]
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
            "steps": [asdict(step) for step in joined],
            "communication": sum(w[0] for w in waits) / len(waits) if several else None,
            "warm_up": warm_up_of(steps),
        }
        json_dump(Path(training_args.output_dir) / NONE_FILE, found)


if __name__ == "__main__":
    main()
