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
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AddedToken

from llava.conversation import get_conversation, resolve_conv_mode
from llava.mm_utils import crop_side
from llava.model.assemble import ARCHITECTURES, Parts, assemble, check_weights
from llava.model.builder import (
    FAMILIES,
    image_processor_of,
    read_config,
)
from llava.model.chat_template import after_picture, chat_template
from llava.model.checkpoint_layout import (
    NON_LORA_FILE,
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
    with_vision_model,
)
from llava.model.model_card import SUMMARY_FILE, write_card
from llava.model.tokenizers import load_tokenizer
from llava.utils import atomic_write, get_logger, json_dump, user_errors

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
) -> Path:
    """Write `source` as the new folder `target`, with a model card; returns it.

    model_base, vision_tower: as in `load_checkpoint`. scores: folders of runs for the card (their
    plan and set are named there). ValueError for a source that cannot be read
    or that the other layout cannot hold, and for a target that exists.
    """
    if to not in ("hf", "llava"):
        raise ValueError(f"layout {to!r} is unknown; accepted: hf, llava")
    target = Path(target).expanduser()
    base = None if model_base is None else resolve_folder(model_base)
    parts = assemble(resolve_folder(source), base, vision_tower)
    if not parts.config.get("mm_vision_tower"):
        raise ValueError(f"{source} has no vision tower: it is a plain language model")
    config = read_config(parts)
    with torch.device("meta"):
        model = FAMILIES[parts.config["model_type"]][1](config)
    unused = check_weights(parts.weights, model, str(source))
    if unused:
        raise ValueError(f"{source}: weights without a place in the model: {', '.join(unused)}")
    tokenizer = load_tokenizer(parts.folders)
    with _new_folder(target) as folder:
        write = _write_hf if to == "hf" else _write_llava
        write(folder, parts, config, tokenizer, image_processor_of(model, parts), max_shard_size)
        _copy_generation_config(parts.folders, folder)
        summary = parts.folders[0] / SUMMARY_FILE
        if summary.is_file():
            shutil.copyfile(summary, folder / SUMMARY_FILE)
        made_from = f"{source}: {parts.origin.value}"
        write_card(folder, name=target.name, made_from=made_from, scores=scores)
    log.info("%s -> %s: %d weights (%s)", source, target, len(parts.weights), parts.origin.value)
    return target


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error."""
    if target.exists():
        raise ValueError(f"{target} exists already; give a folder that does not")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: str) -> None:
    """Safetensors shards with transformers' names and index."""
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name].contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        json_dump(folder / "model.safetensors.index.json", index)


def _copy_generation_config(folders: Sequence[Path], target: Path) -> None:
    for folder in folders:
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", target / "generation_config.json")
            return


def _copy_tokenizer_files(folders: Sequence[Path], target: Path) -> None:
    """The slow tokenizer's files, which transformers 5 reads and no longer writes."""
    for name in _TOKENIZER_FILES:
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is not None and not (target / name).exists():
            shutil.copyfile(file, target / name)


# ----------------------------------------------------------------------------- transformers' layout
def _write_hf(
    folder: Path, parts: Parts, config: Any, tokenizer: Any, processor: Any, max_shard_size: str
) -> None:
    raw = nest(config, str(parts.folders[0]))
    rows = config.vocab_size
    before = {"rows": rows, "tokens": len(tokenizer), "pad_token": tokenizer.pad_token}
    before["pad_token_id"] = raw["text_config"].get("pad_token_id")
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
    weights = {from_llava(name, "hub"): value for name, value in parts.weights.items()}
    _write_weights(folder, weights, max_shard_size)
    _hf_processor(raw, config, tokenizer, processor).save_pretrained(folder)
    _copy_tokenizer_files(parts.folders, folder)


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
    vision = raw["vision_config"]
    return getattr(transformers, f"{kind}Processor")(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=raw["vision_feature_select_strategy"],
        num_additional_image_tokens=int(vision["model_type"] == "clip_vision_model"),
        chat_template=chat_template(get_conversation(mode), after_picture(tokenizer)),
    )


# ----------------------------------------------------------------------------------- LLaVA's layout
_ARCHITECTURES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
    "llava_qwen3": "LlavaQwen3ForCausalLM",
}


def _write_llava(
    folder: Path, parts: Parts, config: Any, tokenizer: Any, processor: Any, max_shard_size: str
) -> None:
    raw = config.to_dict()
    named = parts.config.get("architectures") or [None]
    own = _ARCHITECTURES[config.model_type]
    # PyramidDrop's class is the one sign that such a checkpoint was trained with dropping.
    raw["architectures"] = named if ARCHITECTURES.get(named[0]) == config.model_type else [own]
    raw.pop("_name_or_path", None)
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_theta"):  # the name that older code reads
        raw["rope_theta"] = rope["rope_theta"]
    source = read_json(parts.folders[0] / "config.json")
    tokenizer.save_pretrained(folder)
    before = source.get(ROWS)
    if before:
        rows = before["rows"]
        for name in {EMBEDDINGS, HEAD} & parts.weights.keys():
            parts.weights[name] = parts.weights[name][:rows]
        raw |= {"vocab_size": rows, "pad_token_id": before["pad_token_id"]}
        raw.pop("image_token_index", None)
        _take_off_tokens(folder, before)
    json_dump(folder / "config.json", {key: value for key, value in raw.items() if key != ROWS})
    weights = {with_vision_model(name): value for name, value in parts.weights.items()}
    _write_weights(folder, weights, max_shard_size)
    processor.save_pretrained(folder)
    _copy_tokenizer_files(parts.folders, folder)


def _take_off_tokens(folder: Path, before: dict[str, Any]) -> None:
    """Remove the tokens that the way to transformers' layout added."""
    file = folder / "tokenizer.json"
    tokens = read_json(file)
    tokens["added_tokens"] = [t for t in tokens["added_tokens"] if t["id"] < before["tokens"]]
    json_dump(file, tokens)
    file = folder / "tokenizer_config.json"
    settings = read_json(file) | {"pad_token": before["pad_token"]}
    json_dump(file, {key: value for key, value in settings.items() if key != "processor_class"})


# ---------------------------------------------------------------------------------- the projector
def extract_projector(source: str | Path, target: str | Path) -> list[str]:
    """Write a checkpoint's projector (and image newline) as a mm_projector.bin; returns the names.

    source: a folder of any layout, whole, LoRA or projector-only. ValueError when it holds no
    projector.
    """
    files = inspect_checkpoint(resolve_folder(source))
    if files.kind == "full":
        weights = rename_all(read_weights(files.weights))
    else:
        lora = files.kind == "lora"
        weights = adapter_names(
            read_weights([files.path / NON_LORA_FILE] if lora else files.weights)
        )
    found = {
        name: value.contiguous().clone()
        for name, value in weights.items()
        if name.startswith(PROJECTOR_PREFIX) or name == NEWLINE
    }
    if not any(name.startswith(PROJECTOR_PREFIX) for name in found):
        raise ValueError(f"{source} holds no projector ({PROJECTOR_PREFIX}*)")
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, "wb") as file:
        torch.save(found, file)
    return sorted(found)


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """`llava convert --to hf|llava SOURCE TARGET`."""
    parser = argparse.ArgumentParser(
        prog="llava convert",
        description="Write a checkpoint of any layout in LLaVA's layout or in transformers'.",
    )
    parser.add_argument("source", help="checkpoint folder, or hub id")
    parser.add_argument("target", help="folder to make")
    parser.add_argument("--to", required=True, choices=["hf", "llava"], help="layout to write")
    parser.add_argument("--model-base", help="base model of a LoRA or projector-only checkpoint")
    parser.add_argument("--vision-tower", help="tower to use in place of the checkpoint's")
    parser.add_argument("--max-shard-size", default="5GB", help="default 5GB")
    parser.add_argument(
        "--scores", nargs="+", default=[], metavar="RUN", help="runs for the model card"
    )
    args = parser.parse_args(argv)
    convert(
        args.source,
        args.target,
        args.to,
        args.model_base,
        args.vision_tower,
        args.max_shard_size,
        args.scores,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
