"""Every line of the command table works and bad input ends in one line."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import LEGACY, parsers

from llava import __version__, cli

ROOT = Path(__file__).resolve().parents[2]


def _llava(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llava.cli", *words], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_answers_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    function = cli.load(name)
    with pytest.raises(SystemExit) as stop:
        function(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out
    assert cli.COMMANDS[name].summary in cli.usage()


def test_every_flag_says_what_it_does() -> None:
    """... and each command what it is, under its own name."""
    found = parsers()
    assert set(found) >= {*cli.COMMANDS, *cli.DATA_COMMANDS}
    silent = [
        f"{name} {action.dest}"
        for name, parser in found.items()
        for action in parser._actions
        if not action.help and name not in LEGACY and not isinstance(action.choices, dict)
    ]
    assert silent == []
    for name in (*cli.COMMANDS, *cli.DATA_COMMANDS):
        assert found[name].prog.endswith(f" {name}"), found[name].prog


def test_every_default_is_in_the_help() -> None:
    """`llava train --help` writes them by itself."""
    found = {name: parser for name, parser in parsers().items() if name not in ("train", *LEGACY)}
    silent = [
        f"{name} {action.dest}: {action.default}"
        for name, parser in found.items()
        for action in parser._actions
        if action.option_strings
        and action.default not in (None, False, "", [], argparse.SUPPRESS)
        and "default" not in action.help
    ]
    assert silent == []


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        assert capsys.readouterr().out.rstrip("\n") == cli.usage()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava {__version__}\n"


def test_unknown_command_names_the_known_ones() -> None:
    result = _llava("evla")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown command 'evla'; accepted: train, eval, answer")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["flops", "--preset", "llava-9"], "llava-1.5-7b"),
        (["flops", "--layer_list", "[8,16]"], "image_token_ratio_list"),
        (["flops", "--layer_list", "[16,8]", "--image_token_ratio_list", "[0.5,0.25]"], "[16, 8]"),
        (["flops", "--layer_list", "[8]", "--image_token_ratio_list", "__import__('os')"], "error"),
        (["flops", "--layer_list", "[40]", "--image_token_ratio_list", "[0.5]"], "40"),
        (["flops", "--reduction", "nosuch:k=2"], "nosuch"),
        (["flops", "--reduction", "missing.json"], "missing.json"),
        (["flops", "--visual-tokens", "-1"], "-1"),
        (["eval", "digits", "--model-path", "x", "--default-reduction", "nosuch"], "nosuch"),
        (["chat", "--model-path", "x", "--default-reduction", "none"], "--default-reduction"),
        (["verify", "--model-path", "x", "--json", "."], "Is a directory: ."),
        (["verify", "--model-path", "x", "--limit", "3"], "--limit 3"),
        (["bench", "--json", "."], "Is a directory: ."),
        (["flops", "--visual-tokens", "many"], "many"),
    ],
)
def test_bad_flags_end_in_one_line(
    words: list[str], needle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert needle in written.err
    assert re.match(r"(llava \w+: )?error: ", written.err.splitlines()[-1])


def test_a_real_process_shows_no_traceback() -> None:
    result = _llava("flops", "--layer_list", "[24,8]", "--image_token_ratio_list", "[0.5,0.25]")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
