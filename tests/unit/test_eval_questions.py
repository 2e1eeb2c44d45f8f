"""Reading question files: what is accepted, and where a message points."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llava.eval.questions import check_images_exist, first, get_chunk, read_questions, spread

GOOD = {"question_id": 1, "image": "a.png", "text": "Is it?", "category": "x", "round_id": 3}


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_llava_lines(tmp_path):
    text_only = {"question_id": "q2", "text": "Why?"}
    many = {"question_id": 2, "image": ["a.png", "b.png"], "text": "Same?"}
    questions = read_questions(write(tmp_path / "q.jsonl", GOOD, "", text_only, many), "pope")
    assert [q.images for q in questions] == [("a.png",), (), ("a.png", "b.png")]
    assert [q.question_id for q in questions] == [1, "q2", 2]
    assert questions[0].category == "x"
    assert questions[0].meta == {"round_id": 3}
    assert questions[1].category == "default"
    assert questions[2].uid.startswith("pope:2:")


def test_uid_tells_questions_of_one_id_apart_and_follows_the_text(tmp_path):
    same = [GOOD, {**GOOD, "text": "Is it not?"}, GOOD]
    uids = [q.uid for q in read_questions(write(tmp_path / "q.jsonl", *same))]
    assert len(set(uids)) == 3
    edited = read_questions(write(tmp_path / "q.jsonl", {**GOOD, "text": "Is it ?"}))
    assert edited[0].uid != uids[0]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"question_id": 1,', "no JSON"),
        ("[1, 2]", "JSON object"),
        ({"text": "x"}, "question_id"),
        ({"question_id": True, "text": "x"}, "question_id"),
        ({"question_id": 1.5, "text": "x"}, "question_id"),
        ({"question_id": 1}, "text must be"),
        ({"question_id": 1, "text": "  "}, "text must be"),
        ({"question_id": 1, "text": "x", "image": 5}, "image must be"),
        ({"question_id": 1, "text": "x", "image": [""]}, "image must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, says):
    path = write(tmp_path / "q.jsonl", GOOD, "", bad)
    with pytest.raises(ValueError, match=rf"q\.jsonl:3: .*{says}"):
        read_questions(path)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no questions"):
        read_questions(write(tmp_path / "q.jsonl", ""))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_questions(tmp_path / "b.jsonl")


def test_missing_pictures_are_named(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    records = [GOOD, *({**GOOD, "image": f"m{i}.png"} for i in range(5))]
    questions = read_questions(write(tmp_path / "q.jsonl", *records))
    check_images_exist(questions[:1], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"m0\.png.*m2\.png and 2 more"):
        check_images_exist(questions, tmp_path)


def test_chunks_cover_all_and_may_be_empty(tmp_path):
    records = [{**GOOD, "question_id": i} for i in range(9)]
    questions = read_questions(write(tmp_path / "q.jsonl", *records))
    chunks = [get_chunk(questions, 8, i) for i in range(8)]
    assert [q for chunk in chunks for q in chunk] == questions
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 2, 1, 0, 0, 0]
    for index in (-1, 8):
        with pytest.raises(ValueError, match="chunk"):
            get_chunk(questions, 8, index)
    assert first(questions, 2) == questions[:2]
    assert first(questions, None) == questions
    with pytest.raises(ValueError, match="limit is 0"):
        first(questions, 0)


def test_spread_takes_whole_pictures_of_all_categories(tmp_path):
    """10 pictures of 2 questions in 5 categories, sorted by category, as MME's file is."""
    records = [
        {"question_id": f"{i}", "image": f"{i // 2}.png", "text": f"{i}?", "category": f"c{i // 4}"}
        for i in range(20)
    ]
    questions = read_questions(write(tmp_path / "q.jsonl", *records))
    taken = spread(questions, 10)
    assert len(taken) == 10
    assert taken == [q for q in questions if q in taken]
    assert {q.category for q in taken} == {"c0", "c1", "c2", "c3", "c4"}
    pictures = [q.images for q in taken]
    assert all(pictures.count(image) == 2 for image in pictures)
    assert spread(questions, None) == spread(questions, 20) == spread(questions, 99) == questions
    assert [q.images for q in spread(questions, 1)] == [("5.png",)] * 2
    with pytest.raises(ValueError, match="limit is 0"):
        spread(questions, 0)
