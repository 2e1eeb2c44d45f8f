"""LLaVA-1.5 / LLaVA-NeXT with fewer visual tokens.

Special here: importing the package imports no torch; the names below load on first use.
``python -c "from llava import ReductionPlan; print(ReductionPlan.parse('none'))"``
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "LlavaForConditionalGeneration": "llava.model.hf_models",
    "LlavaNextForConditionalGeneration": "llava.model.hf_models",
    "LlavaLlamaForCausalLM": "llava.model",
    "LlavaMistralForCausalLM": "llava.model",
    "LlavaQwen2ForCausalLM": "llava.model",
    "LlavaQwen3ForCausalLM": "llava.model",
    "ReductionPlan": "llava.reduction",
    "load_pretrained_model": "llava.model.builder",
}

__all__ = ["__version__", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
