"""ANLS (average normalised Levenshtein similarity): DocVQA and InfographicVQA.

Special here: three programs in use agree on the formula and differ in what they trim, by tenths of
a point. `vlmevalkit` (the default) squeezes white space before it measures anything; `lmms`
measures distances on squeezed texts and divides by the lengths of the raw ones (its harness has
stripped the answer before); `llava` is the ST-VQA evaluator of m4c_evaluator.py, which strips the
ends only.
"""

from __future__ import annotations

from typing import Any

from llava.eval.questions import Question
from llava.eval.scorers.base import Item, Scorer, accuracy_metrics, by_item

THRESHOLD = 0.5


def levenshtein(first: str, second: str) -> int:
    """Insertions, deletions and replacements that turn one text into the other."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            cost = min(row[j] + 1, row[j - 1] + 1, above + (letter != other))
            above, row[j] = row[j], cost
    return row[-1]


def similarity(said: str, right: str, dialect: str = "vlmevalkit") -> float:
    """1 - distance / length of the longer text, in 0..1."""
    if dialect == "llava":
        one, other = said.strip().lower(), right.strip().lower()
        length = max(len(one), len(other))
    else:
        one, other = (" ".join(text.lower().split()) for text in (said, right))
        raw = (said.strip(), right) if dialect == "lmms" else (one, other)
        length = max(map(len, raw))
    return 1.0 - levenshtein(one, other) / length if length else 1.0


def anls(said: str, answers: list[str], dialect: str = "vlmevalkit") -> float:
    """The best similarity to one of the answers, 0 below a half."""
    best = max(similarity(said, answer, dialect) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def _anls(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answers": texts}."""
    answers = label["answers"]
    return {"parsed": text.strip(), "label": answers[0], "score": anls(text, answers, dialect)}


ANLS = Scorer(by_item(_anls), accuracy_metrics, dialects=("vlmevalkit", "lmms", "llava"))
