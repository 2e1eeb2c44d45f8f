"""LoRA and QLoRA: low-rank adapters inside the language model, in the files LLaVA writes.

Special here: peft puts its layers into the model in place, so the model stays a LLaVA model under
its own names and every plan's probes run through the adapted projections. A checkpoint holds
adapter_config.json, adapter_model.safetensors and non_lora_trainables.bin (all else that its base
does not hold: the projector, the image newline, a trained tower, added embeddings). QLoRA
quantises the language model at load and nothing else. Source: LLaVA-1.5 train.py.

    python -m llava.train.train --lora_enable True --lora_r 128 --lora_alpha 256 ...
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.model.checkpoint_layout import ADAPTER_FILES, NON_LORA_FILE, read_weights
from llava.train.arguments import TrainingArguments
from llava.train.parts import part_of
from llava.train.saving import gathered_parameters
from llava.utils import atomic_write

NAME = "default"  # peft's name of the adapter, part of every live parameter name
PREFIX = "base_model.model."  # in front of every name in the files
QUANTISED_KEY = "quantization_config"


# ----------------------------------------------------------------------------------- in the model
def linear_names(model: nn.Module, qv_only: bool = False) -> list[str]:
    """Last parts of the names of the language model's linear layers (lm_head is none of them), or
    of its query and value projections alone."""
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) == "language" and name != "lm_head"
    }
    return sorted(found & {"q_proj", "v_proj"} if qv_only else found)


def is_adapter(name: str) -> bool:
    """Whether a parameter is half of a low-rank adapter."""
    return ".lora_A." in name or ".lora_B." in name


def trains(name: str, bias: str) -> bool:
    """Whether LoRA trains a parameter of the language model. bias: --lora_bias."""
    if is_adapter(name):
        return True
    if not name.endswith(".bias"):
        return False
    return bias == "all" or (bias == "lora_only" and ".base_layer." in name)


def add_adapters(
    model: Any, args: TrainingArguments, base: str, also: tuple[str, ...] = ()
) -> Adapters:
    """Put fresh adapters into the language model, in place; what is trained is set by `freeze`.

    base: folder or hub id of the model's own weights. also: names of parameters that a checkpoint
    needs although they are not trained. ImportError without peft.
    """
    from peft import LoraConfig

    settings = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,  # type: ignore[arg-type]
        target_modules=linear_names(model, args.lora_qv_proj_only),
        exclude_modules=r".*(vision_tower|mm_projector|lm_head).*",  # a CLIP tower has q_proj too
        task_type="CAUSAL_LM",
    )
    model.add_adapter(settings, NAME)
    if args.bits != 16:  # in the compute type of a 4-bit layer, bfloat16 would round updates away
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.data = parameter.data.float()
    return Adapters(base, also)


def halve_frozen(model: Any) -> None:
    """Keep the language model's frozen linear weights in bfloat16: what autocast would make of them
    at every use, in half the memory."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and part_of(name) == "language":
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


# ------------------------------------------------------------------------------------ in the files
@dataclass(frozen=True)
class Adapters:
    """What a LoRA run saves beside its base. base: where that is. also: names of parameters that
    are saved though not trained, because the base does not hold them."""

    base: str
    also: tuple[str, ...] = ()

    def _saved(self, model: nn.Module) -> dict[str, tuple[str, bool]]:
        """{name in the model: (name in the file, whether that is the adapter's file)}."""
        found = {}
        for name, parameter in model.named_parameters():
            bias = parameter.requires_grad and part_of(name) == "language"
            if is_adapter(name) or (bias and name.endswith(".bias")):
                found[name] = PREFIX + name.replace(f".{NAME}.", "."), True
            elif parameter.requires_grad or name in self.also:
                found[name] = PREFIX + name, False
        return found

    def state(self, model: nn.Module, *, keep: bool | None = None) -> dict[str, Tensor]:
        """What `save` writes, by its name in the model; ranks and `keep` as in
        `gathered_parameters`."""
        return gathered_parameters(model, self._saved(model).__contains__, keep=keep)

    def save(self, model: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write adapter_config.json, adapter_model.safetensors, non_lora_trainables.bin and
        config.json."""
        adapter, rest = {}, {}
        for name, (saved, of_adapter) in self._saved(model).items():
            if name in state:  # a finished model lacks what only its training used
                (adapter if of_adapter else rest)[saved] = state[name]
        settings = deepcopy(model.peft_config[NAME])
        settings.inference_mode, settings.base_model_name_or_path = True, self.base
        settings.target_modules = sorted(settings.target_modules)
        settings.save_pretrained(str(folder))
        save_file(adapter, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
        with atomic_write(folder / NON_LORA_FILE, "wb") as file:
            torch.save(rest, file)
        config = deepcopy(model.config)
        if hasattr(config, QUANTISED_KEY):  # of the base as it was trained over, not of the files
            delattr(config, QUANTISED_KEY)
        config.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Take over what `save` wrote; ValueError when the names are not the model's."""
        found = read_weights([folder / ADAPTER_FILES[0], folder / NON_LORA_FILE])
        wanted = {saved: name for name, (saved, _) in self._saved(model).items()}
        if found.keys() != wanted.keys():
            odd = sorted(found.keys() ^ wanted.keys())
            raise ValueError(
                f"{folder} is of another LoRA run: {len(odd)} of its weights are missing or new, "
                f"e.g. {odd[0]}"
            )
        model.load_state_dict({wanted[key]: value for key, value in found.items()}, strict=False)
