"""A model, a tower, data and a head mask, made in a second: what SMOKE=1 trains on.

Special here: enough layers that every recipe's plan fits as it is written; all widths are tiny. The
tokenizer has one token a byte, so any template's text comes through. Random weights: nothing is
learned from a smoke run but that it runs.

    python scripts/smoke_data.py FOLDER

writes model/, tower/, mm_projector.bin, heads.npy, images/, captions.json (stage 1),
instructions.json (stage 2: no, one and two pictures, several turns) and, at last, made.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llava.mm_utils import clip_image_processor_class
from llava.utils import json_dump, set_seed

LAYERS, HEADS, HIDDEN = 26, 4, 64  # 4-bit layers want multiples of 64
SIDE, PATCH, TOWER_HIDDEN = 56, 14, 24
SPECIAL = ("<unk>", "<s>", "</s>")
SIZES = ((56, 56), (120, 60), (60, 130), (90, 70))
COLOURS = ("red", "green", "blue", "white")


def write_tokenizer(folder: Path) -> int:
    """One token a byte, `<s>` in front of every text; returns the vocabulary's size."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    table = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table.decoder = decoders.ByteLevel()
    table.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=table, unk_token="<unk>", pad_token="<unk>", bos_token="<s>",
        eos_token="</s>", padding_side="right",
    ).save_pretrained(folder)  # fmt: skip
    return len(vocabulary)


def write_models(folder: Path) -> None:
    """The language model, the tower, a projector between them and a head mask for YOPO."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=write_tokenizer(folder / "model"), hidden_size=HIDDEN, intermediate_size=128,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    vision = CLIPVisionConfig(
        hidden_size=TOWER_HIDDEN, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(folder / "tower")
    clip_image_processor_class()(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder / "tower")
    layers = {"0": torch.nn.Linear(TOWER_HIDDEN, HIDDEN), "2": torch.nn.Linear(HIDDEN, HIDDEN)}
    weights = torch.nn.ModuleDict(layers).state_dict()
    torch.save(
        {f"model.mm_projector.{name}": weight for name, weight in weights.items()},
        folder / "mm_projector.bin",
    )
    mask = np.random.default_rng(0).random((LAYERS, HEADS)) < 0.6
    mask[:2] = True
    np.save(folder / "heads.npy", mask)


def write_data(folder: Path, samples: int = 12) -> None:
    """Pictures of one colour in several shapes, captions and conversations about them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for colour, size in zip(COLOURS, SIZES, strict=True):
        Image.new("RGB", size, colour).save(folder / "images" / f"{colour}.png")

    def record(number: int, pictures: list[str], *texts: str) -> dict:
        """A sample; its texts are question, answer, question, ..."""
        turns = [
            {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)
        ]
        sample = {"id": f"{number:02d}", "conversations": turns}
        names = [f"{picture}.png" for picture in pictures]
        return sample | ({"image": names if len(names) > 1 else names[0]} if names else {})

    captions, instructions = [], []
    for number in range(samples):
        one, other = COLOURS[number % 4], COLOURS[(number + 1) % 4]
        captions.append(record(number, [one], "<image>\nDescribe it.", f"a {one} picture"))
        instructions.append(
            (
                record(number, [one], "<image>\nWhich colour?", one, "Sure?", "Yes."),
                record(number, [], f"Which colour is {one} paint?", one),
                record(number, [one], "Is it dark?\n<image>", "No."),
                record(number, [one, other], "<image>\n<image>\nWhich?", f"{one} and {other}"),
            )[number % 4]
        )
    json_dump(folder / "captions.json", captions)
    json_dump(folder / "instructions.json", instructions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    transformers.utils.logging.disable_progress_bar()
    write_models(folder)
    write_data(folder)
    json_dump(folder / "made.json", {"layers": LAYERS, "heads": HEADS})


if __name__ == "__main__":
    main()
