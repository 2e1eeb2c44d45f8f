"""`llava data check-train`: every kind of bad sample is found, and a run without them goes."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava import mm_utils
from llava.cli import main
from llava.constants import IGNORE_INDEX
from llava.mm_utils import load_image
from llava.reduction import ReductionPlan
from llava.train.data_check import ERRORS as KINDS
from llava.train.data_check import (
    Checker,
    build_parser,
    mean_visual_tokens,
    picture_problems,
    picture_settings,
    turn_problems,
)
from llava.train.dataset import LazySupervisedDataset
from llava.train.preprocess import training_template

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smoke"))
from train_fixtures import write_all  # noqa: E402


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = turns("<image>\nwhat colour", "red")
SAMPLES = [
    {"id": "good", "image": "red.png", "conversations": GOOD},
    {"id": "text", "conversations": turns("what is it", "blue")},
    {"id": "gone", "image": "nowhere.png", "conversations": GOOD},
    {"id": "ending", "image": "red.jpg", "conversations": GOOD},
    {"id": "broken", "image": "broken.png", "conversations": GOOD},
    {"id": "cut file", "image": "half.png", "conversations": GOOD},
    {"id": "field", "image": 3, "conversations": GOOD},
    {"id": "marks", "image": ["red.png", "blue.png"], "conversations": GOOD},
    {"id": "mark in answer", "image": "red.png", "conversations": turns("what", "<image> red")},
    {"id": "twice human", "conversations": [*turns("what"), *turns("is")]},
    {"id": "no turns"},
    {"id": "empty", "conversations": turns("what", " ")},
    {"id": "late empty", "conversations": turns("what", "red", "is", "")},
    {"id": "answer first", "conversations": [turns("", "it")[1], *turns("what", "red")]},
    {"id": "long", "conversations": turns("what " * 60, "red")},
    {"id": "long answer", "conversations": turns("what", "red " * 60)},
    {"id": "good", "image": "blue.png", "conversations": GOOD},
]  # fmt: skip
ERRORS = {
    "missing_image": 2,
    "broken_image": 2,
    "image_field": 1,
    "image_marks": 2,
    "turns": 2,
    "too_long": 1,
    "untrainable": 1,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    write_all(folder)
    images = folder / "data" / "images"
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    Image.effect_noise((64, 64), 50).save(images / "half.png")
    content = (images / "half.png").read_bytes()
    (images / "half.png").write_bytes(content[: len(content) // 2])
    (folder / "bad.json").write_text(json.dumps(SAMPLES))
    (folder / "mixture.json").write_text(
        json.dumps({"datasets": [{"path": "bad.json", "weight": 2}, {"path": "data/mixed.json"}]})
    )
    return folder


def check(files: Path, data: Path, *more: str) -> int:
    return main(
        [
            "data", "check-train", "--data_path", str(data), "--version", "mistral_instruct",
            "--image_folder", str(files / "data" / "images"), "--model_max_length", "40",
            "--vision_tower", str(files / "tower"), "--workers", "0", *more,
        ]
    )  # fmt: skip


def test_every_kind_is_found_and_left_out(files, tmp_path, capsys):
    """Each sample once although the mixture shows it twice; training then runs without them."""
    report, skip = tmp_path / "report.json", tmp_path / "skip.json"
    model = ["--model_name_or_path", str(files / "config")]
    plan = ["--layer_list", "[2]", "--image_token_ratio_list", "[0.5]"]
    out = ["--json", str(report), "--skip_list", str(skip)]
    assert check(files, files / "mixture.json", *model, *plan, *out) == 1
    found = json.loads(report.read_text())
    assert found["samples"] == len(SAMPLES) + 8
    assert found["errors"] == ERRORS
    assert found["warnings"] == {"cut": 1, "empty_answer": 2, "answer_first": 1, "repeated_id": 1}
    named = {one["id"].strip('"') for one in found["bad_samples"]}
    assert named == {s["id"] for s in SAMPLES} - {
        "good", "text", "late empty", "answer first", "long answer"
    }  # fmt: skip
    assert "(there is red.png)" in " ".join(found["examples"]["missing_image"])
    assert found["tokens"]["counted_samples"] == found["samples"] - len(named)
    assert found["tokens"]["visual"]["max"] == 8
    assert found["tokens"]["after_plan"]["mean_visual_per_layer"] == pytest.approx(
        0.75 * found["tokens"]["visual"]["mean"], rel=0.05
    )
    text = capsys.readouterr().out
    assert "error: picture is missing: 2" in text
    assert 'sample 3 (id "ending")' in text

    from llava.train.train import main as train

    flags = {
        "init_from_config": files / "config", "tokenizer_path": files / "config",
        "vision_tower": files / "tower", "data_path": files / "mixture.json",
        "image_folder": files / "data" / "images", "version": "mistral_instruct",
        "mm_use_im_patch_token": False, "model_max_length": 40, "num_train_epochs": 1,
        "per_device_train_batch_size": 4, "save_strategy": "no", "seed": 42,
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    command = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit):
        train(command)
    assert "bad.json, sample 2 (id gone)" in capsys.readouterr().err
    train([*command, "--skip_samples", str(skip)])
    summary = json.loads((tmp_path / "run" / "train_summary.json").read_text())
    assert summary["samples"] == 2 * (len(SAMPLES) - len(named)) + 8
    with pytest.raises(SystemExit):
        train([*command, "--data_path", str(files / "bad.json"), "--skip_samples", str(skip)])
    assert "other data" in capsys.readouterr().err


def test_good_data_and_what_can_be_left_out(files, capsys):
    """Without a tokenizer nothing is counted, without decoding a cut file passes."""
    assert check(files, files / "data" / "mixed.json") == 0
    text = capsys.readouterr().out
    assert "tokens are not counted" in text
    assert "no sample would end a run" in text.splitlines()
    assert check(files, files / "bad.json", "--no-decode") == 1
    assert "picture does not decode: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        check(files, files / "bad.json", "--layer_list", "[50]", "--image_token_ratio_list",
              "[0.5]")  # fmt: skip
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        ("bad.json", ["--json", "{}/bad.json"], "would be written over what is read"),
        ("bad.json", ["--skip_list", "{}/bad.json"], "would be written over what is read"),
        ("mixture.json", ["--json", "{}/mixture.json"], "would be written over what is read"),
        ("mixture.json", ["--json", "{}/bad.json"], "would be written over what is read"),
        ("bad.json", ["--json", "{}/x", "--skip_list", "{}/data/../x"], "give two files"),
        ("bad.json", ["--json", "{}/data"], "Is a directory"),
        ("bad.json", ["--json", "{}/bad.json/x"], "Not a directory"),
        ("bad.json", ["--image_aspect_ratio", "stretch"], "'square', 'pad', 'anyres'"),
    ],
)
def test_where_the_report_goes_is_looked_at_first(files, data, flags, message, capsys, monkeypatch):
    monkeypatch.setattr("llava.train.data_check.check_training_data", None)  # never gets there
    before = {file: file.read_bytes() for file in files.glob("*.json")}
    with pytest.raises(SystemExit) as stop:
        check(files, files / data, *[flag.format(files) for flag in flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in files.glob("*.json")}


def test_layers_and_geometry_are_the_models_own(files, tmp_path, capsys):
    """Of a tower that is published, or whose config.json leaves out defaults; of a base in
    transformers' layout, where the language model's config is nested."""

    def visual(*flags: str) -> list[int]:
        args = build_parser().parse_args(["--data_path", "x", *flags])
        return picture_settings(args).visual_tokens([(9, 9)])

    CLIPVisionConfig().save_pretrained(tmp_path / "tower")
    assert visual() == visual("--vision_tower", "openai/clip-vit-large-patch14-336") == [576]
    assert visual("--vision_tower", str(tmp_path / "tower")) == [49]
    with pytest.raises(ValueError, match="vision tower '/nowhere' cannot be read"):
        visual("--vision_tower", "/nowhere")

    text = LlamaConfig(num_hidden_layers=6, hidden_size=16, num_attention_heads=2)
    whole = LlavaConfig(vision_config=CLIPVisionConfig(), text_config=text)
    whole.save_pretrained(tmp_path / "base")
    model = ["--model_name_or_path", str(tmp_path / "base")]
    model += ["--tokenizer_path", str(files / "config")]
    plan = ["--layer_list", "[3]", "--image_token_ratio_list", "[0.5]"]
    report = tmp_path / "report.json"
    assert check(files, files / "data" / "mixed.json", *model, *plan, "--json", str(report)) == 0
    assert json.loads(report.read_text())["tokens"]["after_plan"]["layers"] == 6


def test_a_mark_in_an_answer_that_is_left_out_does_not_count():
    first = {"from": "gpt", "value": "<image> is what I see"}
    found = dict(turn_problems([first, *turns("<image> what", "red")], 1))
    assert set(found) == {"answer_first"}
    assert set(dict(turn_problems([first, *turns("what", "red")], 1))) == {
        "image_marks", "answer_first"
    }  # fmt: skip


def test_tokens_behind_the_cuts_are_the_plans():
    """LLaVA-1.5-7B's 576 tokens on 8 layers each of 576, 288, 144, 72: 270 on average."""
    plan = ReductionPlan.pyramid([8, 16, 24], [0.5, 0.25, 0.125])
    assert mean_visual_tokens([(576, 1)], plan, 32) == 270
    assert mean_visual_tokens([(576, 1), (0, 0)], plan, 32) == 135
    assert mean_visual_tokens([(576, 1)], ReductionPlan(), 32) == 576


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_pictures_are_taken_as_llava_takes_them_and_what_is_odd_is_named(tmp_path):
    """None ends a run; the check says what of each a person would see otherwise."""
    small = Image.new("RGB", (4, 4), (9, 9, 9))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    frames = {"save_all": True, "append_images": [Image.new("RGB", (4, 4), "blue")]}
    odd = {
        save(small.convert("CMYK"), tmp_path / "cmyk.jpg"): set(),
        save(small, tmp_path / "straße 图 'x' (1)..png"): set(),
        save(small.convert("RGBA"), tmp_path / "opaque.png"): set(),
        save(small, tmp_path / "turned.jpg", exif=turned): {"turned_image"},
        save(deep, tmp_path / "deep.png"): {"deep_image"},
        save(deep.point(lambda value: 7), tmp_path / "shallow.png"): set(),
        save(palette, tmp_path / "clear.png", transparency=b"\xff\x00"): {"transparent_image"},
        save(small, tmp_path / "film.gif", **frames): {"animated_image"},
        save(small, tmp_path / "film.webp", **frames): {"animated_image"},
        save(Image.new("L", (1000, 2)), tmp_path / "line.png"): {"extreme_image"},
    }
    for path, kinds in odd.items():
        assert {kind for kind, _ in picture_problems(str(path))} == kinds, path
        assert load_image(path).mode == "RGB"
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (0, 255, 0)
    (tmp_path / "below").mkdir()
    assert picture_problems(str(tmp_path / "below" / ".." / "cmyk.jpg")) == []


def test_what_is_wrong_with_a_picture_is_said_by_name(tmp_path, monkeypatch):
    """By the check and by the run in the same words."""
    save(Image.new("RGB", (30, 20)), tmp_path / "e\u0301.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for name, kind, says in (
        ("empty.png", "broken_image", "image file is empty: "),
        ("e\u0301.png", "broken_image", "too large, scale it down: .*600 pixels"),
        ("loop.png", "missing_image", "it is a link to loop.png, which leads to no file"),
        ("pipe.png", "missing_image", "no regular file"),
        ("http://host/a.png", "missing_image", "download it"),
        ("data:image/png;base64," + 9999 * "A", "missing_image", "download it"),
        ("half\ud800.png", "missing_image", "half.ud800.png"),
        ("nul\0.png", "missing_image", "not found"),
    ):
        path = os.path.join(tmp_path, name)
        with pytest.raises((ValueError, OSError), match=says) as raised:
            load_image(path)
        ((found, text),) = picture_problems(path)
        assert (found, text) == (kind, str(raised.value))
    ((_, text),) = picture_problems(str(tmp_path / "\u00e9.png"))  # composed in the JSON alone
    assert text.endswith("(there is e\u0301.png)")


def test_a_picture_that_is_too_long_to_be_scaled_is_an_error_where_it_is_scaled(tmp_path):
    """Not padded, its shorter side would become the tower's side: a thousand million pixels."""
    line = save(Image.new("L", (10000, 1)), tmp_path / "line.png")
    for aspect, kind, tiles in (("square", "long_image", 0), ("pad", "extreme_image", 1),
                                ("anyres", "extreme_image", 3)):  # fmt: skip
        flags = ["--data_path", "x", "--image_aspect_ratio", aspect]
        reader = picture_settings(build_parser().parse_args(flags))
        record = {"image": str(line), "conversations": GOOD}
        data = LazySupervisedDataset([record], None, training_template("v1"), reader=reader)
        ((found, text),) = Checker(data)(0).problems
        assert (found, str(line) in text) == (kind, True)
        pictures = [load_image(line)]
        if tiles:
            pixels = mm_utils.process_images(pictures, reader.image_processor, reader.model_cfg)[0]
            assert pixels.numel() == tiles * 3 * 336**2
        else:
            with pytest.raises(ValueError, match="10000x1 pixels would be scaled to 1128 million"):
                mm_utils.process_images(pictures, reader.image_processor, reader.model_cfg)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_run_warns_of_extreme_pictures_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mm_utils, "_warned", set())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    monkeypatch.setattr(mm_utils, "logger", logging.getLogger("a test's own"))
    paths = [save(Image.new("L", (300, 2 + i)), tmp_path / f"{i}.png") for i in range(15)]
    paths.append(save(Image.new("L", (80, 80)), tmp_path / "large.png"))
    with pytest.warns(Image.DecompressionBombWarning):
        load_image(paths[-1])
    for path in 2 * paths:
        load_image(path)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == mm_utils.MAX_WARNINGS + 1
    assert "large.png has 80x80 pixels, which takes long" in lines[0]
    assert "0.png has 300x2 pixels" in lines[1]


def random_record(rng: random.Random) -> dict:
    """Mostly a sample that can be trained on; of everything else a little."""
    asked = ["what is", "<image>", "a <image> b <image>", "what " * 60, "</s>"] * 6 + ["", 5]
    said = ["red", "red " * 60, "###"] * 8 + ["", "<image>", None]
    first, turns = rng.choice([0, 0, 0, 0, 1]), []
    for i in range(first, first + rng.choice([1, 2, 2, 2, 4, 4, 5])):
        speaker = rng.choice([("human", "gpt")[i % 2]] * 40 + ["system", "human", "gpt", None])
        turns.append({"from": speaker, "value": rng.choice((asked, said)[i % 2])})
    marks = sum(str(turn["value"]).count("<image>") for turn in turns)
    names = ["red.png", "blue.png", "line.png"] * 9 + ["broken.png", "half.png", "gone.png"]
    image: object = [rng.choice(names) for _ in range(marks)]
    record = {"conversations": turns, "image": rng.choice([image] * 6 + ["red.png", [], {}, 3])}
    return record | ({"video": "a.mp4"} if rng.random() < 0.02 else {})


def test_the_check_finds_what_the_run_does(files):
    """Of random samples: no error is what can be trained on, and its tokens are as many."""
    folder = files / "data" / "images"
    save(Image.new("L", (600, 3)), folder / "line.png")
    tower = ["--data_path", "x", "--vision_tower", str(files / "tower"), "--image_folder"]
    pins = ["--image_grid_pinpoints", "[[16,32],[32,16]]", "--mm_patch_merge_type", "spatial_unpad"]
    tokenizer = AutoTokenizer.from_pretrained(files / "config")
    rng, good = random.Random(0), 0
    for number in range(400):
        aspect = ["--image_aspect_ratio", rng.choice(["pad", "square", "anyres"])]
        reader = picture_settings(build_parser().parse_args([*tower, str(folder), *aspect, *pins]))
        conv = training_template(rng.choice(["v1", "mistral_instruct", "qwen_2", "plain", "mpt"]))
        data = LazySupervisedDataset(
            [random_record(rng)], tokenizer, conv, reader=reader, max_length=rng.choice([60, 400])
        )
        found = Checker(data)(0)
        errors = [problem for problem in found.problems if problem[0] in KINDS]
        try:
            sample = data[0]
        except ValueError:
            assert errors, (number, data.records[0])
            continue
        assert not errors, (number, data.records[0])
        good += 1
        pictures = reader.visual_tokens(sample["image_sizes"])
        text = len(sample["input_ids"]) - len(pictures)
        assert found.measured[:2] == (text, sum(pictures))
        assert any(label != IGNORE_INDEX for label in sample["labels"][1:])
    assert 50 < good < 300
