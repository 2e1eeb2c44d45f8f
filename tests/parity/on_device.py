"""A model on a GPU that its checks use as if it were on the CPU.

The recorded cases compare tensors of files. `on_device` moves what goes into the model to the
device that LLAVA_TEST_DEVICE names and what comes out back to the CPU, so that the same checks
serve both; LLAVA_TEST_BACKENDS names the attention backends (default eager,sdpa).

    LLAVA_TEST_DEVICE=cuda python tests/parity/reference_cases.py tests/data/pyramiddrop
"""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.sequence import TokenSequence

DEVICE = torch.device(os.environ.get("LLAVA_TEST_DEVICE", "cpu"))
BACKENDS = tuple(os.environ.get("LLAVA_TEST_BACKENDS", "eager,sdpa").split(","))

# float32 means float32: convolutions use TF32 by default.
torch.backends.cudnn.allow_tf32 = False


def gpu_allocations() -> int:
    """Allocations on the GPU so far; 0 where DEVICE is the CPU."""
    if DEVICE.type != "cuda":
        return 0
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


def moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors in it on a device; caches and what is unknown stay as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, TokenSequence):
        return value.to(device)
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    if type(value) is tuple:
        return tuple(moved(each, device) for each in value)
    if type(value) is dict:
        return {name: moved(each, device) for name, each in value.items()}
    if is_dataclass(value) and any(field.name == "keep" for field in fields(value)):  # a CutTrace
        changed = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **changed)
    return value


class OnDevice:
    """A model whose calls take and give CPU tensors. Everything else is the model's own."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model.to(device), device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*moved(args, self.device), **moved(kwargs, self.device))
        for name, value in list(output.items()):
            if name != "past_key_values":
                output[name] = moved(value, torch.device("cpu"))
        return output

    def _method(self, name: str, args: Any, kwargs: Any) -> Any:
        found = getattr(self.model, name)(*moved(args, self.device), **moved(kwargs, self.device))
        return moved(found, torch.device("cpu"))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("generate", args, kwargs)

    def build_sequence(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("build_sequence", args, kwargs)


def on_device(model: Any, device: torch.device = DEVICE) -> Any:
    """The model as its checks use it: itself on the CPU."""
    return model if device.type == "cpu" else OnDevice(model, device)
