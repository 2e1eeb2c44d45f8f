"""The tables of compare.sh: accuracy, paired differences with intervals, cost; as Markdown.

Special here: a difference is taken question by question within a seed, and its interval has two
levels, drawn together 4,000 times: the pictures of a set (all questions about one at a time, the
same draw for all seeds, since all answer the same questions) and the seeds. Three seeds are few:
drawing them again finds two thirds of their variance on average, so the mean's own t interval over
the seeds (2 degrees of freedom) and every seed's difference stand beside it.

    python scripts/digits/compare_table.py checkpoints/digits-work/compare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from llava.eval.run_folder import read_object
from llava.eval.scorers.interval import Resampler, percentiles
from llava.utils import user_errors

PARTS = {
    "adapt": ("Stage 1 knows the questions, a short stage 2", ("pyramiddrop", "mild")),
    "full": ("Stage 1 knows the questions, the whole stage 2", ("pyramiddrop", "mild")),
    "learn": ("Stage 2 learns the questions", ("pyramiddrop",)),
}
"""Folder -> what it is, and the arms that are held against the one without dropping."""
ARMS = {"none": "without dropping", "pyramiddrop": "PyramidDrop", "mild": "mild PyramidDrop"}
SETS = ("vqav2", "gqa", "textvqa", "pope", "mme")
REPLICATES = 4000
BASE = "none-with-none"


class Scored(NamedTuple):
    """One arm's answers to one set: score_SI (0 to 1) of seeds x items, and the picture and the id
    of each item."""

    score_SI: np.ndarray
    picture: tuple[str, ...]
    uid: tuple[str, ...]


class Gain(NamedTuple):
    """A difference in points: value and interval, and the value of each seed."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]


def rows_of(plans: Sequence[str]) -> list[str]:
    """Names of the rows, ARM-with-PLAN: the base, and three for each arm with a plan."""
    return [BASE] + [
        row for p in plans for row in (f"none-with-{p}", f"{p}-with-{p}", f"{p}-with-none")
    ]


def words_of(row: str) -> tuple[str, str]:
    """What the first two columns say of a row."""
    arm, plan = row.split("-with-")
    return ARMS[arm], "all tokens" if plan == "none" else ARMS[plan]


# ------------------------------------------------------------------------------------------ reading
def read_row(folder: Path, name: str, seeds: Sequence[int]) -> dict[str, Scored]:
    """Set -> scores of one arm with one plan. ValueError when a run is missing or is over other
    questions than the other seeds' is."""
    found = {}
    for each in SETS:
        runs = []
        for seed in seeds:
            place = folder / f"seed-{seed}" / "results" / name / f"digits_{each}"
            files = sorted(place.glob("*/scores.json"))
            if len(files) != 1:
                raise ValueError(f"{place} holds {len(files)} scored runs; 1 is needed")
            runs.append(read_object(files[0])["per_item"])
        uids = {tuple(item["uid"] for item in run) for run in runs}
        if len(uids) != 1:
            raise ValueError(f"{name}, {each}: the seeds did not answer the same questions")
        found[each] = Scored(
            np.array([[float(item["score"]) for item in run] for run in runs]),
            tuple(item["image"] for item in runs[0]),
            uids.pop(),
        )
    return found


def read_all(
    folder: Path, plans: Sequence[str]
) -> tuple[tuple[int, ...], dict[str, dict[str, Scored]]]:
    """Seeds and rows of one comparison. ValueError for what is missing."""
    seeds = tuple(sorted(int(path.name.split("-")[1]) for path in folder.glob("seed-*")))
    if len(seeds) < 2:
        raise ValueError(f"{folder} holds {len(seeds)} seeds; at least 2 are needed")
    rows = {}
    for name in rows_of(plans):
        rows[name] = read_row(folder, name, seeds)
        for each in SETS:
            if rows[name][each].uid != rows[BASE][each].uid:
                raise ValueError(f"{name} and {BASE} did not answer the same questions of {each}")
    return seeds, rows


# --------------------------------------------------------------------------------------- statistics
def gains(one: Mapping[str, Scored], other: Mapping[str, Scored]) -> dict[str, Gain]:
    """Set -> what `other` gains over `one` in points, and "mean" of the sets."""
    found, mean_R, mean_S = {}, 0.0, 0.0
    seeds = next(iter(one.values())).score_SI.shape[0]
    drawn_RS = np.random.default_rng(len(SETS)).integers(seeds, size=(REPLICATES, seeds))
    for number, each in enumerate(one):
        gain_IS = 100 * (other[each].score_SI - one[each].score_SI).T
        columns = np.concatenate([gain_IS, np.ones((len(gain_IS), 1))], axis=1)
        sums = Resampler(one[each].picture, REPLICATES, seed=number).sums(columns)
        drawn = np.take_along_axis(sums[:, :-1] / sums[:, -1:], drawn_RS, axis=1).mean(1)
        found[each] = _gain(gain_IS.mean(0), drawn)
        mean_R, mean_S = mean_R + drawn / len(one), mean_S + gain_IS.mean(0) / len(one)
    found["mean"] = _gain(mean_S, mean_R)
    return found


def _gain(value_S: np.ndarray, drawn_R: np.ndarray) -> Gain:
    return Gain(float(value_S.mean()), *percentiles(drawn_R), tuple(map(float, value_S)))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few independent values."""
    n = len(values)
    half = student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values) - half), float(np.mean(values) + half)


# ------------------------------------------------------------------------------------------- tables
def accuracy_table(rows: Mapping[str, Mapping[str, Scored]]) -> list[str]:
    """Accuracy in per cent: mean over the seeds, and what they span in brackets."""
    lines = [_line("trained", "answers with", *SETS, "mean"), _line(*["---"] * (len(SETS) + 3))]
    for name, row in rows.items():
        cells = [100 * row[each].score_SI.mean(1) for each in SETS]
        cells.append(np.mean(cells, axis=0))
        shown = [f"{c.mean():.1f} ({c.min():.1f}-{c.max():.1f})" for c in cells]
        lines.append(_line(*words_of(name), *shown))
    return lines


def gain_table(rows: Mapping[str, Mapping[str, Scored]]) -> list[str]:
    """Every row less the base, in points."""
    lines = [_line("trained", "answers with", *SETS, "mean", "the seeds' means", "t interval")]
    lines.append(_line(*["---"] * (len(SETS) + 5)))
    for name, row in rows.items():
        if name == BASE:
            continue
        found = gains(rows[BASE], row)
        cells = [f"{g.value:+.1f} [{g.low:+.1f}, {g.high:+.1f}]" for g in found.values()]
        seeds = found["mean"].seeds
        low, high = t_interval(seeds)
        each = ", ".join(f"{value:+.1f}" for value in seeds)
        lines.append(_line(*words_of(name), *cells, each, f"[{low:+.1f}, {high:+.1f}]"))
    return lines


def cost_table(cost: Mapping[str, Any]) -> list[str]:
    """A training step of each arm."""
    head = ("trained", "plan", "tokens a layer", "GFLOPs", "with tower and projector")
    lines = [_line(*head, "CPU ms a step", "time, share of no plan"), _line(*["---"] * 7)]
    arms = cost["arms"]
    none = arms["none"]
    whole = none["gflops"] + none["tower_gflops"]
    for name in sorted(arms, key=lambda name: -arms[name]["gflops"]):
        arm = arms[name]
        total = arm["gflops"] + arm["tower_gflops"]
        low, high = arm["ms_of_none_range"]
        lines.append(
            _line(
                ARMS[name],
                f"`{arm['plan']}`",
                f"{arm['computed_tokens']:.0f} of {arm['tokens']:.0f}",
                f"{arm['gflops']:.1f} ({arm['gflops'] / none['gflops']:.1%})",
                f"{total:.1f} ({total / whole:.1%})",
                f"{arm['ms']:.0f}",
                f"{arm['ms_of_none']:.1%} ({low:.1%}-{high:.1%})",
            )
        )
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("folder", type=Path, help="compare/ in the folder of the stages")
    folder = flags.parse_args(argv).folder
    parts = []
    for each, (words, plans) in PARTS.items():
        if not (folder / each).is_dir():
            continue
        seeds, rows = read_all(folder / each, plans)
        title = f"{words}; seeds {', '.join(map(str, seeds))}"
        parts += [[title], accuracy_table(rows), gain_table(rows)]
    if (folder / "cost.json").is_file():
        parts.append(cost_table(read_object(folder / "cost.json")))
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    main(sys.argv[1:])
