"""Exact match: an answer is right if it says what the label says, up to case and a final period.

The rule of GQA's evaluation with white space squeezed, so that a number read digit by digit is one
answer. A missing answer counts as wrong and is reported; it never leaves the denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.eval.questions import Question
from llava.eval.scorers.interval import accuracy_interval


@dataclass(frozen=True)
class Scores:
    """accuracy, low and high in per cent (95 % interval, found by `interval`); n questions, of
    which n_missing had no answer; per_category: category -> {"accuracy", "n"}; per_item: one record
    a question with its score 0 or 1, in the order of the questions."""

    accuracy: float
    low: float
    high: float
    n: int
    n_missing: int
    interval: str
    per_category: dict[str, dict[str, float]]
    per_item: list[dict[str, Any]]


def normalise(text: str) -> str:
    """Lower case, white space squeezed, no period at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def score_exact(
    questions: Sequence[Question],
    labels: Mapping[str, str],
    answers: Sequence[Mapping[str, Any]],
) -> Scores:
    """Score answer records against labels, which map a question's uid to its right answer.

    Raises ValueError if a question has no label, or two answers to one question differ.
    """
    if not questions:
        raise ValueError("there are no questions to score")
    given = _by_uid(answers)
    items = []
    for question in questions:
        if question.uid not in labels:
            raise ValueError(f"no label for question {question.question_id!r} ({question.uid})")
        said, right = given.get(question.uid), labels[question.uid]
        item = {
            "uid": question.uid,
            "question_id": question.question_id,
            "category": question.category,
            "prediction": said,
            "label": right,
            "score": int(said is not None and normalise(said) == normalise(right)),
        }
        items.append(item)
    scores = [item["score"] for item in items]
    # A question without a picture is a cluster of its own.
    clusters = [question.images or question.uid for question in questions]
    interval = accuracy_interval(scores, clusters)
    return Scores(
        accuracy=100 * sum(scores) / len(scores),
        low=100 * interval.low,
        high=100 * interval.high,
        n=len(scores),
        n_missing=sum(item["prediction"] is None for item in items),
        interval=interval.method,
        per_category=_per_category(items),
        per_item=items,
    )


def _by_uid(answers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    given: dict[str, str] = {}
    for record in answers:
        uid, text = record["uid"], record["text"]
        if given.setdefault(uid, text) != text:
            raise ValueError(f"two different answers to {uid}: {given[uid]!r} and {text!r}")
    return given


def _per_category(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[int]] = {}
    for item in items:
        groups.setdefault(item["category"], []).append(item["score"])
    return {
        category: {"accuracy": 100 * sum(scores) / len(scores), "n": len(scores)}
        for category, scores in groups.items()
    }
