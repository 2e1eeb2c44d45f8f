"""What is wrong with a command line by itself: figures out of their range, words that nobody knows,
flags that contradict each other or do nothing beside each other.

Special here: it is judged before anything is read. transformers takes most of these in silence
(``--max_steps 0`` trains one step at rate 0, a rate that is no number is found after the model is
loaded, a smoothed loss is not computed by a model that has its own). A contradiction is an error; a
flag that only lacks its partner is a warning, since scripts hand on flags of other stages.
``python -m llava.train.train --help``
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.training_args import OptimizerNames

from llava.utils import Ranks, get_logger, warn_once_for_all

if TYPE_CHECKING:
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

logger = get_logger(__name__)


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; which of both ends are themselves in it."""

    low: float
    high: float = math.inf
    ends: str = "[)"

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        low = f"{self.low:g} or more" if self.ends[0] == "[" else f"above {self.low:g}"
        if self.high == math.inf:
            return low
        below = "" if self.ends[1] == "]" else "below "
        return f"{low.removesuffix(' or more')} to {below}{self.high:g}"


_ABOVE_0, _FROM_0, _FROM_1 = Range(0, ends="()"), Range(0), Range(1)
_SEED = Range(0, 2**32)
RANGES: dict[str, Range] = {
    **dict.fromkeys(("learning_rate", "mm_projector_lr", "mm_vision_tower_lr"), _FROM_0),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "adam_epsilon", "eval_delay"), _FROM_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), Range(0, 1)),
    "warmup_ratio": Range(0, 1, "[]"),
    "warmup_steps": _FROM_0,
    "num_train_epochs": _FROM_0,
    **dict.fromkeys(("save_steps", "logging_steps", "eval_steps", "peak_tflops"), _ABOVE_0),
    "neftune_noise_alpha": _ABOVE_0,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _FROM_1),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "lora_r"), _FROM_1),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_timeout", "model_max_length"), _FROM_1),
    **dict.fromkeys(("dataloader_num_workers", "token_budget", "image_cache_mb"), _FROM_0),
    **dict.fromkeys(("probe_samples", "probe_steps", "dry_run_data"), _FROM_0),
    **dict.fromkeys(("dual_speed_weight", "dual_speed_isolator"), _FROM_0),
    "dual_speed": Range(0, 1, "[]"),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
}
"""Flag -> what it may be, where it is given."""

CHOICES: dict[str, tuple[str, ...]] = {
    "optim": tuple(each.value for each in OptimizerNames),
    "image_aspect_ratio": ("square", "pad", "anyres"),
    "mm_patch_merge_type": ("flat", "spatial", "spatial_unpad"),
    "mm_vision_select_feature": ("patch", "cls_patch"),
}

PARTNERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("lora_enable", "--lora_enable True",
     ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_qv_proj_only")),
    ("quantised", "--bits 4", ("double_quant", "quant_type")),
    ("dual_speed", "--dual_speed", ("dual_speed_weight", "dual_speed_isolator")),
    ("anyres", "--image_aspect_ratio anyres", ("image_grid_pinpoints",)),
    ("fsdp", "--fsdp", ("fsdp_config",)),
    ("probe_samples", "--probe_samples", ("probe_steps",)),
    ("evaluates", "--eval_strategy", ("eval_data_path", "eval_steps", "load_best_model_at_end")),
    ("trains_tower", "--unfreeze_mm_vision_tower True", ("mm_vision_tower_lr",)),
    ("trains_projector", "a projector that is trained", ("mm_projector_lr",)),
    ("has_tower", "--vision_tower", ("pretrain_mm_mlp_adapter", "image_cache_mb")),
)  # fmt: skip
"""What must be asked for -> flags that do nothing without it."""


def read_settings(name: str, value: Any) -> dict[str, Any] | None:
    """The JSON object that a flag's value is, or that the file of this name holds; None when the
    flag is not given. ValueError for anything else."""
    if isinstance(value, dict) or value in (None, ""):
        return value or None
    text, where = str(value), f"--{name} {value}"
    if not text.lstrip().startswith("{"):
        if not Path(text).is_file():
            raise ValueError(f"{where}: there is no such file")
        try:
            text = Path(text).read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"{where} is no text: {error}") from error
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must hold a JSON object, got {text.strip()[:60]!r}")
    if name == "deepspeed":
        _check_zero(where, found)
    return found


def _check_zero(where: str, settings: dict[str, Any]) -> None:
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(
            f"{where}: zero_optimization {zero!r:.60} is not accepted; give an object with a stage "
            "of 0, 1, 2 or 3"
        )


def check_environment() -> None:
    """ValueError for variables of a launcher that do not fit; a lone process needs none."""
    env = os.environ
    Ranks.from_environment()
    port = env.get("MASTER_PORT", "1")
    if not (port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"MASTER_PORT is {port!r}; accepted: 1 to 65535")
    if "RANK" not in env and env.get("SLURM_PROCID", "0") != "0":
        raise ValueError(
            f"task {env['SLURM_PROCID']} of srun has no RANK, so each task would train alone; "
            "start it with: srun bash scripts/slurm/task.sh python -m llava.train.train"
        )


def check_launcher() -> None:
    """ValueError where DeepSpeed, which asks for a launcher's variables, would find none."""
    if not {"RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        raise ValueError(
            "--deepspeed needs a launcher; start with: torchrun --nproc_per_node 1 -m "
            "llava.train.train (or deepspeed --module llava.train.train)"
        )


def check_figures(group: Any) -> None:
    """ValueError for a figure of a group of arguments that is out of its range, and for an unknown
    word."""
    for name, accepted in RANGES.items():
        value = getattr(group, name, None)
        if value is not None and value not in accepted:
            raise ValueError(f"--{name} {value}; accepted: {accepted}")
    for name, words in CHOICES.items():
        word = getattr(group, name, None)
        if word is not None and word not in words:
            raise ValueError(f"--{name} {word}; accepted: {', '.join(words)}")


def check_flags(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """ValueError for a figure out of its range, an unknown word, or flags that contradict each
    other; a warning for flags without effect. `training` has judged its own flags."""
    check_figures(model)
    check_figures(data)
    if data.eval_data_path is None and _word(training.eval_strategy) != "no":
        raise ValueError(f"--eval_strategy {_word(training.eval_strategy)} needs --eval_data_path")
    _check_steps(training)
    check_stage(model, training)
    check_image_tokens(model)
    if training.lora_enable:
        _check_lora(model)
    _warn_of_the_lonely(model, data, training)


def _check_steps(training: TrainingArguments) -> None:
    if training.max_steps < 1 and training.max_steps != -1:
        raise ValueError(
            f"--max_steps {training.max_steps}; accepted: 1 or more, or -1 for --num_train_epochs"
        )
    if training.max_steps < 0 and not training.num_train_epochs:
        raise ValueError("nothing to do: --num_train_epochs 0 and --max_steps -1")
    if training.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {training.label_smoothing_factor} is not offered; the loss "
            "is the plain cross-entropy (accepted: 0)"
        )
    if not training.prediction_loss_only:
        raise ValueError("--prediction_loss_only False: validation computes the loss only")
    if training.save_on_each_node:
        raise ValueError(
            "--save_on_each_node True is not offered: a run goes on from what all machines see; "
            "give an --output_dir on a disk that they share (accepted: False)"
        )
    validates = training.do_eval or _word(training.eval_strategy) != "no"
    if training.probe_samples and not training.probe_steps and not validates:
        raise ValueError(
            f"--probe_samples {training.probe_samples} needs --probe_steps, or a validation "
            "(--eval_strategy) to take place at"
        )


def _word(strategy: Any) -> str:
    """A strategy as it is given; transformers makes an enum of it."""
    return str(getattr(strategy, "value", strategy))


def check_stage(model: ModelArguments, training: TrainingArguments) -> None:
    """ValueError unless the flags that say which parts are trained agree: the projector stage saves
    the projector alone."""
    if not model.tune_mm_mlp_adapter:
        return
    if model.tunable_parts() not in (None, ("mm_mlp_adapter",)):
        raise ValueError(
            "--tune_mm_mlp_adapter True trains and saves the projector alone; leave it out "
            f"with --mm_tunable_parts {model.mm_tunable_parts}"
        )
    for name in ("freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower"):
        if getattr(training, name):
            raise ValueError(
                f"--tune_mm_mlp_adapter True trains the projector alone; leave out --{name}, "
                "or say what is trained with --mm_tunable_parts"
            )


def check_image_tokens(model: ModelArguments) -> None:
    """ValueError for <im_start> and <im_end> in the projector stage, which would not train them."""
    if model.mm_use_im_start_end and model.tune_mm_mlp_adapter:
        raise ValueError("--mm_use_im_start_end cannot be trained with --tune_mm_mlp_adapter")


def _check_lora(model: ModelArguments) -> None:
    """ValueError for flags that leave adapters nothing to do."""
    parts = model.tunable_parts()
    if model.init_from_config:
        raise ValueError("--lora_enable needs a base with weights: give --model_name_or_path")
    if model.mm_use_im_start_end:
        raise ValueError("--mm_use_im_start_end cannot be trained with --lora_enable")
    if model.tune_mm_mlp_adapter or (parts is not None and "mm_language_model" not in parts):
        flag = "--tune_mm_mlp_adapter" if parts is None else "--mm_tunable_parts"
        raise ValueError(f"{flag} leaves the language model alone; --lora_enable has no use there")


def _warn_of_the_lonely(
    model: ModelArguments, data: DataArguments, training: TrainingArguments
) -> None:
    parts = model.tunable_parts()
    frozen = training.freeze_mm_mlp_adapter
    asked = {
        "lora_enable": training.lora_enable,
        "quantised": training.bits == 4,
        "dual_speed": training.dual_speed is not None,
        "anyres": data.image_aspect_ratio == "anyres",
        "fsdp": bool(training.fsdp),
        "probe_samples": training.probe_samples > 0,
        "evaluates": _word(training.eval_strategy) != "no",
        "trains_tower": "mm_vision_tower" in parts if parts else training.unfreeze_mm_vision_tower,
        "trains_projector": "mm_mlp_adapter" in parts if parts else not frozen,
        "has_tower": bool(model.vision_tower or model.model_name_or_path),
    }
    for key, partner, names in PARTNERS:
        for name in names if not asked[key] else ():
            group = next(each for each in (model, data, training) if hasattr(each, name))
            if getattr(group, name) != type(group).__dataclass_fields__[name].default:
                warn_once_for_all(logger, "--%s has no effect without %s", name, partner)
