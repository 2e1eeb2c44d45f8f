"""``llava quickstart``: data, accuracy, FLOPs and speed of the shipped checkpoints on one page.

Special here: this module alone joins `llava.digits` (which builds the data) and `llava.eval` (which
answers and measures). It prints one table and writes ``summary.json`` and ``index.html``; how many
questions are asked follows from the machine's speed, so that it ends within a few minutes.
``bash scripts/quickstart.sh`` sets up an environment and runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.utils import environment, get_logger, json_dump, set_seed, user_errors

log = get_logger(__name__)

CHECKPOINTS = ("checkpoints/llava-digits", "checkpoints/llava-digits-pdrop")
MINUTES = 4.4
"""Time for everything: questions are asked in what loading, times and the bench have left of it."""
LEAST = 0.75
"""... but for so many minutes at least."""
EFFICIENCY = 0.75
"""What several processes answer, as a share of so many times what one does."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava quickstart``."""
    parser = argparse.ArgumentParser(
        prog="llava quickstart",
        description="Evaluate the shipped checkpoints with and without dropping visual tokens.",
    )
    parser.add_argument(
        "--checkpoints", nargs="+", default=list(CHECKPOINTS), metavar="FOLDER",
        help="default: the two shipped ones",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="playground/data", help="where the digits data goes (default %(default)s)"
    )
    parser.add_argument(
        "--out", default="results/quickstart", help="where the results go (default %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="questions of each set (default: by speed)")
    parser.add_argument("--full", action="store_true", help="all questions")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="questions answered together (default 64)"
    )
    parser.add_argument(
        "--workers", type=int, default=cpus(), help="processes that answer (default: all CPUs)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs a plan (default %(default)s)"
    )
    parser.add_argument("--no-bench", action="store_true", help="leave out llava bench cpu-512")
    parser.add_argument("--json", metavar="FILE", help="write the summary there too")
    return parser


def cpus() -> int:
    """CPUs this process may use, at most 8 (each worker holds both models)."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return min(8, len(usable))


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for numbers that cannot be, FileNotFoundError for missing checkpoints."""
    for name in ("limit", "batch_size", "workers", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}; accepted: 1 or more")
    for folder in args.checkpoints:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(
                f"no checkpoint in {folder}; the shipped ones are {' and '.join(CHECKPOINTS)} "
                "(run from the repository's root), scripts/digits/train.sh makes them"
            )


def build_data(data: Path) -> dict[str, Any]:
    """Build the evaluation sets where they are missing; facts of each set by benchmark name."""
    from llava.digits import build

    build.build_eval(data)
    index = json.loads((build.eval_root(data) / "index.json").read_text(encoding="utf-8"))
    return {f"digits_{name}": facts for name, facts in index.items()}


def choose_limit(rate: float, answers: int, minutes: float) -> int:
    """Questions a set so that `answers` of each take `minutes`: a multiple of 18, at least 36.

    18 is what POPE asks about one picture.
    """
    return max(36, int(rate * 60 * minutes / answers) // 18 * 18)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; the summary as a dict."""
    import torch

    from llava.eval import quickstart as measure
    from llava.eval.benchmarks import load_benchmark, resolve_names

    start = time.perf_counter()
    set_seed(0)
    log.info("data in %s", args.data)
    facts = build_data(Path(args.data))
    root = Path(args.data) / "eval"
    sets = [load_benchmark(name, root) for name in resolve_names(["digits"])]
    loaded = [measure.Checkpoint.load(folder) for folder in args.checkpoints]
    plans = measure.settings(measure.cut_layers(loaded), measure.typical(loaded[0], sets[0]))

    torch.set_num_threads(1)
    log.info("times of %d plans at batch 32, one thread", len(plans) - 1)
    times = [measure.times(one, sets[0], plans, repeats=args.repeats) for one in loaded]
    bench = None if args.no_bench else run_bench(args.repeats)
    left = max(LEAST, MINUTES - (time.perf_counter() - start) / 60)
    limit = None if args.full else args.limit or guess_limit(loaded[0], sets, plans, args, left)
    sets = [load_benchmark(one.benchmark.name, root, limit) for one in sets]
    log.info(
        "questions: %s", " ".join(f"{one.benchmark.name} {len(one.questions)}" for one in sets)
    )
    jobs = [
        measure.Job(folder, str(root), one.benchmark.name, plan, limit, args.batch_size)
        for folder in args.checkpoints
        for plan in plans
        for one in sets
    ]
    answered, share = measure.do_jobs(jobs, args.workers), len(plans) * len(sets)
    rows, compared = [], []
    for number, one in enumerate(loaded):
        mine = answered[number * share : (number + 1) * share]
        rows += measure.rows(one, sets, plans, mine, times[number])
        compared += measure.comparisons(one.name, plans, mine)
    shown = next(setting for setting in plans if setting.budget == 0.5)
    return {
        "rows": rows,
        "comparisons": compared,
        "sets": facts,
        "bench": bench,
        "examples": measure.examples(loaded[-1], sets, shown),
        "every_method": measure.every_method(
            loaded[-1],
            next(one for one in sets if one.benchmark.name == "digits_textvqa"),
            [setting for setting in plans if setting.budget == shown.budget],
        ),
        "timing_batch": 32,
        "full": limit is None,
        "run": {
            "checkpoints": ", ".join(args.checkpoints),
            "questions a set": "all" if limit is None else f"about {limit}",
            "processes": f"{args.workers} answering, 1 timing, one thread each",
            "seconds": round(time.perf_counter() - start, 1),
        },
        "environment": environment(),
    }


def guess_limit(
    checkpoint: Any,
    sets: Sequence[Any],
    plans: Sequence[Any],
    args: argparse.Namespace,
    minutes: float,
) -> int:
    """How many questions of each set this machine answers in time."""
    from llava.eval import quickstart as measure

    usual = next(setting for setting in plans if setting.budget == 0.5)
    rate = measure.questions_per_second(checkpoint, sets, usual, args.batch_size)
    rate *= args.workers * (EFFICIENCY if args.workers > 1 else 1.0)
    return choose_limit(rate, len(args.checkpoints) * len(plans) * len(sets), minutes)


def run_bench(repeats: int) -> dict[str, Any]:
    """``llava bench --preset cpu-512`` on one thread, vision left out."""
    from llava.eval import speed

    log.info("llava bench --preset cpu-512, one thread")
    words = ["--preset", "cpu-512", "--threads", "1", "--device", "cpu"]
    words += ["--parts", "prefill,decode,train", "--repeats", str(repeats)]
    return speed.bench(speed.build_parser().parse_args(words))


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava quickstart``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    from llava.eval import report

    summary = run(args)
    out = Path(args.out)
    json_dump(out / "summary.json", summary)
    report.write_page(summary, out / "index.html")
    if args.json:
        json_dump(args.json, summary)
    print(report.format_summary(summary))
    print(f"\nfigures: {out / 'summary.json'}\npage:    {out / 'index.html'}")


if __name__ == "__main__":
    main()
