"""`llava convert`: a checkpoint of any layout, written in LLaVA's or in transformers' own.

Special here: what is read is whatever `llava.model.assemble` reads (shards, spellings, LoRA over
its base, a tower in its own folder), so converting also merges. Weights keep their values and
dtype bit by bit. transformers' layout needs an <image> token: where the vocabulary has no row left,
rows are added, and the way back takes them off again. The folder appears when it is complete.

    llava convert --to hf llava-v1.5-7b llava-1.5-7b-hf
    llava convert --to llava llava-1.5-7b-hf llava-v1.5-7b
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AddedToken

from llava.conversation import get_conversation, resolve_conv_mode
from llava.mm_utils import crop_side
from llava.model.assemble import (
    ARCHITECTURES,
    Parts,
    assemble,
    check_weights,
    empty_model,
    read_non_lora,
)
from llava.model.builder import (
    FAMILIES,
    add_image_tokens,
    float_type,
    generation_settings,
    image_processor_of,
    read_config,
)
from llava.model.chat_template import chat_template, picture_text
from llava.model.checkpoint_layout import (
    PROJECTOR_FILE,
    CheckpointFiles,
    inspect_checkpoint,
    read_json,
    read_weights,
    resolve_folder,
)
from llava.model.hf_config import nest
from llava.model.key_maps import (
    EMBEDDINGS,
    HEAD,
    NEWLINE,
    PROJECTOR_PREFIX,
    adapter_names,
    from_llava,
    rename_all,
    shortened,
    with_vision_model,
)
from llava.model.model_card import SUMMARY_FILE, read_summary, score_rows, write_card
from llava.model.tokenizers import load_tokenizer
from llava.reduction.plan import resolve_plan
from llava.utils import (
    atomic_write,
    check_output,
    describe_error,
    get_logger,
    json_dump,
    make_folder,
    open_to_readers,
    user_errors,
)

log = get_logger(__name__)

ROWS = "llava_vocabulary"  # config key: what the way back takes off again
_MULTIPLE = 64  # llava-hf pads its vocabularies to it
_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt")


def convert(
    source: str | Path,
    target: str | Path,
    to: Literal["hf", "llava"],
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    max_shard_size: str = "5GB",
    scores: Sequence[str | Path] = (),
    dtype: str | torch.dtype | None = None,
) -> Path:
    """Write `source` as the new folder `target`, with a model card; returns it.

    model_base, vision_tower: as in `load_checkpoint`. scores: folders of runs for the card (their
    plan and set are named there). dtype: of all weights, None for those of the files. ValueError
    for a source that cannot be read or that the other layout cannot hold, for a target that exists
    and for a disk without room; OSError for a target that cannot be written.
    """
    if to not in ("hf", "llava"):
        raise ValueError(f"layout {to!r} is unknown; accepted: hf, llava")
    # What can be wrong beside the weights is looked at before they are read.
    target = _free_name(target)
    shard = _shard_size(max_shard_size)
    wanted = None if dtype is None else float_type(dtype)
    score_rows(scores, (source, target))
    base = None if model_base is None else resolve_folder(model_base)
    parts = assemble(resolve_folder(source), base, vision_tower, wanted)
    if not parts.config.get("mm_vision_tower"):
        raise ValueError(f"{source} has no vision tower: it is a plain language model")
    config, model = _checked(parts, source)
    if wanted is not None:
        config.dtype = wanted
    tokenizer = load_tokenizer(parts.folders)
    add_image_tokens(model, tokenizer)
    summary = read_summary(parts.folders[0])
    generation = generation_settings(parts.folders)
    _check_room(target, parts.weights.values(), wanted)
    with _new_folder(target) as folder:
        write = _write_hf if to == "hf" else _write_llava
        weights = write(folder, parts, config, tokenizer, image_processor_of(model, parts))
        _write_weights(folder, weights, shard, wanted)
        if generation is not None:
            json_dump(folder / "generation_config.json", generation)
        if summary:
            json_dump(folder / SUMMARY_FILE, summary)
        made_from = f"{source}: {parts.origin.value}"
        write_card(
            folder, name=target.name, made_from=made_from, scores=scores, known=(source, target)
        )
    log.info("%s -> %s: %d weights (%s)", source, target, len(parts.weights), parts.origin.value)
    return target


def _checked(parts: Parts, source: str | Path) -> tuple[Any, Any]:
    """(config, empty model) of the parts. ValueError unless plan and weights fit them."""
    config = read_config(parts)
    resolve_plan(None, config)[0].validate(config.num_hidden_layers)
    where = str(parts.folders[0] / "config.json")
    model = empty_model(FAMILIES[parts.config["model_type"]][1], config, where)
    unused = check_weights(parts.weights, model, str(source))
    if unused:
        raise ValueError(f"{source}: weights without a place in the model: {shortened(unused)}")
    return config, model


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _shard_size(text: str) -> int:
    """Bytes of `5GB`, `800MB`. ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ValueError(f"shard size {text!r}; accepted: a number with KB, MB, GB or TB: 5GB")
    return size


def _free_name(target: str | Path) -> Path:
    """`target` as a path that nothing is at yet. ValueError for another one, OSError for one that
    cannot be made."""
    path = Path(target).expanduser()
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; give a folder that does not")
    check_output(path)
    return path


def _check_room(target: Path, weights: Iterable[Tensor], dtype: torch.dtype | None) -> None:
    """ValueError where the disk has less room than the weights need."""
    there = next(parent for parent in target.absolute().parents if parent.is_dir())
    size, free = sum(_stored(value, dtype) for value in weights), shutil.disk_usage(there).free
    if size > free:
        raise ValueError(f"{target} needs {_bytes(size)}; {there} has {_bytes(free)} left")


def _stored(weight: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a weight in a file; dtype: as for `_write_weights`."""
    cast = dtype is not None and weight.is_floating_point()
    return weight.numel() * (dtype if cast else weight.dtype).itemsize


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count > 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error. OSError, with
    the reason, for files that cannot be written."""
    make_folder(target.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        open_to_readers(folder)
        folder.rename(target)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        # tokenizers has no class of its own for a file that it cannot write
        if isinstance(error, (SafetensorError, OSError)) or type(error) is Exception:
            reason = describe_error(error).replace(f"{folder}{os.sep}", "")
            raise OSError(f"{target} could not be written ({reason})") from error
        raise


def _write_weights(
    folder: Path, weights: dict[str, Tensor], max_shard_size: int, dtype: torch.dtype | None
) -> None:
    """Safetensors shards with transformers' names and index; one shard is in memory at a time.
    dtype: of the floating point weights; None leaves them as they are."""
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=partial(_stored, dtype=dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name in names:
            value = weights[name]
            cast = value.to(dtype) if dtype and value.is_floating_point() else value
            # A file of torch's may hold tied weights once; one of safetensors' holds each.
            shard[name] = cast.clone() if cast.data_ptr() in seen else cast.contiguous()
            seen.add(cast.data_ptr())
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        json_dump(folder / "model.safetensors.index.json", index)


def _copy_tokenizer_files(folders: Sequence[Path], target: Path) -> None:
    """The slow tokenizer's files, which transformers 5 reads and no longer writes."""
    for name in _TOKENIZER_FILES:
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is not None and not (target / name).exists():
            shutil.copyfile(file, target / name)


# ----------------------------------------------------------------------------- transformers' layout
def _write_hf(
    folder: Path, parts: Parts, config: Any, tokenizer: Any, processor: Any
) -> dict[str, Tensor]:
    """Write all but the weights, which are returned under their names there."""
    raw = nest(config, str(parts.folders[0]))
    rows = config.vocab_size
    before = {"rows": rows, "tokens": len(tokenizer), "pad_token": tokenizer.pad_token}
    before["pad_token_id"] = raw["text_config"].get("pad_token_id")
    before["chat_template"] = tokenizer.chat_template
    if "<image>" not in tokenizer.get_vocab():
        image = AddedToken("<image>", special=True, normalized=False)
        tokenizer.add_tokens(image, special_tokens=True)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        raw[ROWS] = before
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    if len(tokenizer) > rows:
        rows = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
        for name in {EMBEDDINGS, HEAD} & parts.weights.keys():
            parts.weights[name] = _add_rows(parts.weights[name], rows)
    raw["image_token_index"] = image_id
    raw["text_config"] |= {"vocab_size": rows, "pad_token_id": tokenizer.pad_token_id}
    json_dump(folder / "config.json", raw)
    _hf_processor(raw, config, tokenizer, processor).save_pretrained(folder)
    _copy_tokenizer_files(parts.folders, folder)
    return {from_llava(name, "hub"): value for name, value in parts.weights.items()}


def _add_rows(weight: Tensor, rows: int) -> Tensor:
    """Fill up a vocabulary's weight [V, D] to [rows, D] with the mean row: as a logit it is never
    the largest one."""
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _hf_processor(raw: dict[str, Any], config: Any, tokenizer: Any, processor: Any) -> Any:
    """transformers' processor with our image processor's settings, template and image mode."""
    import transformers

    kind = {"llava": "Llava", "llava_next": "LlavaNext"}[raw["model_type"]]
    values = {
        key: getattr(processor, key)
        for key in ("crop_size", "image_mean", "image_std", "resample", "size")
        if getattr(processor, key, None) is not None
    }
    if "crop_size" not in values:  # SigLIP's scales to the size itself; the default would crop
        side = crop_side(processor)
        values |= {"crop_size": {"height": side, "width": side}, "do_center_crop": False}
    if kind == "LlavaNext":
        values["image_grid_pinpoints"] = raw["image_grid_pinpoints"]
    else:
        values["do_pad"] = getattr(config, "image_aspect_ratio", None) == "pad"
    images = getattr(transformers, f"{kind}ImageProcessorPil")(**values)
    mode, _ = resolve_conv_mode(None, config)
    template = chat_template(get_conversation(mode), picture_text(tokenizer, config))
    if template is None:
        log.warning("template %s cannot be said as a chat template; the processor has none", mode)
    vision = raw["vision_config"]
    return getattr(transformers, f"{kind}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=raw["vision_feature_select_strategy"],
        num_additional_image_tokens=int(vision["model_type"] == "clip_vision_model"),
        chat_template=template,
    )


# ----------------------------------------------------------------------------------- LLaVA's layout
_ARCHITECTURES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
    "llava_qwen3": "LlavaQwen3ForCausalLM",
}


def _write_llava(
    folder: Path, parts: Parts, config: Any, tokenizer: Any, processor: Any
) -> dict[str, Tensor]:
    """Write all but the weights, which are returned under their names there."""
    raw = config.to_dict()
    named = parts.config.get("architectures") or [None]
    own = _ARCHITECTURES[config.model_type]
    # PyramidDrop's class is the one sign that such a checkpoint was trained with dropping.
    raw["architectures"] = named if ARCHITECTURES.get(named[0]) == config.model_type else [own]
    raw.pop("_name_or_path", None)
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_theta"):  # the name that older code reads
        raw["rope_theta"] = rope["rope_theta"]
    before = _added(parts.folders[0] / "config.json")
    if before:
        tokenizer.chat_template = before.get("chat_template")  # the processor's names <image>
    tokenizer.save_pretrained(folder)
    if before:
        rows = before["rows"]
        for name in {EMBEDDINGS, HEAD} & parts.weights.keys():
            parts.weights[name] = parts.weights[name][:rows]
        raw |= {"vocab_size": rows, "pad_token_id": before.get("pad_token_id")}
        raw.pop("image_token_index", None)
        _take_off_tokens(folder, before)
    json_dump(folder / "config.json", {key: value for key, value in raw.items() if key != ROWS})
    processor.save_pretrained(folder)
    _copy_tokenizer_files(parts.folders, folder)
    return {with_vision_model(name): value for name, value in parts.weights.items()}


def _added(file: Path) -> dict[str, Any]:
    """What the way to transformers' layout changed; empty for a checkpoint that it did not make."""
    before = read_json(file).get(ROWS) or {}
    if before and not (isinstance(before, dict) and before.keys() >= {"rows", "tokens"}):
        raise ValueError(f"{file}: {ROWS} is {before!r}; accepted: what `llava convert` wrote")
    return before


def _take_off_tokens(folder: Path, before: dict[str, Any]) -> None:
    """Remove the tokens that the way to transformers' layout added."""
    file = folder / "tokenizer.json"
    tokens = read_json(file)
    tokens["added_tokens"] = [t for t in tokens["added_tokens"] if t["id"] < before["tokens"]]
    json_dump(file, tokens)
    file = folder / "tokenizer_config.json"
    settings = read_json(file) | {"pad_token": before.get("pad_token")}
    json_dump(file, {key: value for key, value in settings.items() if key != "processor_class"})


# ---------------------------------------------------------------------------------- the projector
def extract_projector(source: str | Path, target: str | Path) -> list[str]:
    """Write a checkpoint's projector (and image newline) as a mm_projector.bin; returns the names.

    source: a folder of any layout, whole, LoRA or projector-only. ValueError when it holds no
    projector, and for a target that is one of its own files.
    """
    files, target = inspect_checkpoint(resolve_folder(source)), Path(target).expanduser()
    _check_projector_file(target, files)
    check_output(target)
    if files.kind == "full":
        weights = rename_all(read_weights(files.weights))
    elif files.kind == "lora":
        weights = read_non_lora(files.path)
    else:
        weights = adapter_names(read_weights(files.weights))
    found = {
        name: value.contiguous().clone()
        for name, value in weights.items()
        if name.startswith(PROJECTOR_PREFIX) or name == NEWLINE
    }
    if not any(name.startswith(PROJECTOR_PREFIX) for name in found):
        raise ValueError(f"{source} holds no projector ({PROJECTOR_PREFIX}*)")
    buffer = io.BytesIO()  # torch's own writer calls a full disk a RuntimeError
    torch.save(found, buffer)
    with atomic_write(target, "wb") as file:
        file.write(buffer.getbuffer())
    return sorted(found)


def _check_projector_file(target: Path, files: CheckpointFiles) -> None:
    if target.suffix == ".safetensors":
        raise ValueError(f"{target}: the projector is written as LLaVA's mm_projector.bin")
    own = target.exists() and target.resolve().parent == files.path.resolve()
    made_here = target.name == PROJECTOR_FILE and files.kind != "projector"
    if own and not made_here:
        raise ValueError(f"{target} is a file of the checkpoint itself; give another one")


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """`llava convert --to hf|llava SOURCE TARGET`."""
    parser = argparse.ArgumentParser(
        prog="llava convert",
        description="Write a checkpoint of any layout in LLaVA's or in transformers'. A LoRA run "
        "or a projector becomes one checkpoint with its base.",
    )
    parser.add_argument("source", help="checkpoint folder, or hub id")
    parser.add_argument("target", help="folder to make")
    parser.add_argument("--to", required=True, choices=["hf", "llava"], help="layout to write")
    parser.add_argument(
        "--model-base",
        metavar="BASE",
        help="what a LoRA or projector was trained over (default: what its files name)",
    )
    parser.add_argument(
        "--vision-tower", metavar="TOWER", help="folder or hub id, in place of the checkpoint's"
    )
    parser.add_argument(
        "--dtype", help="float16, bfloat16 or float32 for all weights (default: those of the files)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default 5GB)"
    )
    parser.add_argument(
        "--scores", nargs="+", default=[], metavar="RUN",
        help="runs for the model card: folders of `llava eval`, or their scores.json",
    )  # fmt: skip
    args = parser.parse_args(argv)
    convert(
        args.source,
        args.target,
        args.to,
        args.model_base,
        args.vision_tower,
        args.max_shard_size,
        args.scores,
        args.dtype,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
