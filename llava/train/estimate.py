"""``llava train --estimate``: memory and time of a training command, before it starts.

Special here: nothing is predicted from a formula that could be run. The model of the command is
built as fake tensors (shapes without storage) from its config alone, frozen and given adapters by
the functions that a run uses, and one step's forward pass is made with them: what autograd keeps
is added up, layer by layer, with the plan's cuts and the precision of the run. So no weight is
read, a 7B model takes seconds, and a new family or method needs nothing here. Gradients and
optimizer states are counted from the parameters that are trained; how they are spread over ranks
is that of DeepSpeed ZeRO-1/2/3 (with offload), FSDP2 and DDP. What is not counted is said: the
allocator's waste, the libraries' own memory, kernels' workspaces.

Time needs a rate: ``--peak_tflops`` with ``--mfu``, or ``--bench``, a file of ``llava bench train
--json`` from the same kind of device. Without one there are FLOPs only.

    llava train --estimate --world_size 8 --deepspeed scripts/zero3.json --bf16 True \\
        --model_name_or_path vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336 \\
        --layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]" \\
        --per_device_train_batch_size 16 --gradient_checkpointing True --model_max_length 2048
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import count_visual_tokens
from llava.model.builder import FAMILIES, config_object
from llava.model.checkpoint_layout import read_json
from llava.model.multimodal_encoder.builder import tower_config, tower_structure
from llava.reduction.flops import TERA
from llava.reduction.plan import resolve_plan
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    build_parser,
    group_of,
    meant,
    parse_pinpoints,
)
from llava.train.fsdp import fsdp_settings
from llava.train.parts import optimizer_bytes, part_of
from llava.train.setup import (
    add_lora,
    check_plan,
    freeze,
    keep_checkpoint_settings,
    read_config,
)
from llava.train.telemetry import GIB, BatchCost
from llava.utils import Ranks, json_dump, user_errors

HALF, SINGLE = 2, 4
"""Bytes of a number in 16 and in 32 bit."""
ENGINES = ("single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
PERSISTENT, PREFETCHED = 10, 0.9
"""What "auto" means for ZeRO-3: parameters up to 10 x hidden numbers stay whole on every rank; 0.9
x hidden^2 numbers are fetched ahead (transformers, integrations/deepspeed.py)."""


# ------------------------------------------------------------------------------------- the command
@dataclass(frozen=True)
class Engine:
    """How the state of a run is spread over `ranks`.

    half: 16-bit computing. `name` is one of `ENGINES`; offload_*: kept in the host's memory.
    stays_whole: gathered layers are kept from the forward to the backward pass.
    """

    name: str
    ranks: int
    half: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False
    stays_whole: bool = False

    @classmethod
    def of(cls, flags: Any, ranks: int) -> Engine:
        """From --deepspeed, --fsdp and the precision. ValueError for a file that is not there or a
        stage that is not known."""
        half = bool(flags.bf16 or flags.fp16)
        if flags.deepspeed:
            zero = _settings(str(flags.deepspeed)).get("zero_optimization", {})
            stage = zero.get("stage", 0)
            if stage not in (0, 1, 2, 3):
                raise ValueError(f"ZeRO stage {stage!r} in {flags.deepspeed}; accepted: 0 to 3")
            away = {
                name: (zero.get(f"offload_{name}") or {}).get("device", "none") != "none"
                for name in ("optimizer", "param")
            }
            return cls(f"zero{stage}", ranks, half, away["optimizer"], away["param"])
        settings = fsdp_settings(flags.fsdp, flags.fsdp_config)
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


def _settings(text: str) -> dict[str, Any]:
    """--deepspeed, a file or the JSON object itself. ValueError, by name, for neither."""
    if not text.lstrip().startswith("{"):
        return read_json(Path(text), f"--deepspeed {text}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--deepspeed {text:.60}: {error}") from error


@dataclass(frozen=True)
class Command:
    """A training command, parsed but not prepared: nothing is joined, turned off or loaded."""

    model: ModelArguments
    data: DataArguments
    flags: Any
    engine: Engine


def read_command(argv: Sequence[str], ranks: int) -> Command:
    """Parse a training command line. ValueError for unknown flags and values that do not fit."""
    flags, unknown = build_parser().parse_known_args(list(argv))
    if unknown:
        raise ValueError(f"unknown flag(s): {' '.join(unknown)}{meant(unknown)}")
    model, data = group_of(ModelArguments, flags), group_of(DataArguments, flags)
    if (model.model_name_or_path is None) == (model.init_from_config is None):
        raise ValueError("give one of --model_name_or_path and --init_from_config")
    check_plan(model)
    return Command(model, data, flags, Engine.of(flags, ranks))


def build_model(command: Command) -> Any:
    """The model of the command in training mode, parts frozen, adapters added, the plan in its
    config, weights at random (under ``torch.device("meta")`` none). It reads config files alone."""
    args, flags, engine = copy.copy(command.model), command.flags, command.engine
    raw = read_config(args)[1]
    cls, config = FAMILIES[raw["model_type"]][1], config_object(raw)
    keep_checkpoint_settings(args, config)
    name = args.vision_tower
    args.pretrain_mm_mlp_adapter = None
    if name:
        own = raw.get("mm_vision_config") if raw.get("mm_vision_tower") == name else None
        config.mm_vision_tower = name
        config.mm_vision_config = own or tower_structure(name)
        config.mm_vision_select_layer = args.mm_vision_select_layer
        config.mm_vision_select_feature = args.mm_vision_select_feature
        config.mm_projector_type = args.mm_projector_type
        config.mm_patch_merge_type = args.mm_patch_merge_type
        config.mm_hidden_size = tower_config(config.mm_vision_config, name).hidden_size
    else:
        config.mm_vision_tower = config.mm_vision_config = None
    backend = flags.attn_implementation if flags.attn_implementation == "eager" else "sdpa"
    half = torch.float16 if flags.fp16 else torch.bfloat16
    dtype = half if engine.half and not engine.casts_weights else torch.float32
    model = cls._from_config(config, dtype=dtype, attn_implementation=backend)
    if name:
        model.get_model().initialize_vision_modules(args)
        config.image_aspect_ratio = command.data.image_aspect_ratio
        if config.image_aspect_ratio == "anyres":
            side = model.get_vision_tower().config.image_size
            config.image_grid_pinpoints = parse_pinpoints(command.data.image_grid_pinpoints, side)
    plan = resolve_plan(args.plan(), config)[0]
    plan.validate(config.num_hidden_layers)
    config.visual_token_reduction = plan.to_dict() if plan else None
    config.tokenizer_model_max_length = flags.model_max_length
    add_lora(model, args, flags)
    freeze(model, args, flags)
    return model.train()


def fake_model(command: Command) -> Any:
    """`build_model` without storage. Call it under a `FakeTensorMode`.

    peft and `freeze` change tensors in place, which fake ones do not allow; those of the meta
    device do, but autocast has no such device. So it is built of the one kind and made the other.
    """
    with torch.device("meta"):
        model = build_model(command)
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = made.get(id(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


# -------------------------------------------------------------------------------------- the sample
@dataclass(frozen=True)
class Sample:
    """What every sample of a micro-batch holds: text tokens behind `pictures` pictures of `size`
    (width, height), `visual` tokens in all. All text is taken to be learned."""

    text: int
    pictures: int = 0
    tiles: int = 1
    size: tuple[int, int] | None = None
    visual: int = 0

    @property
    def tokens(self) -> int:
        return self.text + self.visual


def samples_of(model: Any, command: Command, text: int, pictures: int) -> tuple[Sample, Sample]:
    """(a sample as asked for, the longest that --model_max_length lets through). ValueError when
    the pictures alone do not fit."""
    longest = command.flags.model_max_length
    tower = model.get_vision_tower()
    pictures = 0 if tower is None else pictures
    if not pictures:
        return Sample(min(text, longest)), Sample(longest)
    side, size, tiles = tower.config.image_size, None, 1
    if model.config.image_aspect_ratio == "anyres":
        size = tuple(max(model.config.image_grid_pinpoints, key=lambda pin: pin[0] * pin[1]))
        tiles = 1 + (size[0] // side) * (size[1] // side)
    counts = count_visual_tokens(
        [size or (side, side)] * pictures, model.config, side, tower.num_patches_per_side
    )
    visual = sum(counts)
    if visual >= longest:
        raise ValueError(
            f"{pictures} picture(s) of {visual} visual tokens do not fit --model_max_length "
            f"{longest} beside text"
        )
    sample = Sample(min(text, longest - visual), pictures, tiles, size, visual)
    return sample, dataclasses.replace(sample, text=longest - visual)


def batch_of(model: Any, sample: Sample, count: int) -> dict[str, Any]:
    """`count` samples as the collator makes them."""
    splicer = model.splicer
    ids = np.full((count, sample.pictures + sample.text), 1, dtype=np.int64)
    ids[:, : sample.pictures] = IMAGE_TOKEN_INDEX
    mask, labels = np.ones_like(ids, dtype=bool), ids.copy()
    labels[:, : sample.pictures] = IGNORE_INDEX
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }
    pictures = count * sample.pictures
    if pictures:
        side = splicer.tile_size
        tiles = [None] * pictures if sample.size is None else [sample.tiles] * pictures
        sizes = None if sample.size is None else [sample.size] * pictures
        stacked = torch.zeros(pictures * sample.tiles, 3, side, side)
        several = stacked.view(pictures, sample.tiles, 3, side, side).unbind(0)
        batch["images"] = stacked if sample.size is None else list(several)
        batch["image_sizes"] = sizes
        made = splicer.pictures(tiles, sizes)
    else:
        made = []
    words = {
        name: np.full((count, 1), 1, dtype=np.int64)
        for signal in resolve_plan(None, model.config)[0].texts
        for name in signal.alternatives
        if name != "all"
    }
    batch["splice"] = splicer(ids, mask, labels, made, "right", words)
    return batch


# --------------------------------------------------------------------------------- what is kept
@dataclass
class Kept:
    """Bytes that a forward pass leaves for the backward pass.

    saved: all that autograd keeps. checkpointed: the same when layers keep their inputs alone;
    again: what the largest layer keeps while it is computed once more. logits: rows of logits x
    vocabulary, in bytes of 32-bit numbers. used: id of each parameter that gets a gradient.
    """

    saved: int = 0
    checkpointed: int = 0
    again: int = 0
    logits: int = 0
    used: frozenset[int] = frozenset()


class _Storages:
    """Storages, each counted once; those of the model itself never."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.known = {_key(tensor) for tensor in known}
        self.found: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key not in self.known:
            self.found[key] = tensor.untyped_storage()

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.found.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Seen:
    """What hooks on the checkpointed layers and on autograd see of a forward pass."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        self.own = own
        self.saved, self.outside, self.inputs = (_Storages(own) for _ in range(3))
        self.layers: dict[int, _Storages] = {}
        self.current: list[int] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.current.append(id(module))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf.requires_grad for leaf in leaves):  # nothing is kept for a frozen tower
            for leaf in leaves:
                self.inputs.add(leaf)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.current.pop()

    def pack(self, tensor: Tensor) -> Tensor:
        self.saved.add(tensor)
        where = self.outside
        if self.current:
            where = self.layers.setdefault(self.current[-1], _Storages(self.own))
        where.add(tensor)
        return tensor

    def kept(self, logits: int, used: frozenset[int]) -> Kept:
        self.outside.found |= self.inputs.found
        again = max((layer.bytes for layer in self.layers.values()), default=0)
        return Kept(self.saved.bytes, self.outside.bytes, again, logits, used)


def used_parameters(loss: Tensor) -> frozenset[int]:
    """id of each parameter that a backward pass reaches: the layers of a trained tower behind the
    one that is read are not."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return frozenset(found)


def measure_kept(model: Any, forward: Callable[[], Any]) -> Kept:
    """What `forward`, a call of the model without checkpointing, leaves behind; for real tensors
    and for fake ones."""
    seen = _Seen([*model.parameters(), *model.buffers()])
    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            handles.append(module.register_forward_pre_hook(seen.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(seen.leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(seen.pack, lambda tensor: tensor):
            output = forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen.kept(SINGLE * output.logits.numel(), used_parameters(output.loss))


def kept_of(model: Any, command: Command, sample: Sample) -> Kept:
    """`measure_kept` of one micro-batch in the precision of the command."""
    count, engine = command.flags.per_device_train_batch_size, command.engine
    batch = batch_of(model, sample, count)
    half = torch.float16 if command.flags.fp16 else torch.bfloat16

    def forward() -> Any:
        with torch.autocast("cpu", dtype=half, enabled=engine.casts_weights):
            return model(**batch, logits_to_keep="targets")

    return measure_kept(model, forward)


# -------------------------------------------------------------------------------------- the state
@dataclass(frozen=True)
class Row:
    """A line of the table: bytes on the device and in the host's memory, of one rank."""

    name: str
    device: int = 0
    host: int = 0


def _share(numel: int, ranks: int) -> int:
    return math.ceil(numel / ranks)


def stored_bytes(name: str, parameter: nn.Parameter, flags: Any, width: int | None = None) -> int:
    """Bytes of a parameter as a rank holds the whole of it. width: bytes of a number, by default
    those of its type.

    --bits: a linear layer of the language model takes half a byte or one a weight, and its scales:
    64 weights share one (with --double_quant True 8 bit, and 32 bit for 256 of them), at 8 bit
    each row has one.
    """
    size = parameter.numel()
    quantised = (
        flags.bits != 16
        and part_of(name) == "language"
        and parameter.dim() == 2
        and name.endswith(("_proj.weight", "base_layer.weight"))
    )
    if not quantised:
        return size * (parameter.element_size() if width is None else width)
    if flags.bits == 8:
        return size + SINGLE * parameter.shape[0]
    blocks = math.ceil(size / 64)
    scales = blocks + SINGLE * math.ceil(blocks / 256) if flags.double_quant else SINGLE * blocks
    return math.ceil(size / 2) + scales


def state_rows(model: Any, command: Command, used: frozenset[int]) -> list[Row]:
    """Weights, gradients and optimizer of one rank. used: of `Kept`; DeepSpeed and FSDP2 keep room
    for every trained parameter, torch for those that get a gradient."""
    engine, flags = command.engine, command.flags
    named = list(dict(model.named_parameters()).items())  # a tied weight comes once
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    if engine.name in ("single", "ddp"):
        trained = [parameter for parameter in trained if id(parameter) in used]
    shapes = [parameter.shape for parameter in trained]
    states = optimizer_bytes(shapes, str(getattr(flags.optim, "value", flags.optim)))
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


def buffer_bytes(model: Any, command: Command, checkpointing: bool) -> int:
    """The engine's own buffers, about: gradient buckets, gathered layers; and under autocast with
    checkpointing the 16-bit copies of trained weights, which the whole forward pass keeps."""
    engine = command.engine
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


def activation_rows(kept: Kept, checkpointing: bool) -> list[Row]:
    """What a micro-batch adds at the start of the backward pass. The gradient of the logits, in 32
    bit and as it goes on in the layers' precision, is counted with them."""
    if not checkpointing:
        return [Row("activations", kept.saved), Row("gradient of the logits", kept.logits)]
    return [
        Row("activations (inputs of layers)", kept.checkpointed),
        Row("one layer computed again", kept.again),
        Row("gradient of the logits", kept.logits),
    ]


# ------------------------------------------------------------------------------------------ time
@dataclass(frozen=True)
class Rate:
    """FLOP/s that one device is taken to reach, and where that comes from. of_run: it is a whole
    run's, over the language model's FLOPs alone (as training's `mfu`); else that of the operations
    themselves, all of which are counted then."""

    flops: float
    source: str
    of_run: bool


def rate_of(peak_tflops: float | None, mfu: float | None, bench: str | None) -> Rate | None:
    """The rate that the flags give, None without one. ValueError for a peak without an MFU or the
    other way round, an MFU outside (0, 1], or a file that is not of ``llava bench train``."""
    if bench is not None:
        try:
            found = json.loads(Path(bench).read_text(encoding="utf-8"))
            tflops, ms = found["tflops"]["packed_plan"], found["packed_plan_ms"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--bench {bench}: no file of llava bench train --json") from error
        return Rate(tflops * TERA / ms * 1e3, f"{found['preset']} on {found['device']}", False)
    if mfu is None:
        return None
    if peak_tflops is None:
        raise ValueError(f"--mfu {mfu} needs --peak_tflops, the peak of one device")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu}; accepted: above 0, up to 1")
    return Rate(peak_tflops * TERA * mfu, f"{mfu:.0%} of {peak_tflops:g} TFLOP/s", True)


def time_of(model: Any, command: Command, sample: Sample, rate: Rate | None) -> dict[str, Any]:
    """FLOPs of a sample (`BatchCost`), and seconds of a step of all ranks at `rate`."""
    flags, ranks = command.flags, command.engine.ranks
    cost = BatchCost.of_model(model, bool(flags.gradient_checkpointing))
    batch = batch_of(model, sample, 1)
    work = cost.work(batch["splice"].layout, sample.pictures * sample.tiles)
    micro = flags.per_device_train_batch_size * int(flags.gradient_accumulation_steps)
    found: dict[str, Any] = {
        "samples_a_step": micro * ranks,
        "tokens_a_sample": work.tokens_in,
        "computed_tokens_a_sample": work.tokens_computed,
        "tflops_a_sample": work.flops / TERA,
        "recomputed_tflops_a_sample": work.again_flops / TERA,
        "tower_tflops_a_sample": work.tower_flops / TERA,
    }
    if rate is not None:
        rest = 0.0 if rate.of_run else work.again_flops + work.tower_flops
        found["seconds_a_step"] = micro * (work.flops + rest) / rate.flops
        found["rate"] = rate.source
    return found


# ---------------------------------------------------------------------------------------- report
@dataclass
class Estimate:
    """All figures of a command."""

    engine: str
    ranks: int
    parameters: dict[str, int]
    trained: dict[str, int]
    plan: str
    checkpointing: bool
    rows: list[Row]
    samples: dict[str, Sample]
    batches: dict[str, list[Row]]
    time: dict[str, Any] = field(default_factory=dict)

    def total(self, sample: str) -> Row:
        """What one rank needs at the start of a backward pass."""
        rows = [*self.rows, *self.batches[sample]]
        return Row("total", sum(r.device for r in rows), sum(r.host for r in rows))

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes, in bytes."""
        found = dataclasses.asdict(self)
        found["total"] = {name: dataclasses.asdict(self.total(name)) for name in self.batches}
        return found


def estimate(
    command: Command, *, text: int = 200, pictures: int = 1, rate: Rate | None = None
) -> Estimate:
    """The figures of a command; see the module's docstring. Samples have `text` tokens of text and,
    where there is a tower, `pictures` pictures."""
    engine, flags = command.engine, command.flags
    checkpointing = bool(flags.gradient_checkpointing)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(command)
        counts: dict[str, dict[str, int]] = {"all": {}, "trained": {}}
        for name, parameter in model.named_parameters():
            for key in ("all", *(["trained"] if parameter.requires_grad else [])):
                part = part_of(name)
                counts[key][part] = counts[key].get(part, 0) + parameter.numel()
        usual, longest = samples_of(model, command, text, pictures)
        found = time_of(model, command, usual, rate)
        samples = {"usual": usual, "longest": longest}
        kept = {name: kept_of(model, command, sample) for name, sample in samples.items()}
        rows = state_rows(model, command, kept["usual"].used)
        rows.append(Row("buffers, about", buffer_bytes(model, command, checkpointing)))
    return Estimate(
        engine=engine.name,
        ranks=engine.ranks,
        parameters=counts["all"],
        trained=counts["trained"],
        plan=str(resolve_plan(None, model.config)[0]),
        checkpointing=checkpointing,
        rows=rows,
        samples=samples,
        batches={name: activation_rows(each, checkpointing) for name, each in kept.items()},
        time=found,
    )


def format_estimate(found: Estimate, flags: Any) -> str:
    """The table that a terminal shows."""
    trained = ", ".join(f"{part} {count:,}" for part, count in found.trained.items())
    usual, longest = found.samples["usual"], found.samples["longest"]
    batch = flags.per_device_train_batch_size
    lines = [
        f"{sum(found.parameters.values()):,} parameters; trained: {trained}",
        f"plan: {found.plan}",
        f"one of {found.ranks} rank(s), {found.engine}; {batch} samples in a micro-batch, "
        f"checkpointing {'on' if found.checkpointing else 'off'}",
        "",
        f"{'GiB':<34}{f'{usual.tokens} tokens':>14}{f'{longest.tokens} tokens':>14}"
        + (f"{'host':>10}" if any(row.host for row in found.rows) else ""),
    ]
    for row in found.rows:
        lines.append(_line(row.name, row.device, row.device, row.host))
    for one, other in zip(found.batches["usual"], found.batches["longest"], strict=True):
        lines.append(_line(one.name, one.device, other.device, 0))
    totals = [found.total(name) for name in ("usual", "longest")]
    lines.append(_line("total", totals[0].device, totals[1].device, totals[0].host))
    lines += [
        f"A sample: {usual.visual} visual and {usual.text} text tokens, all text learned; the "
        "second column: every sample as long as --model_max_length.",
        "Not counted: the allocator's waste, workspaces of kernels, the libraries' own memory.",
    ]
    if flags.dual_speed:
        lines.append(
            "--dual_speed: these are fast steps; a slow one runs on all tokens (--reduction none), "
            "and under the plan once more without a gradient."
        )
    return "\n".join([*lines, "", *_time_lines(found.time)])


def _line(name: str, usual: int, longest: int, host: int) -> str:
    return f"{name:<34}{usual / GIB:>14.3f}{longest / GIB:>14.3f}" + (
        f"{host / GIB:>10.3f}" if host else ""
    )


def _time_lines(time: dict[str, Any]) -> list[str]:
    lines = [
        f"a sample: {time['tokens_a_sample']:.0f} tokens, {time['computed_tokens_a_sample']:.0f} "
        f"computed, {time['tflops_a_sample']:.4g} TFLOP (+ {time['recomputed_tflops_a_sample']:.4g}"
        f" computed again, {time['tower_tflops_a_sample']:.4g} tower and projector)"
    ]
    if "seconds_a_step" not in time:
        return [*lines, "no time: give --peak_tflops and --mfu, or --bench FILE"]
    seconds, per_step = time["seconds_a_step"], time["samples_a_step"]
    lines.append(
        f"a step of {per_step} samples: {seconds:.3g} s at {time['rate']}; "
        f"{seconds / per_step * 1e6 / 3600:.3g} h for a million samples"
    )
    return lines


# ----------------------------------------------------------------------------------- command line
def wanted(argv: Sequence[str]) -> bool:
    """Whether a training command asks for its estimate instead."""
    words = [*argv, ""]
    return any(
        word == "--estimate=True"
        or (word == "--estimate" and words[at + 1].lower() not in ("false", "0", "no"))
        for at, word in enumerate(argv)
    )


def own_parser() -> argparse.ArgumentParser:
    """The flags beside those of training."""
    parser = argparse.ArgumentParser(
        prog="llava train --estimate",
        description="Memory and time of a training command from its config alone; all flags of "
        "training are accepted beside these.",
        allow_abbrev=False,
    )
    parser.add_argument("--estimate", nargs="?", const="True", help=argparse.SUPPRESS)
    parser.add_argument("--world_size", type=int, help="ranks (default: of the environment, or 1)")
    parser.add_argument("--text_tokens", type=int, default=200, help="a sample's (default 200)")
    parser.add_argument("--pictures", type=int, default=1, help="a sample's (default 1)")
    parser.add_argument(
        "--mfu", type=float, help="share of --peak_tflops that is reached, e.g. 0.4"
    )
    parser.add_argument("--bench", metavar="FILE", help="of llava bench train --json: its rate")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too, in bytes")
    return parser


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava train --estimate``: see the module's docstring."""
    own, rest = own_parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
    for name, least in (("world_size", 1), ("text_tokens", 1), ("pictures", 0)):
        value = getattr(own, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}; accepted: {least} or more")
    ranks = own.world_size or Ranks.from_environment().world
    transformers.utils.logging.set_verbosity_error()  # a plain Llama config becomes a LLaVA config
    command = read_command(rest, ranks)
    rate = rate_of(command.flags.peak_tflops, own.mfu, own.bench)
    found = estimate(command, text=own.text_tokens, pictures=own.pictures, rate=rate)
    sys.stdout.write(format_estimate(found, command.flags) + "\n")
    if own.json:
        json_dump(own.json, found.to_dict())


if __name__ == "__main__":
    main()
