"""Visual-token reduction: plans, methods, FLOP counts. Pure torch; knows no model class.

A new method is one file here, one line in `plan.REDUCERS`, a section in docs/Reduction.md and a
test against recorded numbers.
"""

from llava.reduction.adaptprune import AdaptPrune
from llava.reduction.base import LayerProgram, Reducer, Selection, SideText, Signal, View
from llava.reduction.baselines import Random, Uniform
from llava.reduction.fastv import FastV
from llava.reduction.plan import (
    CONFIG_KEY,
    REDUCERS,
    Cut,
    ReductionPlan,
    StageFacts,
    plan_from_flags,
    resolve_plan,
)
from llava.reduction.pyramiddrop import PyramidDrop
from llava.reduction.simignore import Simignore
from llava.reduction.yopo import YOPO, DropVisual

__all__ = [
    "CONFIG_KEY",
    "REDUCERS",
    "YOPO",
    "AdaptPrune",
    "Cut",
    "DropVisual",
    "FastV",
    "LayerProgram",
    "PyramidDrop",
    "Random",
    "Reducer",
    "ReductionPlan",
    "Selection",
    "SideText",
    "Signal",
    "Simignore",
    "StageFacts",
    "Uniform",
    "View",
    "plan_from_flags",
    "resolve_plan",
]
