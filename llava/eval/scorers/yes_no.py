"""Yes/no sets: POPE (F1 over hallucinated objects) and MME (pairs of questions a picture).

Special here: how an answer is read decides points. LLaVA's POPE script calls every answer "yes" in
which no word is "no" or "not", MME's looks for "yes" or "no" in the first four characters only;
lmms-eval wants the plain word for POPE and is laxer for MME. Both readings are here (dialects).

Rules: LLaVA's eval_pope.py, MME's calculation.py, lmms-eval 0.7 tasks/{pope,mme}/utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava.eval.questions import Question
from llava.eval.scorers.base import Item, Metric, Scorer, by_item, groups, mean_metric, ratio

PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip


# ----------------------------------------------------------------------------- POPE
def read_pope(text: str) -> str:
    """LLaVA's reading: up to the first period, without commas; "no" for a word No, no or not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_plain(text: str) -> str | None:
    """lmms-eval's reading of POPE: the word alone, else None."""
    word = text.strip().lower()
    return word if word in ("yes", "no") else None


def _pope(question: Question, label: str, text: str, dialect: str) -> Item:
    """label: "yes" or "no"."""
    parsed = read_pope(text) if dialect == "llava" else read_plain(text)
    label = label.strip().lower()
    return {"parsed": parsed, "label": label, "score": float(parsed == label)}


def confusion(items: Sequence[Item], dialect: str = "llava") -> np.ndarray:
    """[items, 4]: TP, FP, TN, FN with "yes" as the positive answer.

    An answer that is neither counts as wrong, FN or FP; in lmms-eval's reading it counts nowhere.
    """
    cells = np.zeros((len(items), 4))
    for row, item in enumerate(items):
        right, positive = item["score"] == 1, item["label"] == "yes"
        if item["parsed"] is None and dialect != "llava":
            continue
        column = (0 if positive else 2) if right else (3 if positive else 1)
        cells[row, column] = 1
    return cells


def f1_score(cells: np.ndarray) -> np.ndarray:
    """F1 of [..., 4] counts TP, FP, TN, FN; 0 where there is no true positive."""
    true, false, missed = cells[..., 0], cells[..., 1], cells[..., 3]
    return np.nan_to_num(ratio(2 * true, 2 * true + false + missed))


def _pope_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    cells = confusion(items, dialect)
    names = groups(items, "category")
    said_yes = np.array([item["parsed"] == "yes" for item in items], dtype=float)
    found: dict[str, Metric] = {}
    stacked = []
    for name in names:
        inside = np.array([item["category"] == name for item in items], dtype=float)[:, None]
        own = cells * inside
        stacked.append(own)
        count = int(inside.sum())
        found[f"f1/{name}"] = Metric(own, lambda sums: 100 * f1_score(sums), count)
        found[f"accuracy/{name}"] = mean_metric(items, where=lambda i, n=name: i["category"] == n)
        found[f"precision/{name}"] = Metric(
            own, lambda s: 100 * ratio(s[..., 0], s[..., 0] + s[..., 1]), count
        )
        found[f"recall/{name}"] = Metric(
            own, lambda s: 100 * ratio(s[..., 0], s[..., 0] + s[..., 3]), count
        )
        found[f"yes_ratio/{name}"] = Metric(
            np.concatenate([said_yes[:, None] * inside, inside], axis=1),
            lambda s: 100 * ratio(s[..., 0], s[..., 1]),
            count,
        )
    columns = np.concatenate(stacked, axis=1)
    mean_f1 = Metric(columns, lambda sums: 100 * _mean_f1(sums, len(names)), len(items))
    overall = Metric(cells, lambda sums: 100 * f1_score(sums), len(items))
    return {
        "mean_f1": mean_f1,
        "mean_accuracy": _mean_of_categories(items, names),
        "accuracy": mean_metric(items),
        "f1": overall,
        **found,
    }


def _mean_f1(sums: np.ndarray, categories: int) -> np.ndarray:
    cells = sums.reshape(*sums.shape[:-1], categories, 4)
    scores = np.where(cells.sum(-1) > 0, f1_score(cells), np.nan)
    return scores.mean(-1)


def _mean_of_categories(items: Sequence[Item], names: Sequence[str]) -> Metric:
    parts = [mean_metric(items, where=lambda i, n=name: i["category"] == n) for name in names]

    def value(sums: np.ndarray) -> np.ndarray:
        pairs = sums.reshape(*sums.shape[:-1], len(names), 2)
        return 100 * ratio(pairs[..., 0], pairs[..., 1]).mean(-1)

    return Metric(np.concatenate([part.columns for part in parts], axis=1), value, len(items))


def pope_table(items: Sequence[Item], dialect: str = "llava") -> dict[str, dict[str, Any]]:
    """Counts and shares a category, in 0..1 as the scripts print them; "all" for all items."""
    table = {}
    for name in [*groups(items, "category"), None]:
        own = [item for item in items if name in (None, item["category"])]
        true, false, rejected, missed = (int(n) for n in confusion(own, dialect).sum(axis=0))
        table["all" if name is None else name] = {
            "TP": true, "FP": false, "TN": rejected, "FN": missed,
            "accuracy": sum(item["score"] for item in own) / len(own),
            "precision": _share(true, true + false),
            "recall": _share(true, true + missed),
            "f1": _f1(true, false, missed),
            "yes_ratio": sum(item["parsed"] == "yes" for item in own) / len(own),
        }  # fmt: skip
    return table


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _f1(true: int, false: int, missed: int) -> float:
    return 2 * true / (2 * true + false + missed) if true else 0.0


# ----------------------------------------------------------------------------- MME
def read_mme(text: str) -> str:
    """ "yes", "no" or "other": the word itself, else yes then no within the first four letters."""
    text = text.lower()
    start = text if text in ("yes", "no") else text[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def read_mme_lmms(text: str) -> str:
    """lmms-eval's reading: ends and periods stripped, y and n accepted."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or read_mme(text)


def _mme(question: Question, label: str, text: str, dialect: str) -> Item:
    """label: "yes" or "no"."""
    parsed = read_mme(text) if dialect == "llava" else read_mme_lmms(text)
    label = label.strip().lower()
    return {"parsed": parsed, "label": label, "score": float(parsed == label)}


def _pairs(items: Sequence[Item]) -> np.ndarray:
    """[items, 4]: right, asked, both right, pictures; a picture's last two stand at its first
    item, which is as good as any because pictures are resampled whole."""
    columns = np.zeros((len(items), 4))
    pictures: dict[tuple[str, str], list[int]] = {}
    for row, item in enumerate(items):
        columns[row, :2] = item["score"], 1
        pictures.setdefault((item["category"], item["image"]), []).append(row)
    for rows in pictures.values():
        both = all(items[row]["score"] == 1 for row in rows)
        columns[rows[0], 2:] = float(both), 1
    return columns


def _points(sums: np.ndarray) -> np.ndarray:
    """Accuracy plus accuracy of whole pictures, 0 to 200, of [..., 4] sums; a category that a draw
    misses has no value."""
    return 100 * ratio(sums[..., 0], sums[..., 1]) + 100 * ratio(sums[..., 2], sums[..., 3])


def _mme_metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    columns = _pairs(items)
    names = groups(items, "category")
    own = {
        name: columns * np.array([[item["category"] == name] for item in items]) for name in names
    }

    def total(wanted: Sequence[str]) -> Metric:
        parts = [own[name] for name in wanted]
        return Metric(
            np.concatenate(parts, axis=1),
            lambda s: _points(s.reshape(*s.shape[:-1], len(wanted), 4)).sum(-1),
            sum(item["category"] in wanted for item in items),
        )

    found = {}
    for title, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        present = [name for name in members if name in names]
        if present:
            found[title] = total(present)
    if not found:
        found["points"] = total(names)
    return found | {f"points/{name}": total([name]) for name in names}


def mme_table(items: Sequence[Item], dialect: str = "llava") -> dict[str, dict[str, Any]]:
    """Counts a category as MME's script works them out; "other" answers are in no cell."""
    table = {}
    for name in groups(items, "category"):
        own = [item for item in items if item["category"] == name]
        heard = [item for item in own if item["parsed"] in ("yes", "no")]
        true, false, rejected, missed = (int(n) for n in confusion(heard).sum(axis=0))
        right, asked, both, pictures = (int(n) for n in _pairs(own).sum(axis=0))
        table[name] = {
            "TP": true, "FN": missed, "TN": rejected, "FP": false,
            "precision": _share(true, true + false),
            "recall": _share(true, true + missed),
            "other_num": len(own) - len(heard),
            "acc": right / asked,
            "acc_plus": both / pictures,
        }  # fmt: skip
    return table


POPE = Scorer(
    by_item(_pope), _pope_metrics, lambda i, d: {"table": pope_table(i, d)}, ("llava", "lmms")
)
MME = Scorer(
    by_item(_mme), _mme_metrics, lambda i, d: {"table": mme_table(i, d)}, ("llava", "lmms")
)
