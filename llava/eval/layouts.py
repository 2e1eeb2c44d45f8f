"""The files of the benchmarks as their makers and LLaVA's docs lay them out: questions and labels.

Special here: a reader of labels gives one label a question, joined the way that set needs (by id,
by picture and words, by picture alone), and fails by name when a question has none; what a label
is made of is said at the scorer that reads it. Nothing is downloaded and nothing written: MMBench's
pictures stay inside its table as `data:` addresses.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llava.eval.questions import Question, make_uid, read_json_lines, read_questions

Labels = dict[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
SINGLE_WORD = "\nAnswer the question with a single word."
VIZWIZ = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD
OCR_LINE = "Reference OCR token:"
MMBENCH_COPY = 1_000_000
MME_TAIL = "Please answer yes or no."


# ----------------------------------------------------------------------------- questions
def read_question_file(path: str | Path, name: str | None = None, suffix: str = "") -> list:
    """Questions of a file in LLaVA's JSON lines, ScienceQA's JSON list or MMBench's TSV.

    suffix: what the script adds at run time, for the last two (JSON lines hold it already).
    Raises FileNotFoundError, or ValueError naming what is wrong with which line.
    """
    path = Path(path)
    if path.suffix == ".tsv":
        return read_mmbench(path, name or path.stem, suffix)
    if path.suffix == ".json":
        return read_scienceqa(path, name or path.stem, suffix)
    return read_questions(path, name)


def read_json(path: str | Path) -> Any:
    """A JSON file. Raises FileNotFoundError, or ValueError with its name if it is no JSON."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path}: no JSON ({err})") from err


def read_scienceqa(path: Path, name: str, suffix: str = LETTER) -> list[Question]:
    """One JSON list of LLaVA conversations; the mark of the picture goes to the front."""
    questions = []
    for place, record in enumerate(_need(read_json(path), list, path)):
        try:
            text = record["conversations"][0]["value"].replace("<image>", "").strip() + suffix
            own, image = record["id"], record.get("image")
        except (KeyError, IndexError, TypeError, AttributeError) as err:
            raise ValueError(f"{path}: entry {place} is no conversation with an id") from err
        text = f"<image>\n{text}" if image else text
        uid = make_uid(name, place, own, text)
        questions.append(Question(uid, own, text, (image,) if image else ()))
    return questions


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a TSV; every cell is a text, an empty one is "" (and "None" is four letters)."""
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}:{number}: the line has not as many cells as the header")
    return rows


def read_mmbench(
    path: Path, name: str, suffix: str = LETTER, all_rounds: bool = False
) -> list[Question]:
    """MMBench's TSV: hint, question and options make the text; the picture is base64.

    all_rounds: each row as often as it has options, turned by one more each time; `option_char`
    then says whose place in the table an option has. (The table has turned copies of its own.)
    """
    rows = read_table(path)
    needed = ("index", "question", "A", "image")
    lacking = [column for column in needed if rows and column not in rows[0]]
    if lacking or not rows:
        raise ValueError(f"{path}: columns {lacking or needed} are missing")
    pictures = {row["index"]: row["image"] for row in rows}
    questions = []
    for place, row in enumerate(rows):
        # To save space a row may name the row that holds its picture.
        image = f"data:image/jpeg;base64,{pictures.get(row['image'], row['image'])}"
        rounds = len(options_of(row)) if all_rounds else 1
        for turned in range(rounds):
            text, meta = _mmbench_text(row, turned)
            index, text = int(row["index"]), text + suffix
            uid = make_uid(name, place, index, text) + f":{turned}" * (turned > 0)
            category = row.get("category", "default")
            questions.append(Question(uid, index, text, (image,), category, meta))
    return questions


def _mmbench_text(row: dict[str, str], turned: int) -> tuple[str, dict[str, Any]]:
    """A row's prompt with its options turned by so many places, and what its answer repeats."""
    options = options_of(row)
    letters, texts = list(options), list(options.values())
    texts = texts[turned:] + texts[:turned]
    lines = [*filter(None, [row.get("hint", "")]), row["question"]]
    lines += [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    places = letters[turned:] + letters[:turned]
    return "\n".join(lines), {"round_id": turned, "options": texts, "option_char": places}


def options_of(row: dict[str, str]) -> dict[str, str]:
    """letter -> option of a row, those that are not empty."""
    return {letter: row[letter] for letter in LETTERS if row.get(letter, "") != ""}


def _need(value: Any, kind: type, path: Path) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{path}: a JSON {kind.__name__} is needed, got {type(value).__name__}")
    return value


def bare_question(text: str) -> str:
    """A prompt without the picture's mark, OCR line and the sentence that asks for the form."""
    lines = [line for line in text.replace("<image>", "").strip().split("\n") if line.strip()]
    asks = ("Answer the question ", "Answer with the option", "When the provided information")
    return "\n".join(line for line in lines if not line.startswith((OCR_LINE, *asks)))


# ----------------------------------------------------------------------------- labels
def _by_key(
    questions: Sequence[Question],
    table: dict[Any, Any],
    key: Callable[[Question], Any],
    source: Path,
) -> Labels:
    """uid -> table[key(question)]; ValueError that names the questions without one."""
    lacking = [question for question in questions if key(question) not in table]
    if lacking:
        names = ", ".join(repr(key(question)) for question in lacking[:3])
        raise ValueError(f"{source} has no label for {len(lacking)} questions, the first: {names}")
    return {question.uid: table[key(question)] for question in questions}


def in_order(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """JSON lines in the order of the questions: `question_id`, `answer` and, to be sure where ids
    repeat, `text`."""
    (path,) = paths
    lines = read_json_lines(path)
    if len(lines) != len(questions):
        raise ValueError(f"{path} has {len(lines)} labels for {len(questions)} questions")
    labels = {}
    for (number, record), question in zip(lines, questions, strict=True):
        # Several questions may share an id, so the text is compared where the label has it.
        found = record.get("question_id"), record.get("text", question.text)
        if found != (question.question_id, question.text):
            raise ValueError(
                f"{path}:{number}: label of {found} where question {question.question_id!r} asks "
                f"{question.text!r}; labels stand in the order of the questions"
            )
        if not isinstance(record.get("answer"), str):
            raise ValueError(f"{path}:{number}: no text under 'answer': {record}")
        labels[question.uid] = record["answer"]
    return labels


def inline(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """The other keys of a question's own line, among them `answer`."""
    for question in questions:
        if "answer" not in question.meta:
            raise ValueError(f"question {question.question_id!r} has no 'answer' on its line")
    return {question.uid: question.meta for question in questions}


def vqa_annotations(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """VQAv2's annotation file, by question id."""
    (path,) = paths
    table = {
        str(entry["question_id"]): {
            "answers": [answer["answer"] for answer in entry["answers"]],
            "question_type": entry["question_type"],
            "answer_type": entry["answer_type"],
        }
        for entry in _need(read_json(path), dict, path)["annotations"]
    }
    return _by_key(questions, table, lambda question: str(question.question_id), path)


def gqa(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """GQA's question file with its answers, by question id."""
    (path,) = paths
    table = _need(read_json(path), dict, path)
    return _by_key(questions, table, lambda question: str(question.question_id), path)


def textvqa(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """TextVQA's annotation file, by picture and words: ids in LLaVA's file are those of pictures.

    The words are looked for in the prompt, so that OCR lines and suffixes do not matter.
    """
    (path,) = paths
    by_picture: dict[str, list[dict[str, Any]]] = {}
    for entry in _need(read_json(path), dict, path)["data"]:
        by_picture.setdefault(str(entry["image_id"]), []).append(entry)
    labels = {}
    for question in questions:
        own = str(question.question_id)
        picture = Path(question.images[0]).stem if question.images else own
        found = _entry_asked(question.text, by_picture.get(picture) or by_picture.get(own, []))
        if found is None:
            asked = bare_question(question.text)
            raise ValueError(f"{path} has no question {asked!r} about picture {picture!r}")
        labels[question.uid] = {
            "answers": found["answers"],
            "annotation_id": found["question_id"],
            "image_id": found["image_id"],
        }
    return labels


def _entry_asked(prompt: str, entries: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry whose question is the prompt's: word for word, else the longest it contains."""
    asked, prompt = bare_question(prompt).lower(), prompt.lower()
    entries = sorted(entries, key=lambda entry: -len(entry["question"]))
    for entry in entries:
        if entry["question"].lower() == asked:
            return entry
    return next((e for e in entries if e["question"].lower() in prompt), None)


def pope(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """POPE's label files (JSON lines), by category, picture and words; LLaVA changed the ids.

    A question that stands twice takes its labels in turn.
    """
    table: dict[tuple[str, str, str], list[str]] = {}
    for path in paths:
        category = path.stem.removeprefix("coco_pope_")
        for _, record in read_json_lines(path):
            key = category, record["image"], record["text"].strip()
            table.setdefault(key, []).append(record["label"])

    def key_of(question: Question) -> tuple[str, str, str]:
        image = question.images[0] if question.images else ""
        return question.category, image, bare_question(question.text)

    found = _by_key(questions, table, key_of, paths[0].parent)
    turns: Counter[tuple[str, str, str]] = Counter()
    labels = {}
    for question in questions:
        own, turn = found[question.uid], turns[key_of(question)]
        labels[question.uid] = own[min(turn, len(own) - 1)]
        turns[key_of(question)] += 1
    return labels


def mme(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """MME's text files, one a picture with two lines `question<TAB>answer`, in `<category>/` or in
    `<category>/questions_answers_YN/`."""
    (root,) = paths
    cache: dict[tuple[str, str], dict[str, str]] = {}

    def key(question: Question) -> str:
        return mme_question(bare_question(question.text))

    labels = {}
    for question in questions:
        image = Path(question.images[0] if question.images else str(question.question_id))
        place = question.category, image.stem
        if place not in cache:
            cache[place] = _mme_file(root, *place)
        if key(question) not in cache[place]:
            raise ValueError(f"{root}: {'/'.join(place)}.txt does not ask {key(question)!r}")
        labels[question.uid] = cache[place][key(question)]
    return labels


def mme_question(text: str) -> str:
    """A question without "Please answer yes or no." at its end, before which files differ."""
    return text.strip().removesuffix(MME_TAIL).strip()


def _mme_file(root: Path, category: str, stem: str) -> dict[str, str]:
    """question -> answer of one picture."""
    folder = root / category
    names = [folder / "questions_answers_YN" / f"{stem}.txt", folder / f"{stem}.txt"]
    path = next((name for name in names if name.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"file not found: {names[1]} (or in {names[0].parent})")
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            asked, _, answer = line.rpartition("\t")
            found[mme_question(asked)] = answer.strip()
    return found


def scienceqa(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """ScienceQA's problems, by id."""
    (path,) = paths
    table = {
        own: {"answer": problem["answer"], "choices": len(problem["choices"])}
        for own, problem in _need(read_json(path), dict, path).items()
    }
    return _by_key(questions, table, lambda question: str(question.question_id), path)


def seed(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """SEED-Bench's file, by id (whole numbers here, texts there)."""
    (path,) = paths
    data = _need(read_json(path), dict, path)
    names = {number: name for name, number in data["question_type"].items()}
    table = {
        str(entry["question_id"]): {
            "answer": entry["answer"],
            "type": names[entry["question_type_id"]],
            "data_type": entry["data_type"],
        }
        for entry in data["questions"]
    }
    return _by_key(questions, table, lambda question: str(question.question_id), path)


def mmbench(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """MMBench's TSV: a row whose index is a million or more is a copy with the options turned."""
    (path,) = paths
    rows = read_table(path)
    if any(row.get("answer", "") == "" for row in rows):
        raise ValueError(f"{path} has rows without an answer: this split is scored by its server")
    table = {
        int(row["index"]): {
            "answer": row["answer"],
            "options": options_of(row),
            "base": int(row["index"]) % MMBENCH_COPY,
            "category": row["category"],
            "l2": row["l2-category"],
        }
        for row in rows
    }
    return _by_key(questions, table, lambda question: question.question_id, path)


def vizwiz(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """VizWiz's annotation file, by picture."""
    (path,) = paths
    table = {
        entry["image"]: {"answers": [answer["answer"] for answer in entry["answers"]]}
        for entry in _need(read_json(path), list, path)
    }
    return _by_key(questions, table, lambda question: question.images[0], path)


def docvqa(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """DocVQA's and InfographicVQA's annotation file, by id."""
    (path,) = paths
    table = {
        str(entry["questionId"]): {"answers": entry["answers"]}
        for entry in _need(read_json(path), dict, path)["data"]
    }
    return _by_key(questions, table, lambda question: str(question.question_id), path)


def aokvqa(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """A-OKVQA's file, by id."""
    (path,) = paths
    table = {entry["question_id"]: entry for entry in _need(read_json(path), list, path)}
    return _by_key(questions, table, lambda question: question.question_id, path)


def captions(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """A caption file in COCO's format, by the id of the picture: a list of texts each."""
    (path,) = paths
    table: dict[str, list[str]] = {}
    for entry in _need(read_json(path), dict, path)["annotations"]:
        table.setdefault(str(entry["image_id"]), []).append(entry["caption"])
    return _by_key(questions, table, lambda question: str(question.question_id), path)


def llava_bench(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """LLaVA-Bench: contexts by picture, GPT-4's answers by id; what a judge is shown."""
    contexts, answers = paths
    words = {record["image"]: _lines(record["caption"]) for _, record in read_json_lines(contexts)}
    return _shown(paths, questions, words, _texts(answers))


def llava_qa90(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """LLaVA-QA90: captions and boxes by picture, GPT-4's answers by id."""
    contexts, answers = paths
    words = {}
    for _, record in read_json_lines(contexts):
        boxes = [f"{entry['category']}: {entry['bbox']}" for entry in record.get("instances", ())]
        words[record["image"]] = "\n".join([_lines(record["captions"]), "", *boxes]).strip()
    return _shown(paths, questions, words, _texts(answers))


def mmvet(paths: Sequence[Path], questions: Sequence[Question]) -> Labels:
    """MM-Vet's annotation file: an answer and the abilities it takes, by `v1_<id>`."""
    (path,) = paths
    table = {
        own: {"answer": entry["answer"], "context": "", "capabilities": list(entry["capability"])}
        for own, entry in _need(read_json(path), dict, path).items()
    }
    return _by_key(questions, table, lambda question: f"v1_{question.question_id}", path)


def _lines(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "\n".join(text)


def _texts(path: Path) -> dict[str, str]:
    return {str(record["question_id"]): record["text"] for _, record in read_json_lines(path)}


def _shown(
    paths: Sequence[Path],
    questions: Sequence[Question],
    contexts: dict[str, str],
    answers: dict[str, str],
) -> Labels:
    picture = _by_key(questions, contexts, lambda question: question.images[0], paths[0])
    right = _by_key(questions, answers, lambda question: str(question.question_id), paths[1])
    return {
        q.uid: {"answer": right[q.uid], "context": picture[q.uid], "capabilities": []}
        for q in questions
    }


READERS: dict[str, Callable[[Sequence[Path], Sequence[Question]], Labels]] = {
    "in_order": in_order,
    "inline": inline,
    "vqa_annotations": vqa_annotations,
    "gqa": gqa,
    "textvqa": textvqa,
    "pope": pope,
    "mme": mme,
    "scienceqa": scienceqa,
    "seed": seed,
    "mmbench": mmbench,
    "vizwiz": vizwiz,
    "docvqa": docvqa,
    "aokvqa": aokvqa,
    "captions": captions,
    "llava_bench": llava_bench,
    "llava_qa90": llava_qa90,
    "mmvet": mmvet,
}
"""What the benchmark table calls a reader of labels."""
