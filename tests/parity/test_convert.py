"""`llava convert`: there and back bit by bit, and transformers' own classes read the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import (
    ORIGINALS,
    SIDE,
    VISION,
    edit,
    equal,
    hf_model,
    inputs,
    load,
    write_base,
    write_hf,
    write_lora,
    write_original,
    write_projector_only,
)
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import get_conversation
from llava.mm_utils import tokenizer_image_token
from llava.model.assemble import assemble
from llava.model.chat_template import chat_template
from llava.model.convert import convert, main
from llava.prompting import build_prompt, prepare_batch


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return assemble(folder).weights


def same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("vocabulary", [512, 480])
@pytest.mark.parametrize("name", ORIGINALS)
def test_from_llava_to_transformers_and_back(name, vocabulary, tmp_path):
    """512 rows hold <image> and <pad>; 480 rows are full, so rows are added and taken off again."""
    if name == "v1.6-34b" and vocabulary == 480:
        pytest.skip("its vocabulary is what names its template")
    size = {} if name == "v1.6-34b" else {"vocab_size": vocabulary}
    reference = write_original(tmp_path / "x", name, **size)
    convert(tmp_path / "x", tmp_path / "hf", "hf", max_shard_size="60KB")
    cls = LlavaNextForConditionalGeneration if "v1.6" in name else LlavaForConditionalGeneration
    theirs, report = cls.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    given = inputs("v1.6" in name)
    pixels = given["images"][0][None]
    extra = {"image_sizes": torch.tensor([[100, 110]])} if "v1.6" in name else {}
    image_id = theirs.config.image_token_index
    assert image_id == 480
    with torch.no_grad():
        count = len(theirs.get_image_features(pixel_values=pixels, **extra).pooler_output[0])
        ids = torch.tensor([[1, 5, 6, *[image_id] * count, 7, 8, 9]])
        got = theirs(input_ids=ids, pixel_values=pixels, **extra).logits
        expected = reference(**given).logits
        equal(got[..., : expected.shape[-1]], expected)
        equal(load(tmp_path / "hf", dtype=None).model(**given).logits, got)
    main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "llava"])
    same_bits(weights_of(tmp_path / "back"), weights_of(tmp_path / "x"))
    before, after = load(tmp_path / "x"), load(tmp_path / "back")
    for choice in ("template", "image_mode", "plan", "dtype"):
        assert getattr(before.choices, choice).value == getattr(after.choices, choice).value
    keys = set(before.model.config.to_dict()) - {"pretraining_tp", "use_mm_proj"}
    own = {key: value for key, value in before.model.config.to_dict().items() if key in keys}
    kept = after.model.config.to_dict()
    for key in ("vocab_size", "pad_token_id", "rope_parameters", "mm_hidden_size", "hidden_size",
                "image_grid_pinpoints", "mm_vision_tower", "mm_vision_select_layer"):  # fmt: skip
        assert own.get(key) == kept.get(key), key
    assert len(before.tokenizer) == len(after.tokenizer)
    assert before.tokenizer.chat_template == after.tokenizer.chat_template
    assert after.tokenizer.pad_token == before.tokenizer.pad_token


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_from_transformers_to_llava_and_back(kind, tmp_path):
    write_hf(tmp_path / "x", hf_model(kind), "hub")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "llava", "llava")
    raw = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert raw["architectures"] == ["LlavaLlamaForCausalLM"]
    assert raw["rope_theta"] == 10000.0
    convert(tmp_path / "llava", tmp_path / "back", "hf")
    one, two = weights_of(tmp_path / "x"), weights_of(tmp_path / "back")
    same_bits(one, two)
    same_bits(one, weights_of(tmp_path / "llava"))
    with torch.no_grad():
        given = inputs(kind == "llava_next")
        expected = load(tmp_path / "x").model(**given).logits
        assert torch.equal(load(tmp_path / "llava").model(**given).logits, expected)


def test_a_siglip_tower_in_transformers_layout(tmp_path):
    """No class token: transformers' strategy is `full`, and the pooling head is left out."""
    vision = {key: value for key, value in VISION.items() if key != "projection_dim"}
    torch.manual_seed(4)
    tower = SiglipVisionModel(SiglipVisionConfig(**vision)).eval()
    tower.save_pretrained(tmp_path / "siglip")
    processor = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(tmp_path / "siglip")
    write_original(tmp_path / "x", "v1.5-7b", mm_vision_tower=str(tmp_path / "siglip"))
    convert(tmp_path / "x", tmp_path / "hf", "hf")
    theirs, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    given = inputs(False)
    ids = torch.tensor([[1, 5, 6, *[theirs.config.image_token_index] * 16, 7, 8, 9]])
    with torch.no_grad():
        expected = load(tmp_path / "x", dtype=None).model(**given).logits
        equal(theirs(input_ids=ids, pixel_values=given["images"][0][None]).logits, expected)
        equal(load(tmp_path / "hf", dtype=None).model(**given).logits, expected)
    made = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    picture = Image.new("RGB", (SIDE, 20))
    assert made(text="<image>", images=picture)["input_ids"][0].count(480) == 16
    convert(tmp_path / "hf", tmp_path / "back", "llava")
    same_bits(weights_of(tmp_path / "back"), weights_of(tmp_path / "x"))


def test_adapters_are_merged_on_the_way(tmp_path):
    base = write_base(tmp_path / "a")
    reference = write_lora(tmp_path / "b", base, old_peft=False)
    edit(tmp_path / "b", conv_mode="llava_v1", visual_token_reduction=None)
    convert(tmp_path / "b", tmp_path / "whole", "llava", model_base=tmp_path / "a")
    merged = load(tmp_path / "whole", dtype=None)
    assert merged.choices.template.value == "llava_v1"
    with torch.no_grad():
        equal(merged.model(**inputs(False)).logits, reference(**inputs(False)).logits, 2e-5)
    names = {name for file in (tmp_path / "whole").glob("*.safetensors") for name in keys_of(file)}
    assert "model.vision_tower.vision_tower.vision_model.post_layernorm.bias" in names


def keys_of(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as reader:
        return list(reader.keys())


@pytest.mark.parametrize(
    ("size", "legacy", "marks"),
    [
        ((90, 40), True, False),
        ((33, 100), False, False),
        ((56, 56), False, False),
        ((56, 56), True, True),
        ((56, 56), False, True),
    ],
)
def test_the_processor_and_the_template_are_ours(size, legacy, marks, tmp_path):
    """transformers' processor gives the pixels and the ids that this project makes; marks: with
    <im_start> and <im_end>, which the tokenizer's files do not hold yet."""
    write_original(tmp_path / "x", "v1.5-7b", mm_use_im_start_end=marks)
    file = tmp_path / "x" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "legacy": legacy}))
    convert(tmp_path / "x", tmp_path / "hf", "hf")
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    ours, again = load(tmp_path / "x"), load(tmp_path / "hf")
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(values.numpy())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello"}]}]
    prompt = theirs.apply_chat_template(chat, add_generation_prompt=True)
    own = build_prompt("hello", "vicuna_v1", mm_use_im_start_end=marks)
    assert prompt.replace("> \n", ">\n") == own
    assert ("> \n" in prompt) is not (legacy or marks)
    got = theirs(text=prompt, images=picture, return_tensors="pt")
    batch = prepare_batch(ours.tokenizer, ours.image_processor, ours.model.config, [own], [picture])
    torch.testing.assert_close(got["pixel_values"], batch["images"], atol=1e-5, rtol=0)
    image_id = again.model.config.image_token_index
    folded = [IMAGE_TOKEN_INDEX if i == image_id else i for i in got["input_ids"][0].tolist()]
    once = [x for i, x in enumerate(folded) if x >= 0 or folded[i - 1] >= 0]
    assert folded.count(IMAGE_TOKEN_INDEX) == 16
    assert once == batch["input_ids"][0].tolist() == tokenizer_image_token(own, again.tokenizer)


def dialogue(turns: int) -> list[dict[str, Any]]:
    said = [("user", "What is it?"), ("assistant", "A 'cat'."), ("user", "Sure?\nReally?")]
    return [{"role": role, "content": text} for role, text in said[:turns]]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize(
    "mode", ["vicuna_v1", "llava_v1", "mistral_instruct", "chatml_direct", "qwen_1_5", "llava_v0"]
)
def test_templates_of_transformers_give_our_prompts(mode, turns, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(str(write_tokenizer(tmp_path)))
    tokenizer.chat_template = chat_template(get_conversation(mode))
    text = tokenizer.apply_chat_template(
        dialogue(turns), tokenize=False, add_generation_prompt=True
    )
    assert text == build_prompt(dialogue(turns), mode, images=0)


def test_templates_that_chats_cannot_say():
    for mode in ("plain", "llava_llama_2", "llava_llama_3"):
        assert chat_template(get_conversation(mode)) is None


def write_tokenizer(folder: Path) -> Path:
    import shutil

    from miniatures import TOKENIZER

    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


def test_what_cannot_be_converted(tmp_path, capsys):
    write_original(tmp_path / "x", "v1.5-7b")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "x", tmp_path / "there", "hf")
    edit(tmp_path / "x", mm_patch_merge_type="spatial_unpad")
    with pytest.raises(ValueError, match=r"missing: model\.image_newline"):
        convert(tmp_path / "x", tmp_path / "y", "hf")
    edit(tmp_path / "x", mm_patch_merge_type="flat", image_aspect_ratio="anyres")
    with pytest.raises(ValueError, match="'anyres' with mm_patch_merge_type 'flat'"):
        convert(tmp_path / "x", tmp_path / "y", "hf")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "x"), str(tmp_path / "y"), "--to", "hf"])
    assert ended.value.code == 2
    base = write_base(tmp_path / "a")
    with pytest.raises(ValueError, match="plain language model"):
        convert(tmp_path / "a", tmp_path / "y", "hf")
    write_projector_only(tmp_path / "b", base)
    with pytest.raises(ValueError, match="give its base"):
        convert(tmp_path / "b", tmp_path / "y", "hf")
    assert {file.name for file in tmp_path.iterdir()} == {
        "x", "there", "a", "b", "clip-vit-large-patch14-336",
    }  # fmt: skip
