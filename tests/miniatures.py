"""Miniatures of the public checkpoints: real file names, shard index, config keys, weight names.

Each writer returns the model whose weights it wrote, so that a loader can be held against it. The
names are written out here a second time, by hand and not through `llava.model.key_maps`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from places import DATA
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import FAMILIES, load_checkpoint

SIDE, PATCH = 56, 14
TOKENS = (SIDE // PATCH) ** 2
WIDTH, VOCAB, IMAGE_ID = 32, 512, 480
TOKENIZER = DATA / "pyramiddrop" / "preprocess" / "tokenizer_nonlegacy"
PINS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 16,
}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# config.json of the published checkpoints beside the decoder's own keys (sizes and paths aside).
MM_KEYS: dict[str, Any] = {
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "pretraining_tp": 1,
    "tokenizer_model_max_length": 512,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
}
NEXT_KEYS: dict[str, Any] = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": PINS,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-06,
    "tokenizer_model_max_length": 512,
    "unfreeze_mm_vision_tower": True,
    "use_image_newline_parameter": True,
}
# What is special about each original checkpoint: config, how many shards of which kind, and whether
# the tower's weights are in it.
ORIGINALS: dict[str, dict[str, Any]] = {
    "v1.5-7b": {"shards": 2, "suffix": "bin"},
    "v1.5-13b": {
        "shards": 3, "suffix": "bin",
        "config": {"num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 2},
    },
    "v1.6-vicuna-7b": {"shards": 3, "suffix": "safetensors", "tower": True, "config": NEXT_KEYS},
    "v1.6-mistral-7b": {
        "shards": 4, "suffix": "safetensors", "tower": True,
        "config": {
            **NEXT_KEYS, "architectures": ["LlavaMistralForCausalLM"],
            "model_type": "llava_mistral", "num_key_value_heads": 2, "sliding_window": None,
            "rope_theta": 1000000.0,
        },
    },
    "v1.6-34b": {
        "shards": 5, "suffix": "safetensors", "tower": True,
        "config": {
            **NEXT_KEYS, "vocab_size": 64000, "num_key_value_heads": 2, "hidden_size": 16,
            "rope_theta": 5000000.0, "eos_token_id": 7, "num_attention_heads": 4,
        },
    },
    "pyramiddrop": {
        "shards": 2, "suffix": "safetensors", "tower": True,
        "config": {
            "architectures": ["LlavaLlamaForCausalLM_PDrop"], "model_type": "llava_llama",
            "mm_patch_merge_type": "flat", "mm_projector_lr": None, "torch_dtype": "bfloat16",
        },
    },
    "yopo": {
        "shards": 2, "suffix": "safetensors", "tower": True,
        "config": {
            "model_type": "llava_llama", "mm_patch_merge_type": "flat", "mm_projector_lr": None,
            "sprompt_len": 35, "attncut_w": 5, "headcut_num": 24, "mlpcut_ratio": 2,
            "layercut_num": 2,
        },
    },
}  # fmt: skip


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_tower(folder: Path, **changes: int) -> CLIPVisionModel:
    """A CLIP tower in its own folder, as the hub has it: the names with `vision_model.`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    vision = {**VISION, **changes}
    model = CLIPVisionModel(CLIPVisionConfig(**vision)).eval().half().float()
    weights = {f"vision_model.{key}": value for key, value in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"model_type": "clip_vision_model", **vision})
    write_processor(folder)
    return model


def write_processor(folder: Path) -> None:
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": SIDE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(CLIPImageProcessor().image_mean),
            "image_std": list(CLIPImageProcessor().image_std),
            "resample": 3,
            "size": SIDE,
        },
    )


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], suffix: str = "safetensors", shards: int = 1
) -> None:
    """Weights under the hub's file names, with an index where there are several files."""
    single = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[suffix]
    stem = single.split(".")[0]
    names = sorted(weights)
    files = [single]
    if shards > 1:
        files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
        place = {name: files[i % shards] for i, name in enumerate(names)}
        size = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": place}
        write_json(folder / f"{single}.index.json", index)
    for i, file in enumerate(files):
        part = {name: weights[name].clone().contiguous() for name in names[i :: len(files)]}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})


def old_names(model: Any, tower: bool) -> dict[str, Tensor]:
    """The weights as LLaVA's own code saves them: `vision_model.` in the tower, and the rotary
    buffers of old transformers."""
    out = {}
    for key, value in model.state_dict().items():
        if key.startswith("model.vision_tower."):
            if not tower:
                continue
            key = key.replace(".vision_tower.", ".vision_tower.vision_tower.vision_model.", 1)
            key = key.replace(".vision_model.vision_tower.", ".vision_model.", 1)
        out[key] = value.half()
    for layer in range(model.config.num_hidden_layers):
        out[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return out


def write_original(folder: Path, name: str, **changes: Any) -> Any:
    """The miniature `name` of ORIGINALS in `folder`, its tower beside it; the model in float16
    values and float32 arithmetic."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = ORIGINALS[name]
    tower = folder.parent / "clip-vit-large-patch14-336"
    clip = write_tower(tower)
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": str(tower),
        **TEXT,
        **MM_KEYS,
        **facts.get("config", {}),
        **changes,
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6},
    )
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    model = reference_model(config, clip)
    write_weights(
        folder, old_names(model, facts.get("tower", False)), facts["suffix"], facts["shards"]
    )
    return model


def reference_model(config: Mapping[str, Any], clip: CLIPVisionModel | None) -> Any:
    """A model with random weights whose values are float16's."""
    family = "llava_mistral" if config["model_type"] == "llava_mistral" else "llava_llama"
    config_class, model_class = FAMILIES[family]
    skipped = ("model_type", "architectures", "torch_dtype")
    raw = {key: value for key, value in config.items() if key not in skipped}
    vision = {"model_type": "clip_vision_model", **VISION}
    torch.manual_seed(11)
    model = model_class(config_class(**{**raw, "mm_vision_config": vision})).eval()
    if getattr(model.model, "image_newline", None) is not None:
        torch.nn.init.normal_(model.model.image_newline)
    if clip is not None:
        model.get_vision_tower().vision_tower.load_state_dict(clip.state_dict())
    for parameter in model.parameters():  # not the rotary buffer
        parameter.data = parameter.data.half().float()
    return model


# ------------------------------------------------------------------------------------ llava-hf
HF_SPELLINGS = ("hub", "saved by 5.x", "in memory")


def spelled(name: str, spelling: str) -> str:
    """A name of transformers 5's modules in one of the spellings that files have."""
    if spelling == "in memory":
        return name
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower." + ("vision_model." if spelling == "hub" else "")),
        ("model.image_newline", "image_newline"),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def hf_model(kind: str, decoder: str = "llama") -> Any:
    """A random model of transformers' own class; kind: `llava` or `llava_next`."""
    text = LlamaConfig(**TEXT)
    if decoder == "mistral":
        text = MistralConfig(**TEXT, sliding_window=None)
    shared = {
        "vision_config": CLIPVisionConfig(**VISION),
        "text_config": text,
        "image_token_index": IMAGE_ID,
        "image_seq_length": TOKENS,
    }
    torch.manual_seed(13)
    if kind == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared, image_grid_pinpoints=PINS))
    torch.nn.init.normal_(model.model.image_newline)
    return model.eval()


def write_hf(folder: Path, model: Any, spelling: str, suffix: str = "safetensors") -> None:
    """A llava-hf folder of the model in one spelling."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = {spelled(key, spelling): value for key, value in model.state_dict().items()}
    write_weights(folder, weights, suffix, shards=2)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    write_processor(folder)


# ------------------------------------------------------------------------- adapters over a base
def write_base(folder: Path) -> Any:
    """A language model without pictures, as Vicuna's folder: the base of the adapters below."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(17)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    write_json(
        folder / "config.json",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TEXT},
    )
    write_weights(folder, model.state_dict(), "bin", shards=2)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return model


def adapter_config(folder: Path) -> dict[str, Any]:
    """config.json of a projector or LoRA run, with its tower written beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tower = folder.parent / "clip-vit-large-patch14-336"
    write_tower(tower)
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": str(tower),
        **TEXT,
        **MM_KEYS,
    }


def write_projector_only(folder: Path, base: Any, prefix: str = "") -> Any:
    """config.json and mm_projector.bin of a first stage over `base`; returns the whole model."""
    config = adapter_config(folder)
    write_json(folder / "config.json", {**config, "tune_mm_mlp_adapter": True})
    clip = CLIPVisionModel.from_pretrained(config["mm_vision_tower"])
    model = reference_model(config, clip)
    model.load_state_dict(base.state_dict(), strict=False)
    projector = model.model.mm_projector.state_dict()
    torch.save(
        {f"{prefix}model.mm_projector.{key}": value for key, value in projector.items()},
        folder / "mm_projector.bin",
    )
    return model


def write_lora(folder: Path, base: Any, old_peft: bool) -> Any:
    """A LoRA run over `base` as LLaVA saves it, merged by peft in the returned model.

    old_peft: the spelling with `.default` in an adapter_model.bin, else today's.
    """
    from peft import LoraConfig, get_peft_model

    config = adapter_config(folder)
    write_json(folder / "config.json", config)
    clip = CLIPVisionModel.from_pretrained(config["mm_vision_tower"])
    model = reference_model(config, clip)
    projector = model.model.mm_projector.state_dict()
    torch.save(
        {f"base_model.model.model.mm_projector.{k}": v for k, v in projector.items()},
        folder / "non_lora_trainables.bin",
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    tuned = get_peft_model(copy.deepcopy(base), settings)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(folder)
    if old_peft:
        new = folder / "adapter_model.safetensors"
        old = {key.replace(".weight", ".default.weight"): v for key, v in load_file(new).items()}
        torch.save(old, folder / "adapter_model.bin")
        new.unlink()
    model.load_state_dict(tuned.merge_and_unload().state_dict(), strict=False)
    return model


# ----------------------------------------------------------------------------- shared by the tests
def load(folder: Path, *arguments: Any, **options: Any) -> Any:
    """`load_checkpoint` on the CPU."""
    return load_checkpoint(folder, *arguments, **{"device": "cpu", **options})


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; the value "gone" removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    write_json(file, {key: value for key, value in config.items() if value != "gone"})


def inputs(anyres: bool) -> dict[str, Any]:
    """A prompt with one picture of four tiles and its thumbnail, or of one tile."""
    generator = torch.Generator().manual_seed(2)
    shape = (5, 3, SIDE, SIDE) if anyres else (3, SIDE, SIDE)
    pixels = torch.randn(shape, generator=generator)
    ids = torch.tensor([[1, 5, 6, IMAGE_TOKEN_INDEX, 7, 8, 9]])
    return {"input_ids": ids, "images": [pixels], "image_sizes": [(110, 100)]}


def equal(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, atol=tolerance, rtol=0)
