"""PyramidDrop, its training loss and LLaVA's sampler said once more, slowly and word by word.

Nothing here uses the package's decoder, sequences, plans or sampler: one sample at a time, dense
attention in plain torch, Python loops over labels and scores, so that a mistake in the batched code
is not repeated. The rule is that of the paper (arXiv 2410.17247, section 3) as the original code
runs it, with the two differences that docs/Reduction.md names: each picture of a sample is ranked,
and an image token whose next token is supervised stays. Used by test_literal.py.

Shape suffixes: L tokens of a sample · H query heads · K key heads · d head size · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE, MARK = -100, -200


@dataclass
class Sample:
    """ids with MARK at each picture, labels of the same length (None: inference), and the rows
    [N, D] that each picture becomes."""

    ids: list[int]
    labels: list[int] | None
    pictures: list[Tensor] = field(default_factory=list)


@dataclass
class Outcome:
    """logits [L, V] and origins [L] of the rows that are left, their labels, the origins that each
    cut left, the KV lengths of each layer, and the smallest relative gap at the border of a
    choice."""

    logits: Tensor
    origin: list[int]
    labels: list[int]
    kept: list[list[int]]
    key_counts: list[int]
    margin: float
    cache: list[tuple[Tensor, Tensor]]


class Llama:
    """A Llama with the parameters of a model, one sample at a time."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.weights = dict(model.named_parameters())

    def of(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()

    def heads(self, x_LD: Tensor, layer: int, name: str, count: int) -> Tensor:
        """[count, L, d] of a projection."""
        out = x_LD @ self.of(layer, f"self_attn.{name}_proj").T
        return out.view(len(x_LD), count, -1).transpose(0, 1)

    def rotate(self, x_HLd: Tensor, position: Sequence[int]) -> Tensor:
        size = x_HLd.shape[-1]
        theta = self.config.rope_parameters["rope_theta"]
        speed = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
        angle = torch.tensor(list(position)).float()[:, None] * speed
        cos, sin = angle.cos().to(x_HLd), angle.sin().to(x_HLd)
        first, second = x_HLd[..., : size // 2], x_HLd[..., size // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def queries_and_keys(
        self, x_LD: Tensor, layer: int, position: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Rotated, both with all query heads [H, L, d]."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        query = self.rotate(self.heads(x_LD, layer, "q", heads), position)
        key = self.rotate(self.heads(x_LD, layer, "k", kv_heads), position)
        return query, key.repeat_interleave(heads // kv_heads, 0)

    def layer(
        self,
        index: int,
        hidden_LD: Tensor,
        position: Sequence[int],
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The layer's output, and its keys and values, those of `past` in front."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        x = self.norm(hidden_LD, self.of(index, "input_layernorm"))
        query, key = self.queries_and_keys(x, index, position)
        value = self.heads(x, index, "v", kv_heads).repeat_interleave(heads // kv_heads, 0)
        if past is not None:
            key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        out = (probabilities(query, key) @ value).transpose(0, 1).flatten(1)
        hidden = hidden_LD + out @ self.of(index, "self_attn.o_proj").T
        x = self.norm(hidden, self.of(index, "post_attention_layernorm"))
        gate = x @ self.of(index, "mlp.gate_proj").T
        inner = gate * gate.sigmoid() * (x @ self.of(index, "mlp.up_proj").T)
        return hidden + inner @ self.of(index, "mlp.down_proj").T, (key, value)

    def embed(self, token: int) -> Tensor:
        return self.weights["model.embed_tokens.weight"][token]

    def logits(self, hidden_LD: Tensor) -> Tensor:
        return self.norm(hidden_LD, self.weights["model.norm.weight"]) @ (
            self.weights["lm_head.weight"].T
        )


def probabilities(query_HQd: Tensor, key_HLd: Tensor) -> Tensor:
    """Causal softmax [H, Q, L]; the queries are the last Q of the L tokens."""
    count, length = query_HQd.shape[1], key_HLd.shape[1]
    scores = query_HQd @ key_HLd.transpose(1, 2) / query_HQd.shape[-1] ** 0.5
    for row in range(count):
        scores[:, row, length - count + row + 1 :] = -torch.inf
    return scores.softmax(-1)


def run(llama: Llama, sample: Sample, layer_list: list[int], ratios: list[float]) -> Outcome:
    """One sample through all layers with the cuts of (layer_list, ratios)."""
    rows: list[Tensor] = []
    labels: list[int] = []
    picture: list[int] = []  # which picture a row belongs to, -1 = text
    pictures = iter(sample.pictures)
    given = sample.labels if sample.labels is not None else [IGNORE] * len(sample.ids)
    for token, label in zip(sample.ids, given, strict=True):
        if token == MARK:
            features = next(pictures)
            number = max(picture, default=-1) + 1
            rows += list(features)
            labels += [IGNORE] * len(features)
            picture += [number] * len(features)
        else:
            rows.append(llama.embed(token))
            labels.append(label)
            picture.append(-1)
    hidden = torch.stack(rows)
    origin = list(range(len(rows)))
    original = {number: picture.count(number) for number in set(picture) if number >= 0}
    kept, key_counts, cache, margin = [], [], [], torch.inf
    for index in range(llama.config.num_hidden_layers):
        if index in layer_list:
            ratio = ratios[layer_list.index(index)]
            stays, gap = rank_and_drop(
                llama, index, hidden, labels, picture, original, ratio, sample.labels is not None
            )
            margin = min(margin, gap)
            hidden = hidden[stays]
            labels = [labels[i] for i in stays]
            picture = [picture[i] for i in stays]
            origin = [origin[i] for i in stays]
            kept.append(list(origin))
        hidden, stored = llama.layer(index, hidden, range(len(hidden)))
        cache.append(stored)
        key_counts.append(len(hidden))
    return Outcome(llama.logits(hidden), origin, labels, kept, key_counts, margin, cache)


def rank_and_drop(
    llama: Llama,
    index: int,
    hidden: Tensor,
    labels: list[int],
    picture: list[int],
    original: dict[int, int],
    ratio: float,
    training: bool,
) -> tuple[list[int], float]:
    """Rows that stay, in their order, and the smallest relative gap at the border of a choice.
    `index`: the layer behind the cut, whose norm and projections rank."""
    last = len(labels) - 1
    supervised = [label != IGNORE for label in labels]
    queries = [j for j in range(last) if not supervised[j] and supervised[j + 1]]
    if not training:
        queries = [last]
    if not queries or not original:
        return list(range(len(labels))), torch.inf
    with torch.no_grad():
        x = llama.norm(hidden.detach(), llama.of(index, "input_layernorm"))
        query, key = llama.queries_and_keys(x, index, range(len(labels)))
        everything = probabilities(query, key)
        score = torch.stack([everything[:, j].mean(0) for j in queries]).mean(0).tolist()
    stays = {j for j, number in enumerate(picture) if number < 0}
    margin = torch.inf
    for number, count in original.items():
        own = [j for j, other in enumerate(picture) if other == number]
        must = [j for j in own if j < last and supervised[j + 1]]
        free = sorted((j for j in own if j not in must), key=lambda j: -score[j])
        wanted = min(len(own), max(int(count * ratio), len(must))) - len(must)
        stays |= {*must, *free[:wanted]}
        if 0 < wanted < len(free):
            inside, outside = score[free[wanted - 1]], score[free[wanted]]
            margin = min(margin, (inside - outside) / max(inside, 1e-30))
    return sorted(stays), margin


def mean_loss(outcomes: Sequence[Outcome]) -> Tensor:
    """Cross-entropy of every supervised token of the batch, from the row in front of it; the mean
    over all of them. 0 for a batch without any."""
    losses = []
    for out in outcomes:
        for row, label in enumerate(out.labels[1:]):
            if label != IGNORE:
                losses.append(-out.logits[row].log_softmax(-1)[label])
    return torch.stack(losses).mean() if losses else torch.zeros(())


def decode(llama: Llama, prefill: Outcome, count: int) -> tuple[list[int], Tensor, float]:
    """Greedy tokens behind a prefill, the logits [count, V] that gave them and the smallest gap
    between the first two. In each layer a token stands behind the keys that the layer holds."""
    cache = list(prefill.cache)
    tokens, logits = [], [prefill.logits[-1]]
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        hidden = llama.embed(tokens[-1])[None]
        for index, past in enumerate(cache):
            hidden, cache[index] = llama.layer(index, hidden, [past[0].shape[1]], past)
        logits.append(llama.logits(hidden)[-1])
    table = torch.stack(logits[:count])
    best = table.topk(2, -1).values
    return tokens, table, float((best[:, 0] - best[:, 1]).min())


# ------------------------------------------------------------------------------------------ sampler
def grouped_order(
    lengths: Sequence[int], batch_size: int, world_size: int, by_modality: bool
) -> list[int]:
    """LLaVA's order of an epoch, by draws from the global generator."""
    size = batch_size * world_size

    def grouped(lengths: Sequence[int]) -> list[int]:
        drawn = torch.randperm(len(lengths)).tolist()
        order = []
        for start in range(0, len(drawn), size):
            mega = sorted(drawn[start : start + size], key=lambda i: lengths[i], reverse=True)
            if len(mega) % world_size:
                chunks = [mega[i::world_size] for i in range(world_size)]
            else:
                chunks = [[] for _ in range(world_size)]
                totals: list[float] = [0] * world_size
                for i in mega:
                    where = min(range(world_size), key=lambda c: totals[c])
                    chunks[where].append(i)
                    totals[where] += lengths[i]
                    if len(chunks[where]) == len(mega) // world_size:
                        totals[where] = float("inf")
            order += [i for chunk in chunks for i in chunk]
        return order

    pictured = [i for i, length in enumerate(lengths) if length > 0]
    text = [i for i, length in enumerate(lengths) if length < 0]
    if not by_modality or not pictured or not text:
        return grouped(lengths)
    megas, last = [], []
    for own in (pictured, text):
        order = [own[i] for i in grouped([abs(lengths[i]) for i in own])]
        pieces = [order[i : i + size] for i in range(0, len(order), size)]
        megas += pieces[:-1]
        last += pieces[-1]
    drawn = torch.randperm(len(megas)).tolist()
    return [i for number in drawn for i in megas[number]] + sorted(last)


# ------------------------------------------------------------------------------------------- labels
def rounds_labels(
    text: str, tokenizer: Any, encode: Any, mark: str, end: str, limit: int | None, first: int
) -> tuple[list[int], list[int], bool]:
    """LLaVA-1.5's ids, labels and whether its sums met, for templates whose rounds end with `end`
    and whose answers start behind `mark`. limit: the length that text without pictures is cut to.
    first: tokens less in every later round (1 for v1 with a tokenizer that is not legacy)."""
    ids = encode(text)[:limit]
    labels = [IGNORE, *ids[1:]]
    at = 1
    for number, part in enumerate(text.split(end)):
        if part == "" or part.count(mark) != 1:
            break
        less = first if number else 0
        question = len(encode(part[: part.index(mark) + len(mark)])) - 2 - less
        for i in range(at, min(at + question, len(labels))):
            labels[i] = IGNORE
        at += len(encode(part)) - less
    labels[at:] = [IGNORE] * len(labels[at:])
    total = sum(token != tokenizer.pad_token_id for token in ids)
    met = at >= tokenizer.model_max_length or at == total
    return ids, labels if met else [IGNORE] * len(ids), met
