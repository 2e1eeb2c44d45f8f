"""Scorers: pure functions from questions, labels and answers to scores.

One table, `SCORERS`; `score(name, questions, labels, given, dialect)` judges the answers with one
of its entries and finds the intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.questions import Question
from llava.eval.scorers.anls import ANLS
from llava.eval.scorers.base import Scorer, Scores, score_items
from llava.eval.scorers.captions import CAPTIONS
from llava.eval.scorers.exact import DIGITS, GQA, OCRVQA
from llava.eval.scorers.join import join_answers
from llava.eval.scorers.mmmu import MMMU
from llava.eval.scorers.multiple_choice import (
    AI2D,
    AOKVQA,
    AOKVQA_DIRECT,
    MMBENCH,
    MMSTAR,
    SCIENCEQA,
    SEED,
)
from llava.eval.scorers.relaxed import CHARTQA
from llava.eval.scorers.review import PAIRS, SHARES
from llava.eval.scorers.vqa_accuracy import TEN_ANSWERS, VQAV2
from llava.eval.scorers.yes_no import MME, POPE

SCORERS: dict[str, Scorer] = {
    "exact": DIGITS,
    "vqav2": VQAV2,
    "gqa": GQA,
    "ten_answers": TEN_ANSWERS,
    "pope": POPE,
    "mme": MME,
    "scienceqa": SCIENCEQA,
    "seed": SEED,
    "mmbench": MMBENCH,
    "mmstar": MMSTAR,
    "ai2d": AI2D,
    "aokvqa": AOKVQA,
    "aokvqa_direct": AOKVQA_DIRECT,
    "anls": ANLS,
    "chartqa": CHARTQA,
    "ocrvqa": OCRVQA,
    "captions": CAPTIONS,
    "mmmu": MMMU,
    "pairs": PAIRS,
    "shares": SHARES,
}

__all__ = ["SCORERS", "Scorer", "Scores", "join_answers", "score"]


def score(
    name: str,
    questions: Sequence[Question],
    labels: Mapping[str, Any],
    given: Mapping[str, str],
    dialect: str | None = None,
    allow_missing: bool = False,
) -> Scores:
    """Scores of answers (uid -> text) to questions, by the scorer of that name.

    dialect: None for the scorer's first. Missing answers count as wrong if they are allowed.
    Raises ValueError for an unknown scorer or dialect, a question without a label, or a missing
    answer.
    """
    if name not in SCORERS:
        raise ValueError(f"unknown scorer {name!r}; accepted: {', '.join(SCORERS)}")
    return score_items(name, SCORERS[name], questions, labels, given, dialect, allow_missing)
