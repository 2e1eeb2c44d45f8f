"""Recorded scorers: inputs in the official formats, answers, and what the official code made of
them (`expected.json`).

A folder is recognised by its files. A case works out every key of its `expected.json` with this
package, numbers to 1e-12 and all else exactly; a recorded key that nothing here answers fails.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava.eval import layouts, submit
from llava.eval.questions import Question, read_json_lines
from llava.eval.scorers import (
    Scores,
    exact,
    join_answers,
    multiple_choice,
    review,
    score,
    vqa_accuracy,
    yes_no,
)
from llava.eval.scorers import captions as caption_scores

TOLERANCE = 1e-12
Line = tuple[bool, str]


class Comparison:
    """Walks recorded values beside ours."""

    def __init__(self) -> None:
        self.count, self.worst, self.failures = 0, 0.0, []
        self.skipped: tuple[str, ...] = ()

    def fail(self, where: str, got: Any, expected: Any) -> None:
        self.failures.append(f"{where}: {got!r}, recorded {expected!r}"[:300])

    def compare(self, where: str, got: Any, expected: Any) -> None:
        if isinstance(expected, dict) and isinstance(got, dict):
            for key in expected:
                if key in self.skipped:
                    continue
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

    questions = layouts.read_question_file(folder / "llava_vqav2_questions.jsonl")
    (upload, upload_table), (raw, raw_table), (lmms, _) = map(run, ("llava", "official", "lmms"))
    return {
        "accuracy_upload_then_official": upload.value,
        "accuracy_raw_text_official": raw.value,
        "accuracy_lmms_eval": lmms.value,
        "upload_then_official": upload_table,
        "raw_text_official": raw_table,
        "upload_json": submit.vqav2_upload(questions, given(folder, questions)),
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


def scienceqa(folder: Path) -> dict[str, Any]:
    questions = layouts.read_question_file(folder / "llava_test_CQM-A.json", suffix=layouts.LETTER)
    labels = layouts.scienceqa([folder / "problems.json"], questions)
    answers = given(folder, questions)
    scores = score("scienceqa", questions, labels, answers, allow_missing=True)
    lmms = score("scienceqa", questions, labels, answers, "lmms", allow_missing=True)
    answered = {k: v for k, v in per_id(lmms).items() if _answered(lmms, k)}
    right = sum(item["score"] == 1 for item in scores.per_item)
    values = {name: entry["value"] for name, entry in scores.metrics.items()}

    def index(item: dict[str, Any]) -> int:
        choices = labels[item["uid"]]["choices"]
        place = "ABCDE".find(item["parsed"]) if item["parsed"] else -1
        return place if place < choices else -1

    return {
        "accuracy": values["accuracy"],
        "correct": right,
        "count": scores.n,
        "img_accuracy": values["img_accuracy_answered"],
        "printed": (
            f"Total: {scores.n}, Correct: {right}, Accuracy: {values['accuracy']:.2f}%, "
            f"IMG-Accuracy: {values['img_accuracy_answered']:.2f}%"
        ),
        "pred_index": {str(item["question_id"]): index(item) for item in scores.per_item},
        "per_item": {
            str(item["question_id"]): {
                "parsed": item["parsed"] or "FAILED",
                "correct": item["score"] == 1,
                "is_multimodal": item["picture"] and item["prediction"] is not None,
            }
            for item in scores.per_item
        },
        "lmms_eval_per_answered_item": answered,
        "lmms_eval_accuracy_on_answered": 100 * sum(answered.values()) / len(answered),
    }


def _answered(scores: Scores, own: str) -> bool:
    return any(
        str(item["question_id"]) == own and item["prediction"] is not None
        for item in scores.per_item
    )


def seed(folder: Path) -> dict[str, Any]:
    def run(dialect: str) -> Scores:
        files = ["SEED-Bench.json"]
        return scored(folder, "llava-seed-bench.jsonl", layouts.seed, files, "seed", dialect)

    scores, lmms = run("llava"), run("lmms")
    questions = layouts.read_question_file(folder / "llava-seed-bench.jsonl")
    types, halves = by_name(scores, "type"), by_name(scores, "data")
    lines = [f"{name}: {value:.2f}%" for name, value in types.items()]
    lines.append(f"Total accuracy: {scores.value:.2f}%")
    lines += [f"{name} accuracy: {value:.2f}%" for name, value in halves.items()]
    order = json.loads((folder / "SEED-Bench.json").read_text())["question_type"]
    return {
        "total": scores.value,
        **halves,
        **{f"lmms_eval_{name}": value for name, value in by_name(lmms, "data").items()},
        "lmms_eval_all": lmms.value,
        "per_type": {name: types[name] for name in order},
        "printed": lines,
        "per_item": per_id(scores),
        "upload": submit.seed_upload(questions, given(folder, questions)),
    }


def mmbench(folder: Path) -> dict[str, Any]:
    def run(dialect: str) -> Scores:
        files = ["mmbench_dev_20230712.tsv"]
        return scored(folder, files[0], layouts.mmbench, files, "mmbench", dialect)

    scores, lmms = run("llava"), run("lmms")
    table = folder / "mmbench_dev_20230712.tsv"
    questions = layouts.read_question_file(table)
    answers, labels = given(folder, questions), layouts.mmbench([table], questions)
    rows = submit.mmbench_upload(questions, answers, layouts.read_table(table))
    hits = multiple_choice.circular(lmms.per_item)
    return {
        "circular_accuracy_strict_letter": scores.value,
        "vanilla_accuracy_strict_letter": scores.metrics["vanilla"]["value"],
        "circular_accuracy_lmms_eval_static": lmms.value,
        "lmms_eval_returned_overall": lmms.value,
        "circular_hits_lmms_eval_static": {str(k): int(v) for k, v in hits.items()},
        "lmms_eval_category": {k: v / 100 for k, v in by_name(lmms, "category").items()},
        "lmms_eval_l2_category": {k: v / 100 for k, v in by_name(lmms, "l2").items()},
        "per_item_heuristic_letter": {
            str(question.question_id): multiple_choice.infer_letter(answers[question.uid])
            or multiple_choice.infer_option(answers[question.uid], labels[question.uid]["options"])
            for question in questions
        },
        "strict_circular": {
            str(k): v for k, v in multiple_choice.circular(scores.per_item).items()
        },
        **_spreadsheet(folder, rows),
        "upload_columns": list(rows[0]),
        "upload_rows": rows,
    }


def _spreadsheet(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Cells of the recorded spreadsheet and of ours, where both can be read."""
    path = folder / "expected_upload.xlsx"
    if not path.is_file() or importlib.util.find_spec("openpyxl") is None:
        return {}
    from openpyxl import load_workbook

    def cells(source: Any) -> list[tuple]:
        return list(load_workbook(source).active.iter_rows(values_only=True))

    recorded, ours = cells(path), cells(io.BytesIO(submit.spreadsheet(rows)))
    if recorded != ours:
        raise AssertionError(f"{path.name} differs from the spreadsheet written here")
    return {}


def mmstar(folder: Path) -> dict[str, Any]:
    entries = records(folder / "mmstar.jsonl")
    questions = [
        Question(str(e["index"]), e["index"], e["question"], (e["image"],), e["category"])
        for e in entries
    ]
    labels = {str(entry["index"]): entry for entry in entries}
    scores = score("mmstar", questions, labels, given(folder, questions))
    return {
        "average_of_l2": scores.value / 100,
        "micro_accuracy": scores.metrics["accuracy"]["value"] / 100,
        "per_category": {k: v / 100 for k, v in by_name(scores, "category").items()},
        "per_item": per_id(scores),
    }


def with_inline_labels(folder: Path, scorer: str, dialect: str) -> Scores:
    return scored(
        folder, "questions.jsonl", lambda _, q: layouts.inline([], q), [], scorer, dialect
    )


def ai2d(folder: Path) -> dict[str, Any]:
    scores = with_inline_labels(folder, "ai2d", "lmms")
    return {
        "accuracy": scores.value,
        "per_item": {
            str(item["question_id"]): {"filtered": item["parsed"], "score": item["score"]}
            for item in scores.per_item
        },
    }


def ocrvqa(folder: Path) -> dict[str, Any]:
    scores = with_inline_labels(folder, "ocrvqa", "vlmevalkit")
    return {"accuracy": scores.value, "per_item": per_id(scores)}


def chartqa(folder: Path) -> dict[str, Any]:
    lmms = with_inline_labels(folder, "chartqa", "lmms")
    kit = with_inline_labels(folder, "chartqa", "vlmevalkit")
    return {
        "relaxed_overall": lmms.value,
        "relaxed_human": lmms.metrics["relaxed/human_test"]["value"],
        "relaxed_augmented": lmms.metrics["relaxed/augmented_test"]["value"],
        "relaxed_overall_vlmevalkit": kit.value,
        "per_item": {
            str(one["question_id"]): {
                "type": one["category"],
                "lmms_eval": one["score"],
                "vlmevalkit": other["score"],
            }
            for one, other in zip(lmms.per_item, kit.per_item, strict=True)
        },
    }


def anls(folder: Path) -> dict[str, Any]:
    names = {"vlmevalkit": "vlmevalkit", "lmms": "lmms_eval", "llava": "m4c_stvqa"}
    runs = {
        name: scored(folder, "questions.jsonl", layouts.docvqa, ["val_v1.0.json"], "anls", dialect)
        for dialect, name in names.items()
    }
    columns = {name: per_id(scores) for name, scores in runs.items()}
    return {
        **{f"anls_{name}": scores.value for name, scores in runs.items()},
        "per_item": {
            own: {name: column[own] for name, column in columns.items()}
            for own in columns["vlmevalkit"]
        },
    }


def vizwiz(folder: Path) -> dict[str, Any]:
    scores = scored(folder, "llava_val.jsonl", layouts.vizwiz, ["val.json"], "ten_answers", "lmms")
    questions = layouts.read_question_file(folder / "llava_val.jsonl")
    return {
        "accuracy": scores.value,
        "per_item": {item["image"]: item["score"] for item in scores.per_item},
        "upload": submit.vizwiz_upload(questions, given(folder, questions)),
    }


def aokvqa(folder: Path) -> dict[str, Any]:
    path = folder / "aokvqa_v1p0_val.json"
    asked = json.loads(path.read_text())
    questions = [
        Question(e["question_id"], e["question_id"], e["question"], (str(e["image_id"]),))
        for e in asked
    ]
    labels = layouts.aokvqa([path], questions)

    def run(scorer: str, name: str) -> float:
        answers = json.loads((folder / name).read_text())
        return score(scorer, questions, labels, answers, allow_missing=True).value

    return {
        "multiple_choice": run("aokvqa", "predictions_mc.json"),
        "direct_answer": run("aokvqa_direct", "predictions_da.json"),
    }


def mmvet(folder: Path) -> dict[str, Any]:
    questions = layouts.read_question_file(folder / "llava-mm-vet.jsonl")
    return {"upload": submit.mmvet_upload(questions, given(folder, questions))}


def llava_bench(folder: Path) -> dict[str, Any]:
    raw = records(folder / "raw_reviews.jsonl")
    lines = review.summary_lines(records(folder / "reviews.jsonl"))
    return {
        "printed": ["reviews", *lines, "=" * 33],
        "tuples": [list(review.read_pair(entry["content"])) for entry in raw],
    }


def captions(folder: Path) -> dict[str, Any]:
    path = folder / "captions_val.json"
    pictures = json.loads(path.read_text())["images"]
    questions = [
        Question(str(p["id"]), p["id"], "Provide a caption.", (p["file_name"],)) for p in pictures
    ]
    answers = {str(r["question_id"]): r["text"] for r in records(folder / "answers.jsonl")}
    scores = score("captions", questions, layouts.captions([path], questions), answers)
    found = {name: entry["value"] / 100 for name, entry in scores.metrics.items()}
    if "METEOR" in scores.details:
        found["METEOR"] = scores.details["METEOR"] / 100
    return {
        **found,
        "per_image_CIDEr": per_id(scores),
        "per_image_ROUGE_L": per_id(scores, "rouge_l"),
        "tokenised_predictions": {k: [text] for k, text in per_id(scores, "parsed").items()},
        "tokenised_references": per_id(scores, "label"),
    }


PARSERS: dict[str, Callable[[str], Any]] = {
    "m4c_evalai_processor": vqa_accuracy.evalai_answer,
    "vqav2_official_punct_digit": vqa_accuracy.official_answer,
    "pope_parsed": yes_no.read_pope,
    "mme_official": lambda text: yes_no.read_mme(text.lower() + "\n"),
    "mme_lmms_eval": lambda text: yes_no.read_mme_lmms(text.strip()),
    "gqa_llava": exact.gqa_prediction,
    "mcq_extract_lmms_eval": multiple_choice.extract_letter,
    "mmbench_can_infer_option": multiple_choice.infer_letter,
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
    "pid_splits.json": scienceqa,
    "SEED-Bench.json": seed,
    "mmbench_dev_20230712.tsv": mmbench,
    "mmstar.jsonl": mmstar,
    "test_human.json": chartqa,
    "val_v1.0.json": anls,
    "val.json": vizwiz,
    "aokvqa_v1p0_val.json": aokvqa,
    "llava-mm-vet.jsonl": mmvet,
    "captions_val.json": captions,
    "raw_reviews.jsonl": llava_bench,
}


def checker(folder: Path) -> Callable[[Path], Any] | None:
    """What checks a folder, recognised by its files; None for one that is no recorded scorer."""
    if not (folder / "expected.json").is_file():
        return None
    for marker, case in CASES.items():
        if (folder / marker).is_file():
            return case
    recorded = json.loads((folder / "expected.json").read_text())
    if isinstance(recorded, list):
        return normaliser
    if (folder / "questions.jsonl").is_file():
        first = next(iter(recorded.get("per_item", {}).values()), None)
        return ai2d if isinstance(first, dict) else ocrvqa
    return None


def run_case(folder: Path, name: str) -> Iterator[Line]:
    """One line for a folder."""
    case = checker(folder)
    if case is None:
        yield False, f"FAIL  {name}: a recorded scorer without a checker"
        return
    comparison = Comparison()
    if case is captions and caption_scores.meteor(["a"], [["a"]]) is None:
        comparison.skipped = ("METEOR",)
        name = f"{name} (METEOR not compared: it needs pycocoevalcap and Java)"
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
