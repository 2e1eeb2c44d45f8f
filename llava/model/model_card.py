"""The README.md of a checkpoint: plan, base, how it was trained, versions, scores.

Special here: everything is read off the folder's own files (config.json, adapter_config.json,
train_summary.json) and the runs that are named; nothing is typed in. A README.md that somebody else
wrote is left alone. Training and `llava convert` write one; after an evaluation it is written anew:

    llava card checkpoints/llava-v1.5-7b --scores results/pope/RUN results/gqa/RUN
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.conversation import resolve_conv_mode
from llava.model.assemble import flat_config
from llava.model.checkpoint_layout import BASE_KEY, inspect_checkpoint, read_json
from llava.reduction.plan import CONFIG_KEY, ReductionPlan
from llava.utils import atomic_write, environment, get_logger, user_errors

log = get_logger(__name__)

CARD_FILE = "README.md"
SUMMARY_FILE = "train_summary.json"
MARK = "<!-- written by `llava card`; a line taken away here keeps the file as it is -->"
_LONGEST = 160  # characters of a plan in a table: head masks are long
_VERSIONS = (
    "python",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "gpu",
    "commit",
)


def write_card(
    folder: str | Path,
    *,
    name: str | None = None,
    made_from: str | None = None,
    scores: Sequence[str | Path] = (),
) -> bool:
    """Write README.md into a checkpoint's folder; False if there is one that this did not write.

    name: of the checkpoint (default: the folder's). made_from: what it was converted from. scores:
    folders of runs, or their scores.json. ValueError, by name, for a folder that is no checkpoint
    and for scores that cannot be read.
    """
    folder = Path(folder)
    text = card(folder, name or folder.resolve().name, made_from, scores)
    file = folder / CARD_FILE
    if file.is_file() and MARK not in file.read_text(encoding="utf-8"):
        log.warning("%s was not written by llava and stays as it is", file)
        return False
    with atomic_write(file) as out:
        out.write(text)
    return True


def card(
    folder: Path, name: str, made_from: str | None = None, scores: Sequence[str | Path] = ()
) -> str:
    """The text of the card. Arguments and errors as `write_card`."""
    files = inspect_checkpoint(folder)
    config = flat_config(files)
    summary_file = folder / SUMMARY_FILE
    summary = read_json(summary_file) if summary_file.is_file() else {}
    base = _base(folder, summary)
    head = [
        "---",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- llava",
        "- visual-token-reduction",
    ]
    if base and not Path(base).is_absolute() and base.count("/") == 1:
        head.append(f"base_model: {base}")
    mode, origin = resolve_conv_mode(None, SimpleNamespace(**config))
    facts = {
        "files": files.describe(),
        "made from": made_from,
        "base": base,
        "visual tokens": _plan_text(config),
        "language model": f"{config['model_type']}, {config.get('num_hidden_layers')} layers, "
        f"width {config.get('hidden_size')}",
        "vision tower": config.get("mm_vision_tower"),
        "pictures": config.get("image_aspect_ratio") or "square",
        "template": f"{mode} (from {origin})",
        "context": config.get("tokenizer_model_max_length")
        or config.get("max_position_embeddings"),
    }
    parts = [
        "\n".join([*head, "---", MARK]),
        f"# {name}",
        _table(("", ""), [(key, str(value)) for key, value in facts.items() if value]),
        "The plan is in config.json and is used unless another one is asked for:",
        f"```\nllava chat --model-path {shlex.quote(name)} --image-file view.jpg\n"
        f"llava eval pope --model-path {shlex.quote(name)} --reduction none\n```",
        *_training(summary),
        *_scores(scores),
        *_versions(summary),
    ]
    return "\n\n".join(parts) + "\n"


def _base(folder: Path, summary: Mapping[str, Any]) -> str | None:
    """The model that the weights were trained from or lie over."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return read_json(adapter).get(BASE_KEY)
    return summary.get("flags", {}).get("model_name_or_path")


def _plan_text(config: Mapping[str, Any]) -> str:
    if CONFIG_KEY not in config:
        return "config.json names no plan"
    if not config[CONFIG_KEY]:
        return "all of them in all layers (plan `none`)"
    text = str(ReductionPlan.from_dict(config[CONFIG_KEY]))
    return (
        f"`{text}`" if len(text) <= _LONGEST else f"`{text[:_LONGEST]} ...`, whole in config.json"
    )


def _training(summary: Mapping[str, Any]) -> list[str]:
    if not summary:
        return []
    hours = next((key for key in ("gpu_hours", "process_hours") if key in summary), None)
    parts = summary.get("trained_parameters", {})
    loss = summary.get("train_loss")
    facts = {
        "trained": ", ".join(f"{part} {count:,}" for part, count in parts.items() if count),
        "samples": summary.get("samples"),
        "data hash": f"`{summary['data_hash']}`" if summary.get("data_hash") else None,
        "steps": summary.get("steps"),
        "mean training loss": None if loss is None else f"{loss:.4f}",
        "processes": summary.get("processes"),
        (hours or "hours").replace("_", " "): None if hours is None else summary[hours],
        "seed": summary.get("seed"),
    }
    flags = summary.get("flags", {})
    rows = [(key, str(value)) for key, value in facts.items() if value not in (None, "")]
    out = ["## Training", _table(("", ""), rows)]
    if flags:
        lines = "\n".join(f"--{key} {_words(value)}" for key, value in flags.items())
        out += ["Flags that were not at their default:", f"```\n{lines}\n```"]
    return out


def _words(value: Any) -> str:
    """A flag's value as a shell gives it back: several words for a list, JSON for an object."""
    if isinstance(value, list):
        return " ".join(shlex.quote(str(each)) for each in value)
    return shlex.quote(json.dumps(value) if isinstance(value, dict) else str(value))


def _scores(files: Sequence[str | Path]) -> list[str]:
    if not files:
        return []
    rows = []
    for file in files:
        path = Path(file) / "scores.json" if Path(file).is_dir() else Path(file)
        found = read_json(path)
        try:
            interval = f"{found['low']:.2f} to {found['high']:.2f}"
            value, metric, count = f"{found['value']:.2f}", found["metric"], str(found["n"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} holds no scores as `llava score` writes them") from None
        beside = path.with_name("run.json")
        run = read_json(beside) if beside.is_file() else {}
        name = run.get("benchmark") or (path.stem if path.stem != "scores" else path.parent.name)
        plan = run.get("plan", "?")
        rows.append((name, f"`{plan}`", metric, value, interval, count))
    head = ("set", "plan", "metric", "value", "95 % interval", "questions")
    return ["## Scores", _table(head, rows)]


def _versions(summary: Mapping[str, Any]) -> list[str]:
    """Of the training, or of this machine for a checkpoint that says nothing about its own."""
    found = summary.get("environment") or environment()
    rows = [(key, str(found[key])) for key in _VERSIONS if found.get(key)]
    title = "Trained with" if summary.get("environment") else "Written with"
    return ["## Versions", f"{title}:", _table(("", ""), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """`llava card CHECKPOINT [--scores RUN ...]`."""
    parser = argparse.ArgumentParser(prog="llava card", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder whose README.md is written")
    parser.add_argument(
        "--scores", nargs="+", default=[], metavar="RUN", help="folders of runs, or scores.json"
    )
    args = parser.parse_args(argv)
    if not write_card(args.checkpoint, scores=args.scores):
        raise ValueError(f"{args.checkpoint} has a README.md that llava did not write")
    log.info("%s written", Path(args.checkpoint) / CARD_FILE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
