"""How sure an accuracy is: 95 % intervals for scores of single questions and of clusters.

Special here: questions about one picture are not independent draws (POPE asks 18 about each), so
where pictures have several questions the pictures are resampled, all questions of one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
REPLICATES = 2000


class Interval(NamedTuple):
    """Bounds in the unit of the scores, and how they were found."""

    low: float
    high: float
    method: str


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in 0..1. Raises ValueError if n < 1."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n}; accepted: n from 1 and successes from 0 to n")
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula is exact; rounding must not push a bound past the share.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


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
    number = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[key] for key in clusters])
    totals = np.bincount(index, weights=np.asarray(scores, dtype=float))
    sizes = np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(replicates, len(sizes)))
    means = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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
