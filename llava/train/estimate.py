"""``llava train --estimate``: memory and time of a training command, before it starts.

Special here: one forward and backward pass of the command's model is made without storage, and
what is alive is added up (`llava.train.estimate_forward`); weights, gradients and optimizer states
are counted from the parameters that are trained, as the ranks share them
(`llava.train.estimate_state`). What is not counted is said: the allocator's waste, the libraries'
own memory, kernels' workspaces.

Time needs a rate: ``--peak_tflops`` with ``--mfu``, or ``--bench``, a file of ``llava bench train
--json`` from the same kind of device. Without one there are FLOPs only.

    llava train --estimate --world_size 8 --deepspeed scripts/zero3.json --bf16 True \\
        --model_name_or_path vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336 \\
        --layer_list "[8,16,24]" --image_token_ratio_list "[0.5,0.25,0.125]" \\
        --per_device_train_batch_size 16 --gradient_checkpointing True --model_max_length 2048
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from llava.reduction.flops import TERA
from llava.reduction.plan import resolve_plan
from llava.train.arguments import parse_args
from llava.train.dual_speed import DualSpeed, dual_speed_of
from llava.train.estimate_forward import (
    Command,
    Sample,
    activation_rows,
    batch_of,
    fake_model,
    kept_of,
    micro_batch,
    samples_of,
)
from llava.train.estimate_state import Engine, Row, buffer_bytes, state_rows
from llava.train.parts import part_of
from llava.train.setup import check_plan, check_vision
from llava.train.telemetry import GIB, BatchCost
from llava.utils import Ranks, json_dump, user_errors


def read_command(argv: Sequence[str], ranks: int) -> Command:
    """Parse a training command line. ValueError, in training's words, for all that it refuses
    without a started run: flags, plan and sizes; files of weights and data need not be there."""
    model, data, flags = parse_args(argv, prepared=False)
    check_plan(model)
    check_vision(model, data, flags, with_weights=False)
    return Command(model, data, flags, Engine.of(flags, ranks))


# ------------------------------------------------------------------------------------------ time
@dataclass(frozen=True)
class Rate:
    """FLOP/s that one device is taken to reach, and where that comes from. of_run: it is a whole
    run's, over the language model's FLOPs alone (as training's `mfu`); else that of the operations
    themselves, all of which are counted then."""

    flops: float
    source: str
    of_run: bool


def rate_of(peak_tflops: float | None, mfu: float | None, bench: str | None) -> Rate | None:
    """The rate that the flags give, None without one. ValueError for a peak without an MFU or the
    other way round, an MFU outside (0, 1], or a file that is not of ``llava bench train``."""
    if bench is not None:
        try:
            found = json.loads(Path(bench).read_text(encoding="utf-8"))
            tflops, ms = found["tflops"]["packed_plan"], found["packed_plan_ms"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--bench {bench}: no file of llava bench train --json") from error
        return Rate(tflops * TERA / ms * 1e3, f"{found['preset']} on {found['device']}", False)
    if mfu is None:
        return None
    if peak_tflops is None:
        raise ValueError(f"--mfu {mfu} needs --peak_tflops, the peak of one device")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu}; accepted: above 0, up to 1")
    return Rate(peak_tflops * TERA * mfu, f"{mfu:.0%} of {peak_tflops:g} TFLOP/s", True)


def time_of(
    model: Any,
    command: Command,
    sample: Sample,
    rate: Rate | None,
    dual: DualSpeed | None = None,
) -> dict[str, Any]:
    """FLOPs of a sample (`BatchCost`), and seconds of a step of all ranks at `rate`. dual: the
    figures are the mean over its steps, those of either kind stand beside it."""
    cost = BatchCost.of_model(model, command.checkpointing)
    layout = batch_of(model, sample, 1, dual and dual.plan)["splice"].layout
    micro = micro_batch(command, sample) * int(command.flags.gradient_accumulation_steps)

    def figures(cost: BatchCost) -> dict[str, float]:
        work = cost.work(layout, sample.pictures * sample.tiles)
        found = {
            "tokens_a_sample": work.tokens_in,
            "computed_tokens_a_sample": work.tokens_computed,
            "tflops_a_sample": work.flops / TERA,
            "recomputed_tflops_a_sample": work.again_flops / TERA,
            "tower_tflops_a_sample": work.tower_flops / TERA,
        }
        if rate is not None:
            rest = 0.0 if rate.of_run else work.again_flops + work.tower_flops
            found["seconds_a_step"] = micro * (work.flops + rest) / rate.flops
        return found

    known: dict[str, Any] = {"samples_a_step": micro * command.engine.ranks}
    known |= {} if rate is None else {"rate": rate.source}
    if dual is None:
        return known | figures(cost)
    fast, slow = (figures(each.cost(cost, 0)) for each in both_speeds(dual))
    mean = {key: (1 - dual.share) * fast[key] + dual.share * slow[key] for key in fast}
    return known | mean | {"slow_share": dual.share, "fast": fast, "slow": slow}


# ---------------------------------------------------------------------------------------- report
@dataclass
class Estimate:
    """All figures of a command. batches, slow: what a micro-batch of each of `samples` adds; `slow`
    in a slow step of two speeds, empty for one."""

    engine: str
    ranks: int
    parameters: dict[str, int]
    trained: dict[str, int]
    plan: str
    checkpointing: bool
    rows: list[Row]
    samples: dict[str, Sample]
    micro_batch: dict[str, int]
    batches: dict[str, list[Row]]
    slow: dict[str, list[Row]] = field(default_factory=dict)
    time: dict[str, Any] = field(default_factory=dict)

    def total(self, sample: str, slow: bool = False) -> Row:
        """What one rank needs at the fullest moment of a backward pass."""
        rows = [*self.rows, *(self.slow if slow else self.batches)[sample]]
        return Row("total", sum(r.device for r in rows), sum(r.host for r in rows))

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes, in bytes."""
        found = dataclasses.asdict(self)
        for key, batches in (("total", self.batches), ("slow_total", self.slow)):
            totals = {name: self.total(name, batches is self.slow) for name in batches}
            found[key] = {name: dataclasses.asdict(row) for name, row in totals.items()}
        return found


def both_speeds(dual: DualSpeed) -> tuple[DualSpeed, DualSpeed]:
    """The same with fast steps alone, and with slow ones alone."""
    return dataclasses.replace(dual, share=0.0), dataclasses.replace(dual, share=1.0)


def estimate(
    command: Command, *, text: int = 200, pictures: int = 1, rate: Rate | None = None
) -> Estimate:
    """The figures of a command; see the module's docstring. Samples have `text` tokens of text and,
    where there is a tower, `pictures` pictures."""
    engine, flags = command.engine, command.flags
    checkpointing = command.checkpointing
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(command)
        dual = dual_speed_of(model, command.model, flags)
        fast, slow = (None, None) if dual is None else both_speeds(dual)
        counts: dict[str, dict[str, int]] = {"all": {}, "trained": {}}
        for name, parameter in model.named_parameters():
            for key in ("all", *(["trained"] if parameter.requires_grad else [])):
                part = part_of(name)
                counts[key][part] = counts[key].get(part, 0) + parameter.numel()
        usual, longest = samples_of(model, command, text, pictures)
        found = time_of(model, command, usual, rate, dual)
        samples = {"usual": usual, "longest": longest}
        kept = {name: kept_of(model, command, each, fast) for name, each in samples.items()}
        slow_kept = {
            name: kept_of(model, command, each, slow) for name, each in samples.items() if slow
        }
        rows = state_rows(model, engine, flags, kept["usual"].used)
        rows.append(Row("buffers, about", buffer_bytes(model, engine, checkpointing)))
    return Estimate(
        engine=engine.name,
        ranks=engine.ranks,
        parameters=counts["all"],
        trained=counts["trained"],
        plan=str(dual.plan if dual else resolve_plan(None, model.config)[0]),
        checkpointing=checkpointing,
        rows=rows,
        samples=samples,
        micro_batch={name: micro_batch(command, sample) for name, sample in samples.items()},
        batches={name: activation_rows(each, checkpointing) for name, each in kept.items()},
        slow={name: activation_rows(each, checkpointing) for name, each in slow_kept.items()},
        time=found,
    )


def format_estimate(found: Estimate) -> str:
    """The table that a terminal shows."""
    trained = ", ".join(f"{part} {count:,}" for part, count in found.trained.items())
    usual, longest = found.samples["usual"], found.samples["longest"]
    samples, most = found.micro_batch["usual"], found.micro_batch["longest"]
    batch = f"{samples}" if samples == most else f"{samples} (of the longest {most})"
    lines = [
        f"{sum(found.parameters.values()):,} parameters; trained: {trained}",
        f"plan: {found.plan}",
        f"one of {found.ranks} rank(s), {found.engine}; {batch} samples in a micro-batch, "
        f"checkpointing {'on' if found.checkpointing else 'off'}",
        "",
        f"{'GiB':<34}{f'{usual.tokens} tokens':>14}{f'{longest.tokens} tokens':>14}"
        + (f"{'host':>10}" if any(row.host for row in found.rows) else ""),
    ]
    for row in found.rows:
        lines.append(_line(row.name, row.device, row.device, row.host))
    lines += _batch_lines(found, slow=False)
    if found.slow:
        lines.append("a slow step, on all tokens and with a teacher, in place of these:")
        lines += _batch_lines(found, slow=True)
    lines += [
        f"A sample: {usual.visual} visual and {usual.text} text tokens, all text learned; the "
        "second column: every sample as long as --model_max_length.",
        "Not counted: the allocator's waste, workspaces of kernels, the libraries' own memory.",
    ]
    return "\n".join([*lines, "", *_time_lines(found.time)])


def _batch_lines(found: Estimate, slow: bool) -> list[str]:
    """What a micro-batch adds, and the sum with what is always there."""
    batches = found.slow if slow else found.batches
    lines = [
        _line(one.name, one.device, other.device, 0)
        for one, other in zip(batches["usual"], batches["longest"], strict=True)
    ]
    totals = [found.total(name, slow) for name in ("usual", "longest")]
    return [*lines, _line("total", totals[0].device, totals[1].device, totals[0].host)]


def _line(name: str, usual: int, longest: int, host: int) -> str:
    return f"{name:<34}{usual / GIB:>14.3f}{longest / GIB:>14.3f}" + (
        f"{host / GIB:>10.3f}" if host else ""
    )


def _time_lines(time: dict[str, Any]) -> list[str]:
    kinds = {"a sample": time}
    if "slow" in time:
        kinds = {
            "a sample of a fast step": time["fast"],
            f"of a slow one ({time['slow_share']:.0%})": time["slow"],
            "on average": time,
        }
    lines = [
        f"{name}: {each['tokens_a_sample']:.0f} tokens, {each['computed_tokens_a_sample']:.0f} "
        f"computed, {each['tflops_a_sample']:.4g} TFLOP (+ {each['recomputed_tflops_a_sample']:.4g}"
        f" computed again, {each['tower_tflops_a_sample']:.4g} tower and projector)"
        for name, each in kinds.items()
    ]
    if "seconds_a_step" not in time:
        return [*lines, "no time: give --peak_tflops and --mfu, or --bench FILE"]
    seconds, per_step = time["seconds_a_step"], time["samples_a_step"]
    sides = ""
    if "slow" in time:
        fast, slow = (time[kind]["seconds_a_step"] for kind in ("fast", "slow"))
        sides = f" on average (fast {fast:.3g} s, slow {slow:.3g} s)"
    lines.append(
        f"a step of {per_step} samples: {seconds:.3g} s{sides} at {time['rate']}; "
        f"{seconds / per_step * 1e6 / 3600:.3g} h for a million samples"
    )
    return lines


# ----------------------------------------------------------------------------------- command line
def wanted(argv: Sequence[str]) -> bool:
    """Whether a training command asks for its estimate instead."""
    words = [*argv, ""]
    return any(
        word == "--estimate=True"
        or (word == "--estimate" and words[at + 1].lower() not in ("false", "0", "no"))
        for at, word in enumerate(argv)
    )


def own_parser() -> argparse.ArgumentParser:
    """The flags beside those of training."""
    parser = argparse.ArgumentParser(
        prog="llava train --estimate",
        description="Memory and time of a training command from its config alone; all flags of "
        "training are accepted beside these.",
        allow_abbrev=False,
    )
    parser.add_argument("--estimate", nargs="?", const="True", help=argparse.SUPPRESS)
    parser.add_argument("--world_size", type=int, help="ranks (default: of the environment, or 1)")
    parser.add_argument("--text_tokens", type=int, default=200, help="a sample's (default 200)")
    parser.add_argument("--pictures", type=int, default=1, help="a sample's (default 1)")
    parser.add_argument(
        "--mfu", type=float, help="share of --peak_tflops that is reached, e.g. 0.4"
    )
    parser.add_argument("--bench", metavar="FILE", help="of llava bench train --json: its rate")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too, in bytes")
    return parser


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava train --estimate``: see the module's docstring."""
    own, rest = own_parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
    for name, least in (("world_size", 1), ("text_tokens", 1), ("pictures", 0)):
        value = getattr(own, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}; accepted: {least} or more")
    ranks = own.world_size or Ranks.from_environment().world
    transformers.utils.logging.set_verbosity_error()  # a plain Llama config becomes a LLaVA config
    command = read_command(rest, ranks)
    rate = rate_of(command.flags.peak_tflops, own.mfu, own.bench)
    found = estimate(command, text=own.text_tokens, pictures=own.pictures, rate=rate)
    sys.stdout.write(format_estimate(found) + "\n")
    if own.json:
        json_dump(own.json, found.to_dict())


if __name__ == "__main__":
    main()
