"""docs/Migrating.md: every command of the right-hand column goes through the real parser.

A row marked "later" must not parse yet: when its feature comes, the mark goes.
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

import pytest
from places import ROOT

from llava import cli
from llava.reduction import ReductionPlan

PAGE = (ROOT / "docs" / "Migrating.md").read_text(encoding="utf-8")
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")


def rows() -> list[tuple[str, str, str]]:
    """(section, cell on the right, mark) of every table row."""
    found, section = [], ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and not set(cells[1]) <= {"-", " "} and cells[1] != "there":
            found.append((section, cells[2], cells[3]))
    return found


def commands(cell: str) -> list[str]:
    """The code spans of a cell that are commands, variables in front included."""
    starts = ("llava", "python", "bash", "pip", *LAUNCHERS)
    spans = re.findall(r"`([^`]+ [^`]+)`", cell)
    bare = [re.sub(r'^(\w+=("[^"]*"|\S+) )+', "", span).split()[0] for span in spans]
    return [span for span, word in zip(spans, bare, strict=True) if word in starts]


def why_not(command: str) -> str | None:
    """Why a command cannot run here; None when its parser takes it."""
    words = shlex.split(command)
    env = {}
    while "=" in words[0] and not words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    return why_not_words(words, env)


def why_not_words(words: list[str], env: dict[str, str]) -> str | None:
    first = words[0]
    if first == "pip":
        return pip(words)
    if first == "llava":
        return llava_command(words[1:])
    if first == "bash":
        return bash_script(words, env)
    if first in LAUNCHERS:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return why_not_words(["python", *words[place:]], env)
    assert first.startswith("python") or first == sys.executable, words
    if words[1] == "-m":
        if words[2] == "llava.cli":
            return why_not_words(["llava", *words[3:]], env)
        return parse(words[2], words[3:])
    if not (ROOT / words[1]).is_file():
        return f"no file {words[1]}"
    if words[1].startswith("scripts/"):
        spec = importlib.util.spec_from_file_location("script", ROOT / words[1])
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        return run_to_the_parser(script.main, words[2:])
    return parse(words[1].removesuffix(".py").replace("/", "."), words[2:])


def pip(words: list[str]) -> str | None:
    asked = re.findall(r"\[(\w+)\]", words[-1])
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.split("[project.optional-dependencies]")[1]
    unknown = [name for name in asked if not re.search(rf"^{name} = \[", extras, re.M)]
    return f"no extra {unknown}" if unknown else None


def llava_command(words: list[str]) -> str | None:
    if words[0] not in cli.COMMANDS:
        return f"no command llava {words[0]}"
    if words[0] == "data":  # its own commands have parsers of their own
        return parse(cli.DATA_COMMANDS[words[1]].target.split(":")[0], words[2:])
    module, function = cli.COMMANDS[words[0]].target.split(":")
    assert function == "main"
    return parse(module, words[1:])


def bash_script(words: list[str], env: dict[str, str]) -> str | None:
    """A dry run prints the commands; all of them must parse."""
    if not (ROOT / words[1]).is_file():
        return f"no script {words[1]}"
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
    options = dict(pair.split("=", 1) for pair in given["--model_args"].split(","))
    unknown = set(options) - known
    return f"no model_args {unknown}" if unknown else wrong_plans(options.get("reduction"))


def parse(module: str, words: list[str]) -> str | None:
    """Hand the words to the parser of a module's command line."""
    if module in ("deepspeed.launcher.runner", "torch.distributed.run"):  # on a machine with GPUs
        return parse("llava.train.train", words[words.index("llava.train.train") + 1 :])
    if module == "lmms_eval":
        return lmms_eval(words)
    if not module.startswith("llava."):
        return f"{module} is not of this package"
    try:
        if importlib.util.find_spec(module) is None:
            return f"no module {module}"
    except ModuleNotFoundError as error:
        return str(error)
    if module.startswith("llava.train."):
        module = "llava.train.arguments"
    found: Any = importlib.import_module(module)
    training = module == "llava.train.arguments"
    return run_to_the_parser(found.parse_args if training else found.main, words)


def run_to_the_parser(function: Any, words: list[str]) -> str | None:
    said = io.StringIO()
    arguments = [words] if inspect.signature(function).parameters else []
    try:
        with (
            contextlib.redirect_stderr(said),
            mock.patch.object(sys, "argv", ["command", *words]),
            stop_behind_the_parser(),
        ):
            function(*arguments)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    except ValueError as error:  # a head mask is the user's
        return None if "does not exist" in str(error) and ".npy" in str(error) else str(error)
    except Parsed as parsed:
        return wrong_plans(getattr(parsed.args[0], "reduction", None))
    assert function.__name__ == "parse_args", f"{function} ran without parsing"
    return None


class Parsed(Exception):
    """Carries what a command line was parsed to."""


@contextlib.contextmanager
def stop_behind_the_parser() -> Iterator[None]:
    """A command goes no further than its own parser."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: Any, words: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parse_args(parser, words, namespace))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        yield


def wrong_plans(plans: Any) -> str | None:
    try:
        for plan in [plans] if isinstance(plans, str) else plans or []:
            ReductionPlan.parse(plan)
    except FileNotFoundError:
        return None  # a head mask that the user has
    except ValueError as error:
        return None if ".npy" in str(error) else str(error)
    return None


@pytest.mark.parametrize(
    ("cell", "mark"),
    [pytest.param(cell, mark, id=f"{section}: {cell[:60]}") for section, cell, mark in rows()],
)
def test_the_right_hand_column_parses(cell, mark):
    assert mark in ("", "later")
    if cell.startswith("—"):
        assert not commands(cell)
        return
    found = commands(cell)
    assert found, f"no command in {cell}"
    problems = [why_not(command) for command in found]
    if mark == "later":
        assert all(problems), f"this works now: take away its mark: {cell}"
    else:
        assert problems == [None] * len(found)


def test_the_page_covers_every_original():
    sections = {section for section, _, _ in rows()}
    names = ("LLaVA", "PyramidDrop", "FastV", "Simignore", "AdaptPrune", "YOPO")
    assert sections == {f"From {name}" for name in names}
    assert len(rows()) > 60


def test_python_names_are_where_the_page_says():
    names = re.findall(r"`(llava(?:\.\w+){2,})`", PAGE)
    assert len(names) >= 8
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("llava nosuch", "no command"),
        ("llava answer --model-path m", "question-file"),
        ("llava chat --model-path m --nosuch", "nosuch"),
        ("python -m llava.nosuch", "no module"),
        ("python -m lmms_eval --model llava --model_args pretrained=m,nosuch=1", "nosuch"),
        ("python llava/nosuch.py", "no file"),
        ("bash scripts/nosuch.sh", "no script"),
        ('pip install -e ".[nosuch]"', "no extra"),
        ('llava bench --reduction "fastv:k=2,nosuch=1"', "nosuch"),
        ("REDUCTION=nosuch:k=1 bash scripts/v1_5/pdrop_train/finetune.sh", "nosuch"),
    ],
)
def test_the_check_notices(command, problem):
    assert problem in str(why_not(command))
