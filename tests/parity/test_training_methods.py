"""Training with any method: which rows rank, what they may have seen, and where tokens stand.

Every method of the table is here; one that is added and left out fails the first test. That loss
and gradients agree between padded and packed batches, backends and checkpointing is shown, for the
same methods, by `test_invariants`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_invariants import kept
from tiny import batch, labels_of, prompts, tiny_model
from torch import Tensor

from llava.model.staged_decoder import Record
from llava.reduction import REDUCERS, ReductionPlan

# One plan a method, cutting at layer 2 or before the first; {rope} where attention ranks.
PLANS = {
    "pyramiddrop": "pyramiddrop:layers=[2],ratios=[0.5],rope={rope}",
    "fastv": "fastv:k=2,r=0.5,rope={rope}",
    "adaptprune": "adaptprune:k=2,keep=0.5,sigma_s=0.4,rope={rope}",
    "simignore": "simignore:ratio=0.5,text=all",
    "random": "random:layers=[2],ratios=[0.5]",
    "uniform": "uniform:layers=[2],ratios=[0.5]",
    "yopo": "yopo:layers=4,heads=['1111','1011','0001','0000','1111','1111'],window=3",
}
ATTENTION = ("pyramiddrop", "fastv", "adaptprune")
RANKED = [(name, rope) for name in ATTENTION for rope in (True, False)] + [("simignore", True)]


def plan_of(name: str, rope: bool = True, positions: str | None = None) -> ReductionPlan:
    text = PLANS[name].format(rope=rope)
    return ReductionPlan.parse(text if positions is None else f"{text},positions={positions}")


def test_every_method_is_here():
    assert set(PLANS) | {"drop_visual"} == set(REDUCERS)  # drop_visual chooses nothing
    for name in ATTENTION:
        assert "rope" in REDUCERS[name].__dataclass_fields__
    reading = {name for name in PLANS if plan_of(name).shared_depth(6) < 6}
    assert reading == {name for name, _ in RANKED}


def trained(model: Any, ids: Tensor, labels: Tensor, plan: Any, kind: str, inputs: Any) -> Any:
    given = {**inputs, "input_ids": ids}
    sequence = model.build_sequence(**given, labels=labels, kind=kind)
    with torch.no_grad():
        return model(sequence=sequence, reduction=plan, return_trace=True, use_cache=False)


@pytest.mark.parametrize(("name", "rope"), RANKED)
def test_an_answer_never_ranks(name, rope):
    """Other words in the last answer and behind it leave every choice as it is; other words in the
    question do not, for they do rank."""
    model, samples, plan = tiny_model(), prompts(), plan_of(name, rope)
    inputs = batch(samples)
    labels = labels_of(inputs)
    changed, asked = inputs["input_ids"].clone(), inputs["input_ids"].clone()
    for row, mask in enumerate(inputs["attention_mask"]):
        last = int(mask.sum()) - 1
        changed[row, last - 1 : last + 1] = torch.tensor([40 + row, 50 + row])
        asked[row, last - 3] = 60 + row  # between the spans
        asked[row, last - 6] = 70 + row  # in front of the first
    differs = False
    for kind in ("right", "packed"):
        first = trained(model, inputs["input_ids"], labels, plan, kind, inputs)
        other = trained(model, changed, labels, plan, kind, inputs)
        question = trained(model, asked, labels, plan, kind, inputs)
        for sample in range(len(samples)):
            assert kept(first, sample) == kept(other, sample)
            differs |= kept(first, sample) != kept(question, sample)
    assert differs


@pytest.mark.parametrize(("name", "rope"), [pair for pair in RANKED if pair[0] in ATTENTION])
def test_the_rows_in_front_of_answers_rank_in_the_mean(name, rope):
    """Each of those rows is the last row of a prompt that ends there: the score in training is the
    mean of the scores that these prompts give in inference."""
    model, plan = tiny_model("qwen2"), plan_of(name, rope)
    for ids, pictures in (prompts()[0], prompts()[2], prompts()[3]):
        inputs = batch([(ids, pictures)])
        labels = torch.full_like(inputs["input_ids"], -100)
        last = len(ids) - 1
        supervised = [last - 3, last - 2, last]  # two answers
        labels[0, supervised] = inputs["input_ids"][0, supervised]
        sequence = model.build_sequence(**inputs, labels=labels)
        with torch.no_grad():
            got = model(sequence=sequence, reduction=plan, return_trace=True, use_cache=False)
            scores = []
            for stop in (last - 3, last):
                prompt = {**batch([(ids[:stop], pictures)]), "images": inputs["images"]}
                alone = model(**prompt, reduction=plan, return_trace=True)
                scores.append(alone.trace[0].score)
        expected = torch.stack(scores).mean(0)
        torch.testing.assert_close(got.trace[0].score, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_positions_for_every_method(name, positions):
    """Counted again from 0, or those of the uncut sample; alone, batched and packed alike."""
    model, samples = tiny_model(), prompts()
    plan, inputs = plan_of(name, positions=positions), batch(samples)
    labels = labels_of(inputs)
    for kind in ("right", "left", "packed"):
        out = trained(model, inputs["input_ids"], labels, plan, kind, inputs)
        layout, final = out.sequence.layout, out.sequence
        fewer = 0
        for sample, (start, length) in enumerate(layout.bounds()):
            row = 0 if kind == "packed" else sample
            position = final.position[row, start : start + length]
            origin = final.origin[row, start : start + length]
            expected = origin if positions == "original" else torch.arange(length)
            assert torch.equal(position, expected)
            fewer += length < int(out.stages[0].lengths[sample])
        assert fewer == 3  # all but the sample without a picture


@pytest.mark.parametrize("name", PLANS)
def test_gradients_flow_through_what_is_left(name):
    """Into projector and embeddings; what chooses gets none, so a frozen choice gives the same."""
    model, inputs = tiny_model().train(), batch(prompts())
    labels, plan = labels_of(inputs), plan_of(name)

    def step(**more: Any) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(**inputs, labels=labels, reduction=plan, return_trace=True, **more)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return grads | {"keep": out.trace}

    free = step()
    trace = free.pop("keep")
    frozen = step(record=Record(trace=True, replay=[cut.keep for cut in trace]))
    frozen.pop("keep")
    assert free.keys() == frozen.keys()
    for key, grad in free.items():
        torch.testing.assert_close(grad, frozen[key], atol=1e-6, rtol=1e-5, msg=key)
    for part in ("mm_projector.0.weight", "embed_tokens.weight", "layers.5.mlp.down_proj.weight"):
        (found,) = (grad for key, grad in free.items() if key.endswith(part))
        assert float(found.abs().sum()) > 0
