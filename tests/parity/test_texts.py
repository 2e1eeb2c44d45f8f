"""Methods that compare pictures with words: what they are shown in a batch, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_invariants import kept, rows, same
from tiny import batch, labels_of, prompts, tiny_model
from torch import Tensor

from llava.prompting import pad_texts
from llava.reduction import Cut, FastV, ReductionPlan, Simignore


def outputs(model: Any, samples: Any, plan: ReductionPlan, **more: Any) -> Any:
    with torch.no_grad():
        return model(**batch(samples, more.pop("side", "left")), reduction=plan, return_trace=True)


def nearest(model: Any, sample: Any, words: list[int], keep: int, step: int = 1) -> list[list[int]]:
    """Origins of the image tokens that a walk over the sorted similarities meets, per picture,
    worked out from the embeddings alone."""
    sequence = model.build_sequence(**batch([sample]))
    text = model.get_input_embeddings()(torch.tensor(words))
    found = []
    for picture in range(sample[1]):
        place = (sequence.cell[0, :, 0] == picture).nonzero()[:, 0]
        pairs = F.normalize(sequence.hidden[0, place], dim=-1) @ F.normalize(text, dim=-1).T
        order = pairs.flatten().sort(descending=True, stable=True).indices[::step] // len(words)
        met = list(dict.fromkeys(order.tolist()))[:keep]
        found.append(sorted(place[met].tolist()))
    return found


def flat(lists: list[list[int]]) -> list[int]:
    return [x for one in lists for x in one]


@pytest.mark.parametrize("at", [0, 3])
def test_words_meet_the_embeddings_at_any_cut(at):
    """Also behind layers that have changed the hidden states."""
    model, samples = tiny_model(), prompts()
    plan = ReductionPlan((Cut(at, Simignore(keep=5, text="question")),), "original")
    out = outputs(model, samples, plan)
    for index, sample in enumerate(samples):
        expected = flat(nearest(model, sample, sample[0][-4:], 5))
        assert kept(out, index) == [expected]
    everything = ReductionPlan((Cut(at, Simignore(keep=5, text="all")),), "original")
    out = outputs(model, samples, everything)
    for index, sample in enumerate(samples):
        words = [i for i in sample[0] if i >= 0]
        assert kept(out, index) == [flat(nearest(model, sample, words, 5))]


def test_the_first_text_that_a_sample_has():
    model, samples = tiny_model(), prompts()
    plan = ReductionPlan.parse("simignore:keep=5,text=options|question")
    out, texts = outputs(model, samples, plan), batch(samples)["texts"]["options"]
    has_options = (texts >= 0).any(1).tolist()
    assert sorted(set(has_options)) == [False, True]
    for index, (sample, has) in enumerate(zip(samples, has_options, strict=True)):
        words = [1, *sample[0][-2:], 5] if has else sample[0][-4:]
        assert kept(out, index) == [flat(nearest(model, sample, words, 5))]


def test_fewer_tokens_than_asked_for():
    """Every third pair of a text of one word: the list ends early, at another number in each
    sample, and the cuts and caches behind go on from what was really left."""
    model, samples = tiny_model("qwen2"), prompts()
    samples[0] = (samples[0][0], 1)
    plan = ReductionPlan(
        (Cut(0, Simignore(keep=9, text="question", step=3)), Cut(3, FastV(keep=4))), "original"
    )

    def inputs(some: Any, side: str = "left") -> dict[str, Any]:
        words = [{"question": ids[-1:] if sum(ids) % 2 else ids[-3:]} for ids, _ in some]
        return {**batch(some, side), "texts": pad_texts(words)}

    def run(some: Any, side: str = "left", **more: Any) -> Any:
        with torch.no_grad():
            return model(**inputs(some, side), reduction=plan, return_trace=True, **more)

    together = run(samples)
    short = 0
    for index, sample in enumerate(samples):
        words = sample[0][-1:] if sum(sample[0]) % 2 else sample[0][-3:]
        met = nearest(model, sample, words, 9, step=3)
        assert kept(together, index)[0] == flat(met)
        short += any(len(picture) < 9 for picture in met)
        alone = run([sample])
        for other in (together, run(samples, "right"), run(samples, use_cache=True)):
            same(other, index, alone, 0)
        tokens = model.generate(**inputs(samples), reduction=plan, max_new_tokens=4, num_beams=2)
        one = model.generate(**inputs([sample]), reduction=plan, max_new_tokens=4, num_beams=2)
        assert tokens[index].tolist() == one[0].tolist()
    assert 0 < short < len(samples)
    assert len({len(kept(together, i)[0]) for i in (0, 2, 3)}) > 1


def test_training_compares_with_the_first_turn_alone():
    """ "all" ends where the first answer begins, padded and packed; other words change nothing."""
    model, samples = tiny_model(), prompts()
    plan = ReductionPlan.parse("simignore:keep=5,text=all")
    inputs = batch(samples)
    labels = labels_of(inputs)

    def cut(ids: Tensor, kind: str) -> Any:
        sequence = model.build_sequence(**{**inputs, "input_ids": ids}, labels=labels, kind=kind)
        return model(sequence=sequence, reduction=plan, return_trace=True, use_cache=False)

    right, packed = cut(inputs["input_ids"], "right"), cut(inputs["input_ids"], "packed")
    for index, sample in enumerate(samples):
        first = int((labels[index] != -100).nonzero()[0])
        words = [i for i in sample[0][:first] if i >= 0]
        assert kept(right, index) == [flat(nearest(model, sample, words, 5))]
        assert kept(packed, index) == kept(right, index)
        torch.testing.assert_close(rows(right, index), rows(packed, index), atol=1e-5, rtol=1e-5)
    other = inputs["input_ids"].clone()
    for index in range(len(samples)):
        first = int((labels[index] != -100).nonzero()[0])
        behind = (torch.arange(other.shape[1]) >= first) & inputs["attention_mask"][index].bool()
        other[index, behind & (other[index] >= 0)] = 7
    changed = cut(other, "right")
    assert [kept(changed, i) for i in range(4)] == [kept(right, i) for i in range(4)]


def test_a_text_that_is_missing_is_named():
    model, samples = tiny_model(), prompts()
    inputs = batch(samples)
    plan = "simignore:keep=5,text=options"
    without = next(i for i, ids in enumerate(inputs["texts"]["options"]) if samples[i][1] and
                   int(ids.max()) < 0)  # fmt: skip
    with pytest.raises(ValueError, match=f"sample {without} of the batch has no text 'options'"):
        model(**inputs, reduction=plan)
    with pytest.raises(ValueError, match="'option_words', which did not come with the batch"):
        model(**inputs, reduction="simignore:keep=5,text=option_words")
    with pytest.raises(ValueError, match="text 'question' has 3 rows for 4 samples"):
        model(**{**inputs, "texts": {"question": torch.zeros(3, 2, dtype=torch.long)}})
    # Samples without a picture need no words, whatever the plan.
    model(**batch(samples[1:2]), reduction=plan)
    inputs.pop("texts")
    model(**inputs, reduction="simignore:keep=5,text=all")
