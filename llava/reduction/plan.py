"""The plan: at which layers visual tokens leave, by which method, and what is left of each sample.

A plan is a frozen value. It is validated when it is built and against the depth of the model when
it is used, written into `config.json` (key `visual_token_reduction`) with a checkpoint, and can be
replaced for one call: ``model.generate(..., reduction="random:layers=[8],ratios=[0.5]")``.

`ReductionPlan.schedule` works out on the host, from integers alone, what every stage of a forward
pass will hold. The decoder, the FLOP counter, the benchmarks and the reports all read that.

    llava flops --preset llava-1.5-7b --layer_list "[8,16,24]" \\
        --image_token_ratio_list "[0.5,0.25,0.125]"
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from llava.reduction.base import Reducer
from llava.reduction.baselines import Random, Uniform
from llava.reduction.pyramiddrop import PyramidDrop
from llava.sequence import Layout, TokenSequence

CONFIG_KEY = "visual_token_reduction"
POSITIONS: tuple[str, ...] = ("renumber", "original")
REDUCERS: dict[str, Callable[..., Reducer]] = {
    "pyramiddrop": PyramidDrop,
    "random": Random,
    "uniform": Uniform,
}
_COARSENESS = {"image": 0, "sample": 1}


@dataclass(frozen=True)
class Cut:
    """at: 0-based index of the first layer that sees the shortened sequence; 0 = before the LLM."""

    at: int
    reducer: Reducer

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not isinstance(self.at, int) or self.at < 0:
            raise ValueError(f"cut at layer {self.at!r} is not accepted; give an integer >= 0")
        for signal in self.reducer.signals:
            if self.at + signal.offset < 0:
                raise ValueError(
                    f"{self.reducer.name} at layer {self.at} would measure at layer "
                    f"{self.at + signal.offset}; accepted: a cut at {-signal.offset} or later"
                )


class LayerProgram(Protocol):
    """Runs some layers in another way than their own forward (heads or channels left out).

    `first_free` is the first layer that the program leaves alone: cuts must not lie inside it.
    """

    first_free: int

    def prepare(self, sequence: TokenSequence) -> dict[str, Tensor]:
        """Indices and masks of one stage, made once and handed to every `layer` call of it."""
        ...

    def layer(self, index: int) -> Callable[..., Any] | None:
        """A `via` for layer `index`, or None for its own forward."""
        ...


@dataclass(frozen=True)
class StageFacts:
    """One run of layers of equal length. Layers start .. stop-1 see `layout`.

    cut: what happened in front of `start` (None for the first stage). before: the layout in front
    of the cut, with the groups that competed. regroup: index of each earlier group among them.
    """

    start: int
    stop: int
    layout: Layout
    cut: Cut | None = None
    before: Layout | None = None
    regroup: tuple[int, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return self.layout.lengths

    @property
    def visual(self) -> tuple[int, ...]:
        """Visual tokens of each sample."""
        return self.layout.visual

    @property
    def budgets(self) -> tuple[int, ...]:
        """Tokens each competing group keeps."""
        return tuple(group.count for group in self.layout.groups)


@dataclass(frozen=True)
class ReductionPlan:
    """cuts: in the order of the layers. positions: after a cut the tokens count from 0 again
    ("renumber", as PyramidDrop) or keep the positions they had ("original", as FastV).
    program: how layers run that do not run as usual."""

    cuts: tuple[Cut, ...] = ()
    positions: Literal["renumber", "original"] = "renumber"
    program: LayerProgram | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cuts", tuple(self.cuts))
        if self.positions not in POSITIONS:
            raise ValueError(
                f"positions {self.positions!r} is unknown; accepted: {', '.join(POSITIONS)}"
            )
        for cut in self.cuts:
            if not isinstance(cut, Cut):
                raise ValueError(f"{cut!r} is no cut; give Cut(layer, method) objects")
        for first, second in zip(self.cuts, self.cuts[1:], strict=False):
            if second.at <= first.at:
                raise ValueError(
                    f"layers of the cuts must rise; got {[cut.at for cut in self.cuts]}"
                )
            if _COARSENESS[second.reducer.per] < _COARSENESS[first.reducer.per]:
                raise ValueError(
                    f"the cut at layer {second.at} ranks per {second.reducer.per!r} after one per "
                    f"{first.reducer.per!r}; later cuts may only get coarser (image, then sample)"
                )
        if self.program is not None:
            for cut in self.cuts:
                if 0 < cut.at < self.program.first_free:
                    raise ValueError(
                        f"the cut at layer {cut.at} lies inside the layer program; accepted: 0 or "
                        f"{self.program.first_free} and later"
                    )

    def __bool__(self) -> bool:
        return bool(self.cuts) or self.program is not None

    # Building and reading

    @classmethod
    def pyramid(
        cls,
        layer_list: Sequence[int] | str,
        image_token_ratio_list: Sequence[float] | str,
        *,
        positions: Literal["renumber", "original"] = "renumber",
        **options: Any,
    ) -> ReductionPlan:
        """PyramidDrop from the two flags of its scripts, lists or their text.

        Layers rise from 1 on; shares lie in [0, 1] and do not rise. ValueError otherwise.
        """
        return cls._staged("pyramiddrop", layer_list, image_token_ratio_list, positions, options)

    @classmethod
    def _staged(
        cls, name: str, layers: Any, ratios: Any, positions: Any, options: dict[str, Any]
    ) -> ReductionPlan:
        layers = _number_list("layer_list", layers, int)
        ratios = _number_list("image_token_ratio_list", ratios, (int, float))
        if len(layers) != len(ratios):
            raise ValueError(
                f"layer_list {layers} has {len(layers)} entries and image_token_ratio_list "
                f"{ratios} has {len(ratios)}; give one share a layer"
            )
        lowest = 1 if name == "pyramiddrop" else 0
        if any(layer < lowest for layer in layers) or sorted(set(layers)) != layers:
            raise ValueError(
                f"layer_list {layers} is not accepted; give rising layer numbers from {lowest} on"
            )
        if any(later > earlier for earlier, later in zip(ratios, ratios[1:], strict=False)):
            raise ValueError(
                f"image_token_ratio_list {ratios} rises; each share is of the original tokens and "
                "must not exceed the one before it"
            )
        cuts = [
            Cut(layer, _build(name, {"ratio": ratio, **options}))
            for layer, ratio in zip(layers, ratios, strict=True)
        ]
        return cls(tuple(cuts), positions=positions)

    @classmethod
    def parse(cls, value: ReductionPlan | str | Mapping[str, Any] | None) -> ReductionPlan:
        """A plan from what a flag, a config key or a caller gives.

        Accepted: None or "none"; a plan; a dict from `to_dict`; the path of a JSON file with such a
        dict; text like ``pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]`` (pairs separated by
        "," or ";", also `positions=`). Values are literals, never evaluated as code.
        """
        if value is None:
            return cls()
        if isinstance(value, ReductionPlan):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, str):
            raise ValueError(f"reduction {value!r} is not accepted; give text, a dict or a plan")
        return cls._from_text(value.strip())

    @classmethod
    def _from_text(cls, text: str) -> ReductionPlan:
        if text.lower() in ("", "none"):
            return cls()
        if text.endswith(".json"):
            return cls.from_dict(_read_json(text))
        if text.startswith("{"):
            try:
                return cls.from_dict(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"reduction {text!r} is no valid JSON: {error}") from None
        name, _, rest = text.partition(":")
        name = name.strip().lower()
        if name not in REDUCERS:
            raise ValueError(f"method {name!r} is unknown; accepted: none, {', '.join(REDUCERS)}")
        options = _pairs(rest)
        missing = [key for key in ("layers", "ratios") if key not in options]
        if missing:
            raise ValueError(
                f"reduction {text!r} lacks {' and '.join(missing)}; "
                f'example: "{name}:layers=[8,16,24],ratios=[0.5,0.25,0.125]"'
            )
        return cls._staged(
            name,
            options.pop("layers"),
            options.pop("ratios"),
            options.pop("positions", "renumber"),
            options,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the same plan back. ValueError for a layer program."""
        if self.program is not None:
            raise ValueError("a plan with a layer program cannot be written as JSON")
        return {
            "positions": self.positions,
            "cuts": [
                {"at": cut.at, "method": cut.reducer.name, **cut.reducer.options()}
                for cut in self.cuts
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReductionPlan:
        """The plan that `to_dict` wrote. ValueError for unknown keys, methods or values."""
        unknown = set(data) - {"positions", "cuts"}
        if unknown or not isinstance(data.get("cuts", []), list):
            raise ValueError(
                f"plan {dict(data)!r} is not accepted; keys are 'positions' and 'cuts' (a list)"
            )
        cuts = []
        for entry in data.get("cuts", []):
            if not isinstance(entry, Mapping) or not {"at", "method"} <= set(entry):
                raise ValueError(
                    f"cut {entry!r} is not accepted; keys 'at' and 'method' are needed"
                )
            options = {k: v for k, v in entry.items() if k not in ("at", "method")}
            cuts.append(Cut(entry["at"], _build(entry["method"], options)))
        return cls(tuple(cuts), positions=data.get("positions", "renumber"))

    def __str__(self) -> str:
        """One line that `parse` reads back when the plan has one method."""
        if not self:
            return "none"
        if self.program is not None:
            return f"{type(self.program).__name__} + {len(self.cuts)} cuts"
        names = {cut.reducer.name for cut in self.cuts}
        shared = [dict(cut.reducer.options()) for cut in self.cuts]
        ratios = [options.pop("ratio", None) for options in shared]
        if len(names) > 1 or None in ratios or any(options != shared[0] for options in shared):
            return json.dumps(self.to_dict())
        name = names.pop()
        defaults = _build(name, {"ratio": 1.0}).options()
        text = f"{name}:layers={[cut.at for cut in self.cuts]},ratios={ratios}"
        for key, value in shared[0].items():
            if value != defaults[key]:
                text += f",{key}={value}"
        if self.positions != "renumber":
            text += f",positions={self.positions}"
        return text.replace(" ", "")

    # What the plan does to a batch

    def validate(self, num_layers: int) -> None:
        """ValueError when a cut or the program does not fit a decoder of `num_layers` layers."""
        for cut in self.cuts:
            if cut.at >= num_layers:
                raise ValueError(
                    f"the cut at layer {cut.at} does not fit a model of {num_layers} layers; "
                    f"accepted: 0 to {num_layers - 1}"
                )
        if self.program is not None and self.program.first_free > num_layers:
            raise ValueError(
                f"the layer program reaches layer {self.program.first_free - 1}; the model has "
                f"{num_layers} layers"
            )

    def schedule(self, layout: Layout, num_layers: int) -> tuple[StageFacts, ...]:
        """Every stage's layers, lengths and counts, from host integers.

        A group is left alone by a cut that reads the text when its sample has no scoring row (a
        training sample without any supervised token, as the original does).
        """
        self.validate(num_layers)
        stops = [cut.at for cut in self.cuts] + [num_layers]
        stages = [StageFacts(0, stops[0], layout)]
        for cut, stop in zip(self.cuts, stops[1:], strict=True):
            before, regroup = stages[-1].layout.coarsen(cut.reducer.per)
            budgets = []
            for group in before.groups:
                budget = cut.reducer.budget(group.count, group.original)
                if cut.reducer.reads_text and before.queries[group.sample] == 0:
                    budget = group.count
                budgets.append(min(group.count, max(budget, group.protected)))
            stages.append(StageFacts(cut.at, stop, before.after(budgets), cut, before, regroup))
        return tuple(stages)

    def shared_depth(self, num_layers: int) -> int:
        """Layers that all questions about one picture have in common: up to the first cut that
        reads the question."""
        return min([cut.at for cut in self.cuts if cut.reducer.reads_text], default=num_layers)


def resolve_plan(flag: Any, config: Any) -> tuple[ReductionPlan, str]:
    """Which plan wins and where it came from: the flag's ("flag"), else the checkpoint's
    ("checkpoint"), else none ("default"). config: a model config or None."""
    if flag is not None:
        return ReductionPlan.parse(flag), "flag"
    stored = getattr(config, CONFIG_KEY, None)
    if stored is not None:
        return ReductionPlan.parse(stored), "checkpoint"
    return ReductionPlan(), "default"


def plan_from_flags(
    reduction: str | None, layer_list: Any = None, image_token_ratio_list: Any = None
) -> ReductionPlan | None:
    """The plan that a command line asks for; None when it says nothing.

    `--layer_list` with `--image_token_ratio_list` means PyramidDrop. ValueError when only one of
    the two is given or `--reduction` is given beside them.
    """
    pyramid = (layer_list, image_token_ratio_list)
    if all(value is None for value in pyramid):
        return None if reduction is None else ReductionPlan.parse(reduction)
    if reduction is not None:
        raise ValueError(
            "--reduction and --layer_list / --image_token_ratio_list exclude each other; give one"
        )
    if any(value is None for value in pyramid):
        raise ValueError("--layer_list and --image_token_ratio_list belong together; give both")
    return ReductionPlan.pyramid(layer_list, image_token_ratio_list)


def _build(name: Any, options: Mapping[str, Any]) -> Reducer:
    if name not in REDUCERS:
        raise ValueError(f"method {name!r} is unknown; accepted: {', '.join(REDUCERS)}")
    accepted = [field.name for field in fields(REDUCERS[name])]  # type: ignore[arg-type]
    unknown = set(options) - set(accepted)
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}; accepted: {', '.join(accepted)}"
        )
    if "ratio" not in options:
        raise ValueError(f"{name} needs the option ratio (share of the visual tokens that stays)")
    reducer = REDUCERS[name](**options)
    if reducer.per not in _COARSENESS:
        raise ValueError(f"per {reducer.per!r} is unknown; accepted: {', '.join(_COARSENESS)}")
    return reducer


def _number_list(name: str, value: Any, kinds: type | tuple[type, ...]) -> list[Any]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise ValueError(
                f'{name} {value!r} is no list; give something like "[8,16,24]"'
            ) from None
    if not isinstance(value, Iterable):
        raise ValueError(f'{name} {value!r} is no list; give something like "[8,16,24]"')
    items = list(value)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, kinds):
            wanted = "integers" if kinds is int else "numbers"
            raise ValueError(f"{name} {items} holds {item!r}; accepted: {wanted}")
    return items


def _pairs(text: str) -> dict[str, Any]:
    """``a=1,b=[2,3];c=x`` -> dict; separators inside brackets do not count."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char in ",;" and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    out: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in parts)):
        key, sign, raw = part.partition("=")
        if not sign:
            raise ValueError(f"{part!r} in the reduction is no key=value pair")
        key = key.strip()
        if key in out:
            raise ValueError(f"{key!r} is given twice in the reduction")
        try:
            out[key] = ast.literal_eval(raw.strip())
        except (ValueError, SyntaxError):
            out[key] = raw.strip()
    return out


def _read_json(path: str) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"plan file {path} does not exist")
    try:
        data = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"plan file {path} is no valid JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise ValueError(f"plan file {path} holds {type(data).__name__}; a JSON object is needed")
    return data
