"""LoRA: real runs through the command line's main(), their files, and what they load as."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import PLANS, SIZES, batch, labels_of, prompts, tiny_model
from transformers import AutoConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava.model.assemble import merge_lora
from llava.model.builder import load_pretrained_model
from llava.model.convert import convert
from llava.train import llava_trainer
from llava.train.arguments import TrainingArguments
from llava.train.lora import PREFIX, add_adapters
from llava.train.train import main

sys.path.insert(0, str(Path(__file__).parent))
from test_train import command, losses, pictures  # noqa: E402
from train_fixtures import write_all, write_tokenizer, write_tower  # noqa: E402

PYRAMID = {"layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.25]"}
LORA = {
    "lora_enable": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "max_steps": 6,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and tower, and a language model trained on text alone (`base`)."""
    folder = tmp_path_factory.mktemp("lora")
    write_all(folder)
    flags = {"init_from_config": folder / "config", "data_path": folder / "data" / "text.jsonl"}
    main(command(**flags, output_dir=folder / "base", max_steps=20))
    return folder


@pytest.fixture
def trained(monkeypatch) -> list:
    """Models of the runs of a test, as they were in memory behind the last step."""
    seen = []
    fit = llava_trainer.LLaVATrainer.train

    def keep(self, *args, **kwargs):
        result = fit(self, *args, **kwargs)
        seen.append(self.model)
        return result

    monkeypatch.setattr(llava_trainer.LLaVATrainer, "train", keep)
    return seen


def logits(model, plan=None):
    ids = torch.tensor([[1, 4, -200, 7, 8, 9, 5]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids, images=pixels, reduction=plan).logits


@pytest.mark.parametrize(
    "more",
    [{}, {"packed": True}, {"lora_qv_proj_only": True, "unfreeze_mm_vision_tower": True}],
    ids=["padded", "packed", "qv, tower"],
)
def test_a_run_loads_as_the_model_that_was_trained(files, tmp_path, trained, more):
    out = tmp_path / "run"
    data = pictures(files, "captions.json")
    flags = {"model_name_or_path": files / "base", **LORA, **PYRAMID, **data, **more}
    main(command(output_dir=out, **{**flags, "max_steps": 24}))
    curve = losses(out)
    assert curve[-1] < 0.9 * curve[0]

    assert not list(out.glob("model*.safetensors"))
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(files / "base")
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (4, 8, "none")
    few = ["q_proj", "v_proj"]
    every = sorted([*few, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert settings["target_modules"] == (few if "lora_qv_proj_only" in more else every)
    adapter = load_file(out / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert adapter[key].shape == (4, 16)
    assert len(adapter) == 4 * 2 * len(settings["target_modules"])
    rest = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert "base_model.model.model.mm_projector.0.weight" in rest
    assert any("vision_tower" in key for key in rest) is ("lora_qv_proj_only" in more)
    config = json.loads((out / "config.json").read_text())
    assert [cut["at"] for cut in config["visual_token_reduction"]["cuts"]] == [1, 2]
    summary = json.loads((out / "train_summary.json").read_text())
    card = (out / "README.md").read_text()
    for said in ("pyramiddrop:layers=[1,2]", summary["data_hash"], str(files / "base")):
        assert said in card
    counts = summary["trained_parameters"]
    assert counts["language"] == sum(value.numel() for value in adapter.values())

    tokenizer, model, processor, _ = load_pretrained_model(str(out), device="cpu")
    assert (len(tokenizer), processor.crop_size["height"]) == (17, 28)
    for plan in (None, "none", "fastv:k=2,r=0.5"):
        torch.testing.assert_close(logits(model, plan), logits(trained[0], plan))
    base = load_file(files / "base" / "model.safetensors")
    frozen = trained[0].state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(frozen[name], base[name])
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(frozen[f"{name}.base_layer.weight"], base[f"{name}.weight"])


def test_resume_equals_an_undisturbed_run(files, tmp_path):
    flags = command(
        model_name_or_path=files / "base",
        output_dir=tmp_path / "run",
        save_strategy="steps",
        save_steps=3,
        **{**LORA, "lora_dropout": 0.2},
        **PYRAMID,
        **pictures(files),
    )
    main(flags)
    names = ("adapter_model.safetensors", "non_lora_trainables.bin")
    whole = [torch.load(tmp_path / "run" / names[1], weights_only=True)]
    whole.append(load_file(tmp_path / "run" / names[0]))
    curve = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    for name in names:
        (tmp_path / "run" / name).unlink()
    main(flags)
    assert losses(tmp_path / "run") == curve
    again = [torch.load(tmp_path / "run" / names[1], weights_only=True)]
    again.append(load_file(tmp_path / "run" / names[0]))
    for old, new in zip(whole, again, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)


def adapted_and_merged(**flags):
    """A tiny model with adapters that change it much, and a plain one with the sum as weights."""
    adapted, merged = tiny_model(initializer_range=0.1), tiny_model(initializer_range=0.1)
    args = TrainingArguments(
        output_dir="unused", use_cpu=True, lora_enable=True, lora_r=4, lora_alpha=8, **flags
    )
    add_adapters(adapted, args, "base")
    generator = torch.Generator().manual_seed(5)
    halves = {}
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            halves[PREFIX + name] = parameter.data
    weights = dict(merged.state_dict())
    merge_lora(weights, halves, {"r": 4, "lora_alpha": 8}, "test")
    merged.load_state_dict(weights)
    return adapted.eval(), merged


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_sees_the_adapters(plan):
    """A probe or a slice that read the base's weights alone would keep or compute something else;
    what is kept, the logits and the loss are those of the merged model."""
    adapted, merged = adapted_and_merged()
    plain = tiny_model(initializer_range=0.1)
    inputs = batch(prompts())
    outs = []
    with torch.no_grad():
        for model in (adapted, merged, plain):
            outs.append(
                model(**inputs, labels=labels_of(inputs), reduction=PLANS[plan], return_trace=True)
            )
    ours, expected, without = outs
    for one, two in zip(ours.trace, expected.trace, strict=True):
        assert torch.equal(one.keep, two.keep)
        if one.score is not None:
            torch.testing.assert_close(one.score, two.score, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.logits, expected.logits, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(ours.loss, expected.loss)
    assert (without.loss - expected.loss).abs() > 1e-2


def test_dropout_of_adapters_does_not_touch_the_ranking():
    adapted, _ = adapted_and_merged(lora_dropout=0.9)
    for name, parameter in adapted.named_parameters():  # so that layer 1 sees the same both times
        if ".layers.0." in name and ".lora_B." in name:
            torch.nn.init.zeros_(parameter)
    inputs = batch(prompts())
    scores = []
    with torch.no_grad():
        for training in (False, True):
            out = adapted.train(training)(
                **inputs, reduction="pyramiddrop:layers=[1],ratios=[0.4]", return_trace=True
            )
            scores.append(out.trace[0].score)
        again = adapted.train()(**inputs, reduction="none").logits
        assert not torch.equal(again, adapted(**inputs, reduction="none").logits)
    torch.testing.assert_close(*scores)


def test_checkpointing_reaches_adapters_over_frozen_inputs(files, tmp_path):
    """Neither embeddings nor projector are trained: reentrant checkpoints would get no gradient."""
    flags = {"model_name_or_path": files / "base", **LORA, **PYRAMID, **pictures(files)}
    flags["freeze_mm_mlp_adapter"] = True
    main(command(output_dir=tmp_path / "off", **flags))
    for kind in ("true", "false"):
        main(
            command(
                output_dir=tmp_path / kind,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs=f'{{"use_reentrant": {kind}}}',
                **flags,
            )
        )
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "off"), abs=1e-5)
    curve = losses(tmp_path / "off")
    assert curve[-1] < curve[0]
    rest = torch.load(tmp_path / "off" / "non_lora_trainables.bin", weights_only=True)
    assert len(rest) == 4  # the projector is frozen, and the base does not hold it


def test_biases_and_a_longer_vocabulary_are_saved(files, tmp_path, trained):
    """Qwen2 has biases; <im_patch>, LLaVA's default, is one token more than the base has."""
    AutoConfig.for_model("qwen2", **{**SIZES, "vocab_size": 17, "pad_token_id": 3}).save_pretrained(
        tmp_path / "config"
    )
    write_tokenizer(tmp_path / "config")
    flags = pictures(files)
    text = {"data_path": files / "data" / "text.jsonl"}
    main(command(init_from_config=tmp_path / "config", output_dir=tmp_path / "base", **text))
    flags |= {"model_name_or_path": tmp_path / "base", "mm_use_im_patch_token": True, **LORA}
    for bias, count in (("lora_only", 2), ("all", 3)):
        out = tmp_path / bias
        main(command(output_dir=out, lora_bias=bias, lora_qv_proj_only=True, **flags))
        adapter = load_file(out / "adapter_model.safetensors")
        biases = [key for key in adapter if key.endswith(".bias")]
        assert len(biases) == count * SIZES["num_hidden_layers"]
        rest = torch.load(out / "non_lora_trainables.bin", weights_only=True)
        assert rest["base_model.model.lm_head.weight"].shape[0] == 18
        _, model, _, _ = load_pretrained_model(str(out), device="cpu")
        torch.testing.assert_close(logits(model), logits(trained[-1]))


def test_frozen_weights_in_half_the_memory_change_nothing(files, tmp_path, trained, monkeypatch):
    flags = {"model_name_or_path": files / "base", **LORA, **PYRAMID, **pictures(files)}
    flags |= {"bf16": True, "use_cpu": True}
    main(command(output_dir=tmp_path / "half", **flags))
    monkeypatch.setattr("llava.train.setup.halve_frozen", lambda model: None)
    main(command(output_dir=tmp_path / "whole", **flags))
    name = "model.layers.0.mlp.up_proj.base_layer.weight"
    dtypes = [model.state_dict()[name].dtype for model in trained]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    saved = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_a_stage_that_saves_a_part_names_its_base(files, tmp_path, trained):
    """The projector stage, and LoRA with DualSpeed's tokens, which a finished model leaves out."""
    flags = {"model_name_or_path": files / "base", **pictures(files, "captions.json")}
    main(command(**flags, tune_mm_mlp_adapter=True, output_dir=tmp_path / "projector"))
    more = {"pretrain_mm_mlp_adapter": tmp_path / "projector" / "mm_projector.bin"}
    more |= {"dual_speed": 0.5, **LORA, **PYRAMID}
    main(command(**{**flags, **more}, output_dir=tmp_path / "lora"))
    for name, model in zip(("projector", "lora"), trained, strict=True):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["base_model_name_or_path"] == str(files / "base")
        _, loaded, _, _ = load_pretrained_model(str(tmp_path / name), device="cpu")
        torch.testing.assert_close(logits(loaded, "none"), logits(model, "none"))
    rest = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", weights_only=True)
    assert not [key for key in rest if "isolator" in key]


def test_training_goes_on_from_any_layout(files, tmp_path, trained, capsys):
    """A LoRA run, as one model with its base and in transformers' layout, with the tower it has and
    with another one."""
    data = pictures(files, "captions.json")
    frozen = {"learning_rate": 0.0, **data}
    flags = {"model_name_or_path": files / "base", **LORA, **PYRAMID, **data}
    main(command(**flags, output_dir=tmp_path / "lora"))
    shown = logits(trained[0])
    main(command(**frozen, model_name_or_path=tmp_path / "lora", output_dir=tmp_path / "whole"))
    convert(tmp_path / "lora", tmp_path / "hf", "hf")
    frozen["vision_tower"] = None  # the checkpoint's own
    main(command(**frozen, model_name_or_path=tmp_path / "hf", output_dir=tmp_path / "of hf"))
    for model in trained[1:]:
        torch.testing.assert_close(logits(model)[..., :17], shown)  # the other layout adds rows
    write_tower(tmp_path / "tower", seed=2)
    over = {**LORA, **data, "model_name_or_path": tmp_path / "whole"}
    over |= {"vision_tower": tmp_path / "tower"}
    main(command(**over, output_dir=tmp_path / "new tower"))
    _, model, _, _ = load_pretrained_model(str(tmp_path / "new tower"), device="cpu")
    torch.testing.assert_close(logits(model), logits(trained[-1]))
    with pytest.raises(SystemExit):
        main(
            command(**{**flags, "model_name_or_path": tmp_path / "lora"}, output_dir=tmp_path / "x")
        )
    assert "llava convert --to llava" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(
            command(
                **{**frozen, "mm_projector_type": "mlp3x_gelu"},
                model_name_or_path=tmp_path / "whole",
                output_dir=tmp_path / "x",
            )
        )
    assert "has a trained projector of type mlp2x_gelu" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_beside_quantised_weights(files, tmp_path, trained, bits):
    """On the CPU, with bitsandbytes' own kernels: the language model's linear layers alone are
    quantised, the losses stay near those of full precision, and the run resumes bit by bit."""
    pytest.importorskip("bitsandbytes")
    config = json.loads((files / "config" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    config |= {"num_hidden_layers": 2}
    shutil.copytree(files / "config", tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    text = {"data_path": files / "data" / "text.jsonl"}
    main(command(init_from_config=tmp_path / "config", output_dir=tmp_path / "base", **text))
    data = pictures(files, "captions.json")
    flags = {"model_name_or_path": tmp_path / "base", **LORA, **PYRAMID, **data}
    flags |= {"layer_list": "[1]", "image_token_ratio_list": "[0.5]"}
    main(command(output_dir=tmp_path / "full", **flags))
    out = tmp_path / "run"
    flags |= {"bits": bits, "save_strategy": "steps", "save_steps": 3, "output_dir": out}
    main(command(**flags))
    curve, saved = losses(out), load_file(out / "adapter_model.safetensors")
    assert curve == pytest.approx(losses(tmp_path / "full"), abs=0.1)
    assert curve[-1] < 0.95 * curve[0]
    small = {n for n, p in trained[-1].named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert len(small) == 2 * 7
    assert all(name.endswith("_proj.base_layer.weight") for name in small)
    assert "quantization_config" not in (out / "config.json").read_text()
    _, model, _, _ = load_pretrained_model(str(out), device="cpu")  # over the unquantised base
    got, expected = logits(model), logits(trained[-1])
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.98
    shutil.rmtree(out / "checkpoint-6")
    main(command(**flags))
    assert losses(out) == curve
    again = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(again[key], saved[key]) for key in saved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tune_mm_mlp_adapter": True}, "--lora_enable has no use there"),
        ({"mm_tunable_parts": "mm_mlp_adapter"}, "--lora_enable has no use there"),
        ({"mm_use_im_start_end": True}, "cannot be trained with --lora_enable"),
        ({"lora_r": 0}, "--lora_r 0; accepted: 1 or more"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0; accepted"),
        ({"lora_bias": "some"}, "some"),
        ({"bits": 5}, "--bits 5; accepted: 4, 8, 16"),
        ({"bits": 4, "lora_enable": False}, "add --lora_enable True"),
        ({"bits": 4, "deepspeed": "scripts/zero3.json"}, "cannot be split by ZeRO-3"),
        ({"bits": 8, "fsdp": "full_shard"}, "cannot be split by FSDP"),
    ],
)
def test_bad_flags_end_in_one_line(files, tmp_path, capsys, flags, message):
    merged = {"model_name_or_path": files / "base", **LORA, **pictures(files), **flags}
    with pytest.raises(SystemExit) as stop:
        main(command(output_dir=tmp_path / "out", **merged))
    unset_hf_deepspeed_config()  # a parsed --deepspeed holds for the process
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_resume_refuses_another_run(files, tmp_path, capsys):
    flags = {"model_name_or_path": files / "base", **LORA, **pictures(files), "save_steps": 3}
    main(command(output_dir=tmp_path / "run", **{**flags, "save_strategy": "steps"}))
    with pytest.raises(SystemExit):
        main(
            command(
                output_dir=tmp_path / "run", **{**flags, "max_steps": 9, "lora_qv_proj_only": True}
            )
        )
    assert "checkpoint-6 is of another LoRA run" in capsys.readouterr().err
