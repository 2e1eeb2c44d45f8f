"""`llava eval NAME ...`: answer benchmarks with a checkpoint and score them.

    llava eval digits --model-path checkpoints/digits --reduction \\
        "pyramiddrop:layers=[2,4,6],ratios=[0.5,0.25,0.125]" --json scores.json

Each run has a folder `results/<benchmark>/<run>/` with `run.json` (settings, versions, hash of the
question file), `answers.jsonl` and `scores.json` (with a score a question); the same settings give
the same folder. Accuracies are in per cent with a 95 % interval. `digits` means all digits sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.conversation import resolve_conv_mode
from llava.decoding import Decoding
from llava.eval.answer import (
    add_model_flags,
    answer_questions,
    decoding_from_flags,
    load_from_flags,
    write_answers,
)
from llava.eval.benchmarks import DATA_ROOT, LoadedBenchmark, load_benchmark, resolve_names
from llava.eval.questions import check_images_exist
from llava.eval.scorers import Scores
from llava.reduction import ReductionPlan, resolve_plan
from llava.reduction.flags import plan_from_args
from llava.utils import environment, get_logger, json_dump, user_errors

log = get_logger(__name__)


@dataclass(frozen=True)
class Result:
    """One benchmark answered with one plan: `row` is the line for tables and JSON."""

    row: dict[str, Any]
    answers: list[dict[str, Any]]
    scores: Scores
    settings: dict[str, Any]


def evaluate(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    loaded: LoadedBenchmark,
    *,
    reduction: ReductionPlan | str | dict | None = None,
    conv_mode: str | None = None,
    batch_size: int = 8,
    decoding: Decoding | None = None,
    blind: bool = False,
    model_id: str = "",
) -> Result:
    """Answer a loaded benchmark and score it. Raises what `answer_questions` raises.

    `row` has checkpoint, plan ("none" for no dropping), plan_source, blind, set, accuracy, low,
    high (per cent), n, n_missing and questions_per_second.
    """
    name = loaded.benchmark.name
    plan, source = resolve_plan(reduction, model.config)
    decoding = decoding or Decoding(loaded.benchmark.max_new_tokens)
    start = time.perf_counter()
    answers = answer_questions(
        model,
        tokenizer,
        image_processor,
        loaded.questions,
        image_folder=loaded.image_folder,
        conv_mode=conv_mode,
        reduction=reduction,
        batch_size=batch_size,
        decoding=decoding,
        blind=blind,
        model_id=model_id,
        desc=f"{name} {'blind ' * blind}{_method(str(plan))}",
    )
    seconds = time.perf_counter() - start
    scores = loaded.score(answers)
    row = {
        "checkpoint": model_id,
        "plan": str(plan),
        "plan_source": source,
        "blind": blind,
        "set": name,
        "accuracy": scores.value,
        "low": scores.low,
        "high": scores.high,
        "n": scores.n,
        "n_missing": scores.n_missing,
        "questions_per_second": scores.n / seconds if seconds else None,
    }
    settings = {
        "benchmark": name,
        "checkpoint": model_id,
        "plan": str(plan),
        "plan_source": source,
        "conv_mode": resolve_conv_mode(conv_mode, model.config)[0],
        "decoding": asdict(decoding),
        "blind": blind,
        "n": scores.n,
        "questions_sha256": hashlib.sha256(loaded.question_file.read_bytes()).hexdigest(),
    }
    return Result(row, answers, scores, settings)


def _method(plan: str) -> str:
    """The method's name in a plan's line."""
    return "plan" if plan.startswith("{") else plan.split(":")[0]


def run_name(settings: dict[str, Any]) -> str:
    """Folder name of a run: checkpoint, method and a hash of all settings."""
    digest = hashlib.sha1(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    method = _method(settings["plan"]) + "-blind" * settings["blind"]
    return re.sub(r"[^\w.-]+", "_", f"{settings['checkpoint']}-{method}-{digest}")


def save_run(result: Result, root: str | Path, model_path: str | Path = "") -> Path:
    """Write a run's folder below `root` and return it; `scores.json` is written last.

    model_path: where the checkpoint is, so that two of one name are two runs.
    """
    settings = {**result.settings, "model_path": str(model_path and Path(model_path).resolve())}
    folder = Path(root) / settings["benchmark"] / run_name(settings)
    json_dump(folder / "run.json", {**settings, "environment": environment()})
    write_answers(folder / "answers.jsonl", result.answers)
    json_dump(folder / "scores.json", asdict(result.scores))
    return folder


def parser() -> argparse.ArgumentParser:
    """The command line of `llava eval`."""
    flags = argparse.ArgumentParser(prog="llava eval", description="Run and score benchmarks.")
    flags.add_argument("benchmarks", nargs="+", metavar="NAME", help="benchmark, or `digits`")
    add_model_flags(flags)
    flags.add_argument("--max_new_tokens", type=int, help="default: the benchmark's own")
    flags.add_argument("--limit", type=int, help="about so many questions of each, evenly spaced")
    flags.add_argument("--data-root", default=str(DATA_ROOT))
    flags.add_argument("--results", default="results", help="folder of the runs")
    flags.add_argument("--json", metavar="FILE", help="write the rows there as well")
    flags.set_defaults(batch_size=32)
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint on the named benchmarks."""
    args = parser().parse_args(argv)
    # Everything that can be wrong with the input is looked at before the model is loaded.
    plan = plan_from_args(args)
    names = resolve_names(args.benchmarks)
    sets = [load_benchmark(name, args.data_root, args.limit) for name in names]
    own = args.max_new_tokens is None
    decodings = [
        decoding_from_flags(args, s.benchmark.max_new_tokens if own else args.max_new_tokens)
        for s in sets
    ]
    for loaded in sets:
        check_images_exist(loaded.questions, loaded.image_folder)
    tokenizer, model, image_processor, name = load_from_flags(args)
    rows = []
    for loaded, decoding in zip(sets, decodings, strict=True):
        result = evaluate(
            model,
            tokenizer,
            image_processor,
            loaded,
            reduction=plan,
            conv_mode=args.conv_mode,
            batch_size=args.batch_size,
            decoding=decoding,
            blind=args.blind,
            model_id=name,
        )
        log.info("wrote %s", save_run(result, args.results, args.model_path))
        rows.append(result.row)
        sys.stdout.write(format_row(result.row) + "\n")
        sys.stdout.flush()
    if args.json:
        json_dump(args.json, {"rows": rows, "environment": environment()})
    return 0


def format_row(row: dict[str, Any]) -> str:
    """One line: set, plan and where it came from, accuracy with its interval, n."""
    plan = f"{row['plan']} ({row['plan_source']}){', blind' if row['blind'] else ''}"
    return (
        f"{row['set']:<16} {row['accuracy']:6.2f} % [{row['low']:.2f}, {row['high']:.2f}] "
        f"n={row['n']}  {plan}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
