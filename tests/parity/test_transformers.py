"""transformers' own classes as the oracle, holding the same random weights, below 1e-5 in float32.

Without a plan, or with shares of 1.0, logits equal `LlavaForConditionalGeneration`,
`LlavaNextForConditionalGeneration` and each family's plain text model; greedy tokens too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, SIZES, TILE, VISION, VISUAL, batch, prompts, tiny_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import anyres_token_grid
from llava.reduction import ReductionPlan

TOLERANCE = 1e-5
IMAGE_ID = 95
PINS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
STOCK = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
# (place in transformers, place here)
NAMES = (
    ("model.language_model.", "model."),
    ("model.vision_tower.", "model.vision_tower.vision_tower."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.image_newline", "model.image_newline"),
    ("lm_head.", "lm_head."),
)


def hf_configs() -> dict[str, Any]:
    vision = {k: v for k, v in VISION["mm_vision_config"].items() if k != "model_type"}
    return {
        "vision_config": CLIPVisionConfig(**vision),
        "text_config": LlamaConfig(**SIZES),
        "image_token_index": IMAGE_ID,
    }


def give_weights(ours: Any, theirs: Any) -> None:
    state = {}
    for name, value in theirs.state_dict().items():
        place = next((b + name[len(a) :] for a, b in NAMES if name.startswith(a)), None)
        assert place is not None, name
        state[place] = value
    ours.load_state_dict(state)


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_text_and_pictures_equal_the_stock_decoder(family, backend):
    ours = tiny_model(family, backend)
    config_class = STOCK[family].config_class
    config = config_class(**{**SIZES, **FAMILIES[family][2]})
    config._attn_implementation = backend
    stock = STOCK[family](config).eval()
    own = {k: v for k, v in ours.state_dict().items() if k in stock.state_dict()}
    stock.load_state_dict(own)
    with torch.no_grad():
        for sample in prompts():
            inputs = batch([sample])
            sequence = ours.build_sequence(**inputs)
            expected = stock(inputs_embeds=sequence.hidden, use_cache=False).logits
            close(ours(**inputs, reduction="none").logits, expected)
            share = ReductionPlan.pyramid([1, 3], [1.0, 1.0])
            close(ours(**inputs, reduction=share).logits, expected)
            generated = stock.generate(
                inputs_embeds=sequence.hidden, max_new_tokens=6, do_sample=False
            )
            tokens = ours.generate(**inputs, max_new_tokens=6, do_sample=False)
            assert tokens.tolist() == generated.tolist()


@pytest.mark.parametrize("ratio", [None, 1.0])
def test_llava_1_5_equals_transformers(ratio):
    torch.manual_seed(5)
    theirs = LlavaForConditionalGeneration(LlavaConfig(**hf_configs(), image_seq_length=VISUAL))
    theirs = theirs.eval()
    ours = tiny_model()
    give_weights(ours, theirs)
    plan = "none" if ratio is None else ReductionPlan.pyramid([2, 4], [ratio, ratio])
    pixels = torch.randn(2, 3, TILE, TILE)
    text, after = [1, 5, 6], [7, 8, 9, 4]
    ids = torch.tensor([[*text, *[IMAGE_ID] * VISUAL, *after]] * 2)
    short = torch.tensor([[*text, IMAGE_TOKEN_INDEX, *after]] * 2)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
        close(ours(short, images=pixels, reduction=plan).logits, expected)
        tokens = theirs.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False
        )
    mine = ours.generate(short, images=pixels, reduction=plan, max_new_tokens=6, do_sample=False)
    assert mine.tolist() == tokens[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "size_wh", [(30, 50), (50, 30), (90, 20), (28, 28), (300, 40), (99, 41), (396, 704), (352, 748)]
)
def test_llava_next_equals_transformers(size_wh):
    """Anyres with unpad and newline; `mm_unpad_rounding` "transformers" as in converted models."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    torch.manual_seed(6)
    theirs = LlavaNextForConditionalGeneration(
        LlavaNextConfig(**hf_configs(), image_grid_pinpoints=PINS)
    ).eval()
    torch.nn.init.normal_(theirs.model.image_newline)
    ours = tiny_model(
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        # transformers counts (height, width), LLaVA (width, height)
        image_grid_pinpoints=[[w, h] for h, w in PINS],
        mm_unpad_rounding="transformers",
    )
    give_weights(ours, theirs)
    height_width = (size_wh[1], size_wh[0])
    tiles = image_size_to_num_patches(height_width, PINS, TILE)
    pixels = torch.randn(1, tiles, 3, TILE, TILE)
    sizes = torch.tensor([height_width])
    with torch.no_grad():
        features = theirs.get_image_features(pixel_values=pixels, image_sizes=sizes)
        count = features.pooler_output[0].shape[0]
        ids = torch.tensor([[1, 5, 6, *[IMAGE_ID] * count, 7, 8]])
        expected = theirs(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits
        short = torch.tensor([[1, 5, 6, IMAGE_TOKEN_INDEX, 7, 8]])
        got = ours(short, images=[pixels[0]], image_sizes=[size_wh]).logits
    assert got.shape == expected.shape
    close(got, expected)
    grid = anyres_token_grid(
        size_wh, ours.config.image_grid_pinpoints, TILE, 4, "spatial_unpad", "transformers"
    )
    assert grid.tokens == count


def test_the_two_roundings_differ_where_the_libraries_do():
    """LLaVA truncates the unpadded side, transformers rounds it: other token counts, both kept."""
    differing = 0
    for width in range(300, 1000, 4):
        for height in (352, 396, 704, 748):
            counts = {
                rounding: anyres_token_grid(
                    (width, height),
                    [[336, 672], [672, 336], [672, 672]],
                    336,
                    24,
                    "spatial_unpad",
                    rounding,
                ).tokens
                for rounding in ("llava", "transformers")
            }
            differing += counts["llava"] != counts["transformers"]
    assert differing > 0
