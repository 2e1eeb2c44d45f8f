"""Real training runs on tiny data through the command line's main()."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from llava.model.builder import load_pretrained_model
from llava.train.arguments import build_parser
from llava.train.train import main

sys.path.insert(0, str(Path(__file__).parent))
from train_fixtures import write_all, write_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "version": "mistral_instruct",
    "mm_use_im_patch_token": False,
    "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "model_max_length": 64,
    "max_steps": 3,
}


def command(**flags: object) -> list[str]:
    """Flags as a command line; None leaves one out."""
    merged = {**COMMON, **flags}
    return [
        part
        for name, value in merged.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def base(files: Path) -> Path:
    """A language model trained on text alone, from random weights."""
    flags = command(
        init_from_config=files / "config",
        data_path=files / "data" / "text.jsonl",
        output_dir=files / "base",
        max_steps=20,
    )
    main(flags)
    return files / "base"


def pictures(files: Path, name: str = "mixed.json") -> dict[str, object]:
    return {
        "data_path": files / "data" / name,
        "image_folder": files / "data" / "images",
        "vision_tower": files / "tower",
    }


def test_text_stage_learns_and_saves_a_language_model(files, base):
    curve = losses(base)
    assert curve[-1] < 0.8 * curve[0]
    config = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["use_cache"] is True
    assert config["visual_token_reduction"] is None
    summary = json.loads((base / "train_summary.json").read_text())
    assert summary["seed"] == 42
    assert summary["command"][0] == "--version"
    assert not [path for path in base.iterdir() if path.name.startswith(".")]


def test_projector_stage_then_fine_tuning_with_a_plan(files, base, tmp_path):
    main(
        command(
            model_name_or_path=base,
            tune_mm_mlp_adapter=True,
            output_dir=tmp_path / "projector",
            **{**pictures(files, "captions.json"), "version": "plain"},
        )
    )
    stage = tmp_path / "projector"
    assert not list(stage.glob("*.safetensors"))
    adapter = torch.load(stage / "mm_projector.bin", weights_only=True)
    names = {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(adapter) == names
    counts = json.loads((stage / "train_summary.json").read_text())["trained_parameters"]
    assert counts == {"language": 0, "projector": 2 * (16 * 16 + 16), "tower": 0}

    full = tmp_path / "full"
    main(
        command(
            model_name_or_path=base,
            pretrain_mm_mlp_adapter=stage / "mm_projector.bin",
            output_dir=full,
            max_steps=12,
            group_by_modality_length=True,
            layer_list="[1,2]",
            image_token_ratio_list="[0.5,0.25]",
            learning_rate=5e-3,
            **pictures(files),
        )
    )
    curve = losses(full)
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])
    config = json.loads((full / "config.json").read_text())
    cuts = config["visual_token_reduction"]["cuts"]
    assert [(cut["at"], cut["ratio"]) for cut in cuts] == [(1, 0.5), (2, 0.25)]
    assert config["conv_mode"] == "mistral_instruct"
    tokenizer, model, processor, _ = load_pretrained_model(
        str(full), None, "llava", device="cpu", dtype=torch.float32
    )
    ids = torch.tensor([[1, 4, -200, 7, 8, 9, 5]])
    pixels = torch.zeros(1, 3, 28, 28)
    new = model.generate(ids, images=pixels, max_new_tokens=3, do_sample=False)
    assert new.shape[0] == 1
    assert processor is not None
    assert tokenizer.pad_token_id == 3


def test_frozen_parts_stay_and_an_unfrozen_tower_moves(files, base, tmp_path):
    for name, flags in {
        "frozen": {"freeze_backbone": True},
        "tower": {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-3},
        "parts": {"mm_tunable_parts": "mm_vision_tower"},
    }.items():
        main(
            command(model_name_or_path=base, output_dir=tmp_path / name, **flags, **pictures(files))
        )
    before = load_file(base / "model.safetensors")
    tower = load_file(files / "tower" / "model.safetensors")
    moved = {}
    for name in ("frozen", "tower", "parts"):
        after = load_file(tmp_path / name / "model.safetensors")
        towers = {k.split("vision_tower.")[-1]: v for k, v in after.items() if "vision_tower" in k}
        key = "embeddings.patch_embedding.weight"
        was = next(v for k, v in tower.items() if k.endswith(key))
        now = next(v for k, v in towers.items() if k.endswith(key))
        layer = "model.layers.0.mlp.up_proj.weight"
        moved[name] = (not torch.equal(before[layer], after[layer]), not torch.equal(was, now))
    assert moved == {"frozen": (False, False), "tower": (True, True), "parts": (False, True)}


@pytest.mark.parametrize(
    ("projector_only", "grouping"),
    [(False, None), (True, "group_by_modality_length"), (False, "group_by_length")],
)
def test_resume_equals_an_undisturbed_run(files, base, tmp_path, projector_only, grouping):
    flags = command(
        model_name_or_path=base,
        output_dir=tmp_path / "run",
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        tune_mm_mlp_adapter=projector_only,
        per_device_train_batch_size=3,
        **({grouping: True} if grouping else {}),
        **pictures(files),
    )
    main(flags)
    name = "mm_projector.bin" if projector_only else "model.safetensors"
    whole = (tmp_path / "run" / name).read_bytes()
    curve = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    (tmp_path / "run" / name).unlink()
    main(flags)
    assert losses(tmp_path / "run") == curve
    if projector_only:
        again = torch.load(tmp_path / "run" / name, weights_only=True)
        (tmp_path / "first.bin").write_bytes(whole)
        first = torch.load(tmp_path / "first.bin", weights_only=True)
        assert all(torch.equal(first[key], again[key]) for key in first)
    else:
        assert (tmp_path / "run" / name).read_bytes() == whole


def test_a_token_budget_fills_batches_and_resumes(files, base, tmp_path, caplog, capsys):
    """Killed in the second epoch: the batches behind the checkpoint are those of the whole run."""
    flags = {"max_steps": None, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    flags |= pictures(files)
    budget = {"packed": True, "token_budget": 40, "data_cache_dir": tmp_path / "cache"}
    run = command(model_name_or_path=base, output_dir=tmp_path / "run", **flags, **budget)
    with caplog.at_level("INFO"):
        main(run)
    assert "token budget 40: 3 micro-batches" in caplog.text
    curve = losses(tmp_path / "run")
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    for late in ("checkpoint-6", "model.safetensors"):
        path = tmp_path / "run" / late
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    main(run)
    assert losses(tmp_path / "run") == curve
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole
    for refused, message in (
        ({"token_budget": 10}, "mixed.json, sample 2 (id 2) has"),
        ({"packed": False}, "needs --packed"),
        ({"group_by_length": True}, "leave out --group_by_length"),
    ):
        flags = pictures(files) | budget | refused
        with pytest.raises(SystemExit):
            main(command(model_name_or_path=base, output_dir=tmp_path / "no", **flags))
        assert message in capsys.readouterr().err


def test_token_mean_does_not_depend_on_micro_batches(files, base, tmp_path):
    curves = {}
    for mean in ("tokens", "batch"):
        for batch, accumulate in ((4, 1), (2, 2)):
            out = tmp_path / f"{mean}{batch}"
            main(
                command(
                    model_name_or_path=base,
                    output_dir=out,
                    loss_mean=mean,
                    per_device_train_batch_size=batch,
                    gradient_accumulation_steps=accumulate,
                    **pictures(files),
                )
            )
            curves[mean, batch] = losses(out)
    assert curves["tokens", 4] == pytest.approx(curves["tokens", 2], abs=2e-4)
    assert curves["batch", 4] != pytest.approx(curves["batch", 2], abs=2e-4)


@pytest.mark.parametrize("kwargs", [None, '{"use_reentrant": false}'])
def test_checkpointing_changes_nothing(files, base, tmp_path, kwargs):
    flags = {"model_name_or_path": base, "layer_list": "[2]", "image_token_ratio_list": "[0.5]"}
    main(command(output_dir=tmp_path / "off", **flags, **pictures(files)))
    main(
        command(
            output_dir=tmp_path / "on",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=kwargs,
            **flags,
            **pictures(files),
        )
    )
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), abs=1e-5)


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"layer_list": "[2]", "image_token_ratio_list": "[0.5]"},
        {"reduction": "simignore:ratio=0.75,text=options|question+fastv:k=2,r=0.5"},
    ],
)
def test_packed_training_is_padded_training(files, base, tmp_path, plan):
    """No, one and two pictures a sample, mixed lengths: the losses of eight steps and the weights
    behind them."""
    flags = {"model_name_or_path": base, "max_steps": 8, "optim": "sgd", **plan, **pictures(files)}
    weights = []
    for name, more in {
        "padded": {},
        "packed": {"packed": True},
        "eager": {"packed": True, "attn_implementation": "eager"},
    }.items():
        main(command(output_dir=tmp_path / name, **flags, **more))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "padded"), abs=1e-5)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[-1][key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_start_train_and_go_on(files, tmp_path, family):
    """Random weights -> checkpoint -> further training with the checkpoint's own settings."""
    config = AutoConfig.for_model(
        family, vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=family == "qwen2",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    write_tokenizer(tmp_path / "config")
    main(
        command(
            init_from_config=tmp_path / "config",
            output_dir=tmp_path / "one",
            layer_list="[1]",
            image_token_ratio_list="[0.5]",
            **pictures(files),
        )
    )
    first = json.loads((tmp_path / "one" / "config.json").read_text())
    assert first["model_type"] == {"qwen2": "llava_qwen"}.get(family, f"llava_{family}")
    flags = {"mm_projector_type": None, "mm_vision_select_layer": None, "vision_tower": None}
    main(
        command(
            model_name_or_path=tmp_path / "one",
            output_dir=tmp_path / "two",
            learning_rate=0.0,
            **{**pictures(files), **flags},
        )
    )
    second = json.loads((tmp_path / "two" / "config.json").read_text())
    keys = ("mm_projector_type", "mm_vision_select_layer", "visual_token_reduction", "model_type")
    assert {key: second[key] for key in keys} == {key: first[key] for key in keys}
    before = load_file(tmp_path / "one" / "model.safetensors")
    after = load_file(tmp_path / "two" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_tower_comes_from_where_it_is(files, base, tmp_path):
    """A checkpoint without tower weights reads them from --vision_tower; one that holds a trained
    tower keeps it although its config.json does not describe it (LLaVA-1.6's layout)."""
    flags = {"unfreeze_mm_vision_tower": True, **pictures(files)}
    main(command(model_name_or_path=base, output_dir=tmp_path / "one", **flags))
    trained = load_file(tmp_path / "one" / "model.safetensors")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    del config["mm_vision_config"]
    key = next(k for k in trained if "vision_tower" in k and "patch_embedding" in k)
    for name, keep in (("with", True), ("without", False)):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "one", folder)
        (folder / "config.json").write_text(json.dumps(config))
        weights = {k: v for k, v in trained.items() if keep or "vision_tower" not in k}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / f"{name}-out"
        main(
            command(model_name_or_path=folder, output_dir=out, learning_rate=0.0, **pictures(files))
        )
        after = load_file(out / "model.safetensors")[key]
        own = load_file(files / "tower" / "model.safetensors")
        own = next(v for k, v in own.items() if "patch_embedding" in k)
        assert torch.equal(after, trained[key] if keep else own), name
        assert not torch.equal(trained[key], own)


def test_text_alone_through_a_model_with_a_tower(files, base, tmp_path):
    """No picture in any batch: the projector is in the graph and gets a gradient of zero."""
    flags = {**pictures(files), "data_path": files / "data" / "text.jsonl", "weight_decay": 0.0}
    main(command(model_name_or_path=base, output_dir=tmp_path / "one", max_steps=1, **flags))
    main(command(model_name_or_path=tmp_path / "one", output_dir=tmp_path / "two", **flags))
    before = load_file(tmp_path / "one" / "model.safetensors")
    after = load_file(tmp_path / "two" / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert "lm_head.weight" in moved
    assert not [key for key in moved if "mm_projector" in key or "vision_tower" in key]


def test_validation_loss_is_computed(files, base, tmp_path):
    main(
        command(
            model_name_or_path=base,
            output_dir=tmp_path / "out",
            eval_data_path=files / "data" / "captions.json",
            evaluation_strategy="steps",
            eval_steps=3,
            layer_list="[1]",
            image_token_ratio_list="[0.5]",
            **pictures(files),
        )
    )
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    found = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(found) == 1
    assert found[0] > 0


def test_anyres_with_a_newline(files, base, tmp_path):
    main(
        command(
            model_name_or_path=base,
            output_dir=tmp_path / "out",
            tune_mm_mlp_adapter=True,
            image_aspect_ratio="anyres",
            mm_patch_merge_type="spatial_unpad",
            model_max_length=128,
            **pictures(files, "captions.json"),
        )
    )
    adapter = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert adapter["model.image_newline"].shape == (16,)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def test_dry_run_prints_what_is_learned(files, base, tmp_path, capsys):
    main(
        command(
            model_name_or_path=base, output_dir=tmp_path / "out", dry_run_data=2, **pictures(files)
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith('["red </s>"]')


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_path": "nowhere.json"}, "data file not found: nowhere.json"),
        ({"image_folder": "nowhere"}, "image folder not found: nowhere"),
        ({"vision_tower": "./nowhere"}, "vision tower './nowhere'"),
        ({"model_name_or_path": "./nowhere"}, "no model at ./nowhere"),
        ({"layer_list": "[3,1]", "image_token_ratio_list": "[0.5,0.25]"}, "layer_list [3, 1]"),
        ({"layer_list": "[9]", "image_token_ratio_list": "[0.5]"}, "layer 9 does not fit"),
        ({"layer_list": "__import__('os')", "image_token_ratio_list": "[0.5]"}, "__import__"),
        ({"reduction": "simignore:keep=2,text=options"}, "sample 1 (id 1): has no text 'options'"),
        ({"pretrain_mm_mlp_adapter": __file__}, "cannot be loaded as a projector"),
        ({"mm_vision_select_layer": -9}, "has 2 layers; accepted: -3 to 2"),
        ({"mm_projector_type": "mlp"}, "mm_projector_type 'mlp' is unknown"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
        ({"packed": True, "attn_implementation": "flex_attention"}, "would mix the samples"),
        ({"optim": "nonsense"}, "nonsense"),
        ({"model_max_length": 4}, "4 visual tokens"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json"),
        ({"no_such_flag": 1}, "no_such_flag"),
        ({"mm_tunable_parts": "brain"}, "brain"),
        ({"evaluation_strategy": "epoch"}, "--eval_data_path"),
    ],
)
def test_bad_input_ends_in_one_line(files, base, tmp_path, capsys, flags, message):
    defaults = {"model_name_or_path": base, "output_dir": tmp_path / "out", **pictures(files)}
    with pytest.raises(SystemExit) as stop:
        main(command(**{**defaults, **flags}))
    assert stop.value.code not in (0, None)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_weights_is_refused(files, base, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(SystemExit):
        main(
            command(
                model_name_or_path=broken,
                data_path=files / "data" / "text.jsonl",
                output_dir=tmp_path / "out",
            )
        )
    assert "missing: model.layers.4." in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_in_the_middle_is_named(files, base, tmp_path, capsys, workers):
    records = json.loads((files / "data" / "captions.json").read_text())
    records[6]["image"] = "absent.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = {
        "model_name_or_path": base,
        "output_dir": tmp_path / "out",
        "dataloader_num_workers": workers,
        **pictures(files),
        "data_path": tmp_path / "data.json",
    }
    with pytest.raises(SystemExit) as stop:
        main(command(**flags))
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "data.json, sample 6 (id 6): image file not found" in last
    assert "Traceback" not in last
    main(command(skip_bad_samples=True, **flags))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_process_ends_with_a_code_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llava.train.train_mem_pdrop", "--data_path", "x.json"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: give one of")


def test_every_field_of_ours_has_help():
    from llava.train import arguments

    actions = {action.dest: action.help for action in build_parser()._actions}
    for cls in (arguments.ModelArguments, arguments.DataArguments, arguments.TrainingArguments):
        for name in cls.__annotations__:
            assert actions[name], name
