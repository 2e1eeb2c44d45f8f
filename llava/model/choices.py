"""What was chosen at load and why: every choice that costs accuracy when it is silently wrong.

`llava verify` prints the same lines as every command that loads a model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A value and where it came from, e.g. `vicuna_v1` from the `config table`."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.value} (from {self.origin})"


@dataclass(frozen=True)
class Choices:
    """The choices of one load. weights: layout and files; tower: where its weights came from;
    template: the conversation template; image_mode: `pad`, `anyres`, ...; plan: which visual tokens
    are dropped."""

    weights: Choice
    tower: Choice
    template: Choice
    image_mode: Choice
    dtype: Choice
    device: Choice
    plan: Choice

    def lines(self) -> list[str]:
        """One line a choice, in columns."""
        names = [field.name for field in fields(self)]
        width = max(map(len, names)) + 1
        return [f"{name.replace('_', ' '):<{width}} {getattr(self, name)}" for name in names]

    def to_dict(self) -> dict[str, dict[str, str]]:
        """For a report: {name: {value, origin}}."""
        return {
            field.name: {
                "value": str(getattr(self, field.name).value),
                "origin": getattr(self, field.name).origin,
            }
            for field in fields(self)
        }
