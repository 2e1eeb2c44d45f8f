"""What the ranks of a run say to one another, and how long they wait for an answer.

Special here: ``--ddp_timeout`` holds for every process group. transformers hands it to the first
group alone, and on GPUs alone; torch gives a group that is made later (DeepSpeed reduces gradients
over one of its own) its default, whatever the first one has. So groups are told once they exist.
``torchrun --nproc_per_node 8 -m llava.train.train --ddp_timeout 600 ...``
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState


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


# ------------------------------------------------------------------------------------------ waiting
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
