"""What llava-hf processors return goes in as it is: logits and tokens of transformers' own classes.

Without cuts everything equals `LlavaForConditionalGeneration` / `LlavaNextForConditionalGeneration`
holding the same random weights, below 1e-5 in float32; with cuts it equals the -200 path, bit for
bit. Padding on either side, samples without and with several pictures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_transformers import IMAGE_ID, PINS, close, give_weights, hf_configs
from tiny import PLANS, TILE, VISUAL, tiny_model
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

TEXT = [[1, 5, 6], [7, 8, 9, 4], [33, 12]]
SIZES_HW = [(30, 50), (90, 20), (28, 28)]


def pair(anyres: bool) -> tuple[Any, Any]:
    """(ours, transformers') with the same weights."""
    torch.manual_seed(11)
    if not anyres:
        config = LlavaConfig(**hf_configs(), image_seq_length=VISUAL)
        theirs = LlavaForConditionalGeneration(config).eval()
        ours = tiny_model(image_token_index=IMAGE_ID)
    else:
        config = LlavaNextConfig(**hf_configs(), image_grid_pinpoints=PINS)
        theirs = LlavaNextForConditionalGeneration(config).eval()
        torch.nn.init.normal_(theirs.model.image_newline)
        ours = tiny_model(
            mm_patch_merge_type="spatial_unpad",
            image_aspect_ratio="anyres",
            image_grid_pinpoints=[[w, h] for h, w in PINS],
            mm_unpad_rounding="transformers",
            image_token_index=IMAGE_ID,
        )
    give_weights(ours, theirs)
    return ours, theirs


def pictures(theirs: Any, anyres: bool) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
    """(processor-like tensors, visual tokens of each of three pictures, the same in our terms)."""
    if not anyres:
        pixels = torch.randn(3, 3, TILE, TILE)
        return {"pixel_values": pixels}, [VISUAL] * 3, {"images": pixels}
    tiles = [image_size_to_num_patches(size, PINS, TILE) for size in SIZES_HW]
    assert len(set(tiles)) > 1
    pixels = torch.zeros(3, max(tiles), 3, TILE, TILE)
    for index, count in enumerate(tiles):
        pixels[index, :count] = torch.randn(count, 3, TILE, TILE)
    sizes = torch.tensor(SIZES_HW)
    with torch.no_grad():
        features = theirs.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output
    own = {
        "images": [stack[:count] for stack, count in zip(pixels, tiles, strict=True)],
        "image_sizes": [(w, h) for h, w in SIZES_HW],
    }
    return {"pixel_values": pixels, "image_sizes": sizes}, [len(each) for each in features], own


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[index, columns], mask[index, columns] = torch.tensor(row), 1
    return ids, mask.long()


def batches(counts: list[int], side: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(expanded, with -200 marks): two pictures that touch, text only, one picture."""

    def rows(*pictures: list[int]) -> list[list[int]]:
        first, second, third = pictures
        before, after, alone = TEXT
        return [[*before, *first, *second, *after], [1, *alone, 9], [*third, *after, *alone]]

    expanded = rows(*([IMAGE_ID] * count for count in counts))
    marked = rows(*([[IMAGE_TOKEN_INDEX]] * 3))
    out = []
    for each in (expanded, marked):
        ids, mask = padded(each, side)
        out.append({"input_ids": ids, "attention_mask": mask})
    return out[0], out[1]


@pytest.mark.parametrize("anyres", [False, True], ids=["llava-1.5", "llava-next"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_processor_batches_equal_transformers_and_our_own_marks(anyres, side):
    ours, theirs = pair(anyres)
    given, counts, own = pictures(theirs, anyres)
    expanded, marked = batches(counts, side)
    real = expanded["attention_mask"].bool()
    expected = theirs(**expanded, **given)
    got = ours(**expanded, **given, reduction="none")
    assert got.logits.shape == expected.logits.shape
    close(got.logits[real], expected.logits[real])
    last = ours(**expanded, **given, logits_to_keep=1).logits
    close(last[:, 0], got.logits[:, -1])
    # A processor does not say which words are the question.
    plans = [each for each in PLANS.values() if all(text.name == "all" for text in each.texts)]
    assert len(plans) > 6
    for plan in plans:
        one = ours(**expanded, **given, reduction=plan)
        two = ours(**marked, **own, reduction=plan)
        assert torch.equal(one.logits, two.logits)
    call = {"max_new_tokens": 6, "do_sample": False}
    for plan in (PLANS["pyramiddrop"], replace(PLANS["fastv"], rerank=True)):
        mine = ours.generate(**expanded, **given, **call, reduction=plan)
        same = ours.generate(**marked, **own, **call, reduction=plan)
        assert torch.equal(mine[:, real.shape[1] :], same)
    if side == "left":  # transformers' own classes answer right-padded prompts wrongly
        # A penalty looks at the prompt's ids, which is why they are handed to generate.
        for options in (call, {**call, "repetition_penalty": 1.7}):
            mine = ours.generate(**expanded, **given, **options)
            assert torch.equal(mine, theirs.generate(**expanded, **given, **options))
        # Beams of a sample with two pictures get them in the wrong order in transformers 5.17.
        last = {key: value[2:] for key, value in {**expanded, **given}.items()}
        mine = ours.generate(**last, **call, num_beams=3)
        assert torch.equal(mine, theirs.generate(**last, **call, num_beams=3))
        two_words = ours.generate(**expanded, **given, max_length=real.shape[1] + 2)
        assert two_words.shape[1] == real.shape[1] + 2


def test_loss_equals_transformers():
    """Labels are expanded as the ids are; -100 at the pictures, as the processors' users write."""
    ours, theirs = pair(False)
    given, counts, _ = pictures(theirs, False)
    expanded, _ = batches(counts, "right")
    ids = expanded["input_ids"]
    unsupervised = (ids == IMAGE_ID) | (expanded["attention_mask"] == 0) | (ids == 9)
    labels = ids.masked_fill(unsupervised, IGNORE_INDEX)
    with torch.no_grad():
        expected = theirs(**expanded, **given, labels=labels).loss
        for plan in ("none", PLANS["random then uniform"]):
            got = ours(**expanded, **given, labels=labels, reduction=plan).loss
            if plan == "none":
                torch.testing.assert_close(got, expected)
            else:
                assert got.isfinite()


def test_flat_tiles_are_split_by_the_sizes():
    """Tiles one behind the other [all tiles, 3, H, W], without padding."""
    ours, theirs = pair(True)
    given, counts, own = pictures(theirs, True)
    expanded, _ = batches(counts, "left")
    flat = {"pixel_values": torch.cat(own["images"]), "image_sizes": given["image_sizes"]}
    with torch.no_grad():
        one = ours(**expanded, **flat).logits
        assert torch.equal(one, ours(**expanded, **given).logits)


def change(counts: list[int], number: int, by: int) -> list[int]:
    return [count + by * (index == number) for index, count in enumerate(counts)]


@pytest.mark.parametrize(
    ("number", "by", "message"),
    [
        (0, -1, "sample 0 has 31 image ids and its next picture .* needs 16 in a row"),
        (2, -1, "sample 2 has 15 image ids and its next picture .*number 2.* needs 16"),
        (2, +1, "sample 2 has 17 image ids but all 3 pictures have their ids already"),
        (2, -16, "the batch has 32 image ids and a picture .*number 2.* needs 16"),
    ],
)
def test_ids_that_do_not_fit_the_pictures_are_refused(number, by, message):
    ours, theirs = pair(False)
    given, counts, _ = pictures(theirs, False)
    expanded, _ = batches(change(counts, number, by), "left")
    with pytest.raises(ValueError, match=message):
        ours(**expanded, **given)


def test_other_mistakes_are_refused():
    ours, theirs = pair(False)
    given, counts, own = pictures(theirs, False)
    expanded, marked = batches(counts, "left")
    with pytest.raises(ValueError, match="exclude each other"):
        ours(**expanded, **given, **own)
    with pytest.raises(ValueError, match="no pixel_values came"):
        ours(**expanded)
    parted = expanded["input_ids"].clone()
    parted[2, parted[2].tolist().index(IMAGE_ID) + 3] = 7
    with pytest.raises(ValueError, match="sample 2 has 15"):
        ours(parted, expanded["attention_mask"], **given)
    both = expanded["input_ids"].clone()
    both[1, -1] = IMAGE_TOKEN_INDEX
    with pytest.raises(ValueError, match="both -200 marks and the image id"):
        ours(both, expanded["attention_mask"], **given)
    with pytest.raises(ValueError, match="image_token_index"):
        tiny_model()(**expanded, **given)
    nothing = marked["input_ids"].clone().clamp_min(3)
    with pytest.raises(ValueError, match="the batch has 0 image ids"):
        ours(nothing, marked["attention_mask"], **given)

    anyres, theirs = pair(True)
    given, counts, _ = pictures(theirs, True)
    expanded, _ = batches(counts, "left")
    with pytest.raises(ValueError, match="need image_sizes"):
        anyres(**expanded, pixel_values=given["pixel_values"])
    wrong = torch.full_like(given["image_sizes"], 500)
    with pytest.raises(ValueError, match="needs 5 tiles"):
        anyres(**expanded, pixel_values=given["pixel_values"][:, :3], image_sizes=wrong)
    with pytest.raises(ValueError, match="2 image sizes"):
        anyres(**expanded, **{**given, "image_sizes": given["image_sizes"][:2]})
