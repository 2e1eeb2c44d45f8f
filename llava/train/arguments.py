"""Command line of training: LLaVA's flags with their meaning, on top of transformers' own.

Special here: the text under a field is its ``--help``. Flags that transformers 5 dropped are
accepted and translated, so scripts written for LLaVA run; flags whose feature does not exist here
are refused by name when they are set (``legacy_flags.py``), and those without effect are said
(``NO_EFFECT``). Sources: LLaVA-1.5 train.py, PyramidDrop pdrop_train.py, Open-LLaVA-NeXT train.py.
``python -m llava.train.train --help``
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import netrc
import os
import sys
import textwrap
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import transformers
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llava.reduction.plan import ReductionPlan, plan_from_flags
from llava.train import flag_help, legacy_flags
from llava.train.flag_checks import check_figures, check_flags, read_settings
from llava.train.fsdp import fsdp_settings
from llava.utils import get_logger, warn_once_for_all

logger = get_logger(__name__)

TUNABLE_PARTS = ("mm_mlp_adapter", "mm_vision_tower", "mm_language_model")


def documented(cls: type) -> type:
    """Class decorator for a dataclass: the string under each field becomes its help (where the
    source is there to be read)."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        return cls
    body = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, follower in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(follower, ast.Expr)
            and isinstance(follower.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(follower.value.value).split())
    for field in dataclasses.fields(cls):
        if field.name in texts:
            help_text = texts[field.name].replace("%", "%%")
            field.metadata = {**field.metadata, "help": help_text}  # type: ignore[assignment]
    return cls


@documented
@dataclasses.dataclass
class ModelArguments:
    """Which model, which parts of it are trained, and the plan."""

    model_name_or_path: str | None = None
    """Folder (or hub id) of the base model: a language model (Llama, Mistral, Qwen2, Qwen3) or a
    LLaVA checkpoint."""
    init_from_config: str | None = None
    """Folder or config.json to build a model with random weights from, instead of
    --model_name_or_path."""
    tokenizer_path: str | None = None
    """Folder of the tokenizer; the model's own by default."""
    version: str = "v0"
    """Conversation template, a key of llava.conversation.conv_templates (plain for captions, v1
    for Vicuna); an unknown one means vicuna_v1."""
    freeze_backbone: bool = False
    """Leave the language model as it is."""
    tune_mm_mlp_adapter: bool = False
    """Train the projector (and the image newline) only."""
    vision_tower: str | None = None
    """Folder (or hub id) of the vision tower, CLIP or SigLIP."""
    mm_vision_select_layer: int = -1
    """Hidden layer of the tower that is read; LLaVA's scripts give -2."""
    pretrain_mm_mlp_adapter: str | None = None
    """mm_projector.bin of the projector stage."""
    mm_projector_type: str = "linear"
    """linear, mlpNx_gelu or identity."""
    mm_use_im_start_end: bool = False
    """Put <im_start> and <im_end> around a picture (adds two tokens)."""
    mm_use_im_patch_token: bool = True
    """Add an <im_patch> token, which nothing reads; LLaVA's scripts give False."""
    mm_patch_merge_type: str = "flat"
    """How tiles are joined: flat, spatial, spatial_unpad."""
    mm_vision_select_feature: str = "patch"
    """patch, or cls_patch to keep the class token."""
    mm_tunable_parts: str | None = None
    """Comma list of mm_mlp_adapter, mm_vision_tower, mm_language_model; overrides the switches
    that freeze and unfreeze."""
    layer_list: str | None = None
    """PyramidDrop: layers in front of which tokens are dropped, e.g. "[8,16,24]"."""
    image_token_ratio_list: str | None = None
    """PyramidDrop: kept shares of the visual tokens, e.g. "[0.5,0.25,0.125]"."""
    reduction: str | None = None
    """Any plan, as text or a JSON file: "none", "fastv:k=2,r=0.5", plan.json. Written into
    config.json."""

    def plan(self) -> ReductionPlan | None:
        """The plan that the flags name, None when they name none. Raises ValueError."""
        return plan_from_flags(self.reduction, self.layer_list, self.image_token_ratio_list)

    def tunable_parts(self) -> tuple[str, ...] | None:
        """`mm_tunable_parts` as a tuple, None when not given. Raises ValueError."""
        if self.mm_tunable_parts is None:
            return None
        parts = tuple(part.strip() for part in self.mm_tunable_parts.split(",") if part.strip())
        unknown = [part for part in parts if part not in TUNABLE_PARTS]
        if unknown or not parts:
            raise ValueError(
                f"--mm_tunable_parts {self.mm_tunable_parts!r}; accepted: a comma list of "
                + ", ".join(TUNABLE_PARTS)
            )
        return parts


@documented
@dataclasses.dataclass
class DataArguments:
    """What is trained on."""

    data_path: str | None = None
    """LLaVA JSON list or JSONL of samples; several as "a.json,b.jsonl@0.5" (a weight behind @), or
    a YAML or JSON file {datasets: [{path, weight, image_folder}]}."""
    eval_data_path: str | None = None
    """The same for the validation loss."""
    lazy_preprocess: bool = False
    """No effect: samples are always prepared on access."""
    is_multimodal: bool = False
    """No effect: set by the code."""
    image_folder: str | None = None
    """Folder that the image paths start from."""
    image_aspect_ratio: str = "square"
    """square (crop), pad, or anyres (tiles)."""
    image_grid_pinpoints: str | None = None
    """anyres: sizes to choose from, e.g. "[[336,672],[672,336]]"; (1,2),(2,1),(2,2),(3,1),(1,3)
    times the tower's input by default."""
    label_mode: Literal["segments", "legacy"] = "segments"
    """How labels are made: segments (cannot miss), or legacy (LLaVA's own masking)."""
    skip_bad_samples: bool = False
    """Take the next sample, with a warning, in place of one that cannot be read or does not fit."""
    skip_samples: str | None = None
    """List of samples to leave out, as llava data check-train --skip_list writes it."""
    image_cache_mb: int = 0
    """Keep up to this many MB of processed pictures in memory, in each data worker of each rank
    (small data read many times)."""
    cache_text: bool = False
    """Keep tokenised samples in memory (small data read many times)."""
    dry_run_data: int = 0
    """Print the supervised text of this many samples and stop."""
    data_cache_dir: str | None = None
    """Where large data files are kept as Arrow and token counts are stored; llava/ in the cache of
    `datasets` (HF_DATASETS_CACHE) by default."""


@documented
@dataclasses.dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained; transformers' own flags are all accepted too."""

    cache_dir: str | None = None
    """No effect: set HF_HOME for the hub's files."""
    optim: str = "adamw_torch_fused"
    """Optimizer; adamw_torch_fused is AdamW in one kernel."""
    remove_unused_columns: bool = False
    """Must stay False: the collator needs every column."""
    prediction_loss_only: bool = True
    """Validation computes the loss only: with dropped tokens logits are shorter than labels."""
    disable_tqdm: bool = True
    """No bars: a line is printed every --logging_steps."""
    freeze_mm_mlp_adapter: bool = False
    """Leave the projector as it is."""
    unfreeze_mm_vision_tower: bool = False
    """Train the vision tower too."""
    mpt_attn_impl: str = "triton"
    """No effect: there is no MPT model here."""
    model_max_length: int = 512
    """Context limit in tokens, visual tokens included."""
    double_quant: bool = True
    """QLoRA: quantise the quantisation constants."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """QLoRA: nf4 or fp4."""
    bits: int = 16
    """16; 4 and 8 quantise the frozen language model (QLoRA)."""
    lora_enable: bool = False
    """Train low-rank adapters instead of the language model; the projector is trained whole."""
    lora_r: int = 64
    """Rank of the adapters."""
    lora_alpha: int = 16
    """Scale of the adapters."""
    lora_dropout: float = 0.05
    """Dropout in front of the adapters."""
    lora_weight_path: str = ""
    """No effect, as in LLaVA."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the language model that are trained too: none, all, or lora_only (of the layers
    that have an adapter)."""
    lora_qv_proj_only: bool = False
    """Adapters on q_proj and v_proj only."""
    mm_projector_lr: float | None = None
    """Learning rate of the projector; the common one by default."""
    mm_vision_tower_lr: float | None = None
    """Learning rate of an unfrozen tower; the common one by default."""
    group_by_modality_length: bool = False
    """Batches with pictures and without kept apart, evenly long across ranks."""
    attn_implementation: str | None = None
    """eager, sdpa, varlen, flash_attention_2, flex_attention; sdpa by default, varlen if packed."""
    packed: bool = False
    """Lay the samples of a batch one behind the other instead of padding them to one length."""
    token_budget: int = 0
    """With --packed: fill each batch up to this many tokens (visual ones included) instead of
    taking --per_device_train_batch_size samples."""
    loss_mean: Literal["batch", "tokens"] = "batch"
    """batch: the mean over a micro-batch's targets, averaged over micro-batches (LLaVA); tokens:
    the mean over all targets of a step."""
    report_to: list[str] = dataclasses.field(default_factory=list)
    """tensorboard, wandb, ..., one or several; none by default. wandb only where a key or an
    offline mode is set: no run waits for a login."""
    warmup_ratio: float | None = None
    """Share of the steps that warm up (--warmup_steps below 1 today)."""
    group_by_length: bool = False
    """Batches of similar length, to save padding."""
    no_cuda: bool = False
    """Old name of --use_cpu."""
    overwrite_output_dir: bool = False
    """Start over; without it a run goes on from the last checkpoint in --output_dir."""
    logging_dir: str | None = None
    """Old name of the variable TENSORBOARD_LOGGING_DIR."""
    save_safetensors: bool = True
    """Weights are always saved as safetensors."""
    dual_speed: float | None = None
    """DualSpeed: the share of steps that run on all visual tokens, taught by the model under the
    plan; the other steps run under the plan. 0.1 in the paper; off by default."""
    dual_speed_weight: float = 1.0
    """DualSpeed: weight of the divergence from the teacher; 0 runs no teacher."""
    dual_speed_isolator: int = 4
    """DualSpeed: learned tokens in front of a picture that tell the model it is under the plan."""
    estimate: bool = False
    """Predict memory and time from the config alone, and stop; --estimate --help has more flags."""
    compare_steps: int = 0
    """Measure this many steps without the plan first, and end with what the plan saves."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for the MFU; known for common GPUs in 16 bit, left out else."""
    logging_nan_inf_filter: bool = False
    """Leave losses that are not finite out of the logged mean."""
    nan_guard: bool = True
    """Stop (exit code 3) in front of the first update whose loss or gradient is not finite, naming
    the first bad tensor and the samples in nan_report.json."""
    save_rehearsal: bool = True
    """Before the first step: write everything small, count the free space for the rest, and end the
    run (exit code 2) if it could not save."""
    probe_samples: int = 0
    """Answer this many samples of the validation data (else of the training data) while training
    and print the answers beside the references."""
    probe_steps: int = 0
    """Steps between two probes; 0 means at each validation."""

    def check(self) -> None:
        """ValueError for flags that are wrong on any machine (`as_given`)."""
        check_figures(self)
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16 exclude each other; give one")
        self._check_lora()
        self._check_engine()
        self._check_batches()
        self.attention_backend()
        known_reports(self.report_to)
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns True: the collator needs every column")

    def settings(self) -> dict[str, dict[str, Any] | None]:
        """The flags that are JSON objects, or files of one, as objects. ValueError for others."""
        names = [name for name in self._VALID_DICT_FIELDS if name != "fsdp_config"]
        found = {name: read_settings(name, getattr(self, name)) for name in names}
        return found | {"fsdp_config": fsdp_settings(self.fsdp, self.fsdp_config)}

    def __post_init__(self) -> None:
        self.check()
        settings = self.settings()
        for name in settings.keys() - {"deepspeed"}:  # whose file keeps its name
            setattr(self, name, settings[name])
        self.fsdp = True if self.fsdp_config else None
        self._translate()
        self._match_device()
        self.report_to = usable_reports(self.report_to)
        if "wandb" in self.report_to and self.run_name is None:
            self.run_name = Path(self.output_dir or "trainer_output").resolve().name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # gradient_checkpointing's new name
            super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # several GPUs in one process would split the batch lists

    def attention_backend(self) -> str:
        """The attention backend of the language model. ValueError for one that would mix the
        samples of a packed batch."""
        asked = self.attn_implementation or "sdpa"
        if not self.packed:
            return asked
        if asked not in PACKED_BACKENDS:
            raise ValueError(
                f"--packed True with --attn_implementation {asked} would mix the samples; "
                f"accepted: {', '.join(PACKED_BACKENDS)}"
            )
        return "varlen" if asked == "sdpa" else asked

    def _check_batches(self) -> None:
        if self.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
            raise ValueError(
                f"--train_sampling_strategy {self.train_sampling_strategy}; accepted: random, "
                "sequential, group_by_length (and --token_budget, which fills packed batches)"
            )
        grouped = [n for n in ("group_by_modality_length", "group_by_length") if getattr(self, n)]
        if self.token_budget and not self.packed:
            raise ValueError("--token_budget needs --packed True: it counts tokens without padding")
        if self.token_budget and grouped:
            raise ValueError(f"--token_budget makes its own batches; leave out --{grouped[0]}")

    def _check_engine(self) -> None:
        settings = self.settings()
        if settings["fsdp_config"] and self.deepspeed:
            raise ValueError("--fsdp and --deepspeed exclude each other; give one")
        zero = (settings["deepspeed"] or {}).get("zero_optimization", {})
        if self.bits != 16 and zero.get("stage") == 3:
            raise ValueError(
                f"--bits {self.bits}: quantised weights cannot be split by ZeRO-3; "
                "accepted: ZeRO-2, or no --deepspeed"
            )

    def _check_lora(self) -> None:
        if self.bits not in (4, 8, 16):
            raise ValueError(f"--bits {self.bits}; accepted: 4, 8, 16")
        if self.bits != 16 and not self.lora_enable:
            raise ValueError(f"--bits {self.bits} trains adapters only; add --lora_enable True")
        if self.bits != 16 and self.fsdp:
            raise ValueError(
                f"--bits {self.bits}: quantised weights cannot be split by FSDP here; "
                "accepted: ZeRO-2, or plain data parallel"
            )
        if self.lora_enable and importlib.util.find_spec("peft") is None:
            raise ValueError("--lora_enable needs peft: pip install peft")

    def _translate(self) -> None:
        if self.warmup_ratio is not None and not self.warmup_steps:  # explicit steps win
            self.warmup_steps = min(self.warmup_ratio, 1 - 1e-9)
        self.use_cpu = self.use_cpu or self.no_cuda
        by_length = self.train_sampling_strategy == "group_by_length"
        self.group_by_length = self.group_by_length or by_length
        if self.logging_dir:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", self.logging_dir)
        for name, reason in NO_EFFECT.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                warn_once_for_all(logger, "--%s has no effect: %s", name, reason)
        if self.enable_jit_checkpoint:
            logger.info("--enable_jit_checkpoint: every run saves when it gets SIGTERM or SIGUSR1")
            self.enable_jit_checkpoint = False  # its ranks do not agree on the step

    def _match_device(self) -> None:
        """Without a GPU: train on the CPU. What only a GPU has is turned off, bfloat16 too unless
        the CPU was asked for by name (some have it in hardware, many get slower)."""
        asked_for_cpu = self.use_cpu
        if not _accelerator_available():
            self.use_cpu = True
        if not self.use_cpu:
            return
        off = [name for name in ("fp16", "tf32") if getattr(self, name)]
        off += ["bf16"] if self.bf16 and not asked_for_cpu else []
        for name in off:
            setattr(self, name, None if name == "tf32" else False)
        if off:
            warn_once_for_all(
                logger,
                "no GPU: %s turned off, float32 is used%s",
                ", ".join(off),
                " (--use_cpu True keeps bf16 on the CPU)" if "bf16" in off else "",
            )


PACKED_BACKENDS = ("sdpa", "varlen", "flash_attention_2", "eager")
"""Backends for --packed; sdpa means varlen then, eager masks the whole pack (slow, a reference)."""


NO_EFFECT: dict[str, str] = {
    "cache_dir": "set HF_HOME for the hub's files",
    "mpt_attn_impl": "there is no MPT model here",
    "lora_weight_path": "LLaVA never read it; --resume_from_checkpoint continues adapters",
    "save_safetensors": "weights are always saved as safetensors",
}
"""Flags that are accepted and do nothing -> why, or what does it."""


def _accelerator_available() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def known_reports(report_to: str | Sequence[str] | None) -> list[str]:
    """The reporters of `report_to`: names, or names with commas between. ValueError for an unknown
    one."""
    given = [report_to] if isinstance(report_to, str) else report_to or []
    wanted = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if "all" in wanted:
        wanted = get_available_reporting_integrations()
    wanted = [name for name in dict.fromkeys(wanted) if name != "none"]
    unknown = [name for name in wanted if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        known = ", ".join(INTEGRATION_TO_CALLBACK)
        raise ValueError(f"--report_to {unknown[0]}; accepted: none, all, {known}")
    return wanted


def usable_reports(report_to: str | Sequence[str] | None) -> list[str]:
    """Those of `known_reports` that work without asking anybody anything.

    wandb is kept only if it is installed and a key or an offline mode is set, because it would
    otherwise wait for a login; what is left out is said.
    """
    wanted = known_reports(report_to)
    if "wandb" in wanted and not _wandb_ready():
        warn_once_for_all(
            logger,
            "wandb is left out: %s",
            "no key found (wandb login, WANDB_API_KEY=... or WANDB_MODE=offline)"
            if importlib.util.find_spec("wandb")
            else "it is not installed",
        )
        wanted.remove("wandb")
    if "tensorboard" in wanted and not (
        importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX")
    ):
        warn_once_for_all(logger, "tensorboard is left out: it is not installed")
        wanted.remove("tensorboard")
    others = set(wanted) - {"wandb", "tensorboard"}
    for name in sorted(others - set(get_available_reporting_integrations())):
        warn_once_for_all(logger, "%s is left out: it is not installed", name)
        wanted.remove(name)
    return wanted


def _wandb_ready() -> bool:
    if importlib.util.find_spec("wandb") is None:
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    if os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = urllib.parse.urlsplit(server).hostname or server
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


T = TypeVar("T")


class _Parser(HfArgumentParser):
    """Takes old flags for what they are called today (`legacy_flags`), and complains with a
    ValueError instead of printing 400 lines of usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = legacy_flags.translate(sys.argv[1:] if args is None else args)
        return super().parse_known_args(words, namespace)

    def format_help(self, everything: bool = False) -> str:
        formatter = flag_help.Formatter(self.prog)
        epilog = legacy_flags.epilog()
        return flag_help.page(self._actions, formatter, self.prog, everything, epilog)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the flags)")


def build_parser() -> HfArgumentParser:
    """The parser of ``llava train``."""
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments), prog="llava train")
    parser.add_argument("--help_all", action=flag_help.HelpAll, help="every flag there is")
    return parser


def _values(group: type, flags: Any) -> dict[str, Any]:
    return {each.name: getattr(flags, each.name) for each in dataclasses.fields(group) if each.init}


def group_of(group: type[T], flags: Any) -> T:
    """One of the argument groups from the parser's namespace, for what needs no more of a run."""
    return group(**_values(group, flags))


def as_given(flags: Any) -> TrainingArguments:
    """The training flags of the parser's namespace, judged but not prepared: no device is asked
    for, no rank joined, nothing translated or turned off for this machine."""
    made = TrainingArguments.__new__(TrainingArguments)
    vars(made).update(_values(TrainingArguments, flags))
    made.check()
    return made


def parse_args(
    argv: Sequence[str] | None = None, prepared: bool = True
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The three argument groups of a command line. prepared: False for training arguments
    `as_given`, and a command that may lack its data.

    Raises ValueError for unknown flags and values that do not fit. What transformers itself judges
    of its own flags is judged for prepared ones alone.
    """
    flags, unknown = build_parser().parse_known_args(None if argv is None else list(argv))
    if unknown:
        raise ValueError(f"unknown flag(s): {' '.join(unknown)}{meant(unknown)}")
    model, data = group_of(ModelArguments, flags), group_of(DataArguments, flags)
    training = group_of(TrainingArguments, flags) if prepared else as_given(flags)
    if prepared and not data.data_path:
        raise ValueError("--data_path is needed")
    if (model.model_name_or_path is None) == (model.init_from_config is None):
        raise ValueError("give one of --model_name_or_path and --init_from_config")
    check_flags(model, data, training)
    model.plan()
    return model, data, training


def meant(words: Sequence[str]) -> str:
    """What the first of some unknown words may have been."""
    if not words[0].startswith("-"):
        return " (a list with spaces needs quotes)"
    known = [name for action in build_parser()._actions for name in action.option_strings]
    like = difflib.get_close_matches(words[0].partition("=")[0], known, n=1)
    return f"; did you mean {like[0]}?" if like else " (--help_all lists all flags)"


def parse_pinpoints(text: str | None, tile_size: int) -> list[list[int]]:
    """`--image_grid_pinpoints` as [[width, height], ...]; Open-LLaVA-NeXT's five by default.

    Raises ValueError for text that is no list of pairs of sizes.
    """
    if text is None:
        grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        return [[w * tile_size, h * tile_size] for w, h in grids]
    from llava.mm_utils import parse_grid_pinpoints

    return [list(size) for size in parse_grid_pinpoints(text, tile_size)]
