"""FastV, Simignore, AdaptPrune and YOPO on random tiny models and batches, against
literal_methods.py: the rows of the prompt and three tokens of an answer, padded on either side."""

from __future__ import annotations

import random
from typing import Any

import literal_methods
import pytest
import torch
from literal import Llama
from recorded import Embedded, decode, real_rows, sequence_of
from test_literal import NEAR_TIE
from tiny import tiny_model
from torch import Tensor

from llava.prompting import pad_texts
from llava.reduction import ReductionPlan

STEPS = 3


def draw(rng: random.Random) -> tuple[Any, list[Embedded], int]:
    """A model without a tower in float64; prompts with pictures of side x side tokens, among them
    perhaps one of text alone; the side."""
    heads = rng.choice([1, 2, 4, 4])
    model = tiny_model(
        num_hidden_layers=rng.randint(2, 8),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([k for k in (1, 2, 4) if heads % k == 0]),
        head_dim=rng.choice([4, 8, 16]),
        initializer_range=rng.choice([0.1, 0.2, 0.3]),
        mm_vision_tower=None,
    ).double()
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
    side, samples = rng.choice([2, 3, 4, 5, 6]), []

    def rows(count: int) -> Tensor:
        size = model.config.hidden_size
        return torch.randn(count, size, generator=generator, dtype=torch.float64)

    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, 6)
        samples.append(Embedded(rows(start + side**2 + rng.randint(1, 8)), start, side, side))
    if rng.random() < 0.4:
        samples.append(Embedded(rows(rng.randint(2, 9))))
    return model, samples, side


def image_of(sample: Embedded) -> range:
    return range(sample.start, sample.start + sample.visual)


def written(name: str, settings: dict[str, Any]) -> ReductionPlan:
    pairs = ",".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    return ReductionPlan.parse(f"{name}:{pairs}")


def check(
    model: Any, samples: list[Embedded], plan: ReductionPlan, again: Any, texts: Any = None
) -> None:
    """again(sample, rows, first): the literal logits of a sample's rows [L, V] and, of a prompt
    (`first`), which of its rows they are compared at (None: all that are left)."""
    for side in ("left", "right"):
        sequence = sequence_of(samples, side, texts)
        output = model(sequence=sequence, reduction=plan, use_cache=True, return_trace=True)
        steps, _ = decode(model, output, STEPS)
        for number, sample in enumerate(samples):
            rows = sample.hidden
            for step in range(STEPS):
                wanted, places = again(sample, rows, step == 0)
                if step == 0:
                    got = real_rows(output, output.logits, number)
                    if places is not None:
                        origin = real_rows(output, output.sequence.origin, number).tolist()
                        got, wanted = got[[origin.index(i) for i in places]], wanted[places]
                    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(steps[number, step], wanted[-1], atol=1e-4, rtol=1e-4)
                token = model.get_model().embed_tokens(steps[number, step].argmax()[None])
                rows = torch.cat([rows, token])


def check_cut(
    model: Any,
    samples: list[Embedded],
    plan: ReductionPlan,
    at: int,
    chooser: Any,
    texts: Any = None,
    gap_above: float = NEAR_TIE,
) -> None:
    """chooser(number): the literal choice of a sample. It is made once, from the prompt."""
    llama, made = Llama(model), {}
    for number, sample in enumerate(samples):
        choose = chooser(number) if sample.visual else []
        _, kept, gap = literal_methods.through(llama, sample.hidden, image_of(sample), at, choose)
        assert gap > gap_above
        made[id(sample)] = kept

    def again(sample: Embedded, rows: Tensor, first: bool) -> tuple[Tensor, None]:
        kept = made[id(sample)]
        return literal_methods.through(llama, rows, image_of(sample), at, kept)[0], None

    check(model, samples, plan, again, texts)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_fastv(seed):
    rng = random.Random(f"fastv {seed}")
    model, samples, _ = draw(rng)
    at = rng.randint(1, model.config.num_hidden_layers - 1)
    removed = rng.choice([0.1, 0.3, 0.5, 0.58, 0.667, 0.7, 0.9, 0.95])
    plan = written("fastv", {"k": at, "r": removed})

    def chooser(number: int) -> Any:
        return literal_methods.fastv(Llama(model), image_of(samples[number]), at, removed)

    check_cut(model, samples, plan, at, chooser)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_adaptprune(seed):
    rng = random.Random(f"adaptprune {seed}")
    model, samples, side = draw(rng)
    at = rng.randint(1, model.config.num_hidden_layers - 1)
    settings = {
        "keep": rng.choice([0.1, 0.25, 0.29, 0.5, 0.58, 0.9]),
        "sigma_c": rng.choice([None, 1.0, 2.5, 12.0]),
        "sigma_d": rng.choice([0.8, 1.5, 3.0]),
        "sigma_s": rng.choice([0.05, 0.3, 1.0]),
        "distance": rng.choice([0, 1, 2, 2.5, 5.0]),
    }
    plan = written("adaptprune", {"k": at, **settings})

    def chooser(number: int) -> Any:
        image = image_of(samples[number])
        return literal_methods.adaptprune(Llama(model), image, at, side, settings)

    check_cut(model, samples, plan, at, chooser)


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_simignore(seed):
    rng = random.Random(f"simignore {seed}")
    model, samples, side = draw(rng)
    keep, step, offset = rng.randint(1, side**2), rng.choice([1, 2, 3]), rng.choice([0, 1, 2])
    ids = [[rng.randint(1, 95) for _ in range(4)] if s.visual else [] for s in samples]
    plan = written("simignore", {"keep": keep, "step": step, "offset": offset, "text": "options"})
    table = model.get_model().embed_tokens.weight

    def chooser(number: int) -> Any:
        image = image_of(samples[number])
        return literal_methods.simignore(table[ids[number]], image, keep, step, offset)

    texts = pad_texts([{"options": own} for own in ids])
    check_cut(model, samples, plan, 0, chooser, texts, gap_above=1e-6)  # of any two cosines


@torch.no_grad()
@pytest.mark.parametrize("mode", ["leaky", "renorm", "renorm_layers"])
@pytest.mark.parametrize("seed", range(3))
def test_yopo(seed, mode):
    """Any heads, none in a layer too; the last visual layer anywhere; any window and divisor."""
    rng = random.Random(f"yopo {seed}")
    model, samples, side = draw(rng)
    llama, config = Llama(model), model.config
    depth, heads = config.num_hidden_layers, config.num_attention_heads
    settings = {
        "layers": rng.randint(1, depth),
        "heads": [
            "".join(rng.choice("01") for _ in range(heads)) if rng.random() < 0.7 else "1" * heads
            for _ in range(depth)
        ],
        "window": rng.choice([None, 1, 2, 3, 4, 5]),
        "ffn": rng.choice([1, 2, 3, 1.5]),
        "mode": mode,
    }
    layers = settings["layers"] if settings["layers"] < depth else None
    plan = written("yopo", {**settings, "layers": layers})

    def again(sample: Embedded, rows: Tensor, first: bool) -> tuple[Tensor, list[int] | None]:
        image = image_of(sample)
        logits = literal_methods.yopo(llama, rows, image, side, settings)
        return logits, None if mode == "leaky" else [i for i in range(len(rows)) if i not in image]

    check(model, samples, plan, again)
