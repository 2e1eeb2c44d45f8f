"""llava.digits: scans never mix, scenes are reproducible, answers are right, files are LLaVA's."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.digits import build as builder
from llava.digits.questions import FACTS, KINDS, SIDES, ask, describe, facts
from llava.digits.scenes import (
    CELLS,
    COLOUR_NAMES,
    EMPTY,
    GRID,
    IMAGE_PIXELS,
    ROWS,
    Scene,
    draw,
    load_scans,
    make_scene,
    render,
    split_scans,
    varied_scene,
)
from llava.digits.sets import POPE_CATEGORIES, SETS, chance
from llava.digits.training_data import conversation, statements

SEED = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build of everything, with few training pictures."""
    out = tmp_path_factory.mktemp("digits")
    builder.main(["--out", str(out), "--seed", str(SEED), "--train-pictures", "12"])
    return out


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def a_scene() -> Scene:
    """Row A: red 3, empty, blue 5, red 3; row B full; the rest empty."""
    digits = [3, EMPTY, 5, 3, 1, 2, 4, 7] + [EMPTY] * 8
    names = ["red", None, "blue", "red", "green", "white", "yellow", "purple"] + [None] * 8
    colours = [EMPTY if n is None else COLOUR_NAMES.index(n) for n in names]
    scans = [EMPTY if d == EMPTY else int(split_scans("test")[d][0]) for d in digits]
    return Scene(tuple(digits), tuple(colours), tuple(scans), (0, 1, 0, 1))


# ---------------------------------------------------------------------------------------- scenes
def test_the_split_is_by_scan_stratified_and_complete() -> None:
    _, classes = load_scans()
    train, test = (np.concatenate(split_scans(part)) for part in ("train", "test"))
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797
    for digit in range(10):
        assert (classes[split_scans("test")[digit]] == digit).all()
        share = len(split_scans("test")[digit]) / (classes == digit).sum()
        assert share == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_scene_uses_only_scans_of_its_split(split: str) -> None:
    allowed = set(np.concatenate(split_scans(split)).tolist())
    _, classes = load_scans()
    for index in range(40):
        scene = make_scene(SEED, split, index)
        for digit, colour, scan in zip(scene.digits, scene.colours, scene.scans, strict=True):
            assert (digit == EMPTY) == (colour == EMPTY) == (scan == EMPTY)
            assert scan == EMPTY or (scan in allowed and classes[scan] == digit)


def test_scenes_and_pictures_are_functions_of_the_seed() -> None:
    first, again = make_scene(1, "test", 5), make_scene(1, "test", 5)
    assert first == again
    assert (draw(first) == draw(again)).all()
    for other in (make_scene(2, "test", 5), make_scene(1, "test", 6), make_scene(1, "train", 5)):
        assert other != first
        assert (draw(other) != draw(first)).any()
    assert render(first).size == (IMAGE_PIXELS, IMAGE_PIXELS)


def test_a_digit_is_drawn_in_its_cell_and_colour() -> None:
    scene = a_scene()
    pixels = draw(scene).astype(float)
    blue = pixels[:28, 56:84].reshape(-1, 3)
    brightest = blue[blue[:, 2].argmax()]
    assert brightest[2] > brightest[0] + 80
    empty = pixels[:28, 28:56]
    assert empty.std() < pixels[:28, 56:84].std() / 2


def test_crowded_scenes_are_fuller() -> None:
    counts = [
        sum(len(varied_scene(0, "train", 3 * i + k).filled()) for i in range(30)) for k in range(3)
    ]
    assert counts[0] < counts[1] < counts[2]


def test_unknown_split_and_jitter_are_refused() -> None:
    with pytest.raises(ValueError, match="validation.*train, test"):
        split_scans("validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="jitter.*-1"):
        draw(a_scene(), -1)


# ------------------------------------------------------------------------------------- questions
@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("digit_at", "What digit is in A1?", "3"),
        ("digit_at", "What digit is in A2?", "none"),
        ("color_at", "What color is the digit in A3?", "blue"),
        ("filled_at", "Is there a digit in D4?", "no"),
        ("read_row", "What number is in row B?", "1 2 4 7"),
        ("where", "Where is the blue 5?", "A3"),
        ("exists", "Is there a red 5 in the image?", "no"),
        ("exists", "Is there a red 3 in the image?", "yes"),
        ("side_digit", "What digit is right of the blue 5?", "3"),
        ("side_digit", "What digit is below the blue 5?", "4"),
        ("side_color", "What color is the digit left of the purple 7?", "yellow"),
        ("side_color", "What color is the digit above the yellow 4?", "blue"),
        ("side_check", "Is the digit above the yellow 4 blue?", "yes"),
        ("side_check", "Is the digit above the yellow 4 red?", "no"),
        ("beside_digit", "What digit is below A1?", "1"),
        ("beside_digit", "What digit is right of A2?", "5"),
        ("beside_color", "What color is the digit left of A4?", "blue"),
        ("beside_check", "Is the digit above B1 green?", "no"),
        ("color_check", "Is the digit in B1 green?", "yes"),
        ("digit_check", "Is the digit in B1 a 2?", "no"),
        ("place_check", "Is the blue 5 in B4?", "no"),
    ],
)
def test_answers(kind: str, text: str, answer: str) -> None:
    assert text in KINDS[kind](a_scene())[answer]


def test_a_question_has_one_answer() -> None:
    for index in range(20):
        scene = varied_scene(0, "test", index)
        for function in KINDS.values():
            texts = [text for texts in function(scene).values() for text in texts]
            assert len(texts) == len(set(texts))


def test_things_that_stand_twice_are_not_pointed_at() -> None:
    for kind in ("where", "side_digit", "side_color", "side_check", "place_check"):
        texts = " ".join(t for texts in KINDS[kind](a_scene()).values() for t in texts)
        assert "red 3" not in texts
        assert "blue 5" in texts


def test_rows_with_a_gap_are_not_read() -> None:
    assert list(KINDS["read_row"](a_scene())) == ["1 2 4 7"]


def test_ask_takes_the_rarest_answer() -> None:
    rng = np.random.default_rng(0)
    used: Counter[str] = Counter()
    for index in range(60):
        ask(varied_scene(0, "test", index), "exists", rng, used)
    assert used["yes"] == used["no"] == 30


def test_ask_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="smell.*digit_at"):
        ask(a_scene(), "smell", np.random.default_rng(0))


NAME = rf"(?:{'|'.join(COLOUR_NAMES)}) \d"
SIDE = "|".join(SIDES)
PLACES = ("where", "rows", "beside", "side")


def contents(scene: Scene) -> dict[str, str]:
    """Cell -> `red 3` or `none`."""
    return {cell: describe(scene, [number]).split(" ", 1)[1] for number, cell in enumerate(CELLS)}


def beside(cell: str, side: str) -> str:
    down, right = SIDES[side]
    return f"{ROWS[ROWS.index(cell[0]) + down]}{int(cell[1]) + right}"


def check_places(content: dict[str, str], kind: str, said: str) -> int:
    """`where`, `rows`, `beside` and `side`: every statement is true; their number."""
    if kind == "where":
        items = re.findall(rf"({NAME}) (\w\d)", said)
        assert all(content[cell] == thing for thing, cell in items)
    elif kind == "rows":
        items = re.findall(r"([A-D]) ((?:\w+ ?){4})", said.removeprefix("row "))
        for row, cells in items:
            assert cells.split() == [content[f"{row}{i + 1}"].split()[-1] for i in range(GRID)]
    else:
        side = re.match(SIDE, said).group()
        first = r"\w\d" if kind == "beside" else NAME
        items = re.findall(rf"({first}) ({NAME}|none)", said)
        for start, other in items:
            cell = start if start in content else next(c for c in CELLS if content[c] == start)
            assert content[beside(cell, side)] == other
    return len(items)


def check_claims(content: dict[str, str], kind: str, said: str) -> int:
    """Kinds that end in yes or no: every claim is judged rightly; their number."""
    form = {
        "exists": rf"({NAME})() (yes|no)",
        "color_check": r"(\w\d) (\w+) (yes|no)",
        "digit_check": r"(\w\d) (\d) (yes|no)",
        "place_check": rf"({NAME}) (\w\d) (yes|no)",
        "side_check": rf"((?:{SIDE}) {NAME}) (\w+) (yes|no)",
    }[kind]
    items = re.findall(form, said)
    for first, second, answer in items:
        if kind == "exists":
            true = first in content.values()
        elif kind == "place_check":
            true = content[second] == first
        elif kind == "side_check":
            side = re.match(SIDE, first).group()
            (cell,) = [c for c in CELLS if content[c] == first.removeprefix(f"{side} ")]
            true = second in content[beside(cell, side)].split()
        else:
            true = second in content[first].split()
        assert true == (answer == "yes")
    return len(items)


@pytest.mark.parametrize("kind", list(FACTS))
def test_statements_are_true(kind: str) -> None:
    rng = np.random.default_rng(0)
    checked = 0
    for index in range(20):
        scene = varied_scene(0, "train", index)
        said = facts(scene, kind, rng)
        if said is not None:
            assert len(said.split()) <= 48
            check = check_places if kind in PLACES else check_claims
            checked += check(contents(scene), kind, said)
    assert checked > 20


def test_training_text_depends_on_the_generator_only() -> None:
    scene = varied_scene(0, "train", 8)
    one, two = (statements(scene, np.random.default_rng(4)) for _ in range(2))
    assert one == two
    with pytest.raises(ValueError, match="turns.*0"):
        conversation(scene, 0, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------ files
def load_set(data: Path, name: str) -> tuple[Path, dict, list[dict], list[dict]]:
    folder = builder.eval_root(data) / name
    facts_ = json.loads((builder.eval_root(data) / "index.json").read_text())[name]
    return (
        folder,
        facts_,
        read_lines(folder / facts_["questions"]),
        read_lines(folder / facts_["labels"]),
    )


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_complete_and_balanced(data: Path, name: str) -> None:
    folder, facts_, questions, labels = load_set(data, name)
    assert len(questions) == len(labels) == facts_["n"] >= 300
    for question, label in zip(questions, labels, strict=True):
        assert set(question) == {"question_id", "image", "text", "category"}
        assert {key: label[key] for key in question} == question
        with Image.open(folder / facts_["images"] / question["image"]) as image:
            assert (image.size, image.mode) == ((112, 112), "RGB")
    kinds: dict[str, Counter[str]] = {}
    for label in labels:
        kinds.setdefault(label["kind"], Counter())[label["answer"]] += 1
    for kind, answers in kinds.items():
        if kind != "read_row":
            assert max(answers.values()) <= 1.35 * sum(answers.values()) / len(answers), kind
    assert facts_["chance"] == pytest.approx(chance(labels), abs=0.01)


def test_question_ids_are_the_benchmarks_own(data: Path) -> None:
    for name in ("vqav2", "gqa", "pope"):
        ids = [q["question_id"] for q in load_set(data, name)[2]]
        assert len(set(ids)) == len(ids)
    assert all(q["question_id"] == q["image"] for q in load_set(data, "mme")[2])
    textvqa = load_set(data, "textvqa")[2]
    assert all(f"{q['question_id']}.png" == q["image"] for q in textvqa)
    assert all(isinstance(q["question_id"], str) for q in load_set(data, "gqa")[2])


def test_annotations_agree_with_the_labels(data: Path) -> None:
    folder, facts_, _, labels = load_set(data, "vqav2")
    entries = json.loads((folder / facts_["annotation"]).read_text())["annotations"]
    answers = {e["question_id"]: {a["answer"] for a in e["answers"]} for e in entries}
    assert answers == {label["question_id"]: {label["answer"]} for label in labels}

    folder, facts_, _, labels = load_set(data, "gqa")
    entries = json.loads((folder / facts_["annotation"]).read_text())
    assert {k: e["answer"] for k, e in entries.items()} == {
        label["question_id"]: label["answer"] for label in labels
    }

    folder, facts_, _, labels = load_set(data, "textvqa")
    entries = json.loads((folder / facts_["annotation"]).read_text())["data"]
    assert [e["answers"] for e in entries] == [[label["answer"]] * 10 for label in labels]

    folder, facts_, _, labels = load_set(data, "mme")
    by_image: dict[str, list[dict]] = {}
    for label in labels:
        by_image.setdefault(label["image"], []).append(label)
    for image, pair in by_image.items():
        lines = (folder / facts_["annotation"] / image).with_suffix(".txt").read_text()
        expected = "".join(
            f"{p['text']} Please answer yes or no.\t{p['answer'].capitalize()}\n" for p in pair
        )
        assert lines == expected
        assert sorted(p["answer"] for p in pair) == ["no", "yes"]


def test_pope_asks_18_questions_a_picture(data: Path) -> None:
    folder, _, questions, labels = load_set(data, "pope")
    per = Counter((label["image"], label["category"], label["answer"]) for label in labels)
    assert set(per.values()) == {3}
    assert {category for _, category, _ in per} == set(POPE_CATEGORIES)
    for category in POPE_CATEGORIES:
        lines = read_lines(folder / "coco" / f"coco_pope_{category}.json")
        mine = [label for label in labels if label["category"] == category]
        assert [(x["question_id"], x["text"], x["label"]) for x in lines] == [
            (x["question_id"], x["text"], x["answer"]) for x in mine
        ]
    asked = {c: {q["text"] for q in questions if q["category"] == c} for c in POPE_CATEGORIES}
    assert asked["random"] != asked["adversarial"]


def test_training_files_are_llavas(data: Path) -> None:
    train = data / "digits" / "train"
    for name, per_picture in (
        ("align", 1),
        ("facts", 4),
        ("relations", 4),
        ("questions", 4),
        ("answers", 8),
    ):
        samples = json.loads((train / f"{name}.json").read_text())
        assert len(samples) == 12 * per_picture
        for sample in samples:
            assert (train / "images" / sample["image"]).is_file()
            turns = sample["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            marks = [t["value"].count("<image>") for t in turns]
            assert marks == [1] + [0] * (len(turns) - 1)
    assert len({s["id"] for s in samples}) == len(samples)


def test_a_second_build_changes_nothing(data: Path) -> None:
    files = [p for p in data.rglob("*") if p.is_file() and p.name != "index.json"]
    before = {p: p.stat().st_mtime_ns for p in files}
    builder.main(["--out", str(data), "--seed", str(SEED), "--train-pictures", "12"])
    assert before == {p: p.stat().st_mtime_ns for p in files}


def test_two_builds_are_equal(data: Path, tmp_path: Path) -> None:
    builder.build_eval(tmp_path, SEED, ("pope",))
    ours = builder.eval_root(tmp_path) / "pope"
    other = builder.eval_root(data) / "pope"
    names = sorted(p.relative_to(ours) for p in ours.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert all((ours / n).read_bytes() == (other / n).read_bytes() for n in names)


def test_an_interrupted_build_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(folder: Path, seed: int) -> None:
        (folder / "half.txt").write_text("x")
        raise KeyboardInterrupt

    good = builder.BUILDERS["pope"]
    monkeypatch.setitem(builder.BUILDERS, "pope", stop)
    with pytest.raises(KeyboardInterrupt):
        builder.build_eval(tmp_path, SEED, ("pope",))
    place = builder.eval_root(tmp_path) / "pope"
    assert not place.exists()
    monkeypatch.setitem(builder.BUILDERS, "pope", good)
    assert builder.build_eval(tmp_path, SEED, ("pope",)) == ["pope"]
    assert not (place / "half.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "4"], "was built with"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--seed", str(SEED), "--train-pictures", "0"], "must be 1 or more, got 0"),
    ],
)
def test_bad_builds_end_in_one_line(
    data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        builder.main(["--out", str(data), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    place = builder.eval_root(tmp_path) / "gqa"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not made by this builder"):
        builder.build_eval(tmp_path, SEED, ("gqa",))
    assert (place / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="vizwiz.*vqav2"):
        builder.build_eval(tmp_path, SEED, ("vizwiz",))
