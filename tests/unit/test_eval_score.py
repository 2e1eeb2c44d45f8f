"""llava score, compare and export on small sets: what they write, and what they refuse."""

from __future__ import annotations

import json

import pytest
from places import DATA, ROOT

from llava.cli import main as llava
from llava.eval.benchmarks import BENCHMARKS, get_benchmark, load_benchmark
from llava.eval.layouts import READERS, WORD
from llava.eval.questions import Question
from llava.eval.scorers import SCORERS, score
from llava.eval.submit import UPLOADS
from llava.utils import json_dump

STORED = DATA / "eval"


def lines(path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def pope(tmp_path):
    """POPE with four pictures and six questions each, in LLaVA's layout."""
    folder, asked, number = tmp_path / "data" / "pope", [], 0
    for category in ("adversarial", "popular", "random"):
        labels = []
        for picture in range(4):
            for thing, label in (("cat", "yes"), ("dog", "no")):
                number += 1
                text = f"Is there a {thing} in the image?"
                image = f"COCO_val2014_{picture:012d}.jpg"
                labels.append({"question_id": number, "image": image, "text": text, "label": label})
                asked.append(
                    {
                        "question_id": number,
                        "image": image,
                        "text": text + WORD,
                        "category": category,
                    }
                )
        lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    lines(folder / "llava_pope_test.jsonl", asked)
    return tmp_path


def answer(pope, name: str, wrong: int = 0, drop: int = 0):
    """A run whose first `wrong` answers are wrong and whose last `drop` are missing."""
    folder = pope / "data" / "pope"
    loaded = load_benchmark("pope", pope / "data")
    records = [
        {
            "uid": question.uid, "question_id": question.question_id, "prompt": question.text,
            "text": {"yes": "No", "no": "Yes"}[loaded.labels[question.uid]]
            if place < wrong else loaded.labels[question.uid].capitalize(),
        }
        for place, question in enumerate(loaded.questions)
    ]  # fmt: skip
    run = pope / name
    lines(run / "answers.jsonl", records[: len(records) - drop])
    question_file = str(folder / "llava_pope_test.jsonl")
    settings = {"benchmark": "pope", "question_file": question_file, "limit": None, "plan": "none"}
    json_dump(run / "run.json", settings)
    return run


def fails(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as status:
        llava([str(word) for word in words])
    assert status.value.code == 2
    return capsys.readouterr().err


def test_a_run_is_scored_and_compared(pope, capsys):
    first, second = answer(pope, "a", wrong=6), answer(pope, "b", wrong=1)
    assert llava(["score", str(first), "--all"]) == 0
    shown = capsys.readouterr().out
    assert "mean_f1" in shown
    assert "recall/adversarial" in shown
    scores = json.loads((first / "scores.json").read_text())
    assert scores["metric"] == "mean_f1"
    assert scores["metrics"]["accuracy"]["value"] == 75
    assert [item["score"] for item in scores["per_item"]] == [0] * 6 + [1] * 18
    assert len({item["image"] for item in scores["per_item"]}) == 4
    assert llava(["score", str(second)]) == 0
    table = pope / "compare.json"
    assert llava(["compare", str(first), str(second), "--json", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "B is better on 5 of 24 questions and worse on 0; McNemar's p = 0.0625" in shown
    assert f"\nA  {first}: none\nB  {second}: none\n" in shown
    gain = json.loads(table.read_text())["metrics"]["accuracy"]
    assert (gain["first"], gain["second"]) == (75, pytest.approx(100 * 23 / 24))
    assert gain["low"] <= gain["gain"] <= gain["high"]
    # The pictures gain 1, 2, 2 and 0 of 6: of the 256 draws 2 % gain at most 1, and 6 % gain 8.
    assert (gain["low"], gain["high"]) == pytest.approx((100 * 2 / 24, 100 * 8 / 24))
    plain = pope / "plain.jsonl"
    records = [json.loads(line) for line in (second / "answers.jsonl").read_text().splitlines()]
    lines(plain, [{key: r[key] for key in ("question_id", "prompt", "text")} for r in records])
    flags = ["--benchmark", "pope", "--data-root", str(pope / "data"), "--json", str(table)]
    assert llava(["score", str(plain), *flags]) == 0
    own = json.loads((second / "scores.json").read_text())
    assert json.loads(table.read_text()) == own
    capsys.readouterr()
    flags[-1] = str(plain)
    assert "over what is read from it" in fails(capsys, "score", plain, *flags)
    assert "over what is read from it" in fails(
        capsys, "compare", first, second, "--json", second / "scores.json"
    )
    assert json.loads((second / "scores.json").read_text()) == own


def test_bad_input_changes_nothing(pope, capsys):
    run = answer(pope, "a", drop=2)
    data = ["--data-root", str(pope / "data")]
    (run / "scores.json").write_text("{}")
    assert "2 of 24 questions have no answer: 23 (pope:22:" in fails(capsys, "score", run)
    assert "dialect 'x' of scorer pope; accepted: llava, lmms" in fails(
        capsys, "score", run, "--dialect", "x", "--allow-missing"
    )
    assert "unknown benchmark 'popo'; accepted: digits_vqav2" in fails(
        capsys, "score", run, "--benchmark", "popo"
    )
    assert "say which set it answers" in fails(capsys, "score", run / "answers.jsonl", *data)
    assert "no answers file at" in fails(
        capsys, "score", run / "none.jsonl", "--benchmark", "pope", *data
    )
    other = [{"question_id": 1, "prompt": "Is there a car?", "text": "No"}]
    lines(pope / "other.jsonl", other)
    assert "the answers belong to another question file" in fails(
        capsys, "score", pope / "other.jsonl", "--benchmark", "pope", *data
    )
    assert "pope has no server to upload to; accepted: vqav2" in fails(capsys, "export", run)
    with open(run / "answers.jsonl", "a") as file:
        file.write('{"question_id": 23, "te')
    assert "answers.jsonl:23: no JSON" in fails(capsys, "score", run, "--allow-missing")
    assert (run / "scores.json").read_text() == "{}"
    for content in ("{}", '{"per_item": 3}', '{"per_item": [3], "scorer": "pope", "dialect": "x"}'):
        (run / "scores.json").write_text(content)
        assert "holds no scores with their items" in fails(capsys, "compare", run, run)
    assert "answers file at" in fails(capsys, "score", pope / "absent")
    kept = (run / "run.json").read_text()
    (run / "run.json").write_text("[]")
    for command in (["score"], ["export"]):
        assert "run.json: a JSON object is needed" in fails(capsys, *command, run)
    (run / "run.json").write_text(kept)
    lines(run / "answers.jsonl", [])
    assert llava(["score", str(run), "--allow-missing"]) == 0
    scores = json.loads((run / "scores.json").read_text())
    assert (scores["n"], scores["n_missing"]) == (24, 24)
    assert scores["metrics"]["accuracy"]["value"] == 0


def test_runs_over_other_questions_are_not_compared(pope, capsys):
    first, second = answer(pope, "a"), answer(pope, "b")
    for run in (first, second):
        llava(["score", str(run)])
    scores = json.loads((second / "scores.json").read_text())
    json_dump(second / "scores.json", {**scores, "per_item": scores["per_item"][:-1]})
    assert "not over the same questions: 1 only in the first, 0 only in the second" in fails(
        capsys, "compare", first, second
    )
    json_dump(second / "scores.json", {**scores, "dialect": "lmms"})
    assert "differ in their dialect: 'llava' and 'lmms'" in fails(capsys, "compare", first, second)


def test_uploads_are_checked_before_they_are_written(tmp_path, capsys):
    folder = tmp_path / "data" / "vqav2"
    asked = [{"question_id": i, "image": f"{i}.jpg", "text": "What?"} for i in (4, 5)]
    lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", asked)
    said = [{"question_id": i, "prompt": "What?", "text": "The Two."} for i in (5, 4)]
    lines(tmp_path / "a.jsonl", said)
    target = ["export", str(tmp_path / "a.jsonl"), "--benchmark", "vqav2"]
    target += ["--data-root", str(tmp_path / "data")]
    out = tmp_path / "up" / "vqav2.json"
    assert "the server wants an entry for every test question" in fails(
        capsys, *target, "--output", out
    )
    everything = folder / "llava_vqav2_mscoco_test2015.jsonl"
    lines(everything, [*asked, {**asked[0], "question_id": "6"}])
    assert "question_id must be int, found '6'" in fails(capsys, *target, "--output", out)
    lines(everything, [*asked, asked[0]])
    assert "question_id 4 stands twice" in fails(capsys, *target, "--output", out)
    lines(tmp_path / "a.jsonl", said[:1])
    assert "1 of 2 questions have no answer" in fails(capsys, *target, "--output", out)
    assert not out.exists()
    lines(tmp_path / "a.jsonl", said)
    lines(everything, [*asked, {**asked[0], "question_id": 6}])
    assert llava([*target, "--output", str(out)]) == 0
    assert json.loads(out.read_text()) == [
        {"question_id": 4, "answer": "2"},
        {"question_id": 5, "answer": "2"},
        {"question_id": 6, "answer": ""},
    ]


def test_the_table_fits_together():
    for benchmark in BENCHMARKS.values():
        assert benchmark.scorer in SCORERS
        assert benchmark.dialect in SCORERS[benchmark.scorer].dialects
        assert (benchmark.reader in READERS) == bool(benchmark.reader)
        assert benchmark.upload is None or benchmark.upload in UPLOADS
        assert benchmark.reader or benchmark.upload, f"{benchmark.name} is neither scored nor sent"
        assert "\n" not in benchmark.suffix.lstrip("\n") or benchmark.folder == "vizwiz"


def test_the_documented_table_is_the_one_in_the_code():
    rows = {}
    for line in (ROOT / "docs" / "Evaluation.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[0].strip("`") in BENCHMARKS:
            rows[cells[0].strip("`")] = cells
    assert set(rows) == {name for name in BENCHMARKS if not name.startswith("digits_")}
    for name, cells in rows.items():
        row = BENCHMARKS[name]
        others = [d for d in SCORERS[row.scorer].dialects if d != row.dialect]
        assert cells[1:3] == [f"`{row.folder}/`", f"`{row.questions}`"], name
        assert cells[6:] == [
            str(row.max_new_tokens),
            row.scorer,
            " ".join([f"**{row.dialect}**", *others]),
            row.upload or "-",
        ], name


def test_a_folder_may_differ_in_capitals_and_lie_elsewhere(tmp_path):
    (tmp_path / "mme" / "MME_Benchmark_release_version").mkdir(parents=True)
    lines(tmp_path / "mme" / "llava_mme.jsonl", [])
    with pytest.raises(ValueError, match="has no questions"):
        load_benchmark("mme", tmp_path)
    table = STORED / "mmbench" / "mmbench_dev_20230712.tsv"
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench" / get_benchmark("mmbench_cn").questions).write_bytes(table.read_bytes())
    loaded = load_benchmark("mmbench_cn", tmp_path)  # LLaVA's docs put it beside the English one
    assert loaded.questions[0].text.endswith("\n请直接回答选项字母。")
    assert loaded.questions[0].images[0].startswith("data:image/jpeg;base64,/9j/")


ONE = Question("u", 1, "?", ("a.jpg",))
FOUR_OF_TEN = {"answers": ["red"] * 4 + ["blue"] * 6}
TWO_OF_TEN = {"answers": ["1"] * 2 + ["x"] * 8}
ALL_YES = {"answers": ["Yes"] * 10, "question_type": "q", "answer_type": "a"}
ALL_LOWER = {**ALL_YES, "answers": ["yes"] * 10}
DOG = {"choices": ["cat", "dog"], "correct_choice_idx": 1}
CUP = {
    "answer": "red", "isBalanced": True, "question": "What colour?", "semantic": [],
    "types": {"structural": "query", "semantic": "attr"}, "groups": {"global": None},
}  # fmt: skip
SEED = {"answer": "B", "type": "t", "data_type": "image"}
LETTER = {"answer": "B", "options": ["x", "y"], "subject": "s"}
OPEN = {"answer": ["12.5", "a half"], "options": [], "subject": "s"}


@pytest.mark.parametrize(
    ("scorer", "dialect", "label", "expected"),
    [
        # Who says red sees three others who do, who does not sees four.
        ("ten_answers", "llava", FOUR_OF_TEN, {"Red.": 1.0, "blue": 1.0, "green": 0.0}),
        ("ten_answers", "llava", TWO_OF_TEN, {"One": (2 * (1 / 3) + 8 * (2 / 3)) / 10}),
        # Where all ten say the same, the official code compares texts as they are.
        ("vqav2", "official", ALL_YES, {"Yes": 1.0, "yes": 0.0, "Yes.": 0.0}),
        ("vqav2", "llava", ALL_LOWER, {"Yes.": 1.0, " YES, ": 1.0}),
        ("ai2d", None, {"answer": "2"}, {"C": 1, "c)": 1, "(C)": 1, " C. x": 1, "So C": 0}),
        ("chartqa", None, {"answer": "12%"}, {"0.12": 1, "12.5%": 1, "13%": 0, "12": 0}),
        ("chartqa", None, {"answer": "0"}, {"0": 1, "0.0": 0, "0.001": 0}),
        ("chartqa", None, {"answer": "Yes"}, {"yes ": 1, "Yes.": 0}),
        ("ocrvqa", None, {"answer": "Ann Lee"}, {" ann lee": 1, "ann": 0}),
        ("ocrvqa", "fastv", {"answer": "Ann Lee"}, {"by ann lee": 0.8, "": 0.0}),
        ("aokvqa", None, DOG, {"B": 1, "(B)": 1, "B.": 1, "dog": 1, "Dog": 0, "C": 0}),
        ("aokvqa", "fastv", DOG, {"Bird": 1, "b": 0}),
        ("anls", None, {"answers": ["twelve", "12"]}, {"Twelve ": 1, "twelwe": 5 / 6, "two": 0}),
        ("anls", "lmms", {"answers": ["a  b"]}, {"a b": 1, "a bc": 0.75}),
        ("gqa", "llava", CUP, {"red": 1, "Red..": 1, " red": 0, "red!": 0}),
        ("gqa", "vlmevalkit", CUP, {" Red ": 1, "red.": 0}),
        ("gqa", "lmms", CUP, {" Red! ": 1, "re-d.": 1}),
        ("seed", None, SEED, {"B": 1, "B.": 0, "b": 0}),
        ("seed", "lmms", SEED, {"b) x": 1, "The B": 0}),
        ("mmmu", None, LETTER, {"(B)": 1, "I think B it is": 1, "none": 0}),
        ("mmmu", None, OPEN, {"So x = 12.50": 1, "it is a half of it": 1, "125": 0}),
    ],
)
def test_answers_are_read(scorer, dialect, label, expected):
    for said, value in expected.items():
        scores = score(scorer, [ONE], {"u": label}, {"u": said}, dialect)
        assert scores.per_item[0]["score"] == pytest.approx(value), said
