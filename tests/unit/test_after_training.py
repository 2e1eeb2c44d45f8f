"""What is made of a finished run: merged weights, the projector's own file, the model card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from miniatures import (
    edit,
    equal,
    hf_model,
    inputs,
    load,
    write_base,
    write_hf,
    write_json,
    write_lora,
    write_original,
    write_projector_only,
)
from places import ROOT

from llava.model.convert import convert, extract_projector
from llava.model.model_card import MARK, main, write_card

SCORES = {"metric": "f1", "value": 85.123, "low": 83.0, "high": 87.0, "n": 90}


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_lora_weights_are_merged_by_llavas_script(tmp_path):
    base = write_base(tmp_path / "a")
    reference = write_lora(tmp_path / "b", base, old_peft=True)
    words = ["--model-path", tmp_path / "b", "--model-base", tmp_path / "a"]
    done = run("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        merged = load(tmp_path / "whole", dtype=None).model
        equal(merged(**inputs(False)).logits, reference(**inputs(False)).logits, 2e-5)
    again = run("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "whole")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr
    (tmp_path / "b" / "non_lora_trainables.bin").unlink()
    lacking = run("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "other")
    assert lacking.returncode == 2
    assert "missing: model.mm_projector.0.bias" in lacking.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["v1.5-7b", "v1.6-vicuna-7b", "llava_next", "lora", "projector"])
def test_the_projector_is_taken_out_of_every_kind_of_folder(kind, tmp_path):
    """.bin and safetensors, shards, the other layout's names, adapters."""
    source, base = tmp_path / "x", None
    if kind == "llava_next":
        write_hf(source, hf_model(kind, "llama"), "hub", "safetensors")
    elif kind in ("lora", "projector"):
        base = write_base(tmp_path / "a")
        if kind == "lora":
            write_lora(source, base, old_peft=False)
        else:
            write_projector_only(source, base, "base_model.")
    else:
        write_original(source, kind)
    model = load(source, *([tmp_path / "a"] if base is not None else [])).model
    names = extract_projector(source, tmp_path / "new" / "mm_projector.bin")
    found = torch.load(tmp_path / "new" / "mm_projector.bin", weights_only=True)
    assert sorted(found) == names
    parts = {name: value for name, value in model.state_dict().items() if name in found}
    assert len(parts) == len(names) == (5 if kind in ("v1.6-vicuna-7b", "llava_next") else 4)
    assert all(
        torch.equal(found[name], value.to(found[name].dtype)) for name, value in parts.items()
    )


def test_the_script_names_what_has_no_projector(tmp_path):
    write_base(tmp_path / "a")
    out = tmp_path / "mm_projector.bin"
    done = run("extract_mm_projector.py", "--model-path", tmp_path / "a", "--output", out)
    assert done.returncode == 2
    assert "holds no projector" in done.stderr
    assert not out.exists()


def scored(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "scores.json", SCORES)
    write_json(folder / "run.json", {"benchmark": "pope", "plan": "fastv:k=2,r=0.5"})
    return folder


def test_a_card_says_what_the_files_say(tmp_path):
    write_original(tmp_path / "x", "v1.5-7b")
    plan = {"positions": "renumber", "cuts": [{"at": 2, "method": "pyramiddrop", "ratio": 0.5}]}
    edit(tmp_path / "x", visual_token_reduction=plan)
    summary = {
        "train_loss": 1.23456,
        "steps": 40,
        "data_hash": "abc123",
        "trained_parameters": {"language": 1200, "projector": 34, "tower": 0},
        "gpu_hours": 2.5,
        "flags": {"model_name_or_path": "lmsys/vicuna-7b-v1.5", "learning_rate": 2e-05},
        "environment": {"python": "3.11", "torch": "2.13.0", "commit": "deadbeef"},
    }
    write_json(tmp_path / "x" / "train_summary.json", summary)
    runs = [str(scored(tmp_path / "results" / "one"))]
    for to in ("hf", "llava"):
        convert(tmp_path / "x", tmp_path / to, to, scores=runs)
    main([str(tmp_path / "x"), "--scores", *runs])
    for name in ("x", "hf", "llava"):
        text = (tmp_path / name / "README.md").read_text()
        for said in (
            "pyramiddrop:layers=[2],ratios=[0.5]",
            "abc123",
            "language 1,200, projector 34 |",
            "| gpu hours | 2.5 |",
            "1.2346",
            "--learning_rate 2e-05",
            "base_model: lmsys/vicuna-7b-v1.5",
            "| torch | 2.13.0 |",
            "| commit | deadbeef |",
            "| pope | `fastv:k=2,r=0.5` | f1 | 85.12 | 83.00 to 87.00 | 90 |",
        ):
            assert said in text, (name, said)
        assert text.startswith("---\n")
        assert f"# {name}\n" in text
        assert ("made from" in text) is (name != "x")


def test_a_card_of_somebody_else_stays(tmp_path, capsys):
    write_original(tmp_path / "x", "v1.5-7b")
    (tmp_path / "x" / "README.md").write_text("mine")
    assert not write_card(tmp_path / "x")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "x")])
    assert "llava did not write" in capsys.readouterr().err
    assert (tmp_path / "x" / "README.md").read_text() == "mine"
    (tmp_path / "x" / "README.md").unlink()
    assert write_card(tmp_path / "x")
    assert write_card(tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    assert MARK in text
    assert "names no plan" in text
    assert "Written with" in text
    (tmp_path / "bad.json").write_text(json.dumps({"value": 1}))
    with pytest.raises(ValueError, match=r"bad\.json holds no scores"):
        write_card(tmp_path / "x", scores=[tmp_path / "bad.json"])
