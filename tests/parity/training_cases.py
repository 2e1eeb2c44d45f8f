"""Recorded training cases through the trainer's own path: labels, order, loss and gradients.

Special here: nothing is called that a run does not call. Labels are those of
`LazySupervisedDataset`, orders those of `LLaVATrainer`; a recorded step goes from the data set
through the trainer's data loader and collator to `training_step`, padded and packed. Paths are
relative to the folder that is given, so the same rule runs on any folder with these files. Called
by tests/parity/reference_cases.py: ``python tests/parity/reference_cases.py
tests/data/pyramiddrop``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

LABELS_FILE = "preprocess_labels.json"
SAMPLER_FILE = "length_grouped_sampler.json"

Result = tuple[str, str | None]
"""(name of the case, None if it holds or what differs)"""


def label_cases(folder: Path) -> Iterator[Result]:
    """Every record of `folder`/preprocess_labels.json against ``label_mode="legacy"``.

    The tokenizers are the folders tokenizer_legacy and tokenizer_nonlegacy beside the file.
    """
    records = json.loads((folder / LABELS_FILE).read_text())["records"]
    for record in records:
        kind = "legacy" if record["legacy"] else "nonlegacy"
        name = f"labels/{record['name']}/{record['template']}/{kind}"
        yield name, _check_labels(record, folder / f"tokenizer_{kind}")


@lru_cache(maxsize=8)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _check_labels(record: dict[str, Any], tokenizer_folder: Path) -> str | None:
    from llava.conversation import get_conversation
    from llava.train.preprocess import legacy_labels, legacy_multimodal

    conv = get_conversation(record["template"])
    turns = record["conversations"]
    if record["has_image"]:
        turns = legacy_multimodal(turns, conv.version, record.get("mm_use_im_start_end", False))
    moved = [turn["value"] for turn in turns]
    if moved != record["after_preprocess_multimodal"]:
        return f"turns are {moved}, recorded {record['after_preprocess_multimodal']}"
    try:
        got = legacy_labels(
            turns, _tokenizer(tokenizer_folder), conv, has_image=record["has_image"]
        )
    except ValueError as error:
        return None if "error" in record else f"raised {error}"
    if "error" in record:
        return f"no error; recorded {record['error']}"
    if (got.warning or None) != (record["warning"] or None):
        return f"warning is {got.warning!r}, recorded {record['warning']!r}"
    sample = {"input_ids": got.input_ids, "labels": got.labels}
    if got.n_targets or got.warning:  # else the data set refuses it: nothing to learn
        sample = _from_dataset(record, tokenizer_folder)
    for what in ("input_ids", "labels"):
        if sample[what] != record[what]:
            return f"{what} are {sample[what]}, recorded {record[what]}"
    return None


def _from_dataset(record: dict[str, Any], tokenizer_folder: Path) -> dict[str, Any]:
    """The sample that a run with ``--label_mode legacy`` would train on."""
    from llava.train.dataset import LazySupervisedDataset
    from llava.train.preprocess import training_template

    turns = "".join(record["after_preprocess_multimodal"])  # as many pictures as marks are left
    names = ["recorded"] * turns.count("<image>") if record["has_image"] else []
    raw = {"conversations": record["conversations"]} | ({"image": names} if names else {})
    return LazySupervisedDataset(
        [raw],
        _tokenizer(tokenizer_folder),
        training_template(record["template"]),
        reader=Shown({"recorded": (None, (0, 0))}, lambda sizes: [1] * len(sizes)),
        label_mode="legacy",
        use_im_start_end=record.get("mm_use_im_start_end", False),
    )[0]


class Shown:
    """In place of an ImageReader: recorded pixels and sizes by name; `visual_tokens` counts the
    tokens of pictures of given sizes."""

    def __init__(self, pictures: dict[str, tuple[Any, Any]], visual_tokens: Any) -> None:
        self.pictures, self.visual_tokens = pictures, visual_tokens

    def __call__(self, name: str) -> tuple[Any, Any]:
        return self.pictures[name]


def sampler_cases(folder: Path) -> Iterator[Result]:
    """Every case of `folder`/length_grouped_sampler.json against the sampler's legacy mode."""
    cases = json.loads((folder / SAMPLER_FILE).read_text())["cases"]
    for case in cases:
        kind = "modality" if case["group_by_modality"] else "length"
        name = (
            f"sampler/{kind}/n{len(case['lengths'])}-b{case['batch_size']}-w{case['world_size']}"
            f"-seed{case['torch_seed']}"
        )
        yield name, _check_sampler(case)


def _check_sampler(case: dict[str, Any]) -> str | None:
    import torch

    from llava.train.sampler import LengthGroupedSampler

    sampler = LengthGroupedSampler(
        case["batch_size"],
        case["world_size"],
        lengths=case["lengths"],
        group_by_modality=case["group_by_modality"],
    )
    torch.manual_seed(case["torch_seed"])
    orders = [list(sampler)]
    if case["group_by_modality"]:
        orders.append(_trainer_order(case))
    wrong = [order for order in orders if order != case["indices"]]
    return f"order is {wrong[0]}, recorded {case['indices']}" if wrong else None


def _trainer_order(case: dict[str, Any]) -> list[int]:
    """The first epoch of a run whose seed is the recorded one, on as many ranks."""
    from types import SimpleNamespace

    from llava.train.llava_trainer import LLaVATrainer

    args = SimpleNamespace(
        group_by_modality_length=True, train_batch_size=case["batch_size"],
        world_size=case["world_size"], gradient_accumulation_steps=1, seed=case["torch_seed"],
        data_seed=None,
    )  # fmt: skip
    trainer = SimpleNamespace(args=args, train_dataset=_Sized(case["lengths"]))
    return list(LLaVATrainer._get_train_sampler(trainer))


class _Sized(list):
    """A data set of which only the lengths are asked."""

    @property
    def modality_lengths(self) -> list[int]:
        return list(self)


# ------------------------------------------------------------------------------- recorded steps
def through_trainer(case: Path) -> list[tuple[str, Any]]:
    """A recorded training step as a run makes it, on every layout: [(variant, Check)]."""
    import torch
    from on_device import BACKENDS, DEVICE
    from pyramiddrop_cases import ATOL, RTOL, load_case, plan_of
    from recorded import Check

    if DEVICE.type != "cpu":
        return []
    out = []
    for backend, packed in (*((name, False) for name in BACKENDS), ("varlen", True)):
        model, meta, inputs, expected = load_case(case, backend)
        model.config.visual_token_reduction = plan_of(meta).to_dict()
        model.get_vision_tower().requires_grad_(False)
        check = Check(ATOL, RTOL)
        loss, grads = one_step(model, inputs, packed)
        check.close("loss", torch.tensor([loss]), expected["loss"])
        check_without_gradient(check, grads, meta)
        squares = [float(g.double().square().sum()) for g in grads.values() if g is not None]
        check.close("grad_norm", torch.tensor([sum(squares) ** 0.5]), expected["grad_norm"])
        for name, value in expected.items():
            if name.startswith("grad."):
                check.close(name, grads[name.removeprefix("grad.")], value)
        out.append((f"trainer, {'packed' if packed else f'{backend}, padded'}", check))
    return out


def check_without_gradient(check: Any, grads: dict[str, Any], meta: dict[str, Any]) -> None:
    """Every parameter has a gradient but those that are recorded to have none; a zero is as good,
    which tower and projector get from the dummy picture of a batch of text."""
    allowed = set(meta.get("params_without_grad", []))
    missing = sorted(name for name, grad in grads.items() if grad is None and name not in allowed)
    extra = sorted(n for n in allowed & set(grads) if grads[n] is not None and grads[n].any())
    if missing or extra:
        check.failures.append(f"parameters without a gradient: {missing}, with one: {extra}")


def one_step(
    model: Any, inputs: dict[str, Any], packed: bool, **changes: Any
) -> tuple[float, dict[str, Any]]:
    """A run of one step on the recorded samples: its loss, and the gradients in front of the
    optimizer by parameter (None where there is none). changes: of the training arguments."""
    import tempfile

    from transformers import TrainerCallback

    from llava.train.arguments import TrainingArguments
    from llava.train.dataset import Collator
    from llava.train.llava_trainer import LLaVATrainer

    grads: dict[str, Any] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    grad = parameter.grad
                    grads[name] = None if grad is None else grad.clone()

    dataset = recorded_dataset(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": len(dataset), **changes}
        args = TrainingArguments(
            output_dir=folder, use_cpu=True, packed=packed, report_to="none", max_steps=1,
            model_max_length=dataset.max_length, save_strategy="no", optim="sgd",
            max_grad_norm=0.0, **settings,
        )  # fmt: skip
        trainer = LLaVATrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(0, model.splicer, packed),
            callbacks=[Keep()],
        )
        return trainer.train().training_loss, grads


def samples_of(model: Any, inputs: dict[str, Any]) -> tuple[list[Any], list[list[str]], Any]:
    """The recorded samples as ids and labels (`Encoded`) without padding; the names of each one's
    pictures (a sample of text alone was recorded with a dummy, which a run does not make); and a
    reader that has the pictures."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.multimodal_prep import assign_pictures
    from llava.train.dataset import ImageReader
    from llava.train.preprocess import Encoded

    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs.get("attention_mask", ids.new_ones(ids.shape)).bool()
    encoded = [
        Encoded(row[real].tolist(), own[real].tolist())
        for row, own, real in zip(ids, labels, mask, strict=True)
    ]
    pixels = inputs.get("pixel_values", [])
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else [(0, 0)] * len(pixels)
    pictures = {
        str(i): (picture, tuple(size))
        for i, (picture, size) in enumerate(zip(pixels, sizes, strict=True))
    }
    marks = [own.input_ids.count(IMAGE_TOKEN_INDEX) for own in encoded]
    names = [[str(i) for i in own] for own in assign_pictures(marks, len(pictures))]
    tower = model.get_vision_tower()
    count = ImageReader(tower.image_processor, model.config, tower.num_patches_per_side)
    return encoded, names, Shown(pictures, count.visual_tokens)


def cut_to_context(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The recorded batch, with samples that the context cannot hold cut as the data set cuts them.

    The original cuts behind the context once the pictures are in: the same targets are left.
    """
    import torch

    from llava.constants import IGNORE_INDEX
    from llava.mm_utils import truncate_to_context

    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).long()
    encoded, names, reader = samples_of(model, inputs)
    fitted = [
        truncate_to_context(
            own.input_ids,
            own.labels,
            reader.visual_tokens([reader(name)[1] for name in shown]),
            model.context_length,
        )
        for own, shown in zip(encoded, names, strict=True)
    ]
    out = {**inputs, "attention_mask": mask}
    if not any(own.cut for own in fitted):
        return out
    ids, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, own in enumerate(fitted):
        ids[row, : len(own.ids)] = torch.tensor(own.ids)
        labels[row, : len(own.ids)] = torch.tensor(own.labels)
        mask[row, len(own.ids) :] = 0
    left = [int(n) for own, shown in zip(fitted, names, strict=True) for n in shown[: own.images]]
    out |= {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return out | {k: inputs[k][left] for k in ("pixel_values", "image_sizes") if k in inputs}


def recorded_dataset(model: Any, inputs: dict[str, Any]) -> Any:
    """The recorded samples as a data set: ids and labels as if they had been tokenised, pixels as
    if they had been read."""
    from llava.train.dataset import LazySupervisedDataset
    from llava.train.preprocess import training_template

    encoded, names, reader = samples_of(model, inputs)
    dataset = LazySupervisedDataset(
        [{"conversations": []} | ({"image": shown} if shown else {}) for shown in names],
        None,
        training_template("v1"),
        reader=reader,
        max_length=model.context_length,
        cache_text=True,
    )
    dataset._text = dict(enumerate(encoded))
    return dataset


def run(folder: str | Path) -> list[Result]:
    """All training cases found in `folder` (a ``preprocess`` folder); empty if there are none."""
    folder = Path(folder)
    results: list[Result] = []
    if (folder / LABELS_FILE).is_file():
        results += label_cases(folder)
    if (folder / SAMPLER_FILE).is_file():
        results += sampler_cases(folder)
    return results
