"""What all scorers share: items, metrics that are functions of sums, and the scores of a run.

Special here: a scorer is two pure steps. The first judges each question (an *item*: what was said,
how it was read, a score from 0 to 1). The second says what is reported over items, each metric as
columns that add up and a function of their sums; so one bootstrap serves an accuracy, an F1, MME's
pairs and a mean over categories, and a comparison of two runs needs their items only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava.eval.questions import Question
from llava.eval.scorers.interval import Interval, Resampler, accuracy_interval, percentiles

Item = dict[str, Any]
Judge = Callable[[Question, Any, str, str], "Item | None"]


@dataclass(frozen=True)
class Metric:
    """columns: [items, K], added up over items; value: sums [..., K] -> [...]; n: items it is over.
    shares: the 0/1 scores, for metrics that are their plain mean in per cent."""

    columns: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    n: int
    shares: np.ndarray | None = None

    def point(self) -> float:
        """Over all items."""
        return float(self.value(self.columns.sum(axis=0)))


@dataclass(frozen=True)
class Scorer:
    """items: (questions, labels, given, dialect) -> one item a question that counts; metrics: what
    is reported over items, the headline first; details: further numbers without an interval.
    dialects: the readings of an answer it knows, the usual one first."""

    items: Callable[[Sequence[Question], Mapping[str, Any], Mapping[str, str], str], list[Item]]
    metrics: Callable[[Sequence[Item], str], dict[str, Metric]]
    details: Callable[[Sequence[Item], str], dict[str, Any]] = lambda items, dialect: {}
    dialects: tuple[str, ...] = ("llava",)


@dataclass(frozen=True)
class Scores:
    """A scored run. metric: name of the headline, whose value, bounds (95 %) and way of finding
    them follow; n items, of which n_missing had no answer and count as wrong; metrics: all of them
    by name, each with value, low, high (None where nothing can vary) and n; details: further
    numbers; per_item: the items, in the order of the questions."""

    scorer: str
    dialect: str
    metric: str
    value: float
    low: float
    high: float
    interval: str
    n: int
    n_missing: int
    metrics: dict[str, dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    per_item: list[Item] = field(default_factory=list)


# ----------------------------------------------------------------------------- items
def picture_key(question: Question) -> str:
    """What a question's cluster is called: its pictures; a question without one is alone."""
    if not question.images:
        return question.uid
    return "|".join(
        hashlib.sha1(image.encode()).hexdigest()[:16] if image.startswith("data:") else image
        for image in question.images
    )


def by_item(judge: Judge) -> Callable[..., list[Item]]:
    """The first step of a scorer that looks at one question at a time.

    judge: (question, label, text, dialect) -> the item's own keys, among them `score` (0 to 1) and
    `parsed`, or None for a question that does not count. A missing answer is never right.
    """

    def items(
        questions: Sequence[Question],
        labels: Mapping[str, Any],
        given: Mapping[str, str],
        dialect: str,
    ) -> list[Item]:
        found = []
        for question in questions:
            if question.uid not in labels:
                raise ValueError(f"no label for question {question.question_id!r} ({question.uid})")
            said = given.get(question.uid)
            own = judge(question, labels[question.uid], said or "", dialect)
            if own is None:
                continue
            missing = {} if said is not None else {"parsed": None, "score": 0.0}
            found.append(base_item(question, said) | own | missing)
        return found

    return items


def base_item(question: Question, said: str | None) -> Item:
    """The keys every item has but for its score."""
    return {
        "uid": question.uid,
        "question_id": question.question_id,
        "image": picture_key(question),
        "category": question.category,
        "prediction": said,
    }


# ----------------------------------------------------------------------------- metrics
def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below != 0)


def mean_metric(
    items: Sequence[Item],
    key: str | Callable[[Item], float] = "score",
    where: Callable[[Item], bool] | None = None,
    scale: float = 100.0,
) -> Metric:
    """Mean of a key over the items that `where` lets in, times `scale`."""
    get = (lambda item: item[key]) if isinstance(key, str) else key
    inside = np.array([where is None or where(item) for item in items], dtype=bool)
    scores = np.array([float(get(item)) if ok else 0.0 for item, ok in zip(items, inside)])  # noqa: B905
    shares = scores[inside]
    binary = scale == 100.0 and bool(np.isin(shares, (0.0, 1.0)).all())
    return Metric(
        np.stack([scores, inside.astype(float)], axis=1) if items else np.zeros((0, 2)),
        lambda sums: scale * ratio(sums[..., 0], sums[..., 1]),
        int(inside.sum()),
        shares if binary else None,
    )


def groups(items: Sequence[Item], key: str | Callable[[Item], Any]) -> list[Any]:
    """The values of a key in the order they appear, None left out."""
    get = (lambda item: item.get(key)) if isinstance(key, str) else key
    return [value for value in dict.fromkeys(get(item) for item in items) if value is not None]


def grouped_means(items: Sequence[Item], name: str, key: str = "category") -> dict[str, Metric]:
    """`name/value` -> mean score of the items with that value of `key`."""
    return {
        f"{name}/{value}": mean_metric(items, where=lambda item, v=value: item.get(key) == v)
        for value in groups(items, key)
    }


def accuracy_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    """The mean score, and by category where there is more than one."""
    found = {"accuracy": mean_metric(items)}
    if len(groups(items, "category")) > 1:
        found |= grouped_means(items, "accuracy")
    return found


# ----------------------------------------------------------------------------- a scored run
def check_complete(
    questions: Sequence[Question], given: Mapping[str, str], allow_missing: bool
) -> None:
    """ValueError that names the questions without an answer, unless that is allowed."""
    missing = [question for question in questions if question.uid not in given]
    if missing and not allow_missing:
        names = ", ".join(f"{q.question_id!r} ({q.uid})" for q in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{len(missing)} of {len(questions)} questions have no answer: {names}{more}; "
            "finish the run, or count them as wrong with --allow-missing"
        )


def score_items(
    name: str,
    scorer: Scorer,
    questions: Sequence[Question],
    labels: Mapping[str, Any],
    given: Mapping[str, str],
    dialect: str | None = None,
    allow_missing: bool = False,
) -> Scores:
    """Score answers (uid -> text) and find the intervals.

    Raises ValueError if there is nothing to score, for a dialect the scorer does not know, a
    question without a label, or answers that are missing.
    """
    dialect = scorer.dialects[0] if dialect is None else dialect
    if dialect not in scorer.dialects:
        raise ValueError(
            f"dialect {dialect!r} of scorer {name}; accepted: {', '.join(scorer.dialects)}"
        )
    if not questions:
        raise ValueError("there are no questions to score")
    check_complete(questions, given, allow_missing)
    items = scorer.items(questions, labels, given, dialect)
    if not items:
        raise ValueError("no question counts: there is nothing to score")
    return summarise(name, scorer, items, dialect)


def summarise(name: str, scorer: Scorer, items: list[Item], dialect: str) -> Scores:
    """Values and intervals of all metrics over judged items."""
    metrics = scorer.metrics(items, dialect)
    intervals = metric_intervals(list(metrics.values()), [item["image"] for item in items])
    table = {
        key: {
            "value": _number(metric.point()),
            "low": _number(interval.low),
            "high": _number(interval.high),
            "n": metric.n,
        }
        for (key, metric), interval in zip(metrics.items(), intervals, strict=True)
    }
    headline = next(iter(table))
    value = table[headline]["value"]
    if value is None:
        raise ValueError(f"{headline} has no value over these {len(items)} items")
    return Scores(
        scorer=name,
        dialect=dialect,
        metric=headline,
        value=value,
        low=table[headline]["low"],
        high=table[headline]["high"],
        interval=intervals[0].method,
        n=len(items),
        n_missing=sum(item["prediction"] is None for item in items),
        metrics=table,
        details=scorer.details(items, dialect),
        per_item=items,
    )


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def metric_intervals(metrics: Sequence[Metric], clusters: Sequence[str]) -> list[Interval]:
    """An interval a metric; all share the draws."""
    sums = Resampler(clusters).sums(np.concatenate([m.columns for m in metrics], axis=1))
    found, start = [], 0
    for metric in metrics:
        stop = start + metric.columns.shape[1]
        found.append(_interval(metric, clusters, sums[:, start:stop]))
        start = stop
    return found


def _interval(metric: Metric, clusters: Sequence[str], sums: np.ndarray) -> Interval:
    """Wilson where items are independent 0/1 scores or all alike, else percentiles of the draws."""
    if metric.shares is not None and metric.n:
        inside = metric.columns[:, 1] > 0
        own = [cluster for cluster, ok in zip(clusters, inside, strict=True) if ok]
        scores = metric.shares.tolist()
        if len(set(own)) == len(own) or min(scores) == max(scores):
            interval = accuracy_interval(scores, own)
            return interval._replace(low=100 * interval.low, high=100 * interval.high)
    low, high = percentiles(metric.value(sums))
    alike = " (all draws alike: no bound)" if low == high else ""
    return Interval(low, high, f"bootstrap over pictures{alike}")
