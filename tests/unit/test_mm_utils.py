"""Pictures, marks and lengths; recorded numbers are checked in tests/parity."""

from __future__ import annotations

import base64
import os
import random
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from places import DATA
from transformers import AutoTokenizer

from llava.mm_utils import (
    KeywordsStoppingCriteria,
    anyres_token_grid,
    check_context,
    clip_image_processor_class,
    count_visual_tokens,
    divide_to_patches,
    expand2square,
    get_model_name_from_path,
    load_image,
    load_image_from_base64,
    parse_grid_pinpoints,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    spliced_length,
    tokenizer_image_token,
    truncate_to_context,
    unpad_slices,
)

PINS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
RECORDED = DATA / "pyramiddrop" / "preprocess"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(RECORDED / "tokenizer_nonlegacy")


@pytest.fixture(scope="module")
def processor():
    size = {"height": 28, "width": 28}
    return clip_image_processor_class()(size={"shortest_edge": 28}, crop_size=size)


def config(aspect: str | None, **more) -> SimpleNamespace:
    pins = [[28, 56], [56, 28], [56, 56]]
    return SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=pins, **more)


# --- files ---------------------------------------------------------------------------------------
def test_load_image_says_what_is_wrong_and_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="folder"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"no regular file.*pipe\.png"):
        load_image(tmp_path / "pipe.png")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"not an image file.*text\.png"):
        load_image(text)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.png"):
        load_image(empty)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_load_image_refuses_a_truncated_file(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = Image.effect_noise((64, 64), 80)
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"damaged.*cut\.{suffix}"):
        load_image(path)


def test_load_image_is_rgb_and_ignores_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (8, 4), 7).save(tmp_path / "a.jpg", exif=exif)
    loaded = load_image(tmp_path / "a.jpg")
    assert (loaded.mode, loaded.size) == ("RGB", (8, 4))


def test_base64_round_trip():
    buffer = BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(buffer, format="PNG")
    image = load_image_from_base64(base64.b64encode(buffer.getvalue()).decode())
    assert image.size == (3, 2)
    assert image.getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(ValueError, match="image"):
        load_image_from_base64(base64.b64encode(b"nothing").decode())


# --- pixels --------------------------------------------------------------------------------------
def test_expand2square_centres_with_floor():
    red = Image.new("RGB", (5, 2), (255, 0, 0))
    square = expand2square(red, (0, 0, 9))
    assert square.size == (5, 5)
    rows = [square.getpixel((0, y)) for y in range(5)]
    assert rows == [(0, 0, 9), (255, 0, 0), (255, 0, 0), (0, 0, 9), (0, 0, 9)]
    assert expand2square(square, 0) is square


def test_select_best_resolution_first_of_equals_wins():
    assert select_best_resolution((100, 100), [(50, 100), (100, 50)]) == (50, 100)
    # Both show all of it; the smaller wastes less.
    assert select_best_resolution((10, 10), [(90, 90), (30, 30)]) == (30, 30)
    with pytest.raises(ValueError, match="0x5"):
        select_best_resolution((0, 5), PINS)
    with pytest.raises(ValueError, match="empty"):
        select_best_resolution((5, 5), [])


def test_tiles_run_row_by_row():
    image = Image.new("RGB", (4, 4))
    for x, y, value in [(0, 0, 1), (2, 0, 2), (0, 2, 3), (2, 2, 4)]:
        image.putpixel((x, y), (value, 0, 0))
    tiles = divide_to_patches(image, 2)
    assert [tile.getpixel((0, 0))[0] for tile in tiles] == [1, 2, 3, 4]


def test_resize_and_pad_fits_and_centres():
    padded = resize_and_pad_image(Image.new("RGB", (30, 10), (255, 255, 255)), (60, 60))
    white = [padded.getpixel((30, y)) == (255, 255, 255) for y in range(60)]
    assert white == [20 <= y < 40 for y in range(60)]


@pytest.mark.parametrize("aspect", [None, "square", "pad"])
def test_process_images_plain_modes(processor, aspect):
    images = [Image.new("RGB", (40, 20), (9, 9, 9)), Image.new("L", (20, 60), 200)]
    assert process_images(images, processor, config(aspect)).shape == (2, 3, 28, 28)


def test_a_picture_for_a_model_without_a_tower():
    with pytest.raises(ValueError, match="model without a vision tower"):
        process_images([Image.new("RGB", (2, 2))], None, config("pad"))


def test_process_images_pad_shows_all_of_the_picture(processor):
    wide = Image.new("RGB", (84, 28), (255, 255, 255))
    pixels = process_images([wide], processor, config("pad"))[0]
    # Above and below is the mean colour, which becomes about zero.
    assert pixels[:, 0].abs().max() < 0.02
    assert pixels[:, 14].min() > 1.5


def test_process_images_anyres_shapes(processor):
    wide, tall, square = (Image.new("RGB", s) for s in [(80, 20), (20, 80), (60, 60)])
    assert process_images([wide, tall], processor, config("anyres")).shape == (2, 3, 3, 28, 28)
    mixed = process_images([wide, square], processor, config("anyres"))
    assert [p.shape[0] for p in mixed] == [3, 5]


def test_anyres_tiles_together_are_the_picture(processor):
    """Left tile of a wide picture shows its left half, right tile the right one."""
    image = Image.new("RGB", (56, 28), (0, 0, 0))
    image.paste((255, 255, 255), (28, 0, 56, 28))
    base, left, right = process_images([image], processor, config("anyres"))[0]
    assert left[:, :, :26].max() < -1
    assert right[:, :, 2:].min() > 1
    assert base[:, :, 0].max() < -1
    assert base[:, :, -1].min() > 1


def test_process_images_refuses_what_it_does_not_know(processor):
    with pytest.raises(ValueError, match=r"'anyres_max_9'.*'pad'"):
        process_images([Image.new("RGB", (4, 4))], processor, config("anyres_max_9"))
    with pytest.raises(ValueError, match="no image"):
        process_images([], processor, config("pad"))


def test_pinpoints_in_all_spellings():
    assert parse_grid_pinpoints("[[336, 672], (672, 336)]") == [(336, 672), (672, 336)]
    assert parse_grid_pinpoints("(1x1),...,(2x2)", 10) == [(10, 10), (10, 20), (20, 10), (20, 20)]
    for wrong in ("[1, 2]", "exit()", None, [], [[0, 336]], [[1, 2, 3]], 7):
        with pytest.raises(ValueError, match="image_grid_pinpoints"):
            parse_grid_pinpoints(wrong)


def test_image_processor_of_either_library_version(monkeypatch):
    import sys

    import transformers

    newest = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    assert clip_image_processor_class() is newest
    both = SimpleNamespace(CLIPImageProcessor=dict, CLIPImageProcessorPil=list)
    monkeypatch.setitem(sys.modules, "transformers", both)
    assert clip_image_processor_class() is list
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(CLIPImageProcessor=dict))
    assert clip_image_processor_class() is dict


# --- geometry ------------------------------------------------------------------------------------
def test_rounding_differs_where_the_library_says():
    """Sizes at which int(x) and int(round(x, 7)) part ways (396x704 and 352x748 among them)."""
    grid = (48, 48)
    assert unpad_slices((396, 704), grid, "llava") != unpad_slices((396, 704), grid, "transformers")
    with pytest.raises(ValueError, match="'hf'"):
        unpad_slices((4, 4), grid, "hf")


@pytest.mark.parametrize("rounding", ["llava", "transformers"])
def test_token_grid_equals_unpadding_a_tensor(rounding):
    """Counts from the host against slicing a field, by LLaVA's text and by the library."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rng = random.Random(0)
    sizes = [(rng.randint(5, 2400), rng.randint(5, 2400)) for _ in range(200)]
    for size in [*sizes, (396, 704), (352, 748), (1000, 5), (5, 1000)]:
        found = anyres_token_grid(size, PINS, 336, 24, "spatial_unpad", rounding)
        width, height = select_best_resolution(size, PINS)
        field = torch.zeros(1, height // 14, width // 14)
        down, across = unpad_slices(size, tuple(field.shape[1:]), rounding)
        kept = field[:, down, across]
        if rounding == "transformers":
            assert kept.shape == unpad_image(field, (size[1], size[0])).shape
        assert (found.rows, found.cols_with_newline) == (kept.shape[1], kept.shape[2] + 1)
        assert found.tokens == 576 + kept.shape[1] * (kept.shape[2] + 1)
        assert found.tiles == 1 + (width // 336) * (height // 336)


def test_token_grid_of_the_other_merge_types():
    wide = (1000, 300)
    assert anyres_token_grid(wide, PINS, 336, 24, "spatial") == (4, 24, 72, 576 + 24 * 72)
    assert anyres_token_grid(wide, PINS, 336, 24, "flat") == (4, 72, 24, 4 * 576)
    with pytest.raises(ValueError, match="'maxpool'"):
        anyres_token_grid(wide, PINS, 336, 24, "maxpool")


def test_count_visual_tokens():
    sizes = [(1000, 300), (336, 336)]
    anyres = config("anyres", mm_patch_merge_type="flat")
    anyres.image_grid_pinpoints = PINS
    assert count_visual_tokens(sizes, anyres, 336, 24) == [4 * 576, 3 * 576]
    assert count_visual_tokens(sizes, config("pad"), 336, 24) == [576, 576]


# --- marks and lengths ---------------------------------------------------------------------------
def test_tokenizer_image_token_as_tensor(tokenizer):
    ids = tokenizer_image_token("a <image>\nb", tokenizer)
    assert ids.count(-200) == 1
    tensor = tokenizer_image_token("a <image>\nb", tokenizer, return_tensors="pt")
    assert tensor.dtype == torch.long
    assert tensor.tolist() == ids
    assert tokenizer_image_token("<image>", tokenizer, -7) == [1, -7]
    with pytest.raises(ValueError, match="'np'"):
        tokenizer_image_token("a", tokenizer, return_tensors="np")


def test_tokenizer_without_bos():
    class Words:
        bos_token_id = None

        def __call__(self, text):
            return SimpleNamespace(input_ids=[len(word) for word in text.split()])

    assert tokenizer_image_token("one <image> three <image>", Words()) == [3, -200, 5, -200]


def test_context_check_counts_pictures_in_full():
    ids = [1, -200, 5, -200, 6]
    assert spliced_length(ids, [10, 20]) == 33
    check_context(ids, [10, 20], 33)
    with pytest.raises(ValueError, match=r"33 tokens \(30 of them visual\).*holds 32"):
        check_context(ids, [10, 20], 32)
    with pytest.raises(ValueError, match="4 new tokens"):
        check_context(ids, [10, 20], 36, new_tokens=4)
    with pytest.raises(ValueError, match=r"2 <image> marks but 1 image came"):
        spliced_length(ids, [10])


def two_turns() -> tuple[list[int], list[int]]:
    """[bos, picture, 2 question, 3 answer, 1 question, picture, 2 answer]; 9 + two pictures."""
    ids = [1, -200, 11, 12, 21, 22, 23, 13, -200, 24, 25]
    labels = [-100] * 4 + [21, 22, 23] + [-100] * 2 + [24, 25]
    return ids, labels


@pytest.mark.parametrize(
    ("limit", "length", "images", "left"),
    [
        (17, 11, 2, 17),  # fits
        (16, 10, 2, 16),  # inside the last answer: cut there
        (15, 7, 1, 10),  # behind the second picture: its turn goes
        (12, 7, 1, 10),  # in the middle of the second picture: the turn goes, not half of it
        (10, 7, 1, 10),
        (8, 5, 1, 8),  # inside the first answer
    ],
)
def test_truncation_keeps_queries_and_whole_pictures(limit, length, images, left):
    ids, labels = two_turns()
    fitted = truncate_to_context(ids, labels, [4, 4], limit)
    assert fitted.ids == ids[:length]
    assert fitted.labels == labels[:length]
    assert fitted.images == images == fitted.ids.count(-200)
    assert fitted.cut == 17 - left
    assert spliced_length(fitted.ids, [4, 4][: fitted.images]) == left <= limit


@pytest.mark.parametrize("limit", [1, 4, 7])
def test_truncation_that_leaves_no_target_is_an_error(limit):
    ids, labels = two_turns()
    with pytest.raises(ValueError, match=rf"17 tokens.*limit of {limit}"):
        truncate_to_context(ids, labels, [4, 4], limit)


# --- names and stopping --------------------------------------------------------------------------
def test_model_name_from_path():
    assert get_model_name_from_path("a/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert get_model_name_from_path("a/run/checkpoint-20") == "run_checkpoint-20"
    assert get_model_name_from_path("checkpoint-20") == "checkpoint-20"


def test_keywords_stop_each_row_with_and_without_the_prompt(tokenizer):
    prompt = torch.tensor([tokenizer("What stop here").input_ids] * 2)
    done, going = tokenizer("yes ###").input_ids[1:], tokenizer("yes so far").input_ids[1:]
    width = min(len(done), len(going))
    new = torch.tensor([done[-width:], going[:width]])
    criteria = KeywordsStoppingCriteria(["###", "stop"], tokenizer, prompt)
    assert criteria(new, None).tolist() == [True, False]
    assert criteria(torch.cat([prompt, new], 1), None).tolist() == [True, False]
    # The keyword inside the prompt does not count.
    assert criteria(prompt, None).tolist() == [False, False]
