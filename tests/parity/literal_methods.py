"""FastV, Simignore, AdaptPrune and YOPO said once more, slowly: one sample at a time, dense
attention, Python loops, no module of the package.

A choice is made once, from the prompt, and holds for the answer; nothing has a cache here: an
answer's token is another row behind the prompt, and everything runs again. Sources: the papers and
what the originals' code does, as the docstrings of llava/reduction say. Used by test_literal.py.

Shape suffixes as in literal.py; N image tokens of the sample, in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from literal import Llama, probabilities
from torch import Tensor

Choose = Callable[[Tensor, Tensor], tuple[list[int], float]]
"""(input of the layer before the cut, input of the layer behind it) -> which of the image tokens
stay, and the smallest relative gap of the decisions."""


def last_row_attention(llama: Llama, layer: int, hidden_LD: Tensor) -> list[float]:
    """Probability that the last row of a whole prompt gives each row, mean over the heads."""
    x = llama.norm(hidden_LD, llama.of(layer, "input_layernorm"))
    query, key = llama.queries_and_keys(x, layer, range(len(x)))
    return probabilities(query, key)[:, -1].mean(0).tolist()


def highest(scores: Sequence[float], count: int) -> tuple[list[int], float]:
    """The `count` highest, in their order, and the relative gap at the border."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    if not 0 < count < len(scores):
        return sorted(ranked[:count]), math.inf
    inside, outside = scores[ranked[count - 1]], scores[ranked[count]]
    return sorted(ranked[:count]), (inside - outside) / max(abs(inside), 1e-30)


def through(
    llama: Llama, rows_LD: Tensor, image: range, at: int, keep: Choose | list[int]
) -> tuple[Tensor, list[int], float]:
    """Logits of the rows that are left, which of the image tokens those are, and the gap. The cut
    is in front of layer `at`; positions stay what they were. keep: a choice already made."""
    hidden, before, position = rows_LD, rows_LD, list(range(len(rows_LD)))
    gap = math.inf
    for index in range(llama.config.num_hidden_layers):
        if index == at:
            if callable(keep):
                keep, gap = keep(before, hidden)
            stay = [image[i] for i in keep]
            rows = [i for i in position if i not in image or i in stay]
            hidden, position = hidden[rows], rows
        before = hidden
        hidden, _ = llama.layer(index, hidden, position)
    assert isinstance(keep, list)
    return llama.logits(hidden), keep, gap


# ------------------------------------------------------------------------------------------- cuts
def fastv(llama: Llama, image: range, at: int, removed: float) -> Choose:
    """The last row's attention in layer K-1 ranks all image tokens; round() of those that stay."""

    def choose(before: Tensor, here: Tensor) -> tuple[list[int], float]:
        attention = last_row_attention(llama, at - 1, before)
        scores = [attention[i] for i in image]
        return highest(scores, round(len(image) * (1 - removed)))

    return choose


def simignore(text_TD: Tensor, image: range, keep: int, step: int, offset: int) -> Choose:
    """Down the list of all (image token, text token) pairs, from the most alike: the first `keep`
    image tokens that are met, beginning at `offset`, every `step`-th pair."""

    def choose(before: Tensor, here: Tensor) -> tuple[list[int], float]:
        pairs = []
        for i, place in enumerate(image):
            for text in text_TD:
                alike = here[place] @ text / (here[place].norm() * text.norm())
                pairs.append((float(alike), i))
        pairs.sort(reverse=True)
        gaps = [a[0] - b[0] for a, b in zip(pairs, pairs[1:], strict=False)]
        met: list[int] = []
        for _, i in pairs[offset::step]:
            if i not in met and len(met) < keep:
                met.append(i)
        return sorted(met), min(gaps, default=math.inf)

    return choose


def adaptprune(llama: Llama, image: range, at: int, side: int, settings: dict[str, Any]) -> Choose:
    """Attention of the last row in layer K-1 times a Gaussian around the middle; then picks, each
    of which lowers the score of those that are near and alike in the keys of layer K."""

    def choose(before: Tensor, here: Tensor) -> tuple[list[int], float]:
        attention = last_row_attention(llama, at - 1, before)
        axis = torch.linspace(-side / 2, side / 2, side).tolist()
        width = settings.get("sigma_c") or side / 2
        centre = [
            math.exp(-(axis[y] ** 2 + axis[x] ** 2) / (2 * width**2))
            for y in range(side)
            for x in range(side)
        ]
        score = [attention[p] * c / max(centre) for p, c in zip(image, centre, strict=True)]
        keys = here[list(image)] @ llama.of(at, "self_attn.k_proj").T
        keys = keys / keys.norm(dim=-1, keepdim=True)
        alike = keys @ keys.T
        picked: list[int] = []
        gap = math.inf
        for _ in range(int(len(image) * settings["keep"])):
            free = [i for i in range(len(image)) if i not in picked]
            first, *rest = sorted(free, key=lambda i: -score[i])
            if rest:
                gap = min(gap, (score[first] - score[rest[0]]) / max(score[first], 1e-30))
            picked.append(first)
            for i in free:
                away = math.dist(divmod(i, side), divmod(first, side))
                if away <= settings["distance"]:
                    near = math.exp(-(away**2) / (2 * settings["sigma_d"] ** 2))
                    unlike = (1 - float(alike[first, i])) ** 2
                    score[i] *= 1 - near * math.exp(-unlike / (2 * settings["sigma_s"] ** 2))
        return sorted(picked), gap

    return choose


# ------------------------------------------------------------------------------------------- YOPO
def yopo(
    llama: Llama, rows_LD: Tensor, image: range, side: int, settings: dict[str, Any]
) -> Tensor:
    """Logits of all rows; those of image tokens mean something in the leaky mode alone.

    settings: layers (first without image tokens), heads (texts of "1" and "0"), window, ffn, mode.
    """
    config, count = llama.config, len(rows_LD)
    visual = [i in image for i in range(count)]
    allowed = torch.ones(count, count, dtype=torch.bool).tril()
    reach = None if settings["window"] is None else (settings["window"] - 1) // 2
    if reach is not None:
        for i in range(len(image)):
            for j in range(len(image)):
                (y, x), (v, u) = divmod(i, side), divmod(j, side)
                allowed[image[i], image[j]] = abs(y - v) <= reach and abs(x - u) <= reach
    is_visual = torch.tensor(visual)
    hidden, neurons = rows_LD, int(config.intermediate_size / settings["ffn"])
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for index in range(config.num_hidden_layers):
        without = index >= settings["layers"]
        keeps = torch.tensor([mark == "1" for mark in settings["heads"][index]])
        x = llama.norm(hidden, llama.of(index, "input_layernorm"))
        query, key = llama.queries_and_keys(x, index, range(count))
        value = llama.heads(x, index, "v", kv_heads).repeat_interleave(heads // kv_heads, 0)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        gone = ((~keeps)[:, None, None] | without) & is_visual  # [H, 1, L]: keys not looked at
        before_softmax = settings["mode"] == "renorm"
        if settings["mode"] == "renorm_layers":
            before_softmax = without
        seen = allowed & ~gone if before_softmax else allowed.expand(heads, count, count)
        mass = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        mass = mass * ~gone
        out = (mass @ value) * ~((~keeps)[:, None, None] & is_visual[:, None])
        out = out.transpose(0, 1).flatten(1) @ llama.of(index, "self_attn.o_proj").T
        hidden = hidden + out
        x = llama.norm(hidden, llama.of(index, "post_attention_layernorm"))
        gate, up = (x @ llama.of(index, f"mlp.{name}_proj").T for name in ("gate", "up"))
        inner = gate * gate.sigmoid() * up
        off = is_visual[:, None] & (torch.arange(inner.shape[1]) >= neurons)
        inner = inner.masked_fill(off, 0)
        hidden = hidden + inner @ llama.of(index, "mlp.down_proj").T
    return llama.logits(hidden)
