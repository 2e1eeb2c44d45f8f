"""`llava data prepare|check`: the two commands about benchmark files.

llava data prepare pope mme
llava data check all
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "prepare": ("llava.eval.data_prepare", "a set from the Hugging Face hub in LLaVA's layout"),
    "check": ("llava.eval.data_check", "counts, pictures and labels of the sets on disk"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to one of the two."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = argparse.ArgumentParser(
        prog="llava data",
        description="; ".join(f"{name}: {what}" for name, (_, what) in COMMANDS.items()),
        epilog="llava data <command> --help shows its options.",
    )
    flags.add_argument("command", choices=COMMANDS)
    module, _ = COMMANDS[flags.parse_args(words[:1]).command]
    return importlib.import_module(module).main(words[1:])


if __name__ == "__main__":
    raise SystemExit(main())
