"""The README.md of a checkpoint: plan, base, how it was trained, versions, scores.

Special here: everything is read off the folder's own files (config.json, adapter_config.json,
train_summary.json) and the runs that are named; nothing is typed in. A README.md that somebody else
wrote is left alone. Training and `llava convert` write one; after an evaluation it is written anew:

    llava card checkpoints/llava-v1.5-7b --scores results/pope/RUN results/gqa/RUN
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.conversation import resolve_conv_mode
from llava.model.assemble import adapter_settings, check_types, flat_config
from llava.model.checkpoint_layout import BASE_KEY, inspect_checkpoint, read_json
from llava.reduction.plan import resolve_plan
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
    known: Sequence[str | Path] = (),
) -> bool:
    """Write README.md into a checkpoint's folder; False if there is one that this did not write.

    name: of the checkpoint (default: the folder's). made_from: what it was converted from. scores:
    folders of runs, or their scores.json. known: other places of the same weights, which the runs
    may name. ValueError, by name, for a folder that is no checkpoint and for scores that cannot be
    read.
    """
    folder = Path(folder)
    rows = score_rows(scores, (folder, *known))
    text = card(folder, name or folder.resolve().name, made_from, rows)
    file = folder / CARD_FILE
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        log.warning("%s was not written by llava and stays as it is", file)
        return False
    with atomic_write(file) as out:
        out.write(text)
    return True


def card(
    folder: Path, name: str, made_from: str | None = None, scores: Sequence[Sequence[str]] = ()
) -> str:
    """The text of the card. scores: `score_rows`; the rest and errors as for `write_card`."""
    files = inspect_checkpoint(folder)
    config = flat_config(files)
    summary = read_summary(folder)
    plan, planned = _plan_text(config)
    base = _base(folder, summary)
    head = [
        "---",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- llava",
        "- visual-token-reduction",
    ]
    if base and _is_hub_id(base):
        head.append(f"base_model: {base}")
    mode, origin = resolve_conv_mode(None, SimpleNamespace(**config))
    facts = {
        "files": files.describe(),
        "made from": made_from,
        "base": base,
        "visual tokens": plan,
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
        "The plan is in config.json and is used unless another one is asked for:"
        if planned
        else "Nothing is dropped unless a plan is asked for:",
        f"```\nllava chat --model-path {shlex.quote(name)} --image-file view.jpg\n"
        f"llava eval pope --model-path {shlex.quote(name)}{' --reduction none' * planned}\n```",
        *_training(summary),
        *_scores(scores),
        *_versions(summary),
    ]
    return "\n\n".join(parts) + "\n"


def _base(folder: Path, summary: Mapping[str, Any]) -> str | None:
    """The model that the weights were trained from or lie over."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return adapter_settings(folder).get(BASE_KEY)
    base = (summary.get("flags") or {}).get("model_name_or_path")
    return None if base is None else str(base)


def _is_hub_id(base: str) -> bool:
    """Whether a base is a repository of the hub, which a card's head may name, and no folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) is not None and not Path(base).exists()


def _plan_text(config: Mapping[str, Any]) -> tuple[str, bool]:
    """(the plan that holds where no flag names one, whether config.json names it)."""
    plan, origin = resolve_plan(None, SimpleNamespace(**config))
    if origin == "default":
        return "config.json names no plan", False
    text = str(plan)
    if not plan:
        return "all of them in all layers (plan `none`)", True
    short = len(text) <= _LONGEST
    return f"`{text}`" if short else f"`{text[:_LONGEST]} ...`, whole in config.json", True


_SUMMARY_TYPES: dict[str, tuple[type, ...]] = {
    "flags": (dict,),
    "environment": (dict,),
    "trained_parameters": (dict,),
    "train_loss": (int, float),
}


def read_summary(folder: Path) -> dict[str, Any]:
    """train_summary.json of a checkpoint; empty where training wrote none. ValueError, by name, for
    a file that it did not write."""
    file = folder / SUMMARY_FILE
    if not file.is_file():
        return {}
    summary = read_json(file)
    check_types(summary, _SUMMARY_TYPES, str(file))
    return summary


def _training(summary: Mapping[str, Any]) -> list[str]:
    if not summary:
        return []
    hours = next((key for key in ("gpu_hours", "process_hours") if key in summary), None)
    parts = summary.get("trained_parameters") or {}
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
    flags = summary.get("flags") or {}
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


SCORE_HEAD = ("set", "plan", "metric", "value", "95 % interval", "questions")


def score_rows(
    files: Sequence[str | Path], checkpoints: Sequence[str | Path] = ()
) -> list[tuple[str, ...]]:
    """Lines under `SCORE_HEAD`, one a run. files: folders of runs, or their scores.json.
    checkpoints: where the weights may lie that the card is about; a run that names others says
    whose it is, in its line and in a warning. ValueError, by name, for what is no scores file."""
    own = {Path(each).expanduser().resolve() for each in checkpoints}
    rows = []
    for file in files:
        path = Path(file) / "scores.json" if Path(file).is_dir() else Path(file)
        value, low, high, metric, count = _headline(path)
        beside = path.with_name("run.json")
        run = read_json(beside) if beside.is_file() else {}
        usual = path.stem if path.stem != "scores" else path.parent.name
        name = str(run.get("benchmark") or usual)
        model = run.get("model_path")
        there = Path(str(model)).expanduser().resolve()
        if own and model and there not in own and there.name not in {each.name for each in own}:
            log.warning("%s are the scores of %s", path, model)
            name += f" (answers of {there.name})"
        plan = f"`{run['plan']}`" if run.get("plan") else "?"
        rows.append((name, plan, metric, value, f"{low} to {high}", count))
    return rows


def _headline(path: Path) -> tuple[str, str, str, str, str]:
    """(value, low, high, metric, questions) of a scores.json. ValueError for another file."""
    found = read_json(path)
    metric, count = found.get("metric"), found.get("n")
    numbers = [found.get(key) for key in ("value", "low", "high")]
    if (
        not isinstance(metric, str)
        or type(count) is not int
        or not all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    ):
        raise ValueError(f"{path} holds no scores as `llava score` writes them")
    value, low, high = (f"{number:.2f}" for number in numbers)
    missing = found.get("n_missing")
    questions = f"{count} ({missing} without an answer)" if missing else str(count)
    return value, low, high, metric, questions


def _scores(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["## Scores", _table(SCORE_HEAD, rows)] if rows else []


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
        "--scores", nargs="+", default=[], metavar="RUN",
        help="runs for its table: folders of `llava eval`, or their scores.json",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not write_card(args.checkpoint, scores=args.scores):
        raise ValueError(f"{args.checkpoint} has a README.md that llava did not write")
    log.info("%s written", Path(args.checkpoint) / CARD_FILE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
