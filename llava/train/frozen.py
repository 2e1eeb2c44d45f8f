"""Weights that a run does not train: they come from its base, and a run that goes on proves it.

Special here: the part of a checkpoint that a run resumes from holds what is trained, not the frozen
base (13 GB of a 7B), whatever the engine: DeepSpeed's writes and reads them unless it is told not
to. In their place a checkpoint has ``frozen.json``, a hash of every frozen weight. It is compared
once everything is loaded, so a run cannot go on over another base, tower or seed. A checkpoint
without the file, from before, is read with the frozen weights that it holds.
``python -m llava.train.train --deepspeed scripts/zero3.json --lora_enable True ...``
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.train.ranks import from_all_ranks
from llava.train.saving import plain_name, whole
from llava.utils import get_logger

logger = get_logger(__name__)

FROZEN_FILE = "frozen.json"


# ------------------------------------------------------------------------------ DeepSpeed's files
def frozen_names(model: nn.Module) -> set[str]:
    """Names of the frozen parameters, all of them where one tensor has several."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _of(model: nn.Module) -> Callable[[str], bool]:
    """Whether a key of a state dict is a frozen parameter or, behind its name, what quantisation
    keeps beside one."""
    names = frozen_names(model)
    return lambda key: (
        key in names or any(key[:at] in names for at, sign in enumerate(key) if sign == ".")
    )


@contextlib.contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Within the block `model.state_dict()` has no frozen weights."""

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        frozen = _of(module)
        for key in [key for key in state if frozen(key.removeprefix(prefix))]:
            del state[key]

    handle = model.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def may_be_missing(model: nn.Module) -> None:
    """From now on a strict `model.load_state_dict` takes a state dict without frozen weights; it is
    as strict as before with the trained ones."""

    def forgive(module: nn.Module, found: Any) -> None:
        frozen = _of(module)
        for keys in (found.missing_keys, found.unexpected_keys):
            keys[:] = [key for key in keys if not frozen(key)]

    model.register_load_state_dict_post_hook(forgive)


# --------------------------------------------------------------------------------------- the proof
def hashes(model: nn.Module) -> dict[str, dict[str, str]]:
    """{frozen parameter: {type: hash of shape and values in it}}, the same on every rank; all call
    it. float32 also has its bfloat16 rounding, since some engines hold frozen weights in half."""
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = {}
    # A state dict first brings what quantisation has repacked back into its usual form.
    named = model.state_dict(keep_vars=True).items()
    frozen = [(n, p) for n, p in named if isinstance(p, nn.Parameter) and not p.requires_grad]
    for number, (name, parameter) in enumerate(frozen):
        with whole(parameter) as tensor:  # by all ranks; the work after it is shared out
            if number % ranks == rank:
                own[plain_name(name)] = _hash(tensor.detach())
    return {name: found for part in from_all_ranks(own) for name, found in part.items()}


def _hash(tensor: Tensor) -> dict[str, str]:
    forms = [tensor, tensor.to(torch.bfloat16)] if tensor.is_floating_point() else [tensor]
    found = {}
    for form in forms:
        kind = str(form.dtype).removeprefix("torch.")
        if kind not in found:
            digest = hashlib.blake2b(str(tuple(form.shape)).encode(), digest_size=16)
            digest.update(form.cpu().contiguous().flatten().view(torch.uint8).numpy())
            found[kind] = digest.hexdigest()
    return found


def check_frozen(
    model: nn.Module, checkpoint: Path, *, universal: bool = False
) -> dict[str, dict[str, str]] | None:
    """`hashes` of a model into which `checkpoint` has been loaded, None where that has no file of
    them; all ranks call it. ValueError, on all of them, when the frozen weights are others.
    universal: it was read in DeepSpeed's universal form, which under ZeRO-3 has no frozen weights,
    so without the file nothing is known of them; a warning says so."""
    file = checkpoint / FROZEN_FILE
    then = from_all_ranks(json.loads(file.read_text("utf-8")) if file.is_file() else None)[0]
    if then is None:
        if universal and frozen_names(model):
            logger.warning(
                "%s has no %s: give the base that it was trained over, which cannot be checked",
                checkpoint,
                FROZEN_FILE,
            )
        return None
    now = hashes(model)
    odd = sorted(name for name in then.keys() | now.keys() if not _same(then, now, name))
    if odd:
        raise ValueError(
            f"{checkpoint} was trained over other frozen weights: {len(odd)} of {len(then)} are "
            f"not those of this run, e.g. {odd[0]}; give the base, tower, seed and precision that "
            "it was started with"
        )
    return now


def _same(then: dict[str, Any], now: dict[str, Any], name: str) -> bool:
    old, new = then.get(name, {}), now.get(name, {})
    return any(kind in new for kind in old) and all(new.get(k, old[k]) == old[k] for k in old)
