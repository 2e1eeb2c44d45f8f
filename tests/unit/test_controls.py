"""Methods against random and uniform: who loses is said, and said first."""

from __future__ import annotations

from typing import Any

import pytest

from llava.eval import controls


def found(method: str, low: float, high: float, share: float = 0.6, control: str = "random") -> Any:
    return {
        "checkpoint": "m", "method": method, "control": control, "budget": 0.5,
        "flops_budget": share, "value": (low + high) / 2, "low": low, "high": high, "better": 5,
        "worse": 9, "mcnemar_p": 0.42, "n": 200,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-3, -1, "loses"), (1, 3, "beats"), (-1, 1, "even"), (-2, 0, "even"), (0, 0, "even")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(
    low: float, high: float, expected: str
) -> None:
    assert controls.outcome(found("a", low, high)) == expected


def test_losers_are_named_with_their_budgets() -> None:
    (said,) = controls.sentences(
        [found("a", -5, -1), found("a", -9, -2, 0.5), found("b", 1, 2), found("c", -1, 1)]
    )
    assert said == (
        "m: worse than random: a (60 %, 50 %); better: b (60 %); no clear difference: c (60 %)."
    )
    (said,) = controls.sentences([found("b", -1, 2)])
    assert (
        said == "m: no method is worse than random; none is better; no clear difference: b (60 %)."
    )


def test_section_has_a_cell_a_comparison() -> None:
    text = controls.controls_section(
        [found("a", -5, -1), found("b", 1, 2), found("a", -1, 1, control="uniform")]
    )
    assert text.count("better on 5, worse on 9 of 200 questions, p = 0.42") == 3
    assert text.count("#fde8e4") == text.count("#e2f3ea") == 1
    assert "−3.0 <small>[−5.0, −1.0]" in text
    assert text.count("<td>–</td>") == 1
    assert controls.controls_section([]) == ""
