"""Recorded runs of PyramidDrop's original code, checked against the package.

A case folder holds config.json, meta.json, inputs.safetensors and expected.safetensors; weights and
tower lie where meta.json says. What is checked follows from the names of the expected tensors:
logits, scores, kept indices, KV lengths, rotary positions and greedy tokens of a prefill with
decoding; loss, logits, gradients, scoring rows and labels of a training step; several samples of a
batch (`s0_...`), run here in one batch, padded on either side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import training_cases
from on_device import on_device
from PIL import Image
from recorded import BACKENDS, Check
from safetensors.torch import load_file
from torch import Tensor

from llava.mm_utils import process_images
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaOutput
from llava.model.staged_cache import StagedCache
from llava.reduction import ReductionPlan

ATOL = RTOL = 2e-4


def load_case(case: Path, backend: str) -> tuple[Any, dict, dict, dict]:
    """(model, meta, inputs, expected) of one case."""
    meta = json.loads((case / "meta.json").read_text())
    values = json.loads((case / "config.json").read_text())
    values = {k: v for k, v in values.items() if k not in ("_note", "transformers_version")}
    values["mm_vision_tower"] = str((case / meta["vision_tower"]).resolve())
    config = LlavaConfig(**values)
    config._attn_implementation = backend
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    weights = load_file(case / meta["weights"])
    weights = {name.replace(".vision_model.", "."): value for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left = [name for name in missing if not name.startswith("model.vision_tower.")]
    if left or unexpected:
        raise ValueError(f"{case}: missing {left}, unexpected {unexpected}")
    model.generation_config.eos_token_id = None  # the recordings run on for a fixed count
    inputs = load_file(case / "inputs.safetensors")
    return on_device(model.eval()), meta, inputs, load_file(case / "expected.safetensors")


def plan_of(meta: dict) -> ReductionPlan:
    return ReductionPlan.pyramid(meta["layer_list"], meta["image_token_ratio_list"])


def kept_origins(output: LlavaOutput, sample: int) -> list[Tensor]:
    """Indices in the uncut sample that survive each cut."""
    kept = torch.arange(output.stages[0].lengths[sample])
    out = []
    for cut in output.trace:
        for row, group in enumerate(cut.layout.groups):
            if group.sample == sample:
                gone = cut.origin[row][cut.valid[row] & ~cut.keep[row]]
                kept = kept[~torch.isin(kept, gone)]
        out.append(kept)
    return out


def check_cuts(check: Check, output: LlavaOutput, sample: int, prefix: str, expected: dict) -> None:
    kept = kept_origins(output, sample)
    before = torch.arange(output.stages[0].lengths[sample])
    final = output.sequence
    row_query = (final.query[sample] > 0) & (final.origin[sample] >= 0)
    query_origin = final.origin[sample][row_query]
    for number, cut in enumerate(output.trace):
        name = f"{prefix}stage{number}_"
        rows = [r for r, group in enumerate(cut.layout.groups) if group.sample == sample]
        if f"{name}kept_abs" in expected:
            check.close(f"{name}kept_abs", kept[number], expected[f"{name}kept_abs"])
        if f"{name}kept_image" in expected and rows:
            first = int(output.trace[0].origin[rows[0]][0])
            picture = torch.cat([cut.origin[r][cut.keep[r]] for r in rows]) - first
            check.close(f"{name}kept_image", picture, expected[f"{name}kept_image"])
        if f"{name}scores" in expected and rows:
            scores = torch.cat([cut.score[r][cut.valid[r]] for r in rows])
            check.close(f"{name}scores", scores, expected[f"{name}scores"])
        if f"{name}query_pos" in expected:
            where = torch.searchsorted(before, query_origin)
            check.close(f"{name}query_pos", where, expected[f"{name}query_pos"])
        before = kept[number]


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their padding on the left."""
    lengths = mask.sum(1)
    ids = torch.stack(
        [row.roll(int(ids.shape[1] - n)) for row, n in zip(ids, lengths, strict=True)]
    )
    column = torch.arange(ids.shape[1])
    return ids, (column >= ids.shape[1] - lengths[:, None]).long()


@torch.no_grad()
def check_inference(
    check: Check,
    model: Any,
    meta: dict,
    inputs: dict,
    expected: dict,
    prefixes: list[str],
    side: str = "left",
) -> None:
    """Prefill, stepwise decoding on the cache, and `generate`, for a batch of one or more."""
    plan, ids = plan_of(meta), inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).long()
    if side == "left":
        ids, mask = left_padded(ids, mask)
    sizes = (
        [tuple(row) for row in inputs["image_sizes"].tolist()] if "image_sizes" in inputs else None
    )
    call = {"images": inputs.get("pixel_values"), "image_sizes": sizes, "attention_mask": mask}
    output = model(ids, **call, reduction=plan, return_trace=True, use_cache=True)
    cache: StagedCache = output.past_key_values
    for sample, prefix in enumerate(prefixes):
        valid = output.sequence.origin[sample] >= 0
        # b{i}_: the original's own padded batch, which its FlashAttention path can prefill.
        for name in (f"{prefix}prefill_logits", f"b{sample}_prefill_logits"):
            if name in expected:
                recorded = expected[name]
                recorded = recorded[0] if recorded.dim() == 3 else recorded
                check.close(name, output.logits[sample][valid], recorded)
        check_cuts(check, output, sample, prefix, expected)
        lengths = [s.lengths[sample] for s in output.stages for _ in range(s.start, s.stop)]
        for name in ("prefill_seq_len_per_layer", "kv_len_prefill"):
            if f"{prefix}{name}" in expected:
                check.close(f"{prefix}{name}", torch.tensor(lengths), expected[f"{prefix}{name}"])
    if f"{prefixes[0]}greedy_ids" in expected:
        count = expected[f"{prefixes[0]}greedy_ids"].shape[0]
        first = [
            output.logits[s][-1 if side == "left" else length - 1]
            for s, length in enumerate(output.sequence.layout.lengths)
        ]
        tokens = model.generate(
            ids, **call, reduction=plan, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        check_decoding(check, model, cache, torch.stack(first), tokens, prefixes, expected)


def check_decoding(
    check: Check,
    model: Any,
    cache: StagedCache,
    first_logits: Tensor,
    tokens: Tensor,
    prefixes: list[str],
    expected: dict,
) -> None:
    """Greedy steps on the cache [B, V], and the tokens [B, count] that `generate` gave."""
    layers = model.config.num_hidden_layers
    stage_of = [next(s for s in cache.stages if s.start <= i < s.stop) for i in range(layers)]
    logits, positions = [first_logits], []
    for _ in range(tokens.shape[1] - 1):
        token = logits[-1].argmax(-1)[:, None]
        by_stage = {id(record): cache.step(record, 1)[0] for record in cache.stages}
        positions.append(torch.stack([by_stage[id(s)][:, 0] for s in stage_of], 1))
        logits.append(model(token, past_key_values=cache).logits[:, -1])
    step_logits = torch.stack(logits, 1)

    def real_keys(layer: int, sample: int) -> int:
        valid = stage_of[layer].valid
        padding = 0 if valid is None else int((~valid[sample]).sum())
        return cache.get_seq_length(layer) - padding

    for sample, prefix in enumerate(prefixes):
        greedy = expected[f"{prefix}greedy_ids"]
        got = {
            "step_logits": step_logits[sample],
            "decode_position_ids": torch.stack([p[sample] for p in positions] or [greedy[:0]]),
            "kv_len_after_last_step": torch.tensor([real_keys(i, sample) for i in range(layers)]),
        }
        check.close(f"{prefix}greedy_ids (generate)", tokens[sample], greedy)
        check.close(f"{prefix}greedy_ids", step_logits[sample].argmax(-1), greedy)
        for name, value in got.items():
            if f"{prefix}{name}" in expected:
                check.close(f"{prefix}{name}", value, expected[f"{prefix}{name}"])


@torch.no_grad()
def check_vision(check: Check, model: Any, case: Path, inputs: dict, expected: dict) -> None:
    pixels, ids = inputs.get("pixel_values"), inputs["input_ids"]
    if pixels is None:
        return
    if "clip_selected" in expected:
        tiles = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
        check.close("clip_selected", model.get_vision_tower()(tiles), expected["clip_selected"])
    if "image_features" in expected:
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else None
        sequence = model.build_sequence(ids, None, None, pixels, sizes)
        features = sequence.hidden[sequence.cell[..., 0] >= 0]
        recorded = expected["image_features"]
        if features.numel() == recorded.numel():  # one picture, or as many of one size
            features = features.view(recorded.shape)
        check.close("image_features", features, recorded)
    picture = case / "image.png"
    if picture.is_file():
        processor = model.get_vision_tower().image_processor
        image = Image.open(picture).convert("RGB")
        got = process_images([image], processor, model.config)
        check.close("pixel_values", torch.as_tensor(got), pixels)


def check_training(
    check: Check, model: Any, meta: dict, inputs: dict, expected: dict, side: str
) -> None:
    model.train()
    for parameter in model.get_vision_tower().parameters():
        parameter.requires_grad_(False)
    inputs = training_cases.cut_to_context(model, inputs)
    ids, labels, mask = (inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    if side == "left":
        labels, _ = left_padded(labels, mask)
        ids, mask = left_padded(ids, mask)
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else None
    output = model(
        ids,
        mask,
        labels=labels,
        images=inputs.get("pixel_values"),
        image_sizes=sizes,
        reduction=plan_of(meta),
        return_trace=True,
    )
    output.loss.backward()
    check.close("loss", output.loss[None], expected["loss"])
    final = output.sequence
    for sample, length in enumerate(final.layout.lengths):
        valid = final.origin[sample] >= 0
        check.close(
            f"logits[{sample}]", output.logits[sample][valid], expected["logits"][sample][:length]
        )
        if "labels_final" in expected:
            # Our targets are the labels of the next token; a first token is never supervised here.
            target = final.target[sample][valid][:-1]
            check.close(
                f"labels_final[{sample}]", target, expected["labels_final"][sample][1:length]
            )
        check_cuts(check, output, sample, f"s{sample}_", expected)
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    training_cases.check_without_gradient(check, grads, meta)
    total = sum(float(grad.double().square().sum()) for grad in grads.values() if grad is not None)
    check.close("grad_norm", torch.tensor([total**0.5]), expected["grad_norm"])
    for name, value in expected.items():
        if name.startswith("grad."):
            check.close(name, grads[name.removeprefix("grad.")], value)
    # The cheap form that training uses gives the same loss.
    rows = model(
        ids,
        mask,
        labels=labels,
        images=inputs.get("pixel_values"),
        image_sizes=sizes,
        reduction=plan_of(meta),
        logits_to_keep="targets",
    )
    check.close("loss (supervised rows only)", rows.loss[None], expected["loss"])


def run_case(case: Path) -> list[tuple[str, Check]]:
    """Run one case on every backend and padding side that applies: [(variant, Check)]."""
    out = []
    for backend in BACKENDS:
        model, meta, inputs, expected = load_case(case, backend)
        training = "loss" in expected
        padded = "attention_mask" in inputs and not bool(inputs["attention_mask"].all())
        for side in ("right", "left") if padded else ("right",):
            check = Check(ATOL, RTOL)
            if training:
                check_training(check, model, meta, inputs, expected, side)
                model.zero_grad()
            else:
                rows = len(inputs["input_ids"])
                prefixes = (
                    [f"s{s}_" for s in range(rows)] if "s0_prefill_logits" in expected else [""]
                )
                check_inference(check, model, meta, inputs, expected, prefixes, side)
                check_vision(check, model, case, inputs, expected)
            out.append((f"{backend}, {side} padding" if padded else backend, check))
    if training:
        out += training_cases.through_trainer(case)
    return out
