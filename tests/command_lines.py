"""Would this command line run? Its words go through the real parser, and no further.

Used for the command lines in the documents: `why_not("llava plan --average-tokens 64")` is None, or
says what is wrong. Recipes (scripts/v1_5, scripts/v1_6) run with DRY_RUN=1, and what they print
goes through the parsers too. With `fragment` a command may lack what it needs: sentences name
commands with the one flag they speak of.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from places import ROOT

from llava import cli
from llava.reduction import ReductionPlan

TRAINS = (
    "llava.train.train",
    "llava.train.train_mem",
    "llava.train.train_mem_pdrop",
    "llava.train.train_mem_pdrop_next",
)
LEGACY = ("model_vqa", "model_vqa_science", "model_vqa_mmbench", "run_llava")
OTHERS = ("bench_eval", "train_speed", *LEGACY)
LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "srun")


def why_not(command: str, fragment: bool = False) -> str | None:
    """Why a command cannot run here; None when its parser takes it."""
    words = shlex.split(command, comments=True)
    env = {}
    while "=" in words[0] and not words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    return why_not_words(words, env, fragment)


def why_not_words(words: list[str], env: dict[str, str], fragment: bool = False) -> str | None:
    first = words[0]
    if first == "pip":
        return pip(words)
    if first == "make":
        return make(words)
    if first == "llava":
        return llava_command(words[1:], fragment)
    if first == "sbatch":
        words = [first, *(word for word in words if word.startswith("scripts/"))]
    if first in ("bash", "sbatch"):
        return bash_script(words, env) if len(words) > 1 else None
    if first in LAUNCHERS:
        return launched(words, env, fragment)
    if first.startswith("python") or first == sys.executable:
        return python(words, env, fragment)
    return f"no parser for {first}"


def python(words: list[str], env: dict[str, str], fragment: bool) -> str | None:
    """`python -m MODULE ...` or `python FILE ...`."""
    if words[1:3] == ["-m", "llava.cli"]:
        return why_not_words(["llava", *words[3:]], env, fragment)
    if words[1] == "-m":
        return parse(words[2], words[3:], fragment=fragment)
    if not (ROOT / words[1]).is_file():
        return f"no file {words[1]}"
    if words[1].startswith("llava/"):
        return parse(words[1].removesuffix(".py").replace("/", "."), words[2:], fragment=fragment)
    if words[1].startswith("tests/"):
        return None
    spec = importlib.util.spec_from_file_location("script", ROOT / words[1])
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return run_to_the_parser(script.main, words[2:], fragment)


def launched(words: list[str], env: dict[str, str], fragment: bool) -> str | None:
    """What a launcher starts: a file, or a module behind -m."""
    for place, word in enumerate(words):
        if word == "-m":
            return why_not_words(["python", *words[place:]], env, fragment)
        if word.startswith("python"):
            return why_not_words(words[place:], env, fragment)
        if word.endswith(".py"):
            return why_not_words(["python", *words[place:]], env, fragment)
    return None if fragment else f"{words[0]} starts nothing"


def make(words: list[str]) -> str | None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    unknown = [word for word in words[1:] if word not in targets]
    return f"no target {unknown}" if unknown else None


def pip(words: list[str]) -> str | None:
    asked = re.findall(r"\[(\w+)\]", words[-1])
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.split("[project.optional-dependencies]")[1]
    unknown = [name for name in asked if not re.search(rf"^{name} = \[", extras, re.M)]
    return f"no extra {unknown}" if unknown else None


def llava_command(words: list[str], fragment: bool = False) -> str | None:
    if not words or words[0] in ("--help", "--version"):
        return None
    if words[0] not in cli.COMMANDS:
        return f"no command llava {words[0]}"
    commands = cli.COMMANDS
    if words[0] == "data" and len(words) > 1:  # its own commands have parsers of their own
        commands, words = cli.DATA_COMMANDS, words[1:]
        if words[0] not in commands:
            return f"no command llava data {words[0]}"
    module, function = commands[words[0]].target.split(":")
    return parse(module, words[1:], function, fragment)


def bash_script(words: list[str], env: dict[str, str]) -> str | None:
    """A dry run of a recipe prints the commands; all of them must parse."""
    if not (ROOT / words[1]).is_file():
        return f"no script {words[1]}"
    if not words[1].startswith("scripts/v1_"):
        return None
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, **env, "DRY_RUN": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return done.stderr.strip()
    inner = [line for line in done.stdout.splitlines() if line.strip()]
    problems = [why_not(line) for line in inner]
    return next((problem for problem in problems if problem), None if inner else "prints nothing")


def lmms_eval(words: list[str]) -> str | None:
    """A command line of lmms-eval: the model is this package's, and knows its arguments."""
    given = dict(zip(words[::2], words[1::2], strict=True))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    entries = text.split('entry-points."lmms_eval.models"]')[1].split("[")[0]
    if f"{given['--model']} = " not in entries:
        return f"no model {given['--model']}"
    source = (ROOT / "llava" / "eval" / "lmms_eval_models.py").read_text(encoding="utf-8")
    init = next(
        node
        for made in ast.parse(source).body
        if isinstance(made, ast.ClassDef) and made.name == "Llava"
        for node in made.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    known = {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}
    options = dict(pair.split("=", 1) for pair in re.split(r",(?![^\[]*\])", given["--model_args"]))
    unknown = set(options) - known
    return f"no model_args {unknown}" if unknown else wrong_plans(options.get("reduction"))


def parse(
    module: str, words: list[str], function: str = "main", fragment: bool = False
) -> str | None:
    """Hand the words to the parser of a module's command line."""
    if module in ("deepspeed.launcher.runner", "torch.distributed.run"):  # on a machine with GPUs
        return parse("llava.train.train", words[words.index("llava.train.train") + 1 :])
    if module == "lmms_eval":
        return None if fragment else lmms_eval(words)
    if not module.startswith("llava."):
        return f"{module} is not of this package"
    try:
        if importlib.util.find_spec(module) is None:
            return f"no module {module}"
    except ModuleNotFoundError as error:
        return str(error)
    if module in TRAINS:
        return training(words, fragment)
    return run_to_the_parser(getattr(importlib.import_module(module), function), words, fragment)


def training(words: list[str], fragment: bool) -> str | None:
    """A command line of training, or of its estimate."""
    from llava.train import arguments, estimate

    if estimate.wanted(words):
        _, rest = estimate.own_parser().parse_known_args(words)
        _, unknown = arguments.build_parser().parse_known_args(rest)
        return f"unknown {unknown}" if unknown else None
    if fragment:
        return run_to_the_parser(
            lambda argv: arguments.build_parser().parse_args(argv), words, True
        )
    return run_to_the_parser(arguments.parse_args, words)


def run_to_the_parser(function: Any, words: list[str], fragment: bool = False) -> str | None:
    said = io.StringIO()
    arguments = [words] if inspect.signature(function).parameters else []
    try:
        with (
            contextlib.redirect_stderr(said),
            mock.patch.object(sys, "argv", ["command", *words]),
            stop_behind_the_parser(fragment),
        ):
            function(*arguments)
    except SystemExit as stopped:
        if stopped.code == 0:  # --help
            return None
        problem = said.getvalue().strip().splitlines()[-1]
        return None if fragment and re.search(r"expected .*argument$", problem) else problem
    except ValueError as error:  # a head mask is the user's
        return None if "does not exist" in str(error) and ".npy" in str(error) else str(error)
    except Parsed as parsed:
        return wrong_plans(getattr(parsed.args[0], "reduction", None))
    assert function.__name__ == "parse_args", f"{function} ran without parsing"
    return None


class Parsed(Exception):
    """Carries what a command line was parsed to."""


@contextlib.contextmanager
def stop_behind_the_parser(fragment: bool = False) -> Iterator[None]:
    """A command goes no further than its own parser."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: Any, words: Any = None, namespace: Any = None) -> Any:
        if fragment:
            for part in (*parser._actions, *parser._mutually_exclusive_groups):
                part.required = False
        raise Parsed(parse_args(parser, words, namespace))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        yield


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    from llava.train import arguments, estimate

    found = {"train": arguments.build_parser(), "train --estimate": estimate.own_parser()}

    def hold(parser: Any, words: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parser)

    commands = {**cli.COMMANDS, **cli.DATA_COMMANDS}
    targets = {name: command.target.split(":") for name, command in commands.items()}
    targets |= {name: (f"llava.eval.{name}", "main") for name in OTHERS}
    with mock.patch.object(argparse.ArgumentParser, "parse_args", hold):
        for name, (module, function) in targets.items():
            if name not in found:
                try:
                    getattr(importlib.import_module(module), function)([])
                except Parsed as parsed:
                    found[name] = parsed.args[0]
    return found


def all_flags() -> set[str]:
    """The flags of all commands."""
    return {flag for parser in parsers().values() for flag in parser._option_string_actions}


def wrong_plans(plans: Any) -> str | None:
    try:
        for plan in [plans] if isinstance(plans, str) else plans or []:
            ReductionPlan.parse(plan)
    except FileNotFoundError:
        return None  # a head mask that the user has
    except ValueError as error:
        return None if ".npy" in str(error) else str(error)
    return None
