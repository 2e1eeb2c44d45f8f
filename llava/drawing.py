"""Pictures of tokens: which visual tokens are left, and how they scored, drawn on the picture.

Special here: pages of the evaluation and the demo draw with the same few functions. Each takes
plain numbers and returns one `<svg>` string that needs no style sheet, script or file, or a PIL
picture that needs no font. ``llava show`` and ``llava demo`` show them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COLOURS: dict[str, str] = {
    "pyramiddrop": "#2457d6",
    "random": "#e07b00",
    "uniform": "#0f8a5f",
    "fastv": "#c81e1e",
    "simignore": "#7c3aed",
    "adaptprune": "#e0559f",
    "yopo": "#0891b2",
    "none": "#1a1d23",
    "blind": "#8a919e",
}
EXTRA_COLOURS = ("#854d0e", "#4d7c0f", "#475569", "#9d174d")
HEAT = ((13, 8, 62), (84, 15, 109), (158, 38, 103), (219, 80, 62), (251, 161, 26), (250, 244, 158))
"""Dark to light: low to high scores."""
Cell = tuple[int, int]


def colour(name: str) -> str:
    """A method's colour; methods without one of their own share a few by their name."""
    return COLOURS.get(name) or EXTRA_COLOURS[sum(map(ord, name)) % len(EXTRA_COLOURS)]


# ----------------------------------------------------------------------------- SVG
def text(x: float, y: float, content: str, *, anchor: str = "middle", css: str = "tick") -> str:
    """One line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">'
        f"{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, extra: str = "") -> str:
    """One straight line."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" {extra}/>'
    )


def svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """The finished picture; ``label`` is what a screen reader says."""
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"\n{body}\n</svg>"
    )


def data_uri(picture: Any) -> str:
    """A PIL picture as a `data:` URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ----------------------------------------------------------------------------- token maps
@dataclass(frozen=True)
class Grid:
    """The cells of a picture. newlines: so many rows, the last ones, end with a newline token in
    column `columns`, drawn as a narrow strip."""

    rows: int
    columns: int
    newlines: int = 0

    def __contains__(self, cell: object) -> bool:
        if not isinstance(cell, tuple) or len(cell) != 2:
            return False
        row, column = cell
        if column == self.columns:
            return self.rows - self.newlines <= row < self.rows
        return 0 <= row < self.rows and 0 <= column < self.columns

    @property
    def width(self) -> int:
        """Columns, the newlines' included."""
        return self.columns + (self.newlines > 0)

    @property
    def newline_cells(self) -> list[Cell]:
        """The cells of newline tokens."""
        return [(row, self.columns) for row in range(self.rows - self.newlines, self.rows)]

    def number(self, cell: Cell) -> int:
        """The cell's number, counted row by row, newlines included."""
        return cell[0] * self.width + cell[1]

    def cell(self, number: int) -> Cell:
        """The cell of a number."""
        return divmod(number, self.width)

    def cells(self) -> list[Cell]:
        """All cells that hold a picture token, row by row."""
        return [(row, column) for row in range(self.rows) for column in range(self.columns)]

    def check(self, cells: Collection[Cell]) -> None:
        """ValueError for a cell outside."""
        outside = [cell for cell in cells if cell not in self]
        if outside:
            raise ValueError(
                f"cells {outside[:5]} do not fit a grid of {self.rows} x {self.columns}"
            )


def _background(image: str, width: float, height: float) -> str:
    """The picture behind the cells: a `data:` URI, or `#id` of an <image> of the same page."""
    if image.startswith("#"):
        return f'<use href="{escape(image)}"/>'
    return (
        f'<image href="{escape(image)}" width="{width:g}" height="{height:g}" '
        'preserveAspectRatio="none"/>'
    )


def _box(cell: Cell, size: float, columns: int) -> tuple[float, float, float, float]:
    """x, y, width, height of a cell; a newline's strip is a third of a cell wide."""
    row, column = cell
    width = size / 3 if column == columns else size
    gap = size / 6 if column == columns else 0
    return column * size + gap, row * size, width, size


def survivors(image: str, grid: Grid, kept: Collection[Cell], size: float = 20) -> str:
    """A picture with the cells of dropped tokens faded.

    image: a `data:` URI or `#id`. kept: cells (row, column) that are still there, newlines among
    them. size: side of a cell in pixels. Raises ValueError for a cell outside the grid.
    """
    grid.check(kept)
    here = set(kept)
    width, height = grid.columns * size, grid.rows * size
    parts = [_background(image, width, height)]
    for cell in grid.cells():
        if cell not in here:
            x, y, w, h = _box(cell, size, grid.columns)
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="gone" fill="#fff" '
                'fill-opacity=".88" shape-rendering="crispEdges"/>'
            )
    for cell in grid.newline_cells:
        parts.append(_strip(cell, size, grid.columns, "#5c6472" if cell in here else "#e8ebf0"))
    width += 0.5 * size * (grid.newlines > 0)
    total = grid.rows * grid.columns + grid.newlines
    return svg(width, height, parts, f"{len(here)} of {total} visual tokens left")


def _strip(cell: Cell, size: float, columns: int, fill: str) -> str:
    x, y, w, h = _box(cell, size, columns)
    return (
        f'<rect x="{x:g}" y="{y + 0.15 * h:g}" width="{w:g}" height="{0.7 * h:g}" rx="2" '
        f'fill="{fill}"/>'
    )


def heat(
    image: str, grid: Grid, scores: Mapping[Cell, float], size: float = 20, veil: float = 0.82
) -> str:
    """A picture with each scored cell in the colour of its score; cells without one are faded.

    The scale runs from the lowest to the highest score of this map, by its square root: scores that
    are shares of attention are mostly small.
    """
    grid.check(scores)
    shades = shading(scores)
    width, height = grid.columns * size, grid.rows * size
    parts = [_background(image, width, height)]
    for cell in grid.cells():
        x, y, w, h = _box(cell, size, grid.columns)
        fill, opacity = (shades[cell], veil) if cell in shades else ("#fff", 0.88)
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'fill-opacity="{opacity:g}" shape-rendering="crispEdges"/>'
        )
    for cell in grid.newline_cells:
        if cell in shades:
            parts.append(_strip(cell, size, grid.columns, shades[cell]))
    width += 0.5 * size * (grid.newlines > 0)
    return svg(width, height, parts, f"scores of {len(scores)} visual tokens")


def shading(scores: Mapping[Cell, float]) -> dict[Cell, str]:
    """The colour of each score as `#rrggbb`, dark for the lowest, light for the highest."""
    if not scores:
        return {}
    low, high = min(scores.values()), max(scores.values())
    room = high - low
    return {
        cell: heat_colour(((value - low) / room) ** 0.5 if room > 0 else 0.5)
        for cell, value in scores.items()
    }


def heat_colour(share: float) -> str:
    """The colour at `share` (0 to 1) of `HEAT`."""
    place = min(1.0, max(0.0, share)) * (len(HEAT) - 1)
    index = min(int(place), len(HEAT) - 2)
    part = place - index
    mixed = (round(a + (b - a) * part) for a, b in zip(HEAT[index], HEAT[index + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


# ----------------------------------------------------------------------------- scenes
Scene = Mapping[str, Any]
"""What `llava.model.tracing.look` returns."""
CELL = 20


def grids(scene: Scene) -> list[Grid]:
    """The grid of each field."""
    return [Grid(f["rows"], f["columns"], f["newlines"]) for f in scene["fields"]]


def run_stages(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of a run, each with the cut behind it (None for the last)."""
    cuts = [*run["cuts"], None]
    return [{**stage, "cut": cut} for stage, cut in zip(run["stages"], cuts, strict=True)]


def caption(stage: Mapping[str, Any], unit: str = " tokens") -> str:
    """``layers 2–3: 32 tokens``."""
    count = sum(len(kept) for kept in stage["kept"])
    return f"{layer_span(stage['start'], stage['stop'])}: {count}{unit}"


def layer_span(start: int, stop: int) -> str:
    """Layers start .. stop-1, counted from 0 as plans do: ``layers 2–3``, ``layer 5``, ``input``
    for a stage that a cut in front of layer 0 ends."""
    if start == stop:
        return "input"
    return f"layer {start}" if stop == start + 1 else f"layers {start}–{stop - 1}"


def defs(scene: Scene, prefix: str = "field") -> str:
    """The pictures, once; every map refers to them by ``prefix`` and number."""
    images = "".join(
        f'<image id="{prefix}{number}" href="{field["image"]}" preserveAspectRatio="none" '
        f'width="{field["columns"] * CELL}" height="{field["rows"] * CELL}"/>'
        for number, field in enumerate(scene["fields"])
    )
    return f'<svg width="0" height="0" style="position:absolute"><defs>{images}</defs></svg>'


def stage_figures(
    scene: Scene, run: Mapping[str, Any], *, prefix: str | None = "field", scores: bool = True
) -> str:
    """A figure a stage: what is left and, with `scores`, what the cut behind it ranked by.

    prefix: of the page's `defs`; None repeats the pictures, for a piece without a page.
    """
    every, figures = grids(scene), []
    images = [
        field["image"] if prefix is None else f"#{prefix}{number}"
        for number, field in enumerate(scene["fields"])
    ]
    for stage in run_stages(run):
        maps = [
            survivors(image, grid, [grid.cell(n) for n in kept], CELL)
            for image, grid, kept in zip(images, every, stage["kept"], strict=True)
        ]
        below = score_maps(stage["cut"], every, images) if scores else ""
        words = caption(stage) if scores else caption(stage, "")
        figures.append(
            f"<figure>{side_by_side(maps, every)}<figcaption>{words}</figcaption>{below}</figure>"
        )
    return "".join(figures)


def stages(scene: Scene, run: Mapping[str, Any], **options: Any) -> str:
    """`stage_figures` in their box. ``--share`` tells its style how wide a stage is, in pictures as
    wide as high."""
    share = sum(aspect(grid) for grid in grids(scene))
    figures = stage_figures(scene, run, **options)
    return f'<div class="stages" style="--share:{share:.3g}">{figures}</div>'


def aspect(grid: Grid) -> float:
    """Width over height as drawn."""
    return (grid.columns + 0.5 * (grid.newlines > 0)) / grid.rows


def side_by_side(maps: Sequence[str], every: Sequence[Grid]) -> str:
    """The fields of one stage, equally high."""
    boxes = (
        f'<div style="flex:{aspect(grid):.3g} 1 0">{each}</div>'
        for each, grid in zip(maps, every, strict=True)
    )
    return f'<div class="fields">{"".join(boxes)}</div>'


def score_maps(cut: Mapping[str, Any] | None, every: Sequence[Grid], images: Sequence[str]) -> str:
    """The scores of the cut behind a stage, or nothing."""
    if cut is None or not any(cut["scores"]):
        return ""
    maps = [
        heat(image, grid, {grid.cell(number): score for number, score in scores}, CELL)
        for image, grid, scores in zip(images, every, cut["scores"], strict=True)
    ]
    words = f"scores in front of layer {cut['at']}"
    return f'<div class="map">{side_by_side(maps, every)}<figcaption>{words}</figcaption></div>'
