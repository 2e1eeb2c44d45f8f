"""A file that cannot be written or read ends a run in one line, with what is still whole.

Special here: each library complains in its own way (safetensors and torch raise errors that are no
OSErrors, a stream writer speaks of positions), so both ends are judged here: what was being written
when the disk was full, and whether a checkpoint is of this model before it is loaded into it.
``python -m llava.train.train --resume_from_checkpoint out/checkpoint-500 ...``
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llava.utils import describe_error

SAME = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "mm_projector_type", "mm_hidden_size",
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower",
)  # fmt: skip
"""Settings in config.json that the two halves of a run must share: the model's shape and what is
trained."""
WRITER = ("PytorchStreamWriter", "unexpected pos", "write failed", "iostream error")
READER = ("PytorchStreamReader", "size mismatch", "Missing key(s)", "Unexpected key(s)")
"""How torch's RuntimeErrors say that a file could not be written, or read into this model."""


class SavingFailed(OSError):
    """A checkpoint or the model could not be written."""


@contextlib.contextmanager
def saving(what: str, output_dir: str) -> Iterator[None]:
    """Within the block a file that cannot be written raises `SavingFailed`, which names `what`, the
    reason, the space that is left and the checkpoints that are as they were."""
    try:
        yield
    except SavingFailed:
        raise
    except Exception as error:
        if not _of_a_writer(error):
            raise
        reason = describe_error(error)[:200]
        folder = Path(output_dir)
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        kept = sorted(path.name for path in folder.glob("checkpoint-*"))
        raise SavingFailed(
            f"{what} could not be written to {output_dir} ({reason}; {free / 1e9:.2f} GB available)"
            f"; checkpoints as they were: {', '.join(kept) or 'none'}"
        ) from error


def _of_a_writer(error: Exception) -> bool:
    """Whether an error says that a file could not be written. tokenizers raises bare Exceptions."""
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in WRITER)
    return isinstance(error, (OSError, SafetensorError)) or type(error) is Exception


@contextlib.contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Within the block a checkpoint that cannot be read into the model raises ValueError."""
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        known = not isinstance(error, RuntimeError) or any(text in str(error) for text in READER)
        if checkpoint is None or not known:
            raise
        raise ValueError(f"{checkpoint} cannot be read: {describe_error(error)[:300]}") from error
    except ValueError as error:
        if checkpoint is None or "loaded state dict contains" not in str(error):
            raise
        raise ValueError(
            f"{checkpoint} cannot be gone on from: its run trained other parts of the model"
        ) from error


OPTIMIZERS = ("optimizer.pt", "latest", "fsdp_state")
"""Where a checkpoint's optimizer is: its own file, DeepSpeed's folders, FSDP's."""


def check_checkpoint(folder: str | None, config: Any) -> None:
    """ValueError unless a run with this model's config can go on from the checkpoint `folder`."""
    file = Path(folder or "") / "config.json"
    if folder is None or not file.is_file():
        return
    stored, own = json.loads(file.read_text(encoding="utf-8")), config.to_dict()
    for name in SAME:
        then, now = stored.get(name), own.get(name)
        if name in stored and name in own and then != now:
            raise ValueError(
                f"{folder} is of another run: {name} is {then!r} there and {now!r} here; start "
                "anew from its weights (--model_name_or_path) or give another --output_dir"
            )
    if not any((Path(folder) / name).exists() for name in OPTIMIZERS):
        raise ValueError(
            f"{folder} has no optimizer.pt (saved with --save_only_model?), so a run cannot go on "
            "from it; start anew from its weights (--model_name_or_path)"
        )
