"""LLaVA over transformers' Llama classes: a staged layer, a staged model, the shell."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.staged_decoder import StagedLayer, StagedModelMixin


class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"


class StagedLlamaDecoderLayer(StagedLayer, LlamaDecoderLayer):
    pass


class LlavaLlamaModel(LlavaMetaModel, StagedModelMixin, LlamaModel):
    config_class = LlavaConfig
    staged_layer_class = StagedLlamaDecoderLayer
    _no_split_modules = ["StagedLlamaDecoderLayer"]


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    config_class = LlavaConfig
    decoder_class = LlavaLlamaModel
    _no_split_modules = ["StagedLlamaDecoderLayer"]


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
