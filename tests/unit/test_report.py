"""Table and page from made-up figures: numbers arrive, nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llava.eval import charts, report

SETS = ("digits_vqav2", "digits_gqa", "digits_textvqa", "digits_pope", "digits_mme")
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def _row(checkpoint: str, name: str, budget: float | None, number: int) -> dict[str, Any]:
    cost = 1.0 if budget is None else budget
    accuracy = {"none": 95.0, "blind": 30.0}.get(name, 60.0 + 40 * cost - 3 * number)
    plan = name if budget is None else f"{name}:layers=[2,4],ratios=[{budget},{budget**2:.3g}]"
    return {
        "checkpoint": checkpoint, "plan": plan, "set": SETS[number], "accuracy": accuracy,
        "low": accuracy - 3.0, "high": min(100.0, accuracy + 3.0), "n": 300 + number,
        "visual_tmacs": 8e-5 * cost, "full_tflops": 2.4e-4 * (0.4 + 0.6 * cost),
        "prefill_ms": 80 * cost, "decode_ms": 9.0, "share_of_ideal": 0.6 if budget else None,
        "budget": budget, "flops_budget": budget and 0.4 + 0.6 * budget,
        "kept_tokens": [64, int(64 * cost)],
    }  # fmt: skip


def summary() -> dict[str, Any]:
    """Two checkpoints, all plans, five sets: figures that were never measured."""
    plans = [("none", None), ("blind", None)] + [
        (name, budget)
        for name in ("pyramiddrop", "random", "uniform")
        for budget in (0.6, 0.5, 0.3)
    ]
    rows = [
        _row(checkpoint, name, budget, number)
        for checkpoint in ("llava-digits", "llava-digits-pdrop")
        for name, budget in plans
        for number in range(len(SETS))
    ]
    part = {
        "none_ms": 900.0, "plan_ms": 470.0, "speedup": 1.915, "speedup_spread": [1.9, 1.93],
        "ideal": 1.99, "share_of_ideal": 0.962, "selection_share": 0.03,
    }  # fmt: skip
    kept = [list(range(64)), list(range(0, 64, 2)), [9, 10, 17, 18]]
    stages = [
        {"start": start, "stop": start + 2, "kept": [numbers], "length": 20 + len(numbers)}
        for start, numbers in zip((0, 2, 4), kept, strict=True)
    ]
    cuts = [{"at": at, "method": "pyramiddrop", "scores": [[]]} for at in (2, 4)]
    example = {
        "question": "Is <b> above 3 & 4?", "label": "no", "correct": False,
        "checkpoint": "llava-digits", "plan_label": "pyramiddrop λ 0.5",
        "fields": [{"picture": 0, "image": PIXEL, "rows": 8, "columns": 8, "newlines": 0}],
        "runs": [{"plan": "pyramiddrop:...", "answer": "yes", "stages": stages, "cuts": cuts}],
    }  # fmt: skip
    comparisons = [
        {
            "checkpoint": "llava-digits", "method": "pyramiddrop", "control": control,
            "budget": 0.5, "flops_budget": 0.7, "value": value, "low": value - 2,
            "high": value + 2, "better": 9, "worse": 4, "mcnemar_p": 0.25, "n": 1500,
        }
        for control, value in (("random", -4.1), ("uniform", 1.0))
    ]  # fmt: skip
    return {
        "rows": rows,
        "comparisons": comparisons,
        "every_method": {**example, "checkpoint": "m", "right": {"yes": False}},
        "sets": {name: {"chance": 25.0} for name in SETS},
        "bench": {"prefill": part, "decode": part, "train_step": part, "threads": 1},
        "examples": [example],
        "timing_batch": 32,
        "environment": {"python": "3", "cpu": "made up"},
    }


class _Tags(HTMLParser):
    VOID = frozenset(("meta", "image", "use", "line", "rect", "circle", "polyline", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(text: str) -> list[str]:
    """Every tag is closed, nothing is loaded from elsewhere, and links within the page have an end;
    the tags in their order."""
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert "script" not in tags.seen
    assert tags.links
    inner = {link for link in tags.links if link.startswith("#")}
    assert all(link.startswith("data:") for link in tags.links if link not in inner)
    assert all(f'id="{link[1:]}"' in text for link in inner)
    assert not re.search(r"url\(|@import|https?://", text)
    return tags.seen


def test_page_is_whole_and_loads_nothing() -> None:
    tags = check_page(report.page(summary()))
    # means, sets, times, and twice the definitions of a picture and its three stages
    assert tags.count("svg") == 2 + 10 + 4 + 2 * (1 + 3)


def test_page_shows_the_figures_and_escapes_questions() -> None:
    text = report.page(summary())
    for needle in (
        "95.0",
        "70 %",
        "−4.1",
        "96 %",
        "1.92×",
        "batch 32",
        "too small to show",
        "cpu-512",
    ):
        assert needle in text, needle
    assert "Is &lt;b&gt; above 3 &amp; 4?" in text
    assert "layers 4–5: 4" in text
    assert "worse than random: pyramiddrop (70 %)" in text


def test_page_without_optional_parts() -> None:
    data = {"rows": [_row("m", "none", None, 0)]}
    data["rows"][0]["prefill_ms"] = data["rows"][0]["decode_ms"] = None
    text = report.page(data)
    assert "Measured times" not in text
    assert "Which tokens survive" not in text
    assert "larger size" not in text


def test_mean_row_adds_half_widths_in_squares() -> None:
    rows = [{**_row("m", "none", None, i), "accuracy": 90.0, "low": 86.0, "high": 92.0}
            for i in range(4)]  # fmt: skip
    mean = report.mean_row(rows)
    assert (mean["accuracy"], mean["low"], mean["high"]) == (90.0, 88.0, 91.0)
    assert mean["n"] == sum(row["n"] for row in rows)
    with pytest.raises(ValueError, match="no rows"):
        report.mean_row([])


def test_table_has_a_line_a_plan() -> None:
    text = report.format_table(summary()["rows"])
    assert text.count("pyramiddrop 70 %") == 2
    line = next(line for line in text.splitlines() if line.startswith("none"))
    assert line.split()[1:6] == ["95.0"] * 5
    assert "300 to 304 questions" in text
    widths = {len(line) for line in text.split("\n\n")[0].splitlines()[1:]}
    assert len(widths) == 1


def test_main_round_trip_and_bad_summaries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary()), encoding="utf-8")
    report.main([str(path)])
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == report.page(summary())
    assert "pyramiddrop" in capsys.readouterr().out
    for bad in ("{", "[]", '{"rows": []}', '{"rows": [{"plan": "none"}]}'):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(SystemExit) as stop:
            report.main([str(path)])
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 105, [0, 25, 50, 75, 100]), (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8]), (3, 4, [3, 3.2, 3.4])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high)[: len(expected)] == pytest.approx(expected)
    with pytest.raises(ValueError, match="larger"):
        charts.ticks(high, low)


def test_chart_places_points_where_the_axes_say() -> None:
    frame = charts.Frame((0, 10), (0, 100), 200, 100, left=20, right=20, top=10, bottom=10)
    assert (frame.px(0), frame.px(10)) == (20, 180)
    assert (frame.py(0), frame.py(100)) == (90, 10)


def test_steps_are_drawn_at_their_layers() -> None:
    text = charts.step_chart(
        [("a", "uniform", [4.0, 4.0, 1.0])], x_title="layer", y_title="tokens", size=(500, 280)
    )
    frame = charts.Frame((0, 3), (0, 4 * 1.08), 500, 280, right=92)
    points = [(0, 4), (1, 4), (1, 4), (2, 4), (2, 1), (3, 1)]
    assert " ".join(f"{frame.px(x):.1f},{frame.py(y):.1f}" for x, y in points) in text
    with pytest.raises(ValueError, match="no values"):
        charts.step_chart([], x_title="x", y_title="y")


def test_empty_charts_are_refused() -> None:
    with pytest.raises(ValueError, match="no points"):
        charts.accuracy_chart({}, {}, x_title="x")
    with pytest.raises(ValueError, match="no bars"):
        charts.bar_chart([], unit="ms")
