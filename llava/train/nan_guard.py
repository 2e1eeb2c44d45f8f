"""Which tensor is the first that is not finite, and which sample made it so.

Special here: it runs once, after a step has been judged bad and before its update, so the weights
are those that the batch met. Every rank does the same calls in the same order (parameters, pixels,
a forward pass with hooks, a backward pass if no forward pass showed anything, every sample alone),
so sharded weights are put together as usual and no rank waits. The answer is a file,
``nan_report.json``, and one line. ``python -m llava.train.train --nan_guard True ...``
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from llava.train.ranks import from_all_ranks, highest
from llava.train.safety import EXIT_NOT_FINITE, RunStopped, StepGuard, Verdict
from llava.utils import get_logger, json_dump

logger = get_logger(__name__)

REPORT_FILE = "nan_report.json"
Finding = dict[str, Any]


# ------------------------------------------------------------------------------------------- hooks
def describe_bad(name: str, tensor: Tensor) -> Finding | None:
    """`tensor` as an entry of the report if something of it is not finite, else None."""
    values = tensor.detach()
    if not values.is_floating_point() or values.isfinite().all():
        return None
    return {
        "tensor": name,
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "nan": int(values.isnan().sum()),
        "inf": int(values.isinf().sum()),
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a module's result. A probe's result, ``(None, ...)``, is no hidden state and
    may hold masked scores."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)) and not (value and value[0] is None):
        for item in value:
            yield from _tensors(item)


class FirstBad:
    """Remembers the first finding it is shown."""

    def __init__(self) -> None:
        self.finding: Finding | None = None

    def look(self, name: str, value: Any) -> None:
        if self.finding is None:
            found = (describe_bad(name, tensor) for tensor in _tensors(value))
            self.finding = next(filter(None, found), None)


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[FirstBad]:
    """Within the block every module's input and output are looked at, in the order of the calls."""
    first = FirstBad()
    handles = []
    for name, module in model.named_modules():
        label = name or type(module).__name__

        def before(_: nn.Module, args: Any, label: str = label) -> None:
            first.look(f"input of {label}", args)

        def behind(_: nn.Module, __: Any, output: Any, label: str = label) -> None:
            first.look(f"output of {label}", output)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]
    try:
        yield first
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------ search
def bad_parameter(model: nn.Module) -> Finding | None:
    """The first parameter (or this rank's share of it) that is not finite."""
    for name, parameter in model.named_parameters():
        share = getattr(parameter, "ds_tensor", parameter)
        found = describe_bad(f"parameter {name}", _own_share(share))
        if found:
            return found
    return None


def _own_share(tensor: Any) -> Any:
    """What this rank holds of a tensor that FSDP2 has split; any other one as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bad_picture(batch: dict[str, Any]) -> Finding | None:
    """The first picture of the batch with a pixel that is not finite."""
    images = batch.get("images")
    for number, pixels in enumerate(() if images is None else images):
        found = describe_bad(f"picture {number} of the batch", pixels)
        if found:
            return found
    return None


def bad_activation(trainer: Any, batch: dict[str, Any]) -> tuple[Finding | None, float]:
    """The first module's input or output that is not finite when the batch is run again, and the
    loss it gives."""
    with torch.no_grad(), watching(trainer.model) as first:
        loss = loss_of(trainer, batch)
    return first.finding, float(loss)


def bad_gradient(trainer: Any, batch: dict[str, Any]) -> Finding | None:
    """The first parameter, in the order of the backward pass, whose gradient is not finite.

    Gradients are asked for by name and not accumulated, so no wrapper reduces them. FSDP2 computes
    with other tensors than its parameters and knows reduced gradients alone: there it is the last
    parameter in the order of the model, on every rank.
    """
    first = FirstBad()
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    if trainer.is_fsdp_enabled:
        loss_of(trainer, batch).backward()
        for name, parameter in reversed(named):
            first.look(f"gradient of {name}", _own_share(parameter.grad))
        trainer.model.zero_grad(set_to_none=True)
        return first.finding

    def looking(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: first.look(f"gradient of {name}", gradient)

    loss = loss_of(trainer, batch)
    handles = [parameter.register_hook(looking(name)) for name, parameter in named]
    try:
        torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return first.finding


def loss_of(trainer: Any, batch: dict[str, Any]) -> Tensor:
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))


def bad_samples_alone(trainer: Any, ids: Sequence[int]) -> list[int] | None:
    """Which of these samples has a loss that is not finite when it is alone in a batch; None if a
    rank cannot read its samples again. Every rank runs as many samples as the longest list has."""
    try:
        samples = [trainer.train_dataset[index] for index in ids]
    except (ValueError, OSError):
        samples = []
    device = trainer.args.device
    unread, count = highest([int(not samples), len(samples)], device)
    if unread:
        return None
    bad = []
    for number in range(count):
        sample = samples[min(number, len(samples) - 1)]
        batch = send_to_device(trainer.data_collator([sample]), device)
        with torch.no_grad():
            loss = loss_of(trainer, batch)
        if number < len(samples) and not loss.isfinite():
            bad.append(ids[number])
    return bad


# ------------------------------------------------------------------------------------------ report
def stop_not_finite(trainer: Any, guard: StepGuard, verdict: Verdict) -> NoReturn:
    """Find the first bad tensor and its samples, write the report and end the run, on all ranks."""
    model, step = trainer.model, trainer.state.global_step + 1
    what = "loss" if verdict.loss else "gradient"
    logger.error("the %s of step %d is not finite; looking for the first bad tensor", what, step)
    model.zero_grad(set_to_none=True)
    own = {"rank": trainer.args.process_index, **_search(trainer, guard)}
    reports = from_all_ranks(own)
    named = next((r for r in reports if r["first_bad"]), reports[0])
    where = (named["first_bad"] or {}).get("tensor", "did not come back when the batch ran again")
    samples = named["samples_alone"] or named["samples"]
    path = Path(trainer.args.output_dir) / REPORT_FILE
    kept = sorted(folder.name for folder in path.parent.glob("checkpoint-*"))
    if trainer.args.should_save:
        report = {"step": step, "not_finite": what, "ranks": reports, "checkpoints": kept}
        json_dump(path, report)
        logger.error(
            "step %d: %s is not finite, rank %d: %s; samples: %s. Report: %s. Checkpoints as they "
            "were: %s",
            step, what, named["rank"], where, "; ".join(samples), path, ", ".join(kept) or "none",
        )  # fmt: skip
    raise RunStopped(EXIT_NOT_FINITE)


def _search(trainer: Any, guard: StepGuard) -> dict[str, Any]:
    """This rank's part of the report."""
    batches = guard.batches
    losses = [float(loss) for loss in guard.losses]
    again = [bad_activation(trainer, batch) for batch in batches]
    pictures = [bad_picture(batch) for batch in batches]
    bad = [i for i, (finding, loss) in enumerate(again) if finding or not math.isfinite(loss)]
    first = bad_parameter(trainer.model)
    for i in bad:
        first = first or pictures[i] or again[i][0]
    (any_forward,) = highest([int(first is not None)], trainer.args.device)
    if not any_forward:
        gradients = [bad_gradient(trainer, batch) for batch in batches]
        bad = [i for i, finding in enumerate(gradients) if finding]
        first = next(filter(None, gradients), None)
    of_interest = bad or [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    of_interest = of_interest or list(range(len(batches)))
    ids = [index for i in of_interest for index in batches[i].get("ids", ())]
    alone = bad_samples_alone(trainer, ids) if any_forward else None
    describe = trainer.train_dataset.describe
    return {
        "losses": [str(loss) for loss in losses],
        "first_bad": first,
        "samples": [describe(index) for index in ids],
        "samples_alone": None if alone is None else [describe(index) for index in alone],
    }
