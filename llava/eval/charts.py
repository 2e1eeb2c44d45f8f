"""Small SVG charts for self-contained pages: no script, no asset, readable in print.

Special here: each function takes plain numbers and returns one `<svg>` string, so that a page needs
nothing but itself. `llava.eval.report` puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from llava.drawing import colour, line, svg, text


@dataclass(frozen=True)
class Point:
    """One measurement: ``low`` and ``high`` bound its interval, ``label`` shows on hovering;
    ``hollow``: drawn as a ring."""

    x: float
    y: float
    low: float
    high: float
    label: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Frame:
    """Where data lies on the paper: ranges in data units, sizes in pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int
    height: int
    left: int = 46
    right: int = 14
    top: int = 14
    bottom: int = 40

    def px(self, value: float) -> float:
        """Horizontal position of a data value."""
        share = (value - self.x[0]) / (self.x[1] - self.x[0])
        return self.left + share * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Vertical position of a data value."""
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    if not high > low:
        raise ValueError(f"no ticks between {low} and {high}; the second must be larger")
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = next(scale * f for f in (1, 2, 2.5, 5, 10) if scale * f >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def axes(frame: Frame, x_title: str, y_title: str, *, y_ticks: int = 5) -> list[str]:
    """Grid, tick labels and titles."""
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    parts = []
    for value in ticks(*frame.y, y_ticks):
        y = frame.py(value)
        parts.append(line(frame.left, y, right, y, "#e4e7ec"))
        parts.append(text(frame.left - 7, y + 3.5, f"{value:g}", anchor="end"))
    for value in ticks(*frame.x, max(4, (right - frame.left) // 70)):
        x = frame.px(value)
        parts.append(line(x, bottom, x, bottom + 4, "#98a0ad"))
        parts.append(text(x, bottom + 16, f"{value:g}"))
    parts.append(line(frame.left, bottom, right, bottom, "#98a0ad"))
    if x_title:
        middle = (frame.left + right) / 2
        parts.append(text(middle, frame.height - 6, x_title, css="axis"))
    if y_title:
        middle = (frame.top + bottom) / 2
        parts.append(
            f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle" '
            f'class="axis">{escape(y_title)}</text>'
        )
    return parts


def error_bars(frame: Frame, points: Sequence[Point], stroke: str, shift: float) -> list[str]:
    """Intervals with caps and a dot each, moved sideways by ``shift`` pixels."""
    parts = []
    for point in points:
        x, low, high = frame.px(point.x) + shift, frame.py(point.low), frame.py(point.high)
        parts.append(line(x, low, x, high, stroke, 'stroke-width="1.4"'))
        for end in (low, high):
            parts.append(line(x - 3, end, x + 3, end, stroke, 'stroke-width="1.4"'))
        fill, edge, width = ("#fff", stroke, 1.8) if point.hollow else (stroke, "#fff", 1)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{frame.py(point.y):.1f}" r="3.6" fill="{fill}" '
            f'stroke="{edge}" stroke-width="{width}"><title>{escape(point.label)}</title></circle>'
        )
    return parts


def accuracy_chart(
    series: Mapping[str, Sequence[Point]],
    levels: Mapping[str, float],
    *,
    x_title: str,
    size: tuple[int, int] = (520, 330),
    y_title: str = "accuracy, %",
) -> str:
    """Accuracy against cost: one line a method, error bars, dashed horizontal ``levels``.

    A series named ``none`` is drawn as a single dot; all other lines end in it.
    """
    every = [point for points in series.values() for point in points]
    if not every:
        raise ValueError("accuracy_chart: no points to draw")
    highest, lowest = max(point.x for point in every), min(point.x for point in every)
    room = 0.12 * max(highest - lowest, 0.1 * highest)
    frame = Frame((max(0.0, lowest - room), highest + room), (0, 105), *size)
    parts = axes(frame, x_title, y_title)
    for name, value in levels.items():
        y = frame.py(value)
        dash = 'stroke-dasharray="5 4" stroke-width="1.2"'
        parts.append(line(frame.left, y, frame.width - frame.right, y, colour("blind"), dash))
        parts.append(text(frame.left + 6, y - 4, f"{name} {value:.0f}", anchor="start"))
    methods = [name for name in series if name != "none"]
    for number, name in enumerate(methods):
        shift = size[0] / 100 * (number - (len(methods) - 1) / 2)
        points = sorted(series[name], key=lambda point: point.x)
        ends = [*points, *series.get("none", ())]
        path = " ".join(
            f"{frame.px(p.x) + (shift if p in points else 0):.1f},{frame.py(p.y):.1f}" for p in ends
        )
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(name)}" stroke-width="1.6" '
            'stroke-opacity=".55"/>'
        )
        parts += error_bars(frame, points, colour(name), shift)
    parts += error_bars(frame, series.get("none", ()), colour("none"), 0)
    return svg(*size, parts, f"{y_title} against {x_title}")


def scatter_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    x_title: str,
    y_title: str,
    size: tuple[int, int] = (520, 300),
) -> str:
    """Points with their intervals, coloured by method; the vertical axis spans what they need."""
    every = [point for points in series.values() for point in points]
    if not every:
        raise ValueError("scatter_chart: no points to draw")
    low, high = min(point.low for point in every), max(point.high for point in every)
    room = 0.08 * max(high - low, 0.02 * abs(high), 1e-6)
    highest = max(point.x for point in every) or 1.0
    frame = Frame((0.0, 1.08 * highest), (low - room, high + room), *size, left=66)
    parts = axes(frame, x_title, y_title)
    for name, points in series.items():
        rings_first = sorted(points, key=lambda point: not point.hollow)
        parts += error_bars(frame, rings_first, colour(name), 0)
    return svg(*size, parts, f"{y_title} against {x_title}")


def bar_chart(
    bars: Sequence[tuple[str, str, float]], *, unit: str, width: int = 520, label_width: int = 150
) -> str:
    """Horizontal bars from ``(label, colour name, value)`` with the value written behind each."""
    if not bars:
        raise ValueError("bar_chart: no bars to draw")
    step, highest = 22, max(value for *_, value in bars)
    room = width - label_width - 78
    parts = []
    for number, (label, name, value) in enumerate(bars):
        y = 4 + number * step
        length = room * value / highest if highest > 0 else 0
        parts.append(text(label_width - 8, y + 13, label, anchor="end", css="tick"))
        parts.append(
            f'<rect x="{label_width}" y="{y + 2}" width="{max(length, 1):.1f}" height="15" rx="2" '
            f'fill="{colour(name)}" fill-opacity=".85"/>'
        )
        figure = f"{value:.3g} {unit}"
        parts.append(text(label_width + length + 6, y + 13, figure, anchor="start", css="figure"))
    return svg(width, 8 + step * len(bars), parts, f"bars in {unit}")


def step_chart(
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    x_title: str,
    y_title: str,
    size: tuple[int, int] = (520, 280),
) -> str:
    """A staircase a plan over the layers, from ``(label, colour name, value of each layer)``.

    Steps that coincide are drawn beside each other, and a label stands where its line ends.
    """
    depth = max((len(values) for *_, values in series), default=0)
    if not depth:
        raise ValueError("step_chart: no values to draw")
    highest = max(max(values) for *_, values in series) or 1.0
    frame = Frame((0, depth), (0, highest * 1.08), *size, right=92)
    parts = axes(frame, x_title, y_title)
    taken: list[float] = []
    for number, (label, name, values) in enumerate(series):
        shift = 1.6 * (number - (len(series) - 1) / 2)
        path = " ".join(
            f"{frame.px(x):.1f},{frame.py(value) + shift:.1f}"
            for i, value in enumerate(values)
            for x in (i, i + 1)
        )
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(name)}" stroke-width="2" '
            'stroke-linejoin="round"/>'
        )
        y = frame.py(values[-1]) + shift + 4
        while any(abs(y - other) < 12 for other in taken):
            y -= 1
        taken.append(y)
        parts.append(
            f'<text x="{size[0] - frame.right + 6}" y="{y:.1f}" font-size="11" '
            f'fill="{colour(name)}">{escape(label)}</text>'
        )
    return svg(*size, parts, f"{y_title} against {x_title}")
