"""Question files: LLaVA's JSON lines, one question a line.

Special here: `question_id` is not a key (in TextVQA and MME several questions share one), so each
question gets a `uid` made of the set, its place and a hash of what is asked; answers are joined by
it. A faulty line is reported with its number before anything is run.

    {"question_id": 7, "image": "a/0007.png", "text": "Is it red?\\nAnswer ...", "category": "x"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """One question: `text` is the user's whole turn (suffix included), `images` are paths relative
    to the image folder, none for a question without a picture; `meta` holds the line's other keys.
    `recorded` is what its answer repeats as the prompt, where that is not `text`.
    """

    uid: str
    question_id: str | int
    text: str
    images: tuple[str, ...] = ()
    category: str = "default"
    meta: dict[str, Any] = field(default_factory=dict)
    recorded: str | None = None


def make_uid(name: str, place: int, question_id: str | int, text: str) -> str:
    """`<set>:<place>:<8 hex>`: changes when the question does, so that old answers do not fit."""
    digest = hashlib.sha1(json.dumps([question_id, text]).encode()).hexdigest()
    return f"{name}:{place}:{digest[:8]}"


def read_questions(path: str | Path, name: str | None = None) -> list[Question]:
    """All questions of a file, in order. name: the set's name in the uids (default: file's stem).

    Raises FileNotFoundError if there is no file, and ValueError naming the line if one is no JSON
    object, lacks `question_id` or `text`, or has one of a wrong type; also for an empty file.
    """
    path = Path(path)
    name = name or path.stem
    questions = [
        _question(record, f"{path}:{line}", name, place)
        for place, (line, record) in enumerate(read_json_lines(path))
    ]
    if not questions:
        raise ValueError(f"question file has no questions: {path}")
    return questions


def read_json_lines(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank.

    Raises FileNotFoundError, or ValueError naming the line that is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as err:
        raise ValueError(f"not a UTF-8 text file: {path} ({err})") from err
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as err:
            raise ValueError(f"{path}:{number}: no JSON ({err})") from err
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: a JSON object is needed, got {line[:60]!r}")
        records.append((number, record))
    return records


def _question(record: dict[str, Any], where: str, name: str, place: int) -> Question:
    rest = dict(record)
    question_id, text = rest.pop("question_id", None), rest.pop("text", None)
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise ValueError(f"{where}: question_id must be a text or an integer, got {question_id!r}")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: text must be a text that is not empty, got {text!r}")
    images = rest.pop("image", None)
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise ValueError(f"{where}: image must be a path or a list of paths, got {images!r}")
    return Question(
        uid=make_uid(name, place, question_id, text),
        question_id=question_id,
        text=text,
        images=tuple(images),
        category=str(rest.pop("category", "default")),
        meta=rest,
    )


def check_images_exist(questions: Iterable[Question], image_folder: str | Path) -> None:
    """FileNotFoundError that names the first missing pictures, before a long run starts."""
    folder = Path(image_folder)
    asked = dict.fromkeys(image for question in questions for image in question.images)
    files = [image for image in asked if not image.startswith("data:")]
    missing = [str(folder / image) for image in files if not (folder / image).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"image file not found: {', '.join(missing[:3])}{more}")


def first(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions, all of them for None. Raises ValueError for a limit below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; accepted: 1 and more")
    return list(questions[:limit])


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """About `limit` questions of a set, in their order: whole pictures, evenly spaced.

    So pairs stay pairs, and a set sorted by category keeps all of them. A question without a
    picture counts as one. All questions for None; ValueError for a limit below 1.
    """
    if limit is None or limit >= len(questions):
        return first(questions, limit)
    first(questions, limit)  # refuses a limit below 1
    keys = [question.images or question.uid for question in questions]
    pictures = list(dict.fromkeys(keys))
    count = max(1, round(limit * len(pictures) / len(questions)))
    taken = {pictures[(2 * i + 1) * len(pictures) // (2 * count)] for i in range(count)}
    return [question for question, key in zip(questions, keys, strict=True) if key in taken]


def get_chunk(questions: Sequence[Question], chunks: int, index: int) -> list[Question]:
    """Part `index` of `chunks` consecutive parts of equal size, as LLaVA splits a file; the last
    ones may be empty. Raises ValueError for an index that is not in 0 .. chunks - 1."""
    if chunks < 1 or not 0 <= index < chunks:
        raise ValueError(f"chunk {index} of {chunks}; accepted: chunk-idx 0 to num-chunks - 1")
    size = -(-len(questions) // chunks)
    return list(questions[index * size : (index + 1) * size])
