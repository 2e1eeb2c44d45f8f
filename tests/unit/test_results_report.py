"""Run folders written by hand become a table, a page and files; damaged ones are named."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from llava.eval import collect, results_report
from llava.eval.paper_tables import PAPER_TABLES, papers_average
from llava.eval.run_folder import config_hash

CONFIG_15 = {"model_type": "llava_llama", "num_hidden_layers": 32, "hidden_size": 4096}
PYRAMID = "pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]"
RANDOM = "random:layers=[8],ratios=[0.5]"
CUTS = {"none": [], PYRAMID: [[8, 288], [16, 144], [24, 72]], RANDOM: [[8, 288]]}


def write_run(
    root: Path,
    benchmark: str = "pope",
    plan: str = "none",
    *,
    value: float = 85.9,
    rate: float = 10.0,
    tera: float = 4.0,
    metric: str = "f1",
    metrics: dict[str, Any] | None = None,
    **changed: Any,
) -> Path:
    """A finished run of two questions on a checkpoint with the shape of LLaVA-1.5-7B."""
    model = root / "llava-v1.5-7b"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG_15))
    settings = {
        "benchmark": benchmark, "plan": plan, "model_path": str(model), "model_base": None,
        "model_files": "c0ffee", "load": "full", "n": 2, "questions_sha256": "ab" * 32,
        "share_prefix": True, "blind": False, "batch_size": 32, "dtype": "float16",
        "attention": "sdpa", **changed,
    }  # fmt: skip
    run_id = config_hash(settings)
    speed = {
        "questions": 2, "questions_per_second": rate, "first_token_ms": 31.0,
        "tera_flops": 2 * tera,
        "seconds": {"wait": 0.0, "vision": 0.5 / rate, "prefill": 1.0 / rate, "decode": 0.5 / rate},
        "world_size": 1,
    }  # fmt: skip
    there = {"commit": "0123456789ab+", "torch": "2.13.0", "transformers": "5.23.0", "gpu": "A GPU"}
    run = {
        "v": 1, "run_id": run_id, "hashed": sorted(settings), **settings, "plan_source": "flag",
        "checkpoint": "llava-v1.5-7b", "speed": speed, "environment": there,
    }  # fmt: skip
    folder = root / "results" / benchmark / run_id
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    visual = {"in": 576, "layers": CUTS[plan]}
    lines = [{"uid": str(i), "run_id": run_id, "n_visual": visual} for i in range(2)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"value": value, "low": value - 2, "high": value + 2, "n": 2}
    scores = {
        "scorer": benchmark, "dialect": "llava", "metric": metric, **entry, "interval": "bootstrap",
        "n_missing": 0, "metrics": metrics or {metric: entry}, "per_item": [{"uid": "0"}],
    }  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """POPE and MME, three plans; pyramiddrop shares less and loses where questions share."""
    for share, rates in ((True, (20.0, 12.0)), (False, (5.0, 8.0))):
        write_run(tmp_path, rate=rates[0], tera=2.0 if share else 8.0, share_prefix=share)
        write_run(tmp_path, plan=PYRAMID, value=84.1, rate=rates[1], tera=3.0, share_prefix=share)
    write_run(tmp_path, plan=RANDOM, value=80, rate=9.0, tera=1.5)
    perception = {"perception": {"value": 1500.0, "low": 1450.0, "high": 1550.0, "n": 2}}
    write_run(tmp_path, "mme", value=1500, metric="perception", metrics=perception)
    write_run(tmp_path, "mme", PYRAMID, value=1400, metric="perception",
              metrics={"perception": {"value": 1400.0}})  # fmt: skip
    return tmp_path / "results"


def test_everything_arrives_in_all_outputs(results: Path, tmp_path: Path, capsys: Any) -> None:
    out, markdown, table, objects = (tmp_path / n for n in ("r.html", "r.md", "r.csv", "r.json"))
    arguments = [*map(str, results.iterdir()), "--out", str(out), "--markdown", str(markdown)]
    assert results_report.main([*arguments, "--csv", str(table), "--json", str(objects)]) == 0
    text, page = capsys.readouterr().out, out.read_text()
    for content in (text, page, markdown.read_text()):
        assert "576 → 288 @8 → 144 @16 → 72 @24" in content
        assert "loses to no dropping because it shares less" in content
        assert "in front of layer 8" in content
        assert "1.50 times the FLOPs" in content
        assert "1.60 times as many questions/s" in content  # 8 against 5 on whole prompts
        assert "published: liuhaotian/llava-v1.5-7b" in content
        assert "1510.70" in content
        assert "MME's perception" in content.replace("&#x27;", "'")
        assert "random:layers=[8],ratios=[0.5] is slower than no dropping" in content
    assert "0123456789ab+" in page
    assert not re.search(r"<script|(src|href)=[\"']http", page)
    assert page.count("<svg") == 6  # two a set, two for the average
    assert 'fill="#fff" stroke="#2457d6"' in page  # a ring: whole prompts
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == len(json.loads(objects.read_text())["runs"]) == 7
    (row,) = (r for r in rows if r["plan"] == PYRAMID and r["benchmark"] == "mme")
    assert row["kept_tokens"] == "0:576 8:288 16:144 24:72"
    assert (float(row["published"]), float(row["value"])) == (1510.7, 1400)
    assert float(row["milliseconds"]) == pytest.approx(100.0)
    assert float(row["tera_flops"]) == pytest.approx(4.0)


def test_only_comparable_runs_stand_together(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, load="4bit")
    write_run(tmp_path, questions_sha256="cd" * 32)
    write_run(tmp_path, plan=PYRAMID, n=2, batch_size=1)
    groups = collect.grouped(collect.collect([tmp_path / "results"]).runs)
    assert sorted(len(group) for group in groups) == [1, 3]
    (large,) = (group for group in groups if len(group) == 3)
    names = {"batch size 32", "batch size 32, 4bit", "batch size 1"}
    assert set(collect.variants(large)) == names


def test_the_papers_average(results: Path) -> None:
    """Mean of the columns with MME's perception / 20; a plan that lacks a set has none."""
    groups = collect.grouped(collect.collect([results]).runs)
    found = {(each.plan, each.variant): each for each in collect.averages(groups)}
    assert set(found) == {("none", ""), (PYRAMID, "")}
    assert found["none", ""].columns == ("POPE", "MME")
    assert found["none", ""].value == pytest.approx((85.9 + 1500 / 20) / 2)
    assert found[PYRAMID, ""].value == pytest.approx((84.1 + 70) / 2)
    # A line of LLaVA-1.5-7B by hand: (62.0 + 66.8 + 64.3 + 85.9 + 58.2 + 75.535) / 6
    line = {"GQA": 62.0, "SQA": 66.8, "MMB": 64.3, "POPE": 85.9, "TextVQA": 58.2, "MME": 1510.7}
    assert papers_average(line) == pytest.approx(68.7892, abs=1e-4)
    with pytest.raises(ValueError, match="no columns"):
        papers_average({})


def test_papers_stand_beside_own_runs(results: Path) -> None:
    """Rows of the methods that were run, each figure once; averages over the same columns."""
    groups = collect.grouped(collect.collect([results]).runs)
    (pope,) = (group for group in groups if group[0].benchmark == "pope")
    assert results_report.published_rows(pope) == [("published: liuhaotian/llava-v1.5-7b", 85.9)]
    said = {line.split(": ", 1)[0]: line for line in results_report.paper_sentences(pope)}
    assert said["PyramidDrop, table 1"].endswith("no dropping 85.9; pyramiddrop, 1.78 T 84.8")
    assert "pyramiddrop, trained with it 86.0" in said["PyramidDrop, table 3"]
    assert set(said) == {*(f"PyramidDrop, table {n}" for n in (1, 3, 5)), "YOPO, table 2"}
    assert "fastv" not in str(said)  # nobody ran it
    page = results_report.group_section(pope)
    assert "pyramiddrop, 1.78 T <b>84.8</b>" in page
    (found,) = results_report.by_columns(collect.averages(groups))
    lines = {name: figures for name, *figures in results_report.published_averages(found)}
    own = lines["published: pyramiddrop, 1.78 T, PyramidDrop, table 1"]
    assert own[:3] == ["84.80", "1500.80", f"{(84.8 + 1500.8 / 20) / 2:.2f}"]
    assert "published: pyramiddrop, λ = 0.5, trained with it, PyramidDrop, table 7" not in lines


def test_the_rule_gives_the_averages_that_pyramiddrop_prints() -> None:
    """Printed figures are rounded to 0.1, so an average of them may be 0.05 off, and is rounded
    again. One line of FastV is further off, by 0.002."""
    asked, outside = 0, []
    for table in PAPER_TABLES:
        for row in table.rows:
            if row.average is None:
                continue
            asked += 1
            off = abs(papers_average(table.scores(row)) - row.average)
            if off > 0.1:
                outside.append((table.source, row.model, row.method))
                assert off < 0.11
            if row.method in ("none", "pyramiddrop"):
                assert off <= 0.1
    assert asked == 37
    assert outside == [("PyramidDrop, table 1", "liuhaotian/llava-v1.5-7b", "fastv")]
    # No other way to count MME does: not as it is, not of 2,800, not left out.
    for scale in (1.0, 28.0, None):
        wrong = 0
        for table in PAPER_TABLES:
            for row in table.rows:
                scores = table.scores(row)
                mme = scores.pop("MME", None)
                if mme is not None and row.average is not None:
                    values = [*scores.values(), *([] if scale is None else [mme / scale])]
                    wrong += abs(sum(values) / len(values) - row.average) > 0.1
        assert wrong >= 18


def test_the_page_of_results_shows_every_line() -> None:
    page = (ROOT / "docs" / "Results.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.split("|")] for line in page.splitlines() if "|" in line
    ]
    numbers = [[float(c) for c in line if re.fullmatch(r"\d+(\.\d+)?", c)] for line in lines]
    for table in PAPER_TABLES:
        for row in table.rows:
            wanted = [*row.values, *([] if row.average is None else [row.average])]
            if table.source.startswith("FastV"):  # other columns stand between
                assert any(set(wanted) <= set(line) for line in numbers), row
            else:
                assert any(line[-len(wanted) :] == wanted for line in numbers), row


def _settings_changed(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "plan": PYRAMID}))


def _answer_lost(folder: Path) -> None:
    path = folder / "answers.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])


def _answers_of_another(folder: Path) -> None:
    path = folder / "answers.jsonl"
    path.write_text(re.sub(r'"run_id": "\w+"', '"run_id": "feedfacefeed"', path.read_text()))


def _torn(folder: Path) -> None:
    path = folder / "run.json"
    path.write_text(path.read_text()[:100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_settings_changed, "are not those of run"),
        (_answer_lost, "1 answers to 2 questions"),
        (_answers_of_another, "an answer of another run, feedfacefeed"),
        (_torn, "no JSON"),
        (lambda folder: (folder / "scores.json").write_text("{}"), "lacks metric, value"),
    ],
)
def test_damaged_runs_are_refused_by_name(
    damage: Any, words: str, tmp_path: Path, capsys: Any
) -> None:
    write_run(tmp_path)
    folder = write_run(tmp_path, share_prefix=False)
    damage(folder)
    out = tmp_path / "page.html"
    arguments = [str(tmp_path / "results"), "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        results_report.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert folder.name in error
    assert not out.exists()
    assert results_report.main([*arguments, "--skip-damaged"]) == 0
    page = out.read_text()
    assert folder.name in page
    assert "1 run on 1 set" in page


def test_unfinished_unscored_and_missing(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        results_report.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        results_report.main([str(tmp_path)])
    assert "no run below" in capsys.readouterr().err
    (write_run(tmp_path, "vqav2") / "scores.json").unlink()
    unfinished = write_run(tmp_path)
    (unfinished / "answers.jsonl").unlink()
    out = tmp_path / "page.html"
    assert results_report.main([str(tmp_path / "results"), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "not scored" in shown.out
    assert f"not finished, left out: {unfinished}" in shown.err
    assert "<svg" not in out.read_text()
