"""A picture padded to a square and scaled, to the same bytes, without the square.

Special here: where both sides are scaled alike, Pillow scales the rows first, each by itself and
rounded to 8 bits, and then the columns. So rows can be scaled a few at a time, and those that are
all background need not be: for 10000x1 pixels that takes 13 MB in place of 400, and usual
photographs are faster too. That the bytes are those of `expand2square` and `Image.resize` is tested
on random sizes: ``python -m pytest tests/unit/test_scaling.py``.
"""

from __future__ import annotations

from PIL import Image

STRIP = 2**22
"""Pixels (of 4 bytes) of the canvas on which rows are widened."""


def resize_padded(
    image: Image.Image,
    side: int,
    background: tuple[int, ...],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """``expand2square(image, background).resize((side, side), resample)`` of an RGB picture."""
    width, height = image.size
    whole = max(width, height)
    left, top = (whole - width) // 2, (whole - height) // 2
    narrow = Image.new("RGB", (side, whole), background)
    step = max(1, STRIP // whole)
    for start in range(0, height, step):
        stop = min(start + step, height)
        rows = image.crop((0, start, width, stop))
        if width < whole:
            canvas = Image.new("RGB", (whole, stop - start), background)
            canvas.paste(rows, (left, 0))
            rows = canvas
        narrow.paste(rows.resize((side, stop - start), resample), (0, top + start))
    return narrow.resize((side, side), resample)
