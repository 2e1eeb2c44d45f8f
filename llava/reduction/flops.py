"""What a plan costs, in closed form: two conventions, never mixed.

* ``visual_macs`` is the papers' figure (PyramidDrop, section 3.3; FastV): multiply-accumulates
  over the visual tokens alone, per layer ``4 n d^2 + 2 n^2 d + 3 n d m``. LLaVA-1.5-7B: 3.82 T
  without a plan, 1.78 T with PyramidDrop.
  ``token_tmacs`` is the same formula over all tokens, text included, of which FastV gives shares.
* ``prefill_flops`` and its siblings count what the hardware has to do: 2 FLOPs a
  multiply-accumulate, text included, grouped key/value heads as they are, the causal half of the
  attention only, the final norm and ``lm_head`` on the rows that are computed. An ideal speed-up is
  a ratio of these. Scoring tokens is no part of an ideal: it is overhead.

Everything is read from ``ReductionPlan.schedule``; one function serves every method.
``llava flops --preset llava-next-7b --reduction "random:layers=[8,16],ratios=[0.5,0.25]"``
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llava.reduction.base import LayerCost
from llava.reduction.flags import add_reduction_flags, plan_from_args
from llava.reduction.plan import ReductionPlan, StageFacts
from llava.sequence import Layout
from llava.utils import json_dump, user_errors

TERA = 1e12


# ----------------------------------------------------------------------------- shapes
@dataclass(frozen=True)
class TowerShape:
    """A vision transformer as it is run: ``layers`` are those computed, not those stored."""

    layers: int
    hidden: int
    mlp: int
    tokens: int
    """Tokens of one tile inside the tower, the class token included."""
    patch_values: int = 588
    """Numbers in one patch: 3 x 14 x 14."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder (and of what feeds it) that its cost depends on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tower: TowerShape | None = None
    projector: tuple[int, ...] = ()
    """Widths along the projector, e.g. (1024, 4096, 4096) for mlp2x_gelu."""
    patches: int = 576
    """Visual tokens a tile becomes."""

    @classmethod
    def from_config(cls, config: Any, tower_config: Any = None) -> ModelShape:
        """Read the shape off a decoder's config and, if given, off its tower's config."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
        )
        if tower_config is None:
            return shape
        patches = (tower_config.image_size // tower_config.patch_size) ** 2
        select = getattr(config, "mm_vision_select_layer", -2)
        depth = tower_config.num_hidden_layers
        tower = TowerShape(
            layers=select if select >= 0 else depth + 1 + select,
            hidden=tower_config.hidden_size,
            mlp=tower_config.intermediate_size,
            tokens=patches + 1,
            patch_values=3 * tower_config.patch_size**2,
        )
        kind = getattr(config, "mm_projector_type", "linear")
        widths = projector_widths(kind, tower.hidden, shape.hidden)
        return replace(shape, tower=tower, projector=widths, patches=patches)

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.mlp


def projector_widths(kind: str, tower: int, hidden: int) -> tuple[int, ...]:
    """Widths of LLaVA's projectors: ``linear``, ``mlpNx_gelu``, ``identity``.

    Raises:
        ValueError: another kind.
    """
    if kind == "identity":
        return ()
    if kind == "linear":
        return (tower, hidden)
    depth = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != f"mlp{depth}x_gelu" or not depth.isdigit() or int(depth) < 1:
        raise ValueError(f"projector type {kind!r}; accepted: linear, mlpNx_gelu, identity")
    return (tower, *[hidden] * int(depth))


# ----------------------------------------------------------------------------- presets
@dataclass(frozen=True)
class Preset:
    """A model shape and the prompt it is asked about."""

    shape: ModelShape
    text_before: int
    visual: int
    text_after: int
    plan: str
    """What ``llava bench`` compares with no plan. ``llava flops`` without a plan means none."""
    new_tokens: int = 16
    batch: int = 1
    tiles: int = 1
    note: str = ""

    def layout(self, batch: int | None = None) -> Layout:
        """``batch`` equal samples with one picture each, left-padded (nothing is padded)."""
        count = self.batch if batch is None else batch
        return Layout.simple(self.text_before, self.visual, self.text_after, batch=count)


_CLIP_L_336 = TowerShape(layers=23, hidden=1024, mlp=4096, tokens=577)
_VICUNA_7B = ModelShape(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000,
    tower=_CLIP_L_336, projector=(1024, 4096, 4096),
)  # fmt: skip
_VICUNA_13B = ModelShape(
    layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, mlp=13824, vocab=32000,
    tower=_CLIP_L_336, projector=(1024, 5120, 5120),
)  # fmt: skip


def pyramid(layers: str, ratios: str = "[0.5,0.25,0.125]") -> str:
    """The text of a PyramidDrop plan."""
    return f"pyramiddrop:layers={layers},ratios={ratios}"


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        ModelShape(
            layers=6, hidden=128, heads=4, kv_heads=4, head_dim=32, mlp=384, vocab=96,
            tower=TowerShape(layers=3, hidden=128, mlp=512, tokens=65), patches=64,
            projector=(128, 128, 128),
        ),
        4, 64, 20, pyramid("[2,4,5]"), new_tokens=4, batch=32,
        note="the size of the shipped digits models: too small to show what dropping saves",
    ),
    "cpu-512": Preset(
        ModelShape(
            layers=16, hidden=512, heads=8, kv_heads=8, head_dim=64, mlp=1376, vocab=1000,
            tower=TowerShape(layers=5, hidden=256, mlp=1024, tokens=577),
            projector=(256, 512, 512),
        ),
        32, 576, 32, pyramid("[4,8,12]"),
        note="random weights; large enough for one CPU thread to be compute-bound",
    ),
    "llava-1.5-7b": Preset(_VICUNA_7B, 35, 576, 25, pyramid("[8,16,24]")),
    "llava-1.5-13b": Preset(_VICUNA_13B, 35, 576, 25, pyramid("[10,20,30]")),
    "llava-next-7b": Preset(_VICUNA_7B, 35, 2880, 25, pyramid("[8,16,24]"), tiles=5),
    "video-10x576": Preset(
        _VICUNA_7B, 35, 5760, 25, pyramid("[8,16,24]"), tiles=10, note="ten frames of 576 tokens"
    ),
}  # fmt: skip


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]


# ----------------------------------------------------------------------------- the papers' figure
def visual_macs(shape: ModelShape, counts: Sequence[int]) -> int:
    """Multiply-accumulates over visual tokens alone, as the papers count them.

    Args:
        counts: visual tokens in each layer of one sample, ``shape.layers`` numbers.

    Raises:
        ValueError: not one count a layer.
    """
    if len(counts) != shape.layers:
        raise ValueError(f"{len(counts)} counts for {shape.layers} layers; one a layer is needed")
    d, m = shape.hidden, shape.mlp
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in counts)


def visual_counts(stages: Sequence[StageFacts], sample: int = 0) -> list[int]:
    """Visual tokens of one sample in each layer."""
    return [stage.visual[sample] for stage in stages for _ in range(stage.start, stage.stop)]


def mean_visual_macs(shape: ModelShape, stages: Sequence[StageFacts]) -> float:
    """The papers' figure, averaged over the samples of the schedule."""
    total = sum(cost.visual_macs for stage in stages for cost in layer_costs(shape, stage))
    return total / len(stages[0].visual)


def mean_token_macs(shape: ModelShape, stages: Sequence[StageFacts]) -> float:
    """The papers' formula over all tokens, text included (FastV's percentages), averaged over the
    samples. Layers as they are: a layer program has no such figure."""
    lengths = [stage.lengths for stage in stages for _ in range(stage.start, stage.stop)]
    samples = len(stages[0].lengths)
    return sum(visual_macs(shape, [n[i] for n in lengths]) for i in range(samples)) / samples


# ----------------------------------------------------------------------------- full FLOPs
def layer_costs(shape: ModelShape, stage: StageFacts) -> list[LayerCost]:
    """Every layer of one stage over every sample; a layer program says what its own layers cost."""
    samples = list(zip(stage.lengths, stage.visual, strict=True))
    usual = [_usual_cost(shape, *sample) for sample in samples]
    if stage.program is None:
        return usual * (stage.stop - stage.start)
    return [
        stage.program.layer_cost(shape, index, *sample) or otherwise
        for index in range(stage.start, stage.stop)
        for sample, otherwise in zip(samples, usual, strict=True)
    ]


def _usual_cost(shape: ModelShape, length: int, visual: int) -> LayerCost:
    """A decoder layer as it is: all heads and channels, the causal half of the attention."""
    one_layer = replace(shape, layers=1)
    pairs = length * (length + 1) // 2
    return LayerCost(
        visual_macs=visual_macs(one_layer, [visual]),
        flops=2 * length * shape.layer_weights + 4 * shape.heads * shape.head_dim * pairs,
        keys=length * shape.kv_heads,
        pairs=length * shape.heads,
    )


def stage_flops(shape: ModelShape, stage: StageFacts) -> int:
    """All decoder layers of one stage over all samples."""
    return sum(cost.flops for cost in layer_costs(shape, stage))


def head_flops(shape: ModelShape, rows: int) -> int:
    """Final norm and ``lm_head`` on ``rows`` rows."""
    return rows * (4 * shape.hidden + 2 * shape.hidden * shape.vocab)


def prefill_flops(
    shape: ModelShape, stages: Sequence[StageFacts], logit_rows: int | None = None
) -> int:
    """Decoder layers over the prompt, norm and head on ``logit_rows`` (default: one a sample)."""
    rows = len(stages[0].lengths) if logit_rows is None else logit_rows
    return sum(stage_flops(shape, stage) for stage in stages) + head_flops(shape, rows)


def shared_prefill_flops(
    shape: ModelShape,
    stages: Sequence[StageFacts],
    prefix: Sequence[StageFacts],
    owners: Sequence[int],
    depth: int,
) -> int:
    """``prefill_flops`` when the first ``depth`` layers run a common prefix once.

    stages: of the whole prompts; prefix: of the common beginnings; owners: the prefix of each
    prompt. Each prompt but one is spared the shared layers over its prefix.
    """
    total = prefill_flops(shape, stages)
    spared = [owners.count(row) - 1 for row in range(len(prefix[0].lengths))]
    for stage in prefix:
        costs = layer_costs(shape, stage.within(range(depth)))  # layer by layer, all rows of each
        total -= sum(cost.flops * spared[i % len(spared)] for i, cost in enumerate(costs))
    return total


def decode_flops(shape: ModelShape, stages: Sequence[StageFacts], step: int = 1) -> int:
    """One decode step of all samples; ``step`` counts from 1, the first token after the prompt."""
    total = sum(
        2 * shape.layer_weights + 4 * shape.head_dim * (cost.pairs + shape.heads * step)
        for stage in stages
        for cost in layer_costs(shape, stage)
    )
    return total + head_flops(shape, len(stages[0].lengths))


def train_flops(
    shape: ModelShape,
    stages: Sequence[StageFacts],
    logit_rows: int,
    *,
    checkpointing: bool = False,
    frozen: bool = False,
) -> int:
    """Forward and backward of the decoder.

    A layer costs 3 forwards (forward, gradient of inputs, gradient of weights), 4 when it is
    computed again under gradient checkpointing; the head costs 3 on its rows. The tower is apart.
    frozen: no weight of it is trained, so the gradients of weights are spared (what adapters add is
    not counted); of a layer program the share of the weights is taken to be that of a usual layer.
    """
    layers = sum(stage_flops(shape, stage) for stage in stages)
    head = head_flops(shape, logit_rows)
    total = (4 if checkpointing else 3) * layers + 3 * head
    if frozen:
        total -= head + sum(_weight_flops(shape, stage) for stage in stages)
    return total


def _weight_flops(shape: ModelShape, stage: StageFacts) -> int:
    """The part of `stage_flops` that multiplies by weights."""
    usual = [
        _usual_cost(shape, *sample).flops
        for sample in zip(stage.lengths, stage.visual, strict=True)
    ]
    products = sum(2 * length * shape.layer_weights for length in stage.lengths)
    return round(stage_flops(shape, stage) * products / max(sum(usual), 1))


def tower_flops(shape: ModelShape, tiles: int) -> int:
    """The vision tower's forward over ``tiles`` tiles (full attention, no causal half)."""
    if shape.tower is None:
        return 0
    t = shape.tower
    weights = 4 * t.hidden**2 + 2 * t.hidden * t.mlp
    layer = 2 * t.tokens * weights + 4 * t.hidden * t.tokens**2
    patches = 2 * (t.tokens - 1) * t.patch_values * t.hidden
    return tiles * (t.layers * layer + patches)


def projector_flops(shape: ModelShape, tokens: int) -> int:
    """The projector's forward over ``tokens`` visual tokens."""
    widths = zip(shape.projector, shape.projector[1:], strict=False)
    return 2 * tokens * sum(a * b for a, b in widths)


# ----------------------------------------------------------------------------- bytes, roofline
def weight_bytes(shape: ModelShape, width: int = 2, layers: int | None = None) -> int:
    """Bytes of the decoder's matrices: ``layers`` layers (default all) and the head."""
    count = shape.layers if layers is None else layers
    return width * (count * shape.layer_weights + shape.hidden * shape.vocab)


def kv_bytes(
    shape: ModelShape, stages: Sequence[StageFacts], width: int = 2, extra: int = 0
) -> int:
    """Bytes of all samples' key/value cache, ``extra`` decoded tokens included."""
    keys = sum(
        cost.keys + shape.kv_heads * extra for stage in stages for cost in layer_costs(shape, stage)
    )
    return width * 2 * shape.head_dim * keys


@dataclass(frozen=True)
class Machine:
    """Peak rates of a device: dense 16-bit FLOPs and bytes a second."""

    name: str
    flops: float
    bandwidth: float


MACHINES: tuple[tuple[str, Machine], ...] = (
    ("B200", Machine("B200", 2250e12, 8.0e12)),
    ("H200 NVL", Machine("H200 NVL", 835e12, 4.8e12)),
    ("H200", Machine("H200 SXM", 989e12, 4.8e12)),
    ("H100 PCIe", Machine("H100 PCIe", 756e12, 2.0e12)),
    ("H100 NVL", Machine("H100 NVL", 835e12, 3.9e12)),
    ("H100", Machine("H100 SXM", 989e12, 3.35e12)),
    ("A100", Machine("A100 80G", 312e12, 2.04e12)),
    ("L40S", Machine("L40S", 362e12, 0.864e12)),
    ("L40", Machine("L40", 181e12, 0.864e12)),
    ("A40", Machine("A40", 149.7e12, 0.696e12)),
    ("A30", Machine("A30", 165e12, 0.933e12)),
    ("L4", Machine("L4", 121e12, 0.3e12)),
    ("RTX 4090", Machine("RTX 4090", 165e12, 1.008e12)),
    ("RTX 3090", Machine("RTX 3090", 71e12, 0.936e12)),
)
"""NVIDIA's data sheets (without sparsity; GeForce: the architecture's white paper, 32-bit
accumulation), found by words of the device's name, the first that fit."""


def find_machine(device_name: str) -> Machine | None:
    """The data sheet of a GPU, or None where it is not known (then only FLOPs ratios are shown),
    a slice of a GPU (MIG) included."""
    if "MIG" in device_name:
        return None
    words = ((re.compile(rf"\b{re.escape(key)}\b"), machine) for key, machine in MACHINES)
    return next((machine for pattern, machine in words if pattern.search(device_name)), None)


def prefill_seconds(
    shape: ModelShape, stages: Sequence[StageFacts], machine: Machine, width: int = 2
) -> float:
    """Roofline time of a prefill: each stage takes max(FLOPs / peak, bytes / bandwidth).

    A stage's bytes are its weights, read once, and the keys and values it writes.
    """
    seconds = 0.0
    for stage in stages:
        moved = width * (stage.stop - stage.start) * shape.layer_weights
        moved += kv_bytes(shape, [stage], width)
        flops = stage_flops(shape, stage)
        seconds += max(flops / machine.flops, moved / machine.bandwidth)
    head = width * shape.hidden * shape.vocab
    rows = len(stages[0].lengths)
    return seconds + max(head_flops(shape, rows) / machine.flops, head / machine.bandwidth)


def decode_bytes(
    shape: ModelShape, stages: Sequence[StageFacts], width: int = 2, step: int = 1
) -> int:
    """What a decode step must read: every weight once, and the cache."""
    return weight_bytes(shape, width) + kv_bytes(shape, stages, width, extra=step)


# ----------------------------------------------------------------------------- one plan, summed up
@dataclass(frozen=True)
class Cost:
    """What ``llava flops`` prints: one sample of a preset under one plan."""

    plan: str
    visual_tmacs: float
    token_tmacs: float | None
    full_tflops: float
    vision_tflops: float
    decode_gflops: float
    kv_mib: float
    kept_tokens: list[int]
    lengths: list[int]
    starts: list[int] = field(default_factory=list)


def cost(preset: Preset, plan: ReductionPlan) -> Cost:
    """Cost of one sample of ``preset`` under ``plan``.

    Raises:
        ValueError: the plan does not fit the number of layers.
    """
    shape = preset.shape
    plan.validate(shape.layers)
    stages = plan.schedule(preset.layout(1), shape.layers)
    vision = tower_flops(shape, preset.tiles) + projector_flops(shape, preset.visual)
    decode, kept = decode_flops(shape, stages), kv_bytes(shape, stages)
    if plan.rerank:  # no cache: a step is a prefill of a prompt one token longer
        longer = replace(preset, text_after=preset.text_after + 1).layout(1)
        decode, kept = prefill_flops(shape, plan.schedule(longer, shape.layers)), 0
    usual = plan.program is None
    return Cost(
        plan=str(plan),
        visual_tmacs=mean_visual_macs(shape, stages) / TERA,
        token_tmacs=mean_token_macs(shape, stages) / TERA if usual else None,
        full_tflops=prefill_flops(shape, stages) / TERA,
        vision_tflops=vision / TERA,
        decode_gflops=decode / 1e9,
        kv_mib=kept / 2**20,
        kept_tokens=[stage.visual[0] for stage in stages],
        lengths=[stage.lengths[0] for stage in stages],
        starts=[stage.start for stage in stages],
    )


def with_tokens(preset: Preset, visual: int | None, text: int | None) -> Preset:
    """``preset`` with other numbers of visual or text tokens (tiles follow the visual ones).

    Raises:
        ValueError: a negative number, or no token at all.
    """
    for name, value in (("--visual-tokens", visual), ("--text-tokens", text)):
        if value is not None and value < 0:
            raise ValueError(f"{name} {value}; accepted: 0 or more")
    if visual is not None:
        tiles = math.ceil(visual / preset.shape.patches)
        preset = replace(preset, visual=visual, tiles=tiles)
    if text is not None:
        preset = replace(preset, text_before=text // 2, text_after=text - text // 2)
    if preset.visual + preset.text_before + preset.text_after == 0:
        raise ValueError("--visual-tokens 0 and --text-tokens 0 leave nothing to compute")
    return preset


def report(preset: Preset, plan: ReductionPlan) -> dict[str, Any]:
    """The figures of ``llava flops`` as a dict (what ``--json`` writes)."""
    now, none = cost(preset, plan), cost(preset, ReductionPlan())
    notes: list[str] = []
    if plan.program is not None:
        macs = (now.visual_tmacs * TERA, none.visual_tmacs * TERA)
        notes = list(plan.program.notes(preset.shape, *macs))
    end_to_end = (none.full_tflops + none.vision_tflops) / (now.full_tflops + none.vision_tflops)
    return {
        "plan": now.plan,
        "visual_tokens": preset.visual,
        "text_tokens": preset.text_before + preset.text_after,
        "visual_tmacs": now.visual_tmacs,
        "token_tmacs": now.token_tmacs,
        "full_tflops": now.full_tflops,
        "ideal_prefill_speedup": none.full_tflops / now.full_tflops,
        "kept_tokens": now.kept_tokens,
        "stage_starts": now.starts,
        "stage_lengths": now.lengths,
        "vision_tflops": now.vision_tflops,
        "ideal_end_to_end_speedup": end_to_end,
        "decode_gflops_per_token": now.decode_gflops,
        "kv_cache_mib_16bit": now.kv_mib,
        "notes": notes,
        "none": {
            "visual_tmacs": none.visual_tmacs,
            "token_tmacs": none.token_tmacs,
            "full_tflops": none.full_tflops,
            "decode_gflops_per_token": none.decode_gflops,
            "kv_cache_mib_16bit": none.kv_mib,
        },
    }


def stage_name(start: int, stop: int) -> str:
    """What a terminal calls the layers start .. stop-1; "input" where a cut in front of layer 0
    leaves none."""
    return "input" if start == stop else f"layers {start}-{stop - 1}"


def format_report(name: str, layers: int, result: dict[str, Any]) -> str:
    """The figures as the lines a terminal shows."""
    none = result["none"]
    tokens = f"{result['visual_tokens']} visual + {result['text_tokens']} text tokens"
    lines = [
        f"{name}: {tokens}, one sample",
        f"plan: {result['plan']}",
    ]
    stops = [*result["stage_starts"][1:], layers]
    rows = zip(
        result["stage_starts"], stops, result["kept_tokens"], result["stage_lengths"], strict=True
    )
    for start, stop, kept, length in rows:
        span = stage_name(start, stop)
        lines.append(f"  {span:<14} {kept:>6} visual tokens, {length:>6} in all")
    pairs = (
        ("visual MACs (papers' convention)", "visual_tmacs", "T"),
        ("... of all tokens, text included", "token_tmacs", "T"),
        ("prefill FLOPs (text, causal, head)", "full_tflops", "T"),
        ("decode FLOPs a token", "decode_gflops_per_token", "G"),
        ("KV cache, 16 bit", "kv_cache_mib_16bit", "MiB"),
    )
    for label, key, unit in pairs:
        if result[key] is None:
            continue
        share = result[key] / none[key] if none[key] else 1.0
        figure = f"{result[key]:>10.4g} {unit:<3}"
        lines.append(f"{label:<36}{figure} (none {none[key]:.4g} {unit}, {share:.1%})")
    lines.append(f"{'tower and projector':<36}{result['vision_tflops']:>10.4g} T")
    lines.append(f"{'ideal prefill speed-up':<36}{result['ideal_prefill_speedup']:>10.3f} x")
    lines.append(
        f"{'... with tower and projector':<36}{result['ideal_end_to_end_speedup']:>10.3f} x"
    )
    return "\n".join([*lines, *result["notes"]])


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava flops``."""
    parser = argparse.ArgumentParser(
        prog="llava flops",
        description="Calculate the cost of a plan, as the papers count it and in full FLOPs.",
    )
    parser.add_argument(
        "--preset", default="llava-1.5-7b", help=", ".join(PRESETS) + " (default %(default)s)"
    )
    parser.add_argument("--visual-tokens", type=int, help="instead of the preset's number")
    parser.add_argument("--text-tokens", type=int, help="instead of the preset's number")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    add_reduction_flags(parser)
    return parser


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava flops``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    preset = with_tokens(get_preset(args.preset), args.visual_tokens, args.text_tokens)
    plan = plan_from_args(args) or ReductionPlan()
    result = {"preset": args.preset, **report(preset, plan)}
    print(format_report(args.preset, preset.shape.layers, result))
    if args.json:
        json_dump(args.json, result)


if __name__ == "__main__":
    main()
