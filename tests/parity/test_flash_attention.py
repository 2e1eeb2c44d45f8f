"""flash_attention_2 and varlen_attn without a GPU: every call checked, every result that of sdpa.

The functions are strict stand-ins (`flash_standin`); everything above them is the real thing:
transformers' flash_attention_2 path with its unpadding, our packed layout, caches and cuts. What a
stand-in cannot show is the kernels themselves: `scripts/gpu_check.sh` runs those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import flash_standin
import pytest
import torch
from flash_standin import HALF, accepting, flash_attn_installed
from test_invariants import PLANS, TOLERANCE, kept, rows, same, same_step, training_step
from tiny import FAMILIES, batch, prompts, tiny_model

from llava.model import varlen_attention
from llava.model.staged_decoder import Record

USED = ("none", "pyramiddrop", "fastv", "adaptprune", "yopo", "all dropped")
EVERY = [(family, plan) for family in FAMILIES for plan in USED]
FLASH = "flash_attention_2"


def with_backend(model: Any, name: str) -> Any:
    """Without the check for the package, which looks for a GPU."""
    model.config._attn_implementation = name
    return model


def attended(model: Any, plan: str) -> int:
    """Layers whose attention is the backend's; a layer program brings its own."""
    program = PLANS[plan].program
    return model.config.num_hidden_layers - (0 if program is None else program.first_free)


def forward(model: Any, samples: Any, plan: str, side: str, **more: Any) -> Any:
    with torch.no_grad():
        return model(**batch(samples, side), reduction=PLANS[plan], return_trace=True, **more)


@pytest.mark.parametrize(("family", "plan"), EVERY)
def test_padded_batches_equal_sdpa(family, plan):
    """Left-padded ones are unpadded by transformers; right-padded and lone ones need no mask."""
    model, samples = tiny_model(family), prompts()
    for side, use_cache in (("left", False), ("left", True), ("right", False)):
        expected = forward(with_backend(model, "sdpa"), samples, plan, side, use_cache=use_cache)
        with flash_attn_installed(torch.float32) as calls:
            found = forward(with_backend(model, FLASH), samples, plan, side, use_cache=use_cache)
        ran = "flash_attn_varlen_func" if side == "left" else "flash_attn_func"
        assert calls == {ran: attended(model, plan)}
        for index in range(len(samples)):
            same(found, index, expected, index)


@pytest.mark.parametrize(("family", "plan"), EVERY)
def test_generation_equals_sdpa(family, plan):
    """Prefill and steps on a cache whose layers differ in length, windows that fill included."""
    model, samples = tiny_model(family), prompts()
    call = {"reduction": PLANS[plan], "max_new_tokens": 7, "do_sample": False}
    for inputs in (batch(samples, "left"), batch(samples[:1])):
        expected = with_backend(model, "sdpa").generate(**inputs, **call)
        with flash_attn_installed(torch.float32) as calls:
            found = with_backend(model, FLASH).generate(**inputs, **call)
        assert sum(calls.values()) == 7 * attended(model, plan)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("family", "plan"), EVERY)
def test_packed_training_equals_sdpa(family, plan):
    """Loss and gradients: flash_attention_2 by transformers' four varlen arguments, and `varlen`
    through torch's function, checkpointing off and on."""
    model = tiny_model(family).train()
    expected = training_step(model, "right", "packed", plan)
    with flash_attn_installed(torch.float32) as calls:
        same_step(training_step(with_backend(model, FLASH), "right", "packed", plan), expected)
    assert calls == {"flash_attn_varlen_func": attended(model, plan)}
    with varlen_kernel(torch.float32) as calls:
        with_backend(model, varlen_attention.VARLEN)
        same_step(training_step(model, "right", "packed", plan), expected)
        assert calls == {"varlen_attn": attended(model, plan)}
        model.gradient_checkpointing_enable({"use_reentrant": False})
        same_step(training_step(model, "right", "packed", plan), expected)


@contextmanager
def varlen_kernel(*dtypes: torch.dtype) -> Iterator[Any]:
    """`varlen` takes torch's function although the states are on the CPU."""
    kernel = varlen_attention.adapt_varlen_attn(flash_standin.varlen_attn)
    with (
        mock.patch.object(varlen_attention, "kernel_for", return_value=kernel),
        accepting(*dtypes) as calls,
    ):
        yield calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_reaches_the_kernels_in_half_precision(family, dtype):
    """The dtypes that the real kernels take, with the cuts of sdpa replayed: near-tied scores may
    fall the other way in half precision."""
    model, samples = tiny_model(family).to(dtype), prompts()

    def run(backend: str, kind: str, record: Record | None = None) -> Any:
        sequence = with_backend(model, "sdpa").build_sequence(**batch(samples, "left"), kind=kind)
        with torch.no_grad():
            return with_backend(model, backend)(
                sequence=sequence, reduction=PLANS["pyramiddrop"], return_trace=True, record=record
            )

    for kind, backend, kernel in (
        ("left", FLASH, flash_attn_installed),
        ("packed", FLASH, flash_attn_installed),
        ("packed", varlen_attention.VARLEN, varlen_kernel),
    ):
        expected = run("sdpa", kind)
        record = Record(trace=True, replay=[cut.keep for cut in expected.trace])
        with kernel(*HALF) as calls:
            found = run(backend, kind, record)
        assert sum(calls.values()) == model.config.num_hidden_layers
        for index in range(len(samples)):
            assert kept(found, index) == kept(expected, index)
            one, two = rows(found, index).float(), rows(expected, index).float()
            assert (one - two).abs().max() < 0.05 * two.abs().max()


# --- the stand-ins themselves ------------------------------------------------------------------
def states(heads: int = 4, kv_heads: int = 2, tokens: int = 10) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    sizes = ((tokens, heads, 8), (tokens, kv_heads, 8), (tokens, kv_heads, 8))
    return tuple(torch.randn(size).half() for size in sizes)


GOOD: dict[str, Any] = {
    "cu_seqlens_q": torch.tensor([0, 3, 10], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 3, 10], dtype=torch.int32),
    "max_seqlen_q": 7,
    "max_seqlen_k": 7,
    "causal": True,
    "window_size": (-1, -1),
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"cu_seqlens_q": GOOD["cu_seqlens_q"].long()},
        {"cu_seqlens_k": torch.tensor([0, 3, 9], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([1, 3, 10], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([0, 10], dtype=torch.int32), "max_seqlen_q": 10},
        {"cu_seqlens_q": torch.tensor([0, 12, 10], dtype=torch.int32), "max_seqlen_q": 12},
        {"max_seqlen_q": torch.tensor(7)},
        {"max_seqlen_k": 8},
        {"causal": 1},
        {"window_size": [-1, -1]},
        {"window_size": (2.0, 0)},
        {"dropout_p": 0.1},
        {"softmax_scale": torch.tensor(0.3)},
        {"q": states()[0].float()},
        {"q": states()[0][None]},
        {"q": states(heads=3)[0]},
        {"k": states()[1].transpose(1, 2).contiguous().transpose(1, 2)},
        {"v": states(tokens=9)[2]},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_wrong_arguments_are_refused(wrong):
    names = ("q", "k", "v")
    call = {**dict(zip(names, states(), strict=True)), **GOOD}
    assert flash_standin.flash_attn_varlen_func(**call).shape == (10, 4, 8)
    with pytest.raises(AssertionError):
        flash_standin.flash_attn_varlen_func(**{**call, **wrong})


def test_causal_stands_at_the_end_of_the_keys():
    """Two new tokens on a cache of five see six and seven keys; a window its share."""
    query, key, value = states()
    for window, first in (((-1, -1), 0), ((2, 0), 3)):
        out = flash_standin.flash_attn_func(
            query[None, :2], key[None, :7], value[None, :7], causal=True, window_size=window
        )
        alone = flash_standin.flash_attn_func(
            query[None, :1], key[None, first:6], value[None, first:6]
        )
        torch.testing.assert_close(out[0, 0], alone[0, 0], atol=TOLERANCE, rtol=1e-3)


def test_flash_attention_is_gone_behind_the_block():
    with flash_attn_installed():
        pass
    with pytest.raises(ImportError):
        tiny_model().set_attn_implementation(FLASH)
