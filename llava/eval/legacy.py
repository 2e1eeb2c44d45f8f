"""What LLaVA's scoring scripts and converters do, over this package's scorers and uploads.

Special here: the entry points of the same names (`llava.eval.eval_pope`, `scripts/convert_*.py`,
...) are a few lines around these functions, so that shell scripts written for LLaVA go on working
and print the same lines. Like the originals they take an answers file without its question file,
and go on where answers are missing; unlike them they say so. `llava score` and `llava export`
refuse.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.eval import layouts, submit
from llava.eval.judge import PAIR_TEMPLATE, Endpoint, Reference, build_requests, collect_reviews
from llava.eval.questions import Question, read_json_lines, read_questions
from llava.eval.scorers import Scores, join_answers, review, score
from llava.eval.scorers.yes_no import COGNITION, PERCEPTION
from llava.utils import atomic_write, get_logger, json_dump

log = get_logger(__name__)
Given = dict[str, str]


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Records of an answers file."""
    return [record for _, record in read_json_lines(path)]


def questions_of(records: Sequence[dict[str, Any]]) -> tuple[list[Question], Given]:
    """The questions that an answers file repeats, and their answers."""
    questions = [
        Question(str(place), record["question_id"], record["prompt"])
        for place, record in enumerate(records)
    ]
    return questions, {str(place): record["text"] for place, record in enumerate(records)}


def matched(questions: Sequence[Question], path: str | Path) -> Given:
    """uid -> answer, joined by id and prompt as the originals do: their annotation files ask
    without the suffix. What is missing is said."""
    records = [{k: v for k, v in record.items() if k != "uid"} for record in read_answers(path)]
    given = join_answers(questions, records)
    missing = len(questions) - len(given)
    if missing:
        log.warning("%s: %d of %d questions have no answer", path, missing, len(questions))
    return given


# ----------------------------------------------------------------------------- scores
def textvqa_lines(annotation_file: str, result_file: str) -> list[str]:
    """eval_textvqa's lines about one answers file."""
    questions, given = questions_of(read_answers(result_file))
    labels = layouts.textvqa([Path(annotation_file)], questions)
    scores = score("ten_answers", questions, labels, given)
    return [Path(result_file).stem, f"Samples: {scores.n}", f"Accuracy: {scores.value:.2f}%", ""]


def pope_lines(annotation_dir: str, question_file: str, result_file: str) -> list[str]:
    """eval_pope's lines, category by category in the order of the file names."""
    files = sorted(Path(annotation_dir).glob("coco_pope_*.json"))
    if not files:
        raise FileNotFoundError(f"no coco_pope_*.json in {annotation_dir}")
    names = {path.stem.removeprefix("coco_pope_") for path in files}
    asked = [q for q in read_questions(question_file) if q.category in names]
    labels = layouts.pope(files, asked)
    # Answers to categories that are not looked at are none of these questions'.
    ids = {str(question.question_id) for question in asked}
    records = [r for r in read_answers(result_file) if str(r["question_id"]) in ids]
    given = join_answers(asked, records)
    if len(given) < len(asked):
        log.warning("%s: %d questions have no answer", result_file, len(asked) - len(given))
    scores = score("pope", asked, labels, given, "llava", allow_missing=True)
    table, lines = scores.details["table"], []
    for name in sorted(names & set(table)):
        row = table[name]
        shares = [row[key] for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")]
        counts = [str(row[key]) for key in ("TP", "FP", "TN", "FN")]
        lines += [
            f"Category: {name}, # samples: {sum(map(int, counts))}",
            "TP\tFP\tTN\tFN\t",
            "\t".join(counts),
            f"Accuracy: {row['accuracy']}",
            f"Precision: {row['precision']}",
            f"Recall: {row['recall']}",
            f"F1 score: {row['f1']}",
            f"Yes ratio: {row['yes_ratio']}",
            ", ".join(f"{share:.3f}" for share in shares),
            "=" * 36,
        ]
    return lines


def scienceqa_result(
    base_dir: str, result_file: str, split: str
) -> tuple[Scores, dict[str, Any], dict[str, Any]]:
    """Scores over a split of problems, and eval_science_qa's two files."""
    base = Path(base_dir)
    problems = layouts.read_json(base / "problems.json")
    own_ids = layouts.read_json(base / "pid_splits.json")[split]
    records = {str(record["question_id"]): record for record in read_answers(result_file)}
    questions, given = [], {}
    for own in own_ids:
        record = records.get(own, {"prompt": "Unknown"})
        image = (f"{own}/image.png",) if "<image>" in record["prompt"] else ()
        questions.append(Question(own, own, record["prompt"], image))
        if "text" in record:
            given[own] = record["text"]
    if len(given) < len(questions):
        log.warning("%d of %d problems have no answer", len(questions) - len(given), len(questions))
    labels = layouts.scienceqa([base / "problems.json"], questions)
    scores = score("scienceqa", questions, labels, given, allow_missing=True)
    indices = {item["uid"]: _index(item, problems) for item in scores.per_item}
    entries = [
        {
            "question_id": item["uid"],
            "parsed_ans": item["parsed"] or "FAILED",
            "ground_truth": item["label"],
            "question": question.text,
            "pred": item["prediction"] if item["prediction"] is not None else "FAILED",
            "is_multimodal": item["picture"],
        }
        for item, question in zip(scores.per_item, questions, strict=True)
    ]
    right = [item["score"] == 1 for item in scores.per_item]
    output = {
        "correct": [entry for entry, good in zip(entries, right, strict=True) if good],
        "incorrect": [entry for entry, good in zip(entries, right, strict=True) if not good],
    }
    result = {
        "acc": scores.metrics["accuracy"]["value"],
        "correct": sum(right),
        "count": len(right),
        "results": indices,
        "outputs": {item["uid"]: item["prediction"] or "FAILED" for item in scores.per_item},
    }
    return scores, output, result


def _index(item: dict[str, Any], problems: dict[str, Any]) -> int:
    """Place of the chosen option, -1 for none."""
    place = "ABCDE".find(item["parsed"]) if item["parsed"] else -1
    return place if place < len(problems[item["uid"]]["choices"]) else -1


def scienceqa_line(scores: Scores) -> str:
    """eval_science_qa's line."""
    right = sum(item["score"] == 1 for item in scores.per_item)
    everything = scores.metrics["accuracy"]["value"]
    images = scores.metrics["img_accuracy_answered"]["value"] or 0.0
    return (
        f"Total: {scores.n}, Correct: {right}, Accuracy: {everything:.2f}%, "
        f"IMG-Accuracy: {images:.2f}%"
    )


# ----------------------------------------------------------------------------- MME
def mme_files(result_file: str, root: str | Path) -> dict[str, str]:
    """Category -> text of the file that MME's script reads: picture, question, label, answer."""
    questions, given = questions_of(read_answers(result_file))
    placed = [
        Question(q.uid, q.question_id, q.text, (str(q.question_id),), _category(q))
        for q in questions
    ]
    labels = layouts.mme([Path(root)], placed)
    files: dict[str, list[str]] = {}
    for question in placed:
        asked = f"{layouts.mme_question(layouts.bare_question(question.text))} {layouts.MME_TAIL}"
        # A tab or newline would break the table.
        answer = given[question.uid].replace("\t", " ").replace("\n", " ").replace("\r", " ")
        cells = (Path(question.images[0]).name, asked, labels[question.uid], answer)
        files.setdefault(question.category, []).append("\t".join(cells))
    return {name: "".join(f"{line}\n" for line in lines) for name, lines in files.items()}


def _category(question: Question) -> str:
    return str(question.question_id).partition("/")[0]


def mme_lines(results_dir: str | Path) -> list[str]:
    """calculation.py's lines about a folder of `<category>.txt`."""
    questions, labels, given = [], {}, {}
    for path in sorted(Path(results_dir).glob("*.txt")):
        for place, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n")):
            cells = line.split("\t")
            if len(cells) != 4:
                raise ValueError(f"{path}:{place + 1}: 4 cells are needed, found {len(cells)}")
            image, asked, label, answer = cells
            uid = f"{path.stem}:{place}"
            questions.append(Question(uid, image, asked, (f"{path.stem}/{image}",), path.stem))
            labels[uid], given[uid] = label, answer
    scores = score("mme", questions, labels, given)
    lines = []
    for title, names in (("Perception", PERCEPTION), ("Cognition", COGNITION)):
        points = {
            name: scores.metrics[f"points/{name}"]["value"]
            for name in names
            if f"points/{name}" in scores.metrics
        }
        lines += [f"=========== {title} ===========", f"total score: {sum(points.values())} ", ""]
        lines += [f"\t {name}  score: {value}" for name, value in points.items()]
        lines += ["", ""]
    return lines


# ----------------------------------------------------------------------------- uploads
def vqav2_upload(folder: str, checkpoint: str, split: str) -> Path:
    """merge.jsonl of a checkpoint -> the server's file."""
    base = Path(folder)
    everything = read_questions(base / "llava_vqav2_mscoco_test2015.jsonl")
    source = base / "answers" / split / checkpoint / "merge.jsonl"
    asked_file = base / f"{split}.jsonl"
    asked = read_questions(asked_file) if asked_file.is_file() else everything
    given = matched(asked, source)
    path = base / "answers_upload" / split / f"{checkpoint}.json"
    submit.write_upload(path, submit.vqav2_upload(asked, given, everything), "json")
    return path


def convert(
    build: Callable[[Sequence[Question], Given], Any], source: str, target: str, form: str = "json"
) -> None:
    """An answers file without its question file -> a server's file."""
    questions, given = questions_of(read_answers(source))
    submit.write_upload(target, build(questions, given), form)


def vizwiz_upload(annotation_file: str, result_file: str, upload_file: str) -> None:
    """Answers to a question file -> the server's file."""
    questions = read_questions(annotation_file)
    given = matched(questions, result_file)
    submit.write_upload(upload_file, submit.vizwiz_upload(questions, given), "json")


def mmbench_upload(annotation_file: str, result_dir: str, upload_dir: str, experiment: str) -> None:
    """Answers to MMBench's table -> the server's spreadsheet."""
    questions = layouts.read_question_file(annotation_file)
    given = matched(questions, Path(result_dir) / f"{experiment}.jsonl")
    rows = submit.mmbench_upload(questions, given, layouts.read_table(Path(annotation_file)))
    submit.write_upload(Path(upload_dir) / f"{experiment}.xlsx", rows, "xlsx")


def seed_lines(annotation_file: str, result_file: str, upload_file: str | None) -> list[str]:
    """Accuracies of SEED-Bench as the converter prints them; writes the upload where one is named.
    The questions are the annotation file's."""
    data = layouts.read_json(annotation_file)
    questions = [
        Question(str(entry["question_id"]), entry["question_id"], entry["question"])
        for entry in data["questions"]
    ]
    records = [{**record, "prompt": ""} for record in read_answers(result_file)]
    given = join_answers(questions, records)
    if len(given) < len(questions):
        log.warning(
            "%d of %d questions have no answer", len(questions) - len(given), len(questions)
        )
    labels = layouts.seed([Path(annotation_file)], questions)
    scores = score("seed", questions, labels, given, allow_missing=True)
    values = {name: entry["value"] for name, entry in scores.metrics.items()}
    lines = [f"{name}: {values[f'type/{name}']:.2f}%" for name in data["question_type"]
             if f"type/{name}" in values]  # fmt: skip
    lines.append(f"Total accuracy: {scores.value:.2f}%")
    lines += [
        f"{half} accuracy: {values[f'data/{half}']:.2f}%"
        for half in ("image", "video")
        if f"data/{half}" in values
    ]
    if upload_file:
        submit.write_upload(upload_file, submit.seed_upload(questions, given), "jsonl")
    return lines


# ----------------------------------------------------------------------------- reviews
def review_flags(description: str) -> argparse.ArgumentParser:
    """The flags of LLaVA's eval_gpt_review_*.py, and where the judge is."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("-q", "--question", required=True, help="question file")
    flags.add_argument("-c", "--context", required=True, help="pictures in words")
    flags.add_argument(
        "-a", "--answer-list", nargs=2, required=True, metavar=("REFERENCE", "MODEL")
    )
    flags.add_argument("-r", "--rule", required=True, help="what the judge is told, by category")
    flags.add_argument("-o", "--output", required=True, help="reviews; found again after a stop")
    flags.add_argument("--max-tokens", type=int, default=1024)
    flags.add_argument(
        "--base-url", default=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
    )
    flags.add_argument("--judge", default="gpt-4-0613")
    return flags


def write_reviews(args: argparse.Namespace, reader: Callable[..., Any], prefix: str) -> None:
    """Reviews of two answers files. reader: of the pictures in words; prefix: of rule names."""
    questions = read_questions(args.question)
    shown = reader([Path(args.context), Path(args.answer_list[0])], questions)
    references = {uid: Reference(e["answer"], e["context"]) for uid, e in shown.items()}
    given = join_answers(questions, read_answers(args.answer_list[1]))
    lacking = [question for question in questions if question.uid not in given]
    if lacking:
        raise ValueError(f"{args.answer_list[1]}: {len(lacking)} questions have no answer")
    rule = layouts.read_json(args.rule)
    requests = build_requests(questions, given, references, rule, PAIR_TEMPLATE, prefix)
    key = os.environ.get("OPENAI_API_KEY", "")
    endpoint = Endpoint(args.base_url, args.judge, key, args.max_tokens)
    collect_reviews(requests, endpoint.ask, args.output, review.read_pair)


def write_files(folder: Path, files: dict[str, str]) -> None:
    """`<name>.txt` for each text."""
    for name, text in files.items():
        with atomic_write(folder / f"{name}.txt") as file:
            file.write(text)


def write_scienceqa(output_file: str, output: Any, result_file: str, result: Any) -> None:
    """eval_science_qa's two files."""
    json_dump(output_file, output)
    json_dump(result_file, result)
