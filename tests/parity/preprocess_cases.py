"""Recorded text and image preparation: how a `preprocess` folder is checked against the package.

A folder holds some of `anyres_geometry.json`, `process_images.{json,safetensors}`,
`tokenizer_image_token.json` and `conversation_prompts.json`, and beside them the pictures
(`images/`) and tokenizers they were made with. `run_case(folder)` checks those that are there and
returns one `(line, largest deviation)` a check: 0.0 where values must be equal, `inf` where they
are not. It is called by the conformance checker: `python tests/parity/reference_cases.py DIR...`
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

from llava.conversation import conv_templates
from llava.mm_utils import (
    anyres_token_grid,
    clip_image_processor_class,
    get_anyres_image_grid_shape,
    load_image,
    process_images,
    select_best_resolution,
    tokenizer_image_token,
    unpad_slices,
)

Row = tuple[str, float]


def run_case(path: Path) -> list[Row]:
    """Check every known recording in a folder. An empty list: the folder holds none of them."""
    rows: list[Row] = []
    for name, check in CHECKS.items():
        if (path / name).exists():
            rows.extend(check(path))
    return rows


def check_geometry(path: Path) -> Iterator[Row]:
    """Chosen resolution, grid, unpadded field and token count of each picture size."""
    data = _read(path / "anyres_geometry.json")
    pins = data["pinpoints"]
    tile, side = _tower(data)
    wrong = []
    for row in data["rows"]:
        size = row["size"]
        best = select_best_resolution(size, pins)
        grid = get_anyres_image_grid_shape(size, pins, tile)
        field = (grid[1] * side, grid[0] * side)
        down, across = unpad_slices(size, field)
        unpadded = [len(range(field[0])[down]), len(range(field[1])[across])]
        tokens = anyres_token_grid(size, pins, tile, side)
        found = (list(best), list(grid), unpadded, tokens.tokens, tokens.tiles - 1)
        asked = (row["best"], row["grid_w_h"], row["unpadded_h_w"], row["n_tokens"])
        if found != (*asked, math.prod(row["grid_w_h"])):
            wrong.append(size)
    yield f"anyres_geometry ({len(data['rows'])} sizes{_list(wrong)})", _exact(wrong, data["rows"])


def _tower(data: dict) -> tuple[int, int]:
    """Pixels and patches along a tile. The note names both ("336px tower, 24x24 patches"); without
    it, the side is what all resolutions are multiples of, in patches of 14 pixels."""
    noted = re.search(r"(\d+) ?px tower, (\d+) ?x", data.get("note", ""))
    if noted:
        return int(noted[1]), int(noted[2])
    tile = math.gcd(*(side for resolution in data["pinpoints"] for side in resolution))
    return tile, tile // 14


def check_images(path: Path) -> Iterator[Row]:
    """Pixels of each picture in each mode and size; one row a recorded tensor."""
    data = _read(path / "process_images.json")
    pictures = {name: next((path / "images").glob(f"{name}.*")) for name in data["images"]}
    for name, facts in data["images"].items():
        wrong = [
            crop
            for crop, best in facts["best"].items()
            if list(select_best_resolution(facts["size"], data["grid_pinpoints"][crop])) != best
        ]
        yield f"process_images best of {name}{_list(wrong)}", _exact(wrong, facts["best"])
    with safe_open(path / "process_images.safetensors", "pt") as recorded:
        for key in recorded.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            name, mode, crop = key.split("|")
            found = _pixels(pictures[name], mode, int(crop), data["grid_pinpoints"][crop])
            yield f"process_images {key}", _deviation(found, recorded.get_tensor(key))


def _pixels(picture: Path, mode: str, crop: int, pinpoints: list) -> torch.Tensor:
    processor = clip_image_processor_class()(
        size={"shortest_edge": crop}, crop_size={"height": crop, "width": crop}
    )
    config = SimpleNamespace(
        image_aspect_ratio=None if mode == "default" else mode, image_grid_pinpoints=pinpoints
    )
    return process_images([load_image(picture)], processor, config)[0]


def check_image_tokens(path: Path) -> Iterator[Row]:
    """Ids of prompts with pictures. The recording flags rows that today's tokenizers no longer
    reproduce by themselves (`transformers_5_23_same` false); the package puts the difference right,
    so all rows must be equal."""
    data = _read(path / "tokenizer_image_token.json")
    tokenizers = load_tokenizers(path)
    for number, row in enumerate(data["rows"]):
        legacy = row["legacy"]
        found = tokenizer_image_token(row["prompt"], tokenizers[legacy], data["image_token_index"])
        label = f"tokenizer_image_token {number} legacy={legacy} {row['prompt'][:24]!r}"
        yield label, 0.0 if found == row["input_ids"] else math.inf


def check_prompts(path: Path) -> Iterator[Row]:
    """Fields and prompts of each template; where the original raises, so must the package."""
    for key, facts in _read(path / "conversation_prompts.json").items():
        if not isinstance(facts, dict):
            continue  # a note
        conv = conv_templates.get(key)
        wrong = ["no such template"] if conv is None else _field_differences(conv, facts)
        if conv is not None:
            wrong += [p["messages"] for p in facts["prompts"] if not _prompt_matches(conv, p)]
        yield f"conversation {key}{_list(wrong)}", _exact(wrong, facts["prompts"])


def _field_differences(conv: Any, facts: dict) -> list[str]:
    found = {
        "system": conv.system,
        "roles": list(conv.roles),
        "sep_style": conv.sep_style.name,
        "sep": conv.sep,
        "sep2": conv.sep2,
        "version": conv.version,
        "offset": conv.offset,
        "n_preset_messages": len(conv.messages),
    }
    return [name for name, value in found.items() if name in facts and facts[name] != value]


def _prompt_matches(template: Any, recorded: dict) -> bool:
    conv = template.copy()
    conv.messages = []
    for i, message in enumerate(recorded["messages"]):
        conv.append_message(conv.roles[i % 2], message)
    try:
        return conv.get_prompt() == recorded.get("prompt")
    except (TypeError, ValueError, AssertionError) as err:
        return recorded.get("error", "").startswith(type(err).__name__)


CHECKS = {
    "anyres_geometry.json": check_geometry,
    "process_images.json": check_images,
    "tokenizer_image_token.json": check_image_tokens,
    "conversation_prompts.json": check_prompts,
}


def load_tokenizers(path: Path) -> dict[bool, Any]:
    """The tokenizers stored in a folder's sub-folders, by their `legacy` setting."""
    from transformers import AutoTokenizer

    configs = sorted(path.glob("*/tokenizer_config.json"))
    return {_read(c)["legacy"]: AutoTokenizer.from_pretrained(c.parent) for c in configs}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _exact(wrong: list, of: Any) -> float:
    """0.0 if nothing is wrong and there was something to check."""
    return 0.0 if len(of) and not wrong else math.inf


def _list(wrong: list) -> str:
    return f", differing: {wrong[:5]}" if wrong else ""


def _deviation(found: torch.Tensor, recorded: torch.Tensor) -> float:
    if found.shape != recorded.shape:
        return math.inf
    return float((found.float() - recorded.float()).abs().max())
