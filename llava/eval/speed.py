"""``llava bench``: what a plan saves, measured, beside what it could save at best.

Special here: each figure stands beside its ideal, computed from the lengths that ran. The ideal of
the prefill counts the decoder layers (2 FLOPs a multiply-accumulate, text included, the causal half
of the attention), the final norm and ``lm_head`` on the rows computed; choosing tokens is no part
of it. On a GPU each stage's ideal is max(FLOPs / peak, bytes / bandwidth). A decode step reads all
weights and the cache, so its ideal is that of bytes. Both sides run the same code with the same
attention backend, in turn (`llava.timing`).

    llava bench --preset cpu-512 --threads 1 --json bench.json        # 1 to 2 minutes on one core
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.staged_decoder import Record, replan, upload_facts, with_embeds
from llava.prompting import TEXTS
from llava.reduction import ReductionPlan, StageFacts, flops
from llava.reduction.base import counts_known
from llava.reduction.flags import add_reduction_flags, plan_from_args
from llava.reduction.flops import ModelShape, Preset
from llava.sequence import Layout, TokenSequence
from llava.timing import (
    Clock,
    Region,
    Series,
    compare,
    count_cuda_launches,
    count_kernels,
    interleave,
)
from llava.utils import check_output, environment, get_logger, json_dump, set_seed, user_errors

log = get_logger(__name__)
PARTS = ("vision", "prefill", "decode", "train")
WHOLE_RUNS = {"train": "llava.eval.train_speed", "eval": "llava.eval.bench_eval"}
"""``llava bench NAME ...``: benchmarks of more than one pass, each with flags of its own."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ----------------------------------------------------------------------------- what is run
@dataclass
class Workload:
    """A model and one batch of questions.

    ids: [B, L] with IMAGE_TOKEN_INDEX at each picture. images: list of [3, H, W] or
    [tiles, 3, H, W]. mask: [B, L], padding on the left, or None for none. texts: as `prepare_batch`
    gives them, for methods that compare with words. new_tokens: decode steps in one run. targets:
    tokens at the end of each sample that a training step supervises.
    """

    model: Any
    shape: ModelShape
    ids: Tensor
    images: list[Tensor]
    mask: Tensor | None = None
    texts: dict[str, Tensor] | None = None
    new_tokens: int = 16
    targets: int = 16

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def tiles(self) -> int:
        """Tiles the tower sees."""
        return sum(1 if image.dim() == 3 else len(image) for image in self.images)

    def sequence(self) -> TokenSequence:
        """The batch embedded, pictures and all, left-padded."""
        with torch.inference_mode():
            return self.model.build_sequence(
                self.ids, self.mask, images=self.images, kind="left", texts=self.texts
            )

    def labels(self) -> Tensor:
        """Labels [B, L] of the last `targets` ids."""
        labels = torch.full_like(self.ids, IGNORE_INDEX)
        labels[:, -self.targets :] = self.ids[:, -self.targets :]
        return labels


def build_workload(
    preset: Preset,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "sdpa",
    batch: int | None = None,
) -> Workload:
    """A model of the preset's shape with random weights, and a random batch for it."""
    from transformers import AutoModelForCausalLM

    from llava.model import LlavaConfig

    shape, count = preset.shape, preset.batch if batch is None else batch
    side = round(shape.patches**0.5)
    image_size = 14 * side
    tower, widths = shape.tower, shape.projector
    assert tower is not None
    assert side * side == shape.patches
    assert len(widths) == 3
    config = LlavaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=2 * (preset.visual + preset.text_before + preset.text_after) + 1024,
        mm_vision_tower="random weights",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=tower.hidden,
        mm_vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": tower.hidden,
            "intermediate_size": tower.mlp,
            "num_hidden_layers": tower.layers + 1,
            "num_attention_heads": max(1, tower.hidden // 64),
            "image_size": image_size,
            "patch_size": 14,
        },
    )
    with torch.device(device):
        try:
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=backend
            )
        except ImportError as error:  # a backend whose package is not there
            raise ValueError(f"--backend {backend!r} cannot be used here: {error}") from error
        text = torch.randint(3, shape.vocab, (count, preset.text_before + preset.text_after))
        # Tiles of one picture travel together; frames of a video are pictures of their own.
        pictures = 1 if "frames" not in preset.note else preset.tiles
        per_picture = preset.tiles // pictures
        images = [
            torch.randn(per_picture, 3, image_size, image_size, dtype=dtype).squeeze(0)
            for _ in range(count * pictures)
        ]
        marks = torch.full((count, pictures), IMAGE_TOKEN_INDEX)
    before, after = text.split([preset.text_before, preset.text_after], 1)
    return Workload(
        model.eval(),
        shape,
        torch.cat([before, marks, after], 1),
        images,
        texts=dict.fromkeys(TEXTS, after),  # what stands behind the picture is the question
        new_tokens=preset.new_tokens,
        targets=max(1, preset.text_after // 2),
    )


# ----------------------------------------------------------------------------- ideals
@dataclass(frozen=True)
class Ideals:
    """Best possible cost of each region for one plan, in any one unit (ratios are what counts).

    machine: the GPU's data sheet; None counts FLOPs (bytes in decoding). width: bytes a number.
    """

    shape: ModelShape
    layout: Layout
    train_layout: Layout
    tiles: int
    target_rows: int
    width: int
    machine: flops.Machine | None

    def stages(self, plan: ReductionPlan, *, train: bool = False) -> tuple[StageFacts, ...]:
        """The plan's schedule for the measured batch."""
        layout = self.train_layout if train else self.layout
        return plan.schedule(layout, self.shape.layers)

    def vision(self) -> float:
        """Tower and projector."""
        visual = sum(self.layout.visual)
        total = flops.tower_flops(self.shape, self.tiles)
        total += flops.projector_flops(self.shape, visual)
        return total / self.machine.flops if self.machine else total

    def prefill(self, plan: ReductionPlan) -> float:
        """Decoder layers, norm and head on one row a sample."""
        stages = self.stages(plan)
        if self.machine:
            return flops.prefill_seconds(self.shape, stages, self.machine, self.width)
        return flops.prefill_flops(self.shape, stages)

    def end_to_end(self, plan: ReductionPlan) -> float:
        """From pixels to the first token's logits."""
        return self.vision() + self.prefill(plan)

    def decode(self, plan: ReductionPlan) -> float:
        """Bytes one step reads."""
        return flops.decode_bytes(self.shape, self.stages(plan), self.width)

    def train_step(self, plan: ReductionPlan) -> float:
        """Forward and backward; the tower is frozen, so it and the projector's input cost less."""
        stages = self.stages(plan, train=True)
        total = flops.train_flops(self.shape, stages, self.target_rows)
        total += flops.tower_flops(self.shape, self.tiles)
        visual = sum(self.train_layout.visual)
        first = 2 * visual * self.shape.projector[0] * self.shape.projector[1]
        total += 3 * flops.projector_flops(self.shape, visual) - first
        return total / self.machine.flops if self.machine else total


def ideals(work: Workload, machine: flops.Machine | None = None) -> Ideals:
    """The ideals of a workload, from the lengths of its own batch."""
    with torch.no_grad():
        training = work.model.build_sequence(work.ids, work.mask, work.labels(), images=work.images)
    return Ideals(
        work.shape,
        work.sequence().layout,
        training.layout,
        work.tiles,
        target_rows=sum(training.layout.targets),
        width=next(work.model.parameters()).element_size(),
        machine=machine,
    )


# ----------------------------------------------------------------------------- regions
def prefill_region(work: Workload, plan: ReductionPlan) -> Region:
    """Decoder over the embedded batch: fills a cache, logits of the last row."""
    base = work.sequence()

    @torch.inference_mode()
    def run(sequence: TokenSequence) -> Any:
        return work.model(sequence=sequence, reduction=plan, use_cache=True, logits_to_keep=1)

    return Region(run, lambda: base.to(work.device))


def end_to_end_region(work: Workload, plan: ReductionPlan) -> Region:
    """From pixels and ids to the first token's logits."""

    @torch.inference_mode()
    def run(_: None) -> None:
        sequence = work.sequence()
        work.model(sequence=sequence, reduction=plan, use_cache=True, logits_to_keep=1)

    return Region(run)


def selection_region(work: Workload, plan: ReductionPlan) -> Region:
    """The plan's cuts alone, one after the other: measure, choose, keep, new rotary tables.

    The keys that a cut reads from the cache are those of a prefill that is not timed.
    """
    base = work.sequence()
    decoder = work.model.get_model()
    prefill = prefill_region(work, plan)
    cache = prefill.run(prefill.prepare()).past_key_values

    @torch.inference_mode()
    def run(sequence: TokenSequence) -> None:
        sequence = with_embeds(sequence, plan)
        stages = plan.schedule(sequence.layout, work.shape.layers)
        facts = upload_facts(stages, work.device)
        rotary = decoder.rotary_emb(sequence.hidden, position_ids=sequence.position)
        for number in range(1, len(stages)):
            stage = stages[number]
            measured = {}
            if any(signal.offset == -1 for signal in stage.cut.reducer.signals):
                measured = decoder._measure(stage.cut, -1, sequence, rotary, cache)
            sequence, choice = decoder._choose(
                sequence, stage, facts[number], rotary, measured, Record()
            )
            if not counts_known(stage.cut.reducer):
                stages = replan(plan, stages, number, choice)
                stage, facts = stages[number], upload_facts(stages, work.device)
            sequence = decoder.pdrop_rank_drop(sequence, choice, stage, facts[number], plan)
            rotary = decoder.rotary_emb(sequence.hidden, position_ids=sequence.position)

    return Region(run, lambda: base.to(work.device))


def decode_region(work: Workload, plan: ReductionPlan) -> Region:
    """`new_tokens` steps on a filled cache; the prefill is not timed."""
    prefill = prefill_region(work, plan)
    token = work.ids[:, -1:]

    @torch.inference_mode()
    def run(cache: Any) -> None:
        for _ in range(work.new_tokens):
            work.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return Region(run, lambda: prefill.run(prefill.prepare()).past_key_values)


def train_region(work: Workload, plan: ReductionPlan) -> Region:
    """Pixels and ids forward, loss, backward into projector and decoder. No optimiser step."""
    labels = work.labels()

    def run(_: None) -> None:
        out = work.model(
            work.ids,
            work.mask,
            labels=labels,
            images=work.images,
            texts=work.texts,
            reduction=plan,
            logits_to_keep="targets",
        )
        out.loss.backward()

    def prepare() -> None:
        work.model.train()
        work.model.zero_grad(set_to_none=True)

    return Region(run, prepare)


def vision_regions(work: Workload) -> dict[str, Region]:
    """Tower and projector alone."""
    tower, projector = work.model.get_vision_tower(), work.model.get_model().mm_projector
    tiles = torch.cat([image.reshape(-1, *image.shape[-3:]) for image in work.images])
    with torch.inference_mode():
        features = tower(tiles)
    return {
        "tower": Region(lambda _: torch.inference_mode()(tower)(tiles)),
        "projector": Region(lambda _: torch.inference_mode()(projector)(features)),
    }


# ----------------------------------------------------------------------------- measuring
def alone(series: Series) -> dict[str, Any]:
    """Figures of a region that a plan does not change."""
    return {
        "ms": series.ms,
        "spread_ms": list(series.spread),
        "wall_ms": series.wall_ms,
        "repeats": len(series.samples),
    }


def both(
    region: Callable[[Workload, ReductionPlan], Region],
    work: Workload,
    plan: ReductionPlan,
    clock: Clock,
    repeats: int,
) -> tuple[Series, Series]:
    """One region without and with the plan, interleaved."""
    regions = {"none": region(work, ReductionPlan()), "plan": region(work, plan)}
    found = interleave(regions, clock, repeats)
    return found["none"], found["plan"]


def kernels_per_cut(work: Workload, plan: ReductionPlan) -> dict[str, Any]:
    """What a cut adds to a prefill's kernels: matrix products (projections, scores) and others.
    Of a plan with a layer program: what it adds as a whole."""
    cuts = 1 if plan.program is not None else max(1, len(plan.cuts))
    with_plan, without = prefill_region(work, plan), prefill_region(work, ReductionPlan())
    sides = [lambda r=r: r.run(r.prepare()) for r in (with_plan, without)]
    more = count_kernels(sides[0]) - count_kernels(sides[1])
    found = {"products": more.products / cuts, "other": more.other / cuts}
    if work.device.type == "cuda":
        launches = [count_cuda_launches(side) for side in sides]
        found["cuda_launches"] = (launches[0] - launches[1]) / cuts
    return found


def measure(
    work: Workload,
    plan: ReductionPlan,
    *,
    parts: Sequence[str] = PARTS,
    repeats: int = 5,
) -> dict[str, Any]:
    """Time the parts of a workload without and with a plan; what ``--json`` writes.

    Raises:
        ValueError: an unknown part, or a plan that does not fit the model.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is unknown; accepted: {', '.join(PARTS)}")
    plan.validate(work.shape.layers)
    if plan.rerank:
        raise ValueError(f"{plan} keeps no cache, so decoding cannot be timed; leave out rerank")
    clock = Clock(work.device)
    machine = None
    if work.device.type == "cuda":
        machine = flops.find_machine(torch.cuda.get_device_name(work.device))
    best, none = ideals(work, machine), ReductionPlan()
    result: dict[str, Any] = {"plan": str(plan), "ideal_from": ideal_source(work, machine)}
    result["unit"] = "a cut" if plan.program is None else "the plan"
    result |= costs(best, plan)
    if "vision" in parts:
        series = interleave(vision_regions(work), clock, repeats)
        result |= {name: alone(one) for name, one in series.items()}
        pair = both(end_to_end_region, work, plan, clock, repeats)
        result["end_to_end"] = compare(*pair, best.end_to_end(none) / best.end_to_end(plan))
    if "prefill" in parts:
        result["prefill"] = measure_prefill(work, plan, clock, repeats, best)
        result["kernels_per_cut"] = kernels_per_cut(work, plan)
    if "decode" in parts:
        pair = both(decode_region, work, plan, clock, repeats)
        ideal = best.decode(none) / best.decode(plan)
        result["decode"] = compare(*pair, ideal, per=work.new_tokens)
    if "train" in parts:
        pair = both(train_region, work, plan, clock, max(1, repeats // 2))
        result["train_step"] = compare(*pair, best.train_step(none) / best.train_step(plan))
        work.model.zero_grad(set_to_none=True)
        work.model.eval()
    return result


def measure_prefill(
    work: Workload, plan: ReductionPlan, clock: Clock, repeats: int, best: Ideals
) -> dict[str, Any]:
    """Prefill of both sides and the cuts alone, all three in turn."""
    none = ReductionPlan()
    regions = {
        "none": prefill_region(work, none),
        "plan": prefill_region(work, plan),
        "selection": selection_region(work, plan),
    }
    series = interleave(regions, clock, repeats)
    found = compare(series["none"], series["plan"], best.prefill(none) / best.prefill(plan))
    found["selection_ms"] = series["selection"].ms
    found["selection_share"] = series["selection"].ms / series["plan"].ms
    return found


def time_plans(
    work: Workload, plans: Mapping[str, ReductionPlan], repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Prefill and decode time of several plans on one batch, all in turn.

    Returns per plan `prefill_ms`, `decode_ms` (one step of the whole batch), `ideal` and
    `share_of_ideal` of the prefill against the plan named "none".

    Raises:
        ValueError: no plan is named "none".
    """
    if "none" not in plans:
        raise ValueError(f"plans {list(plans)} lack 'none', which the others are compared with")
    clock, best = Clock(work.device), ideals(work)
    prefill = {name: prefill_region(work, plan) for name, plan in plans.items()}
    decode = {name: decode_region(work, plan) for name, plan in plans.items()}
    prefill_series = interleave(prefill, clock, repeats)
    decode_series = interleave(decode, clock, repeats)
    found = {}
    for name, plan in plans.items():
        ideal = best.prefill(plans["none"]) / best.prefill(plan)
        part = compare(prefill_series["none"], prefill_series[name], ideal)
        found[name] = {
            "prefill_ms": part["plan_ms"],
            "decode_ms": decode_series[name].ms / work.new_tokens,
            "ideal": ideal,
            "share_of_ideal": part["share_of_ideal"],
        }
    return found


def costs(best: Ideals, plan: ReductionPlan) -> dict[str, Any]:
    """The papers' figure and the full one, for one sample, without and with the plan."""
    samples = len(best.layout.lengths)
    found: dict[str, Any] = {}
    for name, each in (("none", ReductionPlan()), ("plan", plan)):
        stages = best.stages(each)
        found[f"{name}_visual_tmacs"] = flops.mean_visual_macs(best.shape, stages) / flops.TERA
        full = flops.prefill_flops(best.shape, stages) / samples / flops.TERA
        found[f"{name}_full_tflops"] = full
        found[f"{name}_kv_mib"] = flops.kv_bytes(best.shape, stages, best.width) / samples / 2**20
    found["kept_tokens"] = [stage.visual[0] for stage in best.stages(plan)]
    return found


def ideal_source(work: Workload, machine: flops.Machine | None) -> str:
    """What the ideals are computed from."""
    if machine:
        return (
            f"{machine.name}: {machine.flops / 1e12:g} TFLOP/s, {machine.bandwidth / 1e12:g} TB/s; "
            "decode: bytes"
        )
    if work.device.type == "cuda":
        return "FLOPs (this GPU's peak rates are not known); decode: bytes"
    return "FLOPs; decode: bytes"


# ----------------------------------------------------------------------------- command line
def format_result(result: dict[str, Any]) -> str:
    """The figures as the lines a terminal shows."""
    lines = [
        f"{result['preset']}: {result['note']}" if result["note"] else result["preset"],
        f"plan {result['plan']}, visual tokens {result['kept_tokens']}",
        f"batch {result['batch']}, {result['device']}, {result['dtype']}, {result['backend']}, "
        f"{result['threads']} thread(s), median of interleaved runs [quartiles of the ratio]",
        f"ideal from {result['ideal_from']}",
        "",
        f"{'':<12}{'none':>12}{'plan':>12}{'speed-up':>10}{'':>15}{'ideal':>8}{'share':>8}",
    ]
    for key in ("prefill", "end_to_end", "decode", "train_step"):
        if key in result:
            part = result[key]
            low, high = part["speedup_spread"]
            lines.append(
                f"{key:<12}{part['none_ms']:>9.2f} ms{part['plan_ms']:>9.2f} ms"
                f"{part['speedup']:>9.3f}x{f'[{low:.3f}, {high:.3f}]':>16}"
                f"{part['ideal']:>7.3f}x{part['share_of_ideal']:>8.1%}"
            )
    for key in ("tower", "projector"):
        if key in result:
            lines.append(f"{key:<12}{result[key]['ms']:>9.2f} ms")
    if "prefill" in result:
        part, cut = result["prefill"], result["kernels_per_cut"]
        lines.append(
            f"{'selection':<24}{part['selection_ms']:>9.2f} ms   {part['selection_share']:.1%} of "
            f"the plan's prefill; {result['unit']} adds {cut['products']:.0f} matrix products and "
            f"{cut['other']:.0f} other kernels"
        )
    lines.append(
        f"papers' MACs {result['none_visual_tmacs']:.4g} -> {result['plan_visual_tmacs']:.4g} T, "
        f"full FLOPs {result['none_full_tflops']:.4g} -> {result['plan_full_tflops']:.4g} T, "
        f"KV cache {result['none_kv_mib']:.4g} -> {result['plan_kv_mib']:.4g} MiB a sample"
    )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava bench``."""
    parser = argparse.ArgumentParser(
        prog="llava bench",
        description="Measure the speed of a plan beside what its FLOPs allow. Random weights.",
        epilog=f"further benchmarks: llava bench {' | '.join(WHOLE_RUNS)} (--help for each)",
    )
    parser.add_argument(
        "--preset", default="cpu-512", help=", ".join(flops.PRESETS) + " (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", help="float32 (default on a CPU), bfloat16 (on a GPU), float16")
    parser.add_argument("--backend", default="sdpa", help="attention: sdpa (default), eager, ...")
    parser.add_argument("--batch", type=int, help="samples a batch (default: the preset's)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs a side (default 7)")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"what to time (default {','.join(PARTS)})"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    add_reduction_flags(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for numbers and names that cannot be."""
    for name in ("threads", "repeats", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}; accepted: 1 or more")
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype!r}; accepted: {', '.join(DTYPES)}")
    if args.device is not None and args.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device!r}; accepted: cpu, cuda")
    if (args.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda, but there is no GPU that torch can use")


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark that the flags describe."""
    check_flags(args)
    preset = flops.get_preset(args.preset)
    asked = plan_from_args(args)
    plan = ReductionPlan.parse(preset.plan) if asked is None else asked
    plan.validate(preset.shape.layers)
    parts = [part.strip() for part in args.parts.split(",")]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    torch.set_num_threads(args.threads)
    set_seed(0)
    work = build_workload(
        preset, device=device, dtype=DTYPES[dtype], backend=args.backend, batch=args.batch
    )
    result = measure(work, plan, parts=parts, repeats=args.repeats)
    return {
        "preset": args.preset,
        "note": preset.note,
        **result,
        "batch": len(work.ids),
        "new_tokens": work.new_tokens,
        "device": device,
        "dtype": dtype,
        "backend": args.backend,
        "threads": args.threads,
        "time": "CPU time of the process" if device == "cpu" else "CUDA events",
        "environment": environment(),
    }


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava bench``: see the module's docstring."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in WHOLE_RUNS:
        importlib.import_module(WHOLE_RUNS[words[0]]).main(words[1:])
        return
    args = build_parser().parse_args(words)
    check_output(args.json)
    result = bench(args)
    sys.stdout.write(format_result(result) + "\n")
    if args.json:
        json_dump(args.json, result)


if __name__ == "__main__":
    main()
