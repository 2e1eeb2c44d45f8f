"""Names of weights: every spelling goes there and back, and nothing is guessed."""

from __future__ import annotations

import pytest
from miniatures import HF_SPELLINGS, hf_model, spelled
from tiny import FAMILIES, tiny_model

from llava.model.key_maps import (
    adapter_names,
    from_llava,
    rename_all,
    shortened,
    spelling_of,
    to_llava,
    with_vision_model,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["hub", "nested"])
def test_each_name_goes_there_and_back(family, spelling):
    names = list(tiny_model(family, mm_patch_merge_type="spatial_unpad").state_dict())
    other = [from_llava(name, spelling) for name in names]
    assert len(set(other)) == len(names)
    assert spelling_of(other) == spelling
    assert [to_llava(name, spelling) for name in other] == names
    old = [with_vision_model(name) for name in names]
    assert spelling_of(old) == "llava"
    assert [to_llava(name, "llava") for name in old] == names
    assert sum("vision_model." in name for name in old) > 10


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_names_of_transformers_own_models(kind):
    """All spellings of llava-hf files, of transformers' modules, mean the same LLaVA names."""
    model = hf_model(kind)
    inside = {name: name for name in model.state_dict()}
    wanted = {to_llava(name, "nested") for name in inside}
    for spelling in HF_SPELLINGS:
        renamed = rename_all({spelled(name, spelling): name for name in inside})
        assert renamed.keys() == wanted
        assert {to_llava(name, "nested"): name for name in inside} == renamed
    back = {from_llava(name, "nested") for name in wanted}
    assert back == set(inside)


def test_what_has_no_name_is_said():
    for name in ("model.mm_projector.weight", "model.mm_projector.4.bias"):
        for spelling in ("hub", "nested"):
            with pytest.raises(ValueError, match=f"'{name}' has no name in the {spelling}"):
                from_llava(name, spelling)
    # A name that no table has stays as it is, and is reported by the comparison with the model.
    assert to_llava("something.else", "hub") == "something.else"
    twice = {"language_model.model.norm.weight": 1, "model.norm.weight": 2}
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is there twice"):
        rename_all(twice)


def test_buffers_that_nothing_reads_are_left_out():
    stale = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    )
    assert rename_all({**dict.fromkeys(stale, 0), "lm_head.weight": 1}) == {"lm_head.weight": 1}
    near = "model.layers.0.rotary_emb.inv_freq_scale"
    assert rename_all({near: 1}) == {near: 1}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("base_model.model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("base_model.model.model.image_newline", "model.image_newline"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        (
            "base_model.model.model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
            "model.vision_tower.vision_tower.post_layernorm.bias",
        ),
    ],
)
def test_names_in_adapters(name, meant):
    assert adapter_names({name: 1}) == {meant: 1}


def test_long_lists_are_shortened():
    assert shortened([]) == "none"
    assert shortened("ba") == "a, b"
    assert shortened(map(str, range(9)), most=2) == "0, 1 and 7 more"
