"""What a run trains: the base model with its vision modules, the tokenizer, what is frozen, and
what belongs to the checkpoint written into its config.

Special here: everything that can be wrong with a base is judged before its weights are read or
right after, by name; flags left at their default keep what a LLaVA checkpoint was trained with.
Sources: LLaVA-1.5 train.py, PyramidDrop pdrop_train.py. ``python -m llava.train.train``
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import cached_file

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.conversation import conv_templates
from llava.mm_utils import crop_side
from llava.model.assemble import assemble, flat_config, in_llava_layout
from llava.model.builder import (
    FAMILIES,
    check_parts,
    config_object,
    load_parts,
    quantisation,
)
from llava.model.checkpoint_layout import (
    BASE_KEY,
    inspect_checkpoint,
    read_json,
    resolve_folder,
)
from llava.model.multimodal_encoder.builder import (
    read_structure,
    tower_class,
    tower_config,
    tower_structure,
)
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.tokenizers import load_tokenizer as read_tokenizers
from llava.reduction.plan import resolve_plan
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_pinpoints,
)
from llava.train.dataset import check_max_length
from llava.train.flag_checks import check_image_tokens, check_stage
from llava.train.lora import Adapters, add_adapters, halve_frozen, trains
from llava.train.parts import part_of
from llava.utils import describe_error, get_logger, set_seed, warn_once_for_all

logger = get_logger(__name__)


def read_config(model_args: ModelArguments) -> tuple[str, dict[str, Any]]:
    """Where the base is (a folder, or a hub id) and its config.json in LLaVA's layout. ValueError
    or OSError when there is none, or one of another architecture."""
    name = str(model_args.model_name_or_path or model_args.init_from_config)
    file = Path(name)
    if file.is_dir():
        file = file / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"no config.json in {name}")
    elif not file.is_file():
        if file.is_absolute() or name.count("/") != 1 or name.startswith("."):
            raise FileNotFoundError(f"no model at {name}")
        try:
            file = Path(str(cached_file(name, "config.json")))
        except OSError as error:
            raise ValueError(f"model {name} is no folder and not on the hub: {error}") from error
        return name, in_llava_layout(read_json(file), str(file))
    return str(file.parent), in_llava_layout(read_json(file), str(file))


def load_model(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    """The model with its vision modules, in float32 (with --bits, the language model's linear
    layers quantised), nothing frozen yet."""
    options = {"attn_implementation": training_args.attention_backend()}
    if model_args.init_from_config:
        raw = read_config(model_args)[1]
        config = config_object(raw)
        keep_checkpoint_settings(model_args, config)
        config.mm_vision_tower = config.mm_vision_config = None  # read from its own folder below
        model = FAMILIES[raw["model_type"]][1]._from_config(config, dtype=torch.float32, **options)
    else:
        partly = training_args.lora_enable or model_args.tune_mm_mlp_adapter
        model = load_base(model_args, partly, **options, **quantised_at(training_args))
    if model_args.vision_tower:
        try:
            model.get_model().initialize_vision_modules(model_args)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{model_args.pretrain_mm_mlp_adapter} cannot be loaded as a projector: {error}"
            ) from error
    clean_generation_config(model)
    if training_args.bits != 16:  # the quantised part is in place, and must not be moved
        decoder = model.get_model()
        for part in (model.get_vision_tower(), getattr(decoder, "mm_projector", None)):
            if part is not None:
                part.to(training_args.device)
        if getattr(decoder, "image_newline", None) is not None:
            decoder.image_newline.data = decoder.image_newline.data.to(training_args.device)
    return model


def quantised_at(training_args: TrainingArguments) -> dict[str, Any]:
    """`from_pretrained`'s options for --bits 4 and 8. ValueError without bitsandbytes."""
    if training_args.bits == 16:
        return {}
    settings = quantisation(
        training_args.bits,
        training_args.device,
        compute_dtype=torch.bfloat16 if training_args.bf16 else None,
        double_quant=training_args.double_quant,
        quant_type=training_args.quant_type,
    )
    return {"quantization_config": settings, "device_map": {"": training_args.device}}


def load_base(model_args: ModelArguments, partly: bool, **options: Any) -> Any:
    """The base, of any layout that can be loaded (`llava.model.assemble`), with its own tower
    unless --vision_tower names another one. partly: a checkpoint of this run will lie over it.

    ValueError for a base that lacks a weight, and in the last case for one that lies over another.
    """
    files = inspect_checkpoint(resolve_folder(str(model_args.model_name_or_path)))
    if partly and files.kind != "full":
        raise ValueError(
            f"{files.path} ({files.describe()}) cannot be the base of what is saved without its "
            "base; make one checkpoint of it first: llava convert --to llava"
        )
    stored, asked = flat_config(files).get("mm_vision_tower"), model_args.vision_tower
    other = asked if stored and asked not in (None, stored) else None
    parts = assemble(files.path, vision_tower=other, merge_dtype=torch.float32)
    if other is not None:
        warn_once_for_all(logger, "the checkpoint's tower %s is replaced by %s", stored, other)
        parts.config["mm_vision_tower"] = other
    family, config = FAMILIES[parts.config["model_type"]][1], config_object(parts.config)
    keep_checkpoint_settings(model_args, config)
    projector = getattr(config, "mm_projector_type", None)
    if projector not in (None, model_args.mm_projector_type):
        raise ValueError(
            f"--mm_projector_type {model_args.mm_projector_type}: {files.path} has a trained "
            f"projector of type {projector}"
        )
    check_parts(family, config, parts)
    return load_parts(family, config, parts, dtype=torch.float32, **options)


_MM_FLAGS = {
    "vision_tower": "mm_vision_tower",
    "mm_vision_select_layer": "mm_vision_select_layer",
    "mm_vision_select_feature": "mm_vision_select_feature",
    "mm_projector_type": "mm_projector_type",
    "mm_patch_merge_type": "mm_patch_merge_type",
    "mm_use_im_start_end": "mm_use_im_start_end",
    "mm_use_im_patch_token": "mm_use_im_patch_token",
}


def keep_checkpoint_settings(model_args: ModelArguments, config: Any) -> None:
    """Flags left at their default take a LLaVA checkpoint's value, so that fine-tuning it further
    cannot silently change what its projector was trained on."""
    defaults = {field.name: field.default for field in fields(model_args)}
    for flag, key in _MM_FLAGS.items():
        stored = getattr(config, key, None)
        if stored is not None and getattr(model_args, flag) == defaults[flag]:
            setattr(model_args, flag, stored)


def clean_generation_config(model: Any) -> None:
    """Drop sampling settings that contradict ``do_sample=False`` (Vicuna ships such a file), with
    which saving would fail at the end of a run."""
    settings = getattr(model, "generation_config", None)
    if settings is None or settings.do_sample:
        return
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
        if getattr(settings, name, None) is not None:
            setattr(settings, name, None)


def _has_base(model_args: ModelArguments) -> bool:
    return bool(model_args.model_name_or_path or model_args.init_from_config)


def load_tokenizer(model_args: ModelArguments, max_length: int) -> Any:
    """The tokenizer, right-padded, with a pad token: its own, else unk, else eos. The mask comes
    from lengths, so any will do and the vocabulary stays as it is."""
    path = model_args.tokenizer_path or read_config(model_args)[0]
    if model_args.tokenizer_path and not Path(path).is_dir():
        raise FileNotFoundError(f"tokenizer folder not found: {path}")
    settings = {"model_max_length": max_length, "padding_side": "right"}
    if Path(path).is_dir():
        tokenizer = read_tokenizers((Path(path),), **settings)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, **settings)
    rows = read_config(model_args)[1].get("vocab_size") if _has_base(model_args) else None
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, the model {rows}; give "
            "the one that the model was trained with (--tokenizer_path)"
        )
    beyond = isinstance(rows, int) and (tokenizer.pad_token_id or 0) >= rows
    if tokenizer.pad_token is None or beyond:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer in {path} has no pad, unk or eos token")
    # The data set counts tokens itself; transformers' own warning speaks of indexing errors.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def add_image_tokens(model: Any, tokenizer: Any, model_args: ModelArguments) -> None:
    """Add <im_patch>, <im_start> and <im_end> where the flags, or the checkpoint that they leave it
    to, ask for them; the new embedding rows start as the mean of the old ones. ValueError as
    `check_image_tokens`."""
    if not model_args.vision_tower:
        return
    check_image_tokens(model_args)
    wanted = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
    if model_args.mm_use_im_start_end:
        wanted += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    new = tokenizer.add_tokens(wanted, special_tokens=True) if wanted else 0
    if new and len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = embeddings.weight.data
            rows[-new:] = rows[:-new].mean(dim=0, keepdim=True)


def trained_parts(
    model_args: ModelArguments, training_args: TrainingArguments
) -> tuple[dict[str, bool], set[str]]:
    """(which parts of a model the flags train, those that they ask for by name). ValueError as
    `check_stage`."""
    check_stage(model_args, training_args)
    parts = model_args.tunable_parts()
    if parts is not None:
        trained = {
            "language": "mm_language_model" in parts,
            "projector": "mm_mlp_adapter" in parts,
            "tower": "mm_vision_tower" in parts,
        }
        return trained, {part for part, wanted in trained.items() if wanted}
    if model_args.tune_mm_mlp_adapter:
        return {"language": False, "projector": True, "tower": False}, {"projector"}
    tower = training_args.unfreeze_mm_vision_tower
    trained = {
        "language": not model_args.freeze_backbone,
        "projector": not training_args.freeze_mm_mlp_adapter,
        "tower": tower,
    }
    return trained, {"tower"} if tower else set()


def freeze(
    model: Any, model_args: ModelArguments, training_args: TrainingArguments
) -> dict[str, int]:
    """Set what is trained; returns the number of trained parameters by part of the model.

    ValueError if the flags ask for a part that the model does not have, or train nothing.
    """
    trained, asked = trained_parts(model_args, training_args)
    counts = dict.fromkeys(trained, 0)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        wanted = trained[part]
        if part == "language" and training_args.lora_enable:
            wanted = trains(name, training_args.lora_bias)
        parameter.requires_grad_(wanted)
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 numel is a share
        counts[part] += size if wanted else 0
    for part in sorted(asked):
        if not counts[part]:
            raise ValueError(f"the {part} is to be trained, but there is none: give --vision_tower")
    if not sum(counts.values()):
        raise ValueError("nothing to train: the flags freeze every part of the model")
    in_one_precision = training_args.deepspeed or training_args.fsdp
    if training_args.lora_enable and training_args.bf16 and not in_one_precision:
        halve_frozen(model)
    return counts


def add_lora(
    model: Any, model_args: ModelArguments, training_args: TrainingArguments
) -> Adapters | None:
    """Adapters in the language model where the flags ask for them, and what a checkpoint needs
    beside them: the projector always, embeddings and tower where they are not the base's."""
    if not training_args.lora_enable:
        return None
    raw = read_config(model_args)[1]
    also = {"projector"}
    if raw.get("mm_vision_tower") not in (None, getattr(model.config, "mm_vision_tower", None)):
        also.add("tower")
    names = [name for name, _ in model.named_parameters() if part_of(name) in also]
    if raw.get("vocab_size") != model.config.vocab_size:
        names += ["model.embed_tokens.weight", "lm_head.weight"]
    set_seed(training_args.seed)  # what was drawn so far depends on how ZeRO-3 reads the base
    return add_adapters(model, training_args, base_name(model_args), tuple(names))


def base_name(model_args: ModelArguments) -> str:
    """The base as a checkpoint that lies over it names it: a whole path, or a hub id."""
    base = read_config(model_args)[0]
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def write_settings(
    model: Any,
    tokenizer: Any,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Put everything that belongs to the checkpoint into its config, the plan included.

    Raises ValueError for a plan that does not fit the model, or a context that cannot hold a
    picture.
    """
    config = model.config
    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = training_args.model_max_length
    known = model_args.version in conv_templates
    config.conv_mode = model_args.version if known else "vicuna_v1"  # what evaluation asks with
    if getattr(config, "max_position_embeddings", 0) < training_args.model_max_length:
        logger.info("max_position_embeddings raised to %d", training_args.model_max_length)
        config.max_position_embeddings = training_args.model_max_length
    plan, source = resolve_plan(model_args.plan(), config)
    plan.validate(config.num_hidden_layers)
    config.visual_token_reduction = plan.to_dict() if plan else None
    logger.info("plan: %s (from %s)", plan, source)
    partial = training_args.lora_enable or model_args.tune_mm_mlp_adapter
    over = model_args.model_name_or_path if partial else None
    setattr(config, BASE_KEY, base_name(model_args) if over else None)
    if not model_args.vision_tower:
        return
    config.image_aspect_ratio = data_args.image_aspect_ratio
    config.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training_args.freeze_mm_mlp_adapter
    config.unfreeze_mm_vision_tower = training_args.unfreeze_mm_vision_tower
    config.mm_projector_lr = training_args.mm_projector_lr
    config.mm_vision_tower_lr = training_args.mm_vision_tower_lr
    tower = model.get_vision_tower()
    if data_args.image_aspect_ratio == "anyres":
        config.image_grid_pinpoints = parse_pinpoints(
            data_args.image_grid_pinpoints, crop_side(tower.image_processor)
        )
    check_max_length(training_args.model_max_length, tower.num_patches)


def check_plan(model_args: ModelArguments) -> None:
    """ValueError for a base of another architecture, one whose config.json describes no model, or a
    plan that does not fit it, before its tokenizer and weights are read."""
    folder, raw = read_config(model_args)
    check_buildable(raw, folder)
    layers, heads = raw.get("num_hidden_layers"), raw.get("num_attention_heads")
    plan = model_args.plan()
    if plan is None or not isinstance(layers, int):
        return
    plan.validate(layers)
    if plan.program is not None:
        plan.program.validate(layers, heads)


def check_buildable(raw: Mapping[str, Any], where: str) -> None:
    """ValueError unless a language model can be made of a config.json in LLaVA's layout; none of
    its weights takes memory."""
    try:
        config = config_object(dict(raw))
        config.mm_vision_tower = config.mm_vision_config = None
        if config.num_hidden_layers < 1 or config.hidden_size < 1:
            raise ValueError("it has no layers, or they have no width")
        with torch.device("meta"):
            FAMILIES[raw["model_type"]][1](config)
    except Exception as error:  # transformers raises whatever its classes do
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"no model can be made of the config.json in {where}: {kind}{describe_error(error)}"
        ) from error


def vision_structure(raw: Mapping[str, Any], folder: str, name: str) -> dict[str, Any]:
    """The vision config of the tower `name` for a base with this config.json: the base's own, or
    that of `tower_structure`."""
    if name != raw.get("mm_vision_tower"):
        return tower_structure(name)
    return raw.get("mm_vision_config") or tower_structure(name, folder)


def check_vision(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    with_weights: bool = True,
) -> None:
    """ValueError for a tower that cannot be read, a layer that it does not have, a projector that
    does not fit between it and the base, a context without room for a picture, or sizes of tiles
    that are none; from config files and the projector's own file alone. with_weights: False asks
    for config files alone."""
    folder, raw = read_config(model_args)
    asked = replace(model_args)
    keep_checkpoint_settings(asked, SimpleNamespace(**raw))
    name = asked.vision_tower
    if not name:
        return
    if with_weights and name != raw.get("mm_vision_tower"):
        structure = read_structure(name)  # a published one has to be there too
        check_tower_folder(structure, name)
    else:
        structure = vision_structure(raw, folder, name)
    tower = tower_config(structure, name)
    layers = tower.num_hidden_layers
    if not -layers - 1 <= asked.mm_vision_select_layer <= layers:
        raise ValueError(
            f"--mm_vision_select_layer {asked.mm_vision_select_layer}: the tower {name} has "
            f"{layers} layers; accepted: {-layers - 1} to {layers}"
        )
    shape = SimpleNamespace(
        mm_projector_type=asked.mm_projector_type,
        mm_hidden_size=tower.hidden_size,
        hidden_size=config_object(dict(raw)).hidden_size,
    )
    with torch.device("meta"):
        projector = build_vision_projector(shape)
    if with_weights and asked.pretrain_mm_mlp_adapter:
        check_adapter(asked.pretrain_mm_mlp_adapter, projector)
    patches = (tower.image_size // tower.patch_size) ** 2
    check_max_length(training_args.model_max_length, patches)
    if data_args.image_aspect_ratio == "anyres":
        parse_pinpoints(data_args.image_grid_pinpoints, tower.image_size)


def check_tower_folder(structure: Mapping[str, Any], name: str) -> None:
    """ValueError for a tower's folder without weights or image processor, or whose processor makes
    pictures of another size. structure: its config."""
    folder = Path(name)
    if not folder.is_dir():
        return
    if not any(
        path.is_file() for end in ("safetensors", "bin") for path in folder.glob(f"*.{end}")
    ):
        raise ValueError(f"vision tower {name!r} has no weights (*.safetensors or *.bin)")
    cls = tower_class(structure.get("model_type", "clip_vision_model"), name)
    processor = cls.processor_class().from_dict(read_json(folder / "preprocessor_config.json"))
    made, wanted = crop_side(processor), tower_config(structure, name).image_size
    if made != wanted:
        raise ValueError(
            f"{folder / 'preprocessor_config.json'} makes pictures of {made} pixels a side, the "
            f"vision tower takes {wanted}"
        )


def check_adapter(path: str, projector: torch.nn.Module) -> None:
    """ValueError unless a file holds weights of these names and shapes, as a projector stage writes
    them. projector: on the meta device."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be loaded as a projector: {describe_error(error)}"
        ) from error
    marker = "mm_projector."
    shapes = {
        key.split(marker, 1)[1]: tuple(value.shape)
        for key, value in (found.items() if isinstance(found, dict) else ())
        if marker in str(key) and isinstance(value, torch.Tensor)
    }
    wanted = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    if shapes != wanted:
        raise ValueError(
            f"{path} is no projector for this tower, base and --mm_projector_type: it holds "
            f"{shapes or 'none'}, needed is {wanted}"
        )
