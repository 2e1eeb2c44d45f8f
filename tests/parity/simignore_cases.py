"""Recorded runs of Simignore's original code, checked against the package.

A case is one decoder run in up to three variants of the similarity step (`clean`, `m7b`, `m13b`:
the text compared with, the first pair and the step of the walk), each with the original's FastV
behind it (`_fastv`) and alone (`_simonly`). The recordings have no cache: every token is chosen
from the whole text so far, with the similarity as it was and FastV anew. `derived_static_cache`
holds what the frozen choice with a cache must give; alone, the similarity step gives the same with
and without one. Rows of dropped tokens, which the original computes and masks, do not count.

Each variant runs alone and in a padded batch beside a text and a shorter prompt, padded on the left
with one backend and on the right with the other. Where the recording's FastV looks at a span that
begins one token late (the original's own constants), its image tokens alone cannot show the same
choice: there the tokens that the similarity step has left are put together again with FastV's span
as the group, alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastv_cases import batches
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
from safetensors.torch import load_file
from torch import Tensor

from llava.prompting import pad_texts
from llava.reduction import Cut, FastV, ReductionPlan, Simignore
from llava.sequence import GROUP, Group, Layout, TokenSequence

SIMILARITY: dict[str, dict[str, Any]] = {
    "clean": {"text": "option_words"},
    "m7b": {"text": "option_words", "offset": 1},
    "m13b": {"text": "options", "step": 2},
}

SIDES = {"eager": "left", "sdpa": "right"}
ANEW = 3
"""Tokens of a batch that are chosen anew, each by a run over the whole text; alone it is all."""


def plan_of(meta: dict, name: str) -> ReductionPlan:
    variant, _, stage = name.partition("_")
    cuts = [Cut(0, Simignore(keep=meta["k2"], **SIMILARITY[variant]))]
    if stage == "fastv":
        cuts.append(Cut(meta["K"], FastV(keep=meta["fastv_n_keep"])))
    return ReductionPlan(tuple(cuts), positions="original")


def texts_of(inputs: dict, samples: list[Embedded]) -> dict[str, Tensor]:
    """The recorded texts; a prompt without a picture has none."""
    recorded = {
        "option_words": inputs["sim_text_ids_7b"].tolist(),
        "options": inputs["sim_text_ids_13b"].tolist(),
    }
    return pad_texts(
        [recorded if s.visual else {"option_words": [], "options": []} for s in samples]
    )


def first_group(cut: Any) -> tuple[Tensor, Tensor]:
    """Indices in the uncut first sample of the tokens that competed, and which of them stay."""
    return cut.origin[0][cut.valid[0]], cut.keep[0][cut.valid[0]]


def check_similarity(check: Check, name: str, cut: Any, expected: dict, meta: dict) -> None:
    origin, keep = first_group(cut)
    mask = torch.ones(meta["L"], dtype=torch.long)
    mask[origin] = keep.long()
    check.close(f"{name}.sim_kept", origin[keep], expected[f"{name}.sim_kept"])
    check.close(f"{name}.attention_mask", mask, expected[f"{name}.attention_mask"])


def check_fastv(check: Check, name: str, cut: Any, expected: dict, meta: dict, step: int) -> None:
    """What FastV keeps, and its scores; a token that is no longer there has none."""
    origin, keep = first_group(cut)
    check.close(f"{name}.kept[{step}]", origin[keep], expected[f"{name}.kept"][step])
    score = torch.zeros(meta["image_len"])
    score[origin - meta["fastv_span_start"]] = cut.score[0][cut.valid[0]]
    recorded = expected[f"{name}.score"][step]
    check.close(f"{name}.score[{step}]", score, recorded, atol=1e-6, rtol=1e-4)


def check_prefill(check: Check, name: str, output: Any, expected: dict) -> None:
    """Rows of the final norm and their positions, where the recording has all rows those kept."""
    where = kept_positions(output, 0)
    hidden = real_rows(output, output.hidden_states[-1], 0)
    positions = real_rows(output, output.sequence.position, 0)
    recorded = {key: expected[f"{name}.{key}"] for key in ("prefill_positions", "prefill_hidden")}
    if name.endswith("simonly"):
        recorded = {key: value[where] for key, value in recorded.items()}
    check.close(f"{name}.prefill_positions", positions, recorded["prefill_positions"])
    check.close(f"{name}.prefill_hidden", hidden, recorded["prefill_hidden"])
    logits = real_rows(output, output.logits, 0)[-1]
    check.close(f"{name}.prefill_last_logits", logits, expected[f"{name}.prefill_last_logits"])


def check_anew(
    check: Check,
    name: str,
    model: Any,
    sequence: TokenSequence,
    plan: ReductionPlan,
    expected: dict,
    meta: dict,
    backend: str,
) -> None:
    """Every token from the whole text so far, whose newest token ranks; and, once, `generate`."""
    sequence, ids = sequence.relayout("left"), []
    recorded = expected[f"{name}.step_ids"]
    alone = len(sequence.layout.lengths) == 1
    for step in range(len(recorded) if alone else ANEW):
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
        if isinstance(plan.cuts[-1].reducer, FastV):
            check_fastv(check, name, output.trace[-1], expected, meta, step)
        logits = expected[f"{name}.step_logits"][step]
        check.close(f"{name}.step_logits[{step}]", output.logits[0, -1], logits)
        ids.append(output.logits[:, -1].argmax(-1))
    check.close(f"{name}.step_ids", torch.stack(ids, 1)[0], recorded[: len(ids)])
    if alone and backend == BACKENDS[0]:
        anew = replace(plan, rerank=True)
        check_generate(check, f"{name}.step_ids", model, sequence, anew, recorded)


def check_generate(
    check: Check, name: str, model: Any, sequence: TokenSequence, plan: ReductionPlan, ids: Tensor
) -> None:
    tokens = model.generate(
        sequence=sequence,
        reduction=plan,
        max_new_tokens=len(ids),
        do_sample=False,
        pad_token_id=0,
    )
    check.close(f"{name} (generate)", tokens[0], ids)


def check_cached(
    check: Check,
    name: str,
    model: Any,
    sequence: TokenSequence,
    plan: ReductionPlan,
    static: dict,
) -> Any:
    """A prefill with its cache, steps on it, and `generate`; returns the prefill."""
    output = model(sequence=sequence, reduction=plan, use_cache=True, return_trace=True)
    steps, layers = len(static[f"{name}.static_step_ids"]), model.config.num_hidden_layers
    if f"{name}.static_kept" in static:
        origin, keep = first_group(output.trace[-1])
        check.close(f"{name}.static_kept", origin[keep], static[f"{name}.static_kept"])
    logits, _ = decode(model, output, steps)
    check.close(f"{name}.static_step_logits", logits[0], static[f"{name}.static_step_logits"])
    ids = static[f"{name}.static_step_ids"]
    check.close(f"{name}.static_step_ids", logits[0].argmax(-1), ids)
    check_generate(check, f"{name}.static_step_ids", model, sequence, plan, ids)
    counts = key_counts(output.past_key_values, layers, 0)
    check.close(f"{name}.static_cache_len_end", counts, static[f"{name}.static_cache_len_end"])
    return output


def shifted(sequence: TokenSequence, kept: Tensor, meta: dict) -> TokenSequence:
    """What the similarity step has left of an uncut sequence of one sample, with FastV's own span
    as the group. kept: indices of image tokens."""
    start, stop = meta["image_start"], meta["image_start"] + meta["image_len"]
    index = torch.arange(sequence.layout.width)
    index = index[(index < start) | (index >= stop) | torch.isin(index, kept)]
    facts = sequence.facts[:, index].clone()
    first = meta["fastv_span_start"]
    in_span = (index >= first) & (index < first + meta["image_len"])
    facts[0, :, GROUP] = torch.where(in_span, 0, -1)
    count = int(in_span.sum())
    layout = Layout((len(index),), (Group(0, 0, count, count),), (1,))
    return replace(sequence, hidden=sequence.hidden[:, index], facts=facts, layout=layout)


@torch.no_grad()
def run_case(case: Path) -> Iterator[tuple[str, Check]]:
    """Run one case on every backend, alone and in batches: (variant, Check)."""
    for backend in BACKENDS:
        model, meta, inputs, expected = load_decoder(case, backend)
        static = load_file(case / "derived_static_cache.safetensors")
        names = sorted({key.partition(".")[0] for key in expected})
        for what, samples, kind in batches(meta, inputs):
            if len(samples) > 1 and kind != SIDES[backend]:
                continue
            check = Check()
            sequence = sequence_of(samples, kind, texts_of(inputs, samples))
            for name in names:
                run_variant(check, name, model, sequence, expected, static, meta, backend)
            yield f"{backend}, {what}", check


def run_variant(
    check: Check,
    name: str,
    model: Any,
    sequence: TokenSequence,
    expected: dict,
    static: dict,
    meta: dict,
    backend: str,
) -> None:
    if name.partition("_")[0] not in SIMILARITY or not name.endswith(("_fastv", "_simonly")):
        check.failures.append(f"the variant {name!r} is unknown")
        return
    plan, first = plan_of(meta, name), sequence
    late = name.endswith("_fastv") and meta["fastv_span_start"] != meta["image_start"]
    similarity = replace(plan, cuts=plan.cuts[:1])
    trace = model(sequence=sequence, reduction=similarity, return_trace=True, use_cache=False).trace
    check_similarity(check, name, trace[0], expected, meta)
    if late:
        if len(sequence.layout.lengths) > 1:
            return
        origin, keep = first_group(trace[0])
        first, plan = shifted(sequence, origin[keep], meta), replace(plan, cuts=plan.cuts[1:])
    check_anew(check, name, model, first, plan, expected, meta, backend)
    check_cached(check, name, model, first, plan, static)
