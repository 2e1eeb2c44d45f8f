"""What a method is shown, against the attention maps and keys of transformers' own eager layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_transformers import STOCK
from tiny import FAMILIES, LAYERS, PLANS, SIZES, VISUAL, batch, prompts, tiny_model

from llava.model.layer_programs import RUNNERS
from llava.reduction import YOPO, Cut, ReductionPlan, Signal, View
from llava.reduction.base import keep_highest
from llava.reduction.head_masks import WatchHeads, ratios_of

AT = 3


@dataclass(frozen=True)
class Probe:
    """Keeps everything and remembers what it was shown."""

    signals: tuple[Signal, ...]
    seen: list[View] = field(default_factory=list, compare=False)
    per: Any = "image"
    reads_text: bool = True
    name: str = "probe"

    def budget(self, now: int, original: int) -> int:
        return now

    def select(self, view: View) -> Any:
        self.seen.append(view)
        return keep_highest(torch.zeros(view.valid.shape), view)

    def options(self) -> dict[str, Any]:
        return {}


def shown(model: Any, inputs: Any, *signals: Signal, kind: str | None = None) -> View:
    probe = Probe(signals)
    sequence = model.build_sequence(**inputs, kind=kind)
    sequence.extra["place"] = sequence.origin[..., None].float() * 2
    with torch.no_grad():
        model(sequence=sequence, reduction=ReductionPlan((Cut(AT, probe),)), use_cache=False)
    return probe.seen[0]


def stock_of(family: str, ours: Any) -> Any:
    config = STOCK[family].config_class(**{**SIZES, **FAMILIES[family][2]})
    config._attn_implementation = "eager"
    stock = STOCK[family](config).eval()
    stock.load_state_dict({k: v for k, v in ours.state_dict().items() if k in stock.state_dict()})
    return stock


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["left", "right", "packed"])
@pytest.mark.parametrize("offset", [0, -1])
def test_attention_is_that_of_the_layer(family, kind, offset):
    """Windows included: a key that the layer does not see has no mass."""
    ours, samples = tiny_model(family), prompts()
    stock = stock_of(family, ours)
    mean, heads = Signal("attention", offset), Signal("attention", offset, heads=True)
    view = shown(ours, batch(samples), mean, heads, kind=kind)
    group = 0
    for sample in samples:
        sequence = ours.build_sequence(**batch([sample]))
        with torch.no_grad():
            maps = stock(inputs_embeds=sequence.hidden, output_attentions=True).attentions
        row = maps[AT + offset][0, :, -1]
        for number in range(sample[1]):
            place = sequence.cell[0, :, 0] == number
            torch.testing.assert_close(view.signals[heads][group].T, row[:, place])
            torch.testing.assert_close(view.signals[mean][group], row[:, place].mean(0))
            assert view.origin[group].tolist() == place.nonzero()[:, 0].tolist()
            group += 1
    assert group == view.valid.shape[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_keys_serve_where_they_are_the_same(family):
    """In front of the cut the layer has stored its keys: they are read, not made again, unless the
    layer has a window. What is measured does not change."""
    ours, signal = tiny_model(family), Signal("attention", offset=-1)
    sequence = ours.build_sequence(**batch(prompts(), "left"))
    calls: list[int] = []
    attention = ours.model.layers[AT - 1].self_attn
    attention.k_proj.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    for use_cache in (False, True):
        calls.clear()
        probe = Probe((signal,))
        plan = ReductionPlan((Cut(AT, probe),))
        with torch.no_grad():
            ours(sequence=sequence, reduction=plan, use_cache=use_cache)
        stored = use_cache and family in ("llama", "qwen3")
        assert len(calls) == (1 if stored else 2)
        seen.append(probe.seen[0].signals[signal])
    torch.testing.assert_close(seen[0], seen[1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_variants_of_the_attention(family):
    """Without rotation, without the input norm, over the visual tokens alone."""
    ours, sample = tiny_model(family), prompts()[0]
    plain = Signal("attention", rope=False, heads=True)
    visual = Signal("attention", rope=False, over="visual", heads=True)
    keys, raw = Signal("keys"), Signal("keys", norm=False)
    view = shown(ours, batch([sample]), plain, visual, keys, raw)
    sequence = ours.build_sequence(**batch([sample]))
    with torch.no_grad():
        hidden = ours(
            sequence=sequence, output_hidden_states=True, reduction="none", use_cache=False
        ).hidden_states[AT]
        layer = ours.model.layers[AT]
        attention, x = layer.self_attn, layer.input_layernorm(hidden)

        def project(name: str, x: torch.Tensor) -> torch.Tensor:
            out = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, 8))
            norm = getattr(attention, f"{name}_norm", None)
            return out if norm is None else norm(out)

        query, key = project("q", x)[0, -1], project("k", x)[0]
        place = sequence.cell[0, :, 0] >= 0
        scores = torch.einsum("hd,lhd->hl", query, key.repeat_interleave(2, 1)) * 8**-0.5
        torch.testing.assert_close(view.signals[plain][0].T, scores.softmax(-1)[:, place])
        torch.testing.assert_close(view.signals[visual][0].T, scores[:, place].softmax(-1))
        torch.testing.assert_close(view.signals[keys][0], key[place].flatten(1))
        torch.testing.assert_close(view.signals[raw][0], project("k", hidden)[0, place].flatten(1))


def test_hidden_states_and_extra_tensors():
    ours, samples = tiny_model(), prompts()
    hidden, extra = Signal("hidden"), Signal("extra", name="place")
    view = shown(ours, batch(samples), hidden, extra)
    assert view.signals[hidden].shape == (4, VISUAL, 32)
    assert torch.equal(view.signals[extra][..., 0], view.origin.float() * 2)
    assert view.cell[0, :5].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


def test_rows_in_front_of_answers_rank_in_training():
    """The mean over the rows in front of each supervised span; rows inside one do not rank."""
    ours, sample = tiny_model(), prompts()[3]
    inputs = batch([sample])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, [8, 9, 14]] = inputs["input_ids"][0, [8, 9, 14]]
    signal = Signal("attention")
    probe = Probe((signal,))
    with torch.no_grad():
        ours(**inputs, labels=labels, reduction=ReductionPlan((Cut(AT, probe),)))
        sequence = ours.build_sequence(**inputs)
        maps = stock_of("llama", ours)(inputs_embeds=sequence.hidden, output_attentions=True)
    shift = VISUAL - 1
    rows = maps.attentions[AT][0, :, [7 + shift, 13 + shift]].mean((0, 1))
    place = sequence.cell[0, :, 0] >= 0
    torch.testing.assert_close(probe.seen[0].signals[signal][0], rows[place])


def test_head_ratios_are_those_of_the_maps():
    """Calibration: mass of the last prompt token on pictures over mass on text, every head."""
    ours, samples = tiny_model("qwen3"), prompts()
    watched = [WatchHeads() for _ in range(LAYERS)]
    plan = ReductionPlan(tuple(map(Cut, range(LAYERS), watched)), positions="original")
    with torch.no_grad():
        out = ours(**batch(samples, "left"), reduction=plan, use_cache=False)
        plain = ours(**batch(samples, "left"), reduction="none", use_cache=False)
    torch.testing.assert_close(out.logits, plain.logits, atol=0, rtol=0)
    ratios = ratios_of(watched)
    with_picture = [sample for sample in samples if sample[1]]
    assert ratios.shape == (len(with_picture), LAYERS, 4)
    stock = stock_of("qwen3", ours)
    for index, sample in enumerate(with_picture):
        sequence = ours.build_sequence(**batch([sample]))
        with torch.no_grad():
            maps = stock(inputs_embeds=sequence.hidden, output_attentions=True).attentions
        visual = sequence.cell[0, :, 0] >= 0
        for layer, rows in enumerate(maps):
            mass = rows[0, :, -1]
            expected = mass[:, visual].sum(1) / mass[:, ~visual].sum(1)
            torch.testing.assert_close(
                torch.from_numpy(ratios[index, layer]).float(), expected, atol=1e-4, rtol=1e-4
            )


def test_a_layer_program_runs_layers_its_own_way(monkeypatch):
    """`via` reaches the layer; what was opened arrives; other layers run as usual."""
    ours, calls = tiny_model(), []

    class Twice(YOPO):
        name = "twice"

    class Runner:
        def __init__(self, settings: Any, config: Any) -> None:
            self.stop = settings.first_free

        def runs(self, index: int) -> bool:
            return index < self.stop

        def open(self, sequence: Any, rotary: Any, layers: range, record: Any) -> Any:
            return {"rows": sequence.origin}

        def step(self, record: Any, seen: int, count: int, like: Any) -> Any:
            raise NotImplementedError

        def extra(self, index: int, prepared: Any) -> dict[str, Any]:
            def via(layer: Any, hidden: Any, *, prepared: Any, **kwargs: Any) -> Any:
                calls.append((index, prepared["rows"].shape))
                return layer(hidden, **{**kwargs, "attention_mask": None})

            return {"via": via, "prepared": prepared} if self.runs(index) else {}

    monkeypatch.setitem(RUNNERS, "twice", Runner)
    inputs = {**batch(prompts()), "use_cache": False}  # padding on the right needs no mask
    plan = ReductionPlan(
        PLANS["pyramiddrop, original positions"].cuts, "original", program=Twice(layers=2)
    )
    with torch.no_grad():
        got = ours(**inputs, reduction=plan).logits
        expected = ours(**inputs, reduction=ReductionPlan(plan.cuts, "original")).logits
    torch.testing.assert_close(got, expected)
    assert [index for index, _ in calls] == [0, 1]
