"""What is made of a finished run: merged weights, the projector's own file, the model card."""

from __future__ import annotations

import copy
import json
import os
import resource
import runpy
import signal
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from miniatures import (
    TEXT,
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
from peft import LoraConfig, get_peft_model
from places import ROOT
from safetensors.torch import load_file
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava.model.assemble import merge_lora
from llava.model.convert import convert, extract_projector
from llava.model.model_card import MARK, main, write_card
from llava.utils import get_logger

SCORES = {"metric": "f1", "value": 85.123, "low": 83.0, "high": 87.0, "n": 90}


@pytest.fixture
def run(monkeypatch, capsys):
    """A script as a command line runs it, in this process: (exit code, what it wrote to stderr)."""

    def call(script: str, *words: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


def test_lora_weights_are_merged_by_llavas_script(tmp_path, run):
    base = write_base(tmp_path / "a")
    reference = write_lora(tmp_path / "b", base, old_peft=True)
    words = ["--model-path", tmp_path / "b", "--model-base", tmp_path / "a"]
    code, said = run("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "whole")
    assert code == 0, said
    with torch.no_grad():
        merged = load(tmp_path / "whole", dtype=None).model
        equal(merged(**inputs(False)).logits, reference(**inputs(False)).logits, 2e-5)
    code, said = run("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "whole")
    assert (code, said.count("\n")) == (2, 1)
    assert "exists already" in said
    (tmp_path / "b" / "non_lora_trainables.bin").unlink()
    code, said = run("merge_lora_weights.py", *words, "--save-model-path", tmp_path / "other")
    assert code == 2
    assert "non_lora_trainables.bin is missing" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:.*tie")  # trained apart they are tied no longer, peft warns
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"layers_to_transform": [1]},
    ],
)
def test_merging_is_what_peft_does(settings, tied, tmp_path):
    """Every kind of LoRA that is taken, bit by bit; Qwen2 has biases and may tie its vocabulary."""
    sizes = {**TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2}
    base = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=tied))
    usual = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(**{**usual, **settings}))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    kept = json.loads((tmp_path / "adapter_config.json").read_text())
    merge_lora(weights, load_file(tmp_path / "adapter_model.safetensors"), kept, "here")
    for name, expected in tuned.merge_and_unload().state_dict().items():
        assert torch.equal(weights[name], expected), name
    assert any(not torch.equal(weights[name], value) for name, value in base.state_dict().items())


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


def test_the_script_names_what_has_no_projector(tmp_path, run):
    write_base(tmp_path / "a")
    out = tmp_path / "mm_projector.bin"
    code, said = run("extract_mm_projector.py", "--model-path", tmp_path / "a", "--output", out)
    assert code == 2
    assert "holds no projector" in said
    assert not out.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def full_disk():
    """Files of more than so many bytes cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [100, 20_000, 60_000])
def test_a_disk_without_room(room, tmp_path, full_disk):
    """Config, tokenizer and weights, each in its writer's own words: one line, nothing half done,
    nothing else touched."""
    write_original(tmp_path / "x", "pyramiddrop")  # its tower is inside: no progress bar is written
    before = contents(tmp_path)
    full_disk(room)
    for to in ("hf", "llava"):
        with pytest.raises(OSError, match=r"y could not be written \(.*File too large") as found:
            convert(tmp_path / "x", tmp_path / "y", to)
        assert ".tmp" not in str(found.value)
    if room == 100:
        with pytest.raises(OSError, match="File too large") as found:
            extract_projector(tmp_path / "x", tmp_path / "p.bin")
        assert found.value.filename == str(tmp_path / "p.bin")
    full_disk(resource.RLIM_INFINITY)
    assert contents(tmp_path) == before
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("x", {}, "x exists already"),
        ("link", {}, "link exists already"),
        ("file", {}, "file exists already"),
        ("file/y", {}, "Not a directory"),
        ("y", {"max_shard_size": "0GB"}, "shard size '0GB'; accepted: a number with KB"),
        ("y", {"max_shard_size": "5"}, "shard size '5'"),
        ("y", {"dtype": "int8"}, "dtype 'int8' is not accepted; give"),
        ("y", {"scores": ["nothing"]}, "nothing is missing"),
        ("y", {"vision_tower": "/nowhere/clip"}, "/nowhere/clip"),
    ],
)
def test_what_is_asked_is_looked_at_before_the_weights(target, options, message, tmp_path):
    """The weights are damaged, and yet the complaint is about the flag."""
    write_original(tmp_path / "x", "v1.5-7b")
    if target != "file/y" and "vision_tower" not in options:
        for file in (tmp_path / "x").glob("*.bin"):
            file.write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        convert(tmp_path / "x", tmp_path / target, "hf", **options)
    assert contents(tmp_path) == before


def test_more_than_the_disk_holds_is_refused_before_writing(tmp_path, monkeypatch):
    write_original(tmp_path / "x", "v1.5-7b")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match=r"deep/y needs 0\.2 MB; .* has 0\.0 MB left"):
        convert(tmp_path / "x", tmp_path / "deep" / "y", "hf")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("b/mm_projector.bin", "is a file of the checkpoint itself"),
        ("b/config.json", "is a file of the checkpoint itself"),
        ("link/mm_projector.bin", "is a file of the checkpoint itself"),
        ("b", "Is a directory"),
        ("b/config.json/p.bin", "Not a directory"),
        ("p.safetensors", "is written as LLaVA's mm_projector.bin"),
    ],
)
def test_extracting_overwrites_nothing_that_it_reads(target, message, tmp_path):
    write_projector_only(tmp_path / "b", write_base(tmp_path / "a"))
    (tmp_path / "link").symlink_to(tmp_path / "b")
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        extract_projector(tmp_path / "b", tmp_path / target)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", ["hf", "llava"])
def test_weights_in_the_dtype_that_is_asked_for(to, tmp_path):
    """Shards keep to their size in that dtype; both ways of loading take it for the model's."""
    write_original(tmp_path / "x", "v1.6-vicuna-7b")  # float16
    convert(tmp_path / "x", tmp_path / "y z é", to, dtype="float32", max_shard_size="100KB")
    files = sorted((tmp_path / "y z é").glob("*.safetensors"))
    assert len(files) > 3
    sizes = [sum(value.nbytes for value in load_file(file).values()) for file in files]
    assert all(size <= 100_000 for size in sizes[:-1])
    index = json.loads((tmp_path / "y z é" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert {v.dtype for file in files for v in load_file(file).values()} == {torch.float32}
    umask = os.umask(0)
    os.umask(umask)
    rights = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "y z é").iterdir()}
    assert rights == {0o666 & ~umask}
    loaded = load(tmp_path / "y z é")
    assert (loaded.choices.dtype.value, loaded.choices.dtype.origin) == (
        torch.float32,
        "config.json",
    )
    with torch.no_grad():
        expected = load(tmp_path / "x", dtype=torch.float32).model(**inputs(True)).logits
        equal(loaded.model(**inputs(True)).logits[..., : expected.shape[-1]], expected)
    if to == "hf":
        theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "y z é", dtype="auto")
        assert {value.dtype for value in theirs.parameters()} == {torch.float32}


def test_generation_settings_are_kept_and_can_be_saved_again(tmp_path):
    """Vicuna's file names sampling settings without sampling, which transformers does not save."""
    write_original(tmp_path / "x", "v1.5-7b")
    write_json(tmp_path / "x" / "generation_config.json", {
        "eos_token_id": [2, 7], "temperature": 0.9, "top_p": 0.6, "max_length": 99,
    })  # fmt: skip
    convert(tmp_path / "x", tmp_path / "hf", "hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [2, 7], "max_length": 99}


def scored(folder: Path, **run: str) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "scores.json", SCORES)
    write_json(folder / "run.json", {"benchmark": "pope", "plan": "fastv:k=2,r=0.5", **run})
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
    for change in ({"value": "1"}, {"low": float("nan")}, {"n": None}, {"metric": 3}):
        (tmp_path / "bad.json").write_text(json.dumps({**SCORES, **change}))
        with pytest.raises(ValueError, match=r"bad\.json holds no scores"):
            write_card(tmp_path / "x", scores=[tmp_path / "bad.json"])
    assert (tmp_path / "x" / "README.md").read_text() == text


def test_scores_of_another_model_say_so(tmp_path, caplog):
    """A card never shows them as its own; a checkpoint that was moved or converted is the same."""
    log = get_logger("llava")
    log.propagate = True
    write_original(tmp_path / "x", "v1.5-7b")
    other = scored(tmp_path / "one", model_path="/models/llava-v1.6")
    own = [
        scored(tmp_path / "two", model_path=str(tmp_path / "x")),
        scored(tmp_path / "three", model_path="/elsewhere/x"),
    ]
    try:
        with caplog.at_level("WARNING", logger="llava"):
            write_card(tmp_path / "x", scores=[other, *own])
    finally:
        log.propagate = False
    text = (tmp_path / "x" / "README.md").read_text()
    assert text.count("| pope | `fastv:k=2,r=0.5` | f1 | 85.12 |") == 2
    assert "| pope (answers of llava-v1.6) | `fastv:k=2,r=0.5` | f1 |" in text
    assert "are the scores of /models/llava-v1.6" in caplog.text
    convert(tmp_path / "x", tmp_path / "hf", "hf", scores=own)
    assert "answers of" not in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"visual_token_reduction": "fastv:k=2,r=0.5"}, "`fastv:k=2,r=0.5`"),
        ({"visual_token_reduction": {"cuts": []}}, "all of them in all layers"),
        ({"fastv_config": {"fastv_k": 2, "fastv_r": 0.5}}, "`fastv:k=2,r=0.5`"),
        ({}, "config.json names no plan"),
    ],
)
def test_the_card_names_the_plan_that_is_used(config, said, tmp_path):
    write_original(tmp_path / "x", "v1.5-7b", **config)
    write_json(tmp_path / "x" / "train_summary.json", {"flags": {"model_name_or_path": "./base"}})
    assert write_card(tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    assert f"| visual tokens | {said} |" in text or f"{said} (plan `none`) |" in text
    assert ("The plan is in config.json" in text) is bool(config)
    assert "base_model:" not in text  # a folder is no repository of the hub
    used = load(tmp_path / "x").choices.plan.value
    assert (str(used) in said) or not used
