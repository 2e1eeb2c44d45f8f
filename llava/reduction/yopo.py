"""YOPO: fewer operations for every visual token, instead of fewer visual tokens.

Paper: arXiv 2410.06169, "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to
See". Original: YOPO_MLLM_Pruning, `modeling_llama_prune.py`, which simulates the savings by masks.
Four strategies, all static, the same for every sample:

* `window`: a visual token looks at the w x w cells around it, later ones included, in place of all
  visual tokens before it (text in front of the picture stays visible).
* `heads`: in each layer only the kept heads of visual tokens run, and in the other heads nobody
  looks at visual tokens. `llava calibrate-heads` finds the mask.
* `ffn`: visual tokens use the first ``int(neurons / ffn)`` neurons of each feed-forward network.
* `layers`: from this layer on nobody looks at visual tokens: `Cut(layers, DropVisual())`.

The original multiplies by its masks after the softmax, so that the weights of a text token add up
to less than one, and still computes everything. `mode="leaky"` does exactly that and is there for
its checkpoints. `mode="renorm"` (default) removes the keys in front of the softmax: the work is
really gone, and the function is another one, so train with the mode that will be used.
`mode="renorm_layers"` is leaky below the last visual layer and drops the visual tokens there.

This file holds the settings, the rule that turns calibration measurements into a mask, and the
counts of operations. `llava.model.yopo_layer` runs the layers.

    llava bench --preset cpu-512 --reduction "yopo:layers=8,heads=0.5,window=5,ffn=2"
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llava.reduction.base import LayerCost, Selection, Signal, View
from llava.reduction.forms import Parts, build
from llava.reduction.head_masks import head_rows
from llava.sequence import Per

if TYPE_CHECKING:
    from llava.reduction.flops import ModelShape

Mode = Literal["renorm", "renorm_layers", "leaky"]
MODES: tuple[str, ...] = ("renorm", "renorm_layers", "leaky")
PUBLISHED = {(32, 4096, 11008): (1.91, 0.92), (40, 5120, 13824): (3.72, 1.79)}
"""Table 2 of the paper, T, by layers, hidden size and feed-forward width of LLaVA-1.5 7B, 13B."""


@dataclass(frozen=True)
class DropVisual:
    """A cut that keeps no visual token: the layers behind it see text alone.

    A visual token whose next token is supervised stays (the `plain` template of stage 1).
    """

    name: ClassVar[str] = "drop_visual"
    positions: ClassVar[str] = "original"
    per: ClassVar[Per] = "image"
    reads_text: ClassVar[bool] = False
    signals: ClassVar[tuple[Signal, ...]] = ()

    def budget(self, now: int, original: int) -> int:
        return 0

    def select(self, view: View) -> Selection:
        return Selection(keep=view.protected & view.valid)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Parts:
        """One cut at `k`. ValueError without it and for anything else."""
        if set(options) != {"k"}:
            raise ValueError(
                f'{cls.name} has the option k, the first layer without visual tokens: "{cls.name}:'
                f'k=16"; got {", ".join(options) or "nothing"}'
            )
        return Parts(((options["k"], cls()),))

    @classmethod
    def to_options(cls, cuts: Sequence[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
        """One dict a cut."""
        yield from ({"k": at} for at, _ in cuts)

    def options(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class YOPO:
    """The settings of a plan's layer program.

    layers: the first layer without visual tokens, None = all layers have them. heads: which heads
    are kept, one text of "1" and "0" a layer; given as such a list, as a nested list of 0 and 1, as
    a file (.npy, .pth, .safetensors), or as a share, which keeps that share of the heads of every
    layer, the first ones: enough to measure what a setting costs, no choice of heads. window: side
    of the neighbourhood in cells (an even side counts as the odd one below), None = plain causal
    attention. ffn: the divisor of the feed-forward width. mode: see the module. window_causal: do
    not look at later cells of the neighbourhood, as the paper's figure draws it.
    """

    layers: int | None = None
    heads: float | tuple[str, ...] = 1.0
    window: int | None = None
    ffn: float = 1
    mode: Mode = "renorm"
    window_causal: bool = False
    name: ClassVar[str] = "yopo"
    positions: ClassVar[str] = "original"
    reads_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_whole("layers", self.layers)
        _check_whole("window", self.window)
        object.__setattr__(self, "heads", head_rows(self.heads))
        ffn = self.ffn
        if isinstance(ffn, bool) or not isinstance(ffn, (int, float)) or not 1 <= ffn < math.inf:
            raise ValueError(f"ffn {ffn!r} is not accepted; give a divisor >= 1")
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown; accepted: {', '.join(MODES)}")
        if not isinstance(self.window_causal, bool):
            raise ValueError(f"window_causal {self.window_causal!r}; accepted: True, False")

    @property
    def first_free(self) -> int | None:
        """The first layer that runs as usual. None: there is none, in `leaky` mode or without
        `layers`."""
        return None if self.mode == "leaky" else self.layers

    @property
    def reach(self) -> int:
        """How many cells far a visual token looks; only with a window."""
        assert self.window is not None
        return (self.window - 1) // 2

    def runs(self, index: int) -> bool:
        """Whether layer `index` runs in another way than its own forward."""
        return self.first_free is None or index < self.first_free

    def sees_visual(self, index: int) -> bool:
        """Whether anybody looks at visual tokens in layer `index`."""
        return self.layers is None or index < self.layers

    def neurons(self, width: int) -> int:
        """Feed-forward neurons of a visual token, of `width`."""
        return int(width / self.ffn)

    def kept_heads(self, index: int, heads: int) -> tuple[int, ...]:
        """Numbers of the kept query heads of layer `index`, of `heads`."""
        if isinstance(self.heads, tuple):
            return tuple(h for h, flag in enumerate(self.heads[index]) if flag == "1")
        return tuple(range(round(self.heads * heads)))

    def validate(self, num_layers: int, heads: int | None = None) -> None:
        """ValueError when the settings do not fit a decoder of that depth and head count (None: the
        head count is not known yet)."""
        if self.layers is not None and self.layers >= num_layers:
            raise ValueError(
                f"layers={self.layers} does not fit a model of {num_layers} layers; accepted: 1 to "
                f"{num_layers - 1}, or leave it out to keep visual tokens in all layers"
            )
        if not isinstance(self.heads, tuple):
            return
        shape = (len(self.heads), len(self.heads[0]))
        if shape[0] != num_layers or heads not in (None, shape[1]):
            wanted = f"{num_layers} layers" + (f" x {heads} heads" if heads else "")
            raise ValueError(
                f"the head mask has {shape[0]} layers x {shape[1]} heads; the model has {wanted}"
            )

    def layer_cost(
        self, shape: ModelShape, index: int, length: int, visual: int
    ) -> LayerCost | None:
        """What layer `index` costs for a sample of `length` tokens; None where it runs as usual.

        visual_macs: section 5 of the paper's count, visual tokens against visual tokens of their
        neighbourhood. flops: attention under a mask counts every pair, as a masked kernel computes
        it; the heads and layers without one count the causal half.
        """
        if not self.runs(index):
            return None
        self.validate(shape.layers, shape.heads)
        text, size = length - visual, shape.head_dim
        if self.mode == "renorm":
            chosen = self.kept_heads(index, shape.heads)
            heads = len(chosen)
            keys = len({head * shape.kv_heads // shape.heads for head in chosen})
            near = (
                visual * visual if self.window is None else visual * self._mean_near(visual, shape)
            )
            masked = self.window is not None and visual > 0
            whole = length * length if masked else length * (length + 1) // 2
            pairs = heads * whole + (shape.heads - heads) * (text * (text + 1) // 2)
        else:
            heads, keys, near = shape.heads, shape.kv_heads, visual * visual
            pairs = heads * length * length
        row = 2 * shape.hidden * size * (heads + keys) + 3 * shape.hidden * self.neurons(shape.mlp)
        return LayerCost(
            visual_macs=visual * row + 2 * near * size * heads,
            flops=2 * text * shape.layer_weights + 2 * visual * row + 4 * size * pairs,
            keys=text * shape.kv_heads + visual * keys,
            pairs=text * shape.heads + visual * heads,
        )

    def _mean_near(self, visual: int, shape: ModelShape) -> float:
        """Cells in the neighbourhood, on average over the square grid of one tile."""
        side, reach = math.sqrt(min(visual, shape.patches)), self.reach
        if visual == 0 or reach >= side:
            return float(min(visual, shape.patches))
        return ((side * (2 * reach + 1) - reach * (reach + 1)) / side) ** 2

    def notes(self, shape: ModelShape, visual_macs: float, without: float) -> tuple[str, ...]:
        """Lines for `llava flops`: the paper's own count, and what it published.

        visual_macs, without: of this plan and of none.
        """
        lines = (
            [
                f"YOPO's count, 2 FLOPs a visual MAC    {2 * visual_macs / 1e12:.3f} T (none "
                f"{2 * without / 1e12:.3f} T, {visual_macs / without:.1%})"
            ]
            if without
            else []
        )
        published = PUBLISHED.get((shape.layers, shape.hidden, shape.mlp))
        if published is not None and lines:
            quarter, eighth = published
            lines.append(
                f"published                             {quarter} and {eighth} T: 25 % and 12 % "
                "of none to the digit, so nominal"
            )
        return tuple(lines)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Parts:
        """The program and, unless it leaks, the cut behind its last layer. ValueError without any
        strategy."""
        if not set(options) & {"layers", "heads", "window", "ffn"}:
            raise ValueError(
                "yopo needs one of layers, heads, window and ffn; "
                'example: "yopo:layers=16,heads=mask.npy,window=5,ffn=2"'
            )
        program = build(cls, cls.name, options)
        free = program.first_free
        return Parts(() if free is None else ((free, DropVisual()),), program)

    @classmethod
    def from_shares(cls, layers: Sequence[int], shares: Sequence[float]) -> Parts:
        """Visual tokens up to layer `layers[0]`, with this share of heads and neurons before it;
        the paper's half / half / half is ([L / 2], [0.5]). The budget solver asks for it."""
        if len(layers) != 1:
            raise ValueError(f"yopo has one last visual layer; got the layers {list(layers)}")
        share = shares[0]
        ffn = math.ceil(1000 / share) / 1000 if share > 1e-6 else 1e6
        return cls.from_options({"layers": layers[0], "heads": float(share), "ffn": ffn})

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, the head mask as a list of rows."""
        heads = list(self.heads) if isinstance(self.heads, tuple) else self.heads
        return {
            "layers": self.layers,
            "heads": heads,
            "window": self.window,
            "ffn": self.ffn,
            "mode": self.mode,
            "window_causal": self.window_causal,
        }


def _check_whole(name: str, value: object) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and not good:
        raise ValueError(f"{name} {value!r} is not accepted; give an integer >= 1 or None")


CHECKPOINT_KEYS = ("attncut_w", "headcut_num", "mlpcut_ratio", "layercut_num")
"""What the original writes into a checkpoint's config.json, beside `sprompt_len`, the position of
the picture, which the prompt itself says."""


def plan_from_config(
    config: Mapping[str, Any], folder: str | Path | None = None
) -> dict[str, Any] | None:
    """The plan of a checkpoint of the original, from its config.json, as `ReductionPlan.parse`
    takes it; None for other checkpoints.

    Such checkpoints were trained with the simulation, so the mode is `leaky`. `headcut_num` names a
    file of the original's repository, ``headmask/headmask_<size>_<number>.npy``: it is looked for
    below `folder`. ValueError when a key or that file is missing.
    """
    said = [key for key in ("sprompt_len", *CHECKPOINT_KEYS) if config.get(key) is not None]
    if not said:
        return None
    missing = [key for key in CHECKPOINT_KEYS if config.get(key) is None]
    if missing:
        raise ValueError(f"config.json has YOPO's {', '.join(said)} but no {', '.join(missing)}")
    window, number, ffn, layers = (config[key] for key in CHECKPOINT_KEYS)
    pattern = f"headmask_*_{number}.npy"
    found = [] if folder is None else sorted(Path(folder).rglob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"this checkpoint was trained with YOPO and a head mask of {number} heads, a file "
            f"{pattern} of the original's repository; {len(found)} of that name lie below "
            f"{folder}. Put one there, or give --reduction "
            f'"yopo:layers={layers},heads=FILE,window={window},ffn={ffn},mode=leaky"'
        )
    depth = config.get("num_hidden_layers")
    layers = None if depth is not None and layers >= depth else layers
    program = YOPO(layers, head_rows(str(found[0])), window, ffn, "leaky")
    return {"positions": YOPO.positions, "program": {"method": YOPO.name, **program.options()}}
