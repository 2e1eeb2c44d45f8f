"""MMMU: multiple choice and open answers of several kinds.

Special here: an open answer is searched for what it concludes ("so ...", "is ...", "= ..."), and
each text and number found there may match; numbers are compared rounded to two places. Where the
original draws a letter at random because it found none, the answer is wrong here, so that a score
does not depend on luck.

Rule: lmms-eval 0.7.3 `mmmu_val` (MMMU's own eval_utils), matched by what its functions return.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.questions import Question
from llava.eval.scorers.base import Item, Metric, Scorer, by_item, grouped_means, mean_metric

_MARKS = (",", ".", "!", "?", ";", ":", "'")
_CONCLUSIONS = (
    "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ",
)  # fmt: skip
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
Value = str | float


# ----------------------------------------------------------------------------- multiple choice
def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter an answer gives: (A), else A before a space, else A. ; of several the last one
    that stands alone, else the first letter; without any, in an answer of more than five words,
    the option whose text stands last."""
    for mark in _MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for form, alone in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter, a=alone: text.rfind(a.format(letter)))
    if len(text.split()) > 5:
        lower = text.lower()
        named = [letter for letter, option in options.items() if option.lower() in lower]
        if named:
            return max(named, key=lambda letter: lower.rfind(options[letter].lower()))
    return None


# ----------------------------------------------------------------------------- open answers
def conclusions(text: str) -> list[str]:
    """The shortest piece behind a word of conclusion, of each sentence that has one; else all."""
    text = text.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", text)
    found = []
    for place, part in enumerate(parts):
        words = (*_CONCLUSIONS, "=") if place == len(parts) - 1 else _CONCLUSIONS
        shortest = ""
        for word in words:
            if word in part:
                piece = part.split(word)[-1].strip()
                # A piece that is empty is kept only if no word follows it in the list.
                shortest = piece if not shortest or len(piece) < len(shortest) else shortest
        if shortest and shortest not in _MARKS:
            found.append(shortest)
    return found or [text]


def numbers_in(text: str) -> list[str]:
    """Numbers with commas, with exponents, and plain ones."""
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def normalise(text: str) -> list[Value]:
    """A number rounded to two places; a text in lower case; a single character is looked for with
    a space on one side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def read_open(text: str) -> list[Value]:
    """All values an open answer may be taken for."""
    pieces = conclusions(text)
    pieces += [number for piece in list(pieces) for number in numbers_in(piece)]
    return list(dict.fromkeys(value for piece in pieces for value in normalise(piece)))


def open_match(said: Sequence[Value], answers: Sequence[str]) -> bool:
    """Does one value equal a number that is right, or contain a text that is?"""
    right = [value for answer in answers for value in normalise(answer)]
    texts = [value for value in right if isinstance(value, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in right
        for value in said
    )


def _mmmu(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer": letter, or text or list of texts, "options": texts, "subject"}."""
    subject = {"category": label["subject"]}
    if label["options"]:
        options = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", label["options"], strict=False))
        choice = read_choice(text, options)
        right = label["answer"]
        return {**subject, "parsed": choice, "label": right, "score": float(choice == right)}
    said = read_open(text)
    answers = label["answer"] if isinstance(label["answer"], list) else [label["answer"]]
    score = float(open_match(said, answers))
    return {**subject, "parsed": said, "label": answers[0], "score": score}


def _metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    return {"accuracy": mean_metric(items), **grouped_means(items, "accuracy")}


def answers_of(text: str) -> str | list[str]:
    """The hub's `answer` column: a letter, a text, or a list written as Python writes it."""
    if text.startswith("["):
        value = ast.literal_eval(text)
        return [str(entry) for entry in value]
    return text


MMMU = Scorer(by_item(_mmmu), _metrics, dialects=("lmms",))
