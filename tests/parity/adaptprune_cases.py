"""Recorded runs of AdaptPrune's original, checked against the package.

Checked are the three cues, the score before each pick, the order of the picks, kept positions, the
rows behind the last layer, KV lengths, decoding steps and greedy tokens. The original runs layer
K-1 twice against one cache, so everything stands there twice; here it stands once. The score of a
picked token has no meaning and is left out.

A case runs alone, and in batches padded on either side beside a text and a shorter prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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

from llava.reduction import AdaptPrune, Cut, ReductionPlan, Selection, View
from llava.reduction.adaptprune import centre_weight, greedy, grid_places

SCORE = {"atol": 1e-9, "rtol": 5e-5}
"""Scores are small numbers, so their tolerance is relative; measured: 1e-5."""


class Watched(AdaptPrune):
    """AdaptPrune that remembers what it was shown."""

    seen: list[View]

    def select(self, view: View) -> Selection:
        self.seen.append(view)
        return super().select(view)


def method_of(settings: dict) -> Watched:
    method = Watched(
        keep=float(settings["ratio"]),
        sigma_c=settings["center_sigma"],
        sigma_d=settings["distance_sigma"],
        sigma_s=settings["similarity_sigma"],
        distance=settings["distance_limit"],
    )
    object.__setattr__(method, "seen", [])
    return method


def check_cues(check: Check, method: Watched, view: View, rows: int, expected: dict) -> None:
    """The first `rows` groups of the view are the recorded samples."""
    attention, keys = (view.signals[signal][:rows] for signal in method.signals)
    check.close("attn_image", attention, expected["attn_image"], **SCORE)
    check.close("key_unit", F.normalize(keys, dim=-1), expected["key_unit"], atol=1e-5)
    place, extent = grid_places(view.cell, view.valid)
    centre = centre_weight(place, extent, method.sigma_c)[:rows]
    mask = expected["centre_mask"].flatten().expand(rows, -1)
    check.close("centre_mask", centre, mask, atol=1e-6)
    scores = view.signals[method.signals[0]] * centre_weight(place, extent, method.sigma_c)
    check.close("scores0", scores[:rows], expected["scores0"], **SCORE)
    factor = method.suppression(place, view.signals[method.signals[1]])
    order = greedy(scores, factor, view)[:rows, : expected["selection_order"].shape[1]]
    check.close("selection_order", order, expected["selection_order"])
    check_steps(check, scores[:rows].clone(), factor[:rows], order, expected["score_at_step"])


def check_steps(
    check: Check, score: Tensor, factor: Tensor, order: Tensor, recorded: Tensor
) -> None:
    """What each pick saw, but for the tokens that were picked already."""
    rows = torch.arange(len(score))
    open_still = torch.ones_like(score, dtype=torch.bool)
    for step in range(order.shape[1]):
        seen, known = score * open_still, recorded[:, step] * open_still
        check.close(f"score_at_step[{step}]", seen, known, **SCORE)
        picked = order[:, step]
        score *= factor[rows, picked]
        open_still[rows, picked] = False


def check_run(
    check: Check, model: Any, method: Watched, samples: Sequence[Embedded], kind: Any, case: dict
) -> None:
    settings, expected, meta = case["meta"]["settings"], case["expected"], case["meta"]
    plan = ReductionPlan((Cut(settings["K"], method),), positions="original")
    sequence, rows = sequence_of(samples, kind), settings["B"]
    output = model(
        sequence=sequence,
        reduction=plan,
        use_cache=True,
        return_trace=True,
        output_hidden_states=True,
    )
    check_cues(check, method, method.seen[-1], rows, expected)
    layers = model.config.num_hidden_layers
    last = settings["K"] - 1

    def counts(sample: int) -> Tensor:
        found = key_counts(output.past_key_values, layers, sample)
        found[last] *= 2
        return found

    for sample in range(rows):
        valid = sequence.origin[sample] >= 0
        got = {
            "kept_indices": kept_positions(output, sample),
            "hidden_final": real_rows(output, output.hidden_states[-1], sample),
            "logits": real_rows(output, output.logits, sample),
        }
        if kind == "left" or not sequence.layout.is_padded:  # a cache is laid out left-padded
            before = output.hidden_states[settings["K"]][sample]
            got["hidden_before_prune"] = before[valid]
        for name, value in got.items():
            check.close(f"{name}[{sample}]", value, expected[name][sample])
        recorded = torch.tensor(meta["kv_lengths_after_prefill"])
        check.close(f"kv_lengths_after_prefill[{sample}]", counts(sample), recorded)

    logits, positions = decode(model, output, expected["decode_tokens"].shape[1])
    tokens = model.generate(
        sequence=sequence,
        reduction=plan,
        max_new_tokens=logits.shape[1],
        do_sample=False,
        pad_token_id=0,
    )
    following = torch.arange(logits.shape[1] - 1)[:, None] + settings["seq_len"]
    recorded = torch.tensor(meta[f"kv_lengths_after_{len(following)}_decode"])
    for sample in range(rows):
        greedy_ids = expected["decode_tokens"][sample]
        check.close(f"decode_tokens[{sample}]", logits[sample].argmax(-1), greedy_ids)
        check.close(f"decode_tokens[{sample}] (generate)", tokens[sample], greedy_ids)
        check.close(
            f"decode_logits[{sample}]", logits[sample, 1:], expected["decode_logits"][sample]
        )
        check.close(f"positions[{sample}]", positions[sample], following.expand(-1, layers))
        check.close(f"kv_lengths_after_decode[{sample}]", counts(sample), recorded)
    if len(samples) == rows:
        vanilla = model(sequence=sequence, reduction="none").logits
        check.close("vanilla_logits", vanilla, expected["vanilla_logits"])


def batches(meta: dict, inputs: dict) -> Iterator[tuple[str, list[Embedded], Any]]:
    """(what it is, samples, padding side); the recorded prompts come first."""
    settings = meta["settings"]
    side, start = settings["G"], settings["S"]
    prompts = [Embedded(hidden, start, side, side) for hidden in inputs["inputs_embeds"]]
    yield "alone", prompts, "left"
    first = prompts[0]
    text = Embedded(torch.cat([first.hidden[:start], first.hidden[start + first.visual :]]))
    for kind in ("left", "right"):
        yield f"batch, {kind} padding", [*prompts, text, first.without_last(2)], kind


@torch.no_grad()
def run_case(case: Path) -> list[tuple[str, Check]]:
    """Run one case on every backend, alone and in batches: [(variant, Check)]."""
    out = []
    for backend in BACKENDS:
        model, meta, inputs, expected = load_decoder(case, backend)
        for what, samples, kind in batches(meta, inputs):
            check = Check()
            facts = {"meta": meta, "expected": expected}
            check_run(check, model, method_of(meta["settings"]), samples, kind, facts)
            out.append((f"{backend}, {what}", check))
    return out
