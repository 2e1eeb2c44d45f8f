"""The training entry point: parse, load, freeze, fit, save.

Special here: one entry point for every stage. A language model of a supported family or a LLaVA
checkpoint is the base, or a config.json with random weights; with or without a vision tower, so a
text-only stage runs through the same code. The plan is written into config.json and used from the
first step. A run writes into a staging folder first, so nothing is left half written. Sources:
LLaVA-1.5 train.py, PyramidDrop pdrop_train.py.

    python -m llava.train.train --model_name_or_path vicuna-7b-v1.5 --version plain \\
        --data_path captions.json --image_folder images --vision_tower clip-vit-large-patch14-336 \\
        --mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True --mm_vision_select_layer -2 \\
        --layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]" --output_dir out
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.model.model_card import SUMMARY_FILE, write_card
from llava.reduction.plan import resolve_plan
from llava.train import estimate
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_args
from llava.train.callbacks import TellFacts
from llava.train.compare import Comparison, format_line
from llava.train.dataset import (
    Collator,
    ImageReader,
    LazySupervisedDataset,
    check_first_samples,
    supervised_text,
)
from llava.train.dual_speed import dual_speed_of
from llava.train.files import check_checkpoint, reading, saving
from llava.train.flag_checks import check_environment, check_launcher
from llava.train.llava_trainer import LLaVATrainer, data_seed
from llava.train.preprocess import training_template
from llava.train.ranks import agreed, sees_rank_0, wait_at_most
from llava.train.records import Records, parse_sources
from llava.train.rehearsal import rehearse
from llava.train.resume import checkpoint_to_resume
from llava.train.safety import EXIT_PREEMPTED, RunStopped
from llava.train.setup import (
    add_image_tokens,
    add_lora,
    check_plan,
    check_vision,
    freeze,
    load_model,
    load_tokenizer,
    write_settings,
)
from llava.train.telemetry import changed_flags, run_figures
from llava.train.token_counts import count_tokens
from llava.train.without_plan import run_without_plan
from llava.utils import environment, get_logger, json_dump, set_seed, user_errors, warn_once_for_all

logger = get_logger("llava.train.train")


# -------------------------------------------------------------------------------------------- data
def check_paths(
    model_args: ModelArguments, data_args: DataArguments, output_dir: str | None
) -> None:
    """FileNotFoundError for a file or folder that is not there, ValueError for an output folder
    that cannot be, or that is the base's own, before anything large is loaded."""
    check_output(output_dir, model_args)
    folders = [data_args.image_folder]
    for path in (data_args.data_path, data_args.eval_data_path):
        folders += [source.image_folder for source in parse_sources(path)] if path else []
    for folder in folders:
        if folder and not Path(folder).is_dir():
            raise FileNotFoundError(f"image folder not found: {folder}")
    adapter = model_args.pretrain_mm_mlp_adapter
    if adapter and not Path(adapter).is_file():
        raise FileNotFoundError(
            f"--pretrain_mm_mlp_adapter not found: {adapter} (the projector stage writes it)"
        )


def check_output(output_dir: str | None, model_args: ModelArguments) -> None:
    """ValueError for an output folder that cannot be made or written to, or that holds what the run
    starts from, which its end would overwrite."""
    if output_dir is None:
        return
    if not output_dir.strip():
        raise ValueError("--output_dir is empty; give a folder")
    target = Path(output_dir).resolve()
    for flag in ("model_name_or_path", "init_from_config", "vision_tower", "tokenizer_path"):
        source = getattr(model_args, flag)
        if source and Path(source).is_dir() and Path(source).resolve() == target:
            raise ValueError(
                f"--output_dir {output_dir} is --{flag}, which would be overwritten; give another"
            )
    there = next(path for path in (target, *target.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"--output_dir {output_dir}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {output_dir}: {there} cannot be written to")


def make_datasets(
    model: Any,
    tokenizer: Any,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> tuple[LazySupervisedDataset, LazySupervisedDataset | None]:
    """The training set and, if asked for, the validation set."""
    reader, plan = None, resolve_plan(None, model.config)[0]
    tower = model.get_vision_tower() if model_args.vision_tower else None
    if tower is not None:
        reader = ImageReader(
            tower.image_processor,
            model.config,
            patches_per_side=int(tower.num_patches**0.5),
            folder=data_args.image_folder or "",
            cache_mb=data_args.image_cache_mb,
        )

    def dataset(path: str, left_out: str | None = None) -> LazySupervisedDataset:
        records = Records.open(
            path, seed=data_seed(training_args), cache_dir=data_args.data_cache_dir
        )
        made = LazySupervisedDataset(
            records.without_listed(left_out) if left_out else records,
            tokenizer,
            training_template(model_args.version),
            reader=reader,
            max_length=training_args.model_max_length,
            label_mode=data_args.label_mode,
            use_im_start_end=model_args.mm_use_im_start_end,
            cache_text=data_args.cache_text,
            skip_bad_samples=data_args.skip_bad_samples,
            texts=plan.texts,
        )
        check_first_samples(made)
        return made

    train = dataset(str(data_args.data_path), data_args.skip_samples)
    return train, dataset(data_args.eval_data_path) if data_args.eval_data_path else None


def show_samples(dataset: LazySupervisedDataset, tokenizer: Any, count: int) -> None:
    """Write the supervised text of the first samples to stdout."""
    for index in range(min(count, len(dataset))):
        spans = supervised_text(dataset[index], tokenizer.decode)
        sys.stdout.write(f"{dataset.describe(index)}: {json.dumps(spans, ensure_ascii=False)}\n")


# --------------------------------------------------------------------------------------------- run
def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[LLaVATrainer | None, dict[str, int]]:
    """Everything up to the first step, and how many parameters of each part are trained; no trainer
    when samples were only to be shown."""
    check_paths(model_args, data_args, training_args.output_dir)
    start_processes(training_args)
    resume = checkpoint_to_resume(training_args)
    set_seed(training_args.seed)
    transformers.utils.logging.disable_progress_bar()
    check_plan(model_args)
    check_vision(model_args, data_args, training_args)
    transformers.utils.logging.set_verbosity_error()  # what it warns of is judged by check_parts
    tokenizer = load_tokenizer(model_args, training_args.model_max_length)
    try:
        model = load_model(model_args, training_args)
    except ImportError as error:  # an attention backend whose package is missing
        raise ValueError(f"the model needs a package that is not installed: {error}") from error
    transformers.utils.logging.set_verbosity_warning()
    write_settings(model, tokenizer, model_args, data_args, training_args)
    add_image_tokens(model, tokenizer, model_args)
    adapters = add_lora(model, model_args, training_args)
    counts = freeze(model, model_args, training_args)
    logger.info("trained parameters: %s", ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    train_set, eval_set = make_datasets(model, tokenizer, model_args, data_args, training_args)
    logger.info("%s: %d samples", data_args.data_path, len(train_set))
    if data_args.dry_run_data:
        if training_args.process_index == 0:
            show_samples(train_set, tokenizer, data_args.dry_run_data)
        return None, counts
    if training_args.token_budget:
        counts_N2 = count_tokens(train_set, data_args.data_cache_dir)
        train_set.token_lengths = counts_N2.sum(1)
    trainer = LLaVATrainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=Collator(tokenizer.pad_token_id, model.splicer, training_args.packed),
        processing_class=tokenizer,
        projector_only=model_args.tune_mm_mlp_adapter,
        adapters=adapters,
        resume=resume,
        image_processor=getattr(model.get_vision_tower(), "image_processor", None),
        dual_speed=dual_speed_of(model, model_args, training_args),
    )
    return trainer, counts


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """One training run from parsed arguments; returns what is written to train_summary.json."""
    trainer, counts = make_trainer(model_args, data_args, training_args)
    if trainer is None:
        return {}
    check_checkpoint(trainer.resume, trainer.model.config)
    facts = {
        "samples": len(trainer.train_dataset),
        "trained_parameters": counts,
        "plan": trainer.model.config.visual_token_reduction,
        "data_hash": trainer.train_dataset.records.data_hash,
        "flags": changed_flags(model_args, data_args, training_args),
        "seed": training_args.seed,
        "data_seed": training_args.data_seed,
        "environment": environment(),
    }
    agreed(facts_in_common(trainer, facts))
    trainer.shares_disk = sees_rank_0(Path(training_args.output_dir))
    if not trainer.shares_disk and training_args.local_process_index == 0:
        logger.warning(
            "this machine does not see rank 0's --output_dir %s: each keeps a part of a "
            "checkpoint, and no run can go on from it",
            training_args.output_dir,
        )
    if training_args.save_rehearsal:
        rehearse(trainer, facts)
    trainer.add_callback(TellFacts(trainer, told(trainer, model_args, data_args, facts)))
    comparison = Comparison(trainer)
    with trainer.guard.catching_signals():
        result = fit(trainer)
        compared = comparison.finish()
        trainer.meter.flush()
        with saving("the model", training_args.output_dir):
            trainer.save_state()
            trainer.save_model(training_args.output_dir)
        trainer.meter.flush()
    return {
        **run_figures(trainer.meter),
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "order_hash": trainer.train_order.order_hash(),
        "dual_speed": trainer.dual_speed and trainer.dual_speed.facts(result.global_step),
        "compare": compared,
        **facts,
    }


BATCHES = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "max_steps", "num_train_epochs", "save_steps", "eval_steps", "logging_steps", "probe_steps",
)  # fmt: skip
"""Flags that say when ranks meet."""


def facts_in_common(trainer: LLaVATrainer, facts: dict[str, Any]) -> dict[str, Any]:
    """What every rank has to find the same: on several machines each reads its own command and, it
    may be, its own copy of the data. Lengths: with anyres they follow from the pictures."""
    names = ("data_hash", "samples", "seed", "data_seed", "plan", "trained_parameters")
    common = {name: facts[name] for name in names}
    validation, lengths = trainer.eval_dataset, trainer.train_dataset.token_lengths
    if validation is not None:
        common["hash of the validation data"] = validation.records.data_hash
    if lengths is not None:
        common["tokens"] = int(lengths.sum(dtype="int64"))
    return common | {f"--{name}": getattr(trainer.args, name) for name in BATCHES}


def told(
    trainer: LLaVATrainer, model_args: ModelArguments, data_args: DataArguments, facts: dict
) -> dict[str, Any]:
    """What wandb and tensorboard are given beside the training arguments and config.json."""
    return {
        "plan": str(resolve_plan(None, trainer.model.config)[0]),
        "base": model_args.model_name_or_path or model_args.init_from_config,
        "data_path": data_args.data_path,
        **{name: facts[name] for name in ("data_hash", "samples", "trained_parameters")},
    }


def start_processes(training_args: TrainingArguments) -> None:
    """Join the other ranks before the model is made: ZeRO-3 spreads it over them from the start."""
    device = training_args.device  # asking for it starts the process group
    if training_args.deepspeed:
        check_launcher()
        import deepspeed

        if device.type == "cpu":
            logger.info("starting DeepSpeed; its CPU operators are built once, which takes minutes")
        # accelerate does this on GPUs only.
        deepspeed.init_distributed(dist_init_required=not torch.distributed.is_initialized())
    wait_at_most(training_args.ddp_timeout)
    rank, ranks = training_args.process_index, training_args.world_size
    logger.info("rank %d of %d on %s", rank, ranks, device)


def fit(trainer: LLaVATrainer) -> Any:
    """Trainer.train, with the complaint of a data worker in place of its traceback. A run that a
    signal stopped ends here with exit code 75."""
    try:
        with reading(trainer.resume):
            result = trainer.train(resume_from_checkpoint=trainer.resume)
    except ValueError as error:
        text = str(error)
        if "Original Traceback" not in text:
            raise
        raise ValueError(text.strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    if trainer.guard.stopping:
        warn_once_for_all(
            logger, "stopped after step %d; the same command goes on", result.global_step
        )
        raise RunStopped(EXIT_PREEMPTED)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Command line: bad input ends in one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if estimate.wanted(arguments):
        estimate.main(arguments)
        return
    check_environment()
    run_without_plan(arguments)
    model_args, data_args, training_args = parse_args(arguments)
    summary = train(model_args, data_args, training_args)
    if summary and training_args.process_index == 0:
        path = Path(training_args.output_dir) / SUMMARY_FILE
        json_dump(path, {"command": arguments, **summary})
        write_card(path.parent)
        logger.info("saved to %s (%.0f s)", training_args.output_dir, summary["seconds"])
        if summary["compare"]:
            logger.info(format_line(summary["compare"]))


if __name__ == "__main__":
    main()
