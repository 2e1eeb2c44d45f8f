"""The functions of flash-attn 2 and torch's `varlen_attn`, on the CPU and strict.

They have the real signatures and meaning (bottom-right causal, windows that count the keys to the
left), compute in float32 with plain torch (so gradients flow), and refuse with AssertionError what
the kernels would refuse or, worse, misread: dtypes, shapes, strides, `cu_seqlens` that are no int32
running totals, maximal lengths that are no Python integers or not the maxima.

    with flash_attn_installed() as calls:     # transformers' own flash_attention_2 path calls them
        model.config._attn_implementation = "flash_attention_2"

`Limits.dtypes` widens what is accepted, so that results can be compared in float32.
Sources: signatures of flash-attn 2.8 `flash_attn_interface.py` and of torch 2.13
`torch/nn/attention/varlen.py`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Limits:
    """What the kernels take; `calls` counts the calls of each function."""

    dtypes: tuple[torch.dtype, ...] = HALF
    calls: Counter[str] = Counter()


def attend(
    query_THd: Tensor,
    key_SKd: Tensor,
    value_SKd: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> Tensor:
    """One sample by the book; the last query stands beside the last key."""
    queries, keys = len(query_THd), len(key_SKd)
    groups = query_THd.shape[1] // key_SKd.shape[1]
    key, value = (each.float().repeat_interleave(groups, 1) for each in (key_SKd, value_SKd))
    logits = torch.einsum("thd,shd->hts", query_THd.float(), key)
    logits = logits * (query_THd.shape[-1] ** -0.5 if scale is None else scale)
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
    left, right = window[0], 0 if causal else window[1]
    unseen = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        unseen |= distance > left
    if right >= 0:
        unseen |= -distance > right
    mass = logits.masked_fill(unseen, float("-inf")).softmax(-1)
    mass = mass.masked_fill(unseen.all(1, keepdim=True), 0)  # a row that sees nothing gives 0
    return torch.einsum("hts,shd->thd", mass, value).to(query_THd.dtype)


def check_states(query: Tensor, key: Tensor, value: Tensor, dims: int, shared_heads: bool) -> None:
    """dims: 3 for [tokens, heads, d], 4 for [batch, tokens, heads, d]."""
    for each in (query, key, value):
        assert isinstance(each, Tensor)
        assert each.dtype in Limits.dtypes, f"dtype {each.dtype}"
        assert each.dtype == query.dtype
        assert each.device == query.device
        assert each.dim() == dims, f"shape {tuple(each.shape)}"
        assert each.stride(-1) == 1, "the last dimension must be contiguous"
        assert each.numel() > 0, f"shape {tuple(each.shape)}"
        assert each.shape[-1] == query.shape[-1]
    assert key.shape == value.shape
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    heads, kv_heads = query.shape[-2], key.shape[-2]
    assert heads % kv_heads == 0 if shared_heads else heads == kv_heads
    if dims == 4:
        assert query.shape[0] == key.shape[0]


def check_ends(ends: Tensor, tokens: int, longest: int, device: torch.device) -> list[int]:
    """Lengths of the samples."""
    assert isinstance(ends, Tensor)
    assert ends.dtype == torch.int32, f"cu_seqlens of {ends.dtype}"
    assert ends.dim() == 1
    assert len(ends) >= 2
    assert ends.is_contiguous()
    assert ends.device == device
    assert type(longest) is int, f"the maximal length is a {type(longest).__name__}"
    assert ends[0] == 0
    assert ends[-1] == tokens, f"cu_seqlens end at {ends[-1]}, there are {tokens} tokens"
    lengths = ends.diff().tolist()
    assert min(lengths) >= 0
    assert max(lengths) == longest, f"maximal length {longest}, really {max(lengths)}"
    return lengths


def check_options(scale: Any, causal: Any, window: Any) -> None:
    assert scale is None or type(scale) is float
    assert type(causal) is bool
    assert isinstance(window, tuple)
    assert len(window) == 2
    assert all(type(side) is int and side >= -1 for side in window)


def each_sample(
    states: tuple[Tensor, Tensor, Tensor],
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> Tensor:
    assert len(lengths_q) == len(lengths_k)
    query, key, value = states
    parts = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    return torch.cat([attend(q, k, v, scale, causal, window) for q, k, v in parts if len(q)])


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    Limits.calls["flash_attn_func"] += 1
    check_states(q, k, v, 4, shared_heads=True)
    check_options(softmax_scale, causal, window_size)
    assert (dropout_p, softcap, alibi_slopes, return_attn_probs) == (0.0, 0.0, None, False)
    assert type(deterministic) is bool
    parts = zip(q, k, v, strict=True)
    return torch.stack([attend(*part, softmax_scale, causal, window_size) for part in parts])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Tensor:
    Limits.calls["flash_attn_varlen_func"] += 1
    check_states(q, k, v, 3, shared_heads=True)
    lengths_q = check_ends(cu_seqlens_q, len(q), max_seqlen_q, q.device)
    lengths_k = check_ends(cu_seqlens_k, len(k), max_seqlen_k, q.device)
    check_options(softmax_scale, causal, window_size)
    assert (dropout_p, softcap, return_attn_probs) == (0.0, 0.0, False)
    assert alibi_slopes is None
    assert block_table is None
    assert type(deterministic) is bool
    return each_sample((q, k, v), lengths_q, lengths_k, softmax_scale, causal, window_size)


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("paged caches are not used here")


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """torch 2.13's. Causal is ``window_size=(left, 0)``."""
    Limits.calls["varlen_attn"] += 1
    check_states(query, key, value, 3, shared_heads=enable_gqa)
    lengths_q = check_ends(cu_seq_q, len(query), max_q, query.device)
    assert cu_seq_k is not None
    lengths_k = check_ends(cu_seq_k, len(key), max_k, query.device)
    check_options(scale, False, window_size)
    assert type(enable_gqa) is bool
    assert return_aux is None
    assert seqused_k is None
    assert block_table is None
    assert num_splits is None
    return each_sample((query, key, value), lengths_q, lengths_k, scale, False, window_size)


@contextmanager
def accepting(*dtypes: torch.dtype) -> Iterator[Counter[str]]:
    """The functions take these dtypes; yields the counter of their calls, emptied."""
    with mock.patch.object(Limits, "dtypes", dtypes), mock.patch.object(Limits, "calls", Counter()):
        yield Limits.calls


@contextmanager
def flash_attn_installed(*dtypes: torch.dtype) -> Iterator[Counter[str]]:
    """transformers finds a package flash_attn and uses it, through all of its own code.

    dtypes: as `accepting` (default: half precision, as the real one).
    """
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations import flash_attention

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_func = flash_attn_func
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    names = {"flash_attn": package, "flash_attn.bert_padding": padding}
    with (
        mock.patch.dict(sys.modules, names),
        mock.patch.object(utils, "is_flash_attn_2_available", return_value=True),
        mock.patch.object(utils, "_loaded_implementation", None),
        # Decided when transformers was imported; False wherever flash-attn 2.1 or later is.
        mock.patch.object(flash_attention, "_use_top_left_mask", False),
        accepting(*(dtypes or HALF)) as calls,
    ):
        yield calls
