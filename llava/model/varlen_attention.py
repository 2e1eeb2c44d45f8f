"""Attention over packed samples: the backend ``varlen``.

A packed batch is one row ``[1, T]`` with samples one behind the other. The kernels that respect
their borders want transformers' four varlen arguments (`cu_seq_lens_q`, `cu_seq_lens_k`,
`max_length_q`, `max_length_k`); eager and sdpa ignore those silently. ``varlen`` is registered with
transformers beside them and takes, on a GPU in half precision, torch's own `varlen_attn` (its
signature differs between versions) or flash-attn, and otherwise one SDPA call a sample. Batches
that are not packed go to sdpa, masks included, so a model loaded with
``attn_implementation="varlen"`` trains packed and generates as usual.

    python -m llava.train.train ... --packed True
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "varlen"


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, d], key and value [1, K, T, d] of packed
    samples whose ends are `cu_seq_lens_q` (int32 [samples + 1]) -> ([1, T, H, d], None).

    Causal within each sample. Without `cu_seq_lens_q` it is transformers' sdpa.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is None
    states = _in_autocast(query, key, value)
    kernel = kernel_for(states[0], dropout)
    if kernel is None:
        return _by_sample(module, states, cu_seq_lens_q, dropout, scaling, sliding_window)
    rows = [each[0].transpose(0, 1) for each in states]
    window = -1 if sliding_window is None else sliding_window - 1
    out = kernel(*rows, cu_seq_lens_q, max_length_q, scaling, window)
    return out[None], None


def _in_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states in the type that autocast would hand to sdpa. A kernel is not cast for, and over
    float32 weights the rotary embedding has made query and key float32 again."""
    device = query.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _by_sample(
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    ends: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, None]:
    """One call a sample. Reads the lengths on the host (free on a CPU, one wait a layer on a GPU,
    where this path serves float32 and torch without `varlen_attn`)."""
    lengths = ends.diff().tolist()
    parts = []
    for query, key, value in zip(*(each.split(lengths, dim=2) for each in states), strict=True):
        mask = None
        if window is not None and query.shape[2] > window:
            column = torch.arange(query.shape[2], device=query.device)
            distance = column[:, None] - column
            mask = ((distance >= 0) & (distance < window))[None, None]
        parts.append(
            sdpa_attention_forward(
                module, query, key, value, mask, dropout=dropout, scaling=scaling
            )[0]
        )
    return torch.cat(parts, 1), None


def kernel_for(query: Tensor, dropout: float) -> Any:
    """The kernel that can take these states; None: one SDPA call a sample."""
    if query.is_cuda and query.element_size() == 2 and not dropout:
        return gpu_kernel()
    return None


@lru_cache(maxsize=1)
def gpu_kernel() -> Any:
    """``kernel(q, k, v, ends, longest, scale, window)`` over [T, heads, d], or None when neither
    torch nor an installed package has one. window: keys seen to the left, -1 = all."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        varlen_attn = None
    if varlen_attn is not None:
        adapted = adapt_varlen_attn(varlen_attn)
        if adapted is not None:
            return adapted
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return adapt_flash_attn(flash_attn_varlen_func)
    return None


def adapt_varlen_attn(function: Any) -> Any:
    """One form for all signatures of torch's `varlen_attn`: with `window_size` (torch 2.12 and
    later) or with `is_causal` alone, with or without `scale` and `enable_gqa`."""
    accepted = set(inspect.signature(function).parameters)
    if not accepted & {"window_size", "is_causal"}:
        return None

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        longest: int,
        scale: float | None,
        window: int,
    ) -> Tensor:
        extra: dict[str, Any] = {}
        if "window_size" in accepted:
            extra["window_size"] = (window, 0)
        elif window < 0:
            extra["is_causal"] = True
        else:
            raise ValueError(
                f"a sliding window of {window + 1} needs torch 2.12 or flash-attn; this torch's "
                "varlen_attn has no window_size"
            )
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in accepted:
            extra["enable_gqa"] = True
        elif groups > 1:
            key, value = (_repeat_heads(states, groups) for states in (key, value))
        if "scale" in accepted:
            extra["scale"] = scale
        elif scale is not None and scale != query.shape[-1] ** -0.5:
            query = query * (scale * query.shape[-1] ** 0.5)
        return function(query, key, value, ends, ends, longest, longest, **extra)

    return kernel


def adapt_flash_attn(function: Any) -> Any:
    """`flash_attn_varlen_func` in the same form."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        longest: int,
        scale: float | None,
        window: int,
    ) -> Tensor:
        return function(
            query,
            key,
            value,
            ends,
            ends,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            window_size=(window, 0 if window >= 0 else -1),
        )

    return kernel


def _repeat_heads(states_TKd: Tensor, groups: int) -> Tensor:
    return repeat_kv(states_TKd.transpose(0, 1)[None], groups)[0].transpose(0, 1)


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
