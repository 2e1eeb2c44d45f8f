"""What transformers' LLaVA processors return, as what `build_sequence` takes.

A llava-hf processor writes as many `<image>` ids as a picture will have tokens; here one mark
(-200) stands for a picture. Its sizes are (height, width), ours (width, height); its anyres pixels
are padded with empty tiles to the largest picture of the batch. Everything is host arithmetic on
ids that `build_sequence` reads anyway.

    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    model.generate(**inputs, reduction="pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]")

Source: transformers' `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape

Size = tuple[int, int]


def image_token_id(config: Any) -> int | None:
    """The id that a llava-hf processor writes for a picture's tokens; None for other models."""
    value = getattr(config, "image_token_index", None)
    return getattr(config, "image_token_id", None) if value is None else value


def unpack_pixels(
    pixel_values: Tensor | Sequence[Tensor], image_sizes: Any, config: Any, tile_size: int
) -> tuple[Any, list[Size] | None]:
    """(images, sizes (width, height)) as `build_sequence` takes them.

    pixel_values: [n, 3, H, W] of an unsplit picture each; with anyres [n, tiles, 3, H, W], padded
    with empty tiles, or [all tiles, 3, H, W]. image_sizes: [n, 2] of (height, width), for anyres.
    ValueError for pixels and sizes that do not fit each other.
    """
    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return pixel_values, None
    if image_sizes is None:
        raise ValueError("pixel_values of an anyres model need image_sizes, (height, width) each")
    sizes = [(int(width), int(height)) for height, width in image_sizes]
    tiles = []
    for size in sizes:
        across, down = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile_size)
        tiles.append(across * down + 1)
    if isinstance(pixel_values, Tensor) and pixel_values.dim() == 4:
        if len(pixel_values) != sum(tiles):
            raise ValueError(
                f"{len(pixel_values)} tiles were given; the image_sizes ask for {sum(tiles)}"
            )
        return list(pixel_values.split(tiles)), sizes
    if len(pixel_values) != len(sizes):
        raise ValueError(f"{len(sizes)} image sizes were given for {len(pixel_values)} images")
    images = []
    for number, (pixels, count) in enumerate(zip(pixel_values, tiles, strict=True)):
        if pixels.dim() != 4 or len(pixels) < count:
            raise ValueError(
                f"pixel_values of image {number} have the shape {tuple(pixels.shape)}; its size "
                f"{sizes[number]} (width, height) needs {count} tiles [tiles, 3, H, W]"
            )
        images.append(pixels[:count])
    return images, sizes


def fold_image_ids(
    ids: np.ndarray, mask: np.ndarray, counts: Sequence[int], image_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask in which each picture's run of `image_id` is one -200 mark.

    ids [B, L]; mask bool [B, L] of real ids; counts: visual tokens of each picture, in the order of
    the runs. The first id of a run becomes the mark, the others leave the mask, so every other
    token keeps its column. Ids that hold -200 marks instead pass unchanged. ValueError where a run
    and its picture differ in length.
    """
    if image_id is None:
        raise ValueError(
            "pixel_values came with a model whose config has no image_token_index (the id that "
            "the processor repeats for a picture); set it, or give images= and -200 marks"
        )
    expanded = (ids == image_id) & mask
    if (ids[mask] == IMAGE_TOKEN_INDEX).any():
        if not expanded.any():
            return ids, mask
        raise ValueError(f"input_ids hold both -200 marks and the image id {image_id}; give one")
    ids, mask, number = ids.copy(), mask.copy(), 0
    for row, places in enumerate(np.flatnonzero(line) for line in expanded):
        start = 0
        while start < len(places):
            count = counts[number] if number < len(counts) else 0
            run = places[start : start + count]
            # Neighbours among the real ids: a masked hole inside a picture does not part it.
            real = mask[row, run[0] : run[-1] + 1].sum() if len(run) else 0
            if count == 0 or len(run) < count or real != count:
                raise ValueError(_mismatch(row, len(places), counts, number))
            ids[row, run[0]] = IMAGE_TOKEN_INDEX
            mask[row, run[1:]] = False
            start, number = start + count, number + 1
    if number < len(counts):
        raise ValueError(_mismatch(None, int(expanded.sum()), counts, number))
    return ids, mask


def _mismatch(row: int | None, found: int, counts: Sequence[int], number: int) -> str:
    where = "the batch has" if row is None else f"sample {row} has"
    if row is not None and number >= len(counts):
        needed = f"but all {len(counts)} pictures have their ids already"
    else:
        what = "a picture" if row is None else "its next picture"
        needed = f"and {what} (number {number} of the batch) needs {counts[number]} in a row"
    return (
        f"{where} {found} image ids {needed}; ids and pictures must come from one processor call, "
        "made for this model (patch_size, vision_feature_select_strategy), without truncation"
    )
