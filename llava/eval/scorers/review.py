"""A judge model's reviews as scores: LLaVA-Bench and LLaVA-QA90 (two numbers each), MM-Vet (one).

Special here: nothing talks to a judge; `llava judge` does. LLaVA's summary averages a judgement it
could not read in as (-1, -1). That number is kept under its name, and the same over the readable
ones stands beside it with their count.

Rules: LLaVA's eval_gpt_review_bench.py (parse_score) and summarize_gpt_review.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava.eval.scorers.base import Item, Metric, Scorer, groups, mean_metric, ratio

UNREADABLE = (-1, -1)


def read_pair(text: str) -> tuple[float, float]:
    """The two numbers that make up a review's first line, apart by one space or comma."""
    words = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return UNREADABLE
    return first, second


def read_share(text: str) -> float | None:
    """The first number of a judgement that lies between 0 and 1; None if there is none."""
    found = (float(number) for number in re.findall(r"(?<![\w.])\d*\.?\d+(?![\w%])", text))
    return next((number for number in found if 0 <= number <= 1), None)


def summary_lines(reviews: Sequence[Mapping[str, Any]], skip: Sequence[int] = ()) -> list[str]:
    """LLaVA's table: category (and all), second / first in per cent, both means times ten."""
    tuples: dict[str, list[Sequence[float]]] = {}
    for review in reviews:
        if review.get("question_id") in skip:
            continue
        pair = review.get("tuple") or review.get("score") or read_pair(review["content"])
        for name in dict.fromkeys([review.get("category", "all"), "all"]):
            tuples.setdefault(name, []).append(pair)
    lines = []
    for name, pairs in sorted(tuples.items()):
        # Rounded first, then divided, as in the original.
        first, second = (round(mean, 3) for mean in np.asarray(pairs, dtype=float).mean(0).tolist())
        share = round(second / first * 100, 1) if first else float("nan")
        lines.append(f"{name} {share} {round(first * 10, 1)} {round(second * 10, 1)}")
    return lines


# ----------------------------------------------------------------------------- scored
def _pairs(items: Sequence[Item], inside: np.ndarray) -> Metric:
    """100 * mean of the second score / mean of the first."""
    pairs = np.array([item["pair"] for item in items], dtype=float) * inside[:, None]
    return Metric(pairs, lambda sums: 100 * ratio(sums[..., 1], sums[..., 0]), int(inside.sum()))


def _pair_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    everything = np.ones(len(items))
    readable = np.array([tuple(item["pair"]) != UNREADABLE for item in items], dtype=float)
    found = {"relative_score": _pairs(items, everything)}
    for name in groups(items, "category"):
        own = np.array([item["category"] == name for item in items], dtype=float)
        found[f"relative_score/{name}"] = _pairs(items, own)
    if readable.any():
        found["relative_score_readable"] = _pairs(items, readable)
    return found


def _share_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    found = {"score": mean_metric(items)}
    for name in dict.fromkeys(name for item in items for name in item["capabilities"]):
        found[f"score/{name}"] = mean_metric(
            items, where=lambda item, n=name: n in item["capabilities"]
        )
    return found


def _unreadable(items: Sequence[Item], dialect: str) -> dict[str, Any]:
    return {"unreadable": sum(item["parsed"] is None for item in items)}


def _from_reviews(*_: Any) -> list[Item]:
    raise ValueError("this set is scored from a judge's reviews: llava judge RUN --help")


PAIRS = Scorer(_from_reviews, _pair_metrics, _unreadable)
SHARES = Scorer(_from_reviews, _share_metrics, _unreadable)
