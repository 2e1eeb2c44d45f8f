"""`llava score`, `llava compare`, `llava export`: what an answers file is worth.

    llava score results/pope/RUN                                   # writes RUN/scores.json
    llava score answers.jsonl --benchmark pope --json scores.json  # LLaVA's own files too
    llava compare results/pope/RUN_A results/pope/RUN_B            # what B gains over A
    llava export results/vqav2/RUN                                 # the server's file, checked

Special here: an incomplete run is refused, naming what is missing; with --allow-missing those
answers are wrong, never left out. Two runs are compared question by question: the interval is that
of the difference, which is much narrower than those of the scores, and McNemar's test stands beside
it for right/wrong scores. Runs over different questions, or read by different rules, are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import (
    BENCHMARKS,
    DATA_ROOT,
    LoadedBenchmark,
    get_benchmark,
    load_benchmark,
    load_folder,
)
from llava.eval.questions import read_json_lines
from llava.eval.run_folder import read_answers, read_object
from llava.eval.scorers import SCORERS, Scores, join_answers
from llava.eval.scorers.base import Item, Metric, check_complete
from llava.eval.scorers.interval import (
    Difference,
    Resampler,
    difference_interval,
    paired_difference,
)
from llava.eval.submit import export_answers
from llava.utils import check_output, get_logger, json_dump, user_errors

log = get_logger(__name__)


# ----------------------------------------------------------------------------- answers
@dataclass(frozen=True)
class Answered:
    """Answers with the benchmark they answer; folder: of the run, None for a lone file."""

    loaded: LoadedBenchmark
    records: list[dict[str, Any]]
    folder: Path | None


def open_answers(
    target: str | Path,
    benchmark: str | None = None,
    data_root: str | Path | None = None,
    limit: int | None = None,
) -> Answered:
    """A run's folder, or an answers file with the name of its benchmark.

    A run says itself which benchmark, which question file and how many questions it is about;
    data_root is for files that have moved since. Raises FileNotFoundError or ValueError.
    """
    target = Path(target)
    if target.is_dir():
        run = _run_settings(target)
        loaded = _load(run, benchmark, data_root, limit)
        return Answered(loaded, read_answers(target), target)
    if not target.is_file():
        raise FileNotFoundError(f"no run's folder and no answers file at {target}")
    if benchmark is None:
        raise ValueError(f"{target}: say which set it answers: --benchmark {'|'.join(BENCHMARKS)}")
    loaded = load_benchmark(benchmark, data_root or DATA_ROOT, limit)
    return Answered(loaded, _read_answers(target), None)


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object. FileNotFoundError, or ValueError with its name for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}")
    return read_object(path)


def _run_settings(folder: Path) -> dict[str, Any]:
    run = _object(folder / "run.json")
    return {**run, **run.get("settings", {})}


def _load(
    run: Mapping[str, Any],
    benchmark: str | None,
    data_root: str | Path | None,
    limit: int | None,
) -> LoadedBenchmark:
    name = benchmark or run.get("benchmark")
    if name is None:
        raise ValueError("run.json names no benchmark: say which with --benchmark")
    limit = run.get("limit") if limit is None else limit
    question_file = run.get("question_file")
    if data_root is None and question_file and Path(question_file).is_file():
        row = get_benchmark(name)
        depth = len(Path(row.questions).parts)
        return load_folder(row, Path(question_file).parents[depth - 1], limit)
    return load_benchmark(name, data_root or DATA_ROOT, limit)


def _read_answers(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_json_lines(path)]


# ----------------------------------------------------------------------------- score
def score_lines(name: str, scores: Scores, everything: bool = False) -> list[str]:
    """The headline, and with `everything` a line a metric."""
    missing = f", {scores.n_missing} without an answer" if scores.n_missing else ""
    lines = [f"{name}  dialect {scores.dialect}, {scores.n} questions{missing}"]
    shown = scores.metrics if everything else {scores.metric: scores.metrics[scores.metric]}
    width = max(map(len, shown))
    for metric, entry in shown.items():
        bounds = f"[{_figure(entry['low'])}, {_figure(entry['high'])}]"
        value = _figure(entry["value"])
        lines.append(f"  {metric:<{width}} {value:>9} {bounds:<20} n={entry['n']}")
    lines.append(f"  95 % intervals: {scores.interval}")
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def add_target_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say which answers and which questions."""
    flags.add_argument("target", metavar="RUN", help="a run's folder, or an answers file")
    flags.add_argument("--benchmark", metavar="NAME", help="the set that a lone file answers")
    flags.add_argument("--data-root", help=f"default: the run's own, else {DATA_ROOT}")
    flags.add_argument("--limit", type=int, help="as given to `llava eval`; a run knows its own")


def score_parser() -> argparse.ArgumentParser:
    """The command line of `llava score`."""
    flags = argparse.ArgumentParser(
        prog="llava score", description="Score a run or an answers file."
    )
    add_target_flags(flags)
    flags.add_argument("--dialect", help="how answers are read (default: the benchmark's)")
    flags.add_argument("--allow-missing", action="store_true", help="missing answers are wrong")
    flags.add_argument("--all", action="store_true", help="print every metric")
    flags.add_argument("--json", metavar="FILE", help="where scores go (default: RUN/scores.json)")
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Score answers, print the metrics and write them with a score a question."""
    args = score_parser().parse_args(argv)
    answered = open_answers(args.target, args.benchmark, args.data_root, args.limit)
    check_output(args.json, [answered.loaded.question_file, args.target])
    scores = answered.loaded.score(answered.records, args.dialect, args.allow_missing)
    path = Path(args.json) if args.json else answered.folder and answered.folder / "scores.json"
    if path:
        json_dump(path, asdict(scores))
    name = answered.loaded.benchmark.name
    sys.stdout.write("\n".join(score_lines(name, scores, args.all)) + "\n")
    return 0


# ----------------------------------------------------------------------------- compare
def compare_scores(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Metric -> values of both runs and the second's gain with its 95 % interval.

    Takes the content of two scores.json. Raises ValueError if they are over different questions or
    were read by different rules.
    """
    for key in ("scorer", "dialect"):
        if first[key] != second[key]:
            raise ValueError(f"the runs differ in their {key}: {first[key]!r} and {second[key]!r}")
    _check_same(first["per_item"], second["per_item"])
    scorer = SCORERS[first["scorer"]]
    one = scorer.metrics(first["per_item"], first["dialect"])
    other = scorer.metrics(second["per_item"], second["dialect"])
    resampler = Resampler([item["image"] for item in first["per_item"]])
    return {
        name: _gain(one[name], other[name], resampler)
        for name in one
        if name in other and one[name].columns.shape == other[name].columns.shape
    }


def _gain(one: Metric, other: Metric, resampler: Resampler) -> dict[str, Any]:
    low, high = difference_interval(one.columns, other.columns, one.value, resampler)
    first, second = one.point(), other.point()
    gain = {"first": first, "second": second, "gain": second - first, "low": low, "high": high}
    return {key: None if value != value else value for key, value in gain.items()} | {"n": one.n}


def _check_same(first: Sequence[Item], second: Sequence[Item]) -> None:
    one, other = ([item["uid"] for item in items] for items in (first, second))
    if one != other:
        lost, new = set(one) - set(other), set(other) - set(one)
        example = next(iter(sorted(lost or new)), None)
        raise ValueError(
            f"the runs are not over the same questions: {len(lost)} only in the first, {len(new)} "
            f"only in the second{f', such as {example}' if example else ' (another order)'}"
        )


def item_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    """Difference of the mean item score (0 to 1) of two scores.json, with McNemar's p."""
    return paired_difference(
        [item["score"] for item in first["per_item"]],
        [item["score"] for item in second["per_item"]],
        [item["image"] for item in first["per_item"]],
    )


def _scores_file(target: str | Path) -> Path:
    path = Path(target)
    return path / "scores.json" if path.is_dir() else path


def read_scores(target: str | Path) -> dict[str, Any]:
    """scores.json of a run's folder, or a file with the same content."""
    path = _scores_file(target)
    if not path.is_file():
        raise FileNotFoundError(f"file not found: {path}; make it with `llava score`")
    scores = _object(path)
    items = scores.get("per_item")
    listed = isinstance(items, list) and all(isinstance(item, dict) for item in items)
    if not listed or not {"scorer", "dialect"} <= scores.keys():
        raise ValueError(f"{path} holds no scores with their items; make it with `llava score`")
    return scores


def _run_named(target: str) -> str:
    """A run as it was given, with its plan where its folder tells it."""
    known = Path(target).is_dir() and (Path(target) / "run.json").is_file()
    plan = _object(Path(target) / "run.json").get("plan") if known else None
    return f"{target}: {plan}" if plan else target


def compare_lines(table: Mapping[str, Mapping[str, Any]], items: Difference) -> list[str]:
    """A table of both runs and the gain, and the counts behind McNemar's test."""
    width = max(map(len, table))
    lines = [f"{'':<{width}} {'A':>9} {'B':>9} {'B - A':>9}  95 % interval"]
    for name, row in table.items():
        sure = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
        lines.append(
            f"{name:<{width}} {_figure(row['first']):>9} {_figure(row['second']):>9} "
            f"{_figure(row['gain']):>9}  [{_figure(row['low'])}, {_figure(row['high'])}]"
            f"{' *' * sure}"
        )
    lines.append("* the interval leaves out 0; pictures are resampled, the same for both runs")
    lines.append(f"B is better on {items.better} of {items.n} questions and worse on {items.worse}")
    if items.mcnemar_p is not None:
        lines[-1] += f"; McNemar's p = {items.mcnemar_p:.3g} (takes questions for independent)"
    return lines


@user_errors()
def compare_main(argv: Sequence[str] | None = None) -> int:
    """Compare two scored runs over the same questions."""
    flags = argparse.ArgumentParser(
        prog="llava compare", description="What run B gains over run A, question by question."
    )
    flags.add_argument("first", metavar="A", help="a run's folder, or its scores.json")
    flags.add_argument("second", metavar="B", help="another one over the same questions")
    flags.add_argument("--json", metavar="FILE", help="write the table there as well")
    args = flags.parse_args(argv)
    first, second = read_scores(args.first), read_scores(args.second)
    check_output(args.json, [_scores_file(args.first), _scores_file(args.second)])
    table = compare_scores(first, second)
    items = item_difference(first, second)
    runs = [f"A  {_run_named(args.first)}", f"B  {_run_named(args.second)}"]
    sys.stdout.write("\n".join([*runs, *compare_lines(table, items)]) + "\n")
    if args.json:
        content = {"first": args.first, "second": args.second, "metrics": table}
        json_dump(args.json, {**content, "items": items._asdict()})
    return 0


# ----------------------------------------------------------------------------- export
@user_errors()
def export_main(argv: Sequence[str] | None = None) -> int:
    """Write the file that a benchmark's server wants."""
    flags = argparse.ArgumentParser(
        prog="llava export", description="Write a server's upload file, checked."
    )
    add_target_flags(flags)
    flags.add_argument("--output", metavar="FILE", help="default: in RUN/upload")
    flags.add_argument("--allow-missing", action="store_true", help="missing answers are empty")
    args = flags.parse_args(argv)
    answered = open_answers(args.target, args.benchmark, args.data_root, args.limit)
    benchmark, questions = answered.loaded.benchmark, answered.loaded.questions
    if benchmark.upload is None:
        able = ", ".join(row.name for row in BENCHMARKS.values() if row.upload)
        raise ValueError(f"{benchmark.name} has no server to upload to; accepted: {able}")
    given = join_answers(questions, answered.records)
    check_complete(questions, given, args.allow_missing)
    if args.output is None and answered.folder is None:
        raise ValueError("say where the upload of a lone answers file goes: --output FILE")
    data = answered.loaded.question_file.parent
    form, beside = benchmark.upload, answered.folder
    export_answers(form, questions, given, data, args.output, beside=beside)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
