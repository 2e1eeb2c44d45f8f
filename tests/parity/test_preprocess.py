"""Recorded preparation of text and pictures, and that the check itself can fail."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from places import DATA, reference_root
from preprocess_cases import run_case

STORED = DATA / "pyramiddrop" / "preprocess"
EXACT_FLOATS = 1e-6  # pixels are the same arithmetic in the same order


def test_stored_recordings():
    rows = run_case(STORED)
    kinds = {line.split()[0] for line, _ in rows}
    assert kinds == {"anyres_geometry", "process_images", "tokenizer_image_token", "conversation"}
    assert [line for line, deviation in rows if deviation > EXACT_FLOATS] == []


def test_all_recordings():
    root = reference_root()
    folder = root / "pyramiddrop" / "preprocess" if root else None
    if folder is None or not folder.is_dir():
        pytest.skip("no folder of recorded cases beside the checkout")
    rows = run_case(folder)
    assert len(rows) > 50
    assert [line for line, deviation in rows if deviation > EXACT_FLOATS] == []


def test_empty_folder_gives_nothing(tmp_path):
    assert run_case(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("anyres_geometry.json", lambda d: d["rows"][3].update(n_tokens=1)),
        ("tokenizer_image_token.json", lambda d: d["rows"][3]["input_ids"].append(5)),
        ("conversation_prompts.json", lambda d: d["v1"].update(sep="  ")),
        ("conversation_prompts.json", lambda d: d["v1"]["prompts"][1].update(prompt="x")),
        ("anyres_geometry.json", lambda d: d.update(rows=[])),
    ],
)
def test_a_changed_recording_is_reported(tmp_path, name, change):
    data = json.loads((STORED / name).read_text())
    change(data)
    (tmp_path / name).write_text(json.dumps(data))
    for folder in STORED.glob("tokenizer_*legacy"):
        shutil.copytree(folder, tmp_path / folder.name)
    bad = [line for line, deviation in run_case(tmp_path) if math.isinf(deviation)]
    assert len(bad) == 1
