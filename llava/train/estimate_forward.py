"""What a training command computes in one step, made without a weight (`llava.train.estimate`).

Special here: nothing is predicted from a formula that could be run. The model of the command is
built as fake tensors (shapes without storage) from its config alone, frozen and given adapters by
the functions that a run uses, and one forward and backward pass is made with them, with the plan's
cuts, the checkpointing and the precision of the run, while the storages that are alive are added
up. So no weight is read, a 7B model takes seconds, and a new family or method needs nothing here.
``llava train --estimate ...``
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import count_visual_tokens
from llava.model.builder import FAMILIES, config_object
from llava.model.multimodal_encoder.builder import tower_config
from llava.reduction.plan import ReductionPlan, resolve_plan
from llava.sequence import Kind
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_pinpoints,
)
from llava.train.dual_speed import DualSpeed
from llava.train.estimate_state import Engine, Row, can_be_quantised
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

    @property
    def checkpointing(self) -> bool:
        """Under either of transformers' two names; the new one wins."""
        new = getattr(self.flags, "activation_checkpointing", None)
        return bool(self.flags.gradient_checkpointing if new is None else new)


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
    if command.checkpointing:
        found = flags.settings()
        new = found.get("activation_checkpointing_kwargs")
        old = model.gradient_checkpointing_enable  # the older name, which later versions warn of
        enable = getattr(model, "activation_checkpointing_enable", old)
        enable(new or found["gradient_checkpointing_kwargs"])
    return model.train()


def fake_model(command: Command) -> Any:
    """`build_model` without storage. Call it under a `FakeTensorMode`.

    peft and `freeze` change tensors in place, which fake ones do not allow; those of the meta
    device do, but autocast has no such device. So it is built of the one kind and made the other.
    Dropout is what it is on a GPU, where a mask takes a byte a number.
    """
    flags = command.flags
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
    for name, module in model.named_modules():
        if type(module) is nn.Dropout:
            module.forward = partial(torch.native_dropout, p=module.p, train=True)
            module.register_forward_hook(lambda module, args, output: output[0])
        if type(module) is nn.Linear and can_be_quantised(f"{name}.weight") and flags.bits != 16:
            module.forward = partial(_quantised_linear, module, flags.bits)
    return model


class _Quantised(torch.autograd.Function):
    """A frozen linear layer as bitsandbytes holds tensors: its output has the type of its input
    even under autocast; at 8 bit it keeps its input by itself, which no checkpointing sees."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bits: int) -> Tensor:
        ctx.inputs, ctx.weight = inputs if bits == 8 else None, weight
        return inputs.new_empty(*inputs.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.weight.to(gradients[0].dtype, copy=True)
        return gradients[0] @ weight, None, None


def _quantised_linear(module: Any, bits: int, inputs: Tensor) -> Tensor:
    output = _Quantised.apply(inputs, module.weight, bits)
    return output if module.bias is None else output + module.bias


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
    """(a sample as asked for, the longest that --model_max_length and --token_budget let through).
    ValueError when the pictures alone do not fit."""
    flags = command.flags
    limits = {"model_max_length": flags.model_max_length}
    if flags.token_budget:
        limits["token_budget"] = flags.token_budget
    limit = min(limits, key=lambda name: limits[name])
    longest = limits[limit]
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
            f"{pictures} picture(s) of {visual} visual tokens do not fit --{limit} {longest} "
            "beside text"
        )
    sample = Sample(min(text, longest - visual), pictures, tiles, size, visual)
    return sample, dataclasses.replace(sample, text=longest - visual)


def micro_batch(command: Command, sample: Sample) -> int:
    """How many such samples a rank takes at once."""
    flags = command.flags
    if flags.token_budget:
        return max(1, flags.token_budget // sample.tokens)
    return flags.per_device_train_batch_size


def batch_of(
    model: Any,
    sample: Sample,
    count: int,
    plan: ReductionPlan | None = None,
    kind: Kind = "right",
) -> dict[str, Any]:
    """`count` samples as the collator makes them. plan: the one whose texts they bring, by default
    that of the model's config."""
    splicer = model.splicer
    ids = np.full((count, sample.pictures + sample.text), 1, dtype=np.int64)
    ids[:, : sample.pictures] = IMAGE_TOKEN_INDEX
    mask, labels = np.ones_like(ids, dtype=bool), ids.copy()
    signals = resolve_plan(plan, model.config)[0].texts
    names = {name for signal in signals for name in signal.alternatives}
    prompt = int("all" in names)  # a token of the prompt's own text for those that compare with it
    labels[:, : sample.pictures + prompt] = IGNORE_INDEX
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
    words = {name: np.full((count, 1), 1, dtype=np.int64) for name in sorted(names - {"all"})}
    batch["splice"] = splicer(ids, mask, labels, made, kind, words)
    return batch


# --------------------------------------------------------------------------------- what is kept
@dataclass(frozen=True)
class Kept:
    """Bytes that one micro-batch takes beside the model and its gradients.

    held: at the start of the backward pass: what the forward pass leaves for it. most: at the
    fullest moment of both. used: id of each parameter that gets a gradient.
    """

    held: int
    most: int
    used: frozenset[int]


class _Alive(TorchDispatchMode):
    """Within the block: bytes of the storages that operations make, each from the operation that
    makes it until its last tensor is gone. `now`, and the `most` there were at once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.made: dict[int, Any] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.made:
            return

        def gone(_: Any) -> None:
            del self.made[key]
            self.now -= size

        self.made[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


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
    """One forward pass of fake tensors, `forward`, and its backward pass, onto gradients that are
    there already, as in any micro-batch of a step but its first."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with _Alive([*parameters, *model.buffers(), *gradients]) as alive:
        loss = forward().loss
        held, used = alive.now, used_parameters(loss)
        loss.backward()
    return Kept(held, alive.most, used)


def step_of(
    model: Any, command: Command, sample: Sample, speed: DualSpeed | None = None
) -> Callable[[], Any]:
    """The forward pass of one micro-batch, to be called, in the precision of the command. speed:
    with a share of 0 or 1, what runs a fast or a slow step (`llava.train.dual_speed`)."""
    flags = command.flags
    mixes = flags.packed and flags.attn_implementation == "eager"  # scores over the whole pack
    count, kind = micro_batch(command, sample), "packed" if mixes else "right"
    batch = batch_of(model, sample, count, None if speed is None else speed.plan, kind)
    half = torch.float16 if flags.fp16 else torch.bfloat16

    def forward() -> Any:
        run = partial(model, **batch, logits_to_keep="targets")
        with torch.autocast("cpu", dtype=half, enabled=command.engine.casts_weights):
            return run() if speed is None else speed(run, 0)

    return forward


def kept_of(model: Any, command: Command, sample: Sample, speed: DualSpeed | None = None) -> Kept:
    """`measure_kept` of a `step_of`."""
    return measure_kept(model, step_of(model, command, sample, speed))


def activation_rows(kept: Kept, checkpointing: bool) -> list[Row]:
    """What a micro-batch adds at its fullest moment."""
    name = "activations (inputs of layers)" if checkpointing else "activations"
    return [Row(name, kept.held), Row("backward pass, beyond them", kept.most - kept.held)]
