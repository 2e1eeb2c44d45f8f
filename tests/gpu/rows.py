"""What `scripts/gpu_check.sh` runs inside Python, one row a process.

    python tests/gpu/rows.py backends --json row.json          # on CUDA
    python tests/gpu/rows.py backends --device cpu             # the same code without a GPU

A row returns its findings as a dict and raises AssertionError where something does not hold. In
float32 (TF32 off) backends must agree on every kept token and to 1e-4; in bfloat16 the kept tokens
of float32 are replayed, because near-tied scores may fall the other way, and the logits must agree
to the precision of bfloat16 (root mean square).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from on_device import moved
from ranks import zero
from tiny import FAMILIES, PLANS, batch, labels_of, prompts, tiny_model
from torch import Tensor

from llava.model import varlen_attention
from llava.model.staged_decoder import Record
from llava.reduction import Cut, ReductionPlan, flops
from llava.utils import environment, json_dump, user_errors

ROOT = Path(__file__).resolve().parents[2]
EXACT = 1e-4
"""Largest difference in float32, as a share of the largest logit."""
HALF = 0.08
"""Root mean square of the difference in bfloat16, as a share of that of the logits: six layers of
2**-8 give 0.01 to 0.03 on a CPU, a window that is off by one token more than 0.1."""
FEW = ("none", "pyramiddrop", "fastv", "yopo", "all dropped")
FLASH, VARLEN, FLEX = "flash_attention_2", varlen_attention.VARLEN, "flex_attention"


def installed(device: torch.device) -> list[str]:
    """Attention backends that can run on a device here."""
    names = ["eager", "sdpa"]
    if device.type == "cuda":
        names.append(FLEX)
        if importlib.util.find_spec("flash_attn") is not None:
            names.append(FLASH)
    return names


def use(model: Any, backend: str) -> Any:
    """The model with another attention backend in its decoder."""
    model.config._attn_implementation = backend
    return model


def sequences(model: Any, device: torch.device, kind: str = "left") -> Any:
    """The mixed batch of `tiny`, embedded on the device."""
    return model.build_sequence(**moved(batch(prompts(), "left"), device), kind=kind)


def sample_rows(output: Any) -> list[Tensor]:
    """Logits of each sample's real tokens [n, V], float32, on the CPU."""
    sequence, out = output.sequence, []
    for sample, (start, length) in enumerate(sequence.layout.bounds()):
        row = 0 if sequence.layout.kind == "packed" else sample
        out.append(output.logits[row, start : start + length].float().cpu())
    return out


def worst(one: Any, two: Any) -> float:
    """Largest difference of two outputs as a share of the largest logit."""
    pairs = list(zip(sample_rows(one), sample_rows(two), strict=True))
    assert all(a.shape == b.shape for a, b in pairs), "other tokens were kept"
    scale = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


def distance(one: Any, two: Any) -> float:
    """Root mean square of the difference of two outputs as a share of the second's."""
    a, b = (torch.cat(sample_rows(each)) for each in (one, two))
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def same_cuts(one: Any, two: Any, what: str) -> None:
    for first, second in zip(one.trace, two.trace, strict=True):
        assert torch.equal(first.keep.cpu(), second.keep.cpu()), f"{what}: other tokens were kept"


# ----------------------------------------------------------------------------- rows
def backends(device: torch.device) -> dict[str, Any]:
    """float32: eager, sdpa and packed attention agree with the CPU, for every family and plan."""
    found: dict[str, float] = {}
    for family in FAMILIES:
        model = tiny_model(family)
        for name, plan in PLANS.items():
            call = {"reduction": plan, "return_trace": True}
            with torch.no_grad():
                model.to("cpu")
                expected = use(model, "sdpa")(
                    sequence=sequences(model, torch.device("cpu")), **call
                )
                model.to(device)
                for backend, kind in (("eager", "left"), ("sdpa", "left"), (VARLEN, "packed")):
                    sequence = sequences(use(model, backend), device, kind)
                    output = model(sequence=sequence, **call)
                    what = f"{family}, {name}, {backend}"
                    same_cuts(output, expected, what)
                    found[backend] = max(found.get(backend, 0.0), worst(output, expected))
                    assert found[backend] < EXACT, f"{what}: off by {found[backend]:.2g}"
    return {f"largest difference, {backend}": value for backend, value in found.items()}


def flex(device: torch.device) -> dict[str, Any]:
    """float32: flex_attention against sdpa, prefill (Llama and Mistral with its window)."""
    if device.type != "cuda":
        return {"skipped": "flex_attention is compiled for GPUs"}
    found = {}
    for family in ("llama", "mistral"):
        model = tiny_model(family, head_dim=32).to(device)  # its kernels need at least 16
        for name in ("none", "pyramiddrop"):
            call = {"reduction": PLANS[name], "return_trace": True, "use_cache": False}
            with torch.no_grad():
                expected = use(model, "sdpa")(sequence=sequences(model, device), **call)
                output = use(model, FLEX)(sequence=sequences(model, device), **call)
            same_cuts(output, expected, f"{family}, {name}")
            found[f"{family}, {name}"] = difference = worst(output, expected)
            assert difference < EXACT, f"{family}, {name}: off by {difference:.2g}"
    return found


def half(device: torch.device) -> dict[str, Any]:
    """bfloat16 with every backend, padded and packed, against float32 with the same tokens kept."""
    runs = [(name, "left") for name in installed(device) if name != FLEX] + [(VARLEN, "packed")]
    if FLASH in installed(device):
        runs.append((FLASH, "packed"))
    found: dict[str, Any] = {"backends": sorted({name for name, _ in runs})}
    for family in FAMILIES:
        small = tiny_model(family).to(device, torch.bfloat16)
        exact = tiny_model(family).to(device)
        exact.load_state_dict(small.state_dict())
        for name, plan in PLANS.items():
            call = {"reduction": plan, "return_trace": True}
            for backend, kind in runs:
                with torch.no_grad():
                    expected = use(exact, "sdpa")(sequence=sequences(exact, device, "left"), **call)
                    record = Record(trace=True, replay=[cut.keep for cut in expected.trace])
                    sequence = sequences(use(small, backend), device, kind)
                    output = small(sequence=sequence, record=record, **call)
                key = f"{backend}, {kind}"
                found[key] = max(found.get(key, 0.0), distance(output, expected))
                assert found[key] < HALF, f"{family}, {name}, {key}: off by {found[key]:.2g}"
    return found


def recorded_runs(device: torch.device) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, model on the device in float32, arguments of its prefill) of the stored cases of
    every method; `sequence` and pixels in float32."""
    import adaptprune_cases
    import fastv_cases
    import pyramiddrop_cases
    import recorded
    import simignore_cases
    import yopo_cases

    def cases(method: str) -> list[Path]:
        folders = sorted((ROOT / "tests" / "data" / method).iterdir())
        return [folder for folder in folders if recorded.is_case(folder)]

    def bare(model: Any) -> Any:
        return model if device.type == "cpu" else getattr(model, "model", model)

    for folder in cases("pyramiddrop"):
        wrapped, meta, inputs, expected = pyramiddrop_cases.load_case(folder, "sdpa")
        if "loss" in expected:
            continue
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else None
        call = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs.get("attention_mask"),
            "images": inputs["pixel_values"],
            "image_sizes": sizes,
            "reduction": pyramiddrop_cases.plan_of(meta),
        }
        yield folder.name, bare(wrapped), moved(call, device)
    for method in ("fastv", "adaptprune", "simignore", "yopo"):
        for folder in cases(method):
            wrapped, meta, inputs, _ = recorded.load_decoder(folder, "sdpa")
            texts = None
            if method == "fastv":
                samples = next(fastv_cases.batches(meta, inputs))[1]
                plan = fastv_cases.plan_of(meta, "sdpa", False)
            elif method == "adaptprune":
                samples = next(adaptprune_cases.batches(meta, inputs))[1]
                cut = Cut(meta["settings"]["K"], adaptprune_cases.method_of(meta["settings"]))
                plan = ReductionPlan((cut,), positions="original")
            elif method == "simignore":
                samples = next(simignore_cases.batches(meta, inputs))[1]
                texts = simignore_cases.texts_of(inputs, samples)
                plan = simignore_cases.plan_of(meta, "clean_fastv")
            else:
                samples = yopo_cases.samples_of(meta, inputs)
                plan = yopo_cases.plan_of(yopo_cases.settings_of(folder, meta, "renorm"))
            sequence = recorded.sequence_of(samples, "left", texts).to(device)
            yield folder.name, bare(wrapped), {"sequence": sequence, "reduction": plan}


def in_dtype(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with an embedded sequence, if there is one, rounded to `dtype`."""
    if "sequence" not in call:
        return call
    hidden = call["sequence"].hidden.to(torch.bfloat16).to(dtype)
    return {**call, "sequence": replace(call["sequence"], hidden=hidden)}


def cases_half(device: torch.device) -> dict[str, Any]:
    """The recorded prompts of every method in bfloat16 with every backend, float32's kept tokens
    replayed."""
    found: dict[str, Any] = {}
    for name, model, call in recorded_runs(device):
        with torch.no_grad():
            model.to(torch.bfloat16).float()  # the same weights, rounded
            exact = model(**in_dtype(call, torch.float32), return_trace=True)
            model.to(torch.bfloat16)
            for backend in installed(device):
                if backend == FLEX:
                    continue
                record = Record(trace=True, replay=[cut.keep for cut in exact.trace])
                output = use(model, backend)(
                    **in_dtype(call, torch.bfloat16), return_trace=True, record=record
                )
                key = f"{name}, {backend}"
                found[key] = distance(output, exact)
                assert found[key] < HALF, f"{key}: off by {found[key]:.2g}"
    assert found, "no recorded case was found"
    return found


def generation(device: torch.device) -> dict[str, Any]:
    """float32: tokens of a padded batch equal each sample alone and the CPU's; beams too."""
    count = 0
    for family in FAMILIES:
        model = tiny_model(family)
        for name in FEW:
            for options in ({}, {"num_beams": 3}):
                call = {
                    "reduction": PLANS[name],
                    "max_new_tokens": 6,
                    "do_sample": False,
                    **options,
                }
                samples = prompts()
                expected = model.to("cpu").generate(**batch(samples, "left"), **call)
                model.to(device)
                together = model.generate(**moved(batch(samples, "left"), device), **call).cpu()
                assert torch.equal(together, expected), f"{family}, {name}: not the CPU's tokens"
                for index, sample in enumerate(samples):
                    alone = model.generate(**moved(batch([sample]), device), **call)
                    assert alone[0].tolist() == expected[index].tolist(), f"{family}, {name}"
                    count += 1
    return {"sequences": count}


def training(device: torch.device) -> dict[str, Any]:
    """float32: loss and gradients of padded and packed steps equal the CPU's."""
    found = {"loss": 0.0, "gradient": 0.0}
    for family in FAMILIES:
        model = tiny_model(family).train()
        for name in FEW:
            expected = step(model.to("cpu"), "sdpa", "right", name)
            model.to(device)
            for backend, kind in (("sdpa", "right"), (VARLEN, "packed")):
                loss, gradients = step(model, backend, kind, name)
                what = f"{family}, {name}, {backend}"
                found["loss"] = max(found["loss"], abs(loss - expected[0]))
                assert gradients.keys() == expected[1].keys(), f"{what}: gradients are missing"
                for key, value in gradients.items():
                    scale = max(float(expected[1][key].abs().max()), 1e-3)
                    off = float((value - expected[1][key]).abs().max()) / scale
                    found["gradient"] = max(found["gradient"], off)
                    assert off < 1e-3, f"{what}: gradient of {key} off by {off:.2g}"
                assert found["loss"] < EXACT, f"{what}: loss off by {found['loss']:.2g}"
    return found


def step(model: Any, backend: str, kind: str, plan: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step, on the CPU."""
    model.zero_grad(set_to_none=True)
    inputs = batch(prompts())
    labels = labels_of(inputs)
    device = next(model.parameters()).device
    sequence = use(model, backend).build_sequence(
        **moved(inputs, device), labels=labels.to(device), kind=kind
    )
    loss = model(sequence=sequence, reduction=PLANS[plan], logits_to_keep="targets").loss
    loss.backward()
    named = model.named_parameters()
    return float(loss.detach()), {n: p.grad.cpu() for n, p in named if p.grad is not None}


def generate_7b(device: torch.device, preset: str = "llava-1.5-7b") -> dict[str, Any]:
    """Random weights of a 7B shape, made on the device: prefill, cache lengths, 16 tokens."""
    short = too_small(device, 16 if preset == "llava-1.5-7b" else 0)
    if short:
        return {"skipped": short}
    work, plan = big_model(device, preset)
    found = {}
    for name, each in (("none", ReductionPlan()), ("plan", plan)):
        with torch.inference_mode():
            output = work.model(
                sequence=work.sequence(), reduction=each, use_cache=True, logits_to_keep=1
            )
            assert bool(output.logits.isfinite().all()), f"{name}: logits are not finite"
            lengths = [output.past_key_values.get_seq_length(i) for i in range(work.shape.layers)]
            stages = each.schedule(work.sequence().layout, work.shape.layers)
            wanted = [s.layout.width for s in stages for _ in range(s.start, s.stop)]
            assert lengths == wanted, f"{name}: cache lengths {lengths}, planned {wanted}"
            tokens = work.model.generate(
                sequence=work.sequence(), reduction=each, max_new_tokens=16, do_sample=False
            )
        found[f"{name}: tokens"] = tokens.shape[1]
        found[f"{name}: cache tokens, all layers"] = sum(lengths)
    return found | memory(device)


def train_7b(device: torch.device, preset: str = "llava-1.5-7b") -> dict[str, Any]:
    """One step at 7B shape in bfloat16, checkpointing on, with and without the plan."""
    short = too_small(device, 40 if preset == "llava-1.5-7b" else 0)
    if short:
        return {"skipped": short}
    work, plan = big_model(device, preset)
    model = work.model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = {}
    for name, each in (("none", ReductionPlan()), ("plan", plan)):
        model.zero_grad(set_to_none=True)
        loss = model(
            work.ids, labels=work.labels(), images=work.images, reduction=each,
            logits_to_keep="targets",
        ).loss  # fmt: skip
        loss.backward()
        first = model.model.layers[0].self_attn.q_proj.weight.grad
        assert bool(loss.isfinite()), f"{name}: the loss is {float(loss)}"
        assert bool(first.isfinite().all()), f"{name}: gradients of layer 0 are not finite"
        assert float(first.abs().max()) > 0, f"{name}: no gradient reached layer 0"
        found[f"{name}: loss"] = float(loss.detach())
    return found | memory(device)


def big_model(device: torch.device, preset: str) -> tuple[Any, ReductionPlan]:
    from llava.eval.speed import build_workload

    torch.manual_seed(0)
    shape = flops.get_preset(preset)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return build_workload(shape, device=str(device), dtype=dtype), ReductionPlan.parse(shape.plan)


def too_small(device: torch.device, gib: float) -> str | None:
    """Why a row of so many GiB cannot run; None when it can."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    return f"{free:.0f} GiB are free, {gib:g} are needed" if free < gib else None


def memory(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return {"peak GiB": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)}


def device_map(device: torch.device) -> dict[str, Any]:
    """A checkpoint spread over two GPUs, the border at a cut, equals the same on one."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return {"skipped": "one GPU"}
    from tiny_checkpoint import save_tiny_checkpoint

    from llava.model.builder import load_checkpoint

    places = ("cuda:0", "cuda:1") if device.type == "cuda" else ("cpu", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_checkpoint(Path(folder) / "model")
        one = load_checkpoint(path, device=places[0], device_map=None, dtype=torch.float32).model
        spread = {"model.layers.2": places[1], "model.layers.3": places[1], "": places[0]}
        if places[0] != places[1]:
            spread = {**layer_map(one, places), "model.norm": places[1], "lm_head": places[1]}
        two = load_checkpoint(path, device_map=spread, dtype=torch.float32).model
    call = {
        "input_ids": torch.tensor([[1, 5, -200, 7, 8]], device=places[0]),
        "images": torch.randn(1, 3, 56, 56, device=places[0]),
        "reduction": "pyramiddrop:layers=[2,3],ratios=[0.5,0.25]",
    }
    with torch.no_grad():
        first, second = (model(**call).logits.float().cpu() for model in (one, two))
    difference = float((first - second).abs().max())
    assert difference < EXACT, f"off by {difference:.2g}"
    tokens = [m.generate(**call, max_new_tokens=5, do_sample=False).tolist() for m in (one, two)]
    assert tokens[0] == tokens[1], "other tokens"
    return {"difference": difference}


def layer_map(model: Any, places: tuple[str, str]) -> dict[str, str]:
    parts = ("model.embed_tokens", "model.vision_tower", "model.mm_projector", "model.rotary_emb")
    layers = {f"model.layers.{i}": places[i >= 2] for i in range(len(model.model.layers))}
    return {**dict.fromkeys(parts, places[0]), **layers}


def environment_row(device: torch.device) -> dict[str, Any]:
    """What is here: GPUs, versions."""
    count = torch.cuda.device_count()
    found = environment()
    found["names"] = [torch.cuda.get_device_name(i) for i in range(count)]
    found["backends"] = [*installed(torch.device("cuda" if count else "cpu")), VARLEN]
    found["gpus"] = count
    return found


def sync_free(device: torch.device) -> dict[str, Any]:
    """No host read from the embedded batch to the logits, in prefill, decoding and training."""
    if device.type != "cuda":
        return {"skipped": "CUDA alone can tell"}
    plans = [name for name, plan in PLANS.items() if all(_counts(plan))]
    for name in plans:
        for mode in (False, True):
            model = tiny_model().to(device).train(mode)
            inputs = batch(prompts(), "left")
            labels = labels_of(inputs).to(device) if mode else None
            sequence = model.build_sequence(**moved(inputs, device), labels=labels)
            for watched in ("default", "error"):  # the first pass may initialise libraries
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode(watched)
                try:
                    run_once(model, sequence, PLANS[name], mode)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    return {"plans": plans}


def _counts(plan: ReductionPlan) -> Iterator[bool]:
    return (getattr(cut.reducer, "host_counts", True) for cut in plan.cuts)


def run_once(model: Any, sequence: Any, plan: ReductionPlan, training: bool) -> None:
    if training:
        model(sequence=sequence, reduction=plan, logits_to_keep="targets").loss.backward()
        return
    with torch.no_grad():
        output = model(sequence=sequence, reduction=plan, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1)[:, None]
        model(token, past_key_values=output.past_key_values)


ROWS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "environment": environment_row,
    "backends": backends,
    "half": half,
    "cases-half": cases_half,
    "generation": generation,
    "training": training,
    "sync-free": sync_free,
    "flex": flex,
    "generate-7b": generate_7b,
    "train-7b": train_7b,
    "device-map": device_map,
    "zero2": partial(zero, stage=2),
    "zero3": partial(zero, stage=3),
}


@user_errors()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=sorted(ROWS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = ROWS[args.row](device)
    for name, value in found.items():
        sys.stdout.write(f"{name}: {value}\n")
    if args.json:
        json_dump(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
