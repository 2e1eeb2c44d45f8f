"""How fast a run was, beside what it could have been: the last line of every run.

Special here: each batch notes where its seconds went (waiting for pictures, tower, prefill up to
the first token, decoding) and the FLOPs it needed at best, sharing included. So two runs over the
same questions can be compared: measured speed-up against the ratio of their FLOPs, and the part of
the time that keeps them apart.

    101.2 questions/s, first token 143 ms (p90 210 ms), peak 0.43 GiB; 1.62x the run without a plan,
    FLOPs allow 2.10x, mostly lost in decode (0.80 s above that ideal)
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llava.reduction import StageFacts, flops
from llava.reduction.flops import ModelShape

PARTS = ("wait", "vision", "prefill", "decode")
"""Waiting for the host's part; tower and projector; to the first token; to the last."""


@dataclass
class Stopwatch:
    """Seconds by part of one batch, from a device that has nothing left to do at each mark."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def mark(self, part: str) -> None:
        """What happened since the last mark was this part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def batch_flops(
    shape: ModelShape,
    stages: Sequence[StageFacts],
    tiles: int,
    new_tokens: int,
    prefix: tuple[Sequence[StageFacts], Sequence[int], int] | None = None,
) -> int:
    """FLOPs of one batch: tower, projector, decoder over the prompts, and the new tokens.

    stages: of the whole prompts. new_tokens: decode steps of the batch, the first token included.
    prefix: stages of the common beginnings, the beginning of each prompt, and shared layers.
    """
    total = flops.tower_flops(shape, tiles)
    total += flops.projector_flops(shape, tiles * shape.patches)
    if prefix is None:
        total += flops.prefill_flops(shape, stages)
    else:
        total += flops.shared_prefill_flops(shape, stages, *prefix)
    steps = max(0, new_tokens - 1)
    # The cost of a step grows evenly, so the middle one stands for all.
    return total + steps * flops.decode_flops(shape, stages, (steps + 1) // 2 or 1)


def summarise(
    timings: Sequence[Mapping[str, Any]], world: int, baseline: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The figures of a run from its batches' timings.

    world: processes that answered. baseline: the same of a run without a plan, or None.
    """
    seconds = {part: sum(each["seconds"].get(part, 0.0) for each in timings) for part in PARTS}
    questions = sum(each["questions"] for each in timings)
    total = sum(seconds.values())
    first = [each["first_token_ms"] for each in timings for _ in range(each["questions"])]
    costs = [each["flops"] for each in timings]
    found: dict[str, Any] = {
        "questions": questions,
        "questions_per_second": questions * world / total if total else None,
        "first_token_ms": statistics.median(first) if first else None,
        "first_token_p90_ms": _percentile(first, 0.9) if first else None,
        "peak_bytes": max((each["peak_bytes"] for each in timings), default=0),
        "seconds": seconds,
        "tera_flops": None if None in costs else sum(costs) / 1e12,
        "world_size": world,
    }
    if baseline is not None:
        found |= compare(found, baseline)
    return found


def compare(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Speed-up over a baseline: measured, what FLOPs allow, and the part that keeps them apart;
    {} where one of them does not know its FLOPs."""
    if not run["tera_flops"] or not baseline["tera_flops"]:
        return {}
    ideal = baseline["tera_flops"] / run["tera_flops"]
    scale = run["questions"] / baseline["questions"]  # an interrupted baseline has fewer
    base = {part: scale * value for part, value in baseline["seconds"].items()}
    ideal *= scale
    total = sum(run["seconds"].values())
    missing = {part: run["seconds"][part] - base[part] / ideal for part in PARTS}
    part = max(missing, key=lambda name: missing[name])
    return {
        "speedup": sum(base.values()) / total if total else None,
        "ideal_speedup": ideal,
        "lost_in": part,
        "lost_seconds": missing[part],
    }


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def format_line(run: Mapping[str, Any]) -> str:
    """One line for the end of a run."""
    if not run["questions"] or run["questions_per_second"] is None:
        return "nothing was answered"
    text = (
        f"{run['questions_per_second']:.1f} questions/s, "
        f"first token {run['first_token_ms']:.0f} ms (p90 {run['first_token_p90_ms']:.0f} ms), "
        f"peak {run['peak_bytes'] / 2**30:.2f} GiB"
    )
    if run["world_size"] > 1:
        text += f", {run['world_size']} processes"
    if run.get("speedup") is None:
        part = max(PARTS, key=lambda name: run["seconds"][name])
        share = run["seconds"][part] / sum(run["seconds"].values())
        return f"{text}; most time in {part} ({share:.0%})"
    text += f"; {run['speedup']:.2f}x the run without a plan, FLOPs allow "
    text += f"{run['ideal_speedup']:.2f}x"
    if run["lost_seconds"] > 0:
        text += f", mostly lost in {run['lost_in']} ({run['lost_seconds']:.2f} s above that ideal)"
    return text
