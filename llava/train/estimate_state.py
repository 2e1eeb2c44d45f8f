"""What one rank holds of weights, gradients and optimizer (`llava.train.estimate`).

Special here: all is counted from the parameters of a model whose parts are frozen as a run freezes
them; how they are spread over ranks is that of DeepSpeed ZeRO-0/1/2/3 (with offload), FSDP2 and
DDP. The buffers of these engines are rough. ``llava train --estimate --world_size 8 ...``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava.train.arguments import TrainingArguments
from llava.train.parts import optimizer_bytes, part_of

HALF, SINGLE = 2, 4
"""Bytes of a number in 16 and in 32 bit."""
PERSISTENT, PREFETCHED = 10, 0.9
"""What "auto" means for ZeRO-3: parameters up to 10 x hidden numbers stay whole on every rank; 0.9
x hidden^2 numbers are fetched ahead (transformers, integrations/deepspeed.py)."""


@dataclass(frozen=True)
class Engine:
    """How the state of a run is spread over `ranks`.

    name: single, ddp, zero0 to zero3, fsdp2. half: 16-bit computing. offload_*: kept in the host's
    memory. stays_whole: gathered layers are kept from the forward to the backward pass.
    """

    name: str
    ranks: int
    half: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False
    stays_whole: bool = False

    @classmethod
    def of(cls, flags: TrainingArguments, ranks: int) -> Engine:
        """From --deepspeed, --fsdp and the precision."""
        half = bool(flags.bf16 or flags.fp16)
        found = flags.settings()
        if found["deepspeed"]:
            zero = found["deepspeed"].get("zero_optimization", {})
            away = {
                name: (zero.get(f"offload_{name}") or {}).get("device", "none") != "none"
                for name in ("optimizer", "param")
            }
            return cls(
                f"zero{int(zero.get('stage', 0))}", ranks, half, away["optimizer"], away["param"]
            )
        settings = found["fsdp_config"]
        if settings:
            away = bool(settings.get("cpu_offload"))
            whole = not settings.get("reshard_after_forward", True)
            return cls("fsdp2", ranks, half, away, away, whole)
        return cls("single" if ranks == 1 else "ddp", ranks, half)

    @property
    def deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def casts_weights(self) -> bool:
        """Whether 16-bit computing is autocast over 32-bit weights."""
        return self.half and self.name in ("single", "ddp")


@dataclass(frozen=True)
class Row:
    """A line of the table: bytes on the device and in the host's memory, of one rank."""

    name: str
    device: int = 0
    host: int = 0


def _share(numel: int, ranks: int) -> int:
    return math.ceil(numel / ranks)


def can_be_quantised(name: str) -> bool:
    """Whether --bits holds for a parameter: the weights of the language model's linear layers, its
    head left out."""
    return part_of(name) == "language" and name.endswith(("_proj.weight", "base_layer.weight"))


def stored_bytes(
    name: str, parameter: nn.Parameter, flags: TrainingArguments, width: int | None = None
) -> int:
    """Bytes of a parameter as a rank holds the whole of it. width: bytes of a number, by default
    those of its type.

    --bits: a linear layer of the language model takes half a byte or one a weight, and its scales:
    64 weights share one (with --double_quant True 8 bit, and 32 bit for 256 of them and an offset),
    at 8 bit each row has one. What the numbers mean is a table of 16, and one of 256, a layer.
    """
    size = parameter.numel()
    if flags.bits == 16 or not can_be_quantised(name):
        return size * (parameter.element_size() if width is None else width)
    if flags.bits == 8:
        return size + SINGLE * parameter.shape[0]
    blocks = math.ceil(size / 64)
    scales = SINGLE * (blocks + 16)
    if flags.double_quant:
        scales = blocks + SINGLE * (math.ceil(blocks / 256) + 1 + 16 + 256)
    return math.ceil(size / 2) + scales


def state_rows(
    model: Any, engine: Engine, flags: TrainingArguments, used: frozenset[int]
) -> list[Row]:
    """Weights, gradients and optimizer of one rank. used: of `Kept`; DeepSpeed and FSDP2 keep room
    for every trained parameter, torch for those that get a gradient."""
    named = list(dict(model.named_parameters()).items())  # a tied weight comes once
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    if engine.name in ("single", "ddp"):
        trained = [parameter for parameter in trained if id(parameter) in used]
    shapes = [parameter.shape for parameter in trained]
    states = optimizer_bytes(shapes, flags.optim)
    count = sum(parameter.numel() for parameter in trained)
    width = HALF if engine.half and engine.deepspeed else SINGLE
    if engine.name in ("single", "ddp"):
        held = sum(stored_bytes(name, parameter, flags) for name, parameter in named)
        gradients = sum(p.numel() * p.element_size() for p in trained)
        return [Row("weights", held), Row("gradients", gradients), Row("optimizer", states)]
    if engine.name == "fsdp2":
        return _fsdp_rows([parameter for _, parameter in named], states / (SINGLE * count), engine)
    split = sum(_share(parameter.numel(), engine.ranks) for _, parameter in named)
    # DeepSpeed keeps a 32-bit copy of what its optimizer updates, whatever the precision.
    sharing = 1 if engine.name == "zero0" else engine.ranks
    states = _share(states + SINGLE * count, sharing)
    if engine.name == "zero3":
        small = sum(p.numel() for _, p in named if p.numel() <= PERSISTENT * _hidden(model))
        held, whole = width * split, width * small
        weights = Row("weights", whole, held) if engine.offload_parameters else Row(
            "weights", held + whole
        )  # fmt: skip
    else:
        weights = Row("weights", sum(stored_bytes(name, p, flags, width) for name, p in named))
    whole_gradients = engine.name in ("zero0", "zero1")
    gradients = width * (count if whole_gradients else _share(count, sharing))
    if engine.offload_optimizer:
        on_host = SINGLE * _share(count, sharing)
        return [weights, Row("gradients", 0, on_host), Row("optimizer", 0, states)]
    return [weights, Row("gradients", gradients), Row("optimizer", states)]


def _fsdp_rows(parameters: Sequence[nn.Parameter], states: float, engine: Engine) -> list[Row]:
    """FSDP2 deals out the rows of each parameter, the first rank's share being the largest, in 32
    bit. states: of the optimizer, for each trained number."""
    shares = [(p.numel() // p.shape[0] * _share(p.shape[0], engine.ranks), p) for p in parameters]
    mine = SINGLE * sum(share for share, p in shares if p.requires_grad)
    sizes = {
        "weights": SINGLE * sum(share for share, _ in shares),
        "gradients": mine,
        "optimizer": math.ceil(states * mine),
    }
    away = engine.offload_parameters
    return [Row(name, 0 if away else size, size if away else 0) for name, size in sizes.items()]


def _hidden(model: Any) -> int:
    return model.config.hidden_size


def buffer_bytes(model: Any, engine: Engine, checkpointing: bool) -> int:
    """The engine's own buffers, about: gradient buckets, gathered layers; and under autocast with
    checkpointing the 16-bit copies of trained weights, which the whole forward pass keeps."""
    width = HALF if engine.half else SINGLE
    layer = max(
        sum(parameter.numel() for parameter in layer.parameters())
        for layer in model.get_model().layers
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() * p.element_size() for p in trained) if engine.name == "ddp" else 0
    if engine.casts_weights and checkpointing:
        total += HALF * sum(p.numel() for p in trained if p.dim() == 2)
    if engine.name in ("zero0", "zero1", "zero2"):
        total += 2 * width * _hidden(model) ** 2
    if engine.name == "zero3":
        total += int(width * (2 * layer + (1 + PREFETCHED) * _hidden(model) ** 2))
    if engine.name == "fsdp2":
        # The root's own parameters (tower, projector) are gathered once a step.
        root = sum(p.numel() for name, p in model.named_parameters() if part_of(name) != "language")
        gathered = len(model.get_model().layers) if engine.stays_whole else 2
        total += width * (gathered * layer + root) + SINGLE * layer
    return total
