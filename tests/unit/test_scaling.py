"""Padded pictures scaled without their square: byte for byte what the plain way gives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava import scaling
from llava.mm_utils import (
    clip_image_processor_class,
    expand2square,
    process_images,
    siglip_image_processor_class,
)

BACKGROUND = (122, 116, 104)
SIDE = 28
SQUARE = {"height": SIDE, "width": SIDE}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sizes(count: int, longest: float) -> list[tuple[int, int]]:
    """Of all proportions, and some borders."""
    drawn = np.exp(np.random.default_rng(1).uniform(0, np.log(longest), (count, 2))).astype(int)
    return [(1, 1), (28, 28), (28, 27), (1, 900), (900, 1), *map(tuple, drawn.tolist())]


@pytest.mark.parametrize("strip", [scaling.STRIP, 500])
@pytest.mark.parametrize("resample", Image.Resampling)
def test_the_bytes_are_those_of_the_plain_way(monkeypatch, strip, resample):
    monkeypatch.setattr(scaling, "STRIP", strip)
    for number, (width, height) in enumerate(sizes(30, 300)):
        image = noise(width, height, number)
        padded = expand2square(image, BACKGROUND).resize((SIDE, SIDE), resample)
        found = scaling.resize_padded(image, SIDE, BACKGROUND, resample)
        assert found.tobytes() == padded.tobytes(), (width, height)


@pytest.mark.parametrize(
    "processor",
    [
        clip_image_processor_class()(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        clip_image_processor_class()(size={"shortest_edge": 40}, crop_size=SQUARE),
        clip_image_processor_class()(size={"shortest_edge": 9}, crop_size=SQUARE, do_resize=False),
        siglip_image_processor_class()(size=SQUARE),
    ],
)
def test_pixels_are_those_of_the_processor(processor):
    images = [noise(*size, seed) for seed, size in enumerate(sizes(6, 200))]
    mean = tuple(int(255 * x) for x in processor.image_mean)
    squares = [expand2square(image, mean) for image in images]
    expected = processor.preprocess(squares, return_tensors="pt")["pixel_values"]
    found = process_images(images, processor, SimpleNamespace(image_aspect_ratio="pad"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(20000, 2), (2, 6000)])
def test_extreme_pictures_need_no_large_canvas(monkeypatch, size):
    """The square of the first has 400 million pixels."""
    made, new = [], Image.new

    def counted(mode: str, size: tuple[int, int], color: object = 0) -> Image.Image:
        made.append(size[0] * size[1])
        return new(mode, size, color)

    monkeypatch.setattr(Image, "new", counted)
    assert scaling.resize_padded(noise(*size), SIDE, BACKGROUND).size == (SIDE, SIDE)
    assert max(made) <= scaling.STRIP
