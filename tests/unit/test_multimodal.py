"""Pictures into sequences: geometry, errors, LLaVA's own entry, checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TILE, VISION, VISUAL, batch, prompts, tiny_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM, LlavaLlamaForCausalLM_PDrop
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import processor_for
from llava.model.multimodal_prep import NEWLINE, assign_pictures, picture_tokens, splice
from llava.model.multimodal_projector.builder import build_vision_projector


def geometry(tiles, size=None, **config):
    return picture_tokens(
        tiles, patches_per_tile=4, side=2, tile_size=28, size=size, config=SimpleNamespace(**config)
    )


ANYRES = {
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[56, 28], [28, 56], [56, 56]],
}


def test_tokens_of_one_tile():
    assert geometry(None).source.tolist() == [0, 1, 2, 3]
    assert geometry(1, mm_patch_merge_type="spatial_unpad").source.tolist() == [0, 1, 2, 3, NEWLINE]
    assert geometry(2).source.tolist() == list(range(8))
    assert geometry(2).grid.tolist() == [0] * 4 + [1] * 4


def test_tokens_of_an_anyres_picture():
    """56 x 28: two tiles side by side join to a field of 2 x 4, each row ends in a newline."""
    picture = geometry(3, (56, 28), **ANYRES)
    field = [4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    assert picture.source.tolist() == [0, 1, 2, 3, *field]
    assert picture.cell.tolist()[4:9] == [[2, 0], [2, 1], [2, 2], [2, 3], [2, 4]]
    assert picture.grid.tolist() == [0] * 4 + [1] * 10
    assert picture.tile.tolist() == [0] * 4 + [1, 1, 2, 2, 2] * 2
    joined = geometry(3, (56, 28), **{**ANYRES, "mm_patch_merge_type": "spatial"})
    assert joined.source.tolist()[4:] == [n for n in field if n != NEWLINE]
    assert np.all(geometry(3, (56, 28), **{**ANYRES, "mm_patch_merge_type": "flat"}).source < 12)


@pytest.mark.parametrize(("size", "newlines"), [((2, 60), 4), ((60, 2), 0)])
def test_a_picture_that_unpads_to_nothing(size, newlines):
    """Of a very narrow picture the rows' newlines are left, of a very flat one the whole image."""
    picture = geometry(3, size, **ANYRES)
    assert picture.source.tolist() == [0, 1, 2, 3] + [NEWLINE] * newlines
    assert picture.tile.tolist() == [0, 0, 0, 0, *[1, 1, 2, 2][:newlines]]
    assert len(picture.cell) == len(picture.grid) == len(picture)


@pytest.mark.parametrize(
    ("tiles", "size", "changes", "message"),
    [
        (3, (28, 56), {"image_aspect_ratio": "pad"}, "anyres"),
        (3, None, {}, "image size"),
        (4, (56, 28), {}, "2 x 1"),
        (1, None, {"mm_patch_merge_type": "spiral"}, "spatial_unpad"),
    ],
)
def test_geometry_that_does_not_fit(tiles, size, changes, message):
    with pytest.raises(ValueError, match=message):
        geometry(tiles, size, **{**ANYRES, **changes})


def test_pictures_belong_to_marks_with_or_without_dummies():
    assert assign_pictures([1, 0, 2], 3) == [[0], [], [1, 2]]
    assert assign_pictures([1, 0, 2], 4) == [[0], [], [2, 3]]
    with pytest.raises(ValueError, match="3"):
        assign_pictures([1, 0, 2], 2)
    with pytest.raises(ValueError, match="3"):
        assign_pictures([1, 0, 2], 5)


def test_grids_are_numbered_through_a_sample():
    sequence = tiny_model().build_sequence(**batch(prompts()))
    assert sequence.grid[2].unique().tolist() == [-1, 0, 1]
    assert ((sequence.grid >= 0) == (sequence.cell[..., 0] >= 0)).all()


def test_tiles_compete_apart_until_they_are_joined():
    """Rows of tiles alternate in the sequence; a group is a tile, then a picture, then a sample."""
    pictures = [geometry(3, (56, 28), **ANYRES), geometry(None)]
    ids = np.array([[5, -200, 6, -200, 7], [5, 6, 7, 8, 9]])
    layout = splice(ids, np.ones_like(ids, dtype=bool), None, pictures, "left", None).layout
    assert [(g.sample, g.image, g.tile, g.count) for g in layout.groups] == [
        (0, 0, 0, 4), (0, 0, 1, 4), (0, 0, 2, 6), (0, 1, 0, 4)
    ]  # fmt: skip
    assert layout.coarsen("tile") == (layout, (0, 1, 2, 3))
    images, regroup = layout.coarsen("image")
    assert [(g.image, g.tile, g.count) for g in images.groups] == [(0, -1, 14), (1, -1, 4)]
    assert regroup == (0, 0, 0, 1)
    assert images.coarsen("image") == (images, (0, 1))
    samples, regroup = images.coarsen("sample")
    assert [(g.image, g.original) for g in samples.groups] == [(-1, 18)]
    assert regroup == (0, 0)
    assert layout.coarsen("sample")[0] == samples


def test_bad_batches_are_named():
    model = tiny_model()
    inputs = batch(prompts()[:1])
    with pytest.raises(ValueError, match=r"1 .*2|2 .*1"):
        model(**{**inputs, "images": torch.randn(2, 3, TILE, TILE)})
    with pytest.raises(ValueError, match="3, H, W"):
        model(**{**inputs, "images": [torch.randn(TILE, TILE)]})
    with pytest.raises(ValueError, match="image sizes"):
        model(**inputs, image_sizes=[(28, 28), (28, 28)])
    with pytest.raises(ValueError, match="holes"):
        model(
            inputs["input_ids"], torch.tensor([[1, 0] * 6 + [1]])[:, :13], images=inputs["images"]
        )
    with pytest.raises(ValueError, match="StagedCache"):
        model(inputs["input_ids"], images=inputs["images"], past_key_values=(1,))
    model.config.tokenizer_model_max_length = 20
    with pytest.raises(ValueError, match=r"28 tokens .16 of them visual.*20"):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_llavas_own_entry_keeps_its_tuple():
    model = tiny_model()
    inputs = batch(prompts())
    labels = inputs["input_ids"].clone()
    out = model.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"], None, inputs["attention_mask"], None, labels, inputs["images"]
    )
    ids, positions, mask, cache, embeddings, new_labels = out
    assert ids is positions is cache is None
    assert embeddings.shape[:2] == mask.shape == new_labels.shape
    lengths = [len(ids) + (VISUAL - 1) * n for ids, n in prompts()]
    assert mask.sum(1).tolist() == lengths
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    assert new_labels[0, 5 : 5 + VISUAL].unique().tolist() == [-100]
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
    direct = model(**inputs).logits
    torch.testing.assert_close(logits[0, : lengths[0]], direct[0, : lengths[0]])
    untouched = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, None)
    assert untouched == (None,) * 6
    same = LlavaLlamaForCausalLM.prepare_inputs_labels_for_multimodal_pdrop
    assert same is LlavaLlamaForCausalLM.prepare_inputs_labels_for_multimodal


def test_names_of_the_original_readme_import():
    from llava.model.language_model.llava_llama_pdrop import LlavaLlamaForCausalLM_PDrop as again
    from llava.model.modeling_llama_pdrop import pdrop_forward, pdrop_rank_drop

    assert LlavaLlamaForCausalLM_PDrop is again is LlavaLlamaForCausalLM
    assert callable(pdrop_forward)
    assert callable(pdrop_rank_drop)


def test_a_training_batch_without_pictures_still_runs_tower_and_projector():
    model = tiny_model().train()
    calls = []
    model.model.mm_projector.register_forward_hook(lambda *_: calls.append(1))
    inputs = batch(prompts()[1:2])
    assert inputs["images"] is None
    labels = inputs["input_ids"].clone()
    model(**inputs, labels=labels, reduction="pyramiddrop:layers=[2],ratios=[0.5]").loss.backward()
    assert calls == [1]
    grad = model.model.mm_projector[0].weight.grad
    assert grad is not None
    assert float(grad.abs().max()) == 0


def test_projectors():
    config = SimpleNamespace(mm_hidden_size=8, hidden_size=8, mm_projector_type="mlp3x_gelu")
    assert list(build_vision_projector(config).state_dict()) == [
        f"{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")
    ]
    for kind in ("linear", "identity"):
        config.mm_projector_type = kind
        assert build_vision_projector(config)(torch.randn(2, 8)).shape == (2, 8)
    for kind, width in (("mlp0x_gelu", 8), ("perceiver", 8), ("identity", 9)):
        config.mm_projector_type, config.hidden_size = kind, width
        with pytest.raises(ValueError, match="mm_projector_type"):
            build_vision_projector(config)


def tower_folder(tmp_path):
    values = {k: v for k, v in VISION["mm_vision_config"].items() if k != "model_type"}
    folder = tmp_path / "tower"
    tower = CLIPVisionModel(CLIPVisionConfig(**values))
    tower.save_pretrained(folder)
    processor_for(tower.config).save_pretrained(folder)
    return folder, tower


def test_a_new_tower_and_projector(tmp_path):
    folder, tower = tower_folder(tmp_path)
    model = tiny_model(mm_vision_tower=None)
    assert model.get_vision_tower() is None
    arguments = SimpleNamespace(
        vision_tower=str(folder),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="linear",
        mm_patch_merge_type="spatial_unpad",
        pretrain_mm_mlp_adapter=None,
    )
    model.get_model().initialize_vision_modules(arguments)
    mine = model.get_vision_tower()
    assert mine.num_patches == VISUAL
    torch.testing.assert_close(
        mine.vision_tower.embeddings.class_embedding, tower.embeddings.class_embedding
    )
    adapter = tmp_path / "mm_projector.bin"
    weight = torch.randn(32, 24)
    saved = {"model.mm_projector.weight": weight, "model.mm_projector.bias": torch.zeros(32)}
    saved["model.image_newline"] = torch.full((32,), 0.5)
    torch.save(saved, adapter)
    arguments.pretrain_mm_mlp_adapter = str(adapter)
    model.get_model().initialize_vision_modules(arguments)
    assert torch.equal(model.model.mm_projector.weight, weight)
    assert model.model.image_newline[3].item() == 0.5
    torch.save({"model.mm_projector.0.weight": weight}, adapter)
    with pytest.raises(ValueError, match="0.weight"):
        model.get_model().initialize_vision_modules(arguments)


def test_towers_that_are_not_there():
    with pytest.raises(ValueError, match="mm_vision_tower"):
        build_vision_tower(SimpleNamespace())
    with pytest.raises(ValueError, match="cannot be read"):
        build_vision_tower(SimpleNamespace(mm_vision_tower="/nowhere/clip"), delay_load=False)
    with pytest.raises(ValueError, match="select_feature"):
        build_vision_tower(
            SimpleNamespace(
                mm_vision_tower="x", mm_vision_select_feature="class", mm_vision_config={}
            )
        )


@pytest.fixture
def checkpoint(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = tiny_model(
        visual_token_reduction={"cuts": [{"at": 2, "method": "uniform", "ratio": 0.5}]}
    )
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder, model


def test_a_checkpoint_holds_its_tower_and_its_plan(checkpoint):
    folder, model = checkpoint
    tokenizer, loaded, processor, context = load_pretrained_model(folder, None, "any", device="cpu")
    inputs = batch(prompts())
    with torch.no_grad():
        first = model(**inputs, return_trace=True)
        second = loaded(**inputs, return_trace=True)
    assert len(second.trace) == 1
    assert torch.equal(first.logits, second.logits)
    assert context == 512
    assert len(tokenizer) == 3
    assert processor.crop_size["height"] == TILE
    switched = load_pretrained_model(folder, device="cpu", reduction="none")[1]
    assert len(switched(**inputs, return_trace=True).trace) == 0


def test_a_tower_of_its_own_folder(checkpoint, tmp_path):
    """Without tower weights the checkpoint's tower is read from mm_vision_tower."""
    import json

    from safetensors.torch import load_file, save_file

    folder, _ = checkpoint
    tower, original = tower_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "vision_tower" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.update(mm_vision_tower=str(tower), mm_vision_config=None)
    (folder / "config.json").write_text(json.dumps(config))
    model = load_pretrained_model(folder, device="cpu")[1]
    mine = model.get_vision_tower().vision_tower.embeddings.class_embedding
    torch.testing.assert_close(mine, original.embeddings.class_embedding)


def test_broken_checkpoints_are_named(checkpoint, tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    folder, _ = checkpoint
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_pretrained_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_pretrained_model(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="gpt2"):
        load_pretrained_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        load_pretrained_model(folder)


def test_ids_of_a_picture_are_the_mark():
    assert prompts()[0][0].count(IMAGE_TOKEN_INDEX) == 1
