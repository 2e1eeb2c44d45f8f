"""`llava demo` without its page: plans within the budget, both answers, times, pieces of HTML."""

from __future__ import annotations

import json
import re
import shlex
import socket
from pathlib import Path

import pytest
from PIL import Image
from ports import free_port
from tiny_checkpoint import save_tiny_checkpoint

from llava.reduction import REDUCERS, ReductionPlan
from llava.serve import demo
from llava.serve.engine import Engine

TRAINED = ReductionPlan.pyramid([2, 3], [0.5, 0.25])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    folder = save_tiny_checkpoint(
        tmp_path_factory.mktemp("demo") / "tiny", reduction=TRAINED.to_dict()
    )
    return demo.Demo(Engine.load(folder, device="cpu"))


def picture() -> Image.Image:
    return Image.effect_noise((56, 56), 80).convert("RGB")


def test_every_method_with_shares_is_offered(page: demo.Demo) -> None:
    assert set(page.methods()) <= set(REDUCERS)
    assert {"pyramiddrop", "random", "uniform", "fastv"} <= set(page.methods())


@pytest.mark.parametrize("method", ["pyramiddrop", "fastv", "uniform"])
@pytest.mark.parametrize("percent", [40, 80])
def test_plan_is_within_the_budget_and_is_what_runs(
    page: demo.Demo, method: str, percent: int
) -> None:
    reply = page.ask(picture(), "Is there a 3?", method, percent, repeats=2)
    none, run = reply.scene["runs"]
    assert none["plan"] == "none"
    assert none["average_tokens"] == 16
    assert 0 < run["average_tokens"] <= 16 * percent / 100
    plan = ReductionPlan.parse(shlex.split(reply.flags)[1])
    assert str(plan) == run["plan"]
    assert {cut.reducer.name for cut in plan.cuts} == {method}
    assert [len(series.samples) for series in reply.times] == [2, 2]
    assert all(series.wall_ms > 0 for series in reply.times)


def test_trained_layers_are_taken_where_they_reach(page: demo.Demo) -> None:
    sequence = page.sequence(picture(), "Is there a 3?")
    for percent, layers in ((80, [2, 3]), (30, [1, 2, 3])):
        plan = page.plan(sequence, "pyramiddrop", percent)
        assert [cut.at for cut in plan.cuts] == layers
    with pytest.raises(ValueError, match="reaches 4 to 16"):
        page.plan(sequence, "pyramiddrop", 10)


def test_a_plan_of_ones_own_replaces_the_budget(page: demo.Demo) -> None:
    own = "uniform:layers=[1],ratios=[0.25]"
    reply = page.ask(picture(), " Is there a 3? ", "pyramiddrop", 80, own, repeats=1)
    assert reply.scene["runs"][1]["plan"] == own
    assert reply.flags == f'--reduction "{own}"'
    assert reply.scene["question"] == "Is there a 3?"


def test_html_holds_the_figures_and_escapes_answers(page: demo.Demo) -> None:
    reply = page.ask(picture(), "Is there a 3?", "uniform", 60, repeats=3)
    reply.scene["runs"][1]["answer"] = "<b>3</b>"
    text = demo.answers_html(reply)
    assert "&lt;b&gt;3&lt;/b&gt;" in text
    assert "median of 3 runs" in text
    for run in reply.scene["runs"]:
        assert demo.tera(run["full_tflops"]) in text
    drawn = demo.tokens_html(reply)
    stages = reply.scene["runs"][1]["stages"]
    gone = [svg.count('class="gone"') for svg in re.findall(r"<svg.*?</svg>", drawn, flags=re.S)]
    assert [count for count in gone if count] == [16 - len(s["kept"][0]) for s in stages[1:]]
    assert 'href="#' not in drawn


@pytest.mark.parametrize(
    ("image", "question", "own", "needle"),
    [
        (None, "Is there a 3?", "", "no picture"),
        ("noise", "  ", "", "no question"),
        ("noise", "Is there a 3?", "nosuch:k=1", "nosuch"),
        ("noise", "Is there a 3?", "uniform:layers=[7],ratios=[0.5]", "layer 7"),
    ],
)
def test_bad_input_is_said(
    page: demo.Demo, image: str | None, question: str, own: str, needle: str
) -> None:
    with pytest.raises(ValueError, match=needle):
        page.ask(picture() if image else None, question, "uniform", 50, own)


def test_examples_are_read_from_the_sets(tmp_path: Path) -> None:
    assert demo.digits_examples(tmp_path) == []
    root = tmp_path / "eval" / "digits"
    for name in demo.DIGITS:
        (root / name).mkdir(parents=True)
        entry = {"image": "0.png", "text": f"{name}?"}
        (root / name / "labels.jsonl").write_text(json.dumps(entry) + "\n")
    facts = {name: {"labels": "labels.jsonl", "images": "pictures"} for name in demo.DIGITS}
    (root / "index.json").write_text(json.dumps(facts))
    found = demo.digits_examples(tmp_path)
    assert found[0] == [str(root / "vqav2" / "pictures" / "0.png"), "vqav2?"]
    assert len(found) == 5


def test_bad_flags_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, needle in (
            (["--port", "0"], "--port 0"),
            (["--port", port], f"--port {port} cannot be listened on"),
            (["--host", "256.0.0.1"], "--host 256.0.0.1"),
            (["--port", str(free_port())], "nowhere"),
        ):
            with pytest.raises(SystemExit) as stop:
                demo.main(["--model-path", "nowhere", *words])
            assert stop.value.code == 2
            assert needle in capsys.readouterr().err


def test_a_model_without_a_tower_has_nothing_to_show(page: demo.Demo, monkeypatch) -> None:
    monkeypatch.setattr(page.engine.model, "get_vision_tower", lambda: None)
    with pytest.raises(ValueError, match="has no vision tower"):
        demo.Demo(page.engine)
