"""``llava train --help``: the flags of a recipe by subject, in place of a list of three hundred.

Special here: a page that can be read, with every flag of this project and those of transformers
that LLaVA's recipes use; ``--help_all`` has the rest. A test holds the table to the flags.
``llava train --help``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

SUBJECTS: dict[str, str] = {
    "model": """
        model_name_or_path init_from_config tokenizer_path vision_tower version
        pretrain_mm_mlp_adapter mm_projector_type mm_vision_select_layer
        mm_vision_select_feature mm_patch_merge_type mm_use_im_start_end mm_use_im_patch_token
        attn_implementation""",
    "plan (visual tokens that leave)": """
        layer_list image_token_ratio_list reduction compare_steps""",
    "what is trained": """
        tune_mm_mlp_adapter freeze_backbone freeze_mm_mlp_adapter unfreeze_mm_vision_tower
        mm_tunable_parts""",
    "LoRA, QLoRA": """
        lora_enable lora_r lora_alpha lora_dropout lora_bias lora_qv_proj_only bits quant_type
        double_quant""",
    "data": """
        data_path image_folder eval_data_path image_aspect_ratio image_grid_pinpoints
        model_max_length label_mode skip_samples skip_bad_samples dry_run_data data_cache_dir
        image_cache_mb cache_text dataloader_num_workers""",
    "batches and loss": """
        per_device_train_batch_size gradient_accumulation_steps packed token_budget
        group_by_modality_length group_by_length train_sampling_strategy loss_mean""",
    "steps and learning rate": """
        num_train_epochs max_steps learning_rate mm_projector_lr mm_vision_tower_lr
        lr_scheduler_type warmup_ratio warmup_steps weight_decay optim max_grad_norm
        seed data_seed""",
    "devices and memory": """
        deepspeed fsdp fsdp_config bf16 tf32 gradient_checkpointing use_cpu full_determinism
        ddp_timeout estimate""",
    "saving and going on": """
        output_dir overwrite_output_dir resume_from_checkpoint save_strategy save_steps
        save_total_limit save_rehearsal nan_guard""",
    "what it tells": """
        logging_steps report_to run_name peak_tflops eval_strategy eval_steps
        per_device_eval_batch_size probe_samples probe_steps""",
    "two speeds (DualSpeed)": """
        dual_speed dual_speed_weight dual_speed_isolator""",
}
"""Title -> flags, in the order in which they are shown."""

OLD = """
    lazy_preprocess is_multimodal cache_dir mpt_attn_impl lora_weight_path no_cuda logging_dir
    save_safetensors remove_unused_columns prediction_loss_only disable_tqdm
    logging_nan_inf_filter"""
"""Fields of ours that scripts of other trainers name, or whose default alone is ours."""

TEXTS: dict[str, str] = {
    "output_dir": "Where checkpoints, the model and train_summary.json go.",
    "max_steps": "Steps in all; -1: as many as --num_train_epochs has.",
    "gradient_accumulation_steps": "Micro-batches a step.",
    "warmup_steps": "Steps that warm up, or below 1 their share.",
    "deepspeed": "DeepSpeed's settings, e.g. scripts/zero3.json.",
    "fsdp": "full_shard, shard_grad_op, with offload behind it if wanted (FSDP2).",
    "fsdp_config": "A JSON object or file with more settings of FSDP2.",
    "gradient_checkpointing": "Compute the layers again in the backward pass, to save memory.",
    "resume_from_checkpoint": "A checkpoint's folder; by default the last one in --output_dir.",
    "train_sampling_strategy": "random, sequential, group_by_length.",
    "bf16": "bfloat16 autocast over float32 weights; turned off where there is no GPU.",
    "use_cpu": "Train on the CPU; beside --bf16 True keeps bfloat16 there.",
    "tf32": "TensorFloat-32 for products in float32 on NVIDIA GPUs.",
    "full_determinism": "Have torch refuse kernels that give other bits each time; slower.",
    "ddp_timeout": "Seconds that ranks wait for one another before a run ends.",
    "num_train_epochs": "Passes over the data.",
    "per_device_train_batch_size": "Samples of a micro-batch on each device.",
    "per_device_eval_batch_size": "The same for validation.",
    "dataloader_num_workers": "Processes a rank that prepare batches; 0: the rank itself.",
    "learning_rate": "Peak learning rate, of all parts that have none of their own.",
    "lr_scheduler_type": "cosine (LLaVA's), linear, constant, constant_with_warmup, ...",
    "weight_decay": "Of AdamW; biases and norms have none.",
    "max_grad_norm": "The gradient's norm is clipped to this; 0: not at all.",
    "seed": "Of data order, dropout and random weights.",
    "data_seed": "Of the data order alone; --seed by default.",
    "logging_steps": "Steps between two lines; below 1 a share of the run's steps.",
    "save_strategy": "When checkpoints are written.",
    "save_steps": "Steps between two checkpoints; below 1 a share of the run's steps.",
    "save_total_limit": "Checkpoints that are kept; all by default.",
    "eval_strategy": "When the validation loss is computed.",
    "eval_steps": "Steps between two validations; --logging_steps by default.",
    "run_name": "Name of the run in wandb; the output folder's by default.",
}
"""In place of transformers' words, where they are long or speak of what is not so here."""


def page(
    actions: Iterable[argparse.Action],
    formatter: argparse.HelpFormatter,
    prog: str,
    everything: bool,
    epilog: str,
) -> str:
    """The text of ``--help``, or with `everything` of ``--help_all``."""
    by_name: dict[str, argparse.Action] = {}
    for action in actions:  # the first of a name: behind it comes the --no_... form of a switch
        if action.option_strings:
            by_name.setdefault(action.dest, action)
    shown = [(title, names.split()) for title, names in SUBJECTS.items()]
    if everything:
        listed = {name for _, names in shown for name in names} | set(OLD.split()) | {"help"}
        shown.append(("of other trainers' scripts", OLD.split()))
        rest = sorted(set(by_name) - listed)
        shown.append(("all else that transformers takes", rest))
    formatter.add_text(
        f"usage: {prog} --model_name_or_path BASE --data_path DATA --output_dir OUT ...\n"
    )
    formatter.add_text(
        "Train a LLaVA model with or without visual token reduction (docs/Train.md). Flags of the "
        "recipes; transformers' TrainingArguments are all accepted, --help_all lists them and what "
        "became of older flags."
    )
    for title, names in shown:
        formatter.start_section(title)
        formatter.add_arguments([by_name[name] for name in names if name in by_name])
        formatter.end_section()
    if everything:
        formatter.add_text(epilog)
    return formatter.format_help()


class Formatter(argparse.HelpFormatter):
    """One line a flag where it fits: its name once, TRUE|FALSE or a letter for its value, and the
    default behind the text unless that is off or empty."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        if action.dest == "help":
            return name
        if action.choices is not None:
            found = [str(getattr(choice, "value", choice)) for choice in action.choices]
            values = "|".join(found)
            return f"{name} {values}" if len(values) < 40 else f"{name} NAME"
        return f"{name} {_METAVARS.get(_kind(action.type), 'TEXT')}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = TEXTS.get(action.dest, action.help or "")
        default = getattr(action.default, "value", action.default)
        if default in (None, False, "", argparse.SUPPRESS) or isinstance(default, list | dict):
            return text
        return f"{text} [{str(default).replace('%', '%%')}]"


_METAVARS = {"int": "N", "float": "X", "string_to_bool": "True|False"}


def _kind(type_: Callable | Any) -> str:
    return getattr(type_, "__name__", "")


class HelpAll(argparse.Action):
    """``--help_all``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs
        )

    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        parser._print_message(parser.format_help(everything=True))
        parser.exit()
