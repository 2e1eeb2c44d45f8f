"""The packed backend: its GPU kernels' adapters, checked with stand-ins of each known signature."""

from __future__ import annotations

import pytest
import torch
from tiny import PLANS, batch, prompts, tiny_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llava.model import varlen_attention as module
from llava.model.varlen_attention import adapt_flash_attn, adapt_varlen_attn

ENDS = torch.tensor([0, 3, 10], dtype=torch.int32)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """[T, H, d] by the book, sample by sample."""
    groups = query.shape[1] // key.shape[1]
    out = []
    for start, stop in zip(ENDS[:-1].tolist(), ENDS[1:].tolist(), strict=True):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        mask = (distance >= 0) & ((distance <= window) if window >= 0 else True)
        out.append(scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(0, 1))
    return torch.cat(out)


def checked(q, k, v, ends, longest):
    assert ends is ENDS or torch.equal(ends, ENDS)
    assert ends.dtype == torch.int32
    assert longest == 7
    assert isinstance(longest, int)
    assert q.shape[0] == k.shape[0] == v.shape[0] == 10


def torch_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    checked(q, k, v, cu_q, max_q)
    assert is_causal
    assert q.shape[1] == k.shape[1]
    return attention(q, k, v, q.shape[-1] ** -0.5, -1)


def torch_2_13(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    checked(q, k, v, cu_k, max_k)
    assert window_size[1] == 0
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return attention(q, k, v, scale, window_size[0])


def flash(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1),
):  # fmt: skip
    checked(q, k, v, cu_q, max_q)
    assert causal
    return attention(q, k, v, softmax_scale, window_size[0])


def states(kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(10, 4, 8), torch.randn(10, kv_heads, 8), torch.randn(10, kv_heads, 8)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("scale", [8**-0.5, 0.2])
@pytest.mark.parametrize(
    "kernel",
    [adapt_varlen_attn(torch_2_10), adapt_varlen_attn(torch_2_13), adapt_flash_attn(flash)],
)
def test_every_signature_gives_the_same(kernel, scale, kv_heads):
    qkv = states(kv_heads)
    found = kernel(*qkv, ENDS, 7, scale, -1)
    torch.testing.assert_close(found, attention(*qkv, scale, -1))


def test_windows_reach_the_kernels_that_have_them():
    for kernel in (adapt_varlen_attn(torch_2_13), adapt_flash_attn(flash)):
        found = kernel(*states(), ENDS, 7, 0.3, 2)
        torch.testing.assert_close(found, attention(*states(), 0.3, 2))
    with pytest.raises(ValueError, match="sliding window of 3"):
        adapt_varlen_attn(torch_2_10)(*states(), ENDS, 7, 0.3, 2)
    assert adapt_varlen_attn(lambda q, k, v: None) is None


def test_kernels_take_half_precision_under_autocast(monkeypatch):
    """Plain bf16 training: float32 weights, so the rotary embedding makes query and key float32
    beside a bfloat16 value. A kernel takes one half-precision type alone."""
    seen = []

    def kernel(q, k, v, ends, longest, scale, window):
        seen.append((q.dtype, k.dtype, v.dtype))
        return attention(q, k, v, scale, window)

    half = torch.bfloat16
    monkeypatch.setattr(
        module, "kernel_for", lambda q, dropout: kernel if q.dtype == half else None
    )
    query, key, value = (x.transpose(0, 1)[None] for x in states(4))
    arguments = {"scaling": 0.2, "cu_seq_lens_q": ENDS, "max_length_q": 7}
    with torch.autocast("cpu", half):
        found = module.varlen_attention_forward(
            torch.nn.Module(), query, key, value.to(half), None, **arguments
        )[0]
    assert seen == [(half,) * 3]
    expected = attention(*(x.to(half) for x in states(4)), 0.2, -1)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_batches_that_are_not_packed_go_to_sdpa(family):
    inputs = batch(prompts(), "left")
    tokens = [
        tiny_model(family, backend).generate(
            **inputs, reduction=PLANS["pyramiddrop"], max_new_tokens=4, do_sample=False
        )
        for backend in ("sdpa", "varlen")
    ]
    assert torch.equal(*tokens)
