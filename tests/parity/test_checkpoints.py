"""Miniatures of every public checkpoint: all names found, logits those of the writer.

Nothing real can be had here, so the files are small and random; names, shards and config keys are
the published ones (tests/miniatures.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from miniatures import (
    HF_SPELLINGS,
    IMAGE_ID,
    ORIGINALS,
    PINS,
    SIDE,
    hf_model,
    write_hf,
    write_original,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_checkpoint, load_pretrained_model

TEMPLATES = {
    "v1.5-7b": "vicuna_v1",
    "v1.5-13b": "vicuna_v1",
    "v1.6-vicuna-7b": "vicuna_v1",
    "v1.6-mistral-7b": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "pyramiddrop": "vicuna_v1",
}


def inputs(anyres: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    shape = (5, 3, SIDE, SIDE) if anyres else (3, SIDE, SIDE)
    pixels = torch.randn(shape, generator=generator)
    ids = torch.tensor([[1, 5, 6, IMAGE_TOKEN_INDEX, 7, 8, 9]])
    return {"input_ids": ids, "images": [pixels], "image_sizes": [(110, 100)]}


def equal(one: torch.Tensor, two: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_checkpoints(name, tmp_path):
    # The folder's name says nothing; no rule may read it.
    reference = write_original(tmp_path / "x", name)
    loaded = load_checkpoint(tmp_path / "x", device="cpu")
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
    loaded = load_checkpoint(tmp_path / "x", device="cpu")
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
