"""`llava verify`: what it says of sound checkpoints, and what it finds in others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from miniatures import edit, load, write_json, write_original
from PIL import Image
from safetensors.torch import load_file, save_file

from llava import verify
from llava.conversation import get_conversation
from llava.eval.benchmarks import load_benchmark
from llava.eval.published import PUBLISHED, published_for


def run(folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    out = folder.parent / "verify.json"
    code = verify.main(["--model-path", str(folder), "--device", "cpu", "--json", str(out), *flags])
    report = json.loads(out.read_text())
    assert report["ok"] is (code == 0)
    return code, {check["name"]: check for check in report["checks"]} | {"report": report}


def rewrite(folder: Path, change: Any) -> None:
    """Change the weights of the one shard that holds them."""
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})


def test_a_sound_checkpoint(tmp_path, capsys):
    write_original(tmp_path / "x", "v1.6-vicuna-7b")
    code, checks = run(tmp_path / "x", "--reduction", "pyramiddrop:layers=[1,2],ratios=[0.5,0.25]")
    assert code == 0
    printed = capsys.readouterr().out
    assert "info  plan         pyramiddrop:layers=[1,2],ratios=[0.5,0.25] (from flag)" in printed
    assert "template     vicuna_v1 (from config table)" in printed
    assert printed.endswith("all checks passed\n")
    assert checks["image mode"]["detail"] == "anyres (from config.json)"
    assert checks["keys"]["status"] == checks["numbers"]["status"] == "pass"
    # 640 x 400 in 2 x 2 tiles of 4 x 4 tokens: 6 rows of 8 are left, each with its newline, and the
    # whole picture's 16.
    assert "layers 0-3: 70 visual tokens" in checks["no plan"]["detail"]
    assert "layers 1-1: 35 visual tokens, layers 2-3: 17 visual" in checks["plan"]["detail"]
    assert checks["report"]["choices"]["dtype"]["value"] == "torch.float32"


def test_what_is_wrong_is_found(tmp_path):
    folder = tmp_path / "x"
    write_original(folder, "v1.6-vicuna-7b")

    def rename(weights: dict[str, torch.Tensor]) -> None:
        if "model.norm.weight" in weights:
            weights["model.extra.weight"] = weights["model.norm.weight"].clone()

    rewrite(folder, rename)
    code, checks = run(folder)
    assert code == 1
    assert checks["keys"]["detail"] == "no place in the model for: model.extra.weight"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights.pop("model.extra.weight", None)
        for name in ("model.mm_projector.2.weight", "model.mm_projector.2.bias"):
            if name in weights:
                weights[name].zero_()

    rewrite(folder, spoil)
    code, checks = run(folder)
    assert code == 1
    assert checks["numbers"]["detail"] == "all zero: model.mm_projector.2.weight"
    assert checks["picture"]["status"] == "FAIL"  # every picture looks the same

    def nan(weights: dict[str, torch.Tensor]) -> None:
        if "model.norm.weight" in weights:
            weights["model.norm.weight"][3] = torch.nan

    rewrite(folder, nan)
    code, checks = run(folder)
    assert code == 1
    assert "not finite: model.norm.weight" in checks["numbers"]["detail"]
    assert checks["no plan"]["status"] == "FAIL"


def test_the_tokenizer_against_the_embeddings(tmp_path):
    write_original(tmp_path / "x", "v1.5-7b", vocab_size=300)
    code, checks = run(tmp_path / "x")
    assert (code, checks["tokenizer"]["status"]) == (1, "FAIL")
    assert "ids beyond the 300 rows" in checks["tokenizer"]["detail"]
    assert checks["forward"]["detail"] == "not run: the tokenizer does not fit"
    write_original(tmp_path / "y", "v1.5-7b")
    write_json(tmp_path / "y" / "generation_config.json", {"eos_token_id": 9})
    code, checks = run(tmp_path / "y")
    assert checks["stop"]["status"] == "warn"
    assert "ends an answer with id 2" in checks["stop"]["detail"]


def test_a_checkpoint_of_pyramiddrop_says_what_is_missing(tmp_path):
    write_original(tmp_path / "x", "pyramiddrop")
    code, checks = run(tmp_path / "x")
    assert (code, checks["plan"]["detail"][:20]) == (0, "none (from default; ")
    assert 'training had --layer_list "[8,16,24]"' in checks["plan"]["detail"]


class Vicuna:
    """Answers with the recorded ids, and says which texts it was asked for."""

    bos_token, bos_token_id = "<s>", 1

    def __init__(self, change: dict[str, list[int]] | None = None) -> None:
        system = get_conversation("vicuna_v1").system
        human = get_conversation("llava_v1").system
        prefix = verify._SYSTEM[:35]
        self.texts = {f"{system} USER: ": prefix, f"{human} USER: ": verify._HUMAN[:35]}
        for question, ids in verify.VICUNA_PROMPTS.items():
            text = f"\n{question} ASSISTANT:"
            self.texts[text] = [1, 29871, 13, *ids, *verify._ASSISTANT]
        behind = verify.VICUNA_TURNS.removeprefix("<image>")
        self.texts[behind] = [1, *verify.VICUNA_BEHIND_EOS[36:]]
        self.texts |= change or {}

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[1] if text == "" else self.texts[text])

    def __len__(self) -> int:
        return 32000

    def convert_ids_to_tokens(self, i: int) -> str:
        return verify.VICUNA_PIECES[i]


def test_vicuna_ids():
    (check,) = verify.check_vicuna_ids(Vicuna())
    assert (check.status, check.name) == ("pass", "ids")
    assert len(verify._SYSTEM[:35]) == 35  # YOPO's sprompt_len
    # What AutoTokenizer makes of the published folder: no space in front of a chunk.
    question = next(iter(verify.VICUNA_PROMPTS))
    text = f"\n{question} ASSISTANT:"
    spaceless = {text: [1, 13, *Vicuna().texts[text][3:]]}
    (check,) = verify.check_vicuna_ids(Vicuna(spaceless))
    assert check.status == "FAIL"
    assert "differs from token 36 on: [13, 5618, 338, 278], recorded [29871, 13" in check.detail
    behind = verify.VICUNA_TURNS.removeprefix("<image>")
    legacy = [1, *verify.VICUNA_BEHIND_EOS[36:-4], 319, 1799, 9047, 13566, 29901]
    first, second = verify.check_vicuna_ids(Vicuna({behind: legacy}))
    assert (first.status, second.status) == ("pass", "warn")
    assert "legacy: false" in second.detail


def write_pope(root: Path) -> None:
    """Four questions about two pictures in POPE's layout."""
    folder = root / "pope"
    (folder / "val2014").mkdir(parents=True)
    (folder / "coco").mkdir()
    questions, labels = [], []
    for i in range(4):
        image = f"COCO_val2014_{i // 2:012d}.jpg"
        Image.new("RGB", (40, 60), (90 * i, 80, 10)).save(folder / "val2014" / image)
        asked = f"Is there a fork in image {i}?"
        row = {"question_id": i + 1, "image": image, "text": asked}
        questions.append({**row, "category": "random"})
        labels.append({**row, "label": "yes"})
    (folder / "llava_pope_test.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for name in ("random", "popular", "adversarial"):
        own = labels if name == "random" else []
        (folder / "coco" / f"coco_pope_{name}.json").write_text("\n".join(map(json.dumps, own)))


def test_a_score_beside_the_published_one(tmp_path, monkeypatch):
    write_original(tmp_path / "x", "v1.5-7b")
    write_pope(tmp_path / "data")
    loaded = load(tmp_path / "x", dtype=None)
    benchmark = load_benchmark("pope", tmp_path / "data")
    small = dataclasses.replace(benchmark.benchmark, count=len(benchmark.questions))
    benchmark = dataclasses.replace(benchmark, benchmark=small)
    check = verify.check_benchmark(loaded, benchmark, 2)
    assert check.status == "info"
    assert "nothing published for a model of this shape" in check.detail
    # Everything but "no" counts as yes, so a random model has a perfect F1 of 100 here.
    assert " 100.00 [" in check.detail
    entry = PUBLISHED[0]
    for score, status in ((100.0, "pass"), (85.9, "FAIL")):
        fake = dataclasses.replace(entry, scores={"POPE": score})
        monkeypatch.setattr(verify, "published_for", lambda config, fake=fake: fake)
        check = verify.check_benchmark(loaded, benchmark, 2)
        assert check.status == status
        assert f"published for liuhaotian/llava-v1.5-7b: {score}" in check.detail
    loaded.choices = dataclasses.replace(
        loaded.choices, plan=load(tmp_path / "x", reduction="fastv:k=1,r=0.5").choices.plan
    )
    check = verify.check_benchmark(loaded, benchmark, 2)
    assert check.status == "info"
    assert "with dropping: not comparable" in check.detail


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (("llava_llama", 32, 4096, "pad"), "liuhaotian/llava-v1.5-7b"),
        (("llava_llama", 40, 5120, "anyres"), "liuhaotian/llava-v1.6-vicuna-13b"),
        (("llava_mistral", 32, 4096, "anyres"), "liuhaotian/llava-v1.6-mistral-7b"),
        (("llava_llama", 60, 7168, "anyres"), "liuhaotian/llava-v1.6-34b"),
        (("llava_llama", 30, 4096, "pad"), None),
    ],
)
def test_published_checkpoints_are_known_by_their_shape(shape, name):
    keys = ("model_type", "num_hidden_layers", "hidden_size", "image_aspect_ratio")
    found = published_for(SimpleNamespace(**dict(zip(keys, shape, strict=True))))
    assert (found and found.name) == name


def test_what_cannot_be_loaded_is_exit_code_2(tmp_path, capsys):
    write_original(tmp_path / "x", "v1.5-7b")
    flags = ["--model-path", str(tmp_path / "x"), "--device", "cpu"]
    for more, message in (
        (["--benchmark", "pope", "--data-root", str(tmp_path)], "pope: file not found"),
        (["--conv-mode", "vicuna"], "unknown conversation template"),
        (["--reduction", "pyramiddrop:layers=[9],ratios=[0.5]"], "layer 9 does not fit"),
    ):
        with pytest.raises(SystemExit) as ended:
            verify.main([*flags, *more])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    edit(tmp_path / "x", mm_projector_type="gone")
    with pytest.raises(SystemExit):
        verify.main(flags)
    assert "no mm_projector_type" in capsys.readouterr().err
