"""Relaxed accuracy: ChartQA.

Special here: a number may be 5 % off, but a right answer of zero must be met as a text, since no
share of zero exists; "12%" is 0.12, and "nan" is a number that nothing is close to.

Rule: lmms-eval 0.7 tasks/chartqa and VLMEvalKit vqa_eval.py, which agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.eval.questions import Question
from llava.eval.scorers.base import Item, Metric, Scorer, by_item, grouped_means, mean_metric

SLACK = 0.05


def as_number(text: str) -> float | None:
    """What a text says as a number, a per cent sign counted; None if it is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(said: str, right: str) -> bool:
    """Within 5 % where both are numbers and the right one is not zero, else equal but for case."""
    number, target = as_number(said), as_number(right)
    if number is not None and target:
        return abs(number - target) / abs(target) <= SLACK
    return said.lower() == right.lower()


def _chartqa(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer": text}; the question's category is the half it belongs to."""
    said, right = text.strip(), label["answer"]
    return {"parsed": said, "label": right, "score": float(relaxed_match(said, right))}


def _metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    return {"relaxed": mean_metric(items), **grouped_means(items, "relaxed")}


CHARTQA = Scorer(by_item(_chartqa), _metrics, dialects=("lmms", "vlmevalkit"))
