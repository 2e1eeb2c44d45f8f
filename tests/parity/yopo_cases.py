"""Recorded runs of YOPO's original simulation, checked against the package.

A case folder holds config.json, meta.json, headmask.npy, weights, inputs, expected (the original:
mode `leaky`) and derived tensors (keys removed in front of the softmax: `renorm` as
`renorm_all_*`, `renorm_layers` as `renorm_layers_*`; text rows only). Every case runs alone and
beside other samples, padded on either side, which must not change it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded import BACKENDS, Check, Embedded, load_decoder, real_rows, sequence_of
from safetensors.torch import load_file
from torch import Tensor

from llava.model.yopo_layer import seen_by
from llava.reduction import YOPO, Cut, DropVisual, ReductionPlan

MODES = {"leaky": "", "renorm": "renorm_all_", "renorm_layers": "renorm_layers_"}


def settings_of(case: Path, meta: dict, mode: str) -> YOPO:
    """What the case ran with; `layercut_num` of the depth means that no layer was cut."""
    said, depth = meta["settings"], json.loads((case / "config.json").read_text())
    cut = said["layercut_num"]
    return YOPO(
        layers=cut if cut < depth["num_hidden_layers"] else None,
        heads=str(case / "headmask.npy"),
        window=said["window"],
        ffn=said["mlpcut_ratio"],
        mode=mode,
    )


def plan_of(settings: YOPO) -> ReductionPlan:
    free = settings.first_free
    cuts = () if free is None else (Cut(free, DropVisual()),)
    return ReductionPlan(cuts, positions="original", program=settings)


def samples_of(meta: dict, inputs: dict[str, Tensor]) -> list[Embedded]:
    said = meta["settings"]
    return [
        Embedded(embeds, said["image_start"], said["grid"], said["grid"])
        for embeds in inputs["inputs_embeds"]
    ]


def run_case(case: Path) -> Iterator[tuple[str, Check]]:
    derived = load_file(case / "derived.safetensors")
    for backend in BACKENDS:
        model, meta, inputs, expected = load_decoder(case, backend)
        check, samples = Check(), samples_of(meta, inputs)
        with torch.no_grad():
            plain = model(sequence=sequence_of(samples, "left"), reduction="none")
        check.close("vanilla_logits", plain.logits, expected["vanilla_logits"])
        yield f"none {backend}", check
        for mode, prefix in MODES.items():
            settings = settings_of(case, meta, mode)
            wanted = expected if mode == "leaky" else derived
            wanted = {k.removeprefix(prefix): v for k, v in wanted.items() if k.startswith(prefix)}
            wanted["decode_tokens"] = expected.get("decode_tokens")
            yield f"{mode} {backend}", check_mode(model, settings, samples, wanted)
    yield "masks", check_masks(settings_of(case, meta, "leaky"), meta, inputs)


@torch.no_grad()
def check_mode(
    model: Any, settings: YOPO, samples: list[Embedded], wanted: dict[str, Tensor]
) -> Check:
    """One mode: prefill and decoding, alone and in a padded batch."""
    check, plan, first = Check(), plan_of(settings), samples[0]
    output = model(
        sequence=sequence_of(samples, "left"),
        reduction=plan,
        use_cache=True,
        output_hidden_states=True,
        return_trace=True,
    )
    logits = output.logits
    if settings.mode == "leaky":
        check.close("logits", logits, wanted["logits"])
        check.close("hidden_states", torch.stack(output.hidden_states), wanted["hidden_states"])
    else:
        if settings.first_free is not None:
            behind = output.hidden_states[settings.first_free]
            check.close("hidden_at_layercut", behind, wanted["hidden_at_layercut"])
        text = output.sequence.cell[0, :, 0] < 0
        check.close("text_logits", logits[:, text], wanted["text_logits"])
        final = output.hidden_states[-1][:, text]
        check.close("text_hidden_final", final, wanted["text_hidden_final"])
    # Longer and shorter samples and one without a picture beside it.
    longer = replace(first, hidden=torch.cat([first.hidden, first.hidden[-4:]]))
    beside = [first, longer, first.without_last(5), Embedded(first.hidden[-6:])]
    for side in ("left", "right"):
        batch = sequence_of(beside, side)
        together = model(sequence=batch, reduction=plan, use_cache=True, return_trace=True)
        mine = real_rows(together, together.logits, 0)
        check.close(f"beside others, padded {side}", mine, logits[0])
        if wanted["decode_tokens"] is not None:
            check_decoding(check, model, together, wanted, f"decode beside others, {side}")
    if wanted["decode_tokens"] is not None:
        check_decoding(check, model, output, wanted, "decode")
    return check


def check_decoding(check: Check, model: Any, output: Any, wanted: dict, name: str) -> None:
    """Teacher-forced on the recorded tokens; those are the greedy ones of the leaky mode."""
    tokens, cache = wanted["decode_tokens"], output.past_key_values
    logits, greedy = [], [real_rows(output, output.logits, 0)[-1].argmax()]
    for step in range(tokens.shape[1] - 1):
        token = tokens[:, step : step + 1].expand(output.logits.shape[0], 1)
        logits.append(model(token, past_key_values=cache).logits[0, -1])
        greedy.append(logits[-1].argmax())
    if "decode_logits" in wanted:
        check.close(f"{name}_logits", torch.stack(logits)[None], wanted["decode_logits"])
        check.close(f"{name}_tokens", torch.stack(greedy)[None], tokens)
    else:
        recorded = wanted["decode_logits_same_tokens"]
        check.close(f"{name}_logits", torch.stack(logits)[None], recorded)
        check.close(f"{name}_argmax", torch.stack(greedy[1:])[None], recorded.argmax(-1))


def check_masks(settings: YOPO, meta: dict, inputs: dict[str, Tensor]) -> Check:
    """Kept heads and neighbours, against the settings written out cell by cell."""
    check, said = Check(), meta["settings"]
    depth, heads = inputs["head_mask"].shape
    kept = torch.zeros(depth, heads, dtype=torch.bool)
    for layer in range(depth):
        kept[layer, list(settings.kept_heads(layer, heads))] = True
    check.close("head_mask", kept, inputs["head_mask"].bool())
    if settings.window is not None:
        side, start, count = said["grid"], said["image_start"], said["n_image"]
        row, column = np.divmod(np.arange(count), side)
        reach = int((said["window"] - 1) / 2)
        near = np.abs(row[:, None] - row) <= reach
        near &= np.abs(column[:, None] - column) <= reach
        facts = sequence_of(samples_of(meta, inputs)[:1], "left").facts
        seen = seen_by(settings, facts, None)[0]
        picture = slice(start, start + count)
        check.close("neighbours", seen[picture, picture], torch.from_numpy(near))
        check.close("causal", seen[start + count :], torch.ones_like(seen).tril()[start + count :])
    return check
