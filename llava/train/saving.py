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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.train.parts import NEWLINE, PROJECTOR

PROJECTOR_FILE = "mm_projector.bin"


def projector_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The projector's parameters (and the image newline) on the CPU, keyed as in the checkpoint;
    with <im_start> and <im_end> the input embeddings too."""
    wanted = [PROJECTOR, NEWLINE]
    if getattr(model.config, "mm_use_im_start_end", False):
        wanted.append("embed_tokens")
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if any(part in name for part in wanted)
    }


def load_projector_state(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load `projector_state` from a file; ValueError when the keys are not the model's."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = set(projector_state(model))
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
        umask = os.umask(0)
        os.umask(umask)
        for file in sorted(staging.iterdir()):
            file.chmod(0o666 & ~umask)
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
