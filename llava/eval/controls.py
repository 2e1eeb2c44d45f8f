"""Does choosing tokens beat not choosing? Methods against `random` and `uniform`, in words.

Special here: a method that loses is named first. Differences are paired (the same questions) and
their intervals resample pictures; "beats" and "loses to" mean that the 95 % interval lies on one
side of zero. Input is ``comparisons`` of the quickstart's summary.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llava.drawing import colour
from llava.eval.pages import section, table, unique

Comparison = Mapping[str, Any]
UNTRAINED = (
    '<p class="note">yopo is made to be trained with. On these models, which were not, only its '
    "last visual layer is set; it uses less than its budget where no layer fits better.</p>"
)


def outcome(found: Comparison) -> str:
    """ "loses", "beats" or "even"."""
    if found["high"] < 0:
        return "loses"
    return "beats" if found["low"] > 0 else "even"


def percent(found: Comparison) -> str:
    """The budget as it is called in tables: ``67 %``."""
    share = found.get("flops_budget")
    return f"λ {found['budget']:g}" if share is None else f"{share:.0%}".replace("%", " %")


def points(value: float) -> str:
    """``+2.3`` or ``−4.1``."""
    return f"{value:+.1f}".replace("-", "−")


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """For each checkpoint and control: which methods lose to it, beat it, or neither."""
    found = []
    for checkpoint in unique([each["checkpoint"] for each in comparisons]):
        for control in unique([each["control"] for each in comparisons]):
            mine = [
                each
                for each in comparisons
                if (each["checkpoint"], each["control"]) == (checkpoint, control)
            ]
            if mine:
                found.append(f"{checkpoint}: {one_sentence(mine, control)}")
    return found


def one_sentence(mine: Sequence[Comparison], control: str) -> str:
    """Who loses to one control, who beats it, who does neither."""
    lost, won, even = (listed(mine, which) for which in ("loses", "beats", "even"))
    words = [f"worse than {control}: {lost}" if lost else f"no method is worse than {control}"]
    words.append(f"better: {won}" if won else "none is better")
    words += [f"no clear difference: {even}"] if even else []
    return "; ".join(words) + "."


def listed(mine: Sequence[Comparison], which: str) -> str:
    """``fastv (67 %, 52 %), simignore (67 %)``: methods and the budgets where it is so."""
    names = []
    for method in unique([each["method"] for each in mine]):
        places = [
            percent(each) for each in mine if each["method"] == method and outcome(each) == which
        ]
        if places:
            names.append(f"{method} ({', '.join(places)})")
    return ", ".join(names)


def controls_section(comparisons: Sequence[Comparison]) -> str:
    """A table of all differences and the same in words, losers first."""
    if not comparisons:
        return ""
    note = UNTRAINED if any(each["method"] == "yopo" for each in comparisons) else ""
    words = "".join(f"<li>{escape(each)}</li>" for each in sentences(comparisons))
    tables = "".join(
        f"<h3>{escape(checkpoint)}</h3>"
        + difference_table([each for each in comparisons if each["checkpoint"] == checkpoint])
        for checkpoint in unique([each["checkpoint"] for each in comparisons])
    )
    return section(
        "Does choosing tokens beat not choosing?",
        "Each method against random tokens and an even stride that may use the same prefill "
        "FLOPs, on the same questions of all sets. Points of accuracy, method less control, with "
        "a 95 % interval that resamples pictures; p is McNemar's exact test, which takes "
        "questions for independent. Nothing is corrected for the number of comparisons: of twenty "
        "equal methods one would look different by chance.",
        f"<ul>{words}</ul>{tables}{note}",
    )


def difference_table(mine: Sequence[Comparison]) -> str:
    """Rows: methods; columns: controls and budgets."""
    controls = unique([each["control"] for each in mine])
    columns = [
        (control, place) for control in controls for place in unique([percent(e) for e in mine])
    ]
    head = ["method", *[f"{control}, {place}" for control, place in columns]]
    body = []
    for method in unique([each["method"] for each in mine]):
        cells = {(e["control"], percent(e)): e for e in mine if e["method"] == method}
        row = "".join(
            difference_cell(cells[column]) if column in cells else "<td>–</td>"
            for column in columns
        )
        name = f'<i class="dot" style="background:{colour(method)}"></i>{escape(method)}'
        body.append(f"<tr><td>{name}</td>{row}</tr>")
    return table(head, body)


def difference_cell(found: Comparison) -> str:
    """``+2.3 [0.5, 4.0]``, coloured where it is on one side of zero."""
    tint = {"loses": ' style="background:#fde8e4"', "beats": ' style="background:#e2f3ea"'}
    p = found["mcnemar_p"]
    note = "" if p is None else f"better on {found['better']}, worse on {found['worse']} of "
    note += "" if p is None else f"{found['n']} questions, p = {p:.2g}"
    return (
        f'<td{tint.get(outcome(found), "")} title="{note}">{points(found["value"])} '
        f"<small>[{points(found['low'])}, {points(found['high'])}]</small></td>"
    )
