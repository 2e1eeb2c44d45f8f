"""AdaptPrune against a plain loop over the paper's formulas; its guarantees; tiles of a picture."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import TILE, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava.constants import IMAGE_TOKEN_INDEX
from llava.reduction import AdaptPrune, View
from llava.reduction.adaptprune import centre_weight, greedy, grid_places


def view_of(
    method: AdaptPrune, grids: list[tuple[int, int]], shift: int = 0, seed: int = 0, **changes: Any
) -> View:
    """One group a grid (rows, columns), keys in a few directions so that many are alike."""
    generator = torch.Generator().manual_seed(seed)
    counts = [rows * columns for rows, columns in grids]
    groups, width = len(grids), max(counts)
    valid = torch.arange(width) < torch.tensor(counts)[:, None]
    cell = torch.full((groups, width, 2), -1)
    for group, (rows, columns) in enumerate(grids):
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
        cell[group, : counts[group]] = place + torch.tensor([shift, 0])
    attention = torch.rand(groups, width, generator=generator) ** 3
    centres = torch.randn(3, 8, generator=generator)
    which = torch.randint(3, (groups, width), generator=generator)
    keys = centres[which] + 0.2 * torch.randn(groups, width, 8, generator=generator)
    budgets = [method.budget(count, count) for count in counts]
    facts = {
        "valid": valid,
        "protected": torch.zeros_like(valid),
        "cell": cell,
        "grid": torch.zeros_like(valid, dtype=torch.long),
        "origin": torch.arange(width).expand(groups, width),
        "seed": torch.zeros(groups, dtype=torch.long),
        "count": torch.tensor(counts),
        "budget": torch.tensor(budgets),
        "max_budget": max(budgets),
        "signals": dict(zip(method.signals, (attention, keys), strict=True)),
    }
    return View(**{**facts, **changes})


def by_hand(method: AdaptPrune, view: View, group: int, grid: tuple[int, int]) -> list[int]:
    """The picks of one group, in order, with plain numbers."""
    rows, columns = grid
    attention, keys = (view.signals[signal][group].double() for signal in method.signals)

    def axis(size: int) -> list[float]:
        step = size / (size - 1) if size > 1 else 0.0
        return [-size / 2 + place * step if size > 1 else 0.0 for place in range(size)]

    widths = [size / 2 if method.sigma_c is None else method.sigma_c for size in grid]
    mask = [
        math.exp(-((y / widths[0]) ** 2 + (x / widths[1]) ** 2) / 2)
        for y in axis(rows)
        for x in axis(columns)
    ]
    score = [float(attention[i]) * mask[i] / max(mask) for i in range(rows * columns)]
    unit = [key / key.norm() for key in keys]
    picks: list[int] = []
    for _ in range(int(view.budget[group])):
        left = [i for i in range(rows * columns) if i not in picks]
        best = max(left, key=lambda i: (score[i], -i))
        picks.append(best)
        for i in left:
            distance = math.dist(divmod(i, columns), divmod(best, columns))
            if distance <= method.distance:
                near = math.exp(-(distance**2) / (2 * method.sigma_d**2))
                unlike = 1 - float(unit[i] @ unit[best])
                score[i] *= 1 - near * math.exp(-(unlike**2) / (2 * method.sigma_s**2))
    return picks


def picks_of(method: AdaptPrune, view: View) -> Tensor:
    attention, keys = (view.signals[signal] for signal in method.signals)
    place, extent = grid_places(view.cell, view.valid)
    score = attention * centre_weight(place, extent, method.sigma_c)
    return greedy(score, method.suppression(place, keys), view)


GRIDS = [(6, 6), (5, 5), (4, 9), (1, 7), (7, 1), (1, 1), (3, 2)]


@pytest.mark.parametrize(
    "method",
    [
        AdaptPrune(0.5),
        AdaptPrune(0.25, sigma_c=2.5, sigma_s=0.3, distance=2),
        AdaptPrune(1.0, sigma_d=3.0, distance=1.5),
        AdaptPrune(0.3, sigma_d=30.0, sigma_s=5.0, distance=100),
    ],
)
def test_picks_are_those_of_a_plain_loop(method):
    """Square, odd and narrow grids in one batch, wherever in the picture they lie."""
    view = view_of(method, GRIDS)
    order, kept = picks_of(method, view), method.select(view).keep
    for group, grid in enumerate(GRIDS):
        expected = by_hand(method, view, group, grid)
        assert order[group, : len(expected)].tolist() == expected
        assert kept[group].nonzero()[:, 0].tolist() == sorted(expected)
    lower = method.select(view_of(method, GRIDS, shift=24)).keep
    assert torch.equal(lower, kept)


def test_the_likeness_matters():
    alike = AdaptPrune(0.3, sigma_s=0.3)
    view = view_of(alike, [(6, 6)])
    blind = AdaptPrune(0.3, sigma_s=1e-6)
    assert not torch.equal(picks_of(alike, view), picks_of(blind, view))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-45])
def test_nothing_is_picked_twice_when_scores_underflow(scale):
    method = AdaptPrune(0.8)
    view = view_of(method, [(5, 5), (2, 3)])
    view.signals[method.signals[0]].mul_(scale)
    order = picks_of(method, view)
    for group, budget in enumerate(view.budget.tolist()):
        assert len(set(order[group, :budget].tolist())) == budget
    assert method.select(view).keep.sum(1).tolist() == view.budget.tolist()
    if scale == 0:  # all equal: the earlier token
        assert order[0, : int(view.budget[0])].tolist() == list(range(20))


def test_protected_tokens_stay_and_padding_never_does():
    method = AdaptPrune(2)
    view = view_of(method, [(4, 4), (1, 2)])
    view.protected[0, 15] = True
    view.signals[method.signals[0]][0, 15] = 0
    keep = method.select(view).keep
    assert keep[0, 15]
    assert keep.sum(1).tolist() == [2, 2]
    assert not bool((keep & ~view.valid).any())


def test_cues_are_float32_whatever_the_model_computes_in():
    method = AdaptPrune(0.5)
    view = view_of(method, [(6, 6)])
    rough = {signal: value.bfloat16() for signal, value in view.signals.items()}
    exact = {signal: value.float() for signal, value in rough.items()}
    view.signals = rough
    got = method.select(view)
    view.signals = exact
    assert torch.equal(got.keep, method.select(view).keep)
    assert got.score.dtype == torch.float32


class Count(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_pick_is_four_operations_for_the_whole_batch():
    counts = []
    for keep in (3, 8):
        method = AdaptPrune(keep)
        view = view_of(method, [(4, 4), (3, 3)])
        with Count() as count:
            method.select(view)
        counts.append(count.calls)
    more = counts[1] - counts[0]
    assert sum(more.values()) == 5 * 4, more


def test_every_tile_of_a_picture_is_a_grid_of_its_own():
    """Two tiles and the whole image, joined to a field with newlines, beside a plain picture."""
    model = tiny_model(
        "llama",
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[2 * TILE, TILE], [TILE, 2 * TILE]],
    )
    generator = torch.Generator().manual_seed(3)
    tiles = torch.randn(3, 3, TILE, TILE, generator=generator)
    one = torch.randn(1, 3, TILE, TILE, generator=generator)
    ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 9, 4], [1, 7, 8, IMAGE_TOKEN_INDEX, 6]])
    sizes = [(2 * TILE, TILE), (TILE, TILE)]
    call = {"reduction": "adaptprune:k=2,keep=0.3", "return_trace": True, "use_cache": False}
    with torch.no_grad():
        both = model(ids, images=[tiles, one], image_sizes=sizes, **call)
        alone = model(ids[:1], images=[tiles], image_sizes=sizes[:1], **call)
    cut = both.trace[0]
    assert [(group.image, group.tile, group.count) for group in cut.layout.groups] == [
        (0, 0, 16), (0, 1, 16), (0, 2, 20), (0, 0, 17)
    ]  # fmt: skip
    assert cut.keep.sum(1).tolist() == [4, 4, 6, 5]
    for group in range(3):
        assert torch.equal(
            cut.keep[group][cut.valid[group]], alone.trace[0].keep[group][: cut.valid[group].sum()]
        )
    later = "adaptprune:k=2,keep=0.5+pyramiddrop:layers=[4],ratios=[0.2],positions=original"
    with torch.no_grad():
        then = model(ids, images=[tiles, one], image_sizes=sizes, **{**call, "reduction": later})
    assert [group.count for group in then.trace[1].layout.groups] == [26, 8]
    assert then.trace[1].keep.sum(1).tolist() == [int(52 * 0.2), int(17 * 0.2)]
