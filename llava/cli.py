"""``llava <command>``: one table, each command imported only when it is used.

Special here: ``llava --help`` imports neither torch nor transformers. A new command is one line in
``COMMANDS``; its function takes the rest of the command line and answers ``--help`` itself.
``llava --help`` · ``llava flops --preset llava-1.5-7b``
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llava import __version__
from llava.utils import user_errors


class Command(NamedTuple):
    """Where a command lives and the line ``llava --help`` shows for it."""

    target: str
    summary: str


COMMANDS: dict[str, Command] = {
    "train": Command("llava.train.train:main", "train a model (LLaVA's flags)"),
    "eval": Command("llava.eval.run:main", "run benchmarks and score them"),
    "answer": Command("llava.eval.answer_file:main", "answer a question file (LLaVA's flags)"),
    "score": Command("llava.eval.score:main", "score a run or an answers file, with intervals"),
    "compare": Command("llava.eval.score:compare_main", "what one run gains over another"),
    "report": Command("llava.eval.results_report:main", "a page and tables of many runs"),
    "export": Command("llava.eval.score:export_main", "the file a benchmark's server wants"),
    "judge": Command("llava.eval.judge:main", "sets that a language model scores"),
    "data": Command("llava.cli:data_main", "prepare and check benchmark and training files"),
    "bench": Command("llava.eval.speed:main", "measured speed of a plan beside its ideal"),
    "verify": Command("llava.verify:main", "check that a checkpoint is read as it was meant"),
    "convert": Command(
        "llava.model.convert:main", "write a checkpoint in either layout; merges LoRA"
    ),
    "card": Command("llava.model.model_card:main", "write a checkpoint's README.md, with scores"),
    "flops": Command("llava.reduction.flops:main", "cost of a plan in closed form"),
    "plan": Command("llava.reduction.budget:main", "layers and ratios that meet a budget"),
    "chat": Command("llava.serve.cli:main", "a dialogue about pictures in the terminal"),
    "demo": Command("llava.serve.demo:main", "a browser page: answers with and without a plan"),
    "calibrate-heads": Command(
        "llava.eval.calibrate_heads:main", "head masks for YOPO, from your own questions"
    ),
    "show": Command("llava.eval.show:main", "the tokens that plans keep, drawn on the picture"),
    "digits": Command("llava.digits.build:main", "build the digits data set"),
    "quickstart": Command("llava.quickstart:main", "the shipped models, with and without dropping"),
}

DATA_COMMANDS: dict[str, Command] = {
    "prepare": Command(
        "llava.eval.data_prepare:main", "a benchmark from the Hugging Face hub in LLaVA's layout"
    ),
    "check": Command(
        "llava.eval.data_check:main", "counts, pictures and labels of the benchmarks on disk"
    ),
    "prepare-train": Command(
        "llava.train.data_prepare:main", "the folders of a training set from its archives"
    ),
    "check-train": Command(
        "llava.train.data_check:main", "pictures, turns and tokens of training files"
    ),
}


def _table(commands: Mapping[str, Command]) -> list[str]:
    width = max(len(name) for name in commands)
    return [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]


def usage() -> str:
    """What ``llava --help`` prints."""
    return "\n".join(
        [
            "usage: llava <command> [options]",
            "",
            "LLaVA models with fewer visual tokens.",
            "",
            *_table(COMMANDS),
            "",
            "llava <command> --help shows a command's options; llava --version the version.",
        ]
    )


def load(
    name: str, commands: Mapping[str, Command] = COMMANDS
) -> Callable[[Sequence[str]], object]:
    """The function behind a command.

    Raises:
        ValueError: no such command; the message lists what there is.
    """
    if name not in commands:
        raise ValueError(f"unknown command {name!r}; accepted: {', '.join(commands)}")
    module, function = commands[name].target.split(":")
    return getattr(importlib.import_module(module), function)


def data_main(argv: Sequence[str]) -> int:
    """``llava data <command>``: hand the rest of the command line on."""
    words = list(argv)
    flags = argparse.ArgumentParser(
        prog="llava data",
        description="\n".join(_table(DATA_COMMANDS)),
        epilog="llava data <command> --help shows its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("command", choices=DATA_COMMANDS)
    result = load(flags.parse_args(words[:1]).command, DATA_COMMANDS)(words[1:])
    return result if isinstance(result, int) else 0


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names on the arguments behind it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"llava {__version__}")
        return 0
    result = load(words[0])(words[1:])
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
