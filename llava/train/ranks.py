"""What the ranks of a run say to one another, and how long they wait for an answer.

Special here: ``--ddp_timeout`` holds for every process group. transformers hands it to the first
group alone, and on GPUs alone; torch gives a group that is made later (DeepSpeed reduces gradients
over one of its own) its default, whatever the first one has. So groups are told once they exist.
What ranks find on their own machine's disk is compared, because a rank that reads other data or
another checkpoint, or none, would train something else or leave the others waiting.
``torchrun --nproc_per_node 8 -m llava.train.train --ddp_timeout 600 ...``
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.utils import describe_error


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def highest(values: list[int], device: torch.device) -> list[int]:
    """The largest of each value over the ranks. All ranks call it."""
    if not several_ranks():
        return values
    flags = torch.tensor(values, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.tolist()


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's `value` in rank order. All ranks call it."""
    if not several_ranks():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


# ---------------------------------------------------------------------------------------- agreement
def agreed(facts: Mapping[str, Any]) -> None:
    """ValueError, on every rank, for one of the `facts` that ranks do not have in common."""
    everybody = from_all_ranks(dict(facts))
    for name in facts:
        first = everybody[0][name]
        odd = [rank for rank, theirs in enumerate(everybody) if theirs[name] != first]
        if odd:
            raise ValueError(
                f"the ranks differ in {name}: {first!r:.100} on rank 0, "
                f"{everybody[odd[0]][name]!r:.100} on rank {', '.join(map(str, odd[:8]))}"
                f"{', ...' if odd[8:] else ''}; give every machine the same command and files"
            )


def sees_rank_0(folder: Path) -> bool:
    """Whether this rank finds in `folder` what rank 0 writes there. All ranks call it."""
    if not several_ranks():
        return True
    mark = Path(f".disk-{uuid.uuid4().hex}")  # a new name: nobody's cache says that it is not there
    mark = folder / from_all_ranks(mark)[0]
    first, problem = dist.get_rank() == 0, ""
    try:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    except OSError as error:  # the others wait for this rank
        problem = describe_error(error)
    problem = from_all_ranks(problem)[0]
    if problem:
        raise OSError(f"{folder} cannot be written to: {problem}")
    found = mark.exists()
    from_all_ranks(None)  # everybody has looked
    if first:
        mark.unlink(missing_ok=True)
    return found


# ------------------------------------------------------------------------------------------ waiting
def while_others_wait(work: Callable[[], None], device: torch.device) -> None:
    """Rank 0 does `work`, however long it takes: the others hear of it once a second, so no
    collective waits for longer. Its ValueError is raised on every rank. All ranks call it."""
    if not several_ranks():
        work()
        return
    problem = None
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(work) if dist.get_rank() == 0 else None
        while True:
            if job is not None:
                wait([job], timeout=1)
            if highest([int(job is not None and job.done())], device)[0]:
                break
        try:
            if job is not None:
                job.result()
        except ValueError as error:
            problem = str(error)
    problem = from_all_ranks(problem)[0]
    if problem is not None:
        raise ValueError(problem)


def wait_at_most(seconds: float, *groups: Any) -> None:
    """Collectives of these process groups, by default of the first one, fail when another rank has
    not joined them for so long."""
    if not several_ranks():
        return
    for group in groups or (dist.group.WORLD,):
        group.set_timeout(timedelta(seconds=seconds))


class WaitAtMost(TrainerCallback):
    """Gives ``--ddp_timeout`` to the groups that DeepSpeed has made with its engine. FSDP2's mesh
    is the first group, as are DDP's and that of ZeRO-3's weights."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.is_deepspeed_enabled:
            engine = self.trainer.model_wrapped
            wait_at_most(args.ddp_timeout, engine.data_parallel_group)
