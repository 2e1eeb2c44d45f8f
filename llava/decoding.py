"""How answers are written, and where an answer ends: shared by evaluation and serving.

    decoding = Decoding(max_new_tokens=64)
    new = model.generate(**batch, **decoding.generate_kwargs())[0].tolist()
    ids, ended = cut_at_eos(new, eos_ids(model, tokenizer))
    text = answer_text(ids, tokenizer, stop="###")

Special here: no torch. Greedy by default, as the published numbers of LLaVA are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """How answers are written: greedy at temperature 0, else sampling; beams if more than one."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 and more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; accepted: 0 (greedy) and more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; accepted: above 0 up to 1")

    def generate_kwargs(self) -> dict[str, Any]:
        """Arguments for `generate`; sampling settings only where they have a meaning."""
        kwargs: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            kwargs["temperature"] = self.temperature
            if self.top_p is not None:
                kwargs["top_p"] = self.top_p
        return kwargs


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: the generation config's, else the tokenizer's."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    return set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}


def cut_at_eos(ids: Sequence[int], eos: Collection[int]) -> tuple[list[int], bool]:
    """The new ids up to and with the first that ends the answer, and whether there was one;
    what stands behind it is padding."""
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    return (list(ids), False) if end is None else (list(ids[: end + 1]), True)


def answer_text(ids: Sequence[int], tokenizer: Any, stop: str | None = None) -> str:
    """The text of new ids: without special tokens, up to the template's stop text, stripped."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return (text.split(stop)[0] if stop else text).strip()
