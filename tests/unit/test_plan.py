"""Plans: what is accepted, what is refused and how, round trips, schedules."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from llava.reduction import (
    YOPO,
    AdaptPrune,
    Cut,
    FastV,
    PyramidDrop,
    Random,
    ReductionPlan,
    Signal,
    Uniform,
    plan_from_flags,
    resolve_plan,
)
from llava.reduction.forms import pairs, spell, split_parts
from llava.sequence import Group, Layout

PAPER = ReductionPlan.pyramid([8, 16, 24], [0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    "plan",
    [
        ReductionPlan(),
        PAPER,
        ReductionPlan.pyramid([1], [0.0], positions="original", rope=False),
        ReductionPlan.parse("random:layers=[0,4];ratios=[0.9,0.1];seed=3"),
        ReductionPlan((Cut(0, Uniform(0.5)), Cut(3, PyramidDrop(0.25, per="sample")))),
        # Two runs of one method with other options, and shares that no text form accepts.
        ReductionPlan((Cut(1, Random(0.5)), Cut(3, Random(0.25, seed=2)))),
        ReductionPlan((Cut(1, Random(0.25)), Cut(3, Random(0.5)))),
        ReductionPlan((Cut(2, FastV(r=0.5)),), positions="original"),
        ReductionPlan((Cut(2, FastV(keep=144, per="image")),), positions="renumber"),
        ReductionPlan((Cut(2, AdaptPrune(0.1, sigma_c=12.0)),), positions="original"),
        ReductionPlan((Cut(2, FastV(r=0.5)),), positions="original", rerank=True),
        ReductionPlan((Cut(3, AdaptPrune(57, key_source="normed", distance=2)),), "original"),
    ],
)
def test_round_trips(plan, tmp_path):
    assert ReductionPlan.parse(str(plan)) == plan
    assert ReductionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_dict()))
    assert ReductionPlan.parse(str(file)) == plan
    assert ReductionPlan.parse(plan) is plan


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("fastv:k=2,r=0.5", ReductionPlan((Cut(2, FastV(r=0.5)),), positions="original")),
        ("fastv: k=3 ; keep=144", ReductionPlan((Cut(3, FastV(keep=144)),), positions="original")),
        (
            "random:layers=[1],ratios=[0.5],per=sample + fastv:k=2,r=0.25;positions=original",
            ReductionPlan(
                (Cut(1, Random(0.5, per="sample")), Cut(2, FastV(r=0.25))), positions="original"
            ),
        ),
        (
            "uniform:layers=[0],ratios=[0.8]+pyramiddrop:layers=[8,16],ratios=[0.5,0.2]",
            ReductionPlan(
                (Cut(0, Uniform(0.8)), Cut(8, PyramidDrop(0.5)), Cut(16, PyramidDrop(0.2)))
            ),
        ),
    ],
)
def test_text_forms(text, plan):
    assert ReductionPlan.parse(text) == plan
    assert ReductionPlan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    "options",
    [
        {"text": "question+options", "k": 3},
        {"text": "a, b; c=[d", "share": 1e5},
        {"names": ["x", "y z"], "flag": True, "none": None},
        {"word": "None", "number": "1.5", "quoted": "it's"},
    ],
)
def test_values_are_read_back(options):
    text = spell("m", options) + "+fastv:k=2"
    (name, first), second = split_parts(text, ["m", "fastv"])
    assert (name, pairs(first)) == ("m", options)
    assert second == ("fastv", "k=2")


def test_the_flags_of_pyramiddrop_and_the_spelling_of_a_plan_agree():
    flags = plan_from_flags(None, "[8,16,24]", "[0.5,0.25,0.125]")
    text = plan_from_flags("pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]")
    assert flags == text == PAPER
    assert plan_from_flags(None) is None
    assert plan_from_flags("none") == ReductionPlan()


@pytest.mark.parametrize(
    ("layers", "ratios", "named"),
    [
        ("[16,8]", "[0.5,0.25]", "[16, 8]"),
        ("[8,8]", "[0.5,0.25]", "[8, 8]"),
        ("[0,8]", "[0.5,0.25]", "from 1"),
        ("[-1]", "[0.5]", "[-1]"),
        ("[8,16]", "[0.25,0.5]", "rises"),
        ("[8,16]", "[0.5]", "1"),
        ("[8]", "[0.5,0.25]", "2"),
        ("[8]", "[1.5]", "1.5"),
        ("[8]", "[-0.1]", "-0.1"),
        ("[8.0]", "[0.5]", "8.0"),
        ("[True]", "[0.5]", "True"),
        ("8", "[0.5]", "8"),
        ("{8:16}", "[0.5]", "no list of numbers"),
        ("'[8]'", "[0.5]", "no list of numbers"),
        ("[8]", "[nan]", "[0.5,0.25,0.125]"),
        ("[8]", "[1e400]", "inf"),
        ("[8", "[0.5]", "[8"),
        ("__import__('os').getcwd()", "[0.5]", "__import__"),
        ("[8]", "['a']", "'a'"),
        ("[8]", None, "None"),
    ],
)
def test_bad_lists_are_named(layers, ratios, named):
    with pytest.raises(ValueError, match=".") as caught:
        ReductionPlan.pyramid(layers, ratios)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("fastvv:k=2", "pyramiddrop, random, uniform"),
        ("pyramiddrop:layers=[8]", "ratios"),
        ("random:layers=[8],ratios=[0.5],sed=1", "sed"),
        ("random:layers=[8],ratios=[0.5],seed=-1", "-1"),
        ("random:layers=[8],layers=[9],ratios=[0.5]", "twice"),
        ("random:layers", "key=value"),
        ("uniform:layers=[8],ratios=[0.5],per=patch", "patch"),
        ("fastv:r=0.5", "needs k"),
        ("fastv:k=2", "r (share that goes) or keep"),
        ("fastv:k=2,r=0.5,keep=9", "one of them"),
        ("fastv:k=2,r=1.5", "r 1.5"),
        ("fastv:k=2,r=half", "'half'"),
        ("fastv:k=2,keep=0.5", "keep 0.5"),
        ("fastv:k=2,keep=-1", "keep -1"),
        ("fastv:k=2,r=0.5,ratio=0.5", "ratio"),
        ("fastv:k=0,r=0.5", "layer -1"),
        ("fastv:k=two,r=0.5", "'two'"),
        ("fastv:k=2,r=0.5+other:x=1", "'other'"),
        ("fastv:k=2,r=0.5,rerank=2", "rerank 2"),
        ("adaptprune:k=2", "keep"),
        ("adaptprune:k=0,keep=0.5", "layer -1"),
        ("adaptprune:k=2,keep=1.5", "kept share 1.5"),
        ("adaptprune:k=2,keep=-3", "keep -3"),
        ("adaptprune:k=2,keep=0.5,sigma_c=0", "sigma_c 0"),
        ("adaptprune:k=2,keep=0.5,sigma_d=-1.5", "sigma_d -1.5"),
        ("adaptprune:k=2,keep=0.5,sigma_s=None", "sigma_s None"),
        ("adaptprune:k=2,keep=0.5,sigma_s=1e999", "sigma_s inf"),
        ("adaptprune:k=2,keep=0.5,distance=-1", "distance -1"),
        ("adaptprune:k=2,keep=0.5,key_source=rotated", "raw, normed"),
        ("adaptprune:k=2,keep=0.5,per=image", "per"),
        ("random:layers=[1],ratios=[0.5]+adaptprune:k=2,keep=0.5,positions=original", "coarser"),
        ("random:layers=[1],ratios=[0.5]+fastv:k=2,r=0.5", "positions=original"),
        ("fastv:k=2,r=0.5,positions=original+fastv:k=3,r=0.7,positions=renumber", "give one"),
        ("uniform:layers=[8],ratios=[0.5],positions=kept", "kept"),
        ("absent.json", "does not exist"),
        ("{not json", "JSON"),
    ],
)
def test_bad_text_is_named(text, named):
    with pytest.raises(ValueError, match=".") as caught:
        ReductionPlan.parse(text)
    assert named in str(caught.value)


def test_bad_dicts_and_types_are_named(tmp_path):
    for value in (3, ["a"], {"cut": []}, {"cuts": "x"}, {"cuts": [{"at": 2}]}, {"cuts": [4]}):
        with pytest.raises(ValueError, match=r"accepted|needed"):
            ReductionPlan.parse(value)
    with pytest.raises(ValueError, match="ratio"):
        ReductionPlan.parse({"cuts": [{"at": 2, "method": "random"}]})
    file = tmp_path / "list.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match="object"):
        ReductionPlan.parse(str(file))


def test_flags_that_contradict_each_other():
    with pytest.raises(ValueError, match="exclude"):
        plan_from_flags("none", "[8]", "[0.5]")
    with pytest.raises(ValueError, match="belong together"):
        plan_from_flags(None, "[8]", None)


def test_a_cut_behind_the_last_layer_is_refused_when_the_depth_is_known():
    PAPER.validate(25)
    with pytest.raises(ValueError, match="layer 24 does not fit a model of 24 layers"):
        PAPER.validate(24)


def test_a_count_above_what_is_there_is_refused():
    plan, layout = ReductionPlan.parse("fastv:k=2,keep=9"), Layout.simple(3, 8, 2)
    with pytest.raises(ValueError, match="keep=9 is above the 8 visual tokens"):
        plan.schedule(layout, 4)
    # What an earlier cut took away is no mistake of the count.
    text = "random:layers=[1],ratios=[0.5],per=sample+fastv:k=2,keep=6,positions=original"
    assert [s.visual for s in ReductionPlan.parse(text).schedule(layout, 4)] == [(8,), (4,), (4,)]
    with pytest.raises(ValueError, match="keep=9 is above the 8 visual tokens of a tile"):
        ReductionPlan.parse("adaptprune:k=2,keep=9").schedule(layout, 4)
    for text in ("fastv:k=4,r=0.5", "adaptprune:k=4,keep=0.5"):
        with pytest.raises(ValueError, match="layer 4 does not fit a model of 4 layers"):
            ReductionPlan.parse(text).schedule(layout, 4)


def test_fastv_rounds_half_to_even_over_the_whole_sample():
    budget = FastV(r=0.875).budget
    assert [budget(n, n) for n in (4, 12, 20, 36)] == [0, 2, 2, 4]
    assert [FastV(r=r).budget(576, 576) for r in (0.667, 0.7, 0.9, 0.95)] == [192, 173, 58, 29]
    groups = (Group(0, 0, 9, 9), Group(0, 1, 7, 7), Group(2, 0, 5, 5))
    stages = ReductionPlan.parse("fastv:k=1,r=0.5").schedule(
        Layout((27, 6, 9), groups, (1,) * 3), 3
    )
    assert stages[1].visual == (8, 0, 2)


def test_later_cuts_may_only_get_coarser():
    ReductionPlan((Cut(2, Random(0.5)), Cut(4, Random(0.2, per="sample"))))
    with pytest.raises(ValueError, match="coarser"):
        ReductionPlan((Cut(2, Random(0.5, per="sample")), Cut(4, Random(0.2))))


def test_a_measurement_in_front_of_the_first_layer_is_refused():
    class Before(Uniform):
        signals = (Signal("attention", offset=-1),)

    Cut(1, Before(0.5))
    with pytest.raises(ValueError, match="layer -1"):
        Cut(0, Before(0.5))


def test_schedule_counts_every_stage():
    stages = PAPER.schedule(Layout.simple(40, 576, 20, batch=2), 32)
    assert [(s.start, s.stop) for s in stages] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert [s.visual for s in stages] == [(576,) * 2, (288,) * 2, (144,) * 2, (72,) * 2]
    assert [s.lengths[0] for s in stages] == [636, 348, 204, 132]


def test_schedule_counts_pictures_or_samples_and_truncates():
    groups = (Group(0, 0, 10, 10), Group(0, 1, 7, 7), Group(2, 0, 5, 5))
    layout = Layout((27, 6, 9), groups, (1, 1, 1))
    by_image = ReductionPlan.parse("uniform:layers=[1,2],ratios=[0.5,0.3]").schedule(layout, 4)
    assert [s.visual for s in by_image] == [(17, 0, 5), (8, 0, 2), (5, 0, 1)]
    text = "uniform:layers=[1,2],ratios=[0.5,0.3],per=sample"
    by_sample = ReductionPlan.parse(text).schedule(layout, 4)
    assert [s.visual for s in by_sample] == [(17, 0, 5), (8, 0, 2), (5, 0, 1)]
    assert by_sample[1].regroup == (0, 0, 1)
    assert [s.lengths for s in by_image] == [(27, 6, 9), (18, 6, 6), (15, 6, 5)]


def test_protected_tokens_and_samples_without_a_scoring_row_stay():
    groups = (Group(0, 0, 8, 8, protected=1), Group(1, 0, 8, 8))
    layout = Layout((12, 12), groups, (1, 0))
    reads_text = ReductionPlan.pyramid([1], [0.0]).schedule(layout, 2)
    assert reads_text[1].visual == (1, 8)
    without = ReductionPlan.parse("random:layers=[1],ratios=[0.0]").schedule(layout, 2)
    assert without[1].visual == (1, 0)


def test_shared_depth_is_the_first_cut_that_reads_the_question():
    assert ReductionPlan().shared_depth(32) == 32
    assert PAPER.shared_depth(32) == 8
    mixed = ReductionPlan((Cut(2, Random(0.5)), Cut(5, PyramidDrop(0.2))))
    assert mixed.shared_depth(32) == 5
    assert ReductionPlan.parse("fastv:k=2,r=0.5").shared_depth(32) == 2
    assert ReductionPlan.parse("fastv:k=2,r=0.5,rerank=True").shared_depth(32) == 0


def test_which_plan_wins():
    stored = SimpleNamespace(visual_token_reduction=PAPER.to_dict())
    assert resolve_plan(None, None) == (ReductionPlan(), "default")
    assert resolve_plan(None, stored) == (PAPER, "checkpoint")
    assert resolve_plan("none", stored) == (ReductionPlan(), "flag")


def test_cuts_may_not_lie_inside_a_layer_program():
    class Own(YOPO):
        """A program that stands in no table."""

    program = YOPO(layers=4)
    ReductionPlan((Cut(0, Random(0.5)), Cut(4, Random(0.2))), program=program)
    with pytest.raises(ValueError, match="accepted: 0 or 4 and later"):
        ReductionPlan((Cut(2, Random(0.5)),), program=program)
    with pytest.raises(ValueError, match="accepted: 0$"):
        ReductionPlan((Cut(5, Random(0.5)),), program=YOPO(layers=4, mode="leaky"))
    with pytest.raises(ValueError, match="JSON"):
        ReductionPlan(program=Own(layers=2)).to_dict()
    with pytest.raises(ValueError, match="no layer program"):
        ReductionPlan(program=Random(0.5))
    with pytest.raises(ValueError, match="cannot be a cut"):
        Cut(2, program)
