"""A tiny model folder, tower, tokenizer and data set for training runs in tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, PreTrainedTokenizerFast

from llava.mm_utils import clip_image_processor_class

SIDE = 28
COLOURS = ("red", "blue", "green", "white")
WORDS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "\n", "what", "colour", "is", "it",
         "this", "one", *COLOURS)  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """One token a word; `<s>` in front of every text."""
    table = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    table.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=table, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", padding_side="right",
    ).save_pretrained(folder)  # fmt: skip


def write_tower(folder: Path, seed: int = 1) -> None:
    """A CLIP tower of 2 x 2 patches with random weights."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=14,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    clip_image_processor_class()(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)


def write_config(folder: Path) -> None:
    """config.json of a 4-layer Llama."""
    LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    ).save_pretrained(folder)  # fmt: skip


def write_data(folder: Path, n: int = 8) -> None:
    """`mixed.json` (none, one and two pictures), `captions.json`, `text.jsonl`, `uneven.json` (two
    long texts of 20 tokens, three pictures of 13) and pictures."""
    (folder / "images").mkdir(parents=True)
    for colour in COLOURS:
        Image.new("RGB", (SIDE, SIDE), colour).save(folder / "images" / f"{colour}.png")

    def record(i: int, image, question: str, answer: str) -> dict:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": str(i), "conversations": turns} | ({"image": image} if image else {})

    text, captions, mixed = [], [], []
    for i in range(n):
        first, second = COLOURS[i % 4], COLOURS[(i + 1) % 4]
        text.append(record(i, None, "what is this one", first))
        captions.append(record(i, f"{first}.png", "<image>\n", f"{first} {first}"))
        mixed.append(
            (
                text[-1],
                record(i, f"{first}.png", "<image>\nwhat colour is it", first),
                record(i, [f"{first}.png", f"{second}.png"],
                       "<image> is <image> what colour", f"{first} {second}"),
            )[i % 3]
        )  # fmt: skip
    uneven = [record(i, None, " ".join(["what is this"] * 5), COLOURS[i]) for i in range(2)]
    uneven += [
        record(i, f"{c}.png", "<image>\nwhat colour is it", c) for i, c in enumerate(COLOURS[:3])
    ]
    (folder / "uneven.json").write_text(json.dumps(uneven))
    (folder / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in text))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "mixed.json").write_text(json.dumps(mixed))


def write_all(folder: Path) -> None:
    """Everything under `folder`: config/ (with the tokenizer), tower/, data/."""
    write_config(folder / "config")
    write_tokenizer(folder / "config")
    write_tower(folder / "tower")
    write_data(folder / "data")
