"""Everything that needs a GPU, in at most ten minutes: one table, one JSON.

    bash scripts/gpu_check.sh                 # what a user runs; this file does the work
    python tests/gpu/gpu_check.py --dry-run   # the commands

Each row is a process of its own with a time limit, so that one that hangs or breaks the device
takes nothing with it. A row passes, fails, or is left out with its reason (one GPU, no flash-attn,
too little memory); a row that the time did not suffice for has failed. Nothing is downloaded:
weights are random, recorded cases come from tests/data.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.utils import json_dump, user_errors

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 10.0
ROWS_FILE = "tests/gpu/rows.py"
GOOD = ("pass", "skip")


@dataclass(frozen=True)
class Row:
    """A name, its command (FILE stands for the row's JSON), its limit in seconds, the GPUs it
    needs and variables of its environment."""

    name: str
    command: tuple[str, ...]
    seconds: float
    gpus: int = 1
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """status: pass, fail, skip. detail: the last line, or why not. found: the row's JSON."""

    row: str
    status: str
    seconds: float
    detail: str
    found: dict[str, Any]


def inside(name: str, seconds: float, gpus: int = 1) -> Row:
    return Row(name, (sys.executable, ROWS_FILE, name, "--json", "FILE"), seconds, gpus)


def recorded(name: str, folders: Sequence[str], backends: str, seconds: float) -> Row:
    command = (sys.executable, "tests/parity/reference_cases.py", *folders)
    env = {"LLAVA_TEST_DEVICE": "cuda", "LLAVA_TEST_BACKENDS": backends}
    return Row(name, command, seconds, env=env)


def bench(preset: str, seconds: float) -> Row:
    command = (
        sys.executable, "-m", "llava.cli", "bench", "--preset", preset, "--device", "cuda",
        "--repeats", "3", "--parts", "vision,prefill,decode", "--json", "FILE",
    )  # fmt: skip
    return Row(f"bench {preset}", command, seconds)


def plan_of_work() -> list[Row]:
    """All rows, what matters most first."""
    data = ROOT / "tests" / "data"
    methods = sorted(f"tests/data/{each.name}" for each in data.iterdir() if each.name != "eval")
    one = ["tests/data/pyramiddrop/b_infer_b1_sdpa"]
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/unit", "tests/parity")
    return [
        inside("environment", 60),
        recorded("cases float32", methods, "eager,sdpa", 150),
        inside("cases-half", 60),
        inside("backends", 60),
        inside("half", 60),
        inside("generation", 60),
        inside("training", 60),
        inside("sync-free", 40),
        Row("pytest -m gpu", pytest, 60),
        inside("generate-7b", 60),
        inside("train-7b", 60),
        bench("llava-1.5-7b", 75),
        bench("llava-next-7b", 90),
        inside("device-map", 45, gpus=2),
        inside("zero2", 90, gpus=2),
        inside("zero3", 90, gpus=2),
        inside("flex", 90),
        recorded("cases flex", one, "flex_attention", 90),
    ]


def run_row(row: Row, gpus: int, seconds: float) -> Result:
    """Run one row with at most `seconds`."""
    if gpus < row.gpus:
        return Result(row.name, "skip", 0.0, f"needs {row.gpus} GPUs, there is {gpus}", {})
    if seconds < 5:
        return Result(row.name, "fail", 0.0, "not run: the time was used up", {})
    limit = min(row.seconds, seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        words = [str(file) if word == "FILE" else word for word in row.command]
        start = time.monotonic()
        code, output = run_limited(words, row.env, limit)
        taken = time.monotonic() - start
        found = json.loads(file.read_text()) if file.is_file() else {}
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    detail = lines[-1] if lines else ""
    if code is None:
        return Result(row.name, "fail", taken, f"not done after {limit:.0f} s; {detail}", found)
    if code == 0 and "skipped" in found:
        return Result(row.name, "skip", taken, str(found["skipped"]), found)
    return Result(row.name, "pass" if code == 0 else "fail", taken, detail, found)


def run_limited(words: Sequence[str], env: dict[str, str], limit: float) -> tuple[int | None, str]:
    """(exit status, output); None when the limit was reached, and all its processes are gone."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **env}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            words, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        out.seek(0)
        return code, out.read()


def check(
    rows: Sequence[Row], gpus: int | None, minutes: float, tell: Callable[[Result], None]
) -> Iterator[Result]:
    """Run rows until the time is used up. gpus: None takes it from the first row's findings."""
    end = time.monotonic() + 60 * minutes
    for row in rows:
        result = run_row(row, row.gpus if gpus is None else gpus, end - time.monotonic())
        if gpus is None:
            gpus = int(result.found.get("gpus", 0))
        tell(result)
        yield result
        if gpus == 0:
            return


def line(result: Result) -> str:
    """One line of the table."""
    detail = result.detail if len(result.detail) <= 90 else result.detail[:87] + "..."
    return f"{result.row:<20} {result.status:<5} {result.seconds:>6.1f} s  {detail}"


def where(results: Sequence[Result]) -> Path:
    """docs/benchmarks/gpu_check_<GPU>.json"""
    names = results[0].found.get("names") or ["none"]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", names[0]).strip("-")
    return ROOT / "docs" / "benchmarks" / f"gpu_check_{slug}.json"


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing failed; 1: something did; 2: there is no GPU that torch can use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--json", metavar="FILE", help="default docs/benchmarks/gpu_check_GPU.json")
    args = parser.parse_args(argv)
    rows = plan_of_work()
    if args.dry_run:
        for row in rows:
            variables = [f"{name}={value}" for name, value in row.env.items()]
            sys.stdout.write(shlex.join([*variables, *row.command]) + "\n")
        return 0

    def tell(result: Result) -> None:
        sys.stdout.write(line(result) + "\n")
        sys.stdout.flush()

    results = list(check(rows, None, MINUTES, tell))
    if not results[0].found.get("gpus"):
        sys.stderr.write("error: torch finds no NVIDIA GPU here; nothing was checked\n")
        return 2
    failed = [result.row for result in results if result.status not in GOOD]
    summary = {
        "passed": not failed,
        "failed": failed,
        "environment": results[0].found,
        "rows": [asdict(result) for result in results],
    }
    file = Path(args.json) if args.json else where(results)
    json_dump(file, summary)
    seconds = sum(result.seconds for result in results)
    sys.stdout.write(f"\n{len(results)} rows in {seconds:.0f} s, {len(failed)} failed; {file}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
