"""The budget solver: which layers and shares keep a given number of visual tokens, or of FLOPs.

Special here: nothing is inverted by a formula. One number, the share λ that each cut keeps of the
tokens in front of it, makes a plan; `ReductionPlan.schedule` says what the plan leaves in each
layer, rounding included; and because more is left the larger λ is, bisection finds the largest λ
within the budget. So an answer is right for every method, its own rounding and its own layers.

*Average tokens* are the visual tokens of one sample, averaged over all decoder layers: what papers
call "192 / 128 / 64 tokens". PyramidDrop's own layers [8, 16, 24] of 32 cannot go below a quarter
of 576; its authors advise layers [2, 8, 16] for 64 (issues 10, 22 and 29 of their repository), and
so does this: where no layers are given, the latest of `LAYOUTS` is taken with which λ stays above
`LOWEST_SHARE`, a rule of thumb of ours.

    llava plan --method pyramiddrop --average-tokens 64
    llava plan --method fastv --visual-tmacs 1.78 --preset llava-1.5-7b
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from llava.reduction.flops import (
    PRESETS,
    ModelShape,
    Preset,
    cost,
    get_preset,
    stage_name,
    visual_counts,
    with_tokens,
)
from llava.reduction.forms import OneCut
from llava.reduction.plan import REDUCERS, Cut, ReductionPlan
from llava.utils import json_dump, user_errors

LAYOUTS: tuple[tuple[float, ...], ...] = ((1 / 4, 1 / 2, 3 / 4), (1 / 16, 1 / 4, 1 / 2),
                                          (1 / 32, 1 / 8, 1 / 4))  # fmt: skip
"""Where to cut, as shares of the depth, latest first: PyramidDrop's paper; its authors' advice for
small budgets; half of that."""
LOWEST_SHARE = 0.15
"""Below this the cuts of a layout keep so little of each other that earlier cuts are tried."""


# ----------------------------------------------------------------------------- what a plan comes to
@dataclass(frozen=True)
class Figures:
    """One sample of a preset under a plan. average_tokens: visual tokens, mean over the layers;
    final_tokens: visual tokens in the last layer; visual_tmacs: the papers' multiply-accumulates
    over visual tokens; full_tflops: 2 FLOPs a multiply-accumulate, text and head included."""

    average_tokens: float
    final_tokens: int
    visual_tmacs: float
    full_tflops: float
    kept_tokens: list[int]
    starts: list[int]


def figures(preset: Preset, plan: ReductionPlan) -> Figures:
    """What one sample of `preset` comes to. Raises ValueError if the plan does not fit."""
    shape, found = preset.shape, cost(preset, plan)
    counts = visual_counts(plan.schedule(preset.layout(1), shape.layers))
    return Figures(
        average_tokens=sum(counts) / shape.layers,
        final_tokens=counts[-1],
        visual_tmacs=found.visual_tmacs,
        full_tflops=found.full_tflops,
        kept_tokens=found.kept_tokens,
        starts=found.starts,
    )


@dataclass(frozen=True)
class Budget:
    """kind: a field of `Figures` that must not pass `value`."""

    kind: str
    value: float

    KINDS: ClassVar[dict[str, str]] = {
        "average_tokens": "visual tokens, averaged over the layers",
        "final_tokens": "visual tokens in the last layer",
        "visual_tmacs": "TMACs over visual tokens alone (the papers' convention)",
        "full_tflops": "TFLOPs of the prefill (text, causal attention, head)",
    }

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"budget {self.kind!r}; accepted: {', '.join(self.KINDS)}")
        if not (math.isfinite(self.value) and self.value >= 0):
            raise ValueError(f"a budget of {self.value}; accepted: a number from 0 on")

    def of(self, found: Figures) -> float:
        """The figure that the budget bounds."""
        return float(getattr(found, self.kind))

    def __str__(self) -> str:
        return f"{self.value:g} {self.KINDS[self.kind]}"


# ----------------------------------------------------------------------------- one number, one plan
METHODS = [name for name, method in REDUCERS.items() if hasattr(method, "from_shares")]
"""Methods that one share makes a plan of."""
Build = Callable[[Sequence[int], Sequence[float]], ReductionPlan]


@dataclass(frozen=True)
class Family:
    """How a method's plans look. layouts: layers to try for a model of that depth, latest first.
    build: the plan of some layers and the shares kept there. words: what λ is."""

    layouts: Callable[[int], list[tuple[int, ...]]]
    build: Build
    words: str = "the share of the tokens in front of it that each cut keeps"


def fractions_of(depth: int) -> list[tuple[int, ...]]:
    """`LAYOUTS` for a model of `depth` layers, each once."""
    found = [tuple(sorted({max(1, int(depth * share)) for share in layout})) for layout in LAYOUTS]
    return list(dict.fromkeys(found))


def family_of(method: str) -> Family:
    """The family of one of `METHODS`.

    Raises:
        ValueError: there is no such method, or it has no share.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not solved for; accepted: {', '.join(METHODS)}")

    chosen = REDUCERS[method]

    def build(layers: Sequence[int], ratios: Sequence[float]) -> ReductionPlan:
        parts = chosen.from_shares(layers, ratios)
        cuts = tuple(Cut(*pair) for pair in parts.cuts)
        return ReductionPlan(cuts, positions=chosen.positions, program=parts.program)

    if not hasattr(chosen, "budget"):  # a layer program: visual tokens in half of the layers
        return Family(
            layouts=lambda depth: [(max(1, depth // part),) for part in (2, 4)],
            build=build,
            words="the share of heads and neurons that visual tokens use below that layer",
        )
    if issubclass(chosen, OneCut):
        return Family(layouts=lambda depth: [(k,) for k in chosen.usual if k < depth], build=build)
    return Family(layouts=fractions_of, build=build)


def geometric(share: float, cuts: int) -> list[float]:
    """λ, λ², λ³ ...: the share of the original tokens that is left behind each of `cuts` cuts."""
    return [share**number for number in range(1, cuts + 1)]


# ----------------------------------------------------------------------------- search
@dataclass(frozen=True)
class Solution:
    """A plan within a budget. share: λ. exact `figures` of what it leaves."""

    plan: ReductionPlan
    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    share: float
    figures: Figures


def largest_within(value: Callable[[float], float], bound: float, steps: int = 60) -> float | None:
    """The largest share in [0, 1], to 2^-steps, whose `value` is at most `bound`; None if not even
    0 is. `value` must not fall when the share grows."""
    if value(0.0) > bound:
        return None
    if value(1.0) <= bound:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) <= bound else (low, middle)
    return low


def solve_layout(
    preset: Preset, family: Family, layers: Sequence[int], budget: Budget
) -> Solution | None:
    """The largest λ with cuts at `layers` within the budget; None where λ = 0 is too much."""

    def value(share: float) -> float:
        return budget.of(figures(preset, family.build(layers, geometric(share, len(layers)))))

    share = largest_within(value, budget.value)
    if share is None:
        return None
    ratios = shortest(preset, family, layers, geometric(share, len(layers)))
    plan = family.build(layers, ratios)
    return Solution(plan, tuple(layers), tuple(ratios), share, figures(preset, plan))


def shortest(
    preset: Preset, family: Family, layers: Sequence[int], ratios: Sequence[float]
) -> list[float]:
    """The ratios with the fewest decimals that come to the same."""

    def kept(candidates: Sequence[float]) -> Figures:
        return figures(preset, family.build(layers, candidates))

    wanted, found = kept(ratios), list(ratios)
    for index, ratio in enumerate(ratios):
        for candidate in rounded(ratio):
            trial = [*found[:index], candidate, *found[index + 1 :]]
            if sorted(trial, reverse=True) == trial and kept(trial) == wanted:
                found = trial
                break
    return found


def rounded(ratio: float) -> Iterator[float]:
    """`ratio` with 1, 2, 3 ... decimals, the nearest first, then the one above or below."""
    for digits in range(1, 10):
        near = round(ratio, digits)
        other = near + math.copysign(10**-digits, ratio - near)
        yield from (near, min(1.0, max(0.0, round(other, digits))))


def solve(
    preset: Preset, method: str, budget: Budget, layers: Sequence[int] | None = None
) -> tuple[Solution, list[Solution]]:
    """The plan of `method` that comes nearest to the budget from below, and what the other layouts
    would give.

    layers: where to cut; without it the latest layout is taken with which λ stays above
    `LOWEST_SHARE` (where none does, the one with the largest λ).

    Raises:
        ValueError: an unknown method, layers that do not fit, or a budget that cannot be met or
            that needs no cut; the message has the range that can be reached.
    """
    family, depth = family_of(method), preset.shape.layers
    layouts = family.layouts(depth) if layers is None else [tuple(layers)]
    whole = budget.of(figures(preset, ReductionPlan()))
    least = [
        budget.of(figures(preset, family.build(layout, [0.0] * len(layout)))) for layout in layouts
    ]
    if budget.value > whole or budget.value < min(least):
        where = "" if layers is None else f" and cuts at {list(layers)}"
        raise ValueError(
            f"{budget} cannot be met by {method}{where}: it reaches {min(least):.4g} to {whole:.4g}"
            + _advice(preset, family, budget, layouts)
        )
    solved = [solve_layout(preset, family, layout, budget) for layout in layouts]
    found = [solution for solution in solved if solution is not None]
    comfortable = [solution for solution in found if solution.share >= LOWEST_SHARE]
    best = comfortable[0] if comfortable else max(found, key=lambda solution: solution.share)
    return best, [solution for solution in found if solution is not best]


def _advice(
    preset: Preset, family: Family, budget: Budget, tried: Sequence[tuple[int, ...]]
) -> str:
    """Which other layers would reach the budget, as the end of an error message."""
    for layout in family.layouts(preset.shape.layers):
        if layout not in tried and solve_layout(preset, family, layout, budget):
            return f"; cuts at {list(layout)} reach it"
    return ""


# ----------------------------------------------------------------------------- model of the flags
def preset_from_config(path: str | Path) -> Preset:
    """The preset of a checkpoint, from its config.json alone.

    Raises:
        FileNotFoundError: no config.json there.
        ValueError: it lacks what a decoder's shape needs.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    data = json.loads(file.read_text(encoding="utf-8"))
    tower = data.get("mm_vision_config")
    try:
        shape = ModelShape.from_config(
            SimpleNamespace(**data), SimpleNamespace(**tower) if tower else None
        )
    except AttributeError as error:
        raise ValueError(f"{file} is no config of a LLaVA decoder: {error}") from None
    return Preset(shape, 35, shape.patches, 25, "none")


def preset_of(args: argparse.Namespace) -> Preset:
    """The model that the flags describe."""
    preset = preset_from_config(args.model_path) if args.model_path else get_preset(args.preset)
    if args.layers is not None:
        if args.layers < 1:
            raise ValueError(f"--layers {args.layers}; accepted: 1 or more")
        preset = replace(preset, shape=replace(preset.shape, layers=args.layers))
    return with_tokens(preset, args.visual_tokens, args.text_tokens)


def budget_of(args: argparse.Namespace) -> Budget:
    """The one budget that the flags ask for."""
    for kind in Budget.KINDS:
        if (value := getattr(args, kind)) is not None:
            return Budget(kind, value)
    raise ValueError("no budget; give one of --average-tokens, --keep-final, --tflops, ...")


# ----------------------------------------------------------------------------- command
def layer_numbers(text: str) -> list[int]:
    """``[8,16,24]`` or ``8,16,24`` as numbers; for argparse."""
    try:
        return [int(number) for number in text.strip().strip("[]").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no list like "[8,16,24]"') from None


def flags_of(solution: Solution, method: str) -> list[str]:
    """What to paste behind a command, the way that PyramidDrop's scripts spell it first."""
    lines = [f'--reduction "{solution.plan}"']
    if method == "pyramiddrop":
        layers, ratios = list(solution.layers), list(solution.ratios)
        lines.insert(0, f'--layer_list "{layers}" --image_token_ratio_list "{ratios}"')
    return [line.replace(", ", ",") for line in lines]


def report(
    name: str, preset: Preset, method: str, budget: Budget, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """Everything that `llava plan` prints, as a dict (what `--json` writes)."""
    best, others = solve(preset, method, budget, layers)
    return {
        "preset": name,
        "method": method,
        "visual_tokens": preset.visual,
        "text_tokens": preset.text_before + preset.text_after,
        "num_layers": preset.shape.layers,
        "asked": {budget.kind: budget.value},
        "plan": str(best.plan),
        "layers": list(best.layers),
        "ratios": list(best.ratios),
        "share": best.share,
        "share_is": family_of(method).words,
        "achieved": asdict(best.figures),
        "none": asdict(figures(preset, ReductionPlan())),
        "flags": flags_of(best, method),
        "others": [
            {
                "plan": str(other.plan),
                "layers": list(other.layers),
                "ratios": list(other.ratios),
                "share": other.share,
                **asdict(other.figures),
            }
            for other in others
        ],
    }


def tera(value: float) -> str:
    """A number of 10^12 with a unit that suits its size: ``4.31 T``, ``227 M``."""
    unit, factor = ("T", 1.0) if value >= 0.1 else ("G", 1e3) if value >= 1e-3 else ("M", 1e6)
    return f"{value * factor:.4g} {unit}"


def format_report(result: dict[str, Any]) -> str:
    """The same as the lines a terminal shows."""
    achieved, none, asked = result["achieved"], result["none"], result["asked"]
    tokens = f"{result['visual_tokens']} visual + {result['text_tokens']} text tokens"
    lines = [
        f"{result['preset']}: {result['num_layers']} layers, {tokens}, one sample",
        f"{result['method']} at {result['layers']}, λ = {result['share']:.4g}, "
        f"{result['share_is']}",
    ]
    stops = [*achieved["starts"][1:], result["num_layers"]]
    for start, stop, kept in zip(achieved["starts"], stops, achieved["kept_tokens"], strict=True):
        lines.append(f"  {stage_name(start, stop):<14} {kept:>6} visual tokens")
    rows = (
        ("average tokens (mean over layers)", "average_tokens", "{:.4g}".format),
        ("tokens in the last layer", "final_tokens", "{:.4g}".format),
        ("visual MACs (papers' convention)", "visual_tmacs", tera),
        ("prefill FLOPs (text, causal, head)", "full_tflops", tera),
    )
    lines.append(f"{'':<36}{'asked':>10}{'achieved':>12}{'no cut':>12}")
    for label, key, show in rows:
        want = show(asked[key]) if key in asked else "-"
        lines.append(f"{label:<36}{want:>10}{show(achieved[key]):>12}{show(none[key]):>12}")
    lines += ["paste:", *(f"  {line}" for line in result["flags"])]
    if result["others"]:
        lines.append("other layers within the same budget:")
        lines += [
            f"  {other['layers']!s:<14} λ {other['share']:.3f}: average "
            f"{other['average_tokens']:.1f}, last {other['final_tokens']}, "
            f"{tera(other['full_tflops'])}FLOPs"
            for other in result["others"]
        ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava plan``."""
    parser = argparse.ArgumentParser(
        prog="llava plan",
        description="Find the layers and ratios with which a method stays within a budget.",
    )
    parser.add_argument(
        "--method", default="pyramiddrop", help=", ".join(METHODS) + " (default %(default)s)"
    )
    asked = parser.add_argument_group("budget (one of them)").add_mutually_exclusive_group(
        required=True
    )
    asked.add_argument(
        "--average-tokens", type=float, metavar="N",
        help="visual tokens, averaged over all decoder layers (the papers' 192 / 128 / 64)",
    )  # fmt: skip
    asked.add_argument(
        "--keep-final", type=float, dest="final_tokens", metavar="N",
        help="visual tokens in the last layer",
    )  # fmt: skip
    asked.add_argument(
        "--visual-tmacs", type=float, metavar="X", help="papers' TMACs over visual tokens alone"
    )
    asked.add_argument(
        "--tflops", type=float, dest="full_tflops", metavar="X",
        help="TFLOPs of the whole prefill: text, causal attention, head",
    )  # fmt: skip
    parser.add_argument(
        "--layers-of-cuts", type=layer_numbers, metavar="LIST",
        help='where to cut: "[8,16,24]" (default: chosen)',
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset", default="llava-1.5-7b", help=", ".join(PRESETS) + " (default %(default)s)"
    )
    model.add_argument("--model-path", help="a checkpoint (its config.json) instead of a preset")
    model.add_argument("--layers", type=int, help="decoder layers instead of the model's")
    model.add_argument("--visual-tokens", type=int, help="instead of the model's number")
    model.add_argument("--text-tokens", type=int, help="instead of the preset's number")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava plan``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    name = Path(args.model_path).name if args.model_path else args.preset
    result = report(name, preset_of(args), args.method, budget_of(args), args.layers_of_cuts)
    print(format_report(result))
    if args.json:
        json_dump(args.json, result)


if __name__ == "__main__":
    main()
