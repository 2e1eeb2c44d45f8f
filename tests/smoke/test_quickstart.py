"""The quickstart from data to page on two checkpoints with random weights."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint

from llava import quickstart
from llava.eval import quickstart as measure
from llava.eval.benchmarks import load_benchmark
from llava.reduction import ReductionPlan
from llava.reduction.budget import figures
from llava.reduction.flops import Preset, get_preset

PRESET = Preset(get_preset("tiny").shape, 8, 64, 12, "none")
SETTINGS = measure.settings([2, 4, 5], PRESET)
PLAN = ReductionPlan.pyramid([1, 2, 3], [0.5, 0.25, 0.125])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two checkpoints (one with a plan of its own) and a data folder with the evaluation sets."""
    root = tmp_path_factory.mktemp("quickstart")
    plain = save_tiny_checkpoint(root / "plain")
    trained = save_tiny_checkpoint(root / "trained", reduction=PLAN.to_dict())
    quickstart.build_data(root / "data")
    return plain, trained, root / "data"


def test_from_data_to_page(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, trained, data = folders
    one_budget = functools.partial(measure.settings, budgets=(0.5,))
    monkeypatch.setattr(measure, "settings", one_budget)
    words = ["--checkpoints", str(plain), str(trained), "--data", str(data)]
    words += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "copy.json")]
    quickstart.main([*words, "--limit", "4", "--repeats", "1", "--no-bench", "--workers", "1"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8")) == summary
    rows = summary["rows"]
    sets = 5
    loaded = load_benchmark("digits_vqav2", data / "eval")
    settings = measure.settings([1, 2, 3], measure.typical(measure.Checkpoint.load(plain), loaded))
    assert len(rows) == 2 * len(settings) * sets
    methods = {setting.plan_method for setting in settings}
    assert methods == {"none", *measure.method_names()}
    compared = summary["comparisons"]
    of_methods = [s for s in settings if s.budget and s.plan_method not in measure.BASELINES]
    assert len(compared) == 2 * 2 * len(of_methods)
    for each in compared:
        assert each["low"] <= each["value"] <= each["high"]
        assert each["value"] == pytest.approx(100 * (each["better"] - each["worse"]) / each["n"])
    assert {row["checkpoint"] for row in rows} == {"plain", "trained"}
    for row in rows:
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["n"] >= 1
        assert row["prefill_ms"] > 0
        assert row["decode_ms"] > 0
    none = next(row for row in rows if row["plan"] == "none")
    half = next(
        row for row in rows if row["plan"].startswith("pyramiddrop") and row["budget"] == 0.5
    )
    assert half["kept_tokens"] == [16, 8, 4, 2]
    assert half["visual_tmacs"] < none["visual_tmacs"]
    assert half["full_tflops"] < none["full_tflops"]
    assert none["share_of_ideal"] is None
    assert half["share_of_ideal"] > 0
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(summary["examples"]) + 1
    printed = capsys.readouterr().out
    assert "than random" in printed
    assert f"pyramiddrop {100 * half['flops_budget']:.0f} %" in printed


def test_workers_give_the_same_rows(folders: tuple[Path, Path, Path]) -> None:
    plain, _, data = folders
    jobs = [
        measure.Job(str(plain), str(data / "eval"), name, setting, 4, 8)
        for setting in [*SETTINGS[:2], measure.Setting("pyramiddrop", PLAN)]
        for name in ("digits_gqa", "digits_mme")
    ]
    pairs = [measure.do_jobs(jobs, workers) for workers in (1, 2)]
    for alone, spread in zip(*pairs, strict=True):
        assert alone.scores == spread.scores
        rows = [{**each.row, "questions_per_second": 0} for each in (alone, spread)]
        assert rows[0] == rows[1]


def test_plans_of_a_budget_stay_within_its_flops() -> None:
    """Every method comes, and none spends more than the PyramidDrop plan it is compared with."""
    whole = figures(PRESET, ReductionPlan()).full_tflops
    assert [setting.label for setting in SETTINGS[:2]] == ["none", "blind"]
    assert len({setting.label for setting in SETTINGS}) == len(SETTINGS)
    for setting in SETTINGS[2:]:
        spent = figures(PRESET, setting.plan).full_tflops / whole
        assert spent <= setting.share * (1 + 1e-6)
        assert setting.plan_method == setting.label.split()[0]
        if setting.plan_method in ("pyramiddrop", "random", "uniform"):
            assert spent == pytest.approx(setting.share)


def test_comparisons_pair_the_questions() -> None:
    """Three questions about two pictures; the method is right where the control is wrong twice."""
    plans = [s for s in SETTINGS if s.budget == 0.5 and s.plan_method in ("fastv", "random")]
    scores = {"fastv": (1.0, 1.0, 0.0), "random": (0.0, 0.0, 1.0)}
    answered = [
        measure.Answered({}, scores[setting.plan_method], ("a", "a", "b")) for setting in plans
    ]
    (found,) = measure.comparisons("m", plans, answered)
    assert (found["method"], found["control"]) == ("fastv", "random")
    assert found["value"] == pytest.approx(100 / 3)
    assert (found["better"], found["worse"], found["n"]) == (2, 1, 3)
    assert (found["low"], found["high"]) == (-100.0, 100.0)  # either picture may be drawn twice


def test_cuts_are_those_the_checkpoint_was_trained_with(folders: tuple[Path, Path, Path]) -> None:
    plain, trained = (measure.Checkpoint.load(folder) for folder in folders[:2])
    assert measure.cut_layers([plain]) == [1, 2, 3]
    other = ReductionPlan.pyramid([2], [0.5])
    trained.model.config.visual_token_reduction = other.to_dict()
    assert measure.cut_layers([plain, trained]) == [2]


def test_workload_of_real_questions_is_padded_left(folders: tuple[Path, Path, Path]) -> None:
    plain, _, data = folders
    checkpoint = measure.Checkpoint.load(plain)
    loaded = load_benchmark("digits_gqa", data / "eval")
    work = checkpoint.workload(loaded.questions[:8], loaded.image_folder, new_tokens=2)
    assert len(set(work.mask.sum(1).tolist())) > 1
    assert bool(work.mask[:, -1].all())
    assert work.sequence().layout.lengths == tuple((work.mask.sum(1) + 15).tolist())
    assert torch.is_tensor(work.images[0])


def test_speed_counts_every_set_once(folders: tuple[Path, Path, Path], monkeypatch) -> None:
    plain, _, data = folders
    checkpoint, asked = measure.Checkpoint.load(plain), []
    sets = [load_benchmark(name, data / "eval") for name in ("digits_gqa", "digits_mme")]
    ticks = iter([10.0, 14.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(measure, "run", lambda c, loaded, *_: asked.append(len(loaded.questions)))
    assert measure.questions_per_second(checkpoint, sets, SETTINGS[0], 20) == 40 / 4
    assert asked == [20, 20, 20]


@pytest.mark.parametrize(
    ("rate", "answers", "expected"), [(100.0, 110, 162), (1.0, 110, 36), (1000.0, 110, 1620)]
)
def test_limit_follows_the_speed(rate: float, answers: int, expected: int) -> None:
    assert quickstart.choose_limit(rate, answers, minutes=3.0) == expected


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["--checkpoints", "nowhere"], "no checkpoint in nowhere"),
        (["--limit", "0"], "--limit 0"),
        (["--workers", "0"], "--workers 0"),
    ],
)
def test_bad_flags_are_one_line(
    words: list[str], needle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        quickstart.main([*words, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert needle in written
    assert written.count("\n") == 1
    assert not (tmp_path / "out").exists()
