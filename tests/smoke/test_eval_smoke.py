"""A real (tiny, random) checkpoint answers questions through the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import train_fixtures
from PIL import Image

from llava.cli import main as llava
from llava.eval.answer import answer_questions
from llava.eval.questions import read_questions
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model

PLAN = "pyramiddrop:layers=[1,2],ratios=[0.5,0.25]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """checkpoint/ (4 layers, anyres), images of several shapes, q.jsonl."""
    folder = tmp_path_factory.mktemp("eval")
    train_fixtures.write_tower(folder / "tower")
    torch.manual_seed(3)
    config = LlavaConfig(
        vocab_size=len(train_fixtures.WORDS), hidden_size=16, intermediate_size=32,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        conv_mode="mistral_instruct",
    )  # fmt: skip
    model = LlavaLlamaForCausalLM(config)
    modules = SimpleNamespace(
        vision_tower=str(folder / "tower"), mm_vision_select_layer=-2,
        mm_vision_select_feature="patch", mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="spatial_unpad",
    )  # fmt: skip
    model.get_model().initialize_vision_modules(modules)
    for parameter in model.parameters():  # far from ties, so that batches cannot change answers
        parameter.data.mul_(3)
    model.save_pretrained(folder / "checkpoint")
    train_fixtures.write_tokenizer(folder / "checkpoint")
    (folder / "images").mkdir()
    sizes = {"wide": (90, 20), "tall": (20, 60), "square": (50, 50)}
    for name, size in sizes.items():
        Image.effect_noise(size, 90).convert("RGB").save(folder / "images" / f"{name}.png")
    asked = [
        ("wide.png", "what colour is it"),
        (None, "is it red"),
        (["tall.png", "square.png"], "<image> is <image>"),
        ("square.png", "what is this one this one this one"),
        ("tall.png", "what"),
        ("square.png", "what is red"),
    ]
    with open(folder / "q.jsonl", "w") as file:
        for number, (image, text) in enumerate(asked):
            record = {"question_id": number, "text": text}
            file.write(json.dumps(record if image is None else {**record, "image": image}) + "\n")
    return folder


def flags(folder, *more: str) -> list[str]:
    return [
        "--model-path", str(folder / "checkpoint"), "--question-file", str(folder / "q.jsonl"),
        "--image-folder", str(folder / "images"), "--max_new_tokens", "6", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("plan", ["none", PLAN, "random:layers=[1],ratios=[0.5]"])
def test_batched_answers_equal_single_ones(folder, plan):
    tokenizer, model, processor, _ = load_pretrained_model(str(folder / "checkpoint"), device="cpu")
    questions = read_questions(folder / "q.jsonl")
    single, batched, whole, blind = (
        answer_questions(
            model, tokenizer, processor, questions, image_folder=folder / "images",
            reduction=plan, batch_size=size, max_new_tokens=6, blind=grey, share=share,
        )
        for size, grey, share in (
            (1, False, False), (6, False, True), (6, False, False), (6, True, True)
        )
    )  # fmt: skip
    own = ("answer_id", "run_id", "latency_ms")  # of the run and its batches
    for together in (batched, whole):
        for one, other in zip(single, together, strict=True):
            same = [key for key in one if key not in own]
            assert [one[key] for key in same] == [other[key] for key in same]
    assert len({record["text"] for record in single}) > 1
    texts, grey = ([r["text"] for r in records] for records in (single, blind))
    assert grey != texts
    assert grey[1] == texts[1]  # the question without a picture


def test_command_line(folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    plan = ["--layer_list", "[1,2]", "--image_token_ratio_list", "[0.5,0.25]"]
    assert llava(["answer", *flags(folder, "--answers-file", str(out), *plan)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["question_id"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert {record["model_id"] for record in records} == {"checkpoint"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--reduction", "pyramiddrop:layers=[4],ratios=[0.5]"], "layer 4"),
        (["--conv-mode", "nonsense"], "nonsense"),
        (["--model-path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys, more, says):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit) as stop:
        llava(["answer", *flags(folder, "--answers-file", str(out), *more)])
    assert stop.value.code not in (0, None)
    err = capsys.readouterr().err
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
