"""transformers' Trainer with LLaVA's habits: grouped batches, a learning rate for each part,
projector-only checkpoints, the mean of means as loss.

Special here: the loss is the mean over the targets of a micro-batch, averaged over micro-batches,
as LLaVA trained (``loss_mean="batch"``); transformers' default today is the mean over all targets
of a step (``"tokens"``). In the projector stage a checkpoint is ``mm_projector.bin`` (image newline
included) beside config.json, and a run resumes from it. Source: LLaVA-1.5 llava_trainer.py.
``python -m llava.train.train --tune_mm_mlp_adapter True ...``
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, trainer_pt_utils
from transformers.integrations import TensorBoardCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, rotate_checkpoints
from transformers.trainer_utils import seed_worker

from llava.constants import IGNORE_INDEX
from llava.train.callbacks import FollowEpochs, OneCurve, ProgressLines
from llava.train.dual_speed import DualSpeed, without_isolator
from llava.train.files import saving
from llava.train.frozen import FROZEN_FILE, check_frozen, hashes, left_out, may_be_missing
from llava.train.fsdp import STATE_FOLDER, load_state, save_state, shard_on_cpu
from llava.train.lora import Adapters
from llava.train.nan_guard import stop_not_finite
from llava.train.parts import optimizer_groups
from llava.train.probe import Probe
from llava.train.ranks import WaitAtMost
from llava.train.resume import is_universal, restore_groups
from llava.train.safety import StepGuard, StopOnSignal, in_own_groups
from llava.train.sampler import (
    EpochSeeded,
    LengthGroupedSampler,
    TokenBudgetBatches,
    by_chance,
    in_turn,
)
from llava.train.saving import (
    PROJECTOR_FILE,
    STAGING,
    caching_config,
    gathered_state,
    load_projector_state,
    projector_state,
    publish,
    remove_leftovers,
    staging_folder,
)
from llava.train.telemetry import REPLACED, meter_of
from llava.utils import atomic_write, get_logger, json_dump

logger = get_logger(__name__)


def data_seed(args: Any) -> int:
    """The seed of the samples' order: --data_seed, else --seed."""
    return args.seed if args.data_seed is None else args.data_seed


class LLaVATrainer(Trainer):
    """Trainer for `LazySupervisedDataset` and our `TrainingArguments`.

    `projector_only`: checkpoints hold mm_projector.bin and the config instead of the whole model.
    `adapters`: they hold a LoRA run's files instead. `image_processor`: saved with both kinds of
    models, so that they are complete without the tower's folder. `dual_speed`: which steps run
    under its plan, and which on all tokens with a teacher.
    `resume`: the checkpoint that the caller goes on from (`checkpoint_to_resume`).
    """

    def __init__(
        self,
        *args: Any,
        projector_only: bool = False,
        adapters: Adapters | None = None,
        image_processor: Any = None,
        dual_speed: DualSpeed | None = None,
        resume: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.dual_speed = dual_speed
        self.checkpoints_go_to: Path | None = None
        self.shares_disk = True
        """Whether this rank sees rank 0's --output_dir."""
        self.resume = resume
        self.frozen: dict[str, Any] | None = None
        """Hashes of the frozen weights, once they are known."""
        if self.is_deepspeed_enabled:
            may_be_missing(self.model)
        self.image_processor = image_processor
        self.projector_only = projector_only
        self.adapters = adapters
        self.model_accepts_loss_kwargs = self.args.loss_mean == "tokens"
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressLines())
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(OneCurve())
        self.meter = meter_of(self.model, self.args)
        self.add_callback(self.meter.totals)
        scaled = getattr(self.accelerator, "mixed_precision", "no") == "fp16"
        self.guard = StepGuard(self.args.device, nan_guard=self.args.nan_guard, scaled=scaled)
        self.add_callback(StopOnSignal(self.guard))
        self.add_callback(WaitAtMost(self))
        self.train_order: EpochSeeded | TokenBudgetBatches | None = None
        self.add_callback(FollowEpochs(self))
        if self.args.probe_samples:
            self.add_callback(Probe(self, self.args.probe_samples, self.args.probe_steps))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:  # accelerate turns it on for GPUs alone
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

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
        elif args.train_sampling_strategy == "sequential":
            order = partial(in_turn, len(dataset))
        else:
            order = partial(by_chance, len(dataset))
        self.train_order = EpochSeeded(data_seed(args), len(dataset), order)
        return self.train_order

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own, or with a token budget one of batches that are filled by tokens."""
        args, dataset = self.args, self.train_dataset
        if not args.token_budget:
            return in_own_groups(super().get_train_dataloader())
        self.train_order = TokenBudgetBatches(
            dataset.token_lengths,
            args.token_budget,
            args.world_size * args.gradient_accumulation_steps,
            data_seed(args),
            dataset.describe,
        )
        logger.info(self.train_order.summary())
        workers = args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=self.train_order,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )
        return in_own_groups(self.accelerator.prepare(loader))

    # -- figures -----------------------------------------------------------------------------------
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple:
        """As Trainer's; the wait and what was fetched are counted."""
        with self.meter.waiting():
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        cost = self.meter.cost
        if self.dual_speed is not None and cost is not None:
            cost = self.dual_speed.cost(cost, self.state.global_step)
        for batch in batches:
            self.meter.count(batch, cost)
        return batches, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the telemetry of all ranks beside the loss, and without the figures
        that it stands for."""
        if "loss" in logs:
            logs |= self.meter.report()
        super().log({k: v for k, v in logs.items() if k not in REPLACED}, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; its time is left out of all rates."""
        with self.meter.left_out():
            return super().evaluate(*args, **kwargs)

    # -- loss --------------------------------------------------------------------------------------
    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Targets of a step over all micro-batches and ranks; None for the mean of means."""
        if self.args.loss_mean == "batch" or not batch_samples:
            return None
        # The first token of a row is never predicted.
        counts = [batch["labels"][:, 1:].ne(IGNORE_INDEX).sum() for batch in batch_samples]
        return self.accelerator.gather(torch.stack(counts).sum().to(device)).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss on the rows that have a target; validation takes the batch's mean."""
        forward = partial(
            model,
            **{name: value for name, value in inputs.items() if name != "ids"},
            logits_to_keep="targets",
            loss_mean="batch" if num_items_in_batch is None else "tokens",
            num_items_in_batch=num_items_in_batch,
        )
        if self.dual_speed is not None and model.training:
            outputs = self.dual_speed(forward, self.state.global_step, num_items_in_batch)
        else:
            outputs = forward()
        loss = outputs.loss
        if num_items_in_batch is not None:  # gradients and logged losses are averaged over ranks
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # -- a step's end ------------------------------------------------------------------------------
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.saw(inputs, loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; called once a step in front of the update, where the ranks agree
        whether the step is good and the run goes on."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        verdict = self.guard.judge(norm)
        if verdict.not_finite:
            stop_not_finite(self, self.guard, verdict)
        self.guard.stopping = verdict.signal
        self.guard.forget()
        return norm

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
        self.decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        return self.optimizer

    # -- files -------------------------------------------------------------------------------------
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Called on every rank, because sharded weights are put together by all of them. What is
        not saved (the frozen language model of the projector stage and of LoRA) is not gathered."""
        keep = self.args.should_save
        if self.projector_only:
            self._save(output_dir, projector_state(self.model, keep=keep))
        elif self.adapters is not None:
            self._save(output_dir, self.adapters.state(self.model, keep=keep))
        elif self.is_fsdp_enabled:
            self._save(output_dir, gathered_state(self.model, keep=keep))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a whole new model beside the old files, then move it there file by file."""
        if not self.args.should_save:
            return
        target = Path(output_dir or self.args.output_dir)
        if self.dual_speed is not None and target == Path(self.args.output_dir):
            whole = self.model.state_dict() if state_dict is None else state_dict
            state_dict = without_isolator(whole)  # the finished model; a run resumes with it
        with caching_config(self.model), staging_folder(target) as staging:
            if self.image_processor is not None and not self.projector_only:
                self.image_processor.save_pretrained(staging)
            if self.projector_only:
                self.model.config.save_pretrained(staging)
                with atomic_write(staging / PROJECTOR_FILE, "wb") as file:
                    torch.save(state_dict, file)
            elif self.adapters is not None:
                self.adapters.save(self.model, staging, state_dict)
            else:  # under the model's own names, however its base was read
                self.model.save_pretrained(
                    staging, state_dict=state_dict, save_original_format=False
                )
            if self.processing_class is not None:
                self.processing_class.save_pretrained(staging)
            torch.save(self.args, staging / "training_args.bin")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Every rank writes beside the earlier checkpoints; the folder gets its name when all are
        done, and only then do old ones go. Killed at any moment, there is a whole one."""
        self.meter.flush()  # the sums belong to the checkpoint
        what = f"the checkpoint of step {self.state.global_step}"
        with self.meter.left_out(), saving(what, self.args.output_dir):
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        home, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.checkpoints_go_to = home / STAGING
        written = self.checkpoints_go_to / name
        tidies = self.is_local_process_zero() and not self.shares_disk
        if tidies or self.is_world_process_zero():
            remove_leftovers(home)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                self._note_frozen(written)
        except BaseException:
            if self.is_local_process_zero():  # room for others on a full disk
                shutil.rmtree(home / STAGING, ignore_errors=True)
            raise
        finally:
            self.checkpoints_go_to = None
        self._name_best_checkpoint(written, home / name)
        self.accelerator.wait_for_everyone()
        # Where machines share no disk, each keeps its part. On a shared one nobody but rank 0 looks
        # for the folder: network file systems go on showing it when it has got its name.
        if self.is_world_process_zero() or (tidies and written.exists()):
            publish(written, home / name)
            shutil.rmtree(home / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(home), self.args.save_total_limit, best, use_mtime=True)

    def _note_frozen(self, folder: Path) -> None:
        if self.frozen is None:
            self.frozen = hashes(self.model)
        if self.frozen and self.args.should_save:
            json_dump(folder / FROZEN_FILE, self.frozen)

    def _get_output_dir(self, trial: Any) -> str:
        folder = self.checkpoints_go_to
        return super()._get_output_dir(trial) if folder is None else str(folder)

    def _name_best_checkpoint(self, written: Path, final: Path) -> None:
        """The state remembers the best checkpoint by its path; this one is about to move."""
        if self.state.best_model_checkpoint != str(written):
            return
        self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_state(self.model, self.optimizer, output_dir)
        elif self.is_deepspeed_enabled:
            with left_out(self.model):
                self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if (folder / STATE_FOLDER).is_dir():
            load_state(self.model, self.optimizer, folder)
            schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
            if is_universal(self.args):
                restore_groups(self.optimizer, self.lr_scheduler, self.decays)
        self.frozen = check_frozen(self.model, folder, universal=is_universal(self.args))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if (Path(resume_from_checkpoint) / STATE_FOLDER).is_dir():
            return  # the weights come with the optimizer
        projector = Path(resume_from_checkpoint) / PROJECTOR_FILE
        if self.projector_only and projector.is_file():
            load_projector_state(self.model if model is None else model, projector)
            return
        if self.adapters is not None:
            self.adapters.load(self.model if model is None else model, Path(resume_from_checkpoint))
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
