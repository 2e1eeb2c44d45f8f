"""Prompts and batches: marks, padding, mixed samples."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from places import DATA
from transformers import AutoTokenizer

from llava.mm_utils import clip_image_processor_class, tokenizer_image_token
from llava.prompting import (
    blind_image,
    build_prompt,
    move_batch,
    pad_token_id,
    prepare_batch,
    tokenize_prompt,
)

PICTURE = Image.new("RGB", (40, 20), (10, 20, 30))


@pytest.fixture(scope="module")
def tokenizer():
    folder = DATA / "pyramiddrop" / "preprocess" / "tokenizer_nonlegacy"
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor():
    size = {"height": 28, "width": 28}
    return clip_image_processor_class()(size={"shortest_edge": 28}, crop_size=size)


def config(aspect: str = "pad") -> SimpleNamespace:
    return SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=[[28, 56], [56, 56]])


def test_one_question():
    prompt = build_prompt("What?", "v1")
    assert prompt.endswith("questions. USER: <image>\nWhat? ASSISTANT:")
    assert "<image>" not in build_prompt("What?", "v1", images=0)
    assert "USER: <image>\n<image>\nSame? ASS" in build_prompt("Same?", "v1", images=2)


def test_marks_stay_where_they_are():
    assert "USER: Is <image> like <image>? A" in build_prompt("Is <image> like <image>?", "v1", 2)
    with pytest.raises(ValueError, match=r"2 <image> marks but 1 image came"):
        build_prompt("<image> <image>", "v1", 1)
    with pytest.raises(ValueError, match=r"1 <image> mark but 0 images came"):
        build_prompt("<image>", "v1", 0)


def test_start_and_end_tokens():
    assert "<im_start><image><im_end>\nQ" in build_prompt("Q", "v1", 1, True)


def test_dialogue_in_three_spellings():
    turns = ["Q1", "A1", "Q2"]
    openai = [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, turns)]  # noqa: B905
    llava = [{"from": r, "value": t} for r, t in zip(["human", "gpt"] * 2, turns)]  # noqa: B905
    pairs = list(zip(["USER", "ASSISTANT"] * 2, turns))  # noqa: B905
    prompts = {build_prompt(form, "v1") for form in (openai, llava, pairs)}
    assert len(prompts) == 1
    assert prompts.pop().endswith("USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:")


def test_dialogue_out_of_order_is_refused():
    with pytest.raises(ValueError, match="turn 0 is of 'assistant'"):
        build_prompt([{"role": "assistant", "content": "A"}], "v1")
    with pytest.raises(ValueError, match="no open question"):
        build_prompt([("user", "Q"), ("assistant", "A")], "v1")


def test_one_bos_where_the_template_brings_its_own(tokenizer):
    ids = tokenize_prompt("<s>hello <image>\nx", tokenizer)
    assert ids == tokenizer_image_token("hello <image>\nx", tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch(tokenizer, processor, side):
    prompts = [
        build_prompt("What is shown in the picture?", "v1"),
        build_prompt("Hello", "v1", images=0),
        build_prompt("Are <image> and <image> the same?", "v1", images=2),
    ]
    images = [PICTURE, None, [PICTURE, Image.new("RGB", (5, 9))]]
    batch = prepare_batch(tokenizer, processor, config(), prompts, images, side)
    assert batch["images"].shape == (3, 3, 28, 28)
    assert batch["image_sizes"] == [(40, 20), (40, 20), (5, 9)]
    lengths = set()
    for row, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], prompts, strict=True):
        ids = tokenizer_image_token(prompt, tokenizer)
        assert row[mask.bool()].tolist() == ids
        assert (row[~mask.bool()] == pad_token_id(tokenizer)).all()
        edge = mask[-1] if side == "left" else mask[0]
        assert edge == 1
        lengths.add(len(ids))
    assert len(lengths) == 3


def test_text_only_batch_has_no_images(tokenizer, processor):
    batch = prepare_batch(tokenizer, processor, config(), ["Hello"], [None])
    assert batch["images"] is None
    assert batch["image_sizes"] is None


def test_anyres_comes_as_a_list_whether_or_not_tiles_agree(tokenizer, processor):
    for second, tiles in [(PICTURE, [5, 5]), (Image.new("RGB", (20, 60)), [5, 3])]:
        batch = prepare_batch(
            tokenizer, processor, config("anyres"), ["<image> <image>"], [[PICTURE, second]]
        )
        assert [image.shape[0] for image in batch["images"]] == tiles


def test_wrong_numbers_are_refused(tokenizer, processor):
    with pytest.raises(ValueError, match="prompt 1 of the batch has 1 <image> mark but 0"):
        prepare_batch(tokenizer, processor, config(), ["a", "<image>"], [None, None])
    with pytest.raises(ValueError, match="2 and 1"):
        prepare_batch(tokenizer, processor, config(), ["a", "b"], [None])
    with pytest.raises(ValueError, match="'middle'"):
        prepare_batch(tokenizer, processor, config(), ["a"], [None], "middle")


def test_blind_picture_is_zero(processor):
    pixels = processor.preprocess([blind_image((50, 30), processor)], return_tensors="pt")
    assert pixels["pixel_values"].abs().max() < 0.02


def test_move_batch_casts_pixels_only():
    ids = torch.ones(1, 2, dtype=torch.long)
    moved = move_batch({"i": ids, "p": [torch.ones(2)], "n": None}, "cpu", torch.bfloat16)
    assert moved["i"].dtype == torch.long
    assert moved["p"][0].dtype == torch.bfloat16
    assert moved["n"] is None
