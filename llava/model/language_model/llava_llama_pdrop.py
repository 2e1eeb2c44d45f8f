"""PyramidDrop's name for LLaVA over Llama: every class here takes any plan."""

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

LlavaLlamaForCausalLM_PDrop = LlavaLlamaForCausalLM

__all__ = ["LlavaLlamaForCausalLM_PDrop"]
