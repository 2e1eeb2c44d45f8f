"""LLaVA's scoring scripts and converters on recorded answers: the originals' lines and files."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import DATA, ROOT

from llava.eval import (
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    m4c_evaluator,
    summarize_gpt_review,
)
from llava.utils import get_logger

STORED = DATA / "eval"


def expected(name: str):
    return json.loads((STORED / name / "expected.json").read_text())


def script(name: str, *flags: object) -> None:
    """Run a script of this checkout as a program, in this process."""
    before = sys.argv, list(sys.path)
    sys.argv = [name, *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before


def test_textvqa(capsys):
    folder = STORED / "textvqa"
    flags = ["--annotation-file", str(folder / "TextVQA_0.5.1_val.json")]
    eval_textvqa.main([*flags, "--result-file", str(folder / "answers.jsonl")])
    assert capsys.readouterr().out.strip() == expected("textvqa")["printed"]
    with pytest.raises(SystemExit) as status:
        eval_textvqa.main(flags)
    assert status.value.code == 2


def test_pope(capsys):
    folder = STORED / "pope"
    eval_pope.main(
        [
            "--annotation-dir", str(folder / "coco"),
            "--question-file", str(folder / "llava_pope_test.jsonl"),
            "--result-file", str(folder / "answers.jsonl"),
        ]
    )  # fmt: skip
    blocks = capsys.readouterr().out.split("=" * 36 + "\n")[:-1]
    names = [block.split(":")[1].split(",")[0].strip() for block in blocks]
    assert names == ["adversarial", "popular", "random"]
    for name, block in zip(names, blocks, strict=True):
        row = expected("pope")["categories"][name]
        lines = block.splitlines()
        assert lines[2] == f"{row['TP']}\t{row['FP']}\t{row['TN']}\t{row['FN']}"
        for line, key in zip(
            lines[3:8], ("accuracy", "precision", "recall", "f1", "yes_ratio"), strict=True
        ):
            assert float(line.split(": ")[1]) == pytest.approx(row[key], rel=1e-12)


def test_scienceqa(tmp_path, capsys, caplog):
    get_logger("llava").addHandler(caplog.handler)
    folder = STORED / "scienceqa"
    output, result = tmp_path / "output.jsonl", tmp_path / "result.json"
    eval_science_qa.main(
        [
            "--base-dir", str(folder), "--result-file", str(folder / "answers.jsonl"),
            "--output-file", str(output), "--output-result", str(result),
        ]
    )  # fmt: skip
    get_logger("llava").removeHandler(caplog.handler)
    recorded = expected("scienceqa")
    assert capsys.readouterr().out.strip() == recorded["printed"]
    assert "5 of 200 problems have no answer" in caplog.text
    written = json.loads(result.read_text())
    assert written["results"] == recorded["pred_index"]
    assert (written["acc"], written["correct"]) == (recorded["accuracy"], recorded["correct"])
    entries = json.loads(output.read_text())
    assert len(entries["correct"]) == recorded["correct"]
    for entry in entries["correct"] + entries["incorrect"]:
        parsed = recorded["per_item"][entry["question_id"]]
        assert entry["parsed_ans"] == parsed["parsed"]
        assert entry["is_multimodal"] == parsed["is_multimodal"]


def test_seed(tmp_path, capsys):
    folder, upload = STORED / "seed_bench", tmp_path / "upload.jsonl"
    script(
        "convert_seed_for_submission.py",
        "--annotation-file", folder / "SEED-Bench.json",
        "--result-file", folder / "answers.jsonl", "--result-upload-file", upload,
    )  # fmt: skip
    assert capsys.readouterr().out.splitlines() == expected("seed_bench")["printed"]
    lines = [json.loads(line) for line in upload.read_text().splitlines()]
    assert lines == expected("seed_bench")["upload"]


def test_reviews(capsys):
    file = STORED / "llava-bench-in-the-wild" / "reviews.jsonl"
    summarize_gpt_review.main(["-f", str(file)])
    assert capsys.readouterr().out.splitlines() == expected("llava-bench-in-the-wild")["printed"]
    # Reviews whose numbers were not read yet, of all files in a folder those with this name.
    folder = ["-d", str(file.parent)]
    summarize_gpt_review.main([*folder, "-s", "raw", "-v", "0314"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["raw_reviews", *expected("llava-bench-in-the-wild")["printed"][1:]]
    summarize_gpt_review.main([*folder, "-v", "0613"])
    assert capsys.readouterr().out == ""


def test_vqav2(tmp_path):
    folder = STORED / "vqav2"
    base = tmp_path / "vqav2"
    answers = base / "answers" / "split" / "model"
    answers.mkdir(parents=True)
    shutil.copy(folder / "answers.jsonl", answers / "merge.jsonl")
    name = "llava_vqav2_mscoco_test2015.jsonl"
    shutil.copy(folder / "llava_vqav2_questions.jsonl", base / name)
    extra = {"question_id": 5, "image": "x.jpg", "text": "?", "category": "default"}
    with open(base / name, "a") as file:  # a test question that was not asked
        file.write(json.dumps(extra) + "\n")
    script("convert_vqav2_for_submission.py", "--dir", base, "--ckpt", "model", "--split", "split")
    upload = json.loads((base / "answers_upload" / "split" / "model.json").read_text())
    assert upload == [*expected("vqav2")["upload_json"], {"question_id": 5, "answer": ""}]


def test_gqa_and_mmbench(tmp_path):
    script(
        "convert_gqa_for_eval.py",
        "--src", STORED / "gqa" / "answers.jsonl", "--dst", tmp_path / "gqa.json",
    )  # fmt: skip
    predictions = json.loads((tmp_path / "gqa.json").read_text())
    assert predictions == expected("gqa")["converted_predictions"]
    openpyxl = pytest.importorskip("openpyxl")
    folder = STORED / "mmbench"
    script(
        "convert_mmbench_for_submission.py",
        "--annotation-file", folder / "mmbench_dev_20230712.tsv", "--result-dir", folder,
        "--upload-dir", tmp_path / "upload", "--experiment", "answers",
    )  # fmt: skip
    books = tmp_path / "upload" / "answers.xlsx", folder / "expected_upload.xlsx"
    written, recorded = (
        list(openpyxl.load_workbook(book).active.iter_rows(values_only=True)) for book in books
    )
    assert written == recorded


def test_mme(tmp_path, capsys):
    base = tmp_path / "MME"
    shutil.copytree(STORED / "mme", base)
    (base / "answers").mkdir()
    shutil.copy(base / "answers.jsonl", base / "answers" / "model.jsonl")
    script("convert_answer_to_mme.py", "--dir", base, "--experiment", "model")
    script("calculation.py", "--results_dir", base / "eval_tool" / "answers" / "model")
    lines = capsys.readouterr().out.splitlines()
    recorded = expected("mme")
    totals = [float(line.split(":")[1]) for line in lines if line.startswith("total score")]
    assert totals == [recorded["perception"], recorded["cognition"]]
    points = {line.split()[0]: float(line.split(":")[1]) for line in lines if line.startswith("\t")}
    assert points == recorded["per_category"]


def test_vizwiz_and_mmvet(tmp_path):
    asked = [
        {"question_id": i, "image": f"VizWiz_test_{i:08d}.jpg", "text": "What?"} for i in (3, 4)
    ]
    said = [
        {"question_id": i, "prompt": "What?", "text": text}
        for i, text in ((4, "Two, no?"), (3, "The cat's"))
    ]
    files = {"q.jsonl": asked, "a.jsonl": said}
    for name, records in files.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    script(
        "convert_vizwiz_for_submission.py", "--annotation-file", tmp_path / "q.jsonl",
        "--result-file", tmp_path / "a.jsonl", "--result-upload-file", tmp_path / "up.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"image": "VizWiz_test_00000003.jpg", "answer": "cat 's"},
        {"image": "VizWiz_test_00000004.jpg", "answer": "2 no"},
    ]
    script(
        "convert_mmvet_for_eval.py", "--src", tmp_path / "a.jsonl", "--dst", tmp_path / "vet.json"
    )
    assert json.loads((tmp_path / "vet.json").read_text()) == {
        "v1_4": "Two, no?",
        "v1_3": "The cat's",
    }


def test_evaluator_names():
    """What code written for LLaVA imports."""
    processor = m4c_evaluator.EvalAIAnswerProcessor()
    assert processor("The two Cats, it's 1,000!") == "2 cats it 's 1000"
    entry = {"pred_answer": "Cat", "gt_answers": ["cat"] * 3 + ["dog"] * 7}
    accuracy = m4c_evaluator.TextVQAAccuracyEvaluator().eval_pred_list([entry])
    assert accuracy == pytest.approx((3 * (2 / 3) + 7) / 10)
    assert m4c_evaluator.STVQAAccuracyEvaluator().eval_pred_list([entry]) == 1
    near = {"pred_answer": "cart", "gt_answers": ["cat"]}
    assert m4c_evaluator.STVQAANLSEvaluator().eval_pred_list([near]) == 0.75


def test_a_script_runs_from_anywhere(tmp_path):
    path = ROOT / "scripts" / "convert_gqa_for_eval.py"
    command = [sys.executable, str(path), "--src", "none.jsonl", "--dst", "out.json"]
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: file not found: none.jsonl"
    assert not list(Path(tmp_path).iterdir())
