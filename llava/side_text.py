"""The answer options in a question's text: where they stand and what they say.

Simignore compares pictures with the options of a multiple-choice question. Here they are found in
the prompt as it is; nothing is split or added, so the ids of the prompt stay those of every other
method. Two spellings are known: labels in brackets, ``(A) cat (B) dog``, on one line or several
(ScienceQA), and a line for each, ``A. cat``, ``A) cat`` or ``A: cat`` (LLaVA's own benchmarks). The
labels must count up from A. A word "Options:" or "Choices:" in front belongs to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_IN_BRACKETS = re.compile(r"(?<!\w)\(([A-Z])\)[ \t]*")
_ON_A_LINE = re.compile(r"(?:^|:)[ \t]*([A-Z])[.):][ \t]+", re.MULTILINE)
_HEADING = re.compile(r"(?:options|choices)[ \t]*:?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """text[start:stop]: the whole block, heading and letters included. words: the options alone."""

    start: int
    stop: int
    words: tuple[str, ...]


def find_options(text: str) -> Options | None:
    """The last block of options in a text, None where there is none (fewer than two options).

    The block ends with the line of its last option, so an instruction on a line of its own behind
    it does not belong to it.
    """
    blocks = [_last_run(list(pattern.finditer(text))) for pattern in (_IN_BRACKETS, _ON_A_LINE)]
    labels = max(blocks, key=lambda run: run[-1].end() if run else -1)
    if not labels:
        return None
    end_of_line = text.find("\n", labels[-1].end())
    stop = len(text) if end_of_line < 0 else end_of_line
    stops = [label.start() for label in labels[1:]] + [stop]
    words = (text[label.end() : end].strip() for label, end in zip(labels, stops, strict=True))
    heading = _HEADING.search(text, 0, labels[0].start())
    start = labels[0].start() if heading is None else heading.start()
    return Options(start, stop, tuple(words))


def _last_run(labels: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last two or more labels that count up from A without a gap."""
    run: list[re.Match[str]] = []
    best: list[re.Match[str]] = []
    for label in labels:
        if label[1] == "A":
            run = [label]
        elif run and ord(label[1]) == ord(run[-1][1]) + 1:
            run.append(label)
        else:
            run = []
        if len(run) > 1:
            best = run
    return best
