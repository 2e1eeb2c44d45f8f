"""YOPO fine-tuning from a head mask on disk, in every stage, through the command line's main()."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from llava.train.train import main

sys.path.insert(0, str(Path(__file__).parent))
from test_train import command, losses, pictures  # noqa: E402
from test_train_lora import logits, trained  # noqa: E402, F401
from train_fixtures import write_all  # noqa: E402

MASK = np.array([[True, True], [False, True], [True, False], [False, False]])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tower, head masks, and a language model trained on text alone (`base`)."""
    folder = tmp_path_factory.mktemp("yopo")
    write_all(folder)
    np.save(folder / "wide.npy", np.ones((4, 3), dtype=bool))
    flags = {"init_from_config": folder / "config", "data_path": folder / "data" / "text.jsonl"}
    main(command(**flags, output_dir=folder / "base", max_steps=20))
    return folder


@pytest.mark.parametrize("mode", ["renorm", "leaky"])
def test_fine_tuning_from_a_head_mask(files, tmp_path, trained, mode):  # noqa: F811
    """The stage after the ordinary projector stage, packed and padded and with LoRA; what is saved
    holds the mask itself and computes what the trained model computed."""
    np.save(tmp_path / "mask.npy", MASK)
    plan = f"yopo:layers=3,heads={tmp_path / 'mask.npy'},window=1,ffn=2,mode={mode}"
    base = {"model_name_or_path": files / "base", "optim": "sgd", **pictures(files)}
    first = {**base, **pictures(files, "captions.json"), "tune_mm_mlp_adapter": True}
    main(command(**first, output_dir=tmp_path / "projector"))
    base |= {"pretrain_mm_mlp_adapter": tmp_path / "projector" / "mm_projector.bin"}
    base |= {"reduction": plan, "max_steps": 6}
    runs = {
        "padded": {},
        "packed": {"packed": True},
        "checkpointed": {"gradient_checkpointing": True},
        "lora": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
    }
    for name, flags in runs.items():
        main(command(**{**base, **flags}, output_dir=tmp_path / name))
    curve = losses(tmp_path / "padded")
    assert losses(tmp_path / "packed") == pytest.approx(curve, abs=1e-5)
    assert losses(tmp_path / "checkpointed") == pytest.approx(curve, abs=1e-5)
    (tmp_path / "mask.npy").unlink()
    before = load_file(files / "base" / "model.safetensors")
    after = load_file(tmp_path / "padded" / "model.safetensors")
    layers = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(4)]
    assert all(not torch.equal(before[name], after[name]) for name in layers)
    for name, model in (("padded", trained[1]), ("lora", trained[-1])):
        saved = json.loads((tmp_path / name / "config.json").read_text())["visual_token_reduction"]
        assert saved["program"]["heads"] == ["11", "01", "10", "00"]
        assert saved["program"]["mode"] == mode
        _, loaded, _, _ = load_pretrained_model(str(tmp_path / name), device="cpu")
        torch.testing.assert_close(logits(loaded), logits(model))
        difference = logits(loaded)[:, -1] - logits(loaded, "none")[:, -1]
        assert difference.abs().max() > 1e-4


def test_the_projector_stage_takes_the_plan_too(files, tmp_path):
    np.save(tmp_path / "mask.npy", MASK)
    main(
        command(
            model_name_or_path=files / "base",
            tune_mm_mlp_adapter=True,
            reduction=f"yopo:layers=3,heads={tmp_path / 'mask.npy'},window=1,ffn=2",
            output_dir=tmp_path / "out",
            **pictures(files, "captions.json"),
        )
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["visual_token_reduction"]["program"]["heads"] == ["11", "01", "10", "00"]


def test_a_mask_of_another_model_is_refused(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            command(
                model_name_or_path=files / "base",
                reduction=f"yopo:layers=3,heads={files / 'wide.npy'}",
                output_dir=tmp_path / "out",
                **pictures(files),
            )
        )
    assert stop.value.code == 2
    assert "4 layers x 3 heads; the model has 4 layers x 2 heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
