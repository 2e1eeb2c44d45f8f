"""Where a run goes on: the last whole checkpoint, for the engine and the number of ranks it has.

Special here: everything is judged before the model is loaded. A checkpoint of plain or DDP training
or of FSDP2 may go on with any number of ranks (one of FSDP2 in plain training too); one of ZeRO is
turned into DeepSpeed's universal form first, once, in a folder beside its own. A checkpoint gets
its name when it is complete (`llava.train.saving`), so an incomplete one comes from elsewhere: an
interrupted copy.
``python -m llava.train.train --resume_from_checkpoint out/checkpoint-500 ...``
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava.train.fsdp import STATE_FOLDER
from llava.train.ranks import from_all_ranks, while_others_wait
from llava.train.saving import remove_leftovers
from llava.utils import get_logger, warn_once_for_all

logger = get_logger(__name__)

ENGINES = {"DeepSpeed": "--deepspeed", "FSDP": "--fsdp", "plain": "neither --deepspeed nor --fsdp"}
"""Who writes checkpoints of their own kind -> the flags that ask for them."""


def checkpoint_to_resume(args: Any) -> str | None:
    """The folder to resume from, made ready for this run: the flag's, else the last whole
    checkpoint of the output folder, else None. Every rank calls it.

    ValueError, on every rank, for a folder that is incomplete on one, that not all of them find, or
    that this run cannot go on from.
    """
    if args.local_process_index == 0:
        remove_leftovers(Path(args.output_dir))
    folder, fault = None, ""
    try:
        folder = _own_choice(args)
    except ValueError as error:
        fault = str(error)
    found = from_all_ranks((folder and folder.name, fault))
    for name, problem in found:
        if problem:
            raise ValueError(problem)
        if name != found[0][0]:
            raise ValueError(
                f"rank 0 goes on from {found[0][0]}, another rank finds {name}: --output_dir "
                f"{args.output_dir} has to be on a disk that all machines share"
            )
    if folder is None:
        return None
    logger.info("going on from %s", folder)
    fit_engine(folder, args)
    return str(folder)


def _own_choice(args: Any) -> Path | None:
    """What this rank would go on from. ValueError for a folder that is incomplete."""
    wanted = what_to_resume(args)
    if wanted is False:
        return None
    if isinstance(wanted, str):
        folder, fault = Path(wanted), incomplete(Path(wanted))
        if fault:
            raise ValueError(f"--resume_from_checkpoint {wanted}: {fault}")
        return folder
    found = last_whole(Path(args.output_dir))
    if found is None and wanted:
        raise ValueError(f"--resume_from_checkpoint True: no whole checkpoint in {args.output_dir}")
    return found


def what_to_resume(args: Any) -> str | bool | None:
    """What the flags ask for: a folder, the last checkpoint (True), none (False), or the last one
    if there is any (None)."""
    wanted = args.resume_from_checkpoint
    wanted = {"True": True, "true": True, "False": False, "false": False}.get(wanted, wanted)
    return False if wanted is None and args.overwrite_output_dir else wanted


def last_whole(folder: Path) -> Path | None:
    """The checkpoint of the highest step that is complete; a warning names every one above it."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("*")]
    steps = sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)
    for _, path in steps:
        fault = incomplete(path)
        if not fault:
            return path
        warn_once_for_all(logger, "%s is left out: %s", path, fault)
    return None


def incomplete(folder: Path) -> str:
    """What a checkpoint folder lacks, "" if nothing."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not a whole checkpoint (no readable trainer_state.json)"
    latest = folder / "latest"
    if latest.is_file() and not (folder / latest.read_text().strip()).is_dir():
        return f"not a whole checkpoint (no {latest.read_text().strip()})"
    if _deepspeed_folder(folder) and not latest.is_file():
        return "not a whole checkpoint (DeepSpeed's file `latest` is missing)"
    return ""


def fit_engine(folder: Path, args: Any) -> None:
    """ValueError unless the run's engine can read the checkpoint; one of ZeRO with another number
    of ranks is converted, and the run set to read the result."""
    now = "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else "plain"
    shards = _deepspeed_folder(folder)
    then = "DeepSpeed" if shards else "FSDP" if (folder / STATE_FOLDER).is_dir() else "plain"
    if now != then and (now, then) != ("plain", "FSDP"):
        raise ValueError(
            f"{folder} was written with {ENGINES[then]}, this run has {ENGINES[now]}: go on with "
            "what it was written with, or start anew from its weights (--model_name_or_path)"
        )
    if shards is None:
        return
    ranks = len(list(shards.glob("*_optim_states.pt")))
    if ranks == args.world_size:
        return
    logger.info("%s was written by %d ranks, here are %d", folder, ranks, args.world_size)
    while_others_wait(partial(make_universal, shards), args.device)
    args.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = True


def is_universal(args: Any) -> bool:
    """Whether the run reads a universal checkpoint."""
    settings = args.hf_deepspeed_config.config if args.deepspeed else {}
    return bool(settings.get("checkpoint", {}).get("load_universal"))


def make_universal(shards: Path) -> None:
    """Write DeepSpeed's universal form of a ZeRO checkpoint beside it, unless it is there already.
    ValueError when it cannot be made (under ZeRO-3 there must be Adam's two moments)."""
    done = shards.parent / "latest_universal"
    if done.is_file():
        return
    module = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    target = str(shards.parent / f"{shards.name}_universal")
    paths = ["--input_folder", str(shards), "--output_folder", target, "--inject_missing_state"]
    result = subprocess.run([*module, *paths], capture_output=True, text=True)
    if result.returncode or not done.is_file():
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(
            f"{shards.parent} cannot be turned into a universal checkpoint, so only as many ranks "
            f"as wrote it can go on from it: {reason}"
        )


def restore_groups(optimizer: Any, scheduler: Any, decays: list[float]) -> None:
    """Put right what a universal checkpoint leaves under ZeRO-3: all groups come back with the
    first one's learning rate and weight decay, and all states with one tensor as their step, which
    an update then counts up once a state."""
    rates = scheduler.get_last_lr()
    for group, rate, decay in zip(optimizer.param_groups, rates, decays, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _deepspeed_folder(folder: Path) -> Path | None:
    found = [path for path in folder.glob("global_step*") if path.name[11:].isdigit()]
    return found[0] if found else None
