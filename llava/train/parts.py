"""The parts of a model that are trained or frozen apart, and their optimizer groups.

Special here: a part is known from a parameter's name alone, under any wrapper. Source: LLaVA-1.5
llava_trainer.py (create_optimizer). ``python -m llava.train.train --mm_projector_lr 2e-5 ...``
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

PROJECTOR = "mm_projector"
NEWLINE = "image_newline"
ISOLATOR = "mode_isolator"
TOWER = "vision_tower"


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: projector, tower or language."""
    if any(each in name for each in (PROJECTOR, NEWLINE, ISOLATOR)):
        return "projector"
    return "tower" if TOWER in name else "language"


def optimizer_groups(
    model: nn.Module,
    *,
    decay: set[str],
    weight_decay: float,
    rates: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    """Trainable parameters as optimizer groups, one per (part, decays or not) that is not empty.

    `decay` are the names that weight decay applies to; `rates` the learning rate of a part
    (``part_of``), None or absent for the common one.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        rate = rates.get(part)
        key = (part if rate is not None else "common", name in decay)
        if key not in groups:
            groups[key] = {"params": [], "weight_decay": weight_decay if key[1] else 0.0}
            if rate is not None:
                groups[key]["lr"] = rate
        groups[key]["params"].append(parameter)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen")
    return [groups[key] for key in sorted(groups, key=str)]


def optimizer_bytes(shapes: Iterable[Sequence[int]], optim: str) -> int:
    """Bytes of an optimizer's states for float32 weights of these shapes, in memory as on disk;
    single numbers (a step count each) are left out. ValueError for an --optim that is not known."""
    name = optim.removeprefix("paged_")
    states = 2 if name.startswith("adamw") else 1 if name.startswith("lion") else 0
    if not states and name not in ("sgd", "adafactor"):
        raise ValueError(
            f"--optim {optim}: its memory is not known; accepted: adamw*, lion*, sgd, adafactor"
        )
    total = 0
    for shape in shapes:
        count = math.prod(shape)
        if states:  # of a byte each in 8 bit, where a tensor is not too small for it
            total += count * states * (1 if "8bit" in name and count >= 4096 else 4)
        elif name == "adafactor":  # rows and columns of a matrix
            total += 4 * (sum(shape[-2:]) * math.prod(shape[:-2]) if len(shape) > 1 else count)
    return total
