"""docs/Migrating.md: every command of the right-hand column goes through the real parser."""

from __future__ import annotations

import importlib
import re

import pytest
from command_lines import LAUNCHERS, why_not
from places import ROOT

PAGE = (ROOT / "docs" / "Migrating.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str]]:
    """(section, cell on the right) of every table row."""
    found, section = [], ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and not set(cells[1]) <= {"-", " "} and cells[1] != "there":
            found.append((section, cells[2]))
    return found


def commands(cell: str) -> list[str]:
    """The code spans of a cell that are commands, variables in front included."""
    starts = ("llava", "python", "bash", "pip", *LAUNCHERS)
    spans = re.findall(r"`([^`]+ [^`]+)`", cell)
    bare = [re.sub(r'^(\w+=("[^"]*"|\S+) )+', "", span).split()[0] for span in spans]
    return [span for span, word in zip(spans, bare, strict=True) if word in starts]


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=f"{section}: {cell[:60]}") for section, cell in rows()]
)
def test_the_right_hand_column_parses(cell):
    found = commands(cell)
    assert bool(found) != cell.startswith("—"), "a command, or — for what is not offered"
    assert [why_not(command) for command in found] == [None] * len(found)


def test_the_page_covers_every_original():
    sections = {section for section, _ in rows()}
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
