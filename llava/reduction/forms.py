"""The text form of plans: ``name:key=value,...`` parts, joined by "+" where methods are mixed.

Each method says itself how its options become cuts, by `from_options`, and how cuts are written
again, by `to_options`. Two mixins cover the published ways to give a schedule:

* `Staged`: ``layers=[8,16,24],ratios=[0.5,0.25,0.125]``, one cut a layer (PyramidDrop).
* `OneCut`: ``k=2,...``, one cut in front of layer k; the rest are the method's own options (FastV).

A method with another form defines the two class methods itself. What belongs to the whole plan
(`positions`, `rerank`) is taken out by `llava.reduction.plan` before a method sees its options.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from llava.reduction.base import LayerProgram, Reducer


@dataclass(frozen=True)
class Parts:
    """What one part of a text becomes: (layer, method) pairs and, if any, a layer program."""

    cuts: tuple[tuple[int, Reducer], ...] = ()
    program: LayerProgram | None = None


def build(method: Any, name: str, options: Mapping[str, Any]) -> Any:
    """`method(**options)`, a dataclass. ValueError for an option it does not have or lacks."""
    accepted = [field.name for field in fields(method)]
    unknown = set(options) - set(accepted)
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}; accepted: {', '.join(accepted)}"
        )
    needed = [
        field.name
        for field in fields(method)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [each for each in needed if each not in options]
    if missing:
        raise ValueError(f"{name} needs the option {', '.join(missing)}")
    return method(**options)


def changed(method: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from the method's defaults."""
    default = {field.name: field.default for field in fields(method)}
    return {
        key: value
        for key, value in options.items()
        if key not in default or default[key] is MISSING or default[key] != value
    }


class Staged:
    """Mixin of a method with one option `ratio`: several cuts, a list of layers and of shares."""

    name: ClassVar[str]
    lowest: ClassVar[int] = 0
    """The first layer a cut may stand in front of."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Parts:
        """Cuts from `layers` and `ratios` (lists or their text) and options of every cut.

        Layers rise; shares lie in [0, 1] and do not rise. ValueError otherwise.
        """
        rest = dict(options)
        missing = [key for key in ("layers", "ratios") if key not in rest]
        if missing:
            raise ValueError(
                f"{cls.name} lacks {' and '.join(missing)}; "
                f'example: "{cls.name}:layers=[8,16,24],ratios=[0.5,0.25,0.125]"'
            )
        layers = number_list("layer_list", rest.pop("layers"), int)
        ratios = number_list("image_token_ratio_list", rest.pop("ratios"), (int, float))
        if len(layers) != len(ratios):
            raise ValueError(
                f"layer_list {layers} has {len(layers)} entries and image_token_ratio_list "
                f"{ratios} has {len(ratios)}; give one share a layer"
            )
        if any(layer < cls.lowest for layer in layers) or sorted(set(layers)) != layers:
            raise ValueError(
                f"layer_list {layers} is not accepted; give rising layer numbers from "
                f"{cls.lowest} on"
            )
        if any(later > earlier for earlier, later in zip(ratios, ratios[1:], strict=False)):
            raise ValueError(
                f"image_token_ratio_list {ratios} rises; each share is of the original tokens and "
                "must not exceed the one before it"
            )
        pairs = zip(layers, ratios, strict=True)
        return Parts(
            tuple((at, build(cls, cls.name, {"ratio": ratio, **rest})) for at, ratio in pairs)
        )

    @classmethod
    def from_shares(cls, layers: Sequence[int], shares: Sequence[float]) -> Parts:
        """Cuts that leave these shares of the original tokens (the budget solver asks for them)."""
        return cls.from_options({"layers": layers, "ratios": shares})

    @classmethod
    def to_options(cls, cuts: Sequence[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        """One dict for each run of cuts that share their other options."""
        layers: list[int] = []
        ratios: list[float] = []
        shared: dict[str, Any] | None = None
        for at, reducer in cuts:
            rest = changed(cls, reducer.options())
            ratio = rest.pop("ratio")
            if shared is not None and rest != shared:
                yield {"layers": layers, "ratios": ratios, **shared}
                layers, ratios = [], []
            shared = rest
            layers, ratios = [*layers, at], [*ratios, ratio]
        if shared is not None:
            yield {"layers": layers, "ratios": ratios, **shared}


class OneCut:
    """Mixin of a method that is given as one cut in front of layer `k` (which k layers precede).

    `usual` are the layers to try for it, the best first. A subclass says in `share_options` which
    options leave a share of the tokens.
    """

    name: ClassVar[str]
    usual: ClassVar[tuple[int, ...]] = (2, 1)

    @classmethod
    def share_options(cls, share: float) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Parts:
        """One cut at `k`. ValueError without it."""
        rest = dict(options)
        if "k" not in rest:
            raise ValueError(
                f"{cls.name} needs k, the number of layers that see all visual tokens; "
                f'example: "{cls.name}:k=2,..."'
            )
        at = rest.pop("k")
        return Parts(((at, build(cls, cls.name, rest)),))

    @classmethod
    def from_shares(cls, layers: Sequence[int], shares: Sequence[float]) -> Parts:
        """The cut that leaves this share. ValueError for more than one layer."""
        if len(layers) != 1:
            raise ValueError(f"{cls.name} cuts once; got the layers {list(layers)}")
        return cls.from_options({"k": layers[0], **cls.share_options(shares[0])})

    @classmethod
    def to_options(cls, cuts: Sequence[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        """One dict a cut."""
        for at, reducer in cuts:
            yield {"k": at, **changed(cls, reducer.options())}


# Text


def split_parts(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """``a:x=1+b:y=2`` -> [("a", "x=1"), ("b", "y=2")].

    A "+" joins parts where a method follows it: a known name, or any name with a colon. So
    ``text=question+options`` stays one value.
    """

    def joins(index: int) -> bool:
        found = re.match(r"\s*(\w+)\s*(:|\+|$)", text[index + 1 :])
        return found is not None and (found[2] == ":" or found[1].lower() in names)

    pieces = _split(text, "+", joins)
    split = [piece.partition(":") for piece in pieces]
    return [(name.strip().lower(), rest) for name, _, rest in split]


def pairs(text: str) -> dict[str, Any]:
    """``a=1,b=[2,3];c=x`` -> dict; separators inside brackets and quotes do not count. Values are
    literals, never evaluated as code; what is no literal is taken as text."""
    out: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in _split(text, ",;"))):
        key, sign, raw = part.partition("=")
        if not sign:
            raise ValueError(f"{part!r} in the reduction is no key=value pair")
        key = key.strip()
        if key in out:
            raise ValueError(f"{key!r} is given twice in the reduction")
        out[key] = _literal(raw.strip())
    return out


def spell(name: str, options: Mapping[str, Any]) -> str:
    """``name:key=value,...``, which `split_parts` and `pairs` read back."""
    return f"{name}:" + ",".join(f"{key}={_spell_value(value)}" for key, value in options.items())


def number_list(name: str, value: Any, kinds: type | tuple[type, ...]) -> list[Any]:
    """A list of numbers, or its text. ValueError names `name` and the value."""
    like = "[8,16,24]" if kinds is int else "[0.5,0.25,0.125]"
    example = f'{name} {value!r:.200} is no list of numbers; give something like "{like}"'
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise ValueError(example) from None
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable):
        raise ValueError(example)
    items = list(value)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, kinds):
            wanted = "integers" if kinds is int else "numbers"
            raise ValueError(f"{name} {items} holds {item!r}; accepted: {wanted}")
    return items


def _split(text: str, separators: str, accept: Any = None) -> list[str]:
    """Split at separators that stand outside brackets and quotes and that `accept` accepts."""
    parts, depth, start, quote = [], 0, 0, ""
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "[(") - (char in "])")
            if char in separators and depth == 0 and (accept is None or accept(index)):
                parts.append(text[start:index])
                start = index + 1
    return [*parts, text[start:]]


def _literal(raw: str) -> Any:
    try:
        return ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        return raw


def _spell_value(value: Any) -> str:
    """A value as `pairs` reads it back: plain words bare, other text quoted, lists without
    spaces."""
    if isinstance(value, str):
        bare = re.fullmatch(r"[\w./-]+", value) and _literal(value) == value
        return value if bare else repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(repr, value)) + "]"
    return repr(value)
