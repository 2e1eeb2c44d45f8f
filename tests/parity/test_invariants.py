"""Settings that must not change the result, run against each other in float32.

Batched = alone, left = right padding, padded = packed, cached = uncached, sdpa = eager, beams with
a batch, checkpointing on = off: for every decoder family, with and without cuts, with 0, 1 and 2
pictures a sample, window-limited attention included.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FAMILIES, PLANS, VOCAB, batch, labels_of, prompts, tiny_model
from torch import Tensor

from llava.model.staged_decoder import Record
from llava.reduction import ReductionPlan
from llava.sequence import QUERY

TOLERANCE = 1e-5
EVERY = [(family, plan) for family in FAMILIES for plan in PLANS]
SOME = [(family, plan) for family in FAMILIES for plan in ("none", "pyramiddrop")]
SOME += [("llama", plan) for plan in PLANS if plan not in ("none", "pyramiddrop")]


def rows(output: Any, sample: int) -> Tensor:
    """Logits of a sample's real tokens."""
    sequence = output.sequence
    if sequence.layout.kind == "packed":
        start, length = sequence.layout.bounds()[sample]
        return output.logits[0, start : start + length]
    return output.logits[sample][sequence.origin[sample] >= 0]


def kept(output: Any, sample: int) -> list[list[int]]:
    """Origins that survive each cut, of the visual tokens of one sample."""
    out = []
    for cut in output.trace:
        mine = [r for r, group in enumerate(cut.layout.groups) if group.sample == sample]
        out.append([o for r in mine for o in cut.origin[r][cut.keep[r]].tolist()])
    return out


def run(model: Any, samples: Any, plan: str, side: str = "right", **more: Any) -> Any:
    with torch.no_grad():
        inputs = batch(samples, side)
        return model(**inputs, reduction=PLANS[plan], return_trace=True, **more)


def same(
    one: Any, sample_one: int, two: Any, sample_two: int, tolerance: float = TOLERANCE
) -> None:
    assert kept(one, sample_one) == kept(two, sample_two)
    torch.testing.assert_close(
        rows(one, sample_one), rows(two, sample_two), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(("family", "plan"), EVERY)
def test_batched_is_alone_on_either_side(family, plan):
    model, samples = tiny_model(family), prompts()
    right = run(model, samples, plan)
    left = run(model, samples, plan, "left")
    cached = run(model, samples, plan, use_cache=True)
    assert cached.sequence.layout.kind == "right"
    for index, sample in enumerate(samples):
        alone = run(model, [sample], plan)
        for together in (right, left, cached):
            same(together, index, alone, 0)


@pytest.mark.parametrize(("family", "plan"), EVERY)
def test_eager_is_sdpa(family, plan):
    eager = run(tiny_model(family, "eager"), prompts(), plan, "left")
    sdpa = run(tiny_model(family, "sdpa"), prompts(), plan, "left")
    # A layer program computes attention in pieces; where two kernels round them differently, six
    # layers of large weights make that grow (1.45e-5 at one element of Qwen3).
    tolerance = TOLERANCE if PLANS[plan].program is None else 2 * TOLERANCE
    for index in range(len(prompts())):
        same(eager, index, sdpa, index, tolerance)


@pytest.mark.parametrize("plan", ["pyramiddrop", "pyramiddrop, whole sample"])
def test_kept_sets_can_be_replayed(plan):
    """With given kept sets the method is not asked, and the floats follow from them alone."""
    eager, sdpa = tiny_model("llama", "eager"), tiny_model("llama", "sdpa")
    inputs = batch(prompts())
    with torch.no_grad():
        uniform = ReductionPlan.parse("uniform:layers=[1,3,4],ratios=[0.7,0.4,0.15]")
        uniform = uniform if plan == "pyramiddrop" else PLANS[plan]
        first = eager(**inputs, reduction=uniform, return_trace=True)
        record = Record(trace=True, replay=[cut.keep for cut in first.trace])
        again = sdpa(**inputs, reduction=PLANS[plan], return_trace=True, record=record)
    for index in range(len(prompts())):
        same(first, index, again, index)


def training_step(model: Any, side: str, kind: str | None, plan: str) -> tuple[Tensor, dict]:
    model.zero_grad()
    inputs = batch(prompts(), side)
    labels = labels_of(inputs)
    sequence = model.build_sequence(**inputs, labels=labels, kind=kind)
    loss = model(sequence=sequence, reduction=PLANS[plan], logits_to_keep="targets").loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def same_step(one: tuple[Tensor, dict], two: tuple[Tensor, dict]) -> None:
    torch.testing.assert_close(one[0], two[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert one[1].keys() == two[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, two[1][name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("family", "plan"), EVERY)
def test_training_is_the_same_padded_and_packed(family, plan):
    model = tiny_model(family).train()
    right = training_step(model, "right", None, plan)
    same_step(right, training_step(model, "left", None, plan))
    same_step(right, training_step(model, "right", "packed", plan))
    assert any("mm_projector" in name for name in right[1])
    for backend in ("eager", "varlen"):
        other = tiny_model(family, backend).train()
        same_step(right, training_step(other, "right", "packed", plan))


@pytest.mark.parametrize(("family", "plan"), SOME)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(family, plan, reentrant):
    model = tiny_model(family).train()
    plain = training_step(model, "right", None, plan)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same_step(plain, training_step(model, "right", None, plan))


def test_loss_of_a_batch_is_the_mean_of_its_tokens():
    model, plan = tiny_model().train(), PLANS["pyramiddrop"]
    inputs = batch(prompts())
    labels = labels_of(inputs)
    count = int((labels[:, 1:] != -100).sum())
    together = model(**inputs, labels=labels, reduction=plan)
    tokens = model(
        **inputs, labels=labels, reduction=plan, loss_mean="tokens", num_items_in_batch=2 * count
    )
    torch.testing.assert_close(tokens.loss * 2, together.loss)
    with pytest.raises(ValueError, match="num_items_in_batch"):
        model(**inputs, labels=labels, reduction=plan, loss_mean="tokens")


def uncached(
    model: Any, sample: Any, plan: str, steps: int, newest_ranks: bool = False
) -> list[int]:
    """Greedy tokens without a cache: the prompt and what was generated, whole, at every step.

    The rows and the texts that rank stay those of the prompt, as they are when a cache is used, or
    the newest token ranks.
    """
    ids, out = list(sample[0]), []
    prompt = model.build_sequence(**batch([sample]))
    for _ in range(steps):
        grown = batch([(ids + out, sample[1])])
        grown["images"] = batch([sample])["images"]
        sequence = model.build_sequence(**grown)
        query = torch.zeros_like(sequence.query)
        query[0, sequence.layout.lengths[0] - 1 - (0 if newest_ranks else len(out))] = 1
        sequence.facts[..., QUERY] = query
        sequence.inputs = prompt.inputs
        with torch.no_grad():
            logits = model(sequence=sequence, reduction=PLANS[plan], use_cache=False).logits
        out.append(int(logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize(("family", "plan"), EVERY)
def test_generation_with_a_cache_is_without_one(family, plan):
    model, samples = tiny_model(family), prompts()
    for side in ("left", "right"):
        tokens = model.generate(
            **batch(samples, side), reduction=PLANS[plan], max_new_tokens=8, do_sample=False
        )
        for index, sample in enumerate(samples):
            assert tokens[index].tolist() == uncached(model, sample, plan, 8)


@pytest.mark.parametrize("text", ["fastv:k=2,r=0", "fastv:k=5,keep=16", "adaptprune:k=2,keep=1.0"])
def test_a_cut_that_keeps_everything_changes_nothing(text):
    model, inputs = tiny_model(), batch(prompts()[:2])
    with torch.no_grad():
        got = model(**inputs, reduction=text, return_trace=True)
        expected = model(**inputs, reduction="none").logits
    assert all(bool((cut.keep == cut.valid).all()) for cut in got.trace)
    torch.testing.assert_close(got.logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("plan", ["fastv", "pyramiddrop", "random then uniform"])
def test_ranking_anew_at_every_token(family, plan):
    """With `rerank` each token is that of the whole text so far, for batches and for beams."""
    model, samples = tiny_model(family), prompts()
    anew = replace(PLANS[plan], rerank=True)
    call = {"max_new_tokens": 8, "do_sample": False}
    for side in ("left", "right"):
        inputs = batch(samples, side)
        tokens = model.generate(**inputs, reduction=anew, **call)
        beams = model.generate(**inputs, reduction=str(anew), **call, num_beams=3)
        for index, sample in enumerate(samples):
            assert tokens[index].tolist() == uncached(model, sample, plan, 8, newest_ranks=True)
            alone = model.generate(**batch([sample]), reduction=anew, **call, num_beams=3)
            assert beams[index].tolist() == alone[0].tolist()
    frozen = model.generate(**inputs, reduction=PLANS[plan], **call)
    assert torch.equal(tokens, frozen) == (plan == "random then uniform")


@pytest.mark.parametrize(("family", "plan"), SOME)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_with_a_batch(family, plan, options):
    model, samples = tiny_model(family), prompts()
    call = {"reduction": PLANS[plan], "max_new_tokens": 6, "do_sample": False, **options}
    copies = options.get("num_return_sequences", 1)
    together = model.generate(**batch(samples), **call)
    for index, sample in enumerate(samples):
        alone = model.generate(**batch([sample]), **call)
        assert together[index * copies : (index + 1) * copies].tolist() == alone.tolist()


@pytest.mark.parametrize("plan", ["none", "pyramiddrop"])
def test_several_tokens_on_the_cache(plan):
    """A second turn of text on a filled cache equals token by token."""
    model, more = tiny_model("qwen2"), torch.tensor([[5, 9, 11], [7, 3, 20], [8, 8, 4], [6, 2, 30]])
    whole = run(model, prompts(), plan, "left", use_cache=True).past_key_values
    single = run(model, prompts(), plan, "left", use_cache=True).past_key_values
    with torch.no_grad():
        together = model(more, past_key_values=whole).logits
        apart = [model(more[:, i : i + 1], past_key_values=single).logits for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=TOLERANCE, rtol=TOLERANCE)


def test_sampling_streaming_and_offloading():
    model, samples = tiny_model(), prompts()
    call = {"reduction": PLANS["pyramiddrop"], "max_new_tokens": 5}
    torch.manual_seed(3)
    sampled = model.generate(**batch(samples), **call, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (12, 5)
    assert len({tuple(row) for row in sampled[:3].tolist()}) > 1
    greedy = model.generate(**batch(samples), **call, do_sample=False)
    streamed: list[int] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None:
            streamed.append(-1)

    alone = model.generate(**batch(samples[:1]), **call, do_sample=False, streamer=Streamer())
    assert streamed == [*alone[0].tolist(), -1]
    assert alone[0].tolist() == greedy[0].tolist()


def test_the_plan_of_a_call_wins_over_the_checkpoint():
    model = tiny_model()
    inputs = batch(prompts())
    with torch.no_grad():
        before = model(**inputs, return_trace=True)
        model.config.visual_token_reduction = PLANS["pyramiddrop"].to_dict()
        stored = model(**inputs, return_trace=True)
        switched = model(**inputs, reduction="none", return_trace=True)
    assert len(before.trace) == len(switched.trace) == 0
    assert len(stored.trace) == 3
    torch.testing.assert_close(before.logits, switched.logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "static"),
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds"),
        ({"assistant_model": object()}, "assisted"),
    ],
)
def test_what_cannot_be_right_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**batch(prompts()), max_new_tokens=2, **options)


def test_asking_for_hidden_states_leaves_the_tower_as_it_is():
    """transformers would hook the tower's layers twice; its features came from another layer."""
    model, inputs = tiny_model(), batch(prompts())
    with torch.no_grad():
        before = model.build_sequence(**inputs).hidden
        for _ in range(2):
            output = model(**inputs, reduction="none", output_hidden_states=True)
            assert len(output.hidden_states) == 7
            torch.testing.assert_close(model.build_sequence(**inputs).hidden, before)


def test_hidden_states_are_collected_with_their_lengths():
    output = run(tiny_model(), prompts()[:1], "pyramiddrop", output_hidden_states=True)
    lengths = [state.shape[1] for state in output.hidden_states]
    # The input, then each layer's output: 12 text tokens and 16 -> 11 -> 6 -> 2 visual ones, cut
    # before the layers 1, 3 and 4.
    assert lengths == [28, 28, 23, 23, 18, 14, 14]
    with pytest.raises(ValueError, match="output_attentions"):
        run(tiny_model(), prompts(), "none", output_attentions=True)
    assert output.logits.shape[-1] == VOCAB
