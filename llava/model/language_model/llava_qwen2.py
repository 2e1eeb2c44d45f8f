"""LLaVA over transformers' Qwen2 classes: a staged layer, a staged model, the shell."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.staged_decoder import StagedLayer, StagedModelMixin


class LlavaQwen2Config(Qwen2Config):
    model_type = "llava_qwen"


class StagedQwen2DecoderLayer(StagedLayer, Qwen2DecoderLayer):
    pass


class LlavaQwen2Model(LlavaMetaModel, StagedModelMixin, Qwen2Model):
    config_class = LlavaQwen2Config
    staged_layer_class = StagedQwen2DecoderLayer
    _no_split_modules = ["StagedQwen2DecoderLayer"]


class LlavaQwen2ForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    config_class = LlavaQwen2Config
    decoder_class = LlavaQwen2Model
    _no_split_modules = ["StagedQwen2DecoderLayer"]


AutoConfig.register(LlavaQwen2Config.model_type, LlavaQwen2Config)
AutoModelForCausalLM.register(LlavaQwen2Config, LlavaQwen2ForCausalLM)
