"""Exact match: GQA, OCR-VQA, and the digits sets.

Special here: what is trimmed before two texts are compared differs by set and moves scores by tens
of points, so each set has its own rule. GQA's script drops periods at the end but no space; the
digits' rule also squeezes white space, so that a number read digit by digit is one answer.

Rules: LLaVA's convert_gqa_for_eval.py with GQA's eval.py; VLMEvalKit vqa_eval.py (accuracy);
lmms-eval 0.7 exact_match (case and punctuation ignored).
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llava.eval.questions import Question
from llava.eval.scorers.base import (
    Item,
    Metric,
    Scorer,
    accuracy_metrics,
    by_item,
    grouped_means,
    mean_metric,
)
from llava.eval.scorers.captions import rouge_f1

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, white space squeezed, no period at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def gqa_prediction(text: str) -> str:
    """What LLaVA hands to GQA's script: no periods at the end, lower case, spaces untouched."""
    return text.rstrip(".").lower()


def without_punctuation(text: str) -> str:
    """lmms-eval's exact match: stripped by the harness, lower case, no punctuation at all."""
    return text.strip().lower().translate(_NO_PUNCTUATION)


# ----------------------------------------------------------------------------- digits
def _digits(question: Question, label: str, text: str, dialect: str) -> Item:
    said = normalise(text)
    return {"parsed": said, "label": label, "score": float(said == normalise(label))}


# ----------------------------------------------------------------------------- GQA
def gqa_steps(semantic: Sequence[dict[str, str]]) -> int:
    """Reasoning steps of a question: operations, those left out that only look the answer up."""
    skipped = ("exist", "query: name", "choose name")
    said = (f"{step['operation']}: {step['argument']}" for step in semantic)
    return sum(not any(mark in step for mark in skipped) for step in said)


def _gqa(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item | None:
    """label: the question's entry in GQA's file; unbalanced questions do not count."""
    if not label["isBalanced"]:
        return None
    if dialect == "lmms":
        said, right = without_punctuation(text), without_punctuation(label["answer"])
    elif dialect == "vlmevalkit":
        said, right = text.strip().lower(), label["answer"].strip().lower()
    else:
        said, right = gqa_prediction(text), label["answer"]
    return {
        "parsed": said,
        "label": label["answer"],
        "kind": "open" if label["types"]["structural"] == "query" else "binary",
        "structural": label["types"]["structural"],
        "semantic": label["types"]["semantic"],
        "steps": gqa_steps(label["semantic"]),
        "length": len(label["question"].split()),
        "group": label["groups"]["global"],
        "score": float(said == right),
    }


def gqa_distribution(items: Sequence[Item]) -> float | None:
    """Chi-square of what was said against what is right within each global group, averaged by the
    groups' sizes, / 100; lower is better."""
    gold: dict[str, Counter[str]] = {}
    said: dict[str, Counter[str]] = {}
    for item in items:
        if item["group"] is not None:
            gold.setdefault(item["group"], Counter())[item["label"]] += 1
            said.setdefault(item["group"], Counter())[item["parsed"]] += 1
    total = sum(answers.total() for answers in gold.values())
    if not total:
        return None
    weighted = sum(
        answers.total() * sum((said[name][a] - n) ** 2 / n for a, n in answers.items())
        for name, answers in gold.items()
    )
    return weighted / total / 100


def _gqa_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    found = {"accuracy": mean_metric(items)}
    for key in ("kind", "structural", "semantic", "steps", "length"):
        found |= grouped_means(items, key, key)
    return found


# ----------------------------------------------------------------------------- OCR-VQA
def _ocrvqa(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer": text}. `fastv`: ROUGE-L, a different metric."""
    said, right = text.strip().lower(), label["answer"]
    if dialect == "fastv":
        return {"parsed": text, "label": right, "score": rouge_f1(text, right)}
    return {"parsed": said, "label": right, "score": float(said == right.strip().lower())}


DIGITS = Scorer(by_item(_digits), accuracy_metrics)
GQA = Scorer(
    by_item(_gqa),
    _gqa_metrics,
    lambda items, dialect: {"distribution": gqa_distribution(items)},
    ("llava", "lmms", "vlmevalkit"),
)
OCRVQA = Scorer(by_item(_ocrvqa), accuracy_metrics, dialects=("vlmevalkit", "fastv"))
