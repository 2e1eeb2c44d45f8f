"""What VLMEvalKit's wrappers of LLaVA ask of a package named `llava`, call for call.

Its `vlmeval/vlm/llava/llava.py` (read 2026, not run here: the package needs a GPU) imports these
names with these arguments; the two functions below make the same calls in the same order, on the
CPU. The answers must be those of this package's own path.
"""

from __future__ import annotations

import copy
from abc import abstractproperty
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from places import ROOT
from tiny_checkpoint import save_tiny_checkpoint

from llava.prompting import prepare_batch

DIGITS = str(ROOT / "checkpoints" / "llava-digits")
DEVICE = "cpu"  # theirs: "cuda"


def ask_15(model_path, message, **options):
    """The wrapper of LLaVA-1.5: (prompt, answer, loaded parts). message: (kind, value) pairs."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import (
        KeywordsStoppingCriteria,
        get_model_name_from_path,
        process_images,
        tokenizer_image_token,
    )
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, context_len = load_pretrained_model(
        model_path=model_path,
        model_base=None,
        model_name=get_model_name_from_path(model_path),
        device="cpu",
        device_map="cpu",
    )
    assert isinstance(context_len, int)
    model = model.to(DEVICE)
    content, images = "", []
    for kind, value in message:
        if kind == "image":
            images.append(value.convert("RGB"))
        content += " <image> " if kind == "image" else value
    settings = abstractproperty()  # any object; it has no other attribute
    settings.image_aspect_ratio = "pad"
    pixels = None
    if images:
        pixels = process_images(images, image_processor, settings)
        pixels = pixels.to(DEVICE, dtype=torch.float16)
    prompt = f"A system sentence. USER: {content} ASSISTANT: "
    input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    input_ids = input_ids.unsqueeze(0).to(DEVICE)
    stop = KeywordsStoppingCriteria(["</s>"], tokenizer, input_ids)
    generation = dict(
        do_sample=False, temperature=0, max_new_tokens=512, top_p=None, num_beams=1, use_cache=True
    )
    generation.update(options)
    with torch.inference_mode():
        output_ids = model.generate(
            input_ids, images=pixels, stopping_criteria=[stop], **generation
        )
    answer = tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip()
    return prompt, answer, (tokenizer, model, image_processor, images)


def ask_next(model_path, template, message):
    """The wrapper of LLaVA-NeXT's later models."""
    from llava.conversation import SeparatorStyle, conv_templates
    from llava.mm_utils import (
        KeywordsStoppingCriteria,
        get_model_name_from_path,
        tokenizer_image_token,
    )
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        model_path, None, name, device_map=None
    )
    model.to(DEVICE).eval()
    model.tie_weights()
    content, images = "", []
    for kind, value in message:
        content += "<image>\n" if kind == "image" else value
        if kind == "image":
            images.append(value.convert("RGB"))
    pixels = [
        image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0].half().to(DEVICE)
        for image in images
    ]
    conv = copy.deepcopy(conv_templates[template])
    conv.append_message(conv.roles[0], content)
    conv.append_message(conv.roles[1], None)
    prompt = conv.get_prompt()
    input_ids = tokenizer_image_token(prompt, tokenizer, -200, return_tensors="pt")
    input_ids = input_ids.unsqueeze(0).to(DEVICE)
    stop_text = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
    stop = KeywordsStoppingCriteria([stop_text], tokenizer, input_ids)
    output_ids = model.generate(
        input_ids,
        images=torch.stack(pixels),
        do_sample=False,
        temperature=0,
        max_new_tokens=512,
        stopping_criteria=[stop],
    )
    answer = tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0]
    return prompt, answer, (tokenizer, model, image_processor, images)


def own_answer(prompt, parts, mode, **options):
    """The same prompt through this package's own batch."""
    tokenizer, model, image_processor, images = parts
    config = SimpleNamespace(image_aspect_ratio=mode)
    batch = prepare_batch(tokenizer, image_processor, config, [prompt], [images])
    if images:  # half precision on the way, as there
        batch["images"] = batch["images"].half().float()
    batch.pop("image_sizes")
    with torch.inference_mode():
        ids = model.generate(**batch, do_sample=False, max_new_tokens=512, **options)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()


def picture(width, height, seed):
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(
    "message",
    [
        [("image", picture(60, 40, 0)), ("text", "What digit is in C3?")],
        [("image", picture(60, 40, 0)), ("text", " or "), ("image", picture(30, 50, 1))],
        [("text", "What digit?")],
    ],
)
def test_the_wrapper_of_llava_15(message):
    prompt, answer, parts = ask_15(DIGITS, message)
    assert answer == own_answer(prompt, parts, "pad")
    assert answer


def test_a_plan_through_the_wrapper_of_llava_15():
    """What a model's entry in VLMEvalKit's config adds goes to `generate`."""
    message = [("image", picture(60, 40, 0)), ("text", "What digit is in C3?")]
    plan = "fastv:k=1,r=0.9"
    prompt, answer, parts = ask_15(DIGITS, message, reduction=plan)
    assert answer == own_answer(prompt, parts, "pad", reduction=plan)
    with pytest.raises(ValueError, match="nosuch"):
        ask_15(DIGITS, message, reduction="nosuch")


@pytest.mark.parametrize("template", ["qwen_1_5", "llava_llama_3"])
def test_the_wrapper_of_llava_next(template, tmp_path):
    """Each picture goes in as one tile, whatever the checkpoint's image mode."""
    folder = save_tiny_checkpoint(
        tmp_path / "llava-next-tiny", image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[56, 112], [112, 56]],
        reduction={"positions": "renumber",
                   "cuts": [{"at": 2, "method": "pyramiddrop", "ratio": 0.5}]},
    )  # fmt: skip
    message = [("image", picture(60, 40, 0)), ("text", "red?"), ("image", picture(9, 9, 1))]
    prompt, answer, parts = ask_next(str(folder), template, message)
    assert answer.strip() == own_answer(prompt, parts, "square")
