"""The two shipped checkpoints: what their folders hold, and that they answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import ROOT

from llava.digits.build import build_eval
from llava.digits.sets import SETS
from llava.eval.benchmarks import load_benchmark
from llava.eval.run import evaluate
from llava.model.builder import load_pretrained_model
from llava.reduction.plan import ReductionPlan

CHECKPOINTS = {
    "llava-digits": None,
    "llava-digits-pdrop": "pyramiddrop:layers=[2,4,5],ratios=[0.6,0.36,0.216]",
}


def folder_of(name: str) -> Path:
    return ROOT / "checkpoints" / name


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation sets of a seed that no shipped figure uses."""
    out = tmp_path_factory.mktemp("digits")
    build_eval(out, seed=11)
    return out / "eval"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_folder_holds_all_and_only_what_is_needed(name: str) -> None:
    files = {path.name: path.stat().st_size for path in folder_of(name).iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(files.values()) < 10 * 2**20


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_text_files_name_no_place_of_a_machine(name: str) -> None:
    for file in ("README.md", "config.json", "tokenizer_config.json", "training.json"):
        text = (folder_of(name) / file).read_text(encoding="utf-8")
        for place in ("/home/", "/root/", "/work/", "/tmp/", "scratch"):
            assert place not in text, file


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_training_is_recorded(name: str) -> None:
    made = json.loads((folder_of(name) / "training.json").read_text(encoding="utf-8"))
    assert made["command"].endswith("bash scripts/digits/train.sh")
    assert 0 < made["seconds"] < 2 * 3600
    for stage in made["stages"].values():
        assert stage["command"]
        assert stage["environment"]["torch"]
    config = json.loads((folder_of(name) / "config.json").read_text(encoding="utf-8"))
    plan = config["visual_token_reduction"]
    expected = CHECKPOINTS[name]
    assert (plan is None) == (expected is None)
    if expected:
        assert ReductionPlan.parse(plan) == ReductionPlan.parse(expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_answers_unseen_questions(name: str, data_root: Path) -> None:
    """75 of every 100 of a small sample: far above chance, far below what it reaches."""
    tokenizer, model, processor, _ = load_pretrained_model(
        str(folder_of(name)), None, name, device="cpu", device_map=None
    )
    for kind in SETS:
        loaded = load_benchmark(f"digits_{kind}", data_root, limit=36)
        seen = evaluate(model, tokenizer, processor, loaded, reduction="none", batch_size=16)
        assert seen.row["accuracy"] > 75, kind
        if kind in ("textvqa", "gqa"):
            blind = evaluate(
                model, tokenizer, processor, loaded, reduction="none", batch_size=16, blind=True
            )
            assert blind.row["accuracy"] < 55, kind
