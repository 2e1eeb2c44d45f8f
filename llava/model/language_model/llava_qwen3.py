"""LLaVA over transformers' Qwen3 classes: a staged layer, a staged model, the shell."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.staged_decoder import StagedLayer, StagedModelMixin


class LlavaQwen3Config(Qwen3Config):
    model_type = "llava_qwen3"


class StagedQwen3DecoderLayer(StagedLayer, Qwen3DecoderLayer):
    pass


class LlavaQwen3Model(LlavaMetaModel, StagedModelMixin, Qwen3Model):
    config_class = LlavaQwen3Config
    staged_layer_class = StagedQwen3DecoderLayer
    _no_split_modules = ["StagedQwen3DecoderLayer"]


class LlavaQwen3ForCausalLM(LlavaMetaForCausalLM, Qwen3ForCausalLM):
    config_class = LlavaQwen3Config
    decoder_class = LlavaQwen3Model
    _no_split_modules = ["StagedQwen3DecoderLayer"]


AutoConfig.register(LlavaQwen3Config.model_type, LlavaQwen3Config)
AutoModelForCausalLM.register(LlavaQwen3Config, LlavaQwen3ForCausalLM)
