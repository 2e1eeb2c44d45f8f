"""VQA accuracy over ten human answers: VQAv2, TextVQA, VizWiz.

Special here: the two answer processors in use are one chain with and without its first steps. The
EvalAI server's (TextVQA, VizWiz, and what LLaVA uploads for VQAv2) also drops commas and question
marks and splits off "'s"; the official VQA code does neither, and looks at punctuation only where
the ten humans disagree. Their quirks are kept, since published numbers have them: a mark is deleted
or becomes a space for the whole text at once, and at most 32 periods go.

Rules: GT-Vision-Lab/VQA (vqaEval.py), EvalAI answer processor (m4c_evaluator.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
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

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PERIODS = 32
"""Only so many periods are deleted: the original passes re.UNICODE (32) where a count is meant."""
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


@lru_cache(maxsize=1)
def contractions() -> dict[str, str]:
    """Spelling without apostrophe -> with, as the VQA code has it."""
    text = resources.files("llava.eval.scorers").joinpath("contractions.json").read_text("utf-8")
    return json.loads(text)


def flatten(text: str) -> str:
    """Newlines and tabs to spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """A mark that touches a space somewhere, or any mark of a text with a `1,000`, is deleted
    everywhere in the text; other marks become spaces. Then the periods not before a digit go."""
    has_number = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in MARKS:
        glued = mark + " " not in text and " " + mark not in text and not has_number
        out = out.replace(mark, " " if glued else "")
    return _PERIOD.sub("", out, count=PERIODS)


def digits_and_articles(text: str) -> str:
    """Lower case, number words to digits, no articles, contractions with their apostrophe."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    table = contractions()
    return " ".join(table.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def official_answer(text: str) -> str:
    """What the official VQA code compares where the ten humans do not all say the same."""
    return digits_and_articles(strip_punctuation(flatten(text)))


@lru_cache(maxsize=1 << 16)
def evalai_answer(text: str) -> str:
    """The EvalAI answer processor."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official_answer(text)


def consensus(answer: str, humans: Sequence[str]) -> float:
    """min(1, equal / 3) over each nine of the humans, averaged over who is left out; in 0..1."""
    equal = Counter(humans)[answer]
    if not equal or not humans:
        return 0.0
    with_me, without = min(1.0, (equal - 1) / 3), min(1.0, equal / 3)
    return (equal * with_me + (len(humans) - equal) * without) / len(humans)


# ----------------------------------------------------------------------------- the sets
def _vqav2(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answers": ten texts, "question_type", "answer_type"}."""
    if dialect == "llava":  # what the server does to LLaVA's upload, which is processed already
        text = evalai_answer(text)
    humans = [flatten(answer) for answer in label["answers"]]
    said = flatten(text)
    if dialect == "lmms" or len(set(humans)) > 1:
        said, humans = official_answer(said), [official_answer(human) for human in humans]
    return {
        "category": label["answer_type"],
        "question_type": label["question_type"],
        "parsed": said,
        "label": Counter(label["answers"]).most_common(1)[0][0],
        "score": consensus(said, humans),
    }


def _vqav2_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    return {
        "accuracy": mean_metric(items),
        **grouped_means(items, "answer_type"),
        **grouped_means(items, "question_type", "question_type"),
    }


def _ten_answers(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answers": ten texts} and keys of its own that the item keeps."""
    answers = label["answers"]
    said = evalai_answer(text)
    return {
        **{key: value for key, value in label.items() if key != "answers"},
        "parsed": said,
        "label": Counter(answers).most_common(1)[0][0],
        "score": consensus(said, [evalai_answer(answer) for answer in answers]),
    }


VQAV2 = Scorer(by_item(_vqav2), _vqav2_metrics, dialects=("llava", "official", "lmms"))
TEN_ANSWERS = Scorer(by_item(_ten_answers), accuracy_metrics, dialects=("llava", "lmms"))
