"""`llava eval NAME ...`: answer benchmarks with a checkpoint and score them.

    llava eval digits --model-path checkpoints/digits --reduction \\
        "pyramiddrop:layers=[2,4,6],ratios=[0.5,0.25,0.125]" --json scores.json

Each run has a folder `results/<benchmark>/<run>/` with `run.json` (settings, versions, hash of the
question file, speed), `answers.jsonl` and `scores.json` (with a score a question); the same
settings give the same folder, so that a killed run goes on where it was. Under torchrun or Slurm
the processes share the work, and the last one scores. Accuracies are in per cent with a 95 %
interval. `digits` means all digits sets.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.decoding import Decoding
from llava.eval.answer import Answerer, answer_in_folder, finish
from llava.eval.benchmarks import (
    BENCHMARKS,
    DATA_ROOT,
    GROUPS,
    LoadedBenchmark,
    load_benchmark,
    resolve_names,
)
from llava.eval.flags import (
    add_model_flags,
    answerer_options,
    decoding_from_flags,
    load_from_flags,
    model_settings,
)
from llava.eval.questions import check_images_exist
from llava.eval.run_folder import Record, RunFolder, config_hash
from llava.eval.scorers import Scores, join_answers
from llava.eval.submit import export_answers
from llava.eval.throughput import format_line
from llava.reduction.flags import check_plan_flags, plan_for_model
from llava.utils import (
    Ranks,
    check_output,
    environment,
    file_sha256,
    get_logger,
    json_dump,
    user_errors,
)

log = get_logger(__name__)


@dataclass(frozen=True)
class Result:
    """One benchmark answered with one plan: `row` is the line for tables and JSON."""

    row: dict[str, Any]
    answers: list[Record]
    scores: Scores


def evaluate(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    loaded: LoadedBenchmark,
    *,
    decoding: Decoding | None = None,
    **settings: Any,
) -> Result:
    """Answer a loaded benchmark and score it, without a folder. settings: of `Answerer`; raises
    what it and its `answer_all` raise.

    `row` has checkpoint, plan ("none" for no dropping), plan_source, blind, set, metric (name of
    the headline), accuracy (its value: per cent, for MME points), low, high, n, n_missing and
    questions_per_second.
    """
    answerer = Answerer(
        model,
        tokenizer,
        image_processor,
        image_folder=loaded.image_folder,
        decoding=decoding or Decoding(loaded.benchmark.max_new_tokens),
        **settings,
    )
    start = time.perf_counter()
    answers = answerer.answer_all(loaded.questions, describe(loaded, answerer))
    seconds = time.perf_counter() - start
    scores = loaded.score(answers)
    rate = scores.n / seconds if seconds else None
    return Result(result_row(loaded, answerer, scores, rate), answers, scores)


def describe(loaded: LoadedBenchmark, answerer: Answerer) -> str:
    """What a progress bar says."""
    method = _method(str(answerer.plan))
    return f"{loaded.benchmark.name} {'blind ' * answerer.blind}{method}"


def result_row(
    loaded: LoadedBenchmark, answerer: Answerer, scores: Scores, rate: float | None
) -> dict[str, Any]:
    """The line of a benchmark for tables and JSON."""
    return {
        "checkpoint": answerer.model_id,
        "plan": str(answerer.plan),
        "plan_source": answerer.plan_source,
        "blind": answerer.blind,
        "set": loaded.benchmark.name,
        "metric": scores.metric,
        "accuracy": scores.value,
        "low": scores.low,
        "high": scores.high,
        "n": scores.n,
        "n_missing": scores.n_missing,
        "questions_per_second": rate,
    }


def _method(plan: str) -> str:
    """The method's name in a plan's line."""
    return "plan" if plan.startswith("{") else plan.split(":")[0]


def run_name(settings: Mapping[str, Any], checkpoint: str) -> str:
    """Folder name of a run: checkpoint, method and a hash of all settings."""
    method = _method(settings["plan"]) + "-blind" * settings["blind"]
    return re.sub(r"[^\w.-]+", "_", f"{checkpoint}-{method}-{config_hash(settings)[:8]}")


def run_in_folder(
    loaded: LoadedBenchmark,
    answerer: Answerer,
    ranks: Ranks,
    results: str | Path,
    weights: Mapping[str, Any],
    limit: int | None = None,
) -> tuple[RunFolder, dict[str, Any] | None]:
    """Answer what a benchmark's run still lacks and, once all is there, score it.

    weights: what identifies the model (`model_settings`). Returns the folder and the row, None as
    long as other processes have batches to answer, or for a set that only a server can score.
    """
    name = loaded.benchmark.name
    settings = {
        "benchmark": name,
        **answerer.settings(),
        **weights,
        "n": len(loaded.questions),
        "questions_sha256": file_sha256(loaded.question_file),
    }
    path = Path(results) / name / run_name(settings, answerer.model_id)
    folder = RunFolder(path, settings)
    notes = {"question_file": str(loaded.question_file), "limit": limit}
    what = describe(loaded, answerer)
    merged = answer_in_folder(answerer, folder, loaded.questions, ranks, desc=what, notes=notes)
    speed = finish(folder, merged, ranks)
    if speed is None:
        return folder, None
    log.info("%s: %s", path, format_line(speed))
    if loaded.benchmark.upload is not None and limit is None:
        data = loaded.question_file.parent
        given = join_answers(loaded.questions, merged.records)
        export_answers(loaded.benchmark.upload, loaded.questions, given, data, beside=path)
    if loaded.labels is None:
        how = "a judge (llava judge)" if loaded.benchmark.judged else "its server"
        log.info("%s: answered; it is scored by %s", name, how)
        return folder, None
    scores = loaded.score(merged.records)
    json_dump(path / "scores.json", asdict(scores))
    return folder, result_row(loaded, answerer, scores, speed["questions_per_second"])


def parser() -> argparse.ArgumentParser:
    """The command line of `llava eval`."""
    names = ", ".join(name for name in BENCHMARKS if name not in GROUPS["digits"])
    flags = argparse.ArgumentParser(
        prog="llava eval",
        description="Run and score benchmarks.",
        epilog=f"benchmarks: {names}; digits stands for {', '.join(GROUPS['digits'])}",
    )
    flags.add_argument("benchmarks", nargs="+", metavar="NAME", help="benchmark; all are below")
    add_model_flags(flags)
    flags.add_argument("--max_new_tokens", type=int, help="default: the benchmark's own")
    flags.add_argument("--limit", type=int, help="about so many questions of each, evenly spaced")
    flags.add_argument(
        "--data-root",
        default=str(DATA_ROOT),
        help="folder of the benchmarks (default playground/data/eval)",
    )
    flags.add_argument(
        "--results", default="results", help="folder of the runs (default %(default)s)"
    )
    flags.add_argument("--json", metavar="FILE", help="write the rows there as well")
    flags.set_defaults(batch_size=32)
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint on the named benchmarks."""
    args = parser().parse_args(argv)
    # Everything that can be wrong with the input is looked at before the model is loaded.
    check_plan_flags(args)  # a plan that cannot be read ends the run here
    ranks = Ranks.from_environment()
    names = resolve_names(args.benchmarks)
    sets = [load_benchmark(name, args.data_root, args.limit) for name in names]
    check_output(args.json, [loaded.question_file for loaded in sets])
    check_output(Path(args.results) / "run.json")
    own = args.max_new_tokens is None
    decodings = [
        decoding_from_flags(args, s.benchmark.max_new_tokens if own else args.max_new_tokens)
        for s in sets
    ]
    for loaded in sets:
        check_images_exist(loaded.questions, loaded.image_folder)
    tokenizer, model, image_processor, name = load_from_flags(args, ranks)
    weights, rows = model_settings(args), []
    for loaded, decoding in zip(sets, decodings, strict=True):
        answerer = Answerer(
            model,
            tokenizer,
            image_processor,
            model_id=name,
            image_folder=loaded.image_folder,
            decoding=decoding,
            reduction=plan_for_model(args, model.config),
            **answerer_options(args),
        )
        _, row = run_in_folder(loaded, answerer, ranks, args.results, weights, args.limit)
        if row is not None:
            rows.append(row)
            sys.stdout.write(format_row(row) + "\n")
            sys.stdout.flush()
    if args.json:
        json_dump(args.json, {"rows": rows, "environment": environment()})
    return 0


def format_row(row: dict[str, Any]) -> str:
    """One line: set, metric with its interval, n, plan and where it came from."""
    plan = f"{row['plan']} ({row['plan_source']}){', blind' if row['blind'] else ''}"
    bounds = f"[{row['low']:.2f}, {row['high']:.2f}]"
    score = f"{row['metric']} {row['accuracy']:.2f} {bounds}"
    return f"{row['set']:<16} {score} n={row['n']}  {plan}"


if __name__ == "__main__":
    raise SystemExit(main())
