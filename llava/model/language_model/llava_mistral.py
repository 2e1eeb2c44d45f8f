"""LLaVA over transformers' Mistral classes: a staged layer, a staged model, the shell."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.staged_decoder import StagedLayer, StagedModelMixin


class LlavaMistralConfig(MistralConfig):
    model_type = "llava_mistral"


class StagedMistralDecoderLayer(StagedLayer, MistralDecoderLayer):
    pass


class LlavaMistralModel(LlavaMetaModel, StagedModelMixin, MistralModel):
    config_class = LlavaMistralConfig
    staged_layer_class = StagedMistralDecoderLayer
    _no_split_modules = ["StagedMistralDecoderLayer"]


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel
    _no_split_modules = ["StagedMistralDecoderLayer"]


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
