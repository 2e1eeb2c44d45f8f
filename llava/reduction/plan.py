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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from llava.reduction.adaptprune import AdaptPrune
from llava.reduction.base import LayerProgram, Reducer, Signal
from llava.reduction.baselines import Random, Uniform
from llava.reduction.fastv import FastV
from llava.reduction.forms import Parts, build, changed, pairs, spell, split_parts
from llava.reduction.pyramiddrop import PyramidDrop
from llava.reduction.simignore import Simignore
from llava.reduction.yopo import YOPO, DropVisual
from llava.sequence import PER, Layout

CONFIG_KEY = "visual_token_reduction"
FASTV_KEY = "fastv_config"
POSITIONS: tuple[str, ...] = ("renumber", "original")
# The methods. A class here reads and writes its text form (`llava.reduction.forms`) and is a
# Reducer; a layer program that should be written with a plan stands here too.
REDUCERS: dict[str, Any] = {
    "pyramiddrop": PyramidDrop,
    "random": Random,
    "uniform": Uniform,
    "fastv": FastV,
    "simignore": Simignore,
    "adaptprune": AdaptPrune,
    "yopo": YOPO,
    "drop_visual": DropVisual,
}


@dataclass(frozen=True)
class Cut:
    """at: 0-based index of the first layer that sees the shortened sequence; 0 = before the LLM."""

    at: int
    reducer: Reducer

    def __post_init__(self) -> None:
        if isinstance(self.at, bool) or not isinstance(self.at, int) or self.at < 0:
            raise ValueError(f"cut at layer {self.at!r} is not accepted; give an integer >= 0")
        if not isinstance(self.reducer, Reducer):
            raise ValueError(f"{self.reducer!r} does not choose tokens, so it cannot be a cut")
        if self.reducer.per not in PER:
            raise ValueError(f"per {self.reducer.per!r} is unknown; accepted: {', '.join(PER)}")
        for signal in self.reducer.signals:
            if self.at + signal.offset < 0:
                raise ValueError(
                    f"{self.reducer.name} at layer {self.at} would measure at layer "
                    f"{self.at + signal.offset}; accepted: a cut at {-signal.offset} or later"
                )


@dataclass(frozen=True)
class StageFacts:
    """One run of layers of equal length. Layers start .. stop-1 see `layout`.

    cut: what happened in front of `start` (None for the first stage). before: the layout in front
    of the cut, with the groups that competed. regroup: index of each earlier group among them.
    program: the plan's; it may run some of these layers.
    """

    start: int
    stop: int
    layout: Layout
    cut: Cut | None = None
    before: Layout | None = None
    regroup: tuple[int, ...] = ()
    program: LayerProgram | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return self.layout.lengths

    @property
    def visual(self) -> tuple[int, ...]:
        """Visual tokens of each sample."""
        return self.layout.visual

    def within(self, layers: range) -> StageFacts:
        """The part of the stage that lies in `layers`; empty (start >= stop) when none does."""
        start, stop = max(self.start, layers.start), min(self.stop, layers.stop)
        return replace(self, start=start, stop=stop)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Tokens each competing group keeps."""
        return tuple(group.count for group in self.layout.groups)


@dataclass(frozen=True)
class ReductionPlan:
    """cuts: in the order of the layers. positions: after a cut the tokens count from 0 again
    ("renumber", as PyramidDrop) or keep the positions they had ("original", as FastV).
    program: how layers run that do not run as usual. rerank: `generate` makes the cuts anew for
    every token it writes, ranked by the newest one, and keeps no cache: a fidelity mode, slow."""

    cuts: tuple[Cut, ...] = ()
    positions: Literal["renumber", "original"] = "renumber"
    program: LayerProgram | None = None
    rerank: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cuts", tuple(self.cuts))
        if not isinstance(self.rerank, bool):
            raise ValueError(f"rerank {self.rerank!r} is not accepted; give True or False")
        if self.positions not in POSITIONS:
            raise ValueError(
                f"positions {self.positions!r} is unknown; accepted: {', '.join(POSITIONS)}"
            )
        for cut in self.cuts:
            if not isinstance(cut, Cut):
                raise ValueError(f"{cut!r} is no cut; give Cut(layer, method) objects")
        self._check_order()

    def _check_order(self) -> None:
        for first, second in zip(self.cuts, self.cuts[1:], strict=False):
            if second.at <= first.at:
                raise ValueError(
                    f"layers of the cuts must rise; got {[cut.at for cut in self.cuts]}"
                )
            if PER.index(second.reducer.per) < PER.index(first.reducer.per):
                raise ValueError(
                    f"the cut at layer {second.at} ranks per {second.reducer.per!r} after one per "
                    f"{first.reducer.per!r}; later cuts may only get coarser ({', '.join(PER)})"
                )
        if self.program is not None:
            self._check_program(self.program)

    def _check_program(self, program: LayerProgram) -> None:
        if not isinstance(program, LayerProgram):
            raise ValueError(f"{program!r} is no layer program")
        free = program.first_free
        for cut in self.cuts:
            if cut.at > 0 and (free is None or cut.at < free):
                later = "" if free is None else f" or {free} and later"
                raise ValueError(
                    f"the cut at layer {cut.at} lies inside the layer program {program.name}; "
                    f"accepted: 0{later}"
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
        found = PyramidDrop.from_options(
            {"layers": layer_list, "ratios": image_token_ratio_list, **options}
        )
        return cls(tuple(Cut(*pair) for pair in found.cuts), positions=positions)

    @classmethod
    def parse(cls, value: ReductionPlan | str | Mapping[str, Any] | None) -> ReductionPlan:
        """A plan from what a flag, a config key or a caller gives.

        Accepted: None or "none"; a plan; a dict from `to_dict`; the path of a JSON file with such a
        dict; text like ``pyramiddrop:layers=[8,16,24],ratios=[0.5,0.25,0.125]`` (pairs separated by
        "," or ";", also `positions=`), several methods joined by "+". Values are literals, never
        evaluated as code.
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
        cuts: list[Cut] = []
        programs, shared = [], []
        parts = split_parts(text, REDUCERS)
        for name, rest in parts:
            if name not in REDUCERS:
                raise ValueError(
                    f"method {name!r} is unknown; accepted: none, {', '.join(REDUCERS)}"
                )
            options = pairs(rest)
            shared.append({key: options.pop(key) for key in _OF_THE_PLAN if key in options})
            found: Parts = REDUCERS[name].from_options(options)
            cuts += [Cut(*pair) for pair in found.cuts]
            programs += [] if found.program is None else [found.program]
        if len(programs) > 1:
            raise ValueError(f"reduction {text!r} has {len(programs)} layer programs; give one")
        said = _agree(shared)
        if "positions" not in said:
            said["positions"] = _preset_positions([name for name, _ in parts])
        cuts.sort(key=lambda cut: cut.at)
        return cls(tuple(cuts), program=programs[0] if programs else None, **said)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the same plan back. ValueError for a layer program whose
        class is no method of the table."""
        data: dict[str, Any] = {"positions": self.positions}
        if self.rerank:
            data["rerank"] = True
        if self.program is not None:
            data["program"] = {"method": _name_of(self.program), **self.program.options()}
        data["cuts"] = [
            {"at": cut.at, "method": cut.reducer.name, **cut.reducer.options()} for cut in self.cuts
        ]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReductionPlan:
        """The plan that `to_dict` wrote. ValueError for unknown keys, methods or values."""
        unknown = set(data) - {*_OF_THE_PLAN, "cuts", "program"}
        if unknown or not isinstance(data.get("cuts", []), list):
            raise ValueError(
                f"plan {dict(data)!r} is not accepted; keys are 'positions', 'rerank', 'program' "
                "and 'cuts' (a list)"
            )
        cuts = []
        for entry in data.get("cuts", []):
            if not isinstance(entry, Mapping) or not {"at", "method"} <= set(entry):
                raise ValueError(
                    f"cut {entry!r} is not accepted; keys 'at' and 'method' are needed"
                )
            cuts.append(Cut(entry["at"], _made({k: v for k, v in entry.items() if k != "at"})))
        program = data.get("program")
        return cls(
            tuple(cuts),
            program=None if program is None else _made(program),
            **{key: data[key] for key in _OF_THE_PLAN if key in data},
        )

    def __str__(self) -> str:
        """One line that `parse` reads back: the short text form where there is one, else JSON.
        Names alone for methods that stand in no table."""
        if not self:
            return "none"
        for write in (self._to_text, lambda: json.dumps(self.to_dict())):
            try:
                text = write()
                if ReductionPlan.parse(text) == self:
                    return text
            except (KeyError, ValueError):
                continue
        own = [] if self.program is None else [type(self.program).__name__]
        return " + ".join([*own, *(cut.reducer.name for cut in self.cuts)])

    def _to_text(self) -> str:
        cuts = [(cut.at, cut.reducer) for cut in self.cuts]
        parts = []
        if self.program is not None:
            name = _name_of(self.program)
            options = changed(REDUCERS[name], self.program.options())
            brought = REDUCERS[name].from_options(options).cuts
            cuts = [cut for cut in cuts if cut not in brought]
            parts.append((name, options))
        for name, run in groupby(cuts, key=lambda cut: cut[1].name):
            parts += [(name, options) for options in REDUCERS[name].to_options(list(run))]
        presets = {REDUCERS[name].positions for name, _ in parts}
        said: dict[str, Any] = {} if presets == {self.positions} else {"positions": self.positions}
        if self.rerank:
            said["rerank"] = True
        parts[-1] = (parts[-1][0], {**parts[-1][1], **said})
        return "+".join(spell(name, options) for name, options in parts)

    # What the plan does to a batch

    def validate(self, num_layers: int) -> None:
        """ValueError when a cut or the program does not fit a decoder of `num_layers` layers."""
        for cut in self.cuts:
            if cut.at >= num_layers:
                raise ValueError(
                    f"the cut at layer {cut.at} does not fit a model of {num_layers} layers; "
                    f"accepted: 0 to {num_layers - 1}"
                )
        if self.program is not None:
            self.program.validate(num_layers)

    def schedule(
        self,
        layout: Layout,
        num_layers: int,
        counts: Mapping[int, Sequence[int]] | None = None,
    ) -> tuple[StageFacts, ...]:
        """Every stage's layers, lengths and counts, from host integers.

        counts: by number of the stage, what a method that may keep fewer tokens than its budget
        did keep of each group; without it, its budgets stand.

        A group is left alone by a cut that reads the text when its sample has no scoring row (a
        training sample without any supervised token, as the original does).
        """
        self.validate(num_layers)
        stops = [cut.at for cut in self.cuts] + [num_layers]
        stages = [StageFacts(0, stops[0], layout, program=self.program)]
        for cut, stop in zip(self.cuts, stops[1:], strict=True):
            before, regroup = stages[-1].layout.coarsen(cut.reducer.per)
            budgets = []
            for group in before.groups:
                budget = cut.reducer.budget(group.count, group.original)
                if cut.reducer.reads_text and before.queries[group.sample] == 0:
                    budget = group.count
                budgets.append(min(group.count, max(budget, group.protected)))
            if counts and len(stages) in counts:
                budgets = list(counts[len(stages)])
            after = before.after(budgets)
            stages.append(StageFacts(cut.at, stop, after, cut, before, regroup, self.program))
        return tuple(stages)

    @property
    def texts(self) -> tuple[Signal, ...]:
        """The texts beside the prompt that the methods compare with."""
        signals = [signal for cut in self.cuts for signal in cut.reducer.signals]
        return tuple(dict.fromkeys(signal for signal in signals if signal.kind == "text"))

    def shared_depth(self, num_layers: int) -> int:
        """Layers that all questions about one picture have in common: up to the first cut that
        reads the question, none when every question is ranked anew or the program reads it."""
        if (self.rerank and self.cuts) or (self.program is not None and self.program.reads_text):
            return 0
        return min([cut.at for cut in self.cuts if cut.reducer.reads_text], default=num_layers)


def resolve_plan(flag: Any, config: Any) -> tuple[ReductionPlan, str]:
    """Which plan wins and where it came from: the flag's ("flag"), else the checkpoint's
    ("checkpoint") or the config's `fastv_config` ("fastv_config"), else none ("default"). config: a
    model config or None. ValueError when the config has both."""
    if flag is not None:
        return ReductionPlan.parse(flag), "flag"
    stored = getattr(config, CONFIG_KEY, None)
    fastv = getattr(config, FASTV_KEY, None)
    text = None if fastv is None else fastv_config_text(fastv)
    if stored is not None and text is not None:
        raise ValueError(f"the config has both {CONFIG_KEY} and {FASTV_KEY}; set one to None")
    if stored is not None:
        return ReductionPlan.parse(stored), "checkpoint"
    if text is not None:
        return ReductionPlan.parse(text), FASTV_KEY
    return ReductionPlan(), "default"


def fastv_config_text(settings: Any) -> str | None:
    """The plan that FastV's `fastv_config` dict means; None when `use_fastv` is off.

    Keys: use_fastv (default True), fastv_k, fastv_r. image_token_start_index and
    image_token_length are accepted and not needed: where the pictures stand is known. ValueError
    for other keys or values.
    """
    needed, spans = ("fastv_k", "fastv_r"), ("image_token_start_index", "image_token_length")
    known = ("use_fastv", *needed, *spans)
    if not isinstance(settings, Mapping) or set(settings) - set(known):
        raise ValueError(f"{FASTV_KEY} is {settings!r}; accepted: a dict of {', '.join(known)}")
    if not isinstance(settings.get("use_fastv", True), bool):
        raise ValueError(f"use_fastv is {settings['use_fastv']!r}; accepted: True, False")
    for key in spans:
        value = settings.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{key} is {value!r}; accepted: a number of tokens, or nothing")
    if not settings.get("use_fastv", True):
        return None
    missing = [key for key in needed if settings.get(key) is None]
    if missing:
        raise ValueError(f"{FASTV_KEY} {dict(settings)!r} lacks {' and '.join(missing)}")
    return f"fastv:k={settings['fastv_k']},r={settings['fastv_r']}"


def plan_from_flags(
    reduction: str | None, layer_list: Any = None, image_token_ratio_list: Any = None
) -> ReductionPlan | None:
    """The plan that a command line asks for; None when it says nothing.

    `--layer_list` with `--image_token_ratio_list` means PyramidDrop. ValueError when only one of
    the two is given, `--reduction` is given beside them, or is empty (a variable that was not set).
    """
    if isinstance(reduction, str) and not reduction.strip():
        raise ValueError('--reduction is empty; give a plan, or "none"')
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


_OF_THE_PLAN = ("positions", "rerank")


def _agree(shared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the parts of a text say about the whole plan. ValueError when they contradict."""
    out: dict[str, Any] = {}
    for said in shared:
        for key, value in said.items():
            if out.setdefault(key, value) != value:
                raise ValueError(f"{key} is said to be {out[key]!r} and {value!r}; give one")
    return out


def _preset_positions(names: Sequence[str]) -> Any:
    presets = {REDUCERS[name].positions for name in names}
    if len(presets) > 1:
        which = ", ".join(f"{name}: {REDUCERS[name].positions}" for name in names)
        raise ValueError(
            f"the methods treat positions differently ({which}); add positions=renumber or "
            "positions=original"
        )
    return presets.pop()


def _name_of(program: LayerProgram) -> str:
    for name, method in REDUCERS.items():
        if type(program) is method:
            return name
    raise ValueError(
        f"a plan with the layer program {type(program).__name__} cannot be written as JSON"
    )


def _made(entry: Mapping[str, Any]) -> Any:
    """The method that an entry of a plan's JSON names."""
    options = dict(entry)
    name = options.pop("method", None)
    if name not in REDUCERS:
        raise ValueError(f"method {name!r} is unknown; accepted: {', '.join(REDUCERS)}")
    return build(REDUCERS[name], name, options)


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
