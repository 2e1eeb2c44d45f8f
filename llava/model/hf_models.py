"""transformers' `LlavaForConditionalGeneration` with visual token reduction: the drop-in.

    from llava import LlavaForConditionalGeneration   # was: from transformers import ...

    model = LlavaForConditionalGeneration.from_pretrained(
        "llava-hf/llava-1.5-7b-hf", dtype=torch.float16, device_map="auto",
        reduction="pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]",
    )
    out = model.generate(**processor(images=picture, text=prompt, return_tensors="pt").to("cuda"))

Special here: nothing but conventions. The model is this package's own LLaVA, loaded by
`load_checkpoint`; inputs are what `AutoProcessor` returns (`hf_inputs`), `generate` returns prompt
and new tokens, dtype and device default as in transformers 5 (the checkpoint's, the CPU). 1.5 and
NeXT checkpoints, llava-hf's and LLaVA's own, load through either name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.model.builder import STRATEGIES, load_checkpoint
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen2 import LlavaQwen2ForCausalLM
from llava.model.language_model.llava_qwen3 import LlavaQwen3ForCausalLM
from llava.reduction.plan import CONFIG_KEY, FASTV_KEY, fastv_config_text, resolve_plan
from llava.utils import get_logger

log = get_logger(__name__)


class LlavaForConditionalGeneration:
    """Made by `from_pretrained`, which returns the subclass of the checkpoint's decoder."""

    prompt_in_output = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        reduction: Any = None,
        fastv_config: Mapping[str, Any] | None = None,
        dtype: Any = "auto",
        device_map: Any = None,
        quantization_config: Any = None,
        config: Any = None,
        **options: Any,
    ) -> Any:
        """The model in eval mode, of a folder or hub id.

        reduction: a plan, its text or dict; None takes the checkpoint's. fastv_config: FastV's dict
        instead (`llava.reduction.plan.fastv_config_text`); it is read at every call, so
        `model.config.fastv_config["use_fastv"] = False` switches it off. config: read for its
        fastv_config alone. quantization_config: its load_in_4bit or load_in_8bit counts, the rest
        is LLaVA's. options: attn_implementation, max_memory, offload_folder, torch_dtype (dtype's
        old name) and the other keywords of `load_checkpoint`; low_cpu_mem_usage changes nothing.
        ValueError for reduction beside a fastv_config and for what `load_checkpoint` refuses;
        TypeError for other keywords.
        """
        if pretrained_model_name_or_path is None:  # `load_checkpoint` hands over all weights
            options |= {"dtype": dtype, "device_map": device_map, "config": config}
            if quantization_config is not None:
                options["quantization_config"] = quantization_config
            return super().from_pretrained(None, *args, **options)  # type: ignore[misc]
        if args:
            raise TypeError(f"from_pretrained takes one positional argument, not {1 + len(args)}")
        if fastv_config is None:
            fastv_config = getattr(config, FASTV_KEY, None)
        wants_fastv = fastv_config is not None and fastv_config_text(fastv_config) is not None
        if wants_fastv and reduction is not None:
            raise ValueError("reduction and fastv_config exclude each other; give one")
        options.pop("low_cpu_mem_usage", None)
        dtype = options.pop("torch_dtype", dtype)
        model = load_checkpoint(
            pretrained_model_name_or_path,
            reduction=reduction,
            dtype="checkpoint" if dtype in (None, "auto") else dtype,
            load_4bit=bool(getattr(quantization_config, "load_in_4bit", False)),
            load_8bit=bool(getattr(quantization_config, "load_in_8bit", False)),
            adapt=drop_in,
            **_place(device_map),
            **options,
        ).model
        if fastv_config is not None:
            setattr(model.config, FASTV_KEY, dict(fastv_config))
        if wants_fastv:
            setattr(model.config, CONFIG_KEY, None)
            plan, source = resolve_plan(None, model.config)
            plan.validate(model.config.num_hidden_layers)
            log.info("plan: %s (from %s)", plan, source)
        return model


# 1.5 and NeXT are one class here; which of them a checkpoint is stands in its config.
LlavaNextForConditionalGeneration = LlavaForConditionalGeneration


class LlavaLlamaForConditionalGeneration(LlavaForConditionalGeneration, LlavaLlamaForCausalLM):
    pass


class LlavaMistralForConditionalGeneration(LlavaForConditionalGeneration, LlavaMistralForCausalLM):
    pass


class LlavaQwen2ForConditionalGeneration(LlavaForConditionalGeneration, LlavaQwen2ForCausalLM):
    pass


class LlavaQwen3ForConditionalGeneration(LlavaForConditionalGeneration, LlavaQwen3ForCausalLM):
    pass


def drop_in(family: type) -> type:
    """The drop-in of a model class."""
    children = LlavaForConditionalGeneration.__subclasses__()
    return next(child for child in children if family in child.__bases__)


def _place(device_map: Any) -> dict[str, Any]:
    """transformers' device_map as `load_checkpoint` has it."""
    if device_map is None:
        return {"device": "cpu", "device_map": None}
    if isinstance(device_map, dict) or device_map in STRATEGIES:
        return {"device_map": device_map}
    return {"device": device_map, "device_map": None}
