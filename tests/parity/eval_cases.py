"""Recorded scorers: inputs in the official formats, answers, and what the official code made of
them (`expected.json`).

A folder is recognised by its files. A case works out every key of its `expected.json` with this
package, numbers to 1e-12 and all else exactly; a recorded key that nothing here answers fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava.eval import layouts
from llava.eval.questions import Question, read_json_lines
from llava.eval.scorers import Scores, exact, join_answers, score, vqa_accuracy, yes_no

TOLERANCE = 1e-12
Line = tuple[bool, str]


class Comparison:
    """Walks recorded values beside ours."""

    def __init__(self) -> None:
        self.count, self.worst, self.failures = 0, 0.0, []

    def fail(self, where: str, got: Any, expected: Any) -> None:
        self.failures.append(f"{where}: {got!r}, recorded {expected!r}"[:300])

    def compare(self, where: str, got: Any, expected: Any) -> None:
        if isinstance(expected, dict) and isinstance(got, dict):
            for key in expected:
                if key not in got:
                    self.failures.append(f"{where}/{key}: recorded, but nothing here answers it")
                else:
                    self.compare(f"{where}/{key}", got[key], expected[key])
        elif isinstance(expected, list | tuple) and isinstance(got, list | tuple):
            if len(got) != len(expected):
                self.fail(f"{where}: length", len(got), len(expected))
            for place, (ours, theirs) in enumerate(zip(got, expected, strict=False)):
                self.compare(f"{where}/{place}", ours, theirs)
        else:
            self.leaf(where, got, expected)

    def leaf(self, where: str, got: Any, expected: Any) -> None:
        self.count += 1
        if _is_number(expected) and _is_number(got):
            self.worst = max(self.worst, abs(got - expected))
            if not math.isclose(got, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                self.fail(where, got, expected)
        elif type(got) is not type(expected) or got != expected:
            self.fail(where, got, expected)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ----------------------------------------------------------------------------- shared steps
def records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_json_lines(path)]


def scored(
    folder: Path, question_file: str, reader: Callable, labels: list[str], scorer: str, dialect: str
) -> Scores:
    questions = layouts.read_question_file(folder / question_file)
    table = reader([folder / name for name in labels], questions)
    return score(scorer, questions, table, given(folder, questions), dialect)


def given(folder: Path, questions: list[Question]) -> dict[str, str]:
    return join_answers(questions, records(folder / "answers.jsonl"))


def per_id(scores: Scores, key: str = "score") -> dict[str, Any]:
    return {str(item["question_id"]): item[key] for item in scores.per_item}


def by_name(scores: Scores, prefix: str) -> dict[str, float]:
    """name -> value of the metrics `prefix/name`."""
    return {
        name.removeprefix(f"{prefix}/"): entry["value"]
        for name, entry in scores.metrics.items()
        if name.startswith(f"{prefix}/")
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """As the official VQA code was asked to print them: twelve places."""
    return {name: round(value, 12) for name, value in values.items()}


# ----------------------------------------------------------------------------- the sets
def vqav2(folder: Path) -> dict[str, Any]:
    def run(dialect: str) -> tuple[Scores, dict[str, Any]]:
        scores = scored(
            folder, "llava_vqav2_questions.jsonl", layouts.vqa_annotations,
            ["v2_mscoco_val2014_annotations.json"], "vqav2", dialect,
        )  # fmt: skip
        return scores, {
            "overall": scores.value,
            "perQuestionType": rounded(by_name(scores, "question_type")),
            "perAnswerType": rounded(by_name(scores, "answer_type")),
            "per_item": per_id(scores),
        }

    (upload, upload_table), (raw, raw_table), (lmms, _) = map(run, ("llava", "official", "lmms"))
    return {
        "accuracy_upload_then_official": upload.value,
        "accuracy_raw_text_official": raw.value,
        "accuracy_lmms_eval": lmms.value,
        "upload_then_official": upload_table,
        "raw_text_official": raw_table,
        "lmms_eval_per_item": per_id(lmms),
    }


def gqa(folder: Path) -> dict[str, Any]:
    def run(dialect: str) -> Scores:
        files = ["testdev_balanced_questions.json"]
        name = "llava_gqa_testdev_balanced.jsonl"
        return scored(folder, name, layouts.gqa, files, "gqa", dialect)

    def table(prefix: str) -> dict[str, list]:
        start = f"{prefix}/"
        return {
            name.removeprefix(start): [entry["value"], entry["n"]]
            for name, entry in scores.metrics.items()
            if name.startswith(start)
        }

    scores, lmms = run("llava"), run("lmms")
    kinds = by_name(scores, "kind")
    return {
        "accuracy": scores.value,
        "binary": kinds["binary"],
        "open": kinds["open"],
        "distribution": scores.details["distribution"],
        "accuracy_lmms_eval": lmms.value,
        "accuracyPerStructuralType": table("structural"),
        "accuracyPerSemanticType": table("semantic"),
        "accuracyPerSteps": table("steps"),
        "accuracyPerLength": table("length"),
        "per_item": per_id(scores),
        "lmms_eval_per_item": per_id(lmms),
        "converted_predictions": [
            {
                "questionId": record["question_id"],
                "prediction": exact.gqa_prediction(record["text"]),
            }
            for record in records(folder / "answers.jsonl")
        ],
    }


def textvqa(folder: Path) -> dict[str, Any]:
    name, files = "llava_textvqa_val_v051_ocr.jsonl", ["TextVQA_0.5.1_val.json"]
    scores = scored(folder, name, layouts.textvqa, files, "ten_answers", "llava")
    lmms = scored(folder, name, layouts.textvqa, files, "ten_answers", "lmms")
    items = {str(item["annotation_id"]): item for item in scores.per_item}
    recorded = json.loads((folder / "expected.json").read_text())["per_item"]
    return {
        "accuracy": scores.value,
        "accuracy_lmms_eval": lmms.value,
        "printed": f"answers\nSamples: {scores.n}\nAccuracy: {scores.value:.2f}%",
        "per_item": [
            {
                "question_id": item["annotation_id"],
                "image_id": item["image_id"],
                "score": item["score"],
                "normalised": item["parsed"],
            }
            for item in (items[str(entry["question_id"])] for entry in recorded)
        ],
        "lmms_eval_per_item": {str(item["annotation_id"]): item["score"] for item in lmms.per_item},
    }


def pope(folder: Path) -> dict[str, Any]:
    categories = sorted(path.stem.rpartition("_")[2] for path in folder.glob("coco/*.json"))
    files = [f"coco/coco_pope_{name}.json" for name in categories]

    def run(dialect: str) -> Scores:
        return scored(folder, "llava_pope_test.jsonl", layouts.pope, files, "pope", dialect)

    scores, lmms = run("llava"), run("lmms")
    keys = ("accuracy", "precision", "recall", "f1")
    # Its yes ratio counts labels, not answers (a fault of the original).
    items = lmms.per_item
    coded = {
        name: [item["label"] == "yes" for item in items if name in ("all", item["category"])]
        for name in (*categories, "all")
    }
    return {
        "mean_f1_of_categories": scores.metrics["mean_f1"]["value"] / 100,
        "mean_accuracy_of_categories": scores.metrics["mean_accuracy"]["value"] / 100,
        "categories": scores.details["table"],
        "per_item": [
            {key: item[key] for key in ("question_id", "category", "parsed", "label")}
            for item in scores.per_item
        ],
        "lmms_eval": {
            name: {key: row[key] for key in keys}
            | {"yes_ratio_as_coded": sum(coded[name]) / len(coded[name])}
            for name, row in lmms.details["table"].items()
        },
    }


def mme(folder: Path) -> dict[str, Any]:
    def run(dialect: str) -> Scores:
        files = ["MME_Benchmark_release_version"]
        return scored(folder, "llava_mme.jsonl", layouts.mme, files, "mme", dialect)

    scores, lmms = run("llava"), run("lmms")
    asked = records(folder / "llava_mme.jsonl")
    return {
        "perception": scores.value,
        "cognition": scores.metrics["cognition"]["value"],
        "lmms_eval_perception": lmms.value,
        "lmms_eval_cognition": lmms.metrics["cognition"]["value"],
        "per_category": by_name(scores, "points"),
        "details": scores.details["table"],
        "per_item": [
            {
                "question_id": ours["question_id"],
                "prompt": question["text"],
                "gt": ours["label"].capitalize(),
                "official_parse": ours["parsed"],
                "lmms_eval_parse": theirs["parsed"],
            }
            for question, ours, theirs in zip(asked, scores.per_item, lmms.per_item, strict=True)
        ],
    }


PARSERS: dict[str, Callable[[str], Any]] = {
    "m4c_evalai_processor": vqa_accuracy.evalai_answer,
    "vqav2_official_punct_digit": vqa_accuracy.official_answer,
    "pope_parsed": yes_no.read_pope,
    "mme_official": lambda text: yes_no.read_mme(text.lower() + "\n"),
    "mme_lmms_eval": lambda text: yes_no.read_mme_lmms(text.strip()),
    "gqa_llava": exact.gqa_prediction,
}


def normaliser(folder: Path) -> list[dict[str, Any]]:
    recorded = json.loads((folder / "expected.json").read_text())
    return [
        {"in": entry["in"], **{name: parse(entry["in"]) for name, parse in PARSERS.items()}}
        for entry in recorded
    ]


# A file that only that case has, and what works its expected.json out.
CASES: dict[str, Callable[[Path], Any]] = {
    "v2_mscoco_val2014_annotations.json": vqav2,
    "testdev_balanced_questions.json": gqa,
    "TextVQA_0.5.1_val.json": textvqa,
    "llava_pope_test.jsonl": pope,
    "llava_mme.jsonl": mme,
}


def checker(folder: Path) -> Callable[[Path], Any] | None:
    """What checks a folder, recognised by its files; None for one that is no recorded scorer."""
    if not (folder / "expected.json").is_file():
        return None
    for marker, case in CASES.items():
        if (folder / marker).is_file():
            return case
    recorded = json.loads((folder / "expected.json").read_text())
    return normaliser if isinstance(recorded, list) else None


def run_case(folder: Path, name: str) -> Iterator[Line]:
    """One line for a folder."""
    case = checker(folder)
    if case is None:
        yield False, f"FAIL  {name}: a recorded scorer without a checker"
        return
    comparison = Comparison()
    expected = json.loads((folder / "expected.json").read_text())
    comparison.compare(case.__name__, case(folder), expected)
    text = f"{name} {comparison.count} values, largest deviation {comparison.worst:.2e}"
    if comparison.failures:
        shown = "\n      ".join(comparison.failures[:8])
        more = len(comparison.failures) - 8
        shown += f"\n      and {more} more" if more > 0 else ""
        yield False, f"FAIL  {text}\n      {shown}"
    else:
        yield True, f"ok    {text}"
