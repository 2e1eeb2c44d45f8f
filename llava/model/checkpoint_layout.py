"""What lies in a checkpoint's folder, and its weights as lazily read tensors.

Special here: a folder is recognised by its files and by the keys of config.json, never by its name.
No pickle is run (`weights_only`), every damage is named with its file, and nothing is copied:
tensors are views into memory-mapped files until something reads them.

    files = inspect_checkpoint("llava-v1.5-7b")     # kind, layout, config, weight files
    weights = read_weights(files.weights)           # {name: tensor}
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.model.key_maps import shortened

Kind = Literal["full", "lora", "projector"]
Layout = Literal["llava", "hf"]

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
BASE_KEY = "base_model_name_or_path"  # peft's, in adapter_config.json; in config.json ours
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")


_SMALL = (*ADAPTER_FILES, PROJECTOR_FILE, NON_LORA_FILE)
_HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.npy", *_SMALL)


def resolve_folder(name: str | Path) -> Path:
    """A local folder, or the local copy of a hub repository (its .bin files only where it has no
    safetensors). ValueError when there is none."""
    path = Path(name).expanduser()
    text = str(name)
    if path.exists() or path.is_absolute() or text.count("/") != 1 or text.startswith("."):
        return path  # `inspect_checkpoint` names what is wrong with it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(text, allow_patterns=[*_HUB_FILES, "*.safetensors"]))
        if any(folder.glob("*.safetensors")) or any((folder / name).is_file() for name in _SMALL):
            return folder
        return Path(snapshot_download(text, allow_patterns=[*_HUB_FILES, "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{text} is neither a folder here nor to be had from the hub: {first}"
        ) from None


@dataclass(frozen=True)
class CheckpointFiles:
    """A recognised folder. layout: "llava" (flat config) or "hf" (text_config and vision_config).
    kind: "full" weights, a "lora" adapter, or the "projector" alone. config: config.json as it
    is. weights: the full model's files, the adapter's, or the projector's."""

    path: Path
    layout: Layout
    kind: Kind
    config: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def is_multimodal(self) -> bool:
        return self.layout == "hf" or bool(self.config.get("mm_vision_tower"))

    def describe(self) -> str:
        """One line, e.g. `llava layout, full weights in 2 safetensors files`."""
        what = {"full": "full weights", "lora": "LoRA adapter", "projector": "projector only"}
        suffix = self.weights[0].suffix.removeprefix(".")
        count = f"{len(self.weights)} {suffix} file{'s' * (len(self.weights) > 1)}"
        return f"{self.layout} layout, {what[self.kind]} in {count}"


def inspect_checkpoint(path: str | Path) -> CheckpointFiles:
    """Recognise a local folder. ValueError, by name, for what is missing or not known."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} is no checkpoint but a file; give the folder of one")
    if not folder.is_dir():
        raise ValueError(f"{path} is no checkpoint: there is no such folder")
    config = read_json(folder / "config.json", f"{folder} is no checkpoint{_unfinished(folder)}")
    if "quantization_config" in config:
        raise ValueError(
            f"{folder} holds quantised weights (quantization_config in config.json); give the "
            "checkpoint in full precision, and --load-4bit or --load-8bit to quantise it at load"
        )
    nested = {"text_config", "vision_config"} & set(config)
    if len(nested) == 1:
        raise ValueError(
            f"{folder / 'config.json'} has {nested.pop()} alone; transformers' layout has "
            "text_config and vision_config, LLaVA's neither"
        )
    layout: Layout = "hf" if nested else "llava"
    weights = weight_files(folder)
    if weights:
        return CheckpointFiles(folder, layout, "full", config, weights)
    if (folder / "adapter_config.json").is_file():
        adapter = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
        if not adapter:
            raise ValueError(
                f"{folder} has an adapter_config.json but no {' or '.join(ADAPTER_FILES)}"
            )
        return CheckpointFiles(folder, layout, "lora", config, (adapter[0],))
    if (folder / PROJECTOR_FILE).is_file():
        return CheckpointFiles(folder, layout, "projector", config, (folder / PROJECTOR_FILE,))
    raise ValueError(
        f"{folder} holds no weights; looked for {', '.join(SINGLE_FILES)}, their shards, "
        f"{', '.join(ADAPTER_FILES)} and {PROJECTOR_FILE}"
    )


def _unfinished(folder: Path) -> str:
    """What to say of the output folder of a run that is not at its end."""
    steps = {
        int(number): path.name
        for path in folder.glob("checkpoint-*")
        if (number := path.name.rpartition("-")[2]).isdecimal() and (path / "config.json").is_file()
    }
    return f" (a run that has not ended; {steps[max(steps)]} in it is one)" if steps else ""


def read_json(file: Path, where: str | None = None) -> dict[str, Any]:
    """A JSON object from a file. ValueError, by name, when it is missing or no JSON object."""
    if not file.is_file():
        raise ValueError(f"{where or file.parent}: {file.name} is missing")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of a full model, safetensors before .bin; empty when there are none.

    Raises ValueError with the names of missing shards.
    """
    for single in SINGLE_FILES:
        if (folder / single).is_file():  # in front of an older index, as in transformers
            return (folder / single,)
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            _all_there(folder, names, f"listed in {index.name}")
            return tuple(folder / name for name in names)
        shards = _numbered_shards(folder, single)
        if shards:
            _all_there(folder, shards, "of its numbered shards")
            return tuple(folder / name for name in shards)
    return ()


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    odd = [name for name in names.values() if not str(name).endswith(suffix)]
    if odd:
        raise ValueError(f"{index} names {odd[0]!r}; accepted: names of {suffix} files")
    outside = [name for name in names.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names a file outside of its folder: {outside[0]}")
    return names


def _numbered_shards(folder: Path, single: str) -> list[str]:
    """Names of all shards of a set without an index file, as the numbers in the names tell."""
    stem, suffix = single.rsplit(".", 1)
    for file in sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
        match = _SHARD.fullmatch(file.name)
        if match:
            digits, total = len(match[2]), match[3]
            return [f"{stem}-{i:0{digits}d}-of-{total}.{suffix}" for i in range(1, int(total) + 1)]
    return []


def _all_there(folder: Path, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"checkpoint {folder} is incomplete: {shortened(missing)} {what} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of some files, on the CPU, memory-mapped.

    ValueError for a file that is damaged, a pickle that holds anything but tensors, a name that is
    there twice, and shards that lack a weight their index lists.
    """
    out: dict[str, Tensor] = {}
    for file in files:
        found = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        twice = out.keys() & found.keys()
        if twice:
            raise ValueError(f"{file} repeats weights of another shard: {shortened(twice)}")
        out |= found
    _as_indexed(files, out)
    return out


def _as_indexed(files: Sequence[Path], found: dict[str, Tensor]) -> None:
    if not files:
        return
    match = _SHARD.fullmatch(files[0].name)
    index = files[0].with_name(f"{match[1]}.{match[4]}.index.json") if match else None
    if index is None or not index.is_file():
        return
    lost = _weight_map(index).keys() - found.keys()
    if lost:
        raise ValueError(
            f"checkpoint {index.parent}: weights listed in {index.name} are in none of its files: "
            + shortened(lost)
        )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(file)  # only these can be mapped; a truncated one is none
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise ValueError(
                f"{file} is refused: beside tensors it holds {unsafe[1]}, which could run code"
            ) from None
        raise ValueError(f"{file} is truncated, damaged or no tensor file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is truncated or damaged: {first}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not a dict of tensors")
    other = [
        str(key)
        for key, value in found.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if other:
        raise ValueError(f"{file} holds entries that are no named tensors: {shortened(other)}")
    return dict(found)
