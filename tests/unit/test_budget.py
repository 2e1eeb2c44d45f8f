"""The budget solver: within the budget, as near to it as the plan's own rounding allows."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

from llava.reduction import ReductionPlan, budget
from llava.reduction.budget import Budget, figures, solve
from llava.reduction.flops import get_preset, with_tokens

SEVEN_B = get_preset("llava-1.5-7b")
SMALL = with_tokens(get_preset("tiny"), 37, 9)


def test_average_is_the_mean_over_layers() -> None:
    plan = ReductionPlan.pyramid([2, 8, 16], [0.19, 0.0361, 0.006859])
    found = figures(SEVEN_B, plan)
    assert found.average_tokens == (2 * 576 + 6 * 109 + 8 * 20 + 16 * 3) / 32 == 62.9375
    assert found.final_tokens == 3
    assert figures(SEVEN_B, ReductionPlan()).average_tokens == 576


@pytest.mark.parametrize(
    ("average", "layers"), [(192, (8, 16, 24)), (128, (2, 8, 16)), (64, (2, 8, 16))]
)
def test_the_averages_users_ask_for(average: int, layers: tuple[int, ...]) -> None:
    best, others = solve(SEVEN_B, "pyramiddrop", Budget("average_tokens", average))
    assert best.layers == layers
    assert average - 0.5 < best.figures.average_tokens <= average
    assert {other.layers for other in others} < {(8, 16, 24), (2, 8, 16), (1, 4, 8)}
    assert all(other.figures.average_tokens <= average for other in others)


@pytest.mark.parametrize("method", budget.METHODS)
@pytest.mark.parametrize("kind", sorted(Budget.KINDS))
def test_nothing_larger_would_fit(method: str, kind: str) -> None:
    """One more step of λ that changes any count leaves the budget."""
    whole = getattr(figures(SMALL, ReductionPlan()), kind)
    family = budget.family_of(method)
    for share_of_whole in (0.999, 0.8, 0.55):
        asked = Budget(kind, share_of_whole * whole)
        best, _ = solve(SMALL, method, asked)
        assert asked.of(best.figures) <= asked.value
        step, more = 0, best.figures
        while more == best.figures and best.share + step * 1e-3 < 1:
            step += 1
            ratios = budget.geometric(min(1.0, best.share + step * 1e-3), len(best.layers))
            more = figures(SMALL, family.build(best.layers, ratios))
        assert more == best.figures or asked.of(more) > asked.value, (method, kind, best)


def test_every_last_count_can_be_had() -> None:
    for wanted in range(38):
        best, _ = solve(SMALL, "uniform", Budget("final_tokens", wanted), [2, 4])
        assert best.figures.final_tokens == wanted
        assert figures(SMALL, best.plan) == best.figures


def test_yopo_is_set_by_heads_and_neurons() -> None:
    """The paper's half / half / half, which it counts as a quarter."""
    half = figures(SEVEN_B, ReductionPlan.parse("yopo:layers=16,heads=0.5,ffn=2"))
    best, _ = solve(SEVEN_B, "yopo", Budget("visual_tmacs", half.visual_tmacs))
    assert best.layers == (16,)
    assert best.share == pytest.approx(0.5, abs=1e-3)
    assert ReductionPlan.parse(str(best.plan)) == best.plan
    with pytest.raises(ValueError, match="one last visual layer"):
        solve(SEVEN_B, "yopo", Budget("visual_tmacs", 1.0), [8, 16])


def test_papers_figure_gives_the_papers_plan() -> None:
    best, _ = solve(SEVEN_B, "pyramiddrop", Budget("visual_tmacs", 1.7775), [8, 16, 24])
    assert best.share == pytest.approx(0.5, abs=2e-3)
    assert best.figures.kept_tokens[:2] == [576, 288]


def test_ratios_are_as_short_as_they_can_be() -> None:
    best, _ = solve(SEVEN_B, "pyramiddrop", Budget("final_tokens", 72), [24])
    assert best.ratios == (0.126,)  # 0.13 would keep 74, 0.12 keeps 69, and 0.125 keeps 72 too
    assert best.figures.final_tokens == 72
    best, _ = solve(SMALL, "random", Budget("average_tokens", 37), [2, 4])
    assert best.ratios == (1.0, 1.0)


@pytest.mark.parametrize("bound", [-0.5, 0.0, 0.25, 0.7, 1.0, 5.0])
def test_bisection_finds_the_last_share_below_a_step(bound: float) -> None:
    found = budget.largest_within(lambda share: math.floor(8 * share) / 8, bound)
    expected = None if bound < 0 else min(1.0, (math.floor(8 * bound) + 1) / 8)
    assert found is expected if expected is None else found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("asked", "layers", "needles"),
    [
        (Budget("average_tokens", 64), [8, 16, 24], ["144 to 576", "[2, 8, 16] reach it"]),
        (Budget("average_tokens", 10), None, ["18 to 576"]),
        (Budget("average_tokens", 600), None, ["18 to 576"]),
        (Budget("full_tflops", 0.1), None, ["to 8.344"]),
    ],
)
def test_what_cannot_be_met_says_what_can(
    asked: Budget, layers: list[int] | None, needles: list[str]
) -> None:
    with pytest.raises(ValueError, match="cannot be met") as error:
        solve(SEVEN_B, "pyramiddrop", asked, layers)
    assert all(needle in str(error.value) for needle in needles)


def test_printed_flags_are_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    budget.main(["--average-tokens", "128", "--json", str(out)])
    written, text = json.loads(out.read_text()), capsys.readouterr().out
    flags, reduction = (shlex.split(line) for line in written["flags"])
    from_lists = ReductionPlan.pyramid(flags[1], flags[3])
    assert ReductionPlan.parse(reduction[1]) == from_lists == ReductionPlan.parse(written["plan"])
    assert figures(SEVEN_B, from_lists).average_tokens == written["achieved"]["average_tokens"]
    assert written["asked"] == {"average_tokens": 128.0}
    assert written["none"]["full_tflops"] == pytest.approx(8.344, abs=1e-3)
    assert all(line in text for line in written["flags"])
    for figure in ("127.9", "0.8373 T", "2.448 T"):
        assert figure in text


def test_a_checkpoint_gives_its_own_shape(tmp_path: Path) -> None:
    config = {
        "num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 50,
        "intermediate_size": 64, "mm_projector_type": "linear",
        "mm_vision_config": {
            "image_size": 56, "patch_size": 14, "num_hidden_layers": 2, "hidden_size": 16,
            "intermediate_size": 32,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    preset = budget.preset_from_config(tmp_path)
    assert (preset.visual, preset.shape.layers, preset.shape.kv_heads) == (16, 4, 4)
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hidden_size"):
        budget.preset_from_config(tmp_path)


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["--average-tokens", "64", "--method", "nosuch"], "accepted: pyramiddrop"),
        (["--average-tokens", "nan"], "budget of nan"),
        (["--average-tokens", "64", "--tflops", "3"], "not allowed with"),
        ([], "required"),
        (["--tflops", "3", "--layers-of-cuts", "[8;16]"], "no list like"),
        (["--tflops", "3", "--layers-of-cuts", "[16,8]"], "give rising layer"),
        (["--tflops", "3", "--layers-of-cuts", "[8,32]"], "layer 32"),
        (["--tflops", "3", "--layers", "0"], "--layers 0"),
        (["--tflops", "3", "--model-path", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_end_in_one_line(
    words: list[str], needle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        budget.main(words)
    assert stop.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert needle in written.err
    assert written.err.splitlines()[-1].startswith(("error: ", "llava plan: error: "))
