"""Recorded label masks, sampler orders and steps, and that the check itself can fail.

The stored steps run in test_reference.py with all recorded cases, here those beside the checkout.
"""

from __future__ import annotations

import json
import shutil

import pytest
from places import DATA, reference_root
from safetensors.torch import load_file, save_file
from training_cases import LABELS_FILE, SAMPLER_FILE, run, through_trainer

STORED = DATA / "pyramiddrop" / "preprocess"


def test_stored_recordings():
    results = run(STORED)
    assert {name.split("/")[0] for name, _ in results} == {"labels", "sampler"}
    assert [result for result in results if result[1]] == []


def test_all_recordings():
    root = reference_root()
    folder = root / "pyramiddrop" / "preprocess" if root else None
    if folder is None or not folder.is_dir():
        pytest.skip("no folder of recorded cases beside the checkout")
    results = run(folder)
    assert len(results) > 100
    assert [result for result in results if result[1]] == []


def test_segments_equal_the_recording_where_it_did_not_miss():
    """The default way gives LLaVA's ids and labels wherever LLaVA's own masking worked (v0 writes
    another text in training than its template does)."""
    from transformers import AutoTokenizer

    from llava.train.preprocess import preprocess, training_template

    kinds = {flag: "legacy" if flag else "nonlegacy" for flag in (True, False)}
    tokenizers = {
        flag: AutoTokenizer.from_pretrained(STORED / f"tokenizer_{kind}")
        for flag, kind in kinds.items()
    }
    compared = set()
    for record in json.loads((STORED / LABELS_FILE).read_text())["records"]:
        if "error" in record or record["warning"] or record["template"] in ("v0", "mpt"):
            continue
        if record["name"] == "empty_answer" and record["template"] == "chatml_direct":
            continue  # one stray token is learned there
        got = preprocess(
            record["conversations"],
            tokenizers[record["legacy"]],
            training_template(record["template"]),
            n_images=int(record["has_image"]),
        )
        assert got.input_ids == record["input_ids"], record["name"]
        assert got.labels == record["labels"], record["name"]
        compared.add(record["template"])
    assert compared == {"v1", "llava_llama_2", "mistral_instruct", "plain"}


def test_an_empty_folder_gives_nothing(tmp_path):
    assert run(tmp_path) == []


def swap(case: dict) -> None:
    case["indices"][0], case["indices"][1] = case["indices"][1], case["indices"][0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (LABELS_FILE, lambda d: d["records"][0]["labels"].__setitem__(-1, -100)),
        (LABELS_FILE, lambda d: d["records"][0]["input_ids"].__setitem__(-1, 5)),
        (LABELS_FILE, lambda d: d["records"][0].update(warning="another")),
        (LABELS_FILE, lambda d: d["records"][0].update(after_preprocess_multimodal=[])),
        (SAMPLER_FILE, lambda d: swap(d["cases"][0])),
        (SAMPLER_FILE, lambda d: d["cases"][-1].update(torch_seed=99)),
    ],
)
def test_a_changed_recording_is_reported(tmp_path, name, change):
    data = json.loads((STORED / name).read_text())
    change(data)
    (tmp_path / name).write_text(json.dumps(data))
    for folder in STORED.glob("tokenizer_*legacy"):
        shutil.copytree(folder, tmp_path / folder.name)
    assert len([result for result in run(tmp_path) if result[1]]) == 1


def test_a_changed_step_is_reported(tmp_path):
    """Of the loss, or of one gradient: on every layout."""
    shutil.copytree(STORED.parent / "_weights", tmp_path / "_weights")
    case = shutil.copytree(STORED.parent / "d3_train_b3_padded", tmp_path / "case")
    expected = load_file(case / "expected.safetensors")
    gradient = next(name for name in expected if name.startswith("grad."))
    expected["loss"] += 0.01
    expected[gradient][0] += 0.01
    save_file(expected, case / "expected.safetensors")
    for variant, check in through_trainer(case):
        assert [failure.split(":")[0] for failure in check.failures] == ["loss", gradient], variant
