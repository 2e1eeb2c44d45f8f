"""Questions that share their prefix against the same prompts run unshared, in float32.

Logits at prefill and in eight cached steps, what the cache holds in every layer, kept sets and
greedy tokens: for every decoder family, every kind of plan, both backends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import FAMILIES, LAYERS, PLANS, TILE, VOCAB, tiny_model
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.multimodal_prep import assign_pictures, tile_counts
from llava.model.shared_prefix import sharable_layers, without_texts
from llava.model.staged_cache import SplitLayer, StagedCache
from llava.prompting import pad_ids
from llava.reduction import YOPO, Cut, PyramidDrop, Random, ReductionPlan, Uniform

TOLERANCE = 1e-5
SUFFIXES = (1, 12, 3, 5, 2, 7)
WIDE = {"sliding_window": 200}  # a window that holds every prompt
SHARED: dict[str, tuple[ReductionPlan, int]] = {
    "none": (PLANS["none"], LAYERS),
    "pyramiddrop": (PLANS["pyramiddrop"], 1),
    "pyramiddrop, original positions": (PLANS["pyramiddrop, original positions"], 2),
    "pyramiddrop, whole sample": (PLANS["pyramiddrop, whole sample"], 2),
    "text-free cuts": (
        ReductionPlan((Cut(0, Random(0.7)), Cut(2, Uniform(0.5)), Cut(4, Random(0.2)))),
        LAYERS,
    ),
    "text-free cuts, original positions": (
        ReductionPlan((Cut(0, Random(0.7)), Cut(2, Random(0.3))), positions="original"),
        LAYERS,
    ),
    "text-free, then by the text": (
        ReductionPlan((Cut(2, Random(0.6)), Cut(4, PyramidDrop(0.3)))),
        4,
    ),
    "yopo": (PLANS["yopo"], LAYERS),
    "yopo, leaky": (PLANS["yopo, leaky"], LAYERS),
    "random, then yopo in all layers": (PLANS["random, then yopo in all layers"], LAYERS),
    "yopo, then by the text": (
        ReductionPlan((Cut(0, PyramidDrop(0.7)),), program=YOPO(heads=0.5, window=3)),
        0,
    ),
    "fastv": (ReductionPlan.parse("fastv:k=2,r=0.5"), 2),
    "text-free, then fastv": (
        ReductionPlan.parse("random:layers=[2],ratios=[0.6]+fastv:k=3,keep=4,positions=original"),
        3,
    ),
}


@dataclass
class Case:
    """The same prompts as prefixes and questions, and whole."""

    prefixes: list[list[int]]
    questions: list[list[list[int]]]
    pictures: Tensor

    def prefix(self, model: Any) -> Any:
        ids, mask = pad_ids(self.prefixes, 0, "left")
        return model.build_sequence(ids, mask, images=self.pictures, kind="left")

    def suffixes(self, model: Any) -> Any:
        ids, mask = pad_ids([q for own in self.questions for q in own], 0, "right")
        return model.build_suffixes(ids, mask)

    def whole(self, model: Any) -> Any:
        rows = [p + q for p, own in zip(self.prefixes, self.questions, strict=True) for q in own]
        ids, mask = pad_ids(rows, 0, "left")
        index, first = [], 0
        for prefix, own in zip(self.prefixes, self.questions, strict=True):
            marks = prefix.count(IMAGE_TOKEN_INDEX)
            index += list(range(first, first + marks)) * len(own)
            first += marks
        splicer = model.splicer
        pictures = splicer.pictures(tile_counts(self.pictures), None)
        ids_BL, mask_BL = ids.numpy(), mask.bool().numpy()
        plan = splicer(ids_BL, mask_BL, None, pictures, "left", image_index=index)
        return without_texts(model.build_sequence(ids, images=self.pictures, splice=plan))

    @property
    def counts(self) -> list[int]:
        return [len(own) for own in self.questions]


def case(kind: str) -> Case:
    """ "one picture" with six questions; "batch": three prompts of 1, 2 and 0 pictures."""
    generator = torch.Generator().manual_seed(4)

    def text(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    mark = [IMAGE_TOKEN_INDEX]
    if kind == "one picture":
        prefixes = [[1, *text(4), *mark, *text(2)]]
        questions = [[text(n) for n in SUFFIXES]]
    else:
        prefixes = [[1, *mark, *text(4)], [1, *text(6), *mark, *text(2), *mark], [1, *text(3)]]
        questions = [[text(4), text(1)], [text(2), text(6), text(3)], [text(5)]]
    marks = sum(prefix.count(IMAGE_TOKEN_INDEX) for prefix in prefixes)
    return Case(prefixes, questions, torch.randn(marks, 3, TILE, TILE, generator=generator))


def family_model(family: str, backend: str = "sdpa") -> Any:
    """Windows, where the family has them, are wide enough to be shared."""
    return tiny_model(family, backend, **(WIDE if "sliding_window" in FAMILIES[family][2] else {}))


def prefill(model: Any, sequence: Any, plan: ReductionPlan, prefix: Any = None) -> Any:
    cache = StagedCache(model.config)
    cache.prefix = prefix
    return model(sequence=sequence, reduction=plan, past_key_values=cache, use_cache=True,
                 return_trace=True)  # fmt: skip


def same(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=TOLERANCE, rtol=TOLERANCE)


def compare(model: Any, plan: ReductionPlan, prompts: Case, depth: int) -> None:
    with torch.no_grad():
        whole = prefill(model, prompts.whole(model), plan)
        prefix = model.encode_prefix(
            prompts.prefix(model), plan, questions=prompts.counts, room=max(SUFFIXES)
        )
        assert prefix.depth == depth
        shared = prefill(model, prompts.suffixes(model), plan, prefix)
    assert shared.stages == whole.stages
    for cut in shared.trace:
        (other,) = [c for c in whole.trace if c.at == cut.at]
        assert cut.at >= depth
        assert torch.equal(cut.keep, other.keep)
        assert torch.equal(cut.origin[cut.valid], other.origin[other.valid])
    assert torch.equal(shared.sequence.facts, whole.sequence.facts)
    valid = whole.sequence.origin >= 0
    same(shared.logits[valid], whole.logits[valid])
    same_cache(shared.past_key_values, whole.past_key_values)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(8):
            token = torch.randint(3, VOCAB, (valid.shape[0], 1), generator=generator)
            one, two = (model(token, past_key_values=o.past_key_values) for o in (shared, whole))
            same(one.logits, two.logits)
        tokens = [
            model.generate(sequence=sequence, max_new_tokens=9, do_sample=False, **more)
            for sequence, more in (
                (prompts.suffixes(model), {"prefix": prefix}),
                (prompts.whole(model), {"reduction": plan}),
            )
        ]
    assert tokens[0].tolist() == tokens[1].tolist()


def same_cache(one: StagedCache, two: StagedCache) -> None:
    """Keys, values and validity of every layer, whatever way the stages were opened."""

    def stage_of(cache: StagedCache, index: int) -> Any:
        return next(s for s in cache.stages if s.start <= index < s.stop)

    for index in range(LAYERS):
        a, b = stage_of(one, index), stage_of(two, index)
        assert a.length == b.length == one.get_seq_length(index) == two.get_seq_length(index)
        assert torch.equal(a.next_position, b.next_position)
        assert (a.valid is None) == (b.valid is None)
        rows = torch.ones(len(a.next_position), a.length, dtype=torch.bool)
        if a.valid is not None:
            assert torch.equal(a.valid, b.valid)
            rows = a.valid
        layers = [cache.layers[index] for cache in (one, two)]
        if isinstance(layers[0], SplitLayer):
            same_split(*layers, a.extra, b.extra)
            continue
        for name in ("keys", "values"):
            tensors = [getattr(layer, name) for layer in layers]
            rows = rows[:, -tensors[0].shape[2] :]  # a full window has dropped the first ones
            same(*(tensor.transpose(1, 2)[rows] for tensor in tensors))


def same_split(one: SplitLayer, two: SplitLayer, extra: Any, other: Any) -> None:
    """Text and visual parts of a layer, and which columns they are."""
    for kind, names in (("text", ("keys", "values")), ("visual", ("visual_keys", "visual_values"))):
        column = extra[f"{kind}_column"]
        assert torch.equal(column, other[f"{kind}_column"])
        for name in names:
            tensors = [getattr(layer, name).transpose(1, 2) for layer in (one, two)]
            same(*(tensor[column >= 0] for tensor in tensors))


@pytest.mark.parametrize("plan", SHARED)
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_unshared(family, plan):
    for kind in ("one picture", "batch"):
        compare(family_model(family), SHARED[plan][0], case(kind), SHARED[plan][1])


@pytest.mark.parametrize("plan", ["none", "pyramiddrop", "text-free cuts"])
def test_eager(plan):
    compare(family_model("llama", "eager"), SHARED[plan][0], case("batch"), SHARED[plan][1])


@pytest.mark.parametrize("plan", ["none", "pyramiddrop", "text-free cuts"])
@pytest.mark.parametrize(("family", "depth"), [("mistral", 0), ("qwen2", 2)])
def test_a_short_window_ends_the_shared_part(family, depth, plan):
    """Mistral's windows start at layer 0, Qwen2's at layer 2."""
    expected = min(depth, SHARED[plan][1])
    compare(tiny_model(family), SHARED[plan][0], case("one picture"), expected)


def test_the_room_for_a_question_decides_about_windows():
    model = tiny_model("mistral", sliding_window=64)
    prompts = case("one picture")
    sequence = prompts.prefix(model)
    decoder = model.get_model()
    width = sequence.layout.width
    assert sharable_layers(decoder, ReductionPlan(), 63) == LAYERS
    assert sharable_layers(decoder, ReductionPlan(), 64) == 0
    prefix = model.encode_prefix(sequence, room=63 - width)
    assert prefix.depth == LAYERS
    assert model.encode_prefix(sequence).depth == 0
    ids = torch.full((1, 64 - width), 5)
    with pytest.raises(ValueError, match=f"1 to {63 - width}"):
        model.generate(sequence=model.build_suffixes(ids), prefix=prefix)
    # The window fills and slides while the answer is written.
    with torch.no_grad():
        call = {"max_new_tokens": 40, "do_sample": False}
        shared = model.generate(sequence=prompts.suffixes(model), prefix=prefix, **call)
        whole = model.generate(sequence=prompts.whole(model), **call)
    assert shared.tolist() == whole.tolist()


@pytest.mark.parametrize("plan", ["none", "pyramiddrop", "text-free cuts"])
def test_beams_and_reuse(plan):
    """A prefix serves several calls; each beam starts from it."""
    model, prompts = tiny_model("qwen3"), case("batch")
    plan = SHARED[plan][0]
    prefix = model.encode_prefix(prompts.prefix(model), plan, questions=prompts.counts)
    call = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    whole = model.generate(sequence=prompts.whole(model), reduction=plan, **call)
    for _ in range(2):
        shared = model.generate(sequence=prompts.suffixes(model), prefix=prefix, **call)
        assert shared.tolist() == whole.tolist()


@pytest.mark.parametrize("plan", SHARED)
def test_no_host_reads(plan):
    """Prefix, questions and decoding on the meta device, where any host read raises."""
    model, prompts, plan = tiny_model(), case("batch"), SHARED[plan][0]
    sequence, suffixes = prompts.prefix(model), prompts.suffixes(model)
    model, sequence, suffixes = model.to("meta"), sequence.to("meta"), suffixes.to("meta")
    with torch.no_grad():
        prefix = model.encode_prefix(sequence, plan, questions=prompts.counts)
        output = prefill(model, suffixes, plan, prefix)
        token = torch.zeros(6, 1, dtype=torch.long, device="meta")
        assert model(token, past_key_values=output.past_key_values).logits.shape[0] == 6


def test_one_seed_a_picture():
    """Questions about a picture have one seed, other pictures another, in any batch and order."""
    model, prompts = tiny_model(), case("batch")
    seed = prompts.whole(model).inputs["seed"].tolist()
    assert seed[0] == seed[1] != seed[2] == seed[3] == seed[4] != seed[5]
    other = Case(prompts.prefixes, prompts.questions, prompts.pictures.flip(0))
    changed = other.whole(model).inputs["seed"].tolist()
    assert [a == b for a, b in zip(seed, changed, strict=True)] == [False] * 5 + [True]
    alone = model.build_sequence(torch.tensor([prompts.prefixes[0]]), images=prompts.pictures[:1])
    assert alone.inputs["seed"].tolist() == seed[:1]
    half = model.build_sequence(
        torch.tensor([prompts.prefixes[0]]), images=prompts.pictures[:1].bfloat16().float()
    )
    assert half.inputs["seed"].tolist() != seed[:1]


def test_what_does_not_fit_is_refused():
    model, prompts = tiny_model(), case("batch")
    sequence, suffixes = prompts.prefix(model), prompts.suffixes(model)
    with pytest.raises(ValueError, match="number of questions"):
        model.encode_prefix(sequence)
    with pytest.raises(ValueError, match="at least one"):
        model.encode_prefix(sequence, questions=[2, 0, 1])
    with pytest.raises(ValueError, match="room"):
        model.encode_prefix(sequence, questions=[2, 3, 1], room=0)
    prefix = model.encode_prefix(sequence, "none", questions=[2, 3, 2])
    with pytest.raises(ValueError, match="6 questions"):
        model.generate(sequence=suffixes, prefix=prefix)
    prefix = model.encode_prefix(sequence, "none", questions=[2, 3, 1])
    with pytest.raises(ValueError, match="was made with the plan none"):
        model.generate(sequence=suffixes, prefix=prefix, reduction=PLANS["pyramiddrop"])
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(sequence=suffixes.relayout("left"), prefix=prefix)
    with pytest.raises(ValueError, match="text without labels"):
        model.generate(sequence=prompts.whole(model), prefix=prefix)
    with pytest.raises(ValueError, match=r"image_index \[9\]"):
        assign_pictures([1], 3, [9])
