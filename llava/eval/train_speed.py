"""``llava bench train``: what packing and a plan save of a training step.

Special here: one batch of mixed lengths (three pictures with short, long and middling text, one
sample of text alone), and the step that users have today beside ours: transformers' own padded
`LlamaForCausalLM` with the same weights, inputs, attention backend and checkpointing. All five
run in turn in one process. A step is the decoder's forward, the loss and the backward into every
weight and into the embeddings; tower, projector and optimiser are the same for all and stay out.
The ideal counts FLOPs from the lengths that run (the causal half of the attention, padding where a
step computes it, the head on the rows that get logits). Before anything is timed every step runs
once, as its warm-up, and the losses without a plan are compared: different work is not timed.

    llava bench train --preset cpu-512 --threads 1 --json train.json      # 4 minutes on one core
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.eval.speed import DTYPES, Workload, build_workload, check_flags
from llava.model.varlen_attention import VARLEN
from llava.reduction import ReductionPlan, flops
from llava.reduction.flags import add_reduction_flags, plan_from_args
from llava.sequence import Kind, Layout, TokenSequence
from llava.timing import Clock, Region, interleave
from llava.utils import check_output, environment, json_dump, progress, set_seed, user_errors

SAMPLES = ((60, True), (320, True), (150, True), (210, False))
"""(text tokens, has a picture) of each sample of the batch."""
LOSS_TOLERANCE = 1e-3


@dataclass
class Step:
    """One training step: a region to time, its loss and the FLOPs it cannot do without."""

    region: Region
    ideal: float


def mixed_batch(work: Workload) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """ids, mask, labels [B, L] (padded on the right) and pictures of `SAMPLES`; the last half of
    each text is supervised."""
    rows = []
    for text, has_picture in SAMPLES:
        ids = torch.randint(3, work.shape.vocab, (text,), device=work.device)
        mark = torch.full((1,), IMAGE_TOKEN_INDEX, device=work.device)
        rows.append(torch.cat([ids[:20], mark, ids[20:]]) if has_picture else ids)
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=work.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for index, (row, (text, _)) in enumerate(zip(rows, SAMPLES, strict=True)):
        ids[index, : len(row)], mask[index, : len(row)] = row, True
        labels[index, len(row) - text // 2 : len(row)] = row[-(text // 2) :]
    pictures = [work.images[0]] * sum(has_picture for _, has_picture in SAMPLES)
    return ids, mask, labels, pictures


def fresh(base: TokenSequence) -> TokenSequence:
    """The same batch with embeddings that take a gradient, as under a trained projector."""
    return replace(base, hidden=base.hidden.detach().clone().requires_grad_())


def our_step(work: Workload, base: TokenSequence, plan: ReductionPlan, backend: str) -> Region:
    """Ours on a batch that is laid out already."""

    def run(sequence: TokenSequence) -> Tensor:
        work.model.config._attn_implementation = backend
        out = work.model(sequence=sequence, reduction=plan, logits_to_keep="targets")
        out.loss.backward()
        return out.loss

    def prepare() -> TokenSequence:
        work.model.zero_grad(set_to_none=True)
        return fresh(base)

    return Region(run, prepare)


def hf_step(work: Workload, base: TokenSequence, checkpointing: bool) -> Region:
    """transformers' own model with the same weights on the same padded batch."""
    config = LlamaConfig.from_dict(work.model.config.to_dict())
    config._attn_implementation = work.model.config._attn_implementation
    with torch.device(work.device):
        model = LlamaForCausalLM(config).train()
    own = {k: v for k, v in work.model.state_dict().items() if k in model.state_dict()}
    model.load_state_dict(own, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mask = (base.origin >= 0).long()
    labels = torch.full_like(base.target, IGNORE_INDEX)
    labels[:, 1:] = base.target[:, :-1]

    def run(hidden: Tensor) -> Tensor:
        out = model(inputs_embeds=hidden, attention_mask=mask, labels=labels, use_cache=False)
        out.loss.backward()
        return out.loss

    def prepare() -> Tensor:
        model.zero_grad(set_to_none=True)
        return base.hidden.detach().clone().requires_grad_()

    return Region(run, prepare)


def padded_layout(layout: Layout) -> Layout:
    """Every sample as long as the longest: what a padded step computes."""
    return replace(layout, lengths=(max(layout.lengths),) * len(layout.lengths))


def steps(work: Workload, plan: ReductionPlan, checkpointing: bool = False) -> dict[str, Step]:
    """The five steps, by the name of their time in ``--json``."""
    ids, mask, labels, pictures = mixed_batch(work)
    layers, none = work.shape.layers, ReductionPlan()

    def laid_out(kind: Kind) -> TokenSequence:
        with torch.no_grad():
            return work.model.build_sequence(ids, mask, labels, pictures, kind=kind)

    def ideal(plan: ReductionPlan, padded: bool, logit_rows: int) -> float:
        stages = plan.schedule(packed.layout, layers)
        if padded:
            stages = tuple(replace(s, layout=padded_layout(s.layout)) for s in stages)
        return flops.train_flops(work.shape, stages, logit_rows, checkpointing=checkpointing)

    padded, packed = laid_out("right"), laid_out("packed")
    rows, all_rows = sum(packed.layout.targets), padded.layout.width * len(SAMPLES)
    backend = work.model.config._attn_implementation
    varlen = VARLEN if backend == "sdpa" else backend
    return {
        "hf_padded_none": Step(hf_step(work, padded, checkpointing), ideal(none, True, all_rows)),
        "padded_none": Step(our_step(work, padded, none, backend), ideal(none, True, rows)),
        "padded_plan": Step(our_step(work, padded, plan, backend), ideal(plan, True, rows)),
        "packed_none": Step(our_step(work, packed, none, varlen), ideal(none, False, rows)),
        "packed_plan": Step(our_step(work, packed, plan, varlen), ideal(plan, False, rows)),
    }


def check_losses(found: dict[str, Step]) -> dict[str, float]:
    """Losses of one untimed run each. RuntimeError when those without a plan are not equal."""
    losses = {
        name: float(step.region.run(step.region.prepare()).detach())
        for name, step in progress(found.items(), "five steps, losses", len(found), unit="step")
    }
    whole = [losses[name] for name in ("hf_padded_none", "padded_none", "packed_none")]
    if max(whole) - min(whole) > LOSS_TOLERANCE * max(whole):
        raise RuntimeError(f"the steps do not compute the same loss: {losses}")
    return losses


def measure(
    work: Workload, plan: ReductionPlan, repeats: int, checkpointing: bool = False
) -> dict[str, Any]:
    """Time all steps in turn; what ``--json`` writes (times in ms, ideals as speed-ups)."""
    plan.validate(work.shape.layers)
    work.model.train()
    if checkpointing:
        work.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = steps(work, plan, checkpointing)
    losses = check_losses(found)
    regions = {name: step.region for name, step in found.items()}
    series = interleave(regions, Clock(work.device), repeats, warmup=0, desc="five steps, timed")
    result: dict[str, Any] = {"plan": str(plan), "losses": losses}
    result |= {f"{name}_ms": one.ms for name, one in series.items()}
    result["spread_ms"] = {name: list(one.spread) for name, one in series.items()}
    result["tflops"] = {name: step.ideal / flops.TERA for name, step in found.items()}
    best = found["packed_plan"].ideal
    for short, name in (("packed", "packed_none"), ("hf", "hf_padded_none")):
        result[f"ideal_{short}"] = found[name].ideal / best
        result[f"speedup_{short}"] = result[f"{name}_ms"] / result["packed_plan_ms"]
        result[f"share_{short}"] = result[f"speedup_{short}"] / result[f"ideal_{short}"]
    return result


def format_result(result: dict[str, Any]) -> str:
    """The lines a terminal shows."""
    text = ", ".join(f"{n}{' + picture' if picture else ''}" for n, picture in SAMPLES)
    lines = [
        f"{result['preset']}: one training step, text tokens {text}",
        f"plan {result['plan']}",
        f"{result['device']}, {result['dtype']}, {result['backend']}, {result['threads']} "
        f"thread(s), checkpointing {'on' if result['checkpointing'] else 'off'}, median of "
        "interleaved runs [quartiles]",
        "",
    ]
    names = {
        "hf_padded_none": "transformers' model, padded",
        "padded_none": "padded, no plan",
        "padded_plan": "padded, plan",
        "packed_none": "packed, no plan",
        "packed_plan": "packed, plan",
    }
    for name, words in names.items():
        low, high = result["spread_ms"][name]
        lines.append(f"{words:<30}{result[f'{name}_ms']:>10.1f} ms   [{low:.1f}, {high:.1f}]")
    lines.append("")
    for short, words in (("packed", "packed, no plan"), ("hf", "transformers' model, padded")):
        lines.append(
            f"packed with the plan against {words}: {result[f'speedup_{short}']:.3f}x, ideal "
            f"{result[f'ideal_{short}']:.3f}x, {result[f'share_{short}']:.1%} of it"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava bench train``."""
    parser = argparse.ArgumentParser(
        prog="llava bench train",
        description="A training step, padded and packed, without and with a plan. Random weights.",
    )
    parser.add_argument(
        "--preset", default="cpu-512", help=", ".join(flops.PRESETS) + " (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", help="float32 (default on a CPU), bfloat16 (on a GPU), float16")
    parser.add_argument(
        "--backend", default="sdpa", help="attention: sdpa (default), flash_attention_2"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a step (default 3)")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute layers twice, keep less"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.set_defaults(batch=1)
    add_reduction_flags(parser)
    return parser


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava bench train``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    check_flags(args)
    check_output(args.json)
    preset = flops.get_preset(args.preset)
    asked = plan_from_args(args)
    plan = ReductionPlan.parse(preset.plan) if asked is None else asked
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    torch.set_num_threads(args.threads)
    set_seed(0)
    work = build_workload(preset, device=device, dtype=DTYPES[dtype], backend=args.backend, batch=1)
    result = {
        "preset": args.preset,
        "device": device,
        "dtype": dtype,
        "backend": args.backend,
        "threads": args.threads,
        "checkpointing": args.gradient_checkpointing,
        **measure(work, plan, args.repeats, args.gradient_checkpointing),
        "time": "CPU time of the process" if device == "cpu" else "CUDA events",
        "environment": environment(),
    }
    sys.stdout.write(format_result(result) + "\n")
    if args.json:
        json_dump(args.json, result)


if __name__ == "__main__":
    main()
