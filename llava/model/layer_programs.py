"""Which code runs the layers of a plan's program.

A plan holds a program as settings (`llava.reduction`), pure numbers that know no model class. Here
they meet the decoder: one table from the settings' name to the function that makes a runner. The
staged loop knows runners only by this protocol and names no method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from llava.model.staged_cache import StagedCache, StageRecord
from llava.model.yopo_layer import YopoRunner
from llava.model.yopo_leaky import LeakyRunner
from llava.reduction.plan import LayerProgram
from llava.sequence import Layout, TokenSequence


class LayerRunner(Protocol):
    """Runs some layers of one request through ``layer(hidden, via=...)``.

    It lives as long as the request: a cache keeps it for the tokens that are decoded on it.
    """

    def runs(self, index: int) -> bool:
        """Whether layer `index` runs in another way than its own forward."""
        ...

    def open(
        self,
        sequence: TokenSequence,
        rotary: tuple[Tensor, Tensor],
        layers: range,
        record: StageRecord | None,
    ) -> Any:
        """Tables and masks of one stage at prefill or in training, made once. record: the stage's
        entry in the cache, which takes what later steps need; None without a cache."""
        ...

    def step(self, record: StageRecord, seen: int, count: int, like: Tensor) -> Any:
        """Masks of one stage for `count` tokens behind the prompt and `seen` later ones; dtype and
        device as `like`."""
        ...

    def copy(self) -> LayerRunner:
        """For another request that begins with copies of what this one has cached."""
        ...

    def relay(
        self, cache: StagedCache, record: StageRecord, column_BW: Tensor, layout: Layout
    ) -> None:
        """The columns of a stage are laid anew, ``new = old.gather(column_BW)``, `layout` being the
        new one and record.valid telling its padding: do the same with the stage's own layers and
        with record.extra. record.length is still the prompt's, what came later is text."""
        ...

    def extra(self, index: int, prepared: Any) -> dict[str, Any]:
        """Further arguments of layer `index`, its `via` among them; {} for its own forward."""
        ...


def _yopo(settings: Any, config: Any) -> LayerRunner:
    return (YopoRunner if settings.mode == "renorm" else LeakyRunner)(settings, config)


RUNNERS: dict[str, Callable[[Any, Any], LayerRunner]] = {"yopo": _yopo}


def layer_runner(program: LayerProgram | None, config: Any) -> LayerRunner | None:
    """The runner of a plan's program for a decoder of that config. ValueError for a program that no
    runner is known for, or that does not fit the decoder."""
    if program is None:
        return None
    if program.name not in RUNNERS:
        raise ValueError(
            f"layer program {program.name!r} is unknown; accepted: {', '.join(RUNNERS)}"
        )
    return RUNNERS[program.name](program, config)
