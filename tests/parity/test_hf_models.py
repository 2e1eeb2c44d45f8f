"""The drop-in for llava-hf folders: `AutoProcessor` in, transformers' logits and tokens out.

Folders, processors and models are small and random but made by transformers' own classes; the demo
of docs/Migrating.md runs as it stands there.
"""

from __future__ import annotations

import re
import runpy
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from miniatures import IMAGE_ID, PATCH, PINS, SIDE, TOKENIZER, hf_model, write_hf, write_original
from PIL import Image
from places import ROOT
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llava import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_checkpoint
from llava.reduction import ReductionPlan, resolve_plan
from llava.reduction.plan import fastv_config_text

FASTV = {
    "use_fastv": True,
    "fastv_k": 3,
    "fastv_r": 0.75,
    "image_token_start_index": 5,
    "image_token_length": 576,
}
SAME = "fastv:k=3,r=0.75"
CALL = {"max_new_tokens": 8, "do_sample": False}


def image_processor(kind: str) -> Any:
    name = {"llava": "CLIPImageProcessor", "llava_next": "LlavaNextImageProcessor"}[kind]
    found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    crop = {"height": SIDE, "width": SIDE}
    more = {"image_grid_pinpoints": PINS} if kind == "llava_next" else {}
    return found(size={"shortest_edge": SIDE}, crop_size=crop, **more)


def folder_of(folder: Path, kind: str = "llava", decoder: str = "llama") -> Any:
    """A llava-hf folder with its processor; transformers' model of it."""
    theirs = hf_model(kind, decoder)
    write_hf(folder, theirs, "hub")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left", pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_ID
    made = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}[kind]
    getattr(transformers, made)(
        image_processor(kind),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return theirs


def picture(width: int = 90, height: int = 60) -> Image.Image:
    pixels = torch.randint(0, 255, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def inputs_of(folder: Path, sizes: Any = ((90, 60), (50, 140), (60, 60))) -> Any:
    """Two pictures, none and one, in three prompts of different lengths."""
    processor = AutoProcessor.from_pretrained(folder)
    prompts = ["USER: <image>\n<image>\nWhich is it? ASSISTANT:", "USER: Hello ASSISTANT:",
               "USER: What is\n<image> this? ASSISTANT:"]  # fmt: skip
    pictures = [picture(*size) for size in sizes]
    return processor(images=pictures, text=prompts, return_tensors="pt", padding=True)


@pytest.mark.parametrize(("kind", "decoder"), [("llava", "llama"), ("llava", "mistral"),
                                               ("llava_next", "llama")])  # fmt: skip
@torch.no_grad()
def test_a_folder_and_its_processor(kind, decoder, tmp_path):
    theirs = folder_of(tmp_path, kind, decoder)
    chosen = {"llava": LlavaForConditionalGeneration}.get(kind, LlavaNextForConditionalGeneration)
    ours = chosen.from_pretrained(tmp_path)
    assert isinstance(ours, LlavaForConditionalGeneration)
    assert not ours.training
    inputs = inputs_of(tmp_path)
    real = inputs["attention_mask"].bool()
    expected, found = theirs(**inputs).logits, ours(**inputs).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.generate(**inputs, **CALL), theirs.generate(**inputs, **CALL))
    text = AutoProcessor.from_pretrained(tmp_path)(
        text="USER: Hello ASSISTANT:", return_tensors="pt"
    )
    assert torch.equal(ours.generate(**text, **CALL), theirs.generate(**text, **CALL))
    result = ours.generate(**inputs, **CALL, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(result.sequences, theirs.generate(**inputs, **CALL))
    # With cuts: our own marks, one sample at a time, through the plain loader.
    plain = load_checkpoint(tmp_path, device="cpu").model
    batched = ours.generate(**inputs, reduction=SAME, **CALL)[:, real.shape[1] :]
    for index, numbers in enumerate(([0, 1], [], [2])):
        own = in_our_terms(plain, inputs, index, numbers)
        alone = plain.generate(**own, reduction=SAME, **CALL)[0].tolist()
        padding = [0] * (batched.shape[1] - len(alone))
        assert batched[index].tolist() == alone + padding


def in_our_terms(model: Any, inputs: Any, index: int, numbers: list[int]) -> dict[str, Any]:
    """One sample with a -200 mark a picture and sizes (width, height)."""
    row = inputs["input_ids"][index][inputs["attention_mask"][index].bool()].tolist()
    runs = [(i == IMAGE_ID, list(run)) for i, run in groupby(row, key=lambda i: i)]
    ids = [i for is_picture, run in runs for i in ([IMAGE_TOKEN_INDEX] if is_picture else run)]
    assert ids.count(IMAGE_TOKEN_INDEX) == len(numbers)
    if not numbers:
        return {"input_ids": torch.tensor([ids])}
    images, sizes = inputs["pixel_values"][numbers], None
    if images.dim() == 5:
        height_width = inputs["image_sizes"][numbers].tolist()
        tiles = [image_size_to_num_patches(size, PINS, SIDE) for size in height_width]
        images = [image[:count] for image, count in zip(images, tiles, strict=True)]
        sizes = [(width, height) for height, width in height_width]
    return {"input_ids": torch.tensor([ids]), "images": images, "image_sizes": sizes}


@torch.no_grad()
def test_fastv_config_is_honoured_in_both_places(tmp_path):
    folder_of(tmp_path)
    inputs = inputs_of(tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    expected = plain.generate(**inputs, reduction=SAME, **CALL)
    without = plain.generate(**inputs, **CALL)
    assert not torch.equal(expected, without)
    given = LlavaForConditionalGeneration.from_pretrained(tmp_path, fastv_config=FASTV)
    assert torch.equal(given.generate(**inputs, **CALL), expected)
    trace = given(**inputs, return_trace=True).trace
    assert [cut.at for cut in trace] == [3]
    assert trace[0].keep.sum(1).tolist() == [8, 4]  # a quarter of 32 and of 16
    given.config.fastv_config["use_fastv"] = False
    assert torch.equal(given.generate(**inputs, **CALL), without)
    plain.config.fastv_config = FASTV
    assert torch.equal(plain.generate(**inputs, **CALL), expected)
    assert torch.equal(plain.generate(**inputs, reduction="none", **CALL), without)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.fastv_config = FASTV
    config.save_pretrained(tmp_path)
    for more in ({}, {"config": config}):
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path, **more)
        assert torch.equal(again.generate(**inputs, **CALL), expected)
    chosen = LlavaForConditionalGeneration.from_pretrained(tmp_path, reduction="none")
    assert torch.equal(chosen.generate(**inputs, **CALL), without)


def test_a_plan_in_the_checkpoint_gives_way_to_fastv_config(tmp_path):
    folder_of(tmp_path)
    stored = "uniform:layers=[1],ratios=[0.5]"
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, reduction=stored)
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert resolve_plan(None, again.config) == (ReductionPlan.parse(stored), "checkpoint")
    off = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "again", fastv_config={**FASTV, "use_fastv": False}
    )
    assert resolve_plan(None, off.config)[1] == "checkpoint"
    fast = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again", fastv_config=FASTV)
    assert resolve_plan(None, fast.config) == (ReductionPlan.parse(SAME), "fastv_config")
    again.config.fastv_config = FASTV
    with pytest.raises(ValueError, match="both visual_token_reduction and fastv_config"):
        again.generate(**inputs_of(tmp_path), **CALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fastv_K": 3}, "accepted: a dict of use_fastv, fastv_k"),
        ({"use_fastv": "True"}, "use_fastv is 'True'"),
        ({"image_token_length": -1}, "image_token_length is -1"),
        ({"image_token_start_index": 5.0}, "image_token_start_index is 5.0"),
        ({"fastv_k": None}, "lacks fastv_k"),
        ({"fastv_r": 2}, "share that goes"),
        ({"fastv_k": 9}, "layer 9"),
    ],
)
def test_wrong_fastv_configs_are_refused(change, message, tmp_path):
    if change == {"fastv_k": 9}:
        folder_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        ReductionPlan.parse(fastv_config_text({**FASTV, **change})).validate(8)
    spans = {key: FASTV[key] for key in ("fastv_k", "fastv_r")}
    assert fastv_config_text(spans) == fastv_config_text(FASTV)


def test_keywords(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(ValueError, match="exclude each other"):
        LlavaForConditionalGeneration.from_pretrained(
            tmp_path, reduction="none", fastv_config=FASTV
        )
    with pytest.raises(TypeError, match="no_such_keyword"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path, no_such_keyword=1)
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, attn_implementation="eager",
        device_map="cpu",
    )  # fmt: skip
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_llavas_own_layout_loads_too(tmp_path):
    reference = write_original(tmp_path / "x", "v1.6-mistral-7b")
    model = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "x")
    assert type(model).__name__ == "LlavaMistralForConditionalGeneration"
    assert model.dtype == torch.float16
    weights = reference.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), weights[name].float()), name


def test_the_demo_of_the_documents_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "Migrating.md").read_text(encoding="utf-8")
    (code,) = [each for each in re.findall(r"```python\n(.*?)```", page, re.S) if "fastv_k" in each]
    assert len(code.strip().splitlines()) <= 22
    folder = tmp_path / "llava-hf" / "llava-1.5-7b-hf"
    folder_of(folder)
    picture().save(tmp_path / "picture.png")
    (tmp_path / "demo.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("demo.py")
    printed = capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(folder)
    prompt = re.search(r'prompt = "(.*)"', code)[1].replace("\\n", "\n")
    inputs = processor(images=Image.open("picture.png"), text=prompt, return_tensors="pt")
    model = load_checkpoint(folder, device="cpu", reduction=SAME).model
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert printed == processor.decode(out[0], skip_special_tokens=True) + "\n"
