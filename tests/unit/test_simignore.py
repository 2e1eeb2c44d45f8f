"""Simignore against a plain walk down the list of pairs, its text form, and its presets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reducers import view_of

from llava.reduction import Cut, FastV, PyramidDrop, ReductionPlan, SideText, Simignore
from llava.reduction.simignore import EMBEDS
from llava.sequence import Layout


def walk(pairs: list[list[float]], keep: int, step: int, offset: int) -> list[int]:
    """The original's list: pairs sorted from the most similar on, every `step`-th visited."""
    flat = [(-value, i, t) for i, row in enumerate(pairs) for t, value in enumerate(row)]
    found: list[int] = []
    for _, i, _ in sorted(flat)[offset::step]:
        if len(found) == keep:
            break
        if i not in found:
            found.append(i)
    return sorted(found)


def shown(method: Simignore, pairs_by_group: list[torch.Tensor], keeps: list[int]):
    """A view whose cosine similarities are exactly `pairs`, in a batch padded both ways.

    Image token i is the vector of its similarities, filled up to length 1 by a coordinate that no
    text has; text token t is the t-th unit vector.
    """
    counts = [len(pairs) for pairs in pairs_by_group]
    texts = [pairs.shape[1] for pairs in pairs_by_group]
    size = max(texts) + 1
    view = view_of(counts, keeps)
    image = torch.full((len(counts), max(counts), size), 9.0)
    for group, pairs in enumerate(pairs_by_group):
        rest = (1 - pairs.square().sum(1, keepdim=True)).sqrt()
        padded = torch.nn.functional.pad(pairs, (0, max(texts) - pairs.shape[1]))
        image[group, : counts[group]] = 3 * torch.cat([padded, rest], 1)
    text = torch.eye(size)[: max(texts)].repeat(len(counts), 1, 1) * 2
    valid = torch.arange(max(texts)) < torch.tensor(texts)[:, None]
    view.signals = {EMBEDS: image}
    view.texts = {method.text_signal: SideText(text, valid)}
    return view


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_walk(data):
    step, offset = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    pairs, keeps = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        count, text = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 5))
        places = torch.randperm(count * text, generator=generator)
        # Distinct values whose rows stay shorter than 1.
        pairs.append((places.view(count, text) + 1) / (count * text) / text**0.5 * 0.99)
        keeps.append(data.draw(st.integers(1, count - 1)))
    method = Simignore(keep=1, step=step, offset=offset)
    keep = method.select(shown(method, pairs, keeps)).keep
    for group, (table, wanted) in enumerate(zip(pairs, keeps, strict=True)):
        expected = walk(table.tolist(), wanted, step, offset)
        got = keep[group].nonzero()[:, 0].tolist()
        if step == 1 and len(expected) < wanted:
            # The list ended early; only a text shorter than the offset can do that.
            assert table.shape[1] <= offset
            assert set(expected) < set(got)
            assert len(got) == wanted
        else:
            assert got == expected


def test_equal_similarities_go_to_the_earlier_token():
    method = Simignore(keep=2)
    pairs = torch.tensor([[0.25, 0.25], [0.5, 0.25], [0.5, 0.25], [0.5, 0.25]])
    keep = method.select(shown(method, [pairs], [2])).keep[0]
    assert keep.tolist() == [False, True, True, False]


def test_counts():
    assert Simignore(keep=452).budget(576, 576) == 452
    assert Simignore(keep=452).budget(300, 576) == 300
    assert [Simignore(ratio=0.25).budget(n, n) for n in (2, 6, 10)] == [0, 2, 2]
    with pytest.raises(ValueError, match="keep=452 is above the 144 visual tokens"):
        Simignore(keep=452).budget(144, 144)
    assert Simignore(keep=3).host_counts
    assert not Simignore(keep=3, step=2).host_counts


def test_a_group_that_is_not_cut_keeps_everything():
    method = Simignore(keep=4, step=5)
    pairs = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    assert method.select(shown(method, [pairs], [4])).keep.all()
    assert int(method.select(shown(method, [pairs], [3])).keep.sum()) == 1


@pytest.mark.parametrize(
    ("text", "cut", "written"),
    [
        ("simignore:keep=300", Simignore(keep=300), "simignore:keep=300"),
        (
            "simignore:preset=7b",
            Simignore(keep=452, text="option_words", offset=1),
            "simignore:keep=452,text=option_words,offset=1",
        ),
        (
            "simignore:preset=13b",
            Simignore(keep=451, text="options", step=2),
            "simignore:keep=451,text=options,step=2",
        ),
        (
            "simignore:preset=7B,ratio=0.5",
            Simignore(ratio=0.5, text="option_words", offset=1),
            "simignore:ratio=0.5,text=option_words,offset=1",
        ),
        (
            "simignore:ratio=0.5,text=options|question",
            Simignore(ratio=0.5, text="options|question"),
            "simignore:ratio=0.5,text='options|question'",
        ),
    ],
)
def test_text_forms(text, cut, written):
    plan = ReductionPlan.parse(text)
    assert plan == ReductionPlan((Cut(0, cut),), positions="original")
    assert str(plan) == written
    assert ReductionPlan.parse(written) == plan


def test_the_published_pipeline():
    """The original's scripts: similarity before the model, FastV behind it, fixed counts."""
    plan = ReductionPlan.parse("simignore:preset=7b+fastv:k=5,keep=144")
    assert [(cut.at, type(cut.reducer)) for cut in plan.cuts] == [(0, Simignore), (5, FastV)]
    stages = plan.schedule(Layout.simple(35, 576, 40), 32)
    assert [(s.start, s.stop, s.visual[0]) for s in stages[1:]] == [(0, 5, 452), (5, 32, 144)]
    assert plan.positions == "original"
    assert plan.shared_depth(32) == 0


def test_mixed_with_other_methods():
    text = "simignore:keep=300,text=question+pyramiddrop:layers=[8,16],ratios=[0.3,0.2]"
    with pytest.raises(ValueError, match="add positions="):
        ReductionPlan.parse(text)
    plan = ReductionPlan.parse(text + ",positions=renumber")
    assert [(cut.at, type(cut.reducer)) for cut in plan.cuts] == [
        (0, Simignore),
        (8, PyramidDrop),
        (16, PyramidDrop),
    ]
    assert ReductionPlan.parse(str(plan)) == ReductionPlan.parse(plan.to_dict()) == plan
    # The sample competes as a whole; a picture cannot afterwards.
    with pytest.raises(ValueError, match="coarser"):
        ReductionPlan.parse(text.replace("question", "all,per=sample") + ",positions=renumber")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("simignore:text=all", "keep .* or ratio"),
        ("simignore:keep=3,ratio=0.5", "one of them"),
        ("simignore:keep=-1", "keep -1"),
        ("simignore:keep=0.5", "keep 0.5"),
        ("simignore:ratio=2", "kept share 2"),
        ("simignore:keep=3,text=answer", "'answer'"),
        ("simignore:keep=3,text=options|", "'options|'"),
        ("simignore:keep=3,step=0", "step 0"),
        ("simignore:keep=3,offset=-1", "offset -1"),
        ("simignore:keep=3,offset=0.5", "offset 0.5"),
        ("simignore:preset=70b", "'70b'"),
        ("simignore:keep=3,k=-1", "-1"),
    ],
)
def test_bad_settings_are_named(text, named):
    with pytest.raises(ValueError, match=named.replace("|", r"\|")):
        ReductionPlan.parse(text)
