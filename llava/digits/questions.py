"""What is asked about a scene, and the captions that describe it.

Every kind of question is one function from a scene to all questions of that kind that the scene
can answer, grouped by their answer. Whoever draws from them picks the answer first, so that answers
come out balanced: a model that cannot see the picture gains nothing from knowing the habits of the
set. Cells are named like spreadsheet cells (row letter, column number), so that one word is one
address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from llava.digits.scenes import CELLS, COLOUR_NAMES, EMPTY, GRID, ROWS, Scene

NOTHING = "none"
Pool = dict[str, list[str]]
SIDES = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}


@dataclass(frozen=True)
class Question:
    """One question about one scene with its only right answer."""

    kind: str
    text: str
    answer: str


def name(thing: tuple[int, int]) -> str:
    """What a (colour, digit) pair is called: `red 3`."""
    return f"{COLOUR_NAMES[thing[0]]} {thing[1]}"


def row_cells(row: int) -> range:
    """Numbers of the cells of one row."""
    return range(row * GRID, (row + 1) * GRID)


def row_digits(scene: Scene, row: int) -> list[int]:
    """The digits of one row, left to right, or nothing if a cell of the row is empty."""
    digits = [scene.digits[cell] for cell in row_cells(row)]
    return [] if EMPTY in digits else digits


def reading(digits: Iterable[int]) -> str:
    """Digits as they are read out: `3 5 1`."""
    return " ".join(str(digit) for digit in digits)


def _add(pool: Pool, answer: str, text: str) -> None:
    pool.setdefault(answer, []).append(text)


def _unique(scene: Scene) -> dict[int, tuple[int, int]]:
    """Cells whose (colour, digit) stands nowhere else in the scene."""
    often = Counter(scene.things())
    here = {cell: (scene.colours[cell], scene.digits[cell]) for cell in scene.filled()}
    return {cell: thing for cell, thing in here.items() if often[thing] == 1}


def digit_at(scene: Scene) -> Pool:
    """What digit is in B3? -> 0..9 or none."""
    pool: Pool = {}
    for cell, digit in enumerate(scene.digits):
        answer = NOTHING if digit == EMPTY else str(digit)
        _add(pool, answer, f"What digit is in {CELLS[cell]}?")
    return pool


def color_at(scene: Scene) -> Pool:
    """What color is the digit in B3? -> a colour."""
    pool: Pool = {}
    for cell in scene.filled():
        text = f"What color is the digit in {CELLS[cell]}?"
        _add(pool, COLOUR_NAMES[scene.colours[cell]], text)
    return pool


def filled_at(scene: Scene) -> Pool:
    """Is there a digit in B3? -> yes or no."""
    pool: Pool = {}
    for cell, digit in enumerate(scene.digits):
        answer = "no" if digit == EMPTY else "yes"
        _add(pool, answer, f"Is there a digit in {CELLS[cell]}?")
    return pool


def read_row(scene: Scene) -> Pool:
    """What number is in row B? -> its four digits, asked of rows without an empty cell."""
    pool: Pool = {}
    for row, letter in enumerate(ROWS):
        digits = row_digits(scene, row)
        if digits:
            _add(pool, reading(digits), f"What number is in row {letter}?")
    return pool


def where(scene: Scene) -> Pool:
    """Where is the red 3? -> its cell, asked of things that stand only once."""
    pool: Pool = {}
    for cell, thing in _unique(scene).items():
        _add(pool, CELLS[cell], f"Where is the {name(thing)}?")
    return pool


def exists(scene: Scene) -> Pool:
    """Is there a red 3 in the image? -> yes or no."""
    things = set(scene.things())
    pool: Pool = {}
    for colour in range(len(COLOUR_NAMES)):
        for digit in range(10):
            answer = "yes" if (colour, digit) in things else "no"
            _add(pool, answer, f"Is there a {name((colour, digit))} in the image?")
    return pool


def _neighbours(scene: Scene) -> Iterable[tuple[str, tuple[int, int], int]]:
    """(side, thing, neighbour's cell) for every unique thing with a digit on that side."""
    for cell, thing in _unique(scene).items():
        for side, (down, right) in SIDES.items():
            row, column = cell // GRID + down, cell % GRID + right
            if 0 <= row < GRID and 0 <= column < GRID:
                other = row * GRID + column
                if scene.digits[other] != EMPTY:
                    yield side, thing, other


def side_digit(scene: Scene) -> Pool:
    """What digit is left of the red 3? -> 0..9 (the next cell on that side)."""
    pool: Pool = {}
    for side, thing, other in _neighbours(scene):
        _add(pool, str(scene.digits[other]), f"What digit is {side} the {name(thing)}?")
    return pool


def side_color(scene: Scene) -> Pool:
    """What color is the digit above the red 3? -> a colour (the next cell on that side)."""
    pool: Pool = {}
    for side, thing, other in _neighbours(scene):
        text = f"What color is the digit {side} the {name(thing)}?"
        _add(pool, COLOUR_NAMES[scene.colours[other]], text)
    return pool


def side_check(scene: Scene) -> Pool:
    """Is the digit left of the red 3 blue? -> yes or no; a wrong colour stands elsewhere."""
    pool: Pool = {}
    seen = sorted({scene.colours[cell] for cell in scene.filled()})
    for side, thing, other in _neighbours(scene):
        for colour in seen:
            answer = "yes" if colour == scene.colours[other] else "no"
            _add(pool, answer, f"Is the digit {side} the {name(thing)} {COLOUR_NAMES[colour]}?")
    return pool


def _beside(scene: Scene) -> Iterable[tuple[str, int]]:
    """(`left of B3`, cell of the digit there) for every cell and side with a digit there."""
    for cell, address in enumerate(CELLS):
        for side, (down, right) in SIDES.items():
            row, column = cell // GRID + down, cell % GRID + right
            if 0 <= row < GRID and 0 <= column < GRID:
                other = row * GRID + column
                if scene.digits[other] != EMPTY:
                    yield f"{side} {address}", other


def beside_digit(scene: Scene) -> Pool:
    """What digit is left of B3? -> 0..9."""
    pool: Pool = {}
    for where_to, other in _beside(scene):
        _add(pool, str(scene.digits[other]), f"What digit is {where_to}?")
    return pool


def beside_color(scene: Scene) -> Pool:
    """What color is the digit above B3? -> a colour."""
    pool: Pool = {}
    for where_to, other in _beside(scene):
        text = f"What color is the digit {where_to}?"
        _add(pool, COLOUR_NAMES[scene.colours[other]], text)
    return pool


def beside_check(scene: Scene) -> Pool:
    """Is the digit below B3 red? -> yes or no; a wrong colour is one that stands elsewhere."""
    pool: Pool = {}
    seen = sorted({scene.colours[cell] for cell in scene.filled()})
    for where_to, other in _beside(scene):
        for colour in seen:
            answer = "yes" if colour == scene.colours[other] else "no"
            _add(pool, answer, f"Is the digit {where_to} {COLOUR_NAMES[colour]}?")
    return pool


def color_check(scene: Scene) -> Pool:
    """Is the digit in B3 red? -> yes or no; a wrong colour is one that stands elsewhere."""
    pool: Pool = {}
    seen = sorted({scene.colours[cell] for cell in scene.filled()})
    for cell in scene.filled():
        for colour in seen:
            answer = "yes" if colour == scene.colours[cell] else "no"
            _add(pool, answer, f"Is the digit in {CELLS[cell]} {COLOUR_NAMES[colour]}?")
    return pool


def digit_check(scene: Scene) -> Pool:
    """Is the digit in B3 a 7? -> yes or no; a wrong digit is one that stands elsewhere."""
    pool: Pool = {}
    seen = sorted({scene.digits[cell] for cell in scene.filled()})
    for cell in scene.filled():
        for digit in seen:
            answer = "yes" if digit == scene.digits[cell] else "no"
            _add(pool, answer, f"Is the digit in {CELLS[cell]} a {digit}?")
    return pool


def place_check(scene: Scene) -> Pool:
    """Is the red 3 in B3? -> yes or no; a wrong cell is one that holds a digit."""
    pool: Pool = {}
    for cell, thing in _unique(scene).items():
        for other in scene.filled():
            answer = "yes" if other == cell else "no"
            _add(pool, answer, f"Is the {name(thing)} in {CELLS[other]}?")
    return pool


KINDS: dict[str, Callable[[Scene], Pool]] = {
    function.__name__: function
    for function in (
        digit_at,
        color_at,
        filled_at,
        read_row,
        where,
        exists,
        side_digit,
        side_color,
        side_check,
        beside_digit,
        beside_color,
        beside_check,
        color_check,
        digit_check,
        place_check,
    )
}


def ask(
    scene: Scene, kind: str, rng: np.random.Generator, used: Counter[str] | None = None
) -> Question | None:
    """One question of a kind, or None where the scene cannot answer any.

    With `used` (how often each answer was given before) the rarest possible answer is taken and
    counted; without it every possible answer is equally likely. Raises ValueError for an unknown
    kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}; accepted: {', '.join(KINDS)}")
    pool = KINDS[kind](scene)
    if not pool:
        return None
    answers = sorted(pool)
    if used is not None:
        rarest = min(used[answer] for answer in answers)
        answers = [answer for answer in answers if used[answer] == rarest]
    answer = answers[int(rng.integers(len(answers)))]
    texts = pool[answer]
    if used is not None:
        used[answer] += 1
    return Question(kind, texts[int(rng.integers(len(texts)))], answer)


def describe(scene: Scene, cells: Iterable[int]) -> str:
    """A dense caption of some cells, each with its address: `A1 red 3 A2 none B4 blue 7`."""
    return " ".join(f"{CELLS[cell]} {_contents(scene, cell)}" for cell in cells)


def _contents(scene: Scene, cell: int) -> str:
    if scene.digits[cell] == EMPTY:
        return NOTHING
    return name((scene.colours[cell], scene.digits[cell]))


def _digit_word(digit: int) -> str:
    return NOTHING if digit == EMPTY else str(digit)


# Short statements: kind of question -> (what its text starts with, the head of a list of them).
# Each item says the same as a question in the fewest words, the last argument next to the answer.
_FACT_FORMS = {
    "where": ("Where is the ", "Where"),
    "exists": ("Is there a ", "there"),
    "side_check": ("Is the digit ", "Is"),
    "color_check": ("Is the digit in ", "Is"),
    "digit_check": ("Is the digit in ", "Is"),
    "place_check": ("Is the ", "Is"),
}
FACTS: dict[str, float] = {
    "where": 4.0,
    "exists": 3.0,
    "side": 4.0,
    "beside": 2.0,
    "rows": 2.0,
    "side_check": 1.0,
    "color_check": 1.0,
    "digit_check": 1.0,
    "place_check": 1.0,
}
FACT_WORDS = 48


def _items(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, list[str]]:
    """Head and items, in random order, of a list of statements of one kind."""
    if kind == "side":
        side = list(SIDES)[int(rng.integers(len(SIDES)))]
        found = [
            f"{name(thing)} {name((scene.colours[other], scene.digits[other]))}"
            for where_to, thing, other in _neighbours(scene)
            if where_to == side
        ]
        return side, [found[i] for i in rng.permutation(len(found))]
    if kind == "beside":
        side = list(SIDES)[int(rng.integers(len(SIDES)))]
        down, right = SIDES[side]
        found = []
        for cell in rng.permutation(len(CELLS)).tolist():
            row, column = cell // GRID + down, cell % GRID + right
            if 0 <= row < GRID and 0 <= column < GRID:
                found.append(f"{CELLS[cell]} {_contents(scene, row * GRID + column)}")
        return side, found
    if kind == "rows":
        order = rng.permutation(GRID).tolist()
        return "row", [
            " ".join([ROWS[row], *(_digit_word(scene.digits[cell]) for cell in row_cells(row))])
            for row in order
        ]
    start, head = _FACT_FORMS[kind]
    pool = KINDS[kind](scene)
    most = max((len(texts) for texts in pool.values()), default=0)
    if set(pool) == {"yes", "no"}:
        most = min(len(texts) for texts in pool.values())
    found = []
    for answer, texts in pool.items():
        for i in rng.permutation(len(texts))[:most]:
            words = texts[i].removeprefix(start).removesuffix("?").removesuffix(" in the image")
            for filler in (" the ", " in ", " a "):
                words = words.replace(filler, " ")
            found.append(f"{words} {answer}")
    return head, [found[i] for i in rng.permutation(len(found))]


def facts(scene: Scene, kind: str, rng: np.random.Generator, limit: int = FACT_WORDS) -> str | None:
    """A list of short statements of one kind, of about `limit` words at most.

    `Where red 3 B2 blue 7 C1`, `there red 3 yes blue 3 no`, `left of red 3 blue 5`,
    `left of B2 red 3`, `row A 3 none 1 7`, `Is B2 red no`; None where the scene has none.
    """
    head, items = _items(scene, kind, rng)
    words = [head]
    for item in items:
        if len(" ".join([*words, item]).split()) > limit:
            break
        words.append(item)
    return " ".join(words) if len(words) > 1 else None
