"""`llava export RUN`: the file a server wants, checked before it is written.

    llava export results/vqav2/RUN            # results/vqav2/RUN/upload/vqav2.json
    llava export answers.jsonl --benchmark vizwiz --output vizwiz.json

Special here: a server finds a faulty file after an hour, or scores it without a word. So each kind
is built from the questions (never from whatever answers there are), every id is looked for, types
and counts are checked, and only then is anything written, whole or not at all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.layouts import read_question_file, read_table
from llava.eval.questions import Question
from llava.eval.scorers.exact import gqa_prediction
from llava.eval.scorers.multiple_choice import choose
from llava.eval.scorers.vqa_accuracy import evalai_answer
from llava.utils import atomic_write, get_logger

log = get_logger(__name__)

Given = Mapping[str, str]
MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
MMBENCH_PLACE = 6
"""The column in which MMBench's server looks for the prediction."""


def vqav2_upload(
    questions: Sequence[Question], given: Given, everything: Sequence[Question] | None = None
) -> list[dict[str, Any]]:
    """A list over `everything` (VQAv2's whole test set); what was not asked is answered ""."""
    asked = {question.question_id: question.uid for question in questions}
    return [
        {
            "question_id": question.question_id,
            "answer": evalai_answer(given.get(asked.get(question.question_id, ""), "")),
        }
        for question in (questions if everything is None else everything)
    ]


def gqa_upload(questions: Sequence[Question], given: Given) -> list[dict[str, str]]:
    """What GQA's own script reads."""
    return [
        {
            "questionId": str(question.question_id),
            "prediction": gqa_prediction(given.get(question.uid, "")),
        }
        for question in questions
    ]


def vizwiz_upload(questions: Sequence[Question], given: Given) -> list[dict[str, str]]:
    """A list of pictures with the answer as the EvalAI processor leaves it."""
    return [
        {"image": Path(q.images[0]).name, "answer": evalai_answer(given.get(q.uid, ""))}
        for q in questions
    ]


def mmvet_upload(questions: Sequence[Question], given: Given) -> dict[str, str]:
    """`v1_<id>` -> text."""
    return {f"v1_{question.question_id}": given.get(question.uid, "") for question in questions}


def seed_upload(questions: Sequence[Question], given: Given) -> list[dict[str, str]]:
    """JSON lines of ids, as texts, with the answer."""
    return [
        {"question_id": str(q.question_id), "prediction": given.get(q.uid, "")} for q in questions
    ]


def docvqa_upload(questions: Sequence[Question], given: Given) -> list[dict[str, Any]]:
    """What the RRC server reads; its ids are whole numbers."""
    return [
        {"questionId": int(question.question_id), "answer": given.get(question.uid, "").strip()}
        for question in questions
    ]


def caption_upload(questions: Sequence[Question], given: Given) -> list[dict[str, Any]]:
    """COCO's result format, also nocaps'."""
    return [
        {"image_id": int(q.question_id), "caption": given.get(q.uid, "").strip()} for q in questions
    ]


def aokvqa_upload(questions: Sequence[Question], given: Given) -> dict[str, dict[str, str]]:
    """Id -> {"multiple_choice": the chosen text}, or "direct_answer" where none are offered."""
    upload = {}
    for question in questions:
        text, choices = given.get(question.uid, ""), question.meta.get("choices")
        kind = "multiple_choice" if choices else "direct_answer"
        upload[str(question.question_id)] = {kind: choose(text, choices) if choices else text}
    return upload


def mmbench_upload(
    questions: Sequence[Question], given: Given, rows: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    """The rows of MMBench's table (TSV) with the prediction in its column, for the spreadsheet."""
    texts = {str(question.question_id): given.get(question.uid, "") for question in questions}
    upload = []
    for row in rows:
        if row["index"] not in texts:
            continue
        cells = [(name, cell) for name, cell in row.items() if name not in MMBENCH_DROPPED]
        cells.insert(MMBENCH_PLACE, ("prediction", texts[row["index"]]))
        upload.append(dict(cells) | {"index": int(row["index"])})
    return upload


# ----------------------------------------------------------------------------- checks
def _check_list(
    upload: Any, ids: Sequence[Any], key: str, kind: type, answer: str, unique: bool = True
) -> None:
    """A list with an entry an id, in order, ids of one type and answers that are texts."""
    found = [entry[key] for entry in upload]
    if len(found) != len(ids):
        raise ValueError(f"the upload has {len(found)} entries for {len(ids)} questions")
    wrong = [own for own in found if type(own) is not kind]
    if wrong:
        raise ValueError(f"{key} must be {kind.__name__}, found {wrong[0]!r}")
    if unique and len(set(found)) != len(found):
        twice = next(own for own in found if found.count(own) > 1)
        raise ValueError(f"{key} {twice!r} stands twice in the upload")
    for entry in upload:
        if not isinstance(entry[answer], str):
            raise ValueError(f"{key} {entry[key]!r}: the answer is {entry[answer]!r}, no text")


@dataclass(frozen=True)
class Upload:
    """What a server takes. build: (questions, given, folder of the set) -> the content; key, kind
    and answer: what is checked of each entry of a list; form: json, jsonl or xlsx."""

    build: Callable[[Sequence[Question], Given, Path], Any]
    form: str = "json"
    key: str = ""
    kind: type = str
    answer: str = "answer"

    def content(self, questions: Sequence[Question], given: Given, folder: Path) -> Any:
        """The checked content. Raises ValueError for what the server would not take."""
        upload = self.build(questions, given, folder)
        if isinstance(upload, dict):
            if len(upload) != len(questions):
                raise ValueError(
                    f"the upload has {len(upload)} entries for {len(questions)} questions"
                )
        else:
            # VQAv2's upload covers questions that were not asked, so it has its own length.
            size = len(upload) if len(upload) >= len(questions) else len(questions)
            _check_list(upload, range(size), self.key, self.kind, self.answer)
        return upload


def _vqav2(questions: Sequence[Question], given: Given, folder: Path) -> Any:
    everything = folder / "llava_vqav2_mscoco_test2015.jsonl"
    if not everything.is_file():
        raise FileNotFoundError(
            f"file not found: {everything}; the server wants an entry for every test question"
        )
    return vqav2_upload(questions, given, read_question_file(everything))


def _mmbench(name: str) -> Callable[[Sequence[Question], Given, Path], Any]:
    return lambda questions, given, folder: mmbench_upload(
        questions, given, read_table(folder / name)
    )


UPLOADS: dict[str, Upload] = {
    "vqav2": Upload(_vqav2, key="question_id", kind=int),
    "gqa": Upload(lambda q, g, _: gqa_upload(q, g), key="questionId", answer="prediction"),
    "vizwiz": Upload(lambda q, g, _: vizwiz_upload(q, g), key="image"),
    "mm-vet": Upload(lambda q, g, _: mmvet_upload(q, g)),
    "seed": Upload(
        lambda q, g, _: seed_upload(q, g), "jsonl", key="question_id", answer="prediction"
    ),
    "docvqa": Upload(lambda q, g, _: docvqa_upload(q, g), key="questionId", kind=int),
    "captions": Upload(
        lambda q, g, _: caption_upload(q, g), key="image_id", kind=int, answer="caption"
    ),
    "aokvqa": Upload(lambda q, g, _: aokvqa_upload(q, g)),
    "mmbench": Upload(_mmbench("mmbench_dev_20230712.tsv"), "xlsx", "index", int, "prediction"),
    "mmbench_cn": Upload(
        _mmbench("mmbench_dev_cn_20231003.tsv"), "xlsx", "index", int, "prediction"
    ),
}


# ----------------------------------------------------------------------------- files
def export_answers(
    form: str,
    questions: Sequence[Question],
    given: Given,
    data: Path,
    path: str | Path | None = None,
    *,
    beside: Path | None = None,
) -> Path:
    """Check and write an upload (a key of `UPLOADS`) and log where; whole or not at all.

    data: folder of the question file. path: where to, or beside: a run's folder, which gets it as
    upload/FORM.EXTENSION. Raises what `Upload.content` raises.
    """
    upload = UPLOADS[form]
    content = upload.content(questions, given, data)
    if path is None:
        assert beside is not None
        path = beside / "upload" / f"{form}.{upload.form}"
    write_upload(path, content, upload.form)
    log.info("wrote %s: %d entries", path, len(content))
    return Path(path)


def write_upload(path: str | Path, content: Any, form: str) -> None:
    """Write checked content; whole or not at all."""
    if form == "xlsx":
        with atomic_write(path, "wb") as file:
            file.write(spreadsheet(content))
        return
    with atomic_write(path) as file:
        if form == "jsonl":
            file.writelines(json.dumps(entry) + "\n" for entry in content)
        else:
            json.dump(content, file)


def spreadsheet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """An .xlsx file with the rows under a line of column names; empty cells stay empty."""
    try:
        from openpyxl import Workbook
    except ImportError as err:
        raise ValueError("MMBench's upload needs openpyxl: pip install openpyxl") from err
    book = Workbook()
    sheet = book.active
    sheet.append(list(rows[0]))
    for number, row in enumerate(rows, start=2):
        for column, cell in enumerate(row.values(), start=1):
            if cell != "":
                place = sheet.cell(row=number, column=column, value=cell)
                if isinstance(cell, str):
                    place.data_type = "s"  # "=1+1" is an answer, no formula
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()
