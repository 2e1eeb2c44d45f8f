"""The whole forward, prefill and decode steps on the meta device, where any host read raises."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, PLANS, batch, labels_of, prompts, tiny_model

CASES = [(family, plan) for family in FAMILIES for plan in PLANS]


def to_meta(model, samples, side="left", labels=False, kind=None):
    """The model and an embedded batch, without values; the layout stays on the host."""
    inputs = batch(samples, side)
    targets = labels_of(inputs) if labels else None
    sequence = model.build_sequence(**inputs, labels=targets, kind=kind)
    sequence.hidden = sequence.hidden.detach()
    return model.to("meta"), sequence.to("meta")


@pytest.mark.parametrize(("family", "plan"), CASES)
@pytest.mark.parametrize("mixed", [True, False])
def test_prefill_and_decode(family, plan, mixed):
    samples = prompts() if mixed else prompts()[:1] * 3
    model, sequence = to_meta(tiny_model(family), samples)
    with torch.no_grad():
        output = model(sequence=sequence, reduction=PLANS[plan], use_cache=True, logits_to_keep=1)
        cache, rows = output.past_key_values, len(samples)
        assert output.logits.shape == (rows, 1, model.vocab_size)
        for step in range(3):
            token = torch.zeros(rows, 1, dtype=torch.long, device="meta")
            logits = model(token, past_key_values=cache).logits
            assert logits.shape == (rows, 1, model.vocab_size)
            for stage in cache.stages:
                assert cache.get_seq_length(stage.start) == stage.length + step + 1


@pytest.mark.parametrize(("family", "plan"), CASES)
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_a_training_step(family, plan, kind):
    model, sequence = to_meta(tiny_model(family).train(), prompts(), "right", True, kind)
    loss = model(sequence=sequence, reduction=PLANS[plan], logits_to_keep="targets").loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_the_check_would_notice():
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool((torch.zeros(3, device="meta") > 0).any())


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["pyramiddrop", "fastv", "adaptprune"])
def test_no_synchronisation_on_a_gpu(plan):
    model = tiny_model().cuda()
    sequence = model.build_sequence(**batch(prompts(), "left"), kind="left").to("cuda")
    with torch.no_grad():
        for _ in range(2):  # the first call may initialise libraries
            torch.cuda.synchronize()
            output = model(
                sequence=sequence, reduction=PLANS[plan], use_cache=True, logits_to_keep=1
            )
            token = output.logits[:, -1].argmax(-1)[:, None]
            model(token, past_key_values=output.past_key_values)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = model(
                sequence=sequence, reduction=PLANS[plan], use_cache=True, logits_to_keep=1
            )
            token = output.logits[:, -1].argmax(-1)[:, None]
            model(token, past_key_values=output.past_key_values)
        finally:
            torch.cuda.set_sync_debug_mode("default")
