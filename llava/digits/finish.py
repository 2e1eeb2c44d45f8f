"""Last step of scripts/digits/train.sh: the shipped folder, its README and its `training.json`.

Copies what a checkpoint needs from the last stage (weights, configs, tokenizer; no optimizer) and
writes down how it was made: every stage's command, seed, time and versions. The tower is inside the
checkpoint, so its name in config.json is a name and no path.

    python -m llava.digits.finish --stages align facts questions --tower TOWER --base BASE \\
        --plan none --out checkpoints/llava-digits
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

from llava.reduction.plan import ReductionPlan
from llava.utils import atomic_write, get_logger, json_dump, user_errors

logger = get_logger(__name__)
COPIED = (
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
TOWER_NAME = "digits-tower"
README = """# {name}

The tiny LLaVA of `llava/digits` (a CLIP tower of 4 layers, a 2-layer GELU projector, a Llama of 6
layers, all of width 128), trained {how}.
It answers questions about 4x4 grids of coloured handwritten digits, and nothing else.

- made by: `{command}` (every stage's command, seed, time and versions: `training.json`)
- conversation template: `mistral_instruct`; 64 visual tokens a picture; float32
- the benchmark, the recipe and the accuracies: `docs/Digits.md`
"""


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def facts_of(folder: Path) -> dict:
    """What a module of llava.digits wrote about its own run, without the place it wrote to."""
    facts = read_json(folder / "training.json")
    facts["arguments"] = {k: v for k, v in facts["arguments"].items() if k != "out"}
    return facts


def how_trained(plans: dict[str, str | None]) -> str:
    """In words: which stages (name -> plan) dropped tokens, and how."""
    if not any(plans.values()):
        return "without dropping"
    parts = []
    for plan, group in itertools.groupby(plans, key=lambda name: plans[name]):
        names = ", ".join(f"`{name}`" for name in group)
        parts.append(f"{names} with `{plan}`" if plan else f"{names} without dropping")
    return (
        "with PyramidDrop"
        + " from the first stage on" * all(plans.values())
        + ": "
        + "; ".join(parts)
    )


def finish(args: argparse.Namespace) -> None:
    """Write the folder. Raises ValueError if a stage is not complete."""
    last = args.stages[-1]
    missing = [name for name in ("config.json", *COPIED) if not (last / name).is_file()]
    if missing:
        raise ValueError(f"{last} lacks {', '.join(missing)}")
    stages = {"tower": facts_of(args.tower), "base": facts_of(args.base)}
    for folder in args.stages:
        stages[folder.name] = read_json(folder / "train_summary.json")
    config = read_json(last / "config.json")
    config["mm_vision_tower"] = TOWER_NAME
    command = f"PLAN={args.plan} bash scripts/digits/train.sh"
    found = {folder.name: stages[folder.name].get("plan") for folder in args.stages}
    plans = {name: str(ReductionPlan.parse(plan)) if plan else None for name, plan in found.items()}

    work = args.out.parent / f".{args.out.name}.part"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in COPIED:
        shutil.copyfile(last / name, work / name)
    json_dump(work / "config.json", config)
    seconds = round(sum(float(stage.get("seconds", 0)) for stage in stages.values()), 1)
    json_dump(work / "training.json", {"command": command, "seconds": seconds, "stages": stages})
    with atomic_write(work / "README.md") as file:
        file.write(README.format(name=args.out.name, how=how_trained(plans), command=command))
    if args.out.exists():
        shutil.rmtree(args.out)
    work.replace(args.out)
    logger.info("checkpoint in %s", args.out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", type=Path, nargs="+", required=True, help="in their order")
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--plan", required=True, help="the value of PLAN")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Write the shipped folder."""
    finish(parse_args(argv))


if __name__ == "__main__":
    main()
