"""Training at two speeds: most steps on few visual tokens, some on all of them (DualSpeed).

Special here: any plan is the fast mode. A fast step trains under the plan, with a few learned
tokens in front of each picture (the isolator), by which the model tells the modes apart. A slow
step trains on all tokens, and the model under the plan, as it is now and without a gradient, is the
teacher: the loss is the cross-entropy plus KL(teacher || student), temperature 1, on the rows that
predict an answer. Which mode a step has is a hash of (seed, step): all ranks agree without talking,
all micro-batches of a step have one mode, and a resumed run draws what the undisturbed one drew.

Source: DualSpeed, llava_llama.py and llava_arch.py of its code (a slow step in ten, four isolator
tokens, pretraining always fast). Chosen here: the direction of the divergence; its mean is the
loss's own (over the batch's targets, or the step's); the teacher has the isolator, as fast steps
have; the isolator starts at random, as wide as an image newline does, and is left out of the
finished model, which reads all tokens without it.

    python -m llava.train.train ... --reduction PLAN --dual_speed 0.1
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.llava_arch import LlavaOutput
from llava.reduction.plan import ReductionPlan, resolve_plan
from llava.train.arguments import ModelArguments, TrainingArguments
from llava.train.parts import ISOLATOR
from llava.train.telemetry import BatchCost

NONE = ReductionPlan()


@dataclass(frozen=True)
class DualSpeed:
    """plan: of the fast steps and of the teacher. share: of steps that are slow, 0 to 1. weight: of
    the divergence; 0 = no teacher runs. isolator: how many tokens, 0 = none.

    ValueError for a plan that drops nothing and for figures out of their range.
    """

    plan: ReductionPlan
    share: float = 0.1
    weight: float = 1.0
    isolator: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.plan.cuts:
            raise ValueError("--dual_speed needs a plan that drops tokens: give --reduction")
        if not 0 <= self.share <= 1:
            raise ValueError(
                f"--dual_speed {self.share}; accepted: 0 to 1, the share of slow steps"
            )
        if self.weight < 0:
            raise ValueError(f"--dual_speed_weight {self.weight}; accepted: 0 or more")
        if self.isolator < 0:
            raise ValueError(f"--dual_speed_isolator {self.isolator}; accepted: 0 or more")

    def slow(self, step: int) -> bool:
        """Whether the step that follows `step` finished ones runs on all tokens."""
        digest = hashlib.blake2b(f"{self.seed}:{step}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64

    def facts(self, steps: int) -> dict[str, Any]:
        """What train_summary.json says about a run of so many steps."""
        slow = sum(self.slow(step) for step in range(steps))
        return {**asdict(self), "plan": self.plan.to_dict(), "slow_steps": slow}

    def __call__(
        self,
        forward: Callable[..., LlavaOutput],
        step: int,
        num_items: Tensor | int | None = None,
    ) -> LlavaOutput:
        """One micro-batch of a step: `forward` is the model with the batch bound to it and
        ``logits_to_keep="targets"``; it is given ``reduction`` and ``soft_tokens``. num_items: what
        the loss is divided by, None for the targets of this micro-batch."""
        fast = {"reduction": self.plan, "soft_tokens": self.isolator > 0}
        if not self.slow(step):
            return forward(**fast)
        teacher = None
        if self.weight:
            with torch.no_grad():
                teacher = forward(**fast).logits
        student = forward(reduction=NONE)
        if teacher is not None:
            apart = divergence(student.logits, teacher, num_items)
            student.loss = student.loss + self.weight * apart
        return student

    def cost(self, cost: BatchCost, step: int) -> BatchCost:
        """What a micro-batch of the step costs, the teacher included, the isolator left out."""
        if not self.slow(step):
            return replace(cost, plan=self.plan)
        return replace(cost, plan=NONE, teacher=self.plan if self.weight else None)


class SoftTokens(nn.Module):
    """`count` learned embeddings. A module of its own, called at every step of either mode, so that
    the hooks that spread parameters over ranks see it always."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        super().__init__()
        self.count = count
        draws = torch.Generator().manual_seed(seed)  # the same on all ranks; no other draw moves
        self.weight = nn.Parameter(torch.randn(count, size, generator=draws) * size**-0.5)

    def forward(self) -> Tensor:
        """[count, size], a copy: behind the call the weight may be spread over ranks again."""
        return self.weight.clone()


def divergence(student_NV: Tensor, teacher_NV: Tensor, num_items: Tensor | int | None) -> Tensor:
    """KL(teacher || student) of logits, in float32: the sum over rows divided by `num_items`, by
    the rows there are when it is None. No gradient reaches the teacher."""
    total = F.kl_div(
        F.log_softmax(student_NV.float(), dim=-1),
        F.log_softmax(teacher_NV.detach().float(), dim=-1),
        reduction="sum",
        log_target=True,
    )
    return total / (max(len(student_NV), 1) if num_items is None else num_items)


def dual_speed_of(
    model: Any, model_args: ModelArguments, training_args: TrainingArguments
) -> DualSpeed | None:
    """What the flags ask for, None without --dual_speed; gives the model its isolator, which is
    trained whatever else is frozen, and takes the plan out of its config: the finished model is
    meant for all tokens. Called once the plan stands there and the parts are frozen. ValueError for
    the projector stage and for what `DualSpeed` refuses."""
    if training_args.dual_speed is None:
        return None
    if model_args.tune_mm_mlp_adapter:
        raise ValueError(
            "--dual_speed is for fine-tuning: the projector stage is always fast; leave it out "
            "with --tune_mm_mlp_adapter True"
        )
    made = DualSpeed(
        plan=resolve_plan(None, model.config)[0],
        share=training_args.dual_speed,
        weight=training_args.dual_speed_weight,
        isolator=training_args.dual_speed_isolator,
        seed=training_args.seed,
    )
    model.config.visual_token_reduction = None
    if made.isolator:
        tokens = SoftTokens(made.isolator, model.config.hidden_size, made.seed)
        setattr(model.get_model(), ISOLATOR, tokens)
    return made


def without_isolator(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it is used on all tokens."""
    return {name: value for name, value in state.items() if f"{ISOLATOR}." not in name}
