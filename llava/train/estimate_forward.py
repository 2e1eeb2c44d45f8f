"""What a training command computes in one step, made without a weight (`llava.train.estimate`).

Special here: nothing is predicted from a formula that could be run. The model of the command is
built as fake tensors (shapes without storage) from its config alone, frozen and given adapters by
the functions that a run uses, and one step's forward pass is made with them: what autograd keeps
is added up, layer by layer, with the plan's cuts and the precision of the run. So no weight is
read, a 7B model takes seconds, and a new family or method needs nothing here.
``llava train --estimate ...``
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import count_visual_tokens
from llava.model.builder import FAMILIES, config_object
from llava.model.multimodal_encoder.builder import tower_config
from llava.reduction.plan import resolve_plan
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_pinpoints,
)
from llava.train.estimate_state import SINGLE, Engine, Row
from llava.train.setup import (
    add_lora,
    freeze,
    keep_checkpoint_settings,
    read_config,
    vision_structure,
)

FUSED = (None, "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention backends that keep no scores for the backward pass: counted as sdpa."""


# --------------------------------------------------------------------------------------- the model
@dataclass(frozen=True)
class Command:
    """A training command, parsed but not prepared (`as_given`): nothing is loaded."""

    model: ModelArguments
    data: DataArguments
    flags: TrainingArguments
    engine: Engine


def build_model(command: Command) -> Any:
    """The model of the command in training mode, parts frozen, adapters added, the plan in its
    config, weights at random (under ``torch.device("meta")`` none). It reads config files alone."""
    args, flags, engine = copy.copy(command.model), command.flags, command.engine
    folder, raw = read_config(args)
    cls, config = FAMILIES[raw["model_type"]][1], config_object(raw)
    keep_checkpoint_settings(args, config)
    name = args.vision_tower
    args.pretrain_mm_mlp_adapter = None
    if name:
        config.mm_vision_tower = name
        config.mm_vision_config = vision_structure(raw, folder, name)
        config.mm_vision_select_layer = args.mm_vision_select_layer
        config.mm_vision_select_feature = args.mm_vision_select_feature
        config.mm_projector_type = args.mm_projector_type
        config.mm_patch_merge_type = args.mm_patch_merge_type
        config.mm_hidden_size = tower_config(config.mm_vision_config, name).hidden_size
    else:
        config.mm_vision_tower = config.mm_vision_config = None
    asked = flags.attn_implementation
    backend = "sdpa" if asked in FUSED else asked
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
