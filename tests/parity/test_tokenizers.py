"""Ids of LLaVA's tokenizers as transformers 4 gave them, whatever else lies in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from miniatures import write_json
from places import DATA

from llava.mm_utils import tokenizer_image_token
from llava.model.tokenizers import load_tokenizer

FOLDER = DATA / "pyramiddrop" / "preprocess"
ROWS = json.loads((FOLDER / "tokenizer_image_token.json").read_text())["rows"]
CONFIGS = (
    None,
    {"model_type": "llava", "mm_vision_tower": "x"},  # the published LLaVA-1.5
    {"model_type": "llava_llama", "mm_vision_tower": "x"},
    {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}},
)
AFTER_EOS = "hello</s>USER: hi"
# With legacy a space comes in behind a special token.
RECORDED = {
    True: [1, 320, 421, 2, 433, 261, 453, 300, 439],
    False: [1, 320, 421, 2, 261, 453, 300, 439],
}


def folder_of(tmp_path: Path, legacy: bool, config: dict | None) -> Path:
    name = "tokenizer_legacy" if legacy else "tokenizer_nonlegacy"
    shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
    if config is not None:
        write_json(tmp_path / "config.json", config)
    return tmp_path


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("legacy", [True, False])
def test_recorded_ids_beside_any_config(legacy, config, tmp_path):
    folder = folder_of(tmp_path / "a", legacy, config)
    tokenizer = load_tokenizer((folder,))
    checked = 0
    for row in ROWS:
        if row["legacy"] is legacy:
            assert tokenizer_image_token(row["prompt"], tokenizer) == row["input_ids"]
            checked += 1
    assert checked == 10
    assert tokenizer(AFTER_EOS).input_ids == RECORDED[legacy]
    # Saved by transformers 5 (tokenizer.json, no tokenizer.model) it gives the same ids.
    tokenizer.save_pretrained(tmp_path / "b")
    again = load_tokenizer((folder_of_config(tmp_path / "b", config),))
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    for text in (AFTER_EOS, "hello", "\nx", " lead", "caf\u00e9"):
        assert again(text).input_ids == tokenizer(text).input_ids


def folder_of_config(folder: Path, config: dict | None) -> Path:
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


@pytest.mark.parametrize("gone", ["legacy", "tokenizer_config.json"])
def test_what_is_not_said_is_as_in_transformers_4(gone, tmp_path):
    """Without the key, and without the file: legacy, and a BOS in front."""
    folder = folder_of(tmp_path, True, CONFIGS[1])
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if gone == "legacy":
        del settings["legacy"]
        write_json(file, settings)
    else:
        file.unlink()
    tokenizer = load_tokenizer((tmp_path / "no such folder", folder))
    assert tokenizer(AFTER_EOS).input_ids == RECORDED[True]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer; looked for tokenizer\.json"):
        load_tokenizer((tmp_path,))
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer((tmp_path,))
