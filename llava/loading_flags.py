"""The flags that say which checkpoint is loaded and how, the same on every command line.

Special here: nothing of the model is imported, so that `--help` stays fast; what the flags mean is
decided in `llava.model.builder.load_checkpoint`, whose keywords they are.
"""

from __future__ import annotations

import argparse
from typing import Any

_OPTIONS = (
    "load_8bit",
    "load_4bit",
    "device",
    "device_map",
    "dtype",
    "attn_implementation",
    "vision_tower",
    "image_aspect_ratio",
)


def add_loading_flags(parser: argparse.ArgumentParser, device_map: str | None = "auto") -> None:
    """Add ``--model-path`` and the flags of loading to ``parser``. device_map: the default, None
    for one device for everything (many processes, each with a model of its own)."""
    parser.add_argument("--model-path", required=True, help="checkpoint folder, or hub id")
    parser.add_argument("--model-base", help="base model of a LoRA or projector-only checkpoint")
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    group = parser.add_argument_group("loading")
    group.add_argument("--device", help="cpu, cuda, cuda:N, mps (default: cuda where there is one)")
    group.add_argument(
        "--device-map",
        default=device_map,
        help="auto, balanced, sequential: one model over all visible GPUs; none: on one device "
        f"(default: {device_map or 'none'})",
    )
    group.add_argument(
        "--dtype",
        help="float16, bfloat16, float32, or checkpoint: that of the files (default: float16 on "
        "cuda and mps, float32 on cpu)",
    )
    group.add_argument("--load-8bit", action="store_true", help="8-bit weights (bitsandbytes)")
    group.add_argument("--load-4bit", action="store_true", help="4-bit weights (bitsandbytes)")
    group.add_argument(
        "--attn-implementation", help="eager, sdpa, flash_attention_2 (default: sdpa)"
    )
    group.add_argument("--vision-tower", help="folder or hub id, in place of the checkpoint's")
    group.add_argument(
        "--image-aspect-ratio", help="pad, square or anyres, in place of the checkpoint's"
    )


def loading_options(args: Any) -> dict[str, Any]:
    """Keywords for `load_pretrained_model` and `load_checkpoint` (without path, base and template).

    args: parsed flags, or any object that has some of them as attributes.
    """
    options = {name: getattr(args, name, None) for name in _OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    if hasattr(args, "device_map") and args.device_map in (None, "none"):
        options["device_map"] = None  # where nothing is said, load_checkpoint's default holds
    return {"dtype": None, **options}
