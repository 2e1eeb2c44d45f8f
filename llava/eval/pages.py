"""The skeleton of self-contained pages: style, boxes, tables, names of plans.

Special here: no script, font or picture from elsewhere. `llava.eval.report` (the quickstart's page)
and `llava.eval.show` (``llava show``) fill it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llava.drawing import colour
from llava.reduction import REDUCERS, ReductionPlan
from llava.reduction.forms import split_parts

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #1a1d23;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 14px 0 6px; }
p { margin: 0 0 12px; max-width: 76ch; }
.lead { font-size: 17px; color: #3d4451; }
.note { color: #5c6472; font-size: 14px; }
section { background: #fff; border: 1px solid #e1e4ea; border-radius: 10px; padding: 24px;
  margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin-top: 22px; }
.card { background: #fff; border: 1px solid #e1e4ea; border-radius: 10px; padding: 16px 18px; }
.card b { display: block; font-size: 26px; line-height: 1.2; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.card span { font-size: 13.5px; color: #5c6472; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 24px; }
.five { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg .tick { font-size: 11px; fill: #5c6472; }
svg .axis { font-size: 12px; fill: #3d4451; }
svg .figure { font-size: 11.5px; fill: #1a1d23; font-variant-numeric: tabular-nums; }
svg .gone { fill: #fff; fill-opacity: .88; shape-rendering: crispEdges; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 6px 0 12px; font-size: 14px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%;
  margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 7px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1.5px solid #98a0ad; font-weight: 600; }
tbody tr + tr td { border-top: 1px solid #eceef2; }
tbody tr.none td { background: #f5f6f8; font-weight: 600; }
tbody tr.group td { background: #f5f6f8; color: #3d4451; font-size: 12.5px; padding-top: 9px; }
td i, h2 i.dot, h3 i.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin-right: 8px; }
td small { color: #7a8290; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr));
  gap: 8px 36px; }
.example { border-top: 1px solid #eceef2; padding: 10px 0 6px; }
.stages { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; }
.stages figure { margin: 0; }
.stages svg { border: 1px solid #d5d9e0; border-radius: 4px; }
.fields { display: flex; gap: 8px; align-items: flex-start; }
.fields > div { min-width: 0; }
.map { margin-top: 8px; }
.scale { display: inline-block; width: 84px; height: 9px; border-radius: 5px; margin: 0 6px;
  background: linear-gradient(90deg, #0d083e, #540f6d, #9e2667, #db503e, #fba11a, #faf49e); }
figcaption { font-size: 12.5px; color: #5c6472; margin-top: 4px; }
code { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: #eef0f4;
  padding: 1px 5px; border-radius: 4px; }
ul { margin: 0 0 12px; padding-left: 20px; }
li { max-width: 100ch; margin: 3px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; font-size: 14px;
  margin: 0; }
dt { color: #5c6472; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 480px) { main { padding: 24px 12px; } section { padding: 16px; }
  .two, .examples { grid-template-columns: 1fr; } .stages { grid-template-columns: 1fr 1fr; } }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """The whole page as text; empty parts are left out. style: further rules."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, text: str, content: str) -> str:
    """One white box of the page."""
    note = f"<p>{escape(text)}</p>" if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}\n{content}\n</section>"


def two(charts_: Sequence[str]) -> str:
    """Charts side by side."""
    return '<div class="two">' + "".join(f"<div>{chart}</div>" for chart in charts_) + "</div>"


def table(head: Sequence[str], body: Sequence[str]) -> str:
    """A table that scrolls sideways on narrow screens."""
    cells = "".join(f"<th>{escape(title)}</th>" for title in head)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def facts_list(facts: Mapping[str, Any]) -> str:
    """Where and how figures were made, as a list of definitions."""
    rows = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in facts.items()
        if value is not None
    )
    return f"<dl>{rows}</dl>"


def dot(plan: str) -> str:
    """The coloured dot of a plan's method."""
    return f'<i class="dot" style="background:{colour(method_of(plan))}"></i>'


# ----------------------------------------------------------------------------- names, numbers
def method_of(plan: str) -> str:
    """``pyramiddrop:layers=...`` is ``pyramiddrop``; ``none`` and ``blind`` are themselves; a plan
    of several methods is called by all of them."""
    if plan.startswith("{"):
        found = [cut.reducer.name for cut in ReductionPlan.parse(plan).cuts]
    else:
        found = [name for name, _ in split_parts(plan, REDUCERS)]
    return " + ".join(unique(found))


def unique(values: Sequence[str]) -> list[str]:
    """Without repetition, in the order of first appearance."""
    return list(dict.fromkeys(values))
