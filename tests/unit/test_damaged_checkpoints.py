"""Wrong and damaged checkpoints are refused by name, and no pickle runs code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import (
    IMAGE_ID,
    TEXT,
    edit,
    hf_model,
    load,
    write_base,
    write_hf,
    write_json,
    write_lora,
    write_original,
    write_projector_only,
    write_tower,
)
from safetensors.torch import load_file, save_file

from llava.model.builder import load_checkpoint
from llava.model.convert import convert
from llava.model.convert import main as convert_main


@pytest.fixture
def bins(tmp_path):
    write_original(tmp_path / "bins", "v1.5-7b")
    return tmp_path / "bins"


@pytest.fixture
def tensors(tmp_path):
    write_original(tmp_path / "tensors", "v1.6-vicuna-7b")
    return tmp_path / "tensors"


class Attack:
    """Unpickling it would make a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard(tensors, index):
    (tensors / "model-00002-of-00003.safetensors").unlink()
    if not index:
        (tensors / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors .* is missing"):
        load(tensors)


def test_shards_without_their_index_are_read_by_their_numbers(tensors):
    (tensors / "model.safetensors.index.json").unlink()
    assert load(tensors).unused == ()


def test_a_shard_that_lacks_what_the_index_lists(tensors):
    file = tensors / "model-00001-of-00003.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"index\.json are in none of its files: {name}"):
        load(tensors)


def test_an_index_that_points_out_of_the_folder(tensors):
    write_json(
        tensors / "model.safetensors.index.json", {"weight_map": {"a": "../other.safetensors"}}
    )
    with pytest.raises(ValueError, match=r"outside of its folder: \.\./other"):
        load(tensors)


@pytest.mark.parametrize("part", [0, 7, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["bins", "tensors"])
def test_a_truncated_file(kind, part, request):
    folder = request.getfixturevalue(kind)
    file = sorted(folder.glob("*-00002-of-*"))[0]
    data = file.read_bytes()
    file.write_bytes(data[: int(part * len(data)) if part < 1 else part])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated"):
        load(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model-00002-of-00002.bin", "mm_projector.bin"])
def test_a_pickle_that_would_run_code(name, old_format, tmp_path):
    base = write_base(tmp_path / "a")
    write_original(tmp_path / "x", "v1.5-7b")
    write_projector_only(tmp_path / "b", base)
    folder, given = (tmp_path / "b", [tmp_path / "a"]) if "mm" in name else (tmp_path / "x", [])
    bad = {"model.norm.weight": Attack(tmp_path / "owned")}
    torch.save(bad, folder / name, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=rf"{name} is refused: .*mkdir"):
        load(folder, *given)
    assert not (tmp_path / "owned").exists()
    (folder / name).write_bytes(pickle.dumps(bad))  # a plain pickle, no file of torch's
    with pytest.raises(ValueError, match=name):
        load(folder, *given)
    assert not (tmp_path / "owned").exists()


def test_pickles_of_a_lora_run(tmp_path):
    base = write_base(tmp_path / "a")
    write_lora(tmp_path / "b", base, old_peft=True)
    for name in ("non_lora_trainables.bin", "adapter_model.bin"):
        kept = (tmp_path / "b" / name).read_bytes()
        torch.save({"x": Attack(tmp_path / "owned")}, tmp_path / "b" / name)
        with pytest.raises(ValueError, match=rf"{name} is refused: .*mkdir"):
            load(tmp_path / "b", tmp_path / "a")
        (tmp_path / "b" / name).write_bytes(kept)
    assert not (tmp_path / "owned").exists()
    torch.save([torch.ones(1)], tmp_path / "b" / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"non_lora_trainables\.bin holds a list"):
        load(tmp_path / "b", tmp_path / "a")


def test_a_tower_of_another_size(bins, tensors, tmp_path):
    wide = tmp_path / "wide"
    write_tower(wide, hidden_size=36)
    with pytest.raises(ValueError, match=r"width 36, the projector takes 24"):
        load(bins, vision_tower=wide)
    big = tmp_path / "big"
    write_tower(big, image_size=84)
    edit(tensors, mm_vision_tower=str(big))
    with pytest.raises(ValueError, match=r"position_embedding.weight \(\(17, 24\), .*\(37, 24\)"):
        load(tensors)
    edit(tensors, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(ValueError, match=r"features of width 1024, the projector takes 24"):
        load(tensors)


def test_a_tower_that_is_not_there(bins, tensors):
    edit(bins, mm_vision_tower="/nowhere/clip")
    with pytest.raises(ValueError, match=r"/nowhere/clip.* cannot be read; give a folder"):
        load(bins)
    edit(tensors, mm_vision_tower="/nowhere/clip")
    with pytest.raises(ValueError, match=r"not its structure.*--vision-tower"):
        load(tensors)


def test_a_processor_for_another_tower(tensors):
    values = {"crop_size": 48, "size": 48, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(tensors / "preprocessor_config.json", values)
    with pytest.raises(ValueError, match=r"makes pictures of 48 pixels a side.* takes 56"):
        load(tensors)


def test_configs_that_leave_something_out(bins, tensors):
    edit(bins, mm_projector_type="gone")
    with pytest.raises(ValueError, match=r"no mm_projector_type; .*'mlp2x_gelu'"):
        load(bins)
    edit(tensors, mm_patch_merge_type="flat")
    loaded = load(tensors)
    assert loaded.unused == ("model.image_newline",)  # and a warning that says so
    edit(tensors, mm_patch_merge_type="spatial_unpad", image_grid_pinpoints="gone")
    with pytest.raises(ValueError, match="needs image_grid_pinpoints"):
        load(tensors)
    edit(tensors, image_aspect_ratio="stretch")
    with pytest.raises(ValueError, match=r"image_aspect_ratio is 'stretch'"):
        load(tensors)
    edit(tensors, num_hidden_layers=6)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.4\..* more"):
        load(tensors, image_aspect_ratio="pad")
    edit(tensors, quantization_config={"load_in_4bit": True})
    with pytest.raises(ValueError, match="quantised weights"):
        load(tensors)
    edit(tensors, quantization_config="gone", model_type="llava_mpt")
    with pytest.raises(ValueError, match=r"'llava_mpt'; accepted: .*llava_qwen"):
        load(tensors)


def test_marks_around_pictures_need_trained_rows(tmp_path):
    """<im_start> and <im_end> are part of the prompt; <im_patch> never is."""
    write_original(tmp_path / "x", "v1.5-7b", mm_use_im_start_end=True)
    tokenizer = load(tmp_path / "x").tokenizer
    assert tokenizer("<im_start>").input_ids[-1] == 480
    write_original(tmp_path / "y", "v1.5-7b", mm_use_im_start_end=True, vocab_size=480)
    with pytest.raises(ValueError, match=r"needs trained embeddings of <im_start>.* up to 481"):
        load(tmp_path / "y")
    edit(tmp_path / "y", mm_use_im_start_end=False, mm_use_im_patch_token=True)
    loaded = load(tmp_path / "y")
    assert loaded.model.get_input_embeddings().weight.shape[0] == 480


def test_adapters_and_bases(tmp_path):
    base = write_base(tmp_path / "a")
    write_lora(tmp_path / "b", base, old_peft=False)
    write_projector_only(tmp_path / "c", base)
    for name, what in (("b", "LoRA adapter"), ("c", "projector without its language model")):
        with pytest.raises(ValueError, match=rf"is a {what}: give its base \(--model-base\)"):
            load(tmp_path / name)
    with pytest.raises(ValueError, match=r"model_base .* is no full checkpoint but a projector"):
        load(tmp_path / "b", tmp_path / "c")
    write_original(tmp_path / "x", "v1.5-7b")
    with pytest.raises(ValueError, match="is a full checkpoint; model_base"):
        load(tmp_path / "x", tmp_path / "a")
    # The base of another size, and a config.json that says nothing of its weights' size.
    write_original(tmp_path / "y", "v1.6-34b")
    with pytest.raises(ValueError, match=r"trained over a model with hidden_size 32; .* has 16"):
        load(tmp_path / "b", tmp_path / "y")
    edit(tmp_path / "y", **{key: TEXT[key] for key in ("hidden_size", "num_key_value_heads")})
    with pytest.raises(ValueError, match=r"LoRA of model\.layers\.0\..* the base has"):
        load(tmp_path / "b", tmp_path / "y")
    # Other heads, or another family: weights of the same shapes, and another model.
    for change, named in (
        ({"num_attention_heads": 8}, "num_attention_heads 4; .* has 8"),
        ({"model_type": "mistral"}, "model_type 'llava_llama'; .* has 'llava_mistral'"),
    ):
        kept = (tmp_path / "a" / "config.json").read_bytes()
        edit(tmp_path / "a", **change)
        for adapter in ("b", "c"):
            with pytest.raises(ValueError, match=named):
                load(tmp_path / adapter, tmp_path / "a")
        (tmp_path / "a" / "config.json").write_bytes(kept)
    settings = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    for change, named in (
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; accepted: 'LORA'"),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; accepted: int or float"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3; accepted: str"),
    ):
        write_json(tmp_path / "b" / "adapter_config.json", {**settings, **change})
        with pytest.raises(ValueError, match=named):
            load(tmp_path / "b", tmp_path / "a")
    write_json(tmp_path / "b" / "adapter_config.json", settings)
    # A base that is a LLaVA model has a projector that would fit, and be the wrong one.
    extra = tmp_path / "b" / "non_lora_trainables.bin"
    kept = extra.read_bytes()
    extra.unlink()
    with pytest.raises(ValueError, match=r"non_lora_trainables\.bin is missing"):
        load(tmp_path / "b", tmp_path / "x")
    extra.write_bytes(kept)
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        load(tmp_path / "b", tmp_path / "a")


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no checkpoint but a file; give the folder"):
        load(tmp_path / "file")
    for step in (9, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:  # one that was being written
            write_json(tmp_path / f"checkpoint-{step}" / "config.json", {})
    with pytest.raises(ValueError, match=r"run that has not ended; checkpoint-20 in it is one"):
        load(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "llava_llama", **TEXT})
    with pytest.raises(ValueError, match=r"holds no weights; looked for model\.safetensors"):
        load(tmp_path)
    write_json(tmp_path / "config.json", [])
    with pytest.raises(ValueError, match="holds a JSON list"):
        load(tmp_path)
    with pytest.raises(ValueError, match="neither a folder here nor to be had from the hub"):
        load_checkpoint("liuhaotian/llava-v1.5-7b", device="cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One checkpoint for all cases that change no file but config.json."""
    folder = tmp_path_factory.mktemp("whole") / "x"
    write_original(folder, "v1.5-7b")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"vocab_size": None}, "'vocab_size' expected int"),
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"rope_scaling": {"type": "foo"}}, "foo"),
        ({"architectures": 3}, "architectures is 3; accepted: list"),
        ({"torch_dtype": "foo"}, "foo"),
        ({"torch_dtype": 3}, "torch_dtype is 3; accepted: str"),
        ({"mm_vision_tower": ["a"]}, r"mm_vision_tower is \['a'\]; accepted: str"),
        ({"mm_vision_config": [1]}, r"mm_vision_config is \[1\]; accepted: dict"),
        ({"mm_projector_type": 3}, "mm_projector_type is 3; accepted: str"),
        ({"mm_projector_type": "mlp"}, "mm_projector_type 'mlp' is unknown; accepted: linear"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer is '-2'; accepted: int"),
        ({"mm_vision_select_layer": 9}, "is 9; the tower has the layers -4 to 3"),
        ({"mm_use_im_start_end": "False"}, "is 'False'; accepted: bool"),
        ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio .*accepted: str"),
        ({"tokenizer_model_max_length": "2048"}, "is '2048'; accepted: int or float"),
        ({"visual_token_reduction": 3}, "visual_token_reduction is 3; accepted: str or dict"),
        ({"visual_token_reduction": "fastv:k=9,r=0.5"}, "9"),
        ({"visual_token_reduction": {"cuts": 3}}, "cuts"),
    ],
)
def test_values_in_config_json_that_describe_no_model(change, message, whole, tmp_path, capsys):
    """Loading and converting refuse them in one line that names the file; nothing is written."""
    kept = (whole / "config.json").read_bytes()
    edit(whole, **change)
    try:
        with pytest.raises(ValueError, match=message):
            load(whole)
        with pytest.raises(SystemExit) as ended:
            convert_main([str(whole), str(tmp_path / "y"), "--to", "hf"])
    finally:
        (whole / "config.json").write_bytes(kept)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (ended.value.code, len(lines)) == (2, 1)
    assert str(whole) in lines[0] or "visual_token_reduction" in change
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("generation_config.json", "[]", "generation_config.json holds a JSON list"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'; accepted: int"),
        ("preprocessor_config.json", '{"size": "x"}', "preprocessor_config.json: .*size"),
        ("preprocessor_config.json", '{"image_mean": "x"}', "image_mean is 'x'; accepted: list"),
        ("processor_config.json", '{"image_processor": 3}', "image_processor is 3; accepted: dict"),
        ("train_summary.json", '{"flags": []}', r"train_summary.json: flags is \[\]"),
    ],
)
def test_files_beside_the_weights(file, text, message, whole, tmp_path):
    kept = (whole / file).read_bytes() if (whole / file).is_file() else None
    (whole / file).write_text(text)
    try:
        with pytest.raises(ValueError, match=message):
            convert(whole, tmp_path / "y", "hf")
        if file != "train_summary.json":
            with pytest.raises(ValueError, match=message):
                load(whole)
    finally:
        (whole / file).unlink() if kept is None else (whole / file).write_bytes(kept)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    "name", [3, "", "..", "config.json", "nope.safetensors", "a/b.safetensors"]
)
def test_an_index_with_names_that_cannot_be_meant(name, tensors):
    write_json(tensors / "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(tensors)


def test_names_that_are_no_text(bins):
    file = bins / "pytorch_model-00001-of-00002.bin"
    torch.save({**torch.load(file), 3: torch.ones(1)}, file)
    with pytest.raises(ValueError, match="no named tensors: 3"):
        load(bins)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"text_config": 3}, "text_config is 3; accepted: dict"),
        ({"llava": 3}, "llava is 3; accepted: dict"),
        ({"image_token_index": "x"}, r"config.json: .*'image_token_index' expected int"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"model_type": "video_llava"}, "'video_llava' is nested"),
        ({"text_config": {"model_type": "gemma"}}, "decoder is a 'gemma'"),
        ({"vision_config": "gone"}, "has text_config alone"),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral'; accepted: clip"),
    ],
)
def test_nested_configs_that_cannot_be_read(change, message, tmp_path):
    write_hf(tmp_path / "x", hf_model("llava"), "hub")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["image_token_index"] == IMAGE_ID
    edit(tmp_path / "x", **change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "tpu"}, "accepted: cpu, cuda, mps"),
        ({"dtype": "int8"}, "give checkpoint, float16"),
        ({"conv_mode": "vicuna"}, "unknown conversation template"),
        ({"reduction": "pyramiddrop:layers=[9],ratios=[0.5]"}, "9"),
        ({"load_8bit": True, "load_4bit": True}, "exclude each other"),
        ({"device_map": "spread"}, "device_map 'spread' is unknown; accepted: auto, balanced"),
        ({"attn_implementation": "flash_attention_2"}, "'flash_attention_2' cannot be used: "),
    ],
)
def test_options_that_do_not_fit(options, message, bins):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(bins, **{"device": "cpu", **options})


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_hub_id_fetches_one_kind_of_weights(suffix, tmp_path, monkeypatch):
    name = {"safetensors": "v1.6-vicuna-7b", "bin": "v1.5-7b"}[suffix]
    write_original(tmp_path / "hub", name)
    asked = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        """As the hub does: what the patterns name is copied."""
        asked.append((repository, allow_patterns[-1]))
        (tmp_path / "cache").mkdir(exist_ok=True)
        for file in (tmp_path / "hub").iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, tmp_path / "cache" / file.name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load("liuhaotian/llava").unused == ()
    wanted = ["*.safetensors"] if suffix == "safetensors" else ["*.safetensors", "*.bin"]
    assert asked == [("liuhaotian/llava", pattern) for pattern in wanted]
