"""The flags that name a reduction plan, the same on every command line.

``--layer_list`` with ``--image_token_ratio_list`` are PyramidDrop's own flags and mean PyramidDrop;
``--reduction`` takes any plan. What they mean is decided in `llava.reduction.plan`.
``llava bench --preset cpu-512 --reduction "random:layers=[4,8],ratios=[0.5,0.25]"``
"""

from __future__ import annotations

import argparse
from typing import Any

from llava.reduction.plan import ReductionPlan, plan_from_flags, resolve_plan


def add_reduction_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--reduction``, ``--layer_list`` and ``--image_token_ratio_list`` to ``parser``."""
    group = parser.add_argument_group("visual token reduction")
    group.add_argument(
        "--reduction",
        metavar="PLAN",
        help='a plan: "none", "pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]", '
        '"fastv:k=2,r=0.5", several methods joined by "+", or plan.json. `llava plan` finds one '
        "for a budget; docs/Reduction.md has all methods",
    )
    group.add_argument("--layer_list", metavar="LIST", help='PyramidDrop\'s layers: "[8,16,24]"')
    group.add_argument(
        "--image_token_ratio_list",
        metavar="LIST",
        help='PyramidDrop\'s kept shares of the original count: "[0.5,0.25,0.125]"',
    )


def add_default_reduction(parser: argparse.ArgumentParser) -> None:
    """Add ``--default-reduction``, for commands that ask `plan_for_model`."""
    parser.add_argument(
        "--default-reduction",
        metavar="PLAN",
        help="the plan if neither a flag nor the checkpoint names one (default: none)",
    )


def check_plan_flags(args: argparse.Namespace) -> None:
    """Read the plans of all flags, before there is a model.

    Raises:
        ValueError: as `plan_from_args`, and for a default that cannot be read.
    """
    plan_from_args(args)
    if args.default_reduction is not None:
        ReductionPlan.parse(args.default_reduction)


def plan_from_args(args: argparse.Namespace) -> ReductionPlan | None:
    """The plan that parsed flags ask for; None where they say nothing.

    Raises:
        ValueError: a plan that cannot be read, one list without the other, or both ways at once.
    """
    return plan_from_flags(args.reduction, args.layer_list, args.image_token_ratio_list)


def plan_for_model(args: argparse.Namespace, config: Any) -> ReductionPlan | None:
    """`plan_from_args`, or ``--default-reduction`` for a model whose config has no plan.

    Raises:
        ValueError: as `plan_from_args`.
    """
    plan = plan_from_args(args)
    if plan is None and args.default_reduction is not None:
        default = ReductionPlan.parse(args.default_reduction)
        if resolve_plan(None, config)[1] == "default":
            return default
    return plan
