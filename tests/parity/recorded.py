"""What the checkers of recorded decoder runs share: comparisons, loading, sequences, decoding.

The recordings give the embeddings that entered a tiny decoder, with one picture a sample. They go
through the package's own `splice` and `embed_splice`, alone or in a batch with other samples,
padded on either side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from on_device import BACKENDS, on_device  # noqa: F401  (the checkers take BACKENDS from here)
from safetensors.torch import load_file
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaOutput
from llava.model.multimodal_prep import Picture, embed_splice, sample_seeds, splice
from llava.model.staged_cache import StagedCache, StageRecord
from llava.sequence import Kind, TokenSequence

FILES = ("meta.json", "config.json", "inputs.safetensors", "expected.safetensors")
CONFIG_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "tie_word_embeddings", "attention_bias", "pad_token_id", "bos_token_id",
)  # fmt: skip


class Check:
    """Collects comparisons: integers exactly, floats within the tolerance."""

    def __init__(self, atol: float = 1e-4, rtol: float = 1e-4) -> None:
        self.atol, self.rtol = atol, rtol
        self.worst, self.worst_name, self.failures, self.count = 0.0, "", [], 0

    def close(
        self, name: str, got: Any, expected: Tensor, atol: float | None = None, rtol: float = 0.0
    ) -> None:
        """atol, rtol: for this comparison instead of the check's own."""
        bounds = (self.atol, self.rtol) if atol is None else (atol, rtol)
        got = torch.as_tensor(got).detach().cpu()
        self.count += 1
        if got.shape != expected.shape:
            self.failures.append(f"{name}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
        elif not expected.is_floating_point():
            wrong = int((got != expected).sum())
            if wrong:
                self.failures.append(f"{name}: {wrong} of {expected.numel()} integers differ")
        else:
            difference = (got.double() - expected.double()).abs()
            if expected.numel() and float(difference.max()) > self.worst:
                self.worst, self.worst_name = float(difference.max()), name
            if not bool((difference <= bounds[0] + bounds[1] * expected.double().abs()).all()):
                self.failures.append(f"{name}: differs by {float(difference.max()):.3g}")


def is_case(folder: Path) -> bool:
    """Whether a folder looks like a recorded run of a model."""
    return all((folder / name).is_file() for name in FILES)


def load_decoder(case: Path, backend: str) -> tuple[Any, dict, dict, dict]:
    """(model without tower, meta, inputs, expected) of a case."""
    values = json.loads((case / "config.json").read_text())
    config = LlavaConfig(**{key: values[key] for key in CONFIG_KEYS if key in values})
    config._attn_implementation = backend
    model = LlavaLlamaForCausalLM(config).eval()
    meta = json.loads((case / "meta.json").read_text())
    stored = meta.get("weights", "weights.safetensors")
    weights = (
        seeded_weights(values, stored) if isinstance(stored, dict) else load_file(case / stored)
    )
    weights = {name: value for name, value in weights.items() if "inv_freq" not in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"{case}: missing {missing}, unexpected {unexpected}")
    model.generation_config.eos_token_id = None  # the recordings run on for a fixed count
    inputs, expected = (load_file(case / f"{name}.safetensors") for name in ("inputs", "expected"))
    return on_device(model), meta, inputs, expected


def seeded_weights(values: dict, stored: dict) -> dict[str, Tensor]:
    """The weights of FastV's and Simignore's recordings, which are draws from one seed, in the
    order of the layers; so a stored case need not hold them.

    stored: {"seed", "sum"}; ValueError when the sum of all magnitudes shows that this torch draws
    other numbers.
    """
    generator = torch.Generator().manual_seed(stored["seed"])
    size, inner = values["hidden_size"], values["intermediate_size"]
    kv_size = size // values["num_attention_heads"] * values["num_key_value_heads"]
    square, wide = ((size, size), 1.0), ((inner, size), 1.0)
    layer = {
        "self_attn.q_proj": ((size, size), 1.7),
        "self_attn.k_proj": ((kv_size, size), 1.7),
        "self_attn.v_proj": ((kv_size, size), 1.0),
        "self_attn.o_proj": square,
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": ((size, inner), 1.0),
    }

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"model.embed_tokens.weight": draw(values["vocab_size"], size)}
    for index in range(values["num_hidden_layers"]):
        name = f"model.layers.{index}"
        for part, (shape, scale) in layer.items():
            weights[f"{name}.{part}.weight"] = draw(*shape) * (scale / shape[1] ** 0.5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = 1 + 0.1 * draw(size)
    weights["model.norm.weight"] = 1 + 0.1 * draw(size)
    weights["lm_head.weight"] = draw(values["vocab_size"], size) * (2 / size**0.5)
    total = sum(float(value.double().abs().sum()) for value in weights.values())
    if abs(total - stored["sum"]) > 1e-6 * total:
        raise ValueError(f"seed {stored['seed']} gives weights of sum {total}, not {stored['sum']}")
    return weights


@dataclass(frozen=True)
class Embedded:
    """Embeddings [L, D] of one prompt whose picture of rows x columns tokens begins at `start`;
    0 x 0 is text alone."""

    hidden: Tensor
    start: int = 0
    rows: int = 0
    columns: int = 0

    @property
    def visual(self) -> int:
        return self.rows * self.columns

    def without_last(self, count: int) -> Embedded:
        return replace(self, hidden=self.hidden[:-count])


def sequence_of(
    samples: Sequence[Embedded], kind: Kind, side_texts: Mapping[str, Tensor] | None = None
) -> TokenSequence:
    """The batch as `build_sequence` would make it. side_texts: its `texts`."""
    texts, pictures, patches = [], [], []
    for sample in samples:
        behind = sample.start + sample.visual
        mark = sample.hidden.new_zeros(1 if sample.visual else 0, sample.hidden.shape[1])
        texts.append(torch.cat([sample.hidden[: sample.start], mark, sample.hidden[behind:]]))
        if sample.visual:
            number = np.arange(sample.visual)
            cell = np.stack(np.divmod(number, sample.columns), 1)
            zero = np.zeros_like(number)
            pictures.append(Picture(number, cell, zero, zero, sample.visual))
            patches.append(sample.hidden[sample.start : behind])
    width = max(len(text) for text in texts)
    ids = np.zeros((len(samples), width), dtype=np.int64)
    mask = np.zeros_like(ids, dtype=bool)
    padded = samples[0].hidden.new_zeros(len(samples), width, samples[0].hidden.shape[1])
    for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        first = width - len(text) if kind == "left" else 0
        mask[row, first : first + len(text)] = True
        padded[row, first : first + len(text)] = text
        if sample.visual:
            ids[row, first + sample.start] = IMAGE_TOKEN_INDEX
    arrays = {name: rows.numpy() for name, rows in (side_texts or {}).items()}
    plan = splice(ids, mask, None, pictures, kind, None, arrays)
    sequence = embed_splice(plan, padded, torch.cat(patches)[None] if patches else None, None)
    sequence.inputs["seed"] = sample_seeds(plan, None, padded.device)
    return sequence


def kept_positions(output: LlavaOutput, sample: int) -> Tensor:
    """Indices in the uncut sample of what is left behind the last layer."""
    origin = output.sequence.origin[sample]
    return origin[origin >= 0]


def real_rows(output: LlavaOutput, tensor: Tensor, sample: int) -> Tensor:
    """The rows of a sample in a tensor [B, W, ...] of the last layer's layout."""
    return tensor[sample][output.sequence.origin[sample] >= 0]


def stage_of(cache: StagedCache, layer: int) -> StageRecord:
    return next(stage for stage in cache.stages if stage.start <= layer < stage.stop)


def key_counts(cache: StagedCache, layers: int, sample: int) -> Tensor:
    """Real keys that each layer holds for a sample."""
    counts = []
    for layer in range(layers):
        valid = stage_of(cache, layer).valid
        padding = 0 if valid is None else int((~valid[sample]).sum())
        counts.append(cache.get_seq_length(layer) - padding)
    return torch.tensor(counts)


@torch.no_grad()
def decode(model: Any, output: LlavaOutput, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy steps on the cache of a prefill: logits [B, steps, V] that give the tokens, the
    prefill's first, and the position of each decoded token in each layer [B, steps - 1, layers]."""
    cache, layers = output.past_key_values, model.config.num_hidden_layers
    last = [real_rows(output, output.logits, s)[-1] for s in range(len(output.logits))]
    logits, positions = [torch.stack(last)], []
    for _ in range(steps - 1):
        token = logits[-1].argmax(-1)[:, None]
        each = [cache.step(stage_of(cache, layer), 1)[0][:, 0] for layer in range(layers)]
        positions.append(torch.stack(each, 1))
        logits.append(model(token, past_key_values=cache).logits[:, -1])
    blank = torch.zeros(len(last), 0, layers, dtype=torch.long)
    return torch.stack(logits, 1), torch.stack(positions, 1) if positions else blank
