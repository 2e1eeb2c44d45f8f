"""Build the digits benchmark: tokenizer, evaluation sets, training pictures and conversations.

    llava digits --out playground/data [--parts eval] [--seed 0]

Evaluation sets go to `<out>/eval/digits/<set>`, where LLaVA keeps its benchmarks; the tokenizer
and the training data to `<out>/digits`. Each part is built in a hidden folder beside its place and
moved there when complete, so a part is either whole or absent; parts that are there are left alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from llava.digits.sets import BUILDERS, SETS
from llava.utils import get_logger, json_dump, progress, user_errors

logger = get_logger(__name__)
FORMAT = 1
EDITION = 2  # of the evaluation sets
STAMP = "build.json"
PARTS = ("tokenizer", "eval", "train")
TRAIN_PICTURES = 12_000


def _build_part(place: Path, settings: dict, build: Callable[[Path], None]) -> bool:
    """Build one part unless it is there; True if work was done.

    Raises ValueError if the place holds a part with other settings, or something else.
    """
    settings = {"format": FORMAT, **settings}
    if place.exists():
        stamp = place / STAMP
        if not stamp.is_file():
            raise ValueError(f"{place} was not made by this builder; choose another --out")
        try:
            found = json.loads(stamp.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{stamp} is damaged ({error}); delete {place}") from None
        if found != settings:
            raise ValueError(
                f"{place} was built with {found}, asked for {settings}; "
                "delete it or choose another --out"
            )
        return False
    work = place.parent / f".{place.name}.part"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    build(work)
    json_dump(work / STAMP, settings)
    work.replace(place)
    return True


def eval_root(out: Path) -> Path:
    """Where the evaluation sets and their index lie."""
    return out / "eval" / "digits"


def build_tokenizer_part(out: Path) -> bool:
    """The tokenizer's folder `out/digits/tokenizer`."""
    from llava.digits.tokenizer import build_tokenizer, vocabulary

    return _build_part(out / "digits" / "tokenizer", {"words": len(vocabulary())}, build_tokenizer)


def build_eval(out: Path, seed: int = 0, sets: tuple[str, ...] = SETS) -> list[str]:
    """The evaluation sets below `out/eval/digits`, with an index `index.json`.

    Returns the sets that were built now. Raises ValueError for an unknown set.
    """
    unknown = [name for name in sets if name not in BUILDERS]
    if unknown:
        raise ValueError(f"unknown set {unknown[0]!r}; accepted: {', '.join(SETS)}")
    built = []
    for name in progress(list(sets), desc="evaluation sets"):
        build = BUILDERS[name]
        settings = {"seed": seed, "edition": EDITION}
        if _build_part(eval_root(out) / name, settings, lambda work, b=build: b(work, seed)):
            built.append(name)
    index = {
        name: json.loads((eval_root(out) / name / "set.json").read_text(encoding="utf-8"))
        for name in SETS
        if (eval_root(out) / name / "set.json").is_file()
    }
    json_dump(eval_root(out) / "index.json", index)
    return built


def build_train(out: Path, seed: int = 0, pictures: int = TRAIN_PICTURES) -> bool:
    """Pictures and conversation files for training in `out/digits/train`.

    Raises ValueError if `pictures` is not positive.
    """
    from llava.digits.training_data import write_all

    if pictures < 1:
        raise ValueError(f"--train-pictures must be 1 or more, got {pictures}")
    settings = {"seed": seed, "pictures": pictures}
    place = out / "digits" / "train"
    return _build_part(place, settings, lambda work: write_all(work, seed, pictures))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="llava digits", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to build in")
    parser.add_argument("--seed", type=int, default=0, help="seed of all scenes and questions")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to build (default: all)",
    )
    parser.add_argument(
        "--train-pictures",
        type=int,
        default=TRAIN_PICTURES,
        help="pictures to train on (default %(default)s)",
    )
    return parser.parse_args(argv)


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Build what is missing."""
    args = parse_args(argv)
    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {args.seed}")
    if "tokenizer" in args.parts:
        build_tokenizer_part(args.out)
    if "eval" in args.parts:
        built = build_eval(args.out, args.seed)
        logger.info("%s: built %s", eval_root(args.out), ", ".join(built) or "nothing new")
    if "train" in args.parts and build_train(args.out, args.seed, args.train_pictures):
        logger.info("training data in %s", args.out / "digits" / "train")


if __name__ == "__main__":
    main()
