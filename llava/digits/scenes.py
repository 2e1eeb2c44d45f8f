"""Scenes: a 4x4 grid of coloured handwritten digits on a noisy background, drawn from real scans.

The digits are the 8x8 scans of scikit-learn's `load_digits`. They are split once, by scan and
stratified by class, into a train and a test part that never mix: no evaluation picture contains a
scan that any training picture contains. A scene is a pure function of (seed, split, index), and so
is its picture. Cells are named as in a spreadsheet: row letter, column number (`A1` ... `D4`).

Shapes: N cells = 16, P = 28 px per cell, S = 112 px per picture. With patches of 14 px a picture
is 8x8 = 64 visual tokens, four to a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

ROWS = ("A", "B", "C", "D")
GRID = len(ROWS)
CELLS = tuple(f"{row}{column + 1}" for row in ROWS for column in range(GRID))
CELL_PIXELS = 28
IMAGE_PIXELS = GRID * CELL_PIXELS
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "green": (50, 205, 60),
    "blue": (70, 100, 255),
    "yellow": (240, 225, 50),
    "purple": (200, 60, 225),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
EMPTY = -1
TEST_SHARE = 0.2
SPLIT_SEED = 1797
FILL = 0.7
FILLS = (0.6, 0.75, 0.95)
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Scene:
    """What stands in each of the 16 cells, row by row.

    `digits` and `colours` hold class numbers (colour i is COLOUR_NAMES[i]), `scans` indices into
    `load_digits`; an empty cell has EMPTY in all three. `seed` fixes the picture's noise.
    """

    digits: tuple[int, ...]
    colours: tuple[int, ...]
    scans: tuple[int, ...]
    seed: tuple[int, ...]

    def filled(self) -> list[int]:
        """Numbers of the cells that hold a digit, in reading order."""
        return [cell for cell, digit in enumerate(self.digits) if digit != EMPTY]

    def things(self) -> list[tuple[int, int]]:
        """(colour, digit) of every filled cell, in reading order."""
        return [(self.colours[cell], self.digits[cell]) for cell in self.filled()]


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans and their classes: float32 [1797, 8, 8] in 0..1 and int [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float32) / 16.0, data.target.astype(np.int64)


@cache
def split_scans(split: Split) -> tuple[np.ndarray, ...]:
    """Scan indices of one part, one array per digit class 0..9.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; accepted: {', '.join(SPLITS)}")
    _, classes = load_scans()
    parts = []
    for digit in range(10):
        members = np.flatnonzero(classes == digit)
        order = np.random.default_rng([SPLIT_SEED, digit]).permutation(members)
        n_test = round(len(order) * TEST_SHARE)
        parts.append(np.sort(order[:n_test] if split == "test" else order[n_test:]))
    return tuple(parts)


def make_scene(seed: int, split: Split, index: int, fill: float = FILL) -> Scene:
    """The scene number `index` of one split: each cell is filled with probability `fill`."""
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    n = GRID * GRID
    present = rng.random(n) < fill
    digits = np.where(present, rng.integers(0, 10, n), EMPTY)
    colours = np.where(present, rng.integers(0, len(COLOUR_NAMES), n), EMPTY)
    pools = split_scans(split)
    draws = rng.random(n)
    scans = [
        EMPTY if digit == EMPTY else int(pools[digit][int(draw * len(pools[digit]))])
        for digit, draw in zip(digits, draws, strict=True)
    ]
    return Scene(
        tuple(int(d) for d in digits), tuple(int(c) for c in colours), tuple(scans), (*key, 1)
    )


def varied_scene(seed: int, split: Split, index: int) -> Scene:
    """Scene number `index`, sparse, middling or crowded in turn (FILLS), for all sets."""
    return make_scene(seed, split, index, FILLS[index % len(FILLS)])


def _strokes(scans: np.ndarray, rng: np.random.Generator, jitter: float) -> np.ndarray:
    """Scans [K, 8, 8] drawn into cells [K, 28, 28] in 0..1, each a little turned, scaled, moved."""
    k = len(scans)
    angle = np.deg2rad(rng.uniform(-8, 8, k) * jitter)
    zoom = rng.uniform(1 - 0.1 * jitter, 1 + 0.1 * jitter, (k, 2)) * 8 / 23
    shear = rng.uniform(-0.1, 0.1, k) * jitter
    shift = rng.uniform(-2, 2, (k, 2)) * jitter
    axis = np.arange(CELL_PIXELS) - (CELL_PIXELS - 1) / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    x = x[None] - shift[:, 0, None, None]
    y = y[None] - shift[:, 1, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u = (cos * x + sin * y + shear[:, None, None] * y) * zoom[:, 0, None, None] + 3.5
    v = (cos * y - sin * x) * zoom[:, 1, None, None] + 3.5
    padded = np.pad(scans, ((0, 0), (2, 2), (2, 2)))
    u, v = np.clip(u + 2, 0, 10.999), np.clip(v + 2, 0, 10.999)
    x0, y0 = u.astype(np.int64), v.astype(np.int64)
    fx, fy = (u - x0).astype(np.float32), (v - y0).astype(np.float32)
    flat = padded.reshape(k, -1)
    rows = np.arange(k)[:, None, None]
    base = y0 * 12 + x0
    top = flat[rows, base] * (1 - fx) + flat[rows, base + 1] * fx
    bottom = flat[rows, base + 12] * (1 - fx) + flat[rows, base + 13] * fx
    return top * (1 - fy) + bottom * fy


def draw(scene: Scene, jitter: float = 1.0) -> np.ndarray:
    """The scene's pixels: uint8 [112, 112, 3]. `jitter` scales how far digits are turned and moved.

    Raises ValueError if `jitter` is negative.
    """
    if jitter < 0:
        raise ValueError(f"jitter must be 0 or more, got {jitter}")
    rng = np.random.default_rng(scene.seed)
    images, _ = load_scans()
    axis = np.linspace(-1, 1, IMAGE_PIXELS, dtype=np.float32)
    slope = rng.uniform(-20, 20, 2)
    base = rng.uniform(25, 80, 3) * 0.5 + rng.uniform(25, 80) * 0.5
    light = axis[:, None] * slope[0] + axis[None, :] * slope[1]
    noise = rng.standard_normal((IMAGE_PIXELS, IMAGE_PIXELS), dtype=np.float32)
    canvas = base[None, None, :] + (light + noise * rng.uniform(4, 14))[:, :, None]
    cells = scene.filled()
    if cells:
        ink = _strokes(images[[scene.scans[c] for c in cells]], rng, jitter)
        palette = np.array([COLOURS[COLOUR_NAMES[scene.colours[c]]] for c in cells], np.float32)
        palette = palette * rng.uniform(0.85, 1.0, (len(cells), 1)) + rng.uniform(
            -12, 12, palette.shape
        )
        ink = np.clip(ink * 1.25, 0, 1)
        for cell, alpha, colour in zip(cells, ink, palette, strict=True):
            top, left = (cell // GRID) * CELL_PIXELS, (cell % GRID) * CELL_PIXELS
            part = canvas[top : top + CELL_PIXELS, left : left + CELL_PIXELS]
            part += alpha[:, :, None] * (colour - part)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 112x112 px."""
    return Image.fromarray(draw(scene))
