"""Weights on several devices: accelerate's offload, with cuts at a boundary.

No GPU is needed: weights on disk or in the CPU's memory come to their layer through accelerate's
hooks, just as they do on several cards, and whatever touches a layer's weights without calling the
layer fails here.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from miniatures import load, write_original

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PLANS = {
    "none": "none",
    "pyramiddrop": "pyramiddrop:layers=[1,2,3],ratios=[0.5,0.25,0.125]",
    "fastv": "fastv:k=2,r=0.5",
}


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([[1, 5, 6, IMAGE_TOKEN_INDEX, 7, 8, 9], [1, 4, 4, 4, 4, 4, 4]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "images": [torch.randn(5, 3, 56, 56, generator=generator)],
        "image_sizes": [(110, 100)],
    }


# Boundaries in front of, at and behind the cuts; a tower and a head elsewhere than the decoder.
MAPS: dict[str, dict[str, Any]] = {
    "everything on disk": {"": "disk"},
    "the later layers": {
        "model.embed_tokens": "cpu", "model.image_newline": "cpu", "model.vision_tower": "cpu",
        "model.mm_projector": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
        "model.layers.2": "disk", "model.layers.3": "disk", "model.norm": "disk",
        "model.rotary_emb": "cpu", "lm_head": "disk",
    },
    "every other layer": {
        "model.embed_tokens": "disk", "model.image_newline": "cpu", "model.vision_tower": "disk",
        "model.mm_projector": "disk", "model.layers.0": "disk", "model.layers.1": "cpu",
        "model.layers.2": "disk", "model.layers.3": "cpu", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_offloaded_weights_change_nothing(name, tmp_path):
    write_original(tmp_path / "x", "v1.6-vicuna-7b")
    whole = load(tmp_path / "x", dtype=None).model
    spread = load(
        tmp_path / "x", dtype=None, device_map=MAPS[name], offload_folder=tmp_path / "o"
    ).model
    assert any(parameter.is_meta for parameter in spread.parameters())
    for plan in PLANS.values():
        with torch.no_grad():
            expected = whole(**inputs(), reduction=plan).logits
            got = spread(**inputs(), reduction=plan).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        tokens = whole.generate(**inputs(), reduction=plan, max_new_tokens=4, do_sample=False)
        mine = spread.generate(**inputs(), reduction=plan, max_new_tokens=4, do_sample=False)
        assert mine.tolist() == tokens.tolist()


@pytest.mark.parametrize("room", [110, 150, 190])
def test_an_automatic_map_under_a_memory_limit(room, tmp_path):
    """`device_map="auto"` fills the devices in order; here the CPU's room ends among the layers."""
    write_original(tmp_path / "x", "v1.6-vicuna-7b")
    whole = load(tmp_path / "x", dtype=None).model
    memory = {"cpu": f"{room}KB"}
    spread = load(tmp_path / "x", dtype=None, device_map="auto", max_memory=memory).model
    places = set(spread.hf_device_map.values())
    assert places == {"cpu", "disk"}
    plan = PLANS["pyramiddrop"]
    with torch.no_grad():
        expected = whole(**inputs(), reduction=plan).logits
        torch.testing.assert_close(
            spread(**inputs(), reduction=plan).logits, expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("plan", "boundary"),
    [
        ("none", 2),
        ("pyramiddrop:layers=[1,3],ratios=[0.5,0.25]", 2),
        ("fastv:k=2,r=0.5", 2),
        ("fastv:k=2,r=0.5", 3),
        ("random:layers=[1,2,3],ratios=[0.7,0.5,0.3]", 2),
    ],
)
def test_a_second_device_behind_a_boundary(plan, boundary, tmp_path):
    """The meta device stands for a second card: whatever stays behind on the first one when the
    hidden states cross over ends in an error. (A layer behind the boundary cannot score tokens in
    front of it here, and no stage may begin there in decoding, because nothing comes back from the
    meta device; on a real one both copies are made.)"""
    write_original(tmp_path / "x", "v1.6-vicuna-7b")
    model = load(tmp_path / "x", dtype=None).model
    behind = [*model.model.layers[boundary:], model.model.norm, model.lm_head]
    for module in behind:
        hook = AlignDevicesHook(execution_device="meta", io_same_device=False)
        add_hook_to_module(module.to("meta"), hook)
    with torch.no_grad():
        out = model(**inputs(), reduction=plan, use_cache=True)
        assert out.logits.device.type == "meta"
        if all(stage.start <= boundary for stage in out.past_key_values.stages):
            step = model(torch.tensor([[5], [6]]), past_key_values=out.past_key_values)
            assert step.logits.device.type == "meta"
    # Training: the targets cross over with the hidden states (no gradient comes back from meta).
    model.train()
    labels = inputs()["input_ids"]
    labels[labels == IMAGE_TOKEN_INDEX] = IGNORE_INDEX
    out = model(**inputs(), labels=labels, reduction=plan, logits_to_keep="targets")
    assert out.loss.device.type == "meta"
    assert out.loss.requires_grad


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(bits, tmp_path):
    """bitsandbytes on the CPU: the decoder's linear layers alone, and the numbers of its own
    quantiser."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    reference = write_original(tmp_path / "x", "v1.5-7b", **sizes)
    loaded = load(tmp_path / "x", dtype=None, **{f"load_{bits}bit": True})
    assert f"in {bits} bits" in loaded.choices.dtype.origin
    small = {torch.uint8, torch.int8}
    quantised = {n for n, p in loaded.model.named_parameters() if p.dtype in small}
    inside = re.compile(r"model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight")
    assert len(quantised) == 4 * 7
    assert all(inside.fullmatch(name) for name in quantised)
    for name, parameter in reference.named_parameters():
        if name in quantised and bits == 4:
            packed, state = bnb.functional.quantize_4bit(
                parameter.data, quant_type="nf4", compress_statistics=True
            )
            parameter.data = bnb.functional.dequantize_4bit(packed, state)
    given = {**inputs(), "images": torch.randn(1, 3, 56, 56)}
    with torch.no_grad():
        got = loaded.model(**given, reduction="none").logits[0]
        expected = reference(**given, reduction="none").logits[0]
    # The kernels round their inputs (bfloat16, 8 bits): near, not equal.
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.99
    tokens = loaded.model.generate(**given, max_new_tokens=3, reduction=PLANS["pyramiddrop"])
    assert tokens.shape == (2, 3)


def test_bitsandbytes_that_is_not_there(tmp_path, monkeypatch):
    write_original(tmp_path / "x", "v1.5-7b")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"4 bits need bitsandbytes: pip install"):
        load(tmp_path / "x", load_4bit=True)
