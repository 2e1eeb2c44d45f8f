"""The flags that say which model answers and how, shared by `llava answer` and `llava eval`.

Special here: a process without --device takes its own GPU (its rank on the machine), and the
weights are identified by the names and sizes of their files: `llava eval pope --model-path
checkpoints/llava-v1.5-7b --load-4bit --batch-size 16`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from llava.decoding import Decoding
from llava.eval.answer import WORKERS
from llava.eval.auto_batch import batch_size
from llava.eval.run_folder import config_hash
from llava.loading_flags import add_loading_flags, loading_options
from llava.mm_utils import get_model_name_from_path
from llava.reduction.flags import add_default_reduction, add_reduction_flags, plan_from_args
from llava.utils import Ranks


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model answers and how (shared with `llava eval`)."""
    add_loading_flags(parser, device_map=None)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top_p", type=float, help="nucleus sampling, where temperature is not 0")
    parser.add_argument("--num_beams", type=int, default=1, help="beam search (default 1: none)")
    parser.add_argument("--seed", type=int, default=0, help="for sampling")
    parser.add_argument(
        "--batch-size", type=batch_size, default=8, metavar="N",
        help="questions answered together, or auto: as many as fit into the device's memory "
        "(default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--blind", action="store_true", help="show a grey picture instead of each")
    parser.add_argument(
        "--no-share", action="store_true", help="no common prefill for questions about one picture"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=WORKERS,
        help="threads that open pictures (default %(default)s)",
    )
    add_reduction_flags(parser)
    add_default_reduction(parser)
    parser.add_argument("--pdrop_infer", nargs="?", help="no effect; accepted from old scripts")


def default_device(ranks: Ranks) -> str:
    """This process's own GPU, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{ranks.local % torch.cuda.device_count()}"


def load_from_flags(args: argparse.Namespace, ranks: Ranks) -> tuple[Any, Any, Any, str]:
    """(tokenizer, model, image processor, model name) of the model flags, on this process's device
    unless a device map spreads the model over several."""
    from llava.model.builder import load_pretrained_model

    options = loading_options(args)
    if args.device is None and args.device_map in (None, "none"):
        options["device"] = default_device(ranks)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        conv_mode=args.conv_mode,
        reduction=plan_from_args(args),
        **options,
    )
    name = get_model_name_from_path(str(args.model_path))
    return tokenizer, model, image_processor, name


def answerer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Answerer` that the model flags set."""
    return {
        "conv_mode": args.conv_mode,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "blind": args.blind,
        "share": not args.no_share,
        "workers": args.workers,
    }


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What identifies the weights: where they are, their files, how they are loaded."""
    path = Path(args.model_path).expanduser()
    return {
        "model_path": str(path.resolve()) if path.is_dir() else str(args.model_path),
        "model_base": args.model_base,
        "model_files": folder_fingerprint(path) if path.is_dir() else None,
        "load": "4bit" if args.load_4bit else "8bit" if args.load_8bit else "full",
        "vision_tower": args.vision_tower,
        "image_aspect_ratio": args.image_aspect_ratio,
    }


def folder_fingerprint(path: Path) -> str:
    """A hash of a checkpoint's config and of its files' names and sizes, the card's aside."""
    from llava.model.model_card import CARD_FILE

    found = [file for file in path.iterdir() if file.is_file() and file.name != CARD_FILE]
    files = sorted((file.name, file.stat().st_size) for file in found)
    config = path / "config.json"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return config_hash({"files": files, "config": text})


def decoding_from_flags(args: argparse.Namespace, max_new_tokens: int) -> Decoding:
    """The decoding that the flags ask for."""
    return Decoding(max_new_tokens, args.temperature, args.top_p, args.num_beams)
