"""Before the first step: can this run save what it will have learned?

Special here: everything small is really written, through the trainer's own saving code, into a
folder of its own beside the checkpoints, and read back: config, generation config, tokenizer, image
processor, training arguments, random states, and the weights with every tensor cut down to one
element (so names, tied weights and renamings are real, and the file is small). What is large is
counted and compared with the free space. Runs were lost at their end to each of these: a generation
config that transformers refuses to save, tied weights that safetensors refuses, a full disk.
``python -m llava.train.train --save_rehearsal True ...``
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from llava.model.tokenizers import read_tokenizer
from llava.train.parts import NEWLINE, PROJECTOR, optimizer_bytes
from llava.train.ranks import from_all_ranks
from llava.utils import describe_error, get_logger

logger = get_logger(__name__)


def rehearse(trainer: Any, facts: Mapping[str, Any]) -> None:
    """Save everything small and check the space for the rest; all ranks call it and end alike.

    facts: what is known already of train_summary.json. Raises ValueError, on every rank, naming
    what could not be saved and on which rank.
    """
    folder = Path(trainer.args.output_dir)
    problem = ""
    try:
        _write_small(trainer, folder)
        if trainer.args.should_save:
            check_gathering(trainer)
            json.dumps(facts, allow_nan=False)
            check_space(trainer)
    except Exception as error:  # whatever it is, it would end the run when it is too late
        problem = f"{type(error).__name__}: {describe_error(error)}"
    problems = {i: text for i, text in enumerate(from_all_ranks(problem)) if text}
    if not problems:
        return
    rank, text = next(iter(problems.items()))
    raise ValueError(
        f"the run could not save to {folder} (rank {rank}): {text} "
        "(--save_rehearsal False starts without this check)"
    )


def _write_small(trainer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=folder) as name:
        trainer._save_rng_state(name)
        if not trainer.args.should_save:
            return
        trainer._save(name, state_dict=tiny_state(trainer.model))
        model, written = trainer.model, Path(name)
        if (written / "config.json").is_file():
            type(model.config).from_pretrained(written)
        if (written / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(written)
        if trainer.processing_class is not None:
            read_tokenizer(written)


def is_zero3(args: Any) -> bool:
    """Whether DeepSpeed splits the weights of this run."""
    settings = getattr(args, "hf_deepspeed_config", None)
    return settings is not None and settings.is_zero3()


def check_gathering(trainer: Any) -> None:
    """ValueError for ZeRO-3 that would leave shards and no weights that can be loaded."""
    if not is_zero3(trainer.args):
        return
    settings = trainer.args.hf_deepspeed_config
    if trainer.projector_only or trainer.adapters is not None:
        return  # these put their weights together themselves
    for name in ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save"):
        if settings.get_value(f"zero_optimization.{name}"):
            return
    raise ValueError(
        "the run would end without a model.safetensors: the --deepspeed file has to set "
        "zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
    )


def tiny_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with one element a tensor; names that share a tensor still do."""
    tiny: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        key = _identity(value)
        if key not in tiny:
            tiny[key] = torch.zeros((1,) * value.dim(), dtype=value.dtype)
        state[name] = tiny[key]
    return state


def _identity(value: Tensor) -> int:
    """The same for names of one tensor; a sharded weight has no memory of its own to go by."""
    return (0 if hasattr(value, "device_mesh") else value.data_ptr()) or id(value)


# ------------------------------------------------------------------------------------------- space
class Sizes(NamedTuple):
    """Bytes of the model's folder, of a checkpoint, and of the largest single file."""

    model: int
    checkpoint: int
    largest: int


def sizes(trainer: Any) -> Sizes:
    """What will be written, from the parameters, their types and the optimizer. Frozen weights are
    in the model's own files alone, and where that is a part of the model in none."""
    args = trainer.args
    sharded = bool(args.deepspeed) or bool(getattr(trainer, "is_fsdp_enabled", False))
    half = bool(args.deepspeed) and (args.bf16 or args.fp16)  # its engine turns the weights into it
    seen: set[int] = set()
    saved = trained_bytes = 0
    shapes = []
    for name, value in trainer.model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or _identity(value) in seen:
            continue
        seen.add(_identity(value))
        count = int(getattr(value, "ds_numel", value.numel()))
        size = count * (2 if half and value.is_floating_point() else value.element_size())
        saved += size if _is_saved(trainer, name, value) else 0
        if value.requires_grad:
            trained_bytes += size
            shapes.append(tuple(getattr(value, "ds_shape", value.shape)))
    state = _state_bytes(shapes, str(getattr(args.optim, "value", args.optim)))
    if args.deepspeed:
        state += 4 * sum(map(math.prod, shapes))  # its float32 copies
    if sharded and not is_zero3(args):  # ZeRO-3 keeps the float32 copies alone
        state += trained_bytes
    resumable = 0 if args.save_only_model else state
    largest = max(min(saved, 50 * 10**9), resumable // (args.world_size if sharded else 1))
    return Sizes(saved, saved + resumable, largest)


def _state_bytes(shapes: list[tuple[int, ...]], optim: str) -> int:
    try:
        return optimizer_bytes(shapes, optim)
    except ValueError:  # one that is not known: as AdamW
        return optimizer_bytes(shapes, "adamw")


def _is_saved(trainer: Any, name: str, value: Tensor) -> bool:
    """Whether a checkpoint's weights hold this one: the whole model, or the stage's part of it."""
    if trainer.projector_only:
        return PROJECTOR in name or NEWLINE in name
    return value.requires_grad or not trainer.args.lora_enable


def planned_checkpoints(trainer: Any) -> int:
    """How many checkpoints this run will write."""
    args = trainer.args
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    per_epoch = _steps_per_epoch(trainer)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    if strategy == "epoch":
        return max(math.ceil(steps / per_epoch), 1)
    every = args.save_steps if args.save_steps >= 1 else math.ceil(steps * args.save_steps)
    return math.ceil(steps / every)


def _steps_per_epoch(trainer: Any) -> int:
    args = trainer.args
    if args.token_budget:  # how many batches there are depends on the samples' lengths
        batches = len(trainer.get_train_dataloader())
    else:
        batches = math.ceil(len(trainer.train_dataset) / args.train_batch_size / args.world_size)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def needed_bytes(size: Sizes, planned: int, existing: int, limit: int | None) -> int:
    """Free bytes that the fullest moment of the run asks for.

    A new checkpoint is written before the oldest is removed; at the end the model stands beside
    those that are kept. existing: checkpoints that are there already; limit: --save_total_limit.
    """
    total = planned + existing
    kept = min(total, limit) if limit else total
    while_saving = min(total, kept + 1) * size.checkpoint if planned else 0
    at_the_end = kept * size.checkpoint + size.model
    return max(while_saving, at_the_end) - min(existing, total) * size.checkpoint


def check_space(trainer: Any) -> None:
    """OSError if the free space or the size allowed for a file is less than what will be needed."""
    args, size = trainer.args, sizes(trainer)
    folder = Path(args.output_dir)
    planned = planned_checkpoints(trainer)
    existing = len(list(folder.glob("checkpoint-*")))
    needed = max(needed_bytes(size, planned, existing, args.save_total_limit), size.model)
    free = shutil.disk_usage(folder).free
    logger.info(
        "disk: %s GB free, %s GB needed: %d checkpoint(s) of %s GB (kept: %s), the model of %s GB",
        _gb(free), _gb(needed), planned, _gb(size.checkpoint), args.save_total_limit or "all",
        _gb(size.model),
    )  # fmt: skip
    if needed > free:
        raise OSError(
            f"the run needs {_gb(needed)} GB and {_gb(free)} GB are available: {planned} "
            f"checkpoint(s) of {_gb(size.checkpoint)} GB"
            + (f" (--save_total_limit {args.save_total_limit})" if args.save_total_limit else "")
            + f" and the model of {_gb(size.model)} GB; give a smaller --save_total_limit, a "
            "larger --save_steps, or another --output_dir"
        )
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if allowed != resource.RLIM_INFINITY and size.largest > allowed:
        raise OSError(
            f"a file of {_gb(size.largest)} GB is needed and `ulimit -f` allows {_gb(allowed)} GB"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 10**7 else f"{size / 1e9:.5f}"
