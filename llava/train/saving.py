"""What a run writes: the projector's own file, and whole folders that appear all at once.

Special here: a checkpoint is written beside the old files and moved there when it is complete, so a
full disk or a kill leaves the earlier one as it was. Source of the projector's layout: LLaVA-1.5
llava_trainer.py. ``python -m llava.train.train --tune_mm_mlp_adapter True ...``
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.train.parts import NEWLINE, PROJECTOR
from llava.utils import get_logger, open_to_readers

logger = get_logger(__name__)

PROJECTOR_FILE = "mm_projector.bin"


def gathered_parameters(
    model: nn.Module, wanted: Callable[[str], bool], *, keep: bool | None = None
) -> dict[str, torch.Tensor]:
    """Whole CPU copies of the parameters whose names `wanted` accepts, however they are held: plain
    or under DDP or ZeRO-2, split by ZeRO-3, split by FSDP2.

    Every rank must call it with the same `wanted`: what is split is put together by all of them,
    one parameter after the other. keep: whether this rank gets the copies (default: rank 0 does);
    elsewhere the result is empty. Names come without what wrappers put in.
    """
    if keep is None:
        keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        if not wanted(name):
            continue
        with whole(parameter) as tensor:
            if keep:
                found[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return found


_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put in."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextlib.contextmanager
def whole(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The parameter's full tensor, on all ranks, for the time of the block."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            yield parameter
    elif hasattr(parameter, "full_tensor"):
        # Offloaded shards lie on the CPU, which the mesh's collectives do not know.
        yield parameter.to(parameter.device_mesh.device_type).full_tensor()
    else:
        yield parameter


def gathered_state(model: nn.Module, *, keep: bool | None = None) -> dict[str, torch.Tensor]:
    """`gathered_parameters` of a whole model with the buffers that belong to a checkpoint."""
    state = gathered_parameters(model, lambda name: True, keep=keep)
    if state:
        names = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
        state |= {name: model.get_buffer(name).detach().cpu() for name in sorted(names)}
    return state


def projector_state(model: Any, *, keep: bool | None = None) -> dict[str, torch.Tensor]:
    """The projector's parameters (and the image newline) on the CPU, keyed as in the checkpoint;
    with <im_start> and <im_end> the input embeddings too. Ranks and `keep`: as in
    `gathered_parameters`."""
    wanted = _projector_parts(model)
    return gathered_parameters(model, lambda name: any(part in name for part in wanted), keep=keep)


def _projector_parts(model: Any) -> list[str]:
    with_marks = getattr(model.config, "mm_use_im_start_end", False)
    return [PROJECTOR, NEWLINE, *(["embed_tokens"] if with_marks else [])]


def load_projector_state(model: Any, path: str | os.PathLike[str]) -> None:
    """Load `projector_state` from a file; ValueError when the keys are not the model's."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    parts = _projector_parts(model)
    own = {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    if set(state) != own:
        raise ValueError(f"{path} holds {sorted(state)}, the model needs {sorted(own)}")
    model.load_state_dict(state, strict=False)


@contextlib.contextmanager
def caching_config(model: Any) -> Iterator[None]:
    """Save with ``use_cache`` on: training turns it off, a checkpoint is for generation."""
    before = model.config.use_cache
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = before


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`'s files whose content is moved into `target` if all went well."""
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            open_to_readers(file)
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


STAGING = ".saving-checkpoint"
"""Where checkpoints are written in the output folder, before they get their name."""


def publish(written: Path, target: Path) -> None:
    """Give a complete checkpoint folder its name; one of that name that is there already goes."""
    for file in written.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        old = written.with_name(f"old-{target.name}")
        os.replace(target, old)
        os.replace(written, target)
        shutil.rmtree(old)
    else:
        os.replace(written, target)


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a run that was killed while saving has left, and say so."""
    for folder in sorted((output_dir / STAGING).glob("*")):
        logger.warning("%s was not complete when the run ended and is removed", folder.name)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
