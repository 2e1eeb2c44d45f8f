"""Recorded runs of FastV's originals, checked against the package.

One decoder run in seven variants (meta.json explains them): without cuts; HF LLaVA and lmms-eval
with a cache, where the choice is made once; in-place, HF and masked without a cache, where every
token chooses anew (`rerank=True` here); masked with a cache, whose prefill alone is comparable,
because its later tokens each choose from a full cache. Masked runs keep all rows; those of kept
tokens count.

Each variant runs alone and in a batch, padded on either side, beside a text and a shorter prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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

CACHED = {"vanilla": False, "hf_cache": False, "lmms_cache": True}
"""Variants with a cache, and whether layer K-1 stores everything twice there (lmms-eval's code runs
it twice; a key that stands there twice changes nothing)."""
ANEW = ("masked_nocache", "inplace_nocache", "hf_nocache")


def plan_of(meta: dict, variant: str, backend: str) -> ReductionPlan:
    """The share for one backend, the equal number of tokens for the other."""
    if variant == "vanilla":
        return ReductionPlan()
    amount = f"r={meta['R']}" if backend == "eager" else f"keep={meta['n_keep']}"
    anew = variant in ANEW
    return ReductionPlan.parse(f"fastv:k={meta['K']},{amount},rerank={anew}")


def kept_images(output: Any) -> Tensor:
    """Indices in the uncut first sample of the image tokens that stay, and their scores."""
    cut = output.trace[0]
    return cut.origin[0][cut.keep[0]]


def check_prefill(check: Check, name: str, output: Any, expected: dict) -> None:
    """The first sample's rows of the final norm, logits and kept tokens."""
    where = kept_positions(output, 0)
    hidden = real_rows(output, output.hidden_states[-1], 0)
    recorded = expected[f"{name}.prefill_positions"]
    if name.startswith("masked"):
        check.close(f"{name}.prefill_hidden", hidden, expected[f"{name}.prefill_hidden"][where])
    else:
        check.close(f"{name}.prefill_positions", where, recorded)
        check.close(f"{name}.prefill_hidden", hidden, expected[f"{name}.prefill_hidden"])
    logits = real_rows(output, output.logits, 0)[-1]
    check.close(f"{name}.prefill_last_logits", logits, expected[f"{name}.prefill_last_logits"])


def check_cut(check: Check, name: str, output: Any, expected: dict, step: int) -> None:
    if f"{name}.kept" in expected:
        check.close(f"{name}.kept[{step}]", kept_images(output), expected[f"{name}.kept"][step])
    if f"{name}.score" in expected:
        cut, recorded = output.trace[0], expected[f"{name}.score"][step]
        score = cut.score[0][cut.valid[0]]
        check.close(f"{name}.score[{step}]", score, recorded, atol=1e-6, rtol=1e-4)


def check_cached(
    check: Check,
    name: str,
    model: Any,
    sequence: TokenSequence,
    plan: ReductionPlan,
    expected: dict,
    meta: dict,
) -> None:
    """Prefill, steps on its cache, and `generate`."""
    layers, steps = model.config.num_hidden_layers, len(expected[f"{name}.step_ids"])
    doubled = CACHED[name]

    def counts() -> Tensor:
        found = key_counts(output.past_key_values, layers, 0)
        if doubled:
            found[meta["K"] - 1] *= 2
        return found

    output = model(
        sequence=sequence,
        reduction=plan,
        use_cache=True,
        return_trace=True,
        output_hidden_states=True,
    )
    check_prefill(check, name, output, expected)
    check.close(f"{name}.cache_len_prefill", counts(), expected[f"{name}.cache_len_prefill"])
    if plan.cuts:
        check_cut(check, name, output, expected, 0)
    logits, positions = decode(model, output, steps)
    check.close(f"{name}.step_logits", logits[0], expected[f"{name}.step_logits"])
    check.close(f"{name}.step_ids", logits[0].argmax(-1), expected[f"{name}.step_ids"])
    check.close(f"{name}.cache_len_end", counts(), expected[f"{name}.cache_len_end"])
    if f"{name}.decode_positions" in expected:
        recorded = expected[f"{name}.decode_positions"][:, None].expand(-1, layers)
        check.close(f"{name}.decode_positions", positions[0], recorded)
    check_generate(check, name, model, sequence, plan, expected)


def check_generate(
    check: Check,
    name: str,
    model: Any,
    sequence: TokenSequence,
    plan: ReductionPlan,
    expected: dict,
) -> None:
    recorded = expected[f"{name}.step_ids"]
    tokens = model.generate(
        sequence=sequence,
        reduction=plan,
        max_new_tokens=len(recorded),
        do_sample=False,
        pad_token_id=0,
    )
    check.close(f"{name}.step_ids (generate)", tokens[0], recorded)


def check_anew(
    check: Check,
    name: str,
    model: Any,
    sequence: TokenSequence,
    plan: ReductionPlan,
    expected: dict,
) -> None:
    """Every token from the whole text so far, whose newest token chooses; and `generate`."""
    sequence, ids = sequence.relayout("left"), []
    for step in range(len(expected[f"{name}.step_ids"])):
        grown = sequence
        if ids:
            grown = sequence.extended(model.get_model().embed_tokens(torch.stack(ids, 1)))
        output = model(
            sequence=grown,
            reduction=plan,
            use_cache=False,
            return_trace=True,
            output_hidden_states=True,
        )
        if step == 0:
            check_prefill(check, name, output, expected)
        check_cut(check, name, output, expected, step)
        check.close(
            f"{name}.step_logits[{step}]",
            output.logits[0, -1],
            expected[f"{name}.step_logits"][step],
        )
        ids.append(output.logits[:, -1].argmax(-1))
    check.close(f"{name}.step_ids", torch.stack(ids, 1)[0], expected[f"{name}.step_ids"])
    check_generate(check, name, model, sequence, plan, expected)


def check_masked_with_cache(
    check: Check, name: str, model: Any, sequence: TokenSequence, meta: dict, expected: dict
) -> None:
    """Its prefill; later tokens follow another rule (each chooses from a full cache)."""
    output = model(
        sequence=sequence,
        reduction=plan_of(meta, name, "eager"),
        return_trace=True,
        output_hidden_states=True,
    )
    check_prefill(check, name, output, expected)
    check_cut(check, name, output, expected, 0)
    first = real_rows(output, output.logits, 0)[-1].argmax()
    check.close(f"{name}.step_ids[0]", first, expected[f"{name}.step_ids"][0])


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
        names = sorted({key.partition(".")[0] for key in expected})
        for what, samples, kind in batches(meta, inputs):
            check = Check()
            sequence = sequence_of(samples, kind)
            for name in names:
                plan = plan_of(meta, name, backend)
                if name in CACHED:
                    check_cached(check, name, model, sequence, plan, expected, meta)
                elif name in ANEW:
                    check_anew(check, name, model, sequence, plan, expected)
                elif name == "masked_cache":
                    check_masked_with_cache(check, name, model, sequence, meta, expected)
                else:
                    check.failures.append(f"the variant {name!r} is unknown")
            out.append((f"{backend}, {what}", check))
    return out
