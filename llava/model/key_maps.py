"""Names of the same weights in every public layout, as exact prefix tables.

Special here: one spelling, LLaVA's, is what the rest of the code knows; a table for each other
spelling lists (LLaVA's prefix, the other's prefix), is read in both directions, and the special
entry decides before the general one. Nothing is guessed from a part of a name. Spellings:

    llava    what LLaVA, PyramidDrop and this project write
    hub      llava-hf files of 2023-24, and what transformers 5 writes (`language_model.model.`)
    nested   the module names of transformers 4.52 and later (`model.language_model.`)

The tower's `vision_model.` level exists in some files and not in others; LLaVA's spelling here is
without it, as in transformers 5 (`with_vision_model` puts it back for LLaVA's own code).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

Spelling = Literal["llava", "hub", "nested"]
Value = TypeVar("Value")

TOWER_PREFIX = "model.vision_tower.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."
NEWLINE = "model.image_newline"
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# (LLaVA's prefix, the other spelling's prefix), the special ones in front of the general ones.
PREFIXES: dict[Spelling, tuple[tuple[str, str], ...]] = {
    "hub": (
        (NEWLINE, "image_newline"),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        (TOWER_PREFIX, "vision_tower.vision_model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ),
    "nested": (
        (NEWLINE, NEWLINE),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        (TOWER_PREFIX, "model.vision_tower."),
        ("lm_head.", "lm_head."),
        ("model.", "model.language_model."),
    ),
}
# Other forms that files have; read, never written.
_ALSO_READ: dict[Spelling, tuple[tuple[str, str], ...]] = {
    "hub": ((TOWER_PREFIX, "vision_tower."),),
    "nested": ((TOWER_PREFIX, "model.vision_tower.vision_model."),),
}
# Buffers that older versions saved and every version computes.
_STALE = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def spelling_of(keys: Iterable[str]) -> Spelling:
    """Which spelling the names of a file are in."""
    for key in keys:
        if key.startswith("language_model."):
            return "hub"
        if key.startswith("model.language_model."):
            return "nested"
    return "llava"


def is_stale(key: str) -> bool:
    """True for a buffer that no version of the model reads."""
    return _STALE.search(key) is not None


def to_llava(key: str, spelling: Spelling) -> str:
    """LLaVA's name of a weight; a name that the table does not know comes back as it is."""
    if spelling == "llava":
        level = TOWER_PREFIX + "vision_model."
        return TOWER_PREFIX + key.removeprefix(level) if key.startswith(level) else key
    # The longer one of two prefixes that both fit is the special one.
    table = PREFIXES[spelling] + _ALSO_READ[spelling]
    fitting = [pair for pair in table if key.startswith(pair[1])]
    if not fitting:
        return key
    ours, theirs = max(fitting, key=lambda pair: len(pair[1]))
    return ours + key[len(theirs) :]


def from_llava(key: str, spelling: Spelling) -> str:
    """The name that a weight with LLaVA's name `key` has in another spelling.

    ValueError for a weight that the other layout has no place for.
    """
    if spelling == "llava":
        return key
    for ours, theirs in PREFIXES[spelling]:
        if key.startswith(PROJECTOR_PREFIX) and not ours.startswith(PROJECTOR_PREFIX):
            continue
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    raise ValueError(f"weight {key!r} has no name in the {spelling} spelling")


def with_vision_model(key: str) -> str:
    """LLaVA's name with the tower's `vision_model.` level, as LLaVA's own code reads it."""
    if not key.startswith(TOWER_PREFIX):
        return key
    return f"{TOWER_PREFIX}vision_model.{key.removeprefix(TOWER_PREFIX)}"


def rename_all(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Weights under LLaVA's names, without stale buffers.

    ValueError when two names of a file mean the same weight.
    """
    spelling = spelling_of(weights)
    out: dict[str, Value] = {}
    for key, value in weights.items():
        if is_stale(key):
            continue
        name = to_llava(key, spelling)
        if name in out:
            raise ValueError(f"weight {name!r} is there twice, the second time as {key!r}")
        out[name] = value
    return out


def adapter_names(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Weights of `mm_projector.bin` or `non_lora_trainables.bin` under LLaVA's names.

    LoRA runs put `base_model.model.` in front, some ZeRO runs `base_model.` alone.
    """
    out = {}
    for key, value in weights.items():
        bare = key.removeprefix("base_model.")
        if bare.startswith(("model.model.", "model.lm_head.")):
            bare = bare.removeprefix("model.")
        if bare.startswith(("mm_projector.", "image_newline", "embed_tokens.")):
            bare = f"model.{bare}"
        if not is_stale(bare):
            out[to_llava(bare, "llava")] = value
    return out


def shortened(names: Iterable[str], most: int = 6) -> str:
    """A list of names for a message: the first few, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:most])
    rest = len(ordered) - most
    return (f"{shown} and {rest} more" if rest > 0 else shown) or "none"
