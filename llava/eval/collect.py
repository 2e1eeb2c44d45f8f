"""Runs on disk as rows of a table: what `llava report` shows and writes.

Special here: a run is taken only if its folder agrees with itself: the hash of its settings, the
number of its answers, whose answers they are. Runs are compared within a group only: one
checkpoint, one set, the same questions, the same hardware. Inside it a run is called by its plan
and by the settings that set it apart from others of the group, whatever they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.paper_tables import Printed, papers_average, printed
from llava.eval.published import PUBLISHED, Published, published_for
from llava.eval.questions import read_json_lines
from llava.eval.run_folder import config_hash, read_object
from llava.reduction import ReductionPlan

SPEED_KEYS = ("questions", "questions_per_second", "first_token_ms", "seconds", "tera_flops")
SCORE_KEYS = ("metric", "value", "low", "high", "n", "n_missing", "dialect", "metrics")
_OF_GROUP = ("benchmark", "model_path", "model_base", "model_files", "n", "questions_sha256")


@dataclass(frozen=True)
class Run:
    """One finished run. run: run.json; scores: scores.json without its items, None for a set that a
    server or a judge scores; kept: (layer, mean visual tokens from it on), the first at layer 0."""

    path: Path
    run: Mapping[str, Any]
    scores: Mapping[str, Any] | None
    kept: tuple[tuple[int, float], ...]

    @property
    def benchmark(self) -> str:
        return self.run["benchmark"]

    @property
    def plan(self) -> str:
        return self.run["plan"]

    @property
    def checkpoint(self) -> str:
        return self.run["checkpoint"]

    @property
    def shared(self) -> bool:
        """Questions about a picture share the prefill of what they have in common."""
        return bool(self.run["share_prefix"])

    @property
    def rate(self) -> float | None:
        """Questions a second, all processes together."""
        return self.run["speed"]["questions_per_second"]

    @property
    def tera_flops(self) -> float | None:
        """Of one question in the mean: tower, prefill with what is shared, decoding."""
        speed = self.run["speed"]
        return speed["tera_flops"] / speed["questions"] if speed["tera_flops"] else None

    @property
    def milliseconds(self) -> float:
        """Of one process for one question in the mean."""
        speed = self.run["speed"]
        return 1e3 * sum(speed["seconds"].values()) / speed["questions"]

    @property
    def hardware(self) -> str:
        """GPU, else processor, and how many processes."""
        there = self.run.get("environment", {})
        threads = there.get("threads")
        plural = "thread" if threads == 1 else "threads"
        device = there.get("gpu") or f"{there.get('cpu')}, {threads} {plural}"
        world = self.run["speed"].get("world_size", 1)
        return device if world == 1 else f"{device}, {world} processes"

    @property
    def group(self) -> str:
        """Equal for runs that may be compared."""
        return json.dumps([self.run.get(key) for key in _OF_GROUP] + [self.hardware])


# ----------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Collected:
    """What was found. unfinished: folders of runs that still lack answers; damaged: what is wrong
    with folders that do not agree with themselves, each by its name."""

    runs: list[Run]
    unfinished: list[str]
    damaged: list[str]


def collect(paths: Iterable[str | Path]) -> Collected:
    """All runs in and below some folders, each once, in the order of their names.

    Plain files among the paths are passed over (`results/*` names an older page too).
    FileNotFoundError for a path that is not there; ValueError where no run is found at all.
    """
    found: dict[Path, None] = {}
    given = [Path(path) for path in paths]
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"file not found: {path}")
        found |= dict.fromkeys(file.parent.resolve() for file in sorted(path.rglob("run.json")))
    runs, unfinished, damaged = [], [], []
    for folder in found:
        try:
            run = read_run(folder)
        except (ValueError, OSError) as error:
            damaged.append(str(error))
            continue
        if run is None:
            unfinished.append(str(folder))
        else:
            runs.append(run)
    if not found:
        raise ValueError(f"no run below {', '.join(map(str, given))}; `llava eval` makes them")
    return Collected(runs, unfinished, damaged)


def read_run(folder: Path) -> Run | None:
    """A run's folder; None while answers are missing. ValueError, naming it, for one that does not
    agree with itself."""
    run = read_object(folder / "run.json")
    hashed = run.get("hashed")
    if not isinstance(hashed, list) or "run_id" not in run:
        raise ValueError(f"{folder}: run.json names no settings; an older version wrote it")
    lacking = [key for key in [*hashed, "checkpoint", "benchmark", "plan"] if key not in run]
    if lacking:
        raise ValueError(f"{folder}: run.json lacks {', '.join(lacking)}")
    if config_hash({key: run[key] for key in hashed}) != run["run_id"]:
        raise ValueError(f"{folder}: the settings in run.json are not those of run {run['run_id']}")
    answers = folder / "answers.jsonl"
    if not answers.is_file() or "speed" not in run:
        return None
    lacking = [key for key in SPEED_KEYS if key not in run["speed"]]
    if lacking or not run["speed"]["questions"]:
        raise ValueError(f"{folder}: the speed in run.json lacks {', '.join(lacking) or 'figures'}")
    kept = _read_kept(answers, run)
    scores = folder / "scores.json"
    return Run(folder, run, _read_scores(scores) if scores.is_file() else None, kept)


def _read_kept(path: Path, run: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """Mean visual tokens from each cut on; checks the answers on the way."""
    count = 0
    sums: dict[tuple[int, int], float] = {}
    for line, record in read_json_lines(path):
        if record.get("run_id") != run["run_id"]:
            raise ValueError(f"{path}:{line}: an answer of another run, {record.get('run_id')}")
        count += 1
        visual = record["n_visual"]
        for place, (layer, tokens) in enumerate([(0, visual["in"]), *visual["layers"]]):
            sums[place, layer] = sums.get((place, layer), 0) + tokens
    if count != run["n"]:
        raise ValueError(f"{path}: {count} answers to {run['n']} questions")
    return tuple((layer, total / count) for (_, layer), total in sorted(sums.items()))


def _read_scores(path: Path) -> dict[str, Any]:
    scores = read_object(path)
    lacking = [key for key in SCORE_KEYS if key not in scores]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; make it with `llava score`")
    return {key: value for key, value in scores.items() if key != "per_item"}


# ----------------------------------------------------------------------------- groups, names
def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that may be compared, no dropping first, then by plan; sets in the table's order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    order = list(BENCHMARKS)

    def place(group: list[Run]) -> tuple[str, int, str]:
        name = group[0].benchmark
        known = order.index(name) if name in order else len(order)
        return group[0].checkpoint, known, name

    inside = [
        sorted(group, key=lambda r: (r.run["blind"], r.plan != "none", r.plan, not r.shared))
        for group in groups.values()
    ]
    return sorted(inside, key=place)


def variants(group: Sequence[Run]) -> list[str]:
    """What sets each run apart from the others besides its plan, in words; "" where nothing."""
    keys = [key for key in group[0].run["hashed"] if key not in ("plan", *_OF_GROUP)]
    differ = [k for k in keys if len({json.dumps(r.run.get(k), sort_keys=True) for r in group}) > 1]
    return [", ".join(filter(None, (_words(key, r.run.get(key)) for key in differ))) for r in group]


def _words(key: str, value: Any) -> str:
    if key == "share_prefix":
        return "" if value else "whole prompts"
    if key == "blind":
        return "blind" if value else ""
    if key == "load":
        return "" if value == "full" else str(value)
    if isinstance(value, Mapping):
        return " ".join(f"{name} {each}" for name, each in value.items())
    return f"{key.replace('_', ' ')} {value}"


# ----------------------------------------------------------------------------- sharing
@dataclass(frozen=True)
class Sharing:
    """The runs of one plan with and without sharing; None where there is none."""

    plan: str
    variant: str
    shared: Run | None
    whole: Run | None


def sharing(group: Sequence[Run]) -> list[Sharing]:
    """The runs of a group, paired by all settings but `share_prefix`."""
    pairs: dict[str, list[Run]] = {}
    for run in group:
        rest = {key: run.run[key] for key in run.run["hashed"] if key != "share_prefix"}
        pairs.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    names = dict(zip((run.path for run in group), variants(group), strict=True))
    found = []
    for pair in pairs.values():
        both = {run.shared: run for run in pair}
        words = [word for word in names[pair[0].path].split(", ") if word != "whole prompts"]
        found.append(Sharing(pair[0].plan, ", ".join(words), both.get(True), both.get(False)))
    return found


def sharing_sentences(group: Sequence[Run]) -> list[str]:
    """In words: plans that lose to no dropping where questions share, and why."""
    pairs = sharing(group)
    bases = {pair.variant: pair for pair in pairs if pair.plan == "none"}
    found = []
    for pair in pairs:
        base = bases.get(pair.variant)
        if pair.plan == "none" or base is None or pair.shared is None or base.shared is None:
            continue
        own, none = pair.shared, base.shared
        if own.rate and none.rate and own.rate < none.rate:
            found.append(_loses(own, none) + _whole_prompts(pair, base))
    return found


def _loses(own: Run, none: Run) -> str:
    rates = f"{own.rate:.3g} questions/s, no dropping {none.rate:.3g}"
    if not own.tera_flops or not none.tera_flops:
        return f"{own.plan}: {rates}; their FLOPs are not known."
    ratio = own.tera_flops / none.tera_flops
    depth = ReductionPlan.parse(own.plan).shared_depth(10**6)
    if ratio > 1 and depth < 10**6:
        return (
            f"{own.plan} loses to no dropping because it shares less: it reads the question in "
            f"front of layer {depth}, so that questions about one picture share only the prefill "
            f"before it. {rates}; {ratio:.2f} times the FLOPs."
        )
    return (
        f"{own.plan} is slower than no dropping, and not for want of sharing: it needs {ratio:.2f} "
        f"times the FLOPs. {rates}."
    )


def _whole_prompts(pair: Sharing, base: Sharing) -> str:
    if pair.whole is None or base.whole is None or not pair.whole.rate or not base.whole.rate:
        return ""
    gain = pair.whole.rate / base.whole.rate
    return f" On whole prompts it answers {gain:.2f} times as many questions/s as no dropping."


# ----------------------------------------------------------------------------- papers
def column(run: Run) -> str:
    """The papers' name of a set, else its own."""
    row = BENCHMARKS.get(run.benchmark)
    return (row.published if row else None) or run.benchmark


def published_of(run: Run) -> Published | None:
    """The published checkpoint a run's model has the shape of: by its config where the folder is
    there, else by its id on the hub."""
    config = Path(str(run.run["model_path"])) / "config.json"
    if not config.is_file():
        return next((each for each in PUBLISHED if each.name == run.run["model_path"]), None)
    content = read_object(config)
    needed = ("model_type", "num_hidden_layers", "hidden_size")
    return published_for(SimpleNamespace(**content)) if all(k in content for k in needed) else None


def papers_of(run: Run, methods: Sequence[str]) -> list[Printed]:
    """What is printed for a run's checkpoint: LLaVA's own scores without dropping, then the lines
    of the papers about these methods."""
    known = published_of(run)
    if known is None:
        return []
    return [Printed(known.name, "none", "", known.scores), *printed(known.name, methods)]


@dataclass(frozen=True)
class Average:
    """The papers' average of one plan over the columns of `scores`. runs: one a column."""

    checkpoint: str
    plan: str
    variant: str
    scores: dict[str, float]
    runs: tuple[Run, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.scores)

    @property
    def value(self) -> float:
        return papers_average(self.scores)

    @property
    def tera_flops(self) -> float | None:
        """Of one question in the mean over the sets; None where a run does not say."""
        costs = [run.tera_flops for run in self.runs]
        return None if None in costs else sum(costs) / len(costs)

    @property
    def milliseconds(self) -> float:
        """Of one question in the mean over the sets."""
        return sum(run.milliseconds for run in self.runs) / len(self.runs)


def averages(groups: Sequence[Sequence[Run]]) -> list[Average]:
    """The papers' average of each plan that was run on every set of its checkpoint; a checkpoint
    with one set has none."""
    tables: dict[tuple[str, str], dict[tuple[str, str], dict[str, tuple[float, Run]]]] = {}
    columns: dict[tuple[str, str], dict[str, None]] = {}
    for group in groups:
        key = (group[0].checkpoint, group[0].hardware)
        for run, variant in zip(group, variants(group), strict=True):
            value = _percent(run)
            if value is not None:
                columns.setdefault(key, {})[column(run)] = None
                rows = tables.setdefault(key, {})
                rows.setdefault((run.plan, variant), {})[column(run)] = value, run
    found = []
    for key, table in tables.items():
        for (plan, variant), own in table.items():
            if len(own) == len(columns[key]) > 1:
                scores = {name: own[name][0] for name in columns[key]}
                runs = tuple(own[name][1] for name in columns[key])
                found.append(Average(key[0], plan, variant, scores, runs))
    return found


def _percent(run: Run) -> float | None:
    """What a run gives to an average: its headline, and of MME perception alone."""
    if run.scores is None:
        return None
    if column(run) == "MME":
        return run.scores["metrics"].get("perception", {}).get("value")
    return run.scores["value"]


# ----------------------------------------------------------------------------- files
FIELDS = (
    "checkpoint", "benchmark", "plan", "variant", "metric", "value", "low", "high", "n",
    "n_missing", "dialect", "tera_flops", "milliseconds", "questions_per_second",
    "first_token_ms", "kept_tokens", "published", "run_id", "commit", "torch", "transformers",
    "hardware", "path",
)  # fmt: skip
"""Columns of the CSV file."""


def rows(groups: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """One row a run with the keys `FIELDS`; what is not known is None."""
    return [
        _row(run, variant)
        for group in groups
        for run, variant in zip(group, variants(group), strict=True)
    ]


def _row(run: Run, variant: str) -> dict[str, Any]:
    scores, there = run.scores or {}, run.run.get("environment", {})
    known = published_of(run)
    return {
        "checkpoint": run.checkpoint,
        "benchmark": run.benchmark,
        "plan": run.plan,
        "variant": variant,
        **{k: scores.get(k) for k in ("metric", "value", "low", "high", "n", "n_missing")},
        "dialect": scores.get("dialect"),
        "tera_flops": run.tera_flops,
        "milliseconds": run.milliseconds,
        "questions_per_second": run.rate,
        "first_token_ms": run.run["speed"]["first_token_ms"],
        "kept_tokens": [list(each) for each in run.kept],
        "published": known.scores.get(column(run)) if known else None,
        "run_id": run.run["run_id"],
        **{key: there.get(key) for key in ("commit", "torch", "transformers")},
        "hardware": run.hardware,
        "path": str(run.path),
    }
