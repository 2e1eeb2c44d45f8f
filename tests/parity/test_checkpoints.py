"""Miniatures of every public checkpoint: all names found, logits those of the writer.

Nothing real can be had here, so the files are small and random; names, shards and config keys are
the published ones (tests/miniatures.py).
"""

from __future__ import annotations

import numpy
import pytest
import torch
from miniatures import (
    HF_SPELLINGS,
    IMAGE_ID,
    ORIGINALS,
    PINS,
    SIDE,
    VISION,
    equal,
    hf_model,
    inputs,
    load,
    old_names,
    write_base,
    write_hf,
    write_lora,
    write_original,
    write_processor,
    write_projector_only,
    write_weights,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.model.builder import load_checkpoint, load_pretrained_model
from llava.model.multimodal_encoder.builder import read_tower

TEMPLATES = {
    "v1.5-7b": "vicuna_v1",
    "v1.5-13b": "vicuna_v1",
    "v1.6-vicuna-7b": "vicuna_v1",
    "v1.6-mistral-7b": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "pyramiddrop": "vicuna_v1",
    "yopo": "vicuna_v1",
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_checkpoints(name, tmp_path):
    # The folder's name says nothing; no rule may read it.
    reference = write_original(tmp_path / "x", name)
    loaded = load_checkpoint(tmp_path / "x", device="cpu", dtype=None)
    assert loaded.unused == ()
    assert loaded.choices.template.value == TEMPLATES[name]
    anyres = "v1.6" in name
    assert loaded.choices.image_mode.value == ("anyres" if anyres else "pad")
    inside = loaded.choices.tower.origin == "checkpoint"
    assert inside is ORIGINALS[name].get("tower", False)
    assert loaded.context_length == 512
    assert loaded.image_processor.crop_size["height"] == SIDE
    with torch.no_grad():
        expected = reference(**inputs(anyres)).logits
        got = loaded.model(**inputs(anyres)).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("spelling", HF_SPELLINGS)
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_llava_hf(kind, spelling, tmp_path):
    theirs = hf_model(kind, "mistral" if spelling == "hub" else "llama")
    write_hf(tmp_path / "x", theirs, spelling, "bin" if spelling == "hub" else "safetensors")
    loaded = load_checkpoint(tmp_path / "x", device="cpu", dtype=None)
    anyres = kind == "llava_next"
    assert loaded.unused == ()
    assert loaded.choices.image_mode.value == ("anyres" if anyres else "pad")
    given = inputs(anyres)
    pixels = given["images"][0][None]
    extra = {"image_sizes": torch.tensor([[100, 110]])} if anyres else {}
    with torch.no_grad():
        features = theirs.get_image_features(pixel_values=pixels, **extra).pooler_output[0]
        ids = torch.tensor([[1, 5, 6, *[IMAGE_ID] * len(features), 7, 8, 9]])
        expected = theirs(input_ids=ids, pixel_values=pixels, **extra).logits
        got = loaded.model(**given).logits
    equal(got, expected)
    if anyres:
        assert loaded.model.config.image_grid_pinpoints == [[w, h] for h, w in PINS]


def test_the_legacy_signature(tmp_path):
    write_original(tmp_path / "x", "v1.5-7b")
    tokenizer, model, processor, length = load_pretrained_model(
        str(tmp_path / "x"), None, "whatever", False, False, "auto", "cpu"
    )
    assert (model.dtype, model.training, length) == (torch.float32, False, 512)
    assert tokenizer("hello").input_ids[0] == 1
    assert processor.image_mean[0] == pytest.approx(0.48145466)
    half = load_pretrained_model(tmp_path / "x", device="cpu", dtype="checkpoint")[1]
    assert half.dtype == torch.float16


@pytest.mark.parametrize("prefix", ["", "base_model."])
def test_a_projector_over_its_base(prefix, tmp_path):
    base = write_base(tmp_path / "a")
    reference = write_projector_only(tmp_path / "b", base, prefix)
    loaded = load_checkpoint(tmp_path / "b", tmp_path / "a", device="cpu", dtype=None)
    assert loaded.unused == ()
    with torch.no_grad():
        equal(loaded.model(**inputs(False)).logits, reference(**inputs(False)).logits, 0)


@pytest.mark.parametrize("old_peft", [True, False])
def test_a_lora_run_over_its_base(old_peft, tmp_path):
    base = write_base(tmp_path / "a")
    reference = write_lora(tmp_path / "b", base, old_peft)
    loaded = load_checkpoint(tmp_path / "b", tmp_path / "a", device="cpu", dtype=None)
    assert loaded.unused == ()
    with torch.no_grad():
        without = load_checkpoint_of_base(tmp_path, base)(**inputs(False)).logits
        got, expected = loaded.model(**inputs(False)).logits, reference(**inputs(False)).logits
    equal(got, expected, 2e-5)
    assert (got - without).abs().max() > 0.1  # the adapter did something


def load_checkpoint_of_base(tmp_path, base):
    """The same projector and tower over the base without the adapter."""
    write_projector_only(tmp_path / "c", base)
    return load_checkpoint(tmp_path / "c", tmp_path / "a", device="cpu", dtype=None).model


@pytest.mark.parametrize("where", ["beside", "inside", "inside, last layer left out"])
def test_siglip_towers(where, tmp_path):
    """No class token, the features of the layer before the last, no pooling head."""
    vision = SiglipVisionConfig(**{k: v for k, v in VISION.items() if k != "projection_dim"})
    torch.manual_seed(4)
    tower = SiglipVisionModel(vision).eval()
    tower.save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "siglip")
    changes = {"mm_vision_tower": str(tmp_path / "siglip")}
    reference = write_original(tmp_path / "x", "v1.5-7b", **changes)
    if where != "beside":
        own = {
            f"model.vision_tower.vision_tower.vision_model.{k}": v
            for k, v in tower.state_dict().items()
            if ".layers.2." not in k or "left out" not in where
        }
        own |= {k: v for k, v in old_names(reference, False).items()}
        for file in (tmp_path / "x").glob("pytorch_model*"):
            file.unlink()
        write_weights(tmp_path / "x", own)
    loaded = load_checkpoint(tmp_path / "x", device="cpu", dtype=None)
    assert loaded.unused == ()
    given = inputs(False)
    pixels = given["images"][0][None]
    mine = loaded.model.get_vision_tower()
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2]
        equal(mine(pixels), expected)
    assert mine.tokens_per_tile == mine.num_patches == expected.shape[1]
    assert loaded.image_processor.image_mean[0] == 0.5 or where != "beside"
    assert loaded.model(**given).logits.shape[1] == 6 + expected.shape[1]


def test_plans_of_the_originals(tmp_path):
    """PyramidDrop's config.json does not say its plan; YOPO's names a file of its repository."""
    write_original(tmp_path / "p", "pyramiddrop")
    choice = load(tmp_path / "p").choices.plan
    assert not choice.value.cuts
    assert "--layer_list" in choice.origin
    reference = write_original(tmp_path / "x", "yopo")
    choice = load(tmp_path / "x").choices.plan
    assert choice.value.program is None
    assert "headmask_*_24.npy" in choice.origin
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, 1:3] = True
    (tmp_path / "x" / "headmask").mkdir()
    numpy.save(tmp_path / "x" / "headmask" / "headmask_7b_24.npy", mask.numpy())
    loaded = load(tmp_path / "x", dtype=None)
    program = loaded.choices.plan.value.program
    assert (program.layers, program.window, program.ffn, program.mode) == (2, 5, 2, "leaky")
    with torch.no_grad():
        got = loaded.model(**inputs(False)).logits
        same = reference(**inputs(False), reduction=str(loaded.choices.plan.value)).logits
        without = loaded.model(**inputs(False), reduction="none").logits
        expected = reference(**inputs(False)).logits
    assert torch.equal(got, same)
    assert torch.equal(without, expected)
    assert not torch.equal(got, expected)
    none = load(tmp_path / "x", reduction="none").choices.plan
    assert (none.value.program, none.origin) == (None, "flag")


def test_a_loaded_model_does_not_depend_on_its_files(tmp_path):
    """Weights are mapped from the files while they are read, and no longer: saving into the same
    folder, or overwriting a file in place, leaves the model as it is."""
    write_original(tmp_path / "x", "v1.6-vicuna-7b")
    model = load(tmp_path / "x").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for file in (tmp_path / "x").glob("*.safetensors"):
        with file.open("r+b") as handle:
            handle.write(bytes(file.stat().st_size))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.save_pretrained(tmp_path / "x")
    for file in (tmp_path / "x").glob("model-*"):
        file.unlink()
    again = load(tmp_path / "x")
    assert again.unused == ()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_as_the_hub_has_them(kind, tmp_path, capfd):
    """Whole CLIP and SigLIP models, text side included: the vision side is read, without a report
    of everything else."""
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    text["num_attention_heads"] = 2
    vision = {key: value for key, value in VISION.items() if key != "projection_dim"}
    model_class, config_class = {
        "clip": (CLIPModel, CLIPConfig), "siglip": (SiglipModel, SiglipConfig),
    }[kind]  # fmt: skip
    whole = model_class(config_class(vision_config=vision, text_config=text)).eval()
    whole.save_pretrained(tmp_path / "tower")
    write_processor(tmp_path / "tower")
    structure, weights, _ = read_tower(str(tmp_path / "tower"))
    assert structure["model_type"] == f"{kind}_vision_model"
    own = whole.vision_model.state_dict()
    assert weights.keys() == {key for key in own if not key.startswith("head.")}
    assert all(torch.equal(value, own[key]) for key, value in weights.items())
    assert "UNEXPECTED" not in capfd.readouterr().err
