"""Multiple choice: ScienceQA, SEED-Bench, MMBench, MMStar, AI2D, A-OKVQA.

Special here: what counts as having chosen. Each official script reads answers its own way, from
"the letter and nothing else" (SEED-Bench) to a list of formats with priorities (MMStar under
lmms-eval), and a model that writes "B. cat" gains or loses tens of points by it; so each reading is
a function of its own and a dialect picks one. Nothing is guessed: where other scripts draw a letter
at random, an unreadable answer is wrong here.

Rules: LLaVA's eval_science_qa.py, convert_seed_for_submission.py; lmms-eval 0.7 tasks/{scienceqa,
seedbench, mmbench, mmstar, ai2d}; allenai/aokvqa eval_predictions.py. lmms-eval's readings were
matched by what its functions return, not by their text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llava.eval.questions import Question
from llava.eval.scorers.base import (
    Item,
    Metric,
    Scorer,
    accuracy_metrics,
    by_item,
    grouped_means,
    groups,
    mean_metric,
    ratio,
)
from llava.eval.scorers.exact import without_punctuation

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ----------------------------------------------------------------------------- ScienceQA
def read_scienceqa(text: str, options: Sequence[str] = tuple("ABCDE")) -> str | None:
    """A letter alone, a text that starts "B. ", or one "The answer is B" with a mark behind it."""
    if text in options:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def _scienceqa(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer": index of the right choice, "choices": how many there are}."""
    right = LETTERS[label["answer"]]
    picture = {"label": right, "picture": bool(question.images)}
    if dialect == "lmms":
        said = text.strip()
        alone = said.lower() == right.lower()
        dotted = len(said) > 1 and said[0].isupper() and said[1] == "." and said[0] == right
        return {**picture, "parsed": said, "score": float(alone or dotted)}
    said = read_scienceqa(text)
    offered = said is not None and said in "ABCDE"[: label["choices"]]
    return {**picture, "parsed": said, "score": float(offered and said == right)}


def _scienceqa_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    return {
        # The column "SQA" of the papers.
        "img_accuracy": mean_metric(items, where=lambda item: item["picture"]),
        "accuracy": mean_metric(items),
        # LLaVA's script drops pictures without an answer from the denominator.
        "img_accuracy_answered": mean_metric(
            items, where=lambda item: item["picture"] and item["prediction"] is not None
        ),
    }


# ----------------------------------------------------------------------------- SEED-Bench
def _seed(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer": letter, "type": kind of question, "data_type": image or video}."""
    said = text.strip()[:1].upper() if dialect == "lmms" else text
    return {
        "category": label["type"],
        "data_type": label["data_type"],
        "parsed": said,
        "label": label["answer"],
        "score": float(said == label["answer"]),
    }


def _seed_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    return {
        "accuracy": mean_metric(items),
        **grouped_means(items, "data", "data_type"),
        **grouped_means(items, "type", "category"),
    }


# ----------------------------------------------------------------------------- MMBench
_AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
"""What may stand around a letter in one word, in the order it is tried."""


def infer_letter(text: str, letters: Sequence[str] = tuple("ABCDE")) -> str | None:
    """The one letter that stands alone among the words, else the one with marks around it.

    A lone "A" among more than three words is taken for the article.
    """
    words = text.split()
    alone = [letter for letter in letters if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for before, behind in _AROUND:
        found = [letter for letter in letters if before + letter + behind in words]
        if len(found) == 1:
            return found[0]
    return None


def infer_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option whose text the answer contains."""
    text = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else None


def _mmbench(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer", "options": {letter: text}, "base", "category", "l2"}."""
    if dialect == "lmms":
        options = label["options"]
        parsed = infer_letter(text) or infer_option(text, options) or extract_letter(text)
    else:
        parsed = text.strip()
    return {
        "category": label["category"],
        "l2": label["l2"],
        "base": label["base"],
        "original": label["base"] == question.question_id,
        "parsed": parsed,
        "label": label["answer"],
        "score": float(parsed == label["answer"]),
    }


def circular(items: Sequence[Item]) -> dict[Any, bool]:
    """base question -> all of its copies, with the options turned round, are right."""
    found: dict[Any, bool] = {}
    for item in items:
        found[item["base"]] = found.get(item["base"], True) and item["score"] == 1
    return found


def _mmbench_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    hits, seen = circular(items), set()
    columns = np.zeros((len(items), 2))
    for row, item in enumerate(items):  # a base question counts where its first copy stands
        if item["base"] not in seen:
            seen.add(item["base"])
            columns[row] = hits[item["base"]], 1

    def over(inside: Callable[[Item], bool]) -> Metric:
        own = columns * np.array([[inside(item)] for item in items], dtype=float)
        return Metric(own, lambda s: 100 * ratio(s[..., 0], s[..., 1]), int(own[:, 1].sum()))

    found = {
        "circular": over(lambda item: True),
        "vanilla": mean_metric(items, where=lambda item: item["original"]),
    }
    for key in ("category", "l2"):
        for name in groups(items, key):
            found[f"{key}/{name}"] = over(lambda item, k=key, n=name: item[k] == n)
    return found


# ----------------------------------------------------------------------------- MMStar
_PHRASES = (
    "answer is", "best option is", "correct option is", "choice is",
    "i choose", "i pick", "i select",
)  # fmt: skip
_FORMATS = ("({})", "{}.", "{}:", "{})", "{} ", "{}")


def extract_letter(text: str, letters: Sequence[str] = tuple("ABCD")) -> str:
    """lmms-eval's extraction: the letter found in the best format, of equals the one that stands
    last; "" if there is none. Formats, best first: at the start, at the end, behind a phrase such
    as "answer is", then (A) A. A: A) "A " and A anywhere."""
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    found = [(rank, place, letter) for letter in letters for rank, place in _places(text, letter)]
    return max(found)[2] if found else ""


def _places(text: str, letter: str) -> list[tuple[int, int]]:
    """(rank of the format, position) wherever a letter is found."""
    inner, lower, found = text.strip(), text.lower(), []
    if inner.startswith(letter) and not inner[1:2].isalpha():
        found.append((9, 0))
    if inner.endswith(letter) and not inner[-2:-1].isalpha():
        found.append((8, len(text)))
    for phrase in _PHRASES:
        start = lower.find(phrase)
        place = text.find(letter, start + len(phrase))
        if start >= 0 and place >= 0:
            found.append((7, place))
    for rank, form in zip(range(6, 0, -1), _FORMATS, strict=True):
        place = text.rfind(form.format(letter))
        if place >= 0:
            found.append((rank, place))
    return found


def _mmstar(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer": letter, "l2_category"}."""
    parsed = extract_letter(text)
    return {
        "l2": label["l2_category"],
        "parsed": parsed,
        "label": label["answer"],
        "score": float(parsed == label["answer"]),
    }


def mean_of_means(items: Sequence[Item], key: str, where: Callable[[Item], bool]) -> Metric:
    """Mean over the values of `key` of their accuracies, in per cent."""
    names = groups([item for item in items if where(item)], key)
    parts = [
        mean_metric(items, where=lambda item, n=name: where(item) and item[key] == n)
        for name in names
    ]

    def value(sums: np.ndarray) -> np.ndarray:
        pairs = sums.reshape(*sums.shape[:-1], len(names), 2)
        means = 100 * ratio(pairs[..., 0], pairs[..., 1])
        # A draw may miss one of many small groups: then the mean is over the others.
        kept = ~np.isnan(means)
        return ratio(np.where(kept, means, 0).sum(-1), kept.sum(-1))

    columns = np.concatenate([part.columns for part in parts], axis=1)
    return Metric(columns, value, sum(part.n for part in parts))


def _mmstar_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    average = mean_of_means(items, "l2", lambda item: True)
    micro = mean_metric(items)
    if dialect == "vlmevalkit":
        found = {"accuracy": micro, "average_of_l2": average}
    else:
        found = {"average_of_l2": average, "accuracy": micro}
    for name in groups(items, "category"):
        found[f"category/{name}"] = mean_of_means(
            items, "l2", lambda item, n=name: item["category"] == n
        )
    return found


# ----------------------------------------------------------------------------- AI2D
def read_ai2d(text: str) -> str:
    """The capital letter before a period at the start, else the whole text."""
    found = re.match(r"\s*([A-Z])\.", text)
    return found.group(1) if found else text


def _ai2d(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"answer": index of the right option as a text}."""
    right = LETTERS[int(label["answer"])]
    parsed = read_ai2d(text)
    same = without_punctuation(parsed) == right.lower()
    return {"parsed": parsed, "label": right, "score": float(same)}


# ----------------------------------------------------------------------------- A-OKVQA
def choose(text: str, choices: Sequence[str]) -> str:
    """The choice an answer names: by its letter ("B", "B.", "(B)"), else the text itself."""
    found = re.fullmatch(r"\s*\(?([A-Z])[.):]?\s*", text)
    place = LETTERS.index(found.group(1)) if found else -1
    return choices[place] if 0 <= place < len(choices) else text.strip()


def _aokvqa(question: Question, label: dict[str, Any], text: str, dialect: str) -> Item:
    """label: {"choices", "correct_choice_idx"}. `fastv`: one token was asked for and the right
    letter only has to be in it, so that "A" is in any answer with a capital A."""
    right = label["choices"][label["correct_choice_idx"]]
    if dialect == "fastv":
        score = float(LETTERS[label["correct_choice_idx"]] in text)
        return {"parsed": text, "label": right, "score": score}
    parsed = choose(text, label["choices"])
    return {"parsed": parsed, "label": right, "score": float(parsed == right)}


def _aokvqa_direct(
    question: Question, label: dict[str, Any], text: str, dialect: str
) -> Item | None:
    """label: {"direct_answers": ten texts, "difficult_direct_answer"}; difficult ones are left out
    and texts are compared as they are."""
    if label["difficult_direct_answer"]:
        return None
    answers = label["direct_answers"]
    score = min(1.0, answers.count(text) / 3)
    return {"parsed": text, "label": max(answers, key=answers.count), "score": score}


SCIENCEQA = Scorer(by_item(_scienceqa), _scienceqa_metrics, dialects=("llava", "lmms"))
SEED = Scorer(by_item(_seed), _seed_metrics, dialects=("llava", "lmms"))
MMBENCH = Scorer(by_item(_mmbench), _mmbench_metrics, dialects=("llava", "lmms"))
MMSTAR = Scorer(by_item(_mmstar), _mmstar_metrics, dialects=("lmms", "vlmevalkit"))
AI2D = Scorer(by_item(_ai2d), accuracy_metrics, dialects=("lmms",))
AOKVQA = Scorer(by_item(_aokvqa), accuracy_metrics, dialects=("llava", "fastv"))
AOKVQA_DIRECT = Scorer(by_item(_aokvqa_direct), accuracy_metrics)
