"""transformers' Trainer with LLaVA's habits: grouped batches, a learning rate for each part,
projector-only checkpoints, the mean of means as loss.

Special here: the loss is the mean over the targets of a micro-batch, averaged over micro-batches,
as LLaVA trained (``loss_mean="batch"``); transformers' default today is the mean over all targets
of a step (``"tokens"``). In the projector stage a checkpoint is ``mm_projector.bin`` (image newline
included) beside config.json, and a run resumes from it. Source: LLaVA-1.5 llava_trainer.py.
``python -m llava.train.train --tune_mm_mlp_adapter True ...``
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    trainer_pt_utils,
)

from llava.constants import IGNORE_INDEX
from llava.train.sampler import EpochSeeded, LengthGroupedSampler
from llava.utils import atomic_write, get_logger

logger = get_logger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR = "mm_projector"
NEWLINE = "image_newline"
TOWER = "vision_tower"


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: projector, tower or language."""
    if PROJECTOR in name or NEWLINE in name:
        return "projector"
    return "tower" if TOWER in name else "language"


def projector_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The projector's parameters (and the image newline) on the CPU, keyed as in the checkpoint;
    with <im_start> and <im_end> the input embeddings too."""
    wanted = [PROJECTOR, NEWLINE]
    if getattr(model.config, "mm_use_im_start_end", False):
        wanted.append("embed_tokens")
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if any(part in name for part in wanted)
    }


def load_projector_state(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load `projector_state` from a file; ValueError when the keys are not the model's."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = set(projector_state(model))
    if set(state) != own:
        raise ValueError(f"{path} holds {sorted(state)}, the model needs {sorted(own)}")
    model.load_state_dict(state, strict=False)


class LLaVATrainer(Trainer):
    """Trainer for `LazySupervisedDataset` and our `TrainingArguments`.

    `projector_only`: checkpoints hold mm_projector.bin and the config instead of the whole model.
    `image_processor`: saved with a whole model, so that it is complete without the tower's folder.
    """

    def __init__(
        self, *args: Any, projector_only: bool = False, image_processor: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.image_processor = image_processor
        self.projector_only = projector_only
        self.model_accepts_loss_kwargs = self.args.loss_mean == "tokens"
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressLines())

    # -- data --------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        args = self.args
        accumulate = args.gradient_accumulation_steps
        if args.group_by_modality_length:
            order = partial(
                LengthGroupedSampler,
                args.train_batch_size,
                args.world_size * accumulate,
                dataset.modality_lengths,
                True,
            )
        elif args.group_by_length:
            order = partial(
                trainer_pt_utils.LengthGroupedSampler,
                args.train_batch_size * accumulate,
                None,
                dataset.lengths,
                None,
            )
        else:
            return super()._get_train_sampler(dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochSeeded(seed, len(dataset), order)

    # -- loss --------------------------------------------------------------------------------------
    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Targets of a step over all micro-batches; None for the mean of means."""
        if self.args.loss_mean == "batch" or not batch_samples:
            return None
        # The first token of a row is never predicted.
        counts = [batch["labels"][:, 1:].ne(IGNORE_INDEX).sum() for batch in batch_samples]
        return torch.stack(counts).sum().to(device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss on the rows that have a target; validation takes the batch's mean."""
        outputs = model(
            **inputs,
            logits_to_keep="targets",
            loss_mean="batch" if num_items_in_batch is None else "tokens",
            num_items_in_batch=num_items_in_batch,
        )
        loss = outputs.loss
        return (loss, outputs) if return_outputs else loss

    # -- optimizer ---------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups by part of the model (each with its learning rate) and weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        target = self.model if model is None else model
        groups = optimizer_groups(
            target,
            decay=set(self.get_decay_parameter_names(target)),
            weight_decay=self.args.weight_decay,
            rates={"projector": self.args.mm_projector_lr, "tower": self.args.mm_vision_tower_lr},
        )
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
        self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    # -- files -------------------------------------------------------------------------------------
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a whole new model beside the old files, then move it there file by file."""
        if not self.args.should_save:
            return
        target = Path(output_dir or self.args.output_dir)
        with caching_config(self.model), _staging_folder(target) as staging:
            if self.projector_only:
                self.model.config.save_pretrained(staging)
                with atomic_write(staging / PROJECTOR_FILE, "wb") as file:
                    torch.save(projector_state(self.model), file)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(staging)
                torch.save(self.args, staging / "training_args.bin")
            else:
                super()._save(str(staging), state_dict)
                if self.image_processor is not None:
                    self.image_processor.save_pretrained(staging)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        projector = Path(resume_from_checkpoint) / PROJECTOR_FILE
        if self.projector_only and projector.is_file():
            load_projector_state(self.model if model is None else model, projector)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)


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


@contextlib.contextmanager
def caching_config(model: Any) -> Iterator[None]:
    """Save with ``use_cache`` on: training turns it off, a checkpoint is for generation."""
    before = model.config.use_cache
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = before


@contextlib.contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`'s files whose content is moved into `target` if all went well."""
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        for file in sorted(staging.iterdir()):
            file.chmod(0o666 & ~umask)
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class ProgressLines(TrainerCallback):
    """One line a logging step: step, loss, learning rate, samples per second, time left."""

    def __init__(self) -> None:
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()
        self.first_step = state.global_step

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or not ({"loss", "eval_loss"} & set(logs)):
            return
        done = state.global_step - self.first_step
        seconds = time.monotonic() - self.started
        per_step = seconds / done if done else 0.0
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if "eval_loss" in logs:
            parts.append(f"validation loss {logs['eval_loss']:.4f}")
        else:
            parts += [
                f"loss {logs['loss']:.4f}",
                f"grad {float(logs.get('grad_norm', 0.0)):.2f}",
                f"lr {logs.get('learning_rate', 0.0):.2e}",
                f"{batch / per_step if per_step else 0.0:.1f} samples/s",
                f"left {_clock(per_step * (state.max_steps - state.global_step))}",
            ]
        logger.info("  ".join(parts))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
