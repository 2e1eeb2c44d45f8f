"""Any two methods in one plan: what runs equals what the schedule says, alone and in a batch; and
what has no meaning is refused."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from test_invariants import kept, same
from tiny import LAYERS, batch, prompts, tiny_model

from llava.reduction import REDUCERS, ReductionPlan
from llava.sequence import PER

# Each method as a first and as a second part. AdaptPrune always ranks tiles, FastV whole samples
# unless it is told otherwise.
FIRST = {
    "pyramiddrop": "pyramiddrop:layers=[1],ratios=[0.7]",
    "random": "random:layers=[0],ratios=[0.7]",
    "uniform": "uniform:layers=[1],ratios=[0.7]",
    "fastv": "fastv:k=1,r=0.3,per=image",
    "simignore": "simignore:ratio=0.7,text=options|question",
    "adaptprune": "adaptprune:k=1,keep=0.7",
}
SECOND = {
    "pyramiddrop": "pyramiddrop:layers=[3,4],ratios=[0.4,0.2],rope=False",
    "random": "random:layers=[3],ratios=[0.4]",
    "uniform": "uniform:layers=[3,4],ratios=[0.4,0.2]",
    "fastv": "fastv:k=3,r=0.6",
    "simignore": "simignore:k=3,keep=6,text=all",
    "adaptprune": "adaptprune:k=3,keep=0.4,sigma_s=0.4",
    "yopo": "yopo:layers=3,heads=0.5",
}
PAIRS = [*permutations(FIRST, 2), ("simignore", "yopo"), ("random", "yopo")]


def text_of(first: str, second: str) -> str:
    """Tiles before pictures before samples; positions are said once."""
    text = FIRST[first]
    if second == "adaptprune" and first != "adaptprune":
        text = text.removesuffix(",per=image") + ",per=tile"
    return f"{text}+{SECOND[second]},positions=original"


def test_the_pairs_are_all_there():
    assert {*FIRST, "yopo", "drop_visual"} == set(REDUCERS)
    assert len(PAIRS) == 32


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_methods(first, second):
    plan = ReductionPlan.parse(text_of(first, second))
    assert ReductionPlan.parse(str(plan)) == ReductionPlan.parse(plan.to_dict()) == plan
    assert [cut.reducer.name for cut in plan.cuts][0] == first
    model, samples = tiny_model(), prompts()
    with torch.no_grad():
        together = model(**batch(samples, "left"), reduction=plan, return_trace=True)
        alone = [
            model(**batch([sample]), reduction=plan, return_trace=True, use_cache=False)
            for sample in samples
        ]
    layout = together.stages[0].layout
    assert [s.visual for s in plan.schedule(layout, LAYERS)] == [s.visual for s in together.stages]
    for index, sample in enumerate(samples):
        same(together, index, alone[index], 0)
        cuts = kept(together, index)
        left = [s.visual[index] for s in together.stages[1:]]
        assert [len(cut) for cut in cuts] == left
        assert all(set(b) <= set(a) for a, b in zip(cuts, cuts[1:], strict=False))
        assert sample[1] == 0 or left[-1] < left[0] < 16 * sample[1]
    reads = [cut.at for cut in plan.cuts if cut.reducer.reads_text]
    assert plan.shared_depth(LAYERS) <= min(reads, default=LAYERS)


def test_what_each_cut_keeps_is_of_the_original_count():
    """Rounding belongs to the method, the count to the uncut picture; a later cut that would keep
    more than there is keeps all."""
    model, inputs = tiny_model(), batch(prompts())

    def counts(text: str) -> list[tuple[int, ...]]:
        with torch.no_grad():
            stages = model(**inputs, reduction=text, return_trace=True).stages
        return [stage.visual for stage in stages[1:]]

    text = "simignore:ratio=0.34,text=all+pyramiddrop:layers=[2,4],ratios=[0.34,0.3]"
    # round(16 * .34) = 5 = int(16 * .34) a picture, then int(16 * .3) = 4.
    assert counts(text + ",positions=renumber") == [(5, 0, 10, 5), (5, 0, 10, 5), (4, 0, 8, 4)]
    # Halves to even over the two pictures of a sample, but truncated a picture.
    assert counts("simignore:ratio=0.53125,text=all") == [(8, 0, 16, 8)]
    assert counts("fastv:k=2,r=0.46875") == [(8, 0, 17, 8)]
    assert counts("pyramiddrop:layers=[2],ratios=[0.53125]") == [(8, 0, 16, 8)]
    both = "simignore:keep=4,text=all+fastv:k=2,keep=10"
    assert counts(both) == [(4, 0, 8, 4), (4, 0, 8, 4)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        # A later cut cannot rank finer groups, and two cannot stand at one place.
        ("fastv:k=1,r=0.5+adaptprune:k=3,keep=0.2", r"'tile' after one per 'sample'"),
        ("simignore:ratio=0.5,text=all+adaptprune:k=3,keep=0.2", r"'tile' after one per 'image'"),
        ("fastv:k=2,r=0.5+simignore:k=3,keep=2,positions=original", r"'image' after .* 'sample'"),
        ("pyramiddrop:layers=[4],ratios=[0.5]+fastv:k=2,r=0.7,positions=original", "coarser"),
        ("fastv:k=2,r=0.5+fastv:k=2,r=0.7", r"must rise; got \[2, 2\]"),
        # Each says what to do with positions.
        ("uniform:layers=[0],ratios=[0.5]+fastv:k=2,r=0.7", "add positions="),
        ("yopo:layers=4+pyramiddrop:layers=[2],ratios=[0.5],positions=original", "program"),
        ("yopo:layers=4+yopo:layers=3", "2 layer programs"),
        ("simignore:ratio=0.5+nosuch:k=2", "'nosuch' is unknown"),
    ],
)
def test_what_has_no_meaning(text, named):
    with pytest.raises(ValueError, match=named):
        ReductionPlan.parse(text)


def test_parts_may_stand_in_any_order():
    first, second = "simignore:keep=9,text=all", "fastv:k=2,r=0.5"
    plan = ReductionPlan.parse(f"{second}+{first}")
    assert plan == ReductionPlan.parse(f"{first}+{second}")
    assert [cut.at for cut in plan.cuts] == [0, 2]


def test_groups_may_join_and_never_part():
    """Every order of `per` that gets coarser is accepted, every other is refused."""

    def plan(*pers: str) -> Any:
        cuts = [
            {"at": at, "method": "random", "ratio": 0.9 - at / 10, "per": per}
            for at, per in enumerate(pers)
        ]
        return ReductionPlan.parse({"positions": "renumber", "cuts": cuts})

    for first in PER:
        for second in PER:
            if list(PER).index(first) <= list(PER).index(second):
                plan(first, second)
            else:
                with pytest.raises(ValueError, match="coarser"):
                    plan(first, second)
    plan("tile", "image", "sample", "sample")
