"""Random tiny models, plans and batches against literal.py, which says every rule once more.

The recorded cases hold few shapes; here everything is drawn that a run may meet: depth, heads, size
and shape of pictures, 0 to 2 pictures a sample at any turn, captions, samples without a target,
text behind the last answer, any layers and shares (1, 0, shares of which int() takes one token less
than arithmetic would). And new recorded cases, made by literal.py, go through the conformance
checker as a folder that nobody has seen.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import literal
import pytest
import reference_cases
import torch
from literal import IGNORE, MARK, Llama, Sample
from places import DATA
from pyramiddrop_cases import load_case
from safetensors.torch import load_file, save_file
from tiny import VISION, tiny_model
from torch import Tensor
from training_cases import one_step
from transformers import AutoTokenizer

from llava.mm_utils import get_anyres_image_grid_shape, tokenizer_image_token
from llava.reduction import ReductionPlan
from llava.train.preprocess import legacy_labels, preprocess, training_template
from llava.train.sampler import LengthGroupedSampler

SHARES = (1.0, 0.9, 0.75, 0.7, 0.58, 0.57, 0.5, 0.33, 0.29, 0.25, 0.125, 0.1, 0.05, 0.0)
NEAR_TIE = 1e-4  # relative; what is nearer may fall otherwise by rounding


@dataclass
class Drawn:
    """A model in float64 and a batch for it. sizes: (width, height) of anyres pictures."""

    model: Any
    ids: list[list[int]]
    labels: list[list[int]]
    shown: list[int]
    images: list[Tensor]
    sizes: list[tuple[int, int]] | None
    layers: list[int]
    shares: list[float]

    @property
    def plan(self) -> ReductionPlan:
        return ReductionPlan.pyramid(self.layers, self.shares) if self.layers else ReductionPlan()

    def samples(self, training: bool) -> list[Sample]:
        """What literal.py is given: the rows of each picture in their place."""
        rows = [
            picture_rows(self.model, image, self.sizes[i] if self.sizes else None)
            for i, image in enumerate(self.images)
        ]
        out = []
        for ids, labels, count in zip(self.ids, self.labels, self.shown, strict=True):
            out.append(Sample(ids, labels if training else None, rows[:count]))
            rows = rows[count:]
        return out

    def batch(self, side: str) -> dict[str, Any]:
        """The model's arguments, padded on one side."""
        width = max(map(len, self.ids))

        def padded(rows: list[list[int]], filling: int) -> Tensor:
            empty = [[filling] * (width - len(row)) for row in rows]
            both = zip(rows, empty, strict=True)
            return torch.tensor([e + r if side == "left" else r + e for r, e in both])

        same = all(image.shape == self.images[0].shape for image in self.images)
        images: Any = torch.stack(self.images) if same and self.images else self.images or None
        return {
            "input_ids": padded(self.ids, 0),
            "attention_mask": padded([[1] * len(row) for row in self.ids], 0),
            "labels": padded(self.labels, IGNORE),
            "images": images,
            "image_sizes": self.sizes if self.images else None,
        }


def draw(seed: int) -> Drawn:
    """A model, a plan and a batch of 1 to 4 samples."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    layers, heads = rng.randint(2, 8), rng.choice([1, 2, 4, 4])
    side, mode = rng.choice([2, 3, 4, 5]), rng.choice(["pad", "pad", "unpad", "spatial", "flat"])
    tile = 7 * side
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 4) if heads % k == 0]),
        "head_dim": rng.choice([4, 8, 16]),
        "initializer_range": rng.choice([0.1, 0.2, 0.3]),
        "rope_theta": rng.choice([500.0, 10000.0]),
        "mm_vision_config": {**VISION["mm_vision_config"], "image_size": tile},
    }
    if mode != "pad":
        grid = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
        changes |= {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[tile * across, tile * down] for across, down in grid],
            "mm_patch_merge_type": {"unpad": "spatial_unpad"}.get(mode, mode),
        }
    elif rng.random() < 0.3:
        changes["mm_vision_select_feature"] = "cls_patch"
    model = tiny_model("llama", "sdpa", **changes).double()
    model.get_vision_tower().requires_grad_(False)
    drawn = Drawn(model, [], [], [], [], None if mode == "pad" else [], [], [])
    for _ in range(rng.randint(1, 4)):
        ids, labels, count = draw_sample(rng)
        drawn.ids.append(ids)
        drawn.labels.append(labels)
        drawn.shown.append(count)
        for _ in range(count):
            shape: tuple[int, ...] = (3, tile, tile)
            if drawn.sizes is not None:
                drawn.sizes.append((rng.randint(5, 150), rng.randint(5, 150)))
                pins = changes["image_grid_pinpoints"]
                across, down = get_anyres_image_grid_shape(drawn.sizes[-1], pins, tile)
                shape = (1 + across * down, *shape)
            drawn.images.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    drawn.layers = sorted(rng.sample(range(1, layers), rng.randint(0, min(3, layers - 1))))
    drawn.shares = sorted(rng.choices(SHARES, k=len(drawn.layers)), reverse=True)
    return drawn


def draw_sample(rng: random.Random) -> tuple[list[int], list[int], int]:
    """ids, labels and the number of pictures of a sample."""
    kind = rng.choice(["one", "one", "one", "two", "text", "caption", "no target"])
    ids, labels, count = [1], [IGNORE], 0

    def words(least: int, most: int, learned: bool = False) -> None:
        new = [rng.randint(3, 95) for _ in range(rng.randint(least, most))]
        ids.extend(new)
        labels.extend(new if learned else [IGNORE] * len(new))

    def mark() -> None:
        ids.append(MARK)
        labels.append(IGNORE)

    if kind == "caption":
        mark()
        words(1, 8, learned=True)
        return ids, labels, 1
    turns = rng.randint(1, 3)
    where = rng.randrange(turns) if rng.random() < 0.3 else 0
    for turn in range(turns):
        words(0, 4)
        if kind != "text" and turn == where:
            for _ in range(2 if kind == "two" else 1):
                mark()
                words(0, 3)
                count += 1
        words(1, 6)
        if kind != "no target":
            words(1, 6, learned=True)
    if rng.random() < 0.3:
        words(1, 4)
    return ids, labels, count


def picture_rows(model: Any, image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The rows [N, D] that a picture becomes."""
    config = model.config
    patches = model.encode_images(image if image.dim() == 4 else image[None])
    if size is None or config.mm_patch_merge_type == "flat":
        return patches.flatten(0, 1)
    (width, height), side = size, model.get_vision_tower().num_patches_per_side
    across, down = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.mm_vision_config["image_size"]
    )
    field = patches[1:].view(down, across, side, side, -1).transpose(1, 2)
    field = field.reshape(down * side, across * side, -1)
    if config.mm_patch_merge_type == "spatial_unpad":
        rows, columns = field.shape[:2]
        if width / height > columns / rows:
            pad = (rows - int(height * (columns / width))) // 2
            field = field[pad : rows - pad]
        else:
            pad = (columns - int(width * (rows / height))) // 2
            field = field[:, pad : columns - pad]
        newline = model.model.image_newline.expand(len(field), 1, -1)
        field = torch.cat([field, newline], 1)
    return torch.cat([patches[0], field.flatten(0, 1)])


VARIANTS = (
    ("sdpa", "right", False),
    ("sdpa", "left", False),
    ("varlen", "packed", False),
    ("varlen", "packed", True),
)


@pytest.mark.parametrize("seed", [0, 1, 4, 16, 17, 29, 38, 41, 52, 60])
def test_training(seed):
    """Loss, every gradient and what is left, padded, packed and with checkpointing."""
    drawn = draw(seed)
    model, plan = drawn.model, drawn.plan
    outcomes = [
        literal.run(Llama(model), sample, drawn.layers, drawn.shares)
        for sample in drawn.samples(training=True)
    ]
    assert min(out.margin for out in outcomes) > NEAR_TIE
    loss = literal.mean_loss(outcomes)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted: Any = [None] * len(parameters)  # a batch without a target
    if loss.requires_grad:
        wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for backend, kind, checkpointing in VARIANTS:
        model.set_attn_implementation(backend)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        output = model(
            **drawn.batch("left" if kind == "left" else "right"),
            reduction=plan,
            packed=kind == "packed",
            logits_to_keep="targets",
            return_trace=True,
        )
        output.loss.backward()
        where = f"{backend}, {kind}, checkpointing {checkpointing}"
        assert float(output.loss) == pytest.approx(float(loss), rel=1e-5, abs=1e-5), where
        for (name, parameter), grad in zip(parameters.items(), wanted, strict=True):
            grad = torch.zeros_like(parameter) if grad is None else grad
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(got, grad, atol=1e-4, rtol=1e-4, msg=f"{where}: {name}")
        if kind != "packed":
            for row, out in zip(output.sequence.origin, outcomes, strict=True):
                assert row[row >= 0].tolist() == out.origin, where


def padded_inputs(drawn: list, pixels: Tensor) -> dict[str, Tensor]:
    """Drawn samples as the recordings have a batch; one of text alone has a dummy picture."""
    width = max(len(ids) for ids, _, _ in drawn)

    def padded(rows: list[list[int]], filling: int) -> Tensor:
        return torch.tensor([row + [filling] * (width - len(row)) for row in rows])

    return {
        "input_ids": padded([ids for ids, _, _ in drawn], 0),
        "labels": padded([labels for _, labels, _ in drawn], IGNORE),
        "attention_mask": padded([[1] * len(ids) for ids, _, _ in drawn], 0),
        "pixel_values": pixels,
    }


def draw_learnable(seed: int, count: int) -> list[tuple[list[int], list[int], int]]:
    """`count` samples with at most one picture and at least one target."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        ids, labels, pictures = draw_sample(rng)
        if pictures < 2 and max(labels) >= 0:
            drawn.append((ids, labels, pictures))
    return drawn


@pytest.mark.parametrize("mean", ["batch", "tokens"])
def test_a_step_of_three_micro_batches(mean):
    """Through the data set, the loader and the trainer, padded and packed: the mean of the
    micro-batches' means, or the mean over all targets of the step."""
    drawn = draw_learnable(5, 6)
    model = tiny_model().train()
    model.get_vision_tower().requires_grad_(False)
    layers, shares = [1, 3], [0.58, 0.29]
    model.config.visual_token_reduction = ReductionPlan.pyramid(layers, shares).to_dict()
    inputs = padded_inputs(drawn, torch.randn(6, 3, 28, 28))
    rows = model.encode_images(inputs["pixel_values"])
    outcomes = [
        literal.run(Llama(model), Sample(ids, labels, [rows[i]] if count else []), layers, shares)
        for i, (ids, labels, count) in enumerate(drawn)
    ]
    assert min(out.margin for out in outcomes) > NEAR_TIE
    wanted = literal.mean_loss(outcomes)
    if mean == "batch":
        wanted = sum(literal.mean_loss(outcomes[i : i + 2]) for i in (0, 2, 4)) / 3
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(wanted, list(parameters.values()))
    step = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "train_sampling_strategy": "sequential",
        "loss_mean": mean,
        "learning_rate": 0.0,
    }
    for backend, packed in (("sdpa", False), ("varlen", True)):
        model.set_attn_implementation(backend)
        loss, got = one_step(model, inputs, packed, **step)
        assert loss == pytest.approx(float(wanted), abs=1e-5)
        for name, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(got[name], grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seed", [2, 7, 16, 24, 39, 55])
def test_inference(seed):
    """Logits, lengths and greedy tokens of a batch, padded on either side."""
    drawn = draw(seed)
    model, llama = drawn.model, Llama(drawn.model)
    outcomes = [
        literal.run(llama, sample, drawn.layers, drawn.shares)
        for sample in drawn.samples(training=False)
    ]
    assert min(out.margin for out in outcomes) > NEAR_TIE
    answers = [literal.decode(llama, out, 6) for out in outcomes]
    assert min(gap for _, _, gap in answers) > NEAR_TIE
    for side in ("left", "right"):
        batch = drawn.batch(side)
        del batch["labels"]
        output = model(**batch, reduction=drawn.plan, return_trace=True)
        tokens = model.generate(
            **batch, reduction=drawn.plan, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        for number, out in enumerate(outcomes):
            real = output.sequence.origin[number] >= 0
            torch.testing.assert_close(
                output.logits[number][real], out.logits, atol=1e-4, rtol=1e-4
            )
            lengths = [s.lengths[number] for s in output.stages for _ in range(s.start, s.stop)]
            assert lengths == out.key_counts
            assert tokens[number].tolist() == answers[number][0]


@pytest.mark.parametrize("kinds", ["mixed", "pictures", "text", "one picture"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_sampler_order(kinds, world_size):
    """Any number of samples and equal lengths; less than a megabatch; one kind alone."""
    rng = random.Random(f"{kinds} {world_size}")
    for count in (1, 2, 5, 16, 24, 47, 64, 100):
        lengths = [rng.randint(1, rng.choice([3, 200])) for _ in range(count)]
        if kinds != "pictures":
            signs = [1 if kinds == "mixed" and rng.random() < 0.6 else -1 for _ in lengths]
            signs[0] = -1 if kinds == "text" else 1
            lengths = [length * sign for length, sign in zip(lengths, signs, strict=True)]
        for batch_size in (1, 2, 4):
            for by_modality in (True, False):
                sampler = LengthGroupedSampler(batch_size, world_size, lengths, by_modality)
                torch.manual_seed(count)
                order = list(sampler)
                torch.manual_seed(count)
                wanted = literal.grouped_order(lengths, batch_size, world_size, by_modality)
                assert order == wanted, (count, batch_size, by_modality)


WORDS = ("red", "circle", "dog", "How", "many", "Describe", "the", "picture", ".", "?", "Yes")


@pytest.mark.parametrize("kind", ["legacy", "nonlegacy"])
@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mistral_instruct"])
def test_legacy_labels(template, kind):
    """Dialogues of 1 to 4 rounds, with and without a picture, under any length limit, one that cuts
    inside a question among them; answers that are empty or hold the template's own marks. Without
    those, the way by segments gives the same."""
    folder = DATA / "pyramiddrop" / "preprocess" / f"tokenizer_{kind}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(f"{template} {kind}")
    conv = training_template(template)
    mark = f"{conv.sep}{conv.roles[1]}: " if template == "v1" else "[/INST] "
    shorter = int(template == "v1" and kind == "nonlegacy")
    seen = set()
    for _ in range(90):
        tokenizer.model_max_length = rng.choice([20, 50, 80, 120, 2048])
        has_image = rng.random() < 0.5
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(8)]
        texts = texts[: 2 * rng.randint(1, 4)]
        marked = rng.random() < 0.2
        if marked:
            texts[rng.randrange(1, len(texts))] = rng.choice(["", f"say{mark}", conv.sep2])
        if has_image:
            texts[0] = "<image>\n" + texts[0]
        prompt = conv.copy()
        prompt.messages = [[conv.roles[i % 2], text] for i, text in enumerate(texts)]
        with_marks = partial(tokenizer_image_token, tokenizer=tokenizer)
        encode = with_marks if has_image else lambda text: tokenizer(text)["input_ids"]
        limit = None if has_image else tokenizer.model_max_length
        ids, labels, met = literal.rounds_labels(
            prompt.get_prompt(), tokenizer, encode, mark, conv.sep2, limit, shorter
        )
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        got = legacy_labels(turns, tokenizer, conv, has_image=has_image)
        assert got.input_ids == ids
        assert got.labels == labels, texts
        assert (got.warning is None) == met
        if met and not marked and len(ids) < tokenizer.model_max_length:
            segments = preprocess(turns, tokenizer, conv, n_images=int(has_image))
            assert (segments.input_ids, segments.labels) == (ids, labels)
        learned = {label for label in labels if label >= 0}
        seen.add((has_image, met, bool(learned), len(ids) == tokenizer.model_max_length))
    assert {(False, True, True, True), (False, True, False, True)} <= seen  # cut, in either part
    assert {(True, True, True, False), (True, False, False, False)} <= seen


# ------------------------------------------------------------------- recorded cases nobody has seen
def new_case(
    root: Path, name: str, seed: int, samples: int, plan: tuple[list, list], limit: int
) -> Path:
    """A case folder as the recordings have them, of a training step on the stored weights: what
    is expected comes from literal.py. limit: tokens, pictures included, that a sample may have."""
    layers, shares = plan
    pattern = DATA / "pyramiddrop" / "d3_train_b3_padded"
    if not (root / "_weights").exists():
        shutil.copytree(pattern.parent / "_weights" / "mha16", root / "_weights" / "mha16")
    case = shutil.copytree(pattern, root / name)
    meta = json.loads((case / "meta.json").read_text())
    meta |= {"layer_list": layers, "image_token_ratio_list": shares, "params_without_grad": []}
    (case / "meta.json").write_text(json.dumps(meta))
    config = json.loads((case / "config.json").read_text())
    config["tokenizer_model_max_length"] = limit
    (case / "config.json").write_text(json.dumps(config))
    drawn = draw_learnable(seed, samples)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(drawn), 3, 56, 56, generator=generator)
    save_file(padded_inputs(drawn, pixels), case / "inputs.safetensors")
    model = load_case(case, "eager")[0]
    model.get_vision_tower().requires_grad_(False)
    rows, outcomes = model.encode_images(pixels), []
    for i, (ids, labels, count) in enumerate(drawn):
        left = limit - count * (rows.shape[1] - 1)  # no picture is cut
        sample = Sample(ids[:left], labels[:left], [rows[i]] if count else [])
        outcomes.append(literal.run(Llama(model), sample, layers, shares))
    assert min(out.margin for out in outcomes) > NEAR_TIE
    loss = literal.mean_loss(outcomes)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()))
    norm = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    expected = {"loss": loss.detach()[None], "grad_norm": torch.tensor([norm])}
    longest = max(len(out.logits) for out in outcomes)
    logits = torch.zeros(len(drawn), longest, model.config.vocab_size)
    final = torch.full((len(drawn), longest), IGNORE)
    for i, out in enumerate(outcomes):
        logits[i, : len(out.logits)] = out.logits.detach()
        final[i, : len(out.labels)] = torch.tensor(out.labels)
        for stage, kept in enumerate(out.kept):
            expected[f"s{i}_stage{stage}_kept_abs"] = torch.tensor(kept)
    expected |= {"logits": logits, "labels_final": final}
    expected |= {f"grad.{name}": g for name, g in zip(parameters, grads, strict=True)}
    save_file({k: v.contiguous() for k, v in expected.items()}, case / "expected.safetensors")
    return case


def test_an_unseen_case_is_run_on_every_path(tmp_path):
    """Another batch under another plan, one of its answers cut at the limit: found by its folder
    alone, run through the model and the trainer, padded and packed. Its loss has been changed, and
    that alone fails, on each of them."""
    root = tmp_path / "pyramiddrop"
    case = new_case(root, "z_train_b6", 8, 6, ([1, 2, 7], [0.9, 0.58, 0.29]), limit=46)
    expected = load_file(case / "expected.safetensors")
    expected["loss"] += 0.01
    save_file(expected, case / "expected.safetensors")
    lines = [line for _, line in reference_cases.run([root])]
    ran = [line.split("]")[0].split("[")[1] for line in lines]
    padded = [f"{b}, {side} padding" for b in ("eager", "sdpa") for side in ("right", "left")]
    assert ran == [*padded, "trainer, eager, padded", "trainer, sdpa, padded", "trainer, packed"]
    for line in lines:
        failures = [one.strip() for one in line.splitlines()[1:]]
        assert failures, line
        assert all(one.startswith(("loss: ", "loss (supervised rows only): ")) for one in failures)
