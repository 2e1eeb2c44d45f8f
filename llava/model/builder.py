"""Load a checkpoint with its tokenizer and image processor.

Special here: LLaVA's `load_pretrained_model`, for every public layout. A checkpoint is recognised
by its files and config keys, never by the name of its folder; all that lies in it is brought to one
state dict under LLaVA's names (`assemble`), checked by name and shape against the config, and given
to transformers' own loader, which casts, quantises and places it. What was chosen, and why, is
said in `Loaded.choices` and logged.

    tokenizer, model, image_processor, context_length = load_pretrained_model("llava-v1.5-7b")
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as library_logging

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.conversation import resolve_conv_mode
from llava.mm_utils import ASPECT_RATIOS, crop_side
from llava.model.assemble import Parts, assemble, check_types, check_weights, empty_model
from llava.model.checkpoint_layout import read_json, resolve_folder
from llava.model.choices import Choice, Choices
from llava.model.hf_config import described_by
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava.model.language_model.llava_qwen3 import LlavaQwen3Config, LlavaQwen3ForCausalLM
from llava.model.tokenizers import load_tokenizer
from llava.reduction.plan import CONFIG_KEY, FASTV_KEY, ReductionPlan, resolve_plan
from llava.reduction.yopo import plan_from_config
from llava.utils import get_logger, quiet_libraries

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llava_llama": (LlavaConfig, LlavaLlamaForCausalLM),
    "llava": (LlavaConfig, LlavaLlamaForCausalLM),
    "llava_mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
    "llava_qwen": (LlavaQwen2Config, LlavaQwen2ForCausalLM),
    "llava_qwen3": (LlavaQwen3Config, LlavaQwen3ForCausalLM),
}
# What PyramidDrop's checkpoints were trained with; their config.json does not say.
PUBLISHED_PYRAMID = '--layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]"'

# accelerate's ways of spreading a model over devices.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

log = get_logger(__name__)


@dataclass
class Loaded:
    """A loaded checkpoint. image_processor: None for a model without a tower. context_length:
    tokens, visual ones included. unused: names of weights that the model has no place for."""

    tokenizer: Any
    model: Any
    image_processor: Any
    context_length: int
    choices: Choices
    unused: tuple[str, ...] = ()


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | torch.device | None = None,
    use_flash_attn: bool = False,
    **options: Any,
) -> tuple[Any, Any, Any, int]:
    """(tokenizer, model in eval mode, image processor or None, context length).

    LLaVA's signature; model_name is accepted and not read, and device None means CUDA, else MPS,
    else the CPU. options: the keywords of `load_checkpoint`. Raises ValueError when the folder, a
    weight or an option is missing or does not fit, by name.
    """
    if use_flash_attn:
        options.setdefault("attn_implementation", "flash_attention_2")
    # torch_dtype is transformers 4's name, which LLaVA's callers use.
    options["dtype"] = options.pop("torch_dtype", options.get("dtype"))
    loaded = load_checkpoint(
        model_path,
        model_base,
        load_8bit=load_8bit,
        load_4bit=load_4bit,
        device_map=device_map,
        device=device,
        **options,
    )
    return loaded.tokenizer, loaded.model, loaded.image_processor, loaded.context_length


def load_checkpoint(
    model_path: str | Path,
    model_base: str | Path | None = None,
    *,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | torch.device | None = None,
    reduction: Any = None,
    dtype: torch.dtype | str | None = "checkpoint",
    attn_implementation: str | None = None,
    vision_tower: str | Path | None = None,
    image_aspect_ratio: str | None = None,
    conv_mode: str | None = None,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    adapt: Callable[[Any], Any] | None = None,
) -> Loaded:
    """Load a checkpoint of any layout; see docs/Checkpoints.md.

    model_path: a folder, or a hub id. model_base: what a LoRA or projector-only folder was trained
    over. device_map: "auto" counts on CUDA or with max_memory; a dict always. dtype: the
    checkpoint's, a dtype or its name, or None, LLaVA's rule: float16 on CUDA and MPS, float32 on
    the CPU (`load_pretrained_model`'s default).
    reduction, vision_tower, image_aspect_ratio, conv_mode: replace the checkpoint's.
    offload_folder: for weights that device_map puts on "disk" (default: a temporary folder).
    adapt: from the model class to a subclass of it that is made instead.
    ValueError, by name, for whatever is missing, damaged or contradictory.
    """
    place = pick_device(device)
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other")
    quantised = quantisation(4 if load_4bit else 8, place) if load_4bit or load_8bit else None
    folder = resolve_folder(model_path)
    base = None if model_base is None else resolve_folder(model_base)
    wanted = None if dtype == "checkpoint" else _dtype(dtype, place)
    parts = assemble(folder, base, vision_tower, wanted)
    config = read_config(parts)
    dtype_choice = _settle_dtype(dtype, wanted, parts, place)
    if quantised is not None:
        note = f"the decoder's weights in {4 if load_4bit else 8} bits"
        dtype_choice = Choice(dtype_choice.value, f"{dtype_choice.origin}; {note}")
    choices = Choices(
        weights=parts.origin,
        tower=parts.tower,
        template=Choice(*resolve_conv_mode(conv_mode, config)),
        image_mode=_image_mode(config, image_aspect_ratio),
        dtype=dtype_choice,
        device=Choice(place, "flag" if device is not None else "what is there"),
        plan=_plan(config, reduction, parts),
    )
    family = FAMILIES[parts.config["model_type"]][1]
    family = family if adapt is None else adapt(family)
    unused = check_parts(family, config, parts)
    placement, memory = _placement(place, device_map, max_memory)
    model = load_parts(
        family,
        config,
        parts,
        dtype=dtype_choice.value,
        device_map=placement,
        max_memory=memory,
        offload_folder=offload_folder,
        quantization_config=quantised,
        attn_implementation=attn_implementation,
    )
    tokenizer = load_tokenizer(parts.folders)
    add_image_tokens(model, tokenizer)
    processor = image_processor_of(model, parts)
    for line in choices.lines():
        log.info("%s", line)
    return Loaded(tokenizer, model.eval(), processor, model.context_length, choices, tuple(unused))


# -------------------------------------------------------------------------------------- what it is
def read_config(parts: Parts) -> Any:
    """The config object of assembled parts."""
    return config_object(parts.config, str(parts.folders[0] / "config.json"))


def config_object(flat: dict[str, Any], where: str = "config.json") -> Any:
    """The config object of a flat config with a `model_type` of `FAMILIES`. ValueError, with the
    file's name `where`, for values that describe no model."""
    raw = {key: value for key, value in flat.items() if key != "model_type"}
    with described_by(where):
        config = FAMILIES[flat["model_type"]][0].from_dict(raw)
    config.architectures = None
    return config


def _plan(config: Any, reduction: Any, parts: Parts) -> Choice:
    """Settle the plan and write it into the config."""
    if reduction is not None:
        setattr(config, CONFIG_KEY, ReductionPlan.parse(reduction).to_dict())
        if getattr(config, FASTV_KEY, None) is not None:
            setattr(config, FASTV_KEY, None)
    elif getattr(config, CONFIG_KEY, None) is None:
        advice = _plan_of_the_original(config, parts)
        if advice is not None:
            log.warning("%s: NO visual token is dropped. %s", parts.folders[0], advice)
            return Choice(ReductionPlan(), f"default; {advice}")
    plan, source = resolve_plan(None, config)
    plan.validate(config.num_hidden_layers)
    return Choice(plan, "flag" if reduction is not None else source)


def _plan_of_the_original(config: Any, parts: Parts) -> str | None:
    """Checkpoints of PyramidDrop's and YOPO's own code do not hold a plan as this project does. Set
    the plan where the config says all of it; else return what to tell the user."""
    if "LlavaLlamaForCausalLM_PDrop" in (parts.config.get("architectures") or ()):
        return (
            "trained by PyramidDrop's code, whose config.json does not name the plan; the "
            f"published training had {PUBLISHED_PYRAMID}"
        )
    try:
        setattr(config, CONFIG_KEY, plan_from_config(parts.config, parts.folders[0]))
    except ValueError as error:
        return str(error)
    return None


def _image_mode(config: Any, asked: str | None) -> Choice:
    if getattr(config, "mm_vision_tower", None) is None:
        return Choice("none", "config.json: no vision tower")
    if asked is not None:
        config.image_aspect_ratio = asked
    mode = getattr(config, "image_aspect_ratio", None)
    if mode not in ASPECT_RATIOS:
        raise ValueError(f"image_aspect_ratio is {mode!r}; accepted: {ASPECT_RATIOS}")
    if mode == "anyres" and not getattr(config, "image_grid_pinpoints", None):
        raise ValueError("image_aspect_ratio 'anyres' needs image_grid_pinpoints in config.json")
    return Choice(mode or "square", "flag" if asked is not None else "config.json")


# -------------------------------------------------------------------------------- dtype and devices
def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else CUDA, else MPS, else the CPU. ValueError when it is not there."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; accepted: cpu, cuda, mps") from None
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if place.type not in ("cpu", *there):
        raise ValueError(f"device {device!r} is not supported; accepted: cpu, cuda, mps")
    if place.type in there and not there[place.type]():
        raise ValueError(f"device {device!r} was asked for, but this machine or torch has none")
    return place


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    return float_type(dtype)


def float_type(dtype: torch.dtype | str) -> torch.dtype:
    """A floating point dtype, by itself or its name. ValueError for another one."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype {dtype!r} is not accepted; give checkpoint, float16, bfloat16 or float32"
        )
    return found


def _settle_dtype(
    asked: torch.dtype | str | None, wanted: torch.dtype | None, parts: Parts, device: torch.device
) -> Choice:
    if wanted is not None:
        return Choice(wanted, "flag" if asked is not None else f"default on {device.type}")
    stored = parts.config.get("dtype") or parts.config.get("torch_dtype")
    if stored:
        return Choice(_dtype(stored, device), "config.json")
    first = next((value for value in parts.weights.values() if value.is_floating_point()), None)
    return Choice(torch.float32 if first is None else first.dtype, "the weights")


def _placement(
    device: torch.device, device_map: Any, max_memory: dict[Any, Any] | None
) -> tuple[Any, dict[Any, Any] | None]:
    """transformers' device_map: a given dict; a strategy on CUDA or with max_memory; else one
    device for everything."""
    if isinstance(device_map, dict):
        return device_map, max_memory
    if device_map is not None and device_map not in STRATEGIES:
        try:
            torch.device(device_map)
        except (RuntimeError, TypeError):
            raise ValueError(
                f"device_map {device_map!r} is unknown; accepted: {', '.join(STRATEGIES)}, a "
                "device, a dict"
            ) from None
    if device_map is not None and (device == torch.device("cuda") or max_memory is not None):
        return device_map, max_memory
    return {"": device}, None


def quantisation(
    bits: int,
    device: torch.device,
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    quant_type: str = "nf4",
) -> BitsAndBytesConfig:
    """bitsandbytes' settings for 4 or 8 bits, LLaVA's: the decoder's linear layers, not the tower,
    the projector or the head. compute_dtype, of 4 bits: float16, on the CPU float32.

    ValueError without the package or a device it can use.
    """
    quiet_libraries()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{bits} bits need bitsandbytes: pip install bitsandbytes ({error})"
        ) from error
    if device.type == "mps":
        raise ValueError("bitsandbytes cannot quantise on mps; use cuda, or load without it")
    keep = [".*vision_tower", ".*mm_projector", "lm_head"]  # transformers matches from the start
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    usual = torch.float32 if device.type == "cpu" else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype or usual,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        llm_int8_skip_modules=keep,
    )


def check_parts(family: Any, config: Any, parts: Parts) -> list[str]:
    """Compare the weights with the model's names and shapes and take away those without a place in
    it, which are returned and logged. ValueError for what is missing or of another shape."""
    folder = parts.folders[0]
    empty = empty_model(family, config, str(folder / "config.json"))
    unused = check_weights(parts.weights, empty, str(folder))
    if unused:
        log.warning("%s: weights that have no place in the model: %s", folder, ", ".join(unused))
    for name in unused:
        del parts.weights[name]
    return unused


@contextlib.contextmanager
def no_bar_in_a_file() -> Iterator[None]:
    """transformers' bars are for a terminal, and not for LLAVA_PROGRESS=0."""
    on = library_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty() or os.environ.get("LLAVA_PROGRESS") == "0":
        library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            library_logging.enable_progress_bar()


def load_parts(family: Any, config: Any, parts: Parts, **options: Any) -> Any:
    """The model through transformers' loader, with its options; every weight comes from `parts`,
    which `check_parts` has seen."""
    device_map = options.get("device_map")
    on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    temporary = None
    limited = options.get("max_memory") is not None
    if options.get("offload_folder") is None and (on_disk or limited):
        temporary = options["offload_folder"] = tempfile.mkdtemp(prefix="llava-offload-")
    options = {key: value for key, value in options.items() if value is not None}
    try:
        with no_bar_in_a_file():
            model, report = family.from_pretrained(
                None, config=config, state_dict=parts.weights, output_loading_info=True, **options
            )
    except ImportError as error:  # of the attention's package
        asked = options.get("attn_implementation")
        raise ValueError(f"attn_implementation {asked!r} cannot be used: {error}") from error
    gaps = {name: report[name] for name in ("missing_keys", "mismatched_keys") if report[name]}
    assert not gaps, f"checked before, and yet {gaps}"
    _leave_files(model, parts.weights)
    if temporary is not None:
        weakref.finalize(model, shutil.rmtree, temporary, ignore_errors=True)
    settings = generation_settings(parts.folders[:1])
    if settings is not None:
        model.generation_config = GenerationConfig.from_dict(settings)
    return model


def _leave_files(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copy what still lies in mapped files (CPU, the file's dtype) and forget the rest, so that the
    files can be overwritten, by `save_pretrained` for one, while the model lives."""
    mapped = {value.data_ptr() for value in weights.values()}
    weights.clear()
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() in mapped:
            parameter.data = parameter.data.clone()


_GENERATION_FILE = "generation_config.json"
_TOKEN = (int, list)
_GENERATION = {"eos_token_id": _TOKEN, "bos_token_id": _TOKEN, "pad_token_id": _TOKEN}


def generation_settings(folders: Sequence[Path]) -> dict[str, Any] | None:
    """generation_config.json of the first folder that has one, without sampling settings that
    contradict greedy decoding (Vicuna ships such a file, which transformers refuses to save)."""
    file = next((path for folder in folders if (path := folder / _GENERATION_FILE).is_file()), None)
    if file is None:
        return None
    values = read_json(file)
    check_types(values, _GENERATION, str(file))
    if not values.get("do_sample"):
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            values.pop(name, None)
    return values


# -------------------------------------------------------------------------- tokenizer and processor
def add_image_tokens(model: Any, tokenizer: Any) -> None:
    """Add LLaVA's marks where the config asks for them and the tokenizer lacks them.

    A vocabulary that then outgrows the embeddings is refused for <im_start> and <im_end>, which
    need trained rows. <im_patch> is never part of a prompt and is left out of the model.
    """
    config = model.config
    if getattr(config, "mm_use_im_patch_token", False):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        marks = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
        tokenizer.add_tokens(marks, special_tokens=True)
        highest = max(tokenizer.convert_tokens_to_ids(marks))
        if highest >= config.vocab_size:
            raise ValueError(
                f"mm_use_im_start_end needs trained embeddings of {', '.join(marks)}, but the "
                f"checkpoint has {config.vocab_size} rows and the marks are ids up to {highest}"
            )


def image_processor_of(model: Any, parts: Parts) -> Any:
    """The checkpoint's own processor, else its tower's, else the usual one for the tower's size."""
    tower = model.get_vision_tower()
    if tower is None:
        return None
    settings = _processor_settings(parts.folders)
    if settings is not None:
        file, values = settings
        with described_by(str(file)):
            tower.image_processor = tower.processor_class().from_dict(values)
    elif parts.processor is not None:
        tower.image_processor = parts.processor
    made, wanted = crop_side(tower.image_processor), tower.config.image_size
    if made != wanted:
        raise ValueError(
            f"{parts.folders[0]}: the image processor makes pictures of {made} pixels a side, the "
            f"vision tower takes {wanted}"
        )
    return tower.image_processor


_PROCESSOR_KEYS = (
    "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize",
    "image_mean", "image_std", "resample", "rescale_factor", "size",
)  # fmt: skip


def _processor_settings(folders: tuple[Path, ...]) -> tuple[Path, dict[str, Any]] | None:
    """(file, settings) of the checkpoint's image processor: `preprocessor_config.json`, or the part
    of `processor_config.json` where transformers 5 keeps them. Tiling is LLaVA's own here."""
    for folder in folders:
        file, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
        values = read_json(file) if file.is_file() else None
        if values is None and nested.is_file():
            whole, file = read_json(nested), nested
            check_types(whole, {"image_processor": (dict,)}, str(file))
            values = whole.get("image_processor")
        if values:
            check_types(values, {"image_mean": (list,), "image_std": (list,)}, str(file))
            known = {key: values.get(key) for key in _PROCESSOR_KEYS}
            return file, {key: value for key, value in known.items() if value is not None}
    return None


__all__ = ["FAMILIES", "Loaded", "load_checkpoint", "load_pretrained_model"]
