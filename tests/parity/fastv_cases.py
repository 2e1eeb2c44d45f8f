"""Recorded runs of FastV's originals, checked against the package.

One decoder run in seven variants (meta.json explains them): without cuts; HF LLaVA and lmms-eval
with a cache, where the choice is made once; in-place, HF and masked without a cache, where every
token chooses anew (`rerank=True` here); masked with a cache, whose prefill alone is comparable,
because its later tokens each choose from a full cache. Masked runs keep all rows; those of kept
tokens count.

Each variant runs alone on every backend and, with sdpa, in a batch, padded on either side, beside a
text and a shorter prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from recorded import (
    BACKENDS,
    Check,
    Embedded,
    decode,
    kept_positions,
    key_counts,
    load_decoder,
    real_rows,
    sequence_of,
)
from torch import Tensor

from llava.reduction import ReductionPlan
from llava.sequence import TokenSequence

CACHED = ("hf_cache", "lmms_cache")
ANEW = ("masked_nocache", "inplace_nocache", "hf_nocache")
NAMES = ("vanilla", *CACHED, *ANEW, "masked_cache")


def plan_of(meta: dict, backend: str, rerank: bool) -> ReductionPlan:
    """The share for one backend, the equal number of tokens for the other."""
    amount = f"r={meta['R']}" if backend == "eager" else f"keep={meta['n_keep']}"
    return ReductionPlan.parse(f"fastv:k={meta['K']},{amount},rerank={rerank}")


@dataclass
class Run:
    """What the first sample of a batch did. outputs: of each pass over a whole text; logits of the
    steps [steps, V]; tokens that `generate` gave [steps]; with a cache the keys of each layer after
    prefill and steps, and positions of the steps [steps - 1, layers]."""

    outputs: list[Any]
    logits: Tensor
    tokens: Tensor
    keys: tuple[Tensor, Tensor] | None = None
    positions: Tensor | None = None


def run_cached(model: Any, sequence: TokenSequence, plan: ReductionPlan, steps: int) -> Run:
    """Prefill, steps on its cache, and `generate`."""
    layers = model.config.num_hidden_layers
    output = model(
        sequence=sequence,
        reduction=plan,
        use_cache=True,
        return_trace=True,
        output_hidden_states=True,
    )
    before = key_counts(output.past_key_values, layers, 0)
    logits, positions = decode(model, output, steps)
    after = key_counts(output.past_key_values, layers, 0)
    tokens = generated(model, sequence, plan, steps)
    return Run([output], logits[0], tokens, (before, after), positions[0])


def run_anew(model: Any, sequence: TokenSequence, plan: ReductionPlan, steps: int) -> Run:
    """Every token from the whole text so far, whose newest token chooses; and `generate`."""
    sequence, ids, outputs = sequence.relayout("left"), [], []
    for _ in range(steps):
        grown = sequence
        if ids:
            grown = sequence.extended(model.get_model().embed_tokens(torch.stack(ids, 1)))
        outputs.append(
            model(
                sequence=grown,
                reduction=plan,
                use_cache=False,
                return_trace=True,
                output_hidden_states=True,
            )
        )
        ids.append(outputs[-1].logits[:, -1].argmax(-1))
    logits = torch.stack([output.logits[0, -1] for output in outputs])
    return Run(outputs, logits, generated(model, sequence, plan, steps))


def generated(model: Any, sequence: TokenSequence, plan: ReductionPlan, steps: int) -> Tensor:
    call = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    return model.generate(sequence=sequence, reduction=plan, **call)[0]


def check_prefill(check: Check, name: str, run: Run, expected: dict) -> None:
    """The rows of the final norm, and the logits of the last one."""
    output = run.outputs[0]
    where = kept_positions(output, 0)
    hidden, recorded = real_rows(output, output.hidden_states[-1], 0), f"{name}.prefill_hidden"
    if name.startswith("masked"):
        check.close(recorded, hidden, expected[recorded][where])
    else:
        check.close(recorded, hidden, expected[recorded])
        check.close(f"{name}.prefill_positions", where, expected[f"{name}.prefill_positions"])
    logits = real_rows(output, output.logits, 0)[-1]
    check.close(f"{name}.prefill_last_logits", logits, expected[f"{name}.prefill_last_logits"])


def check_cuts(check: Check, name: str, run: Run, expected: dict) -> None:
    """Kept tokens and scores of every pass over a whole text."""
    for step, output in enumerate(run.outputs):
        cut = output.trace[0]
        kept, score = cut.origin[0][cut.keep[0]], cut.score[0][cut.valid[0]]
        check.close(f"{name}.kept[{step}]", kept, expected[f"{name}.kept"][step])
        if f"{name}.score" in expected:
            recorded = expected[f"{name}.score"][step]
            check.close(f"{name}.score[{step}]", score, recorded, atol=1e-6, rtol=1e-4)


def check_steps(check: Check, name: str, run: Run, expected: dict, meta: dict) -> None:
    ids = expected[f"{name}.step_ids"]
    check.close(f"{name}.step_logits", run.logits, expected[f"{name}.step_logits"])
    check.close(f"{name}.step_ids", run.logits.argmax(-1), ids)
    check.close(f"{name}.step_ids (generate)", run.tokens, ids)
    if run.keys is None or run.positions is None:
        return
    for when, counts in zip(("prefill", "end"), run.keys, strict=True):
        if name == "lmms_cache":  # runs layer K-1 twice, so every key stands there twice
            counts = counts.clone()
            counts[meta["K"] - 1] *= 2
        check.close(f"{name}.cache_len_{when}", counts, expected[f"{name}.cache_len_{when}"])
    if f"{name}.decode_positions" in expected:
        recorded = expected[f"{name}.decode_positions"][:, None].expand_as(run.positions)
        check.close(f"{name}.decode_positions", run.positions, recorded)


def check_batch(
    check: Check, model: Any, sequence: TokenSequence, meta: dict, expected: dict, backend: str
) -> None:
    """Three runs of the package against all recorded variants."""
    names = {key.partition(".")[0] for key in expected}
    check.failures += [f"the variant {name!r} is unknown" for name in names - set(NAMES)]
    steps = meta["steps"]
    vanilla = run_cached(model, sequence, ReductionPlan(), steps)
    frozen = run_cached(model, sequence, plan_of(meta, backend, False), steps)
    anew = run_anew(model, sequence, plan_of(meta, backend, True), steps)
    for name in sorted(names & set(NAMES)):
        run = vanilla if name == "vanilla" else anew if name in ANEW else frozen
        check_prefill(check, name, run, expected)
        if name != "vanilla":
            check_cuts(check, name, run, expected)
        if name != "masked_cache":  # whose later tokens each choose from a full cache
            check_steps(check, name, run, expected, meta)


def batches(meta: dict, inputs: dict) -> Iterator[tuple[str, list[Embedded], Any]]:
    """(what it is, samples, padding side); the recorded prompt is the first sample."""
    hidden = inputs["inputs_embeds"][0]
    side = round(meta["image_len"] ** 0.5)
    prompt = Embedded(hidden, meta["image_start"], side, side)
    if prompt.visual != meta["image_len"]:
        prompt = replace(prompt, rows=1, columns=meta["image_len"])
    text = Embedded(torch.cat([hidden[: prompt.start], hidden[prompt.start + prompt.visual :]]))
    yield "alone", [prompt], "left"
    for kind in ("left", "right"):
        yield f"batch, {kind} padding", [prompt, text, prompt.without_last(3)], kind


@torch.no_grad()
def run_case(case: Path) -> list[tuple[str, Check]]:
    """Run one case on every backend, alone and in batches: [(variant, Check)]."""
    out = []
    for backend in BACKENDS:
        model, meta, inputs, expected = load_decoder(case, backend)
        for what, samples, kind in batches(meta, inputs):
            if len(samples) > 1 and backend != "sdpa":
                continue
            check = Check()
            check_batch(check, model, sequence_of(samples, kind), meta, expected, backend)
            out.append((f"{backend}, {what}", check))
    return out
