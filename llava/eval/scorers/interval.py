"""How sure a score is, and whether two runs differ: 95 % intervals over whole pictures.

Special here: questions about one picture are not independent draws (POPE asks 18 about each), so
the pictures are resampled, all questions of one at a time, and every replicate works the whole
metric out again from sums (an F1, MME's pairs, a mean over categories). Two runs over the same
questions are compared on the same draws: their difference is much surer than either score.

    llava compare results/pope/RUN_A results/pope/RUN_B
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
REPLICATES = 2000
_CELLS = 4_000_000
"""Weights held at once: replicates x pictures."""


class Interval(NamedTuple):
    """Bounds in the unit of the scores, and how they were found."""

    low: float
    high: float
    method: str


class Difference(NamedTuple):
    """Second run less first: value with its 95 % interval, in the unit of the scores; on how many
    of the n items the second run is better and worse; McNemar's exact p for 0/1 scores, which
    takes items for independent (None for other scores)."""

    value: float
    low: float
    high: float
    better: int
    worse: int
    mcnemar_p: float | None
    n: int


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in 0..1. Raises ValueError if n < 1."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n}; accepted: n from 1 and successes from 0 to n")
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula is exact; rounding must not push a bound past the share.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


class Resampler:
    """Draws of whole clusters with replacement; the same seed gives the same draws."""

    def __init__(
        self, clusters: Sequence[Hashable], replicates: int = REPLICATES, seed: int = 0
    ) -> None:
        if not clusters:
            raise ValueError("0 clusters; there is nothing to resample")
        number = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
        self.index = np.array([number[key] for key in clusters])
        self.clusters, self.replicates, self.seed = len(number), replicates, seed

    def sums(self, columns: np.ndarray) -> np.ndarray:
        """Sums of [items, K] columns over the items of each draw: [replicates, K]."""
        columns = np.asarray(columns, dtype=float)
        if columns.shape[0] != len(self.index):
            raise ValueError(f"{columns.shape[0]} rows with {len(self.index)} clusters")
        totals = np.zeros((self.clusters, columns.shape[1]))
        np.add.at(totals, self.index, columns)
        rng = np.random.default_rng(self.seed)
        rows = max(1, _CELLS // self.clusters)
        parts = []
        for start in range(0, self.replicates, rows):
            count = min(rows, self.replicates - start)
            drawn = rng.integers(self.clusters, size=(count, self.clusters))
            drawn += np.arange(count)[:, None] * self.clusters
            weights = np.bincount(drawn.ravel(), minlength=count * self.clusters)
            parts.append(weights.reshape(count, self.clusters).astype(float) @ totals)
        return np.concatenate(parts)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 % of the replicates that have a value; NaN where none has."""
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def cluster_bootstrap(
    scores: Sequence[float],
    clusters: Sequence[Hashable],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile 95 % interval of the mean when whole clusters are drawn with replacement.

    scores: one a question; clusters: the picture of each. The same seed gives the same interval.
    """
    if len(scores) != len(clusters) or not scores:
        raise ValueError(f"{len(scores)} scores with {len(clusters)} clusters; one each is needed")
    columns = np.stack([np.asarray(scores, dtype=float), np.ones(len(scores))], axis=1)
    sums = Resampler(clusters, replicates, seed).sums(columns)
    return percentiles(sums[:, 0] / sums[:, 1])


def accuracy_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """95 % interval of the mean of 0/1 scores.

    Wilson where every picture has one question; else the pictures are resampled. Where all answers
    are equally right resampling has nothing to vary: then Wilson counts each picture once.
    """
    pictures = len(set(clusters))
    if pictures == len(scores):
        return Interval(*wilson(sum(scores), len(scores)), "wilson")
    if min(scores) == max(scores):
        return Interval(*wilson(scores[0] * pictures, pictures), "wilson over pictures")
    return Interval(*cluster_bootstrap(scores, clusters), "bootstrap over pictures")


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p that of better + worse changed answers so few lie on one side by chance."""
    n, k = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term - n * math.log(2)) for term in logs))


def difference_interval(
    first: np.ndarray,
    second: np.ndarray,
    value: Callable[[np.ndarray], np.ndarray],
    resampler: Resampler,
) -> tuple[float, float]:
    """95 % interval of value(second) - value(first), both on the same draws. Columns: [items, K]"""
    sums = resampler.sums(np.concatenate([first, second], axis=1))
    width = first.shape[1]
    return percentiles(value(sums[:, width:]) - value(sums[:, :width]))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Difference:
    """Mean of `second` less mean of `first`: scores of two runs item by item over one question set.

    clusters: the picture of each item. Raises ValueError for lists of different lengths.
    """
    if not len(first) == len(second) == len(clusters) or not first:
        sizes = f"{len(first)}, {len(second)} scores with {len(clusters)} clusters"
        raise ValueError(f"{sizes}; one each is needed")
    gain = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    columns = np.stack([gain, np.ones(len(gain))], axis=1)
    sums = Resampler(clusters, replicates, seed).sums(columns)
    low, high = percentiles(sums[:, 0] / sums[:, 1])
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    binary = set(np.unique(first)) | set(np.unique(second)) <= {0.0, 1.0}
    return Difference(
        float(gain.mean()), low, high, better, worse,
        mcnemar(better, worse) if binary else None, len(gain),
    )  # fmt: skip
