"""Token maps: which cells are faded, which colour a score has."""

from __future__ import annotations

import re

import pytest

from llava import drawing
from llava.drawing import Grid

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def _rectangles(text: str) -> dict[tuple[float, float], str]:
    """(x, y) -> fill of each square cell."""
    found = re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="20" height="20"[^>]*?fill="(#\w+)"', text
    )
    return {(float(x), float(y)): fill for x, y, fill in found}


def test_survivors_fades_what_is_gone() -> None:
    text = drawing.survivors(PIXEL, Grid(2, 3), [(0, 0), (1, 1)])
    assert 'viewBox="0 0 60 40"' in text
    assert set(_rectangles(text)) == {(20, 0), (40, 0), (0, 20), (40, 20)}
    assert "2 of 6 visual tokens left" in text


def test_newlines_are_strips_of_their_own() -> None:
    grid = Grid(3, 2, newlines=2)
    assert grid.newline_cells == [(1, 2), (2, 2)]
    assert (0, 2) not in grid
    assert [grid.cell(grid.number(cell)) for cell in [(0, 1), (2, 2)]] == [(0, 1), (2, 2)]
    text = drawing.survivors("#here", grid, [*grid.cells(), (2, 2)])
    assert 'href="#here"' in text
    assert "7 of 8 visual tokens left" in text
    assert _rectangles(text) == {}
    assert re.findall(r'rx="2" fill="(#\w+)"', text) == ["#e8ebf0", "#5c6472"]


def test_heat_runs_from_the_lowest_to_the_highest_score() -> None:
    scores = {(0, 0): 0.001, (0, 1): 0.01, (1, 0): 0.1}
    fills = _rectangles(drawing.heat(PIXEL, Grid(2, 2), scores))
    assert fills[0, 0] == "#0d083e"
    assert fills[0, 20] == "#faf49e"
    assert fills[20, 20] == "#fff"
    light = [
        sum(int(fills[at][i : i + 2], 16) for i in (1, 3, 5)) for at in [(0, 0), (20, 0), (0, 20)]
    ]
    assert light == sorted(light)
    assert drawing.shading({(0, 0): 2.0, (0, 1): 2.0}) == dict.fromkeys(
        [(0, 0), (0, 1)], drawing.heat_colour(0.5)
    )
    assert drawing.shading({}) == {}


def test_cells_outside_are_refused() -> None:
    for draw, cells in ((drawing.survivors, [(2, 0)]), (drawing.heat, {(0, 3): 1.0})):
        with pytest.raises(ValueError, match="2 x 3"):
            draw(PIXEL, Grid(2, 3), cells)


def test_every_method_has_a_colour_of_its_own() -> None:
    from llava.reduction import REDUCERS

    own = [drawing.COLOURS[name] for name in REDUCERS if name in drawing.COLOURS]
    assert len(set(own)) == len(own)
    assert all(re.fullmatch("#[0-9a-f]{6}", drawing.colour(name)) for name in [*REDUCERS, "new"])
