"""llava.digits: the tokenizer under LLaVA's templates, tower, base, and the recipe's script."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from llava.conversation import conv_templates
from llava.digits import base, finish, pretrain_tower
from llava.digits.questions import FACTS, KINDS, ask, describe, facts
from llava.digits.scenes import CELLS, varied_scene
from llava.digits.tokenizer import build_tokenizer, vocabulary
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model

SCRIPT = ROOT / "scripts" / "digits" / "train.sh"
COMPARE = SCRIPT.with_name("compare.sh")
PLAN = "pyramiddrop:layers=[2,4,5],ratios=[0.6,0.36,0.216]"
MILD = "pyramiddrop:layers=[2,4,5],ratios=[0.8,0.64,0.512]"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path):  # noqa: ANN201
    return AutoTokenizer.from_pretrained(str(tokenizer_folder))


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower after three steps."""
    out = tmp_path_factory.mktemp("stages") / "tower"
    pretrain_tower.main(
        ["--out", str(out), "--steps", "3", "--batch", "8", "--eval-scenes", "10", "--no-bf16"]
    )
    return out


# -------------------------------------------------------------------------------------- tokenizer
def test_special_tokens(tokenizer) -> None:  # noqa: ANN001
    assert vocabulary()[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    assert tokenizer("red").input_ids == [1, tokenizer.convert_tokens_to_ids("red")]


def test_everything_that_is_said_has_its_word(tokenizer) -> None:  # noqa: ANN001
    rng = np.random.default_rng(0)
    for index in range(12):
        scene = varied_scene(0, "train", index)
        texts = [describe(scene, range(len(CELLS)))]
        texts += [facts(scene, kind, rng) or "" for kind in FACTS]
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is not None:
                texts += [question.text, question.answer]
        for text in texts:
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids, text
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert decoded.replace(" ?", "?") == text


def test_a_prompt_is_short_and_pieces_add_up(tokenizer) -> None:  # noqa: ANN001
    rng = np.random.default_rng(1)
    for index in range(12):
        scene = varied_scene(0, "test", index)
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is None:
                continue
            conv = conv_templates["mistral_instruct"].copy()
            conv.append_message(conv.roles[0], f"<image>\n{question.text}")
            conv.append_message(conv.roles[1], None)
            prompt = conv.get_prompt()
            ids = tokenizer_image_token(prompt, tokenizer)
            assert ids.count(-200) == 1
            assert len(ids) - 1 <= 40
            assert tokenizer.unk_token_id not in ids
            assert [i for i in ids if i != -200] == tokenizer(
                prompt.replace("<image>", "")
            ).input_ids


# ------------------------------------------------------------------------------------------ tower
def test_rescaling_the_tower_changes_its_scale_only() -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(pretrain_tower.tower_config()).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    heads = pretrain_tower.Heads(tower.config.hidden_size)
    pixels = torch.randn(4, 3, 112, 112)
    with torch.no_grad():
        before = pretrain_tower.features(tower, pixels)
        read = heads.heads["thing"](before)
        std = pretrain_tower.rescale(tower, heads, pixels)
        after = pretrain_tower.features(tower, pixels)
    assert std == pytest.approx(float(before.std()))
    assert float(after.std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(after * std, before, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(heads.heads["thing"](after), read, atol=2e-3, rtol=1e-3)


def test_pretraining_learns_and_is_reproducible(tower_folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    arguments = ["--steps", "3", "--batch", "8", "--eval-scenes", "10", "--no-bf16"]
    pretrain_tower.main(["--out", str(again), *arguments])
    first, second = (
        CLIPVisionModel.from_pretrained(str(folder)).state_dict()
        for folder in (tower_folder, again)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    facts_ = json.loads((again / "training.json").read_text())
    assert facts_["arguments"]["steps"] == "3"
    assert (again / "preprocessor_config.json").is_file()


def test_a_finished_tower_is_kept(tower_folder: Path) -> None:
    before = (tower_folder / "model.safetensors").stat().st_mtime_ns
    pretrain_tower.main(["--out", str(tower_folder), "--steps", "9"])
    assert (tower_folder / "model.safetensors").stat().st_mtime_ns == before


def test_tokens_of_a_cell_share_its_class() -> None:
    cells = torch.arange(16).view(1, 4, 4)
    tokens = pretrain_tower.to_tokens(cells).view(8, 8)
    assert (tokens[::2, ::2] == cells[0]).all()
    assert (tokens[1::2, 1::2] == cells[0]).all()


# ------------------------------------------------------------------------------------------- base
def test_the_base_starts_as_a_copying_model(
    tower_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "base"
    base.main(
        ["--tower", str(tower_folder), "--tokenizer", str(tokenizer_folder), "--out", str(out)]
        + ["--steps", "2"]
    )
    model = LlamaForCausalLM.from_pretrained(str(out))
    words = model.model.embed_tokens.weight
    torch.testing.assert_close(words @ words.T, torch.eye(len(words)), atol=1e-4, rtol=0)
    attention = model.model.layers[0].self_attn
    joint = attention.o_proj.weight @ attention.v_proj.weight
    assert (joint.diag() > 0.05).all()
    state = torch.load(out / "mm_projector.bin", weights_only=True)
    assert sorted(state) == [
        f"model.mm_projector.{i}.{p}" for i in (0, 2) for p in ("bias", "weight")
    ]
    assert (out / "tokenizer.json").is_file()


def test_meaning_is_own_words_plus_faint_neighbours(tokenizer) -> None:  # noqa: ANN001
    vectors = base.orthogonal(base.HIDDEN, base.HIDDEN)[: len(tokenizer)]
    words = tokenizer.get_vocab()
    meaning = base.Meaning(vectors, words)
    things = torch.zeros(1, 4, 4, dtype=torch.long)
    things[0, 1, 2] = 1 + 10 * 0 + 3  # red 3 in B3
    tokens = meaning(things).view(1, 8, 8, -1)
    said = tokens[0, 2, 4] @ vectors.T
    top = {word for word, number in words.items() if said[number] > 0.7}
    assert {"red", "3", "B3"} <= top
    plain = meaning(torch.zeros_like(things)).view(1, 8, 8, -1)
    changed = (tokens - plain).norm(dim=-1)[0] > 1e-5
    rows, columns = changed.nonzero().T
    assert set(zip((rows // 2).tolist(), (columns // 2).tolist(), strict=True)) == {
        (1, 2),
        (0, 2),
        (2, 2),
        (1, 1),
        (1, 3),
    }


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (pretrain_tower, ["--out", "x", "--steps", "0"], "--steps must be 1 or more, got 0"),
        (pretrain_tower, ["--out", "x", "--lr", "-1"], "--lr must be positive"),
        (base, ["--tower", "no", "--tokenizer", "no", "--out", "x"], "no such folder: no"),
        (
            finish,
            ["--stages", "no", "--tower", "no", "--base", "no", "--plan", "none"] + ["--out", "x"],
            "no lacks config.json",
        ),
    ],
)
def test_bad_arguments_end_in_one_line(
    module,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],  # noqa: ANN001
) -> None:
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_readme_says_which_stages_dropped() -> None:
    assert finish.how_trained({"facts": None, "questions": None}) == "without dropping"
    text = finish.how_trained({"facts": "p", "questions": "p", "mild": "q"})
    assert text.endswith("from the first stage on: `facts`, `questions` with `p`; `mild` with `q`")
    text = finish.how_trained({"facts": None, "answers": "p"})
    assert text == "with PyramidDrop: `facts` without dropping; `answers` with `p`"


# ----------------------------------------------------------------------------------------- script
def commands(script: Path, folder: Path, **variables: str) -> list[list[str]]:
    """The commands a script gives to Python, when each of them does nothing."""
    stub, log = folder / "python", folder / "log"
    stub.write_text(f"#!/usr/bin/env bash\nprintf '%s\\x1f' \"$@\" >>{log}; echo >>{log}\n")
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "WORK": str(folder / "work"), "SMOKE": "0"}
    run = subprocess.run(
        ["bash", str(script)],
        env={**environment, "OUT": str(folder / "out"), **variables},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]
    return [words[1:] if words[0] == "-m" else words for words in lines]


def of_module(found: list[list[str]], module: str) -> list[list[str]]:
    return [words[1:] for words in found if words[0] == module]


@pytest.mark.parametrize("plan", ["none", "pyramiddrop"])
def test_every_stage_is_a_run_of_the_training_entry_point(tmp_path: Path, plan: str) -> None:
    from llava.train.arguments import parse_args

    found = commands(SCRIPT, tmp_path, PLAN=plan)
    stages = [parse_args(words) for words in of_module(found, "llava.train.train")]
    names = [Path(training.output_dir).name for _, _, training in stages]
    dropping = plan != "none"
    assert names == ["align", "facts", "relations", "questions"] + ["answers"] * dropping
    assert all(
        (model.plan() is not None and bool(model.plan())) == dropping for model, _, _ in stages
    )


def test_the_comparison_changes_nothing_but_the_plan(tmp_path: Path) -> None:
    """Three seeds; within one, the commands of the arms differ in the plan and the folder alone,
    and all runs of a comparison start from the same stage 1."""
    from llava.eval.run import parser
    from llava.reduction.flags import plan_from_args
    from llava.train.arguments import parse_args

    found = commands(COMPARE, tmp_path)
    stages = [parse_args(words) for words in of_module(found, "llava.train.train")]
    names = [Path(training.output_dir).name for _, _, training in stages]
    arms = {
        "adapt": ["none", "pyramiddrop", "mild"],
        "full": ["none", "pyramiddrop", "mild"],
        "learn": ["none", "pyramiddrop"],
    }
    trained = [name for what in arms for name in 3 * arms[what]]
    assert names == ["align", "facts", "relations", "questions", *trained]
    plans = {"none": "none", "pyramiddrop": PLAN, "mild": MILD}
    runs: dict[tuple[str, str], list[dict]] = {}
    for model, data, training in stages[4:]:
        facts = {**vars(model), **vars(data), **training.to_dict()}
        del facts["logging_dir"]
        place = Path(facts.pop("output_dir"))
        assert facts.pop("reduction") == plans[place.name]
        base = {"adapt": "questions", "full": "questions", "learn": "relations"}[place.parts[-3]]
        assert Path(model.model_name_or_path) == tmp_path / "work" / "none" / base
        assert place.parts[-2] == f"seed-{training.seed}"
        runs.setdefault(place.parts[-3:-1], []).append(facts)
    assert list(runs) == [(what, f"seed-{s}") for what in arms for s in range(3)]
    assert [len(each) for each in runs.values()] == [3, 3, 3, 3, 3, 3, 2, 2, 2]
    assert all(one == each[0] for each in runs.values() for one in each)
    asked = [parser().parse_args(words[1:]) for words in of_module(found, "llava.cli")]
    pairs = [
        (Path(args.model_path).name, str(plan_from_args(args)), Path(args.results).name)
        for args in asked
    ]
    wanted = []
    for names in arms.values():
        own = [(name, name) for name in names]
        crossed = [pair for name in names[1:] for pair in (("none", name), (name, "none"))]
        wanted += 3 * own + 3 * crossed
    assert pairs == [(arm, plans[plan], f"{arm}-with-{plan}") for arm, plan in wanted]
    assert found[-2][0].endswith("compare_cost.py")
    assert found[-1][0].endswith("compare_table.py")


def test_the_script_refuses_an_unknown_plan() -> None:
    run = subprocess.run(
        ["bash", str(SCRIPT)],
        env={**os.environ, "PLAN": "everything"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert "accepted: both, none, pyramiddrop" in run.stderr


@pytest.mark.slow
def test_smoke_run_makes_both_checkpoints(tmp_path: Path) -> None:
    """The script's own commands, in one process: starting one costs more than most of them do."""
    out = tmp_path / "out"
    environment = {"SMOKE": "1", "DATA": str(tmp_path / "data"), "WORK": str(tmp_path / "work")}
    for plan in ("pyramiddrop", "none"):
        (tmp_path / plan).mkdir()
        variables = {**environment, "OUT": str(out), "PLAN": plan}
        for module, *words in commands(SCRIPT, tmp_path / plan, **variables):
            importlib.import_module(module).main(words)
    for name, dropping in (("llava-digits", False), ("llava-digits-pdrop", True)):
        config = json.loads((out / name / "config.json").read_text())
        assert config["conv_mode"] == "mistral_instruct"
        assert (config["visual_token_reduction"] is not None) == dropping
        assert config["mm_vision_tower"] == finish.TOWER_NAME
        made = json.loads((out / name / "training.json").read_text())
        stages = ["tower", "base", "align", "facts", "relations", "questions"]
        assert list(made["stages"]) == stages + ["answers"] * dropping
        assert not list((out / name).glob("*optimizer*"))
        tokenizer, model, _, _ = load_pretrained_model(
            str(out / name), None, "llava", device="cpu", device_map=None
        )
        assert model.get_vision_tower().is_loaded
        assert len(tokenizer) == len(vocabulary())
    run = subprocess.run(
        ["bash", str(SCRIPT)],
        env={**os.environ, **environment, "OUT": str(out), "PYTHON": "false"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("is complete") == 2
