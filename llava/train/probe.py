"""A few questions, answered while the model trains.

Special here: the prompt is what stands in front of a sample's first answer in the training ids, so
it is the inference prompt of any template; the model answers it greedily with its own plan. Random
states, modes and the time that is measured are as they were before, so a run with the probe trains
exactly what a run without it trains. Where weights are whole on every rank, rank 0 answers alone;
sharded ones (ZeRO-3, FSDP) are put together by all ranks, which then answer the same questions.
``python -m llava.train.train --probe_samples 4 --probe_steps 200 ...``
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.prompting import pad_texts
from llava.train.ranks import several_ranks
from llava.utils import get_logger

logger = get_logger(__name__)

MORE_THAN_REFERENCE = 8
LONGEST_ANSWER = 128
"""Tokens: an answer may be this much longer than its reference, and this long at most."""


class Question(NamedTuple):
    """A sample up to its first answer, and that answer."""

    name: str
    inputs: dict[str, Any]
    """Arguments of `generate`: ids [1, L], images, image_sizes, texts."""
    reference: list[int]


class Answer(NamedTuple):
    name: str
    answer: str
    reference: str

    @property
    def exact(self) -> bool:
        """Equal apart from case and white space."""
        one, other = (" ".join(text.split()).lower() for text in (self.answer, self.reference))
        return one == other


def first_question(sample: dict[str, Any], name: str) -> Question | None:
    """The prompt and the reference of a sample of `LazySupervisedDataset`; None for one in which
    nothing is learned (a mismatch of ``--label_mode legacy``)."""
    ids, labels = sample["input_ids"], sample["labels"]
    start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), None)
    if start is None:
        return None
    stop = next((i for i in range(start, len(ids)) if labels[i] == IGNORE_INDEX), len(ids))
    prompt = ids[:start]
    pictures = sum(token == IMAGE_TOKEN_INDEX for token in prompt)
    inputs: dict[str, Any] = {"inputs": torch.tensor([prompt])}
    if pictures:
        inputs["images"] = list(sample["images"][:pictures])
        inputs["image_sizes"] = list(sample["image_sizes"][:pictures])
    if sample.get("texts"):
        inputs["texts"] = pad_texts([sample["texts"]])
    return Question(name, inputs, ids[start:stop])


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the model is in eval mode; behind it every module's mode and every random
    state is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)


class Probe(TrainerCallback):
    """Answers `count` samples of the validation data (else of the training data), spread evenly,
    every `every` steps, or at each validation when that is 0."""

    def __init__(self, trainer: Any, count: int, every: int) -> None:
        self.trainer = trainer
        self.every = every
        self.dataset = trainer.eval_dataset
        if self.dataset is None:
            self.dataset = trainer.train_dataset
        count = min(count, len(self.dataset))
        self.indices = [i * len(self.dataset) // count for i in range(count)]

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every and state.global_step % self.every == 0 and not self.trainer.guard.stopping:
            with self.trainer.meter.left_out():
                self.run()

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.every:
            self.run()

    def run(self) -> None:
        """Answer, print and log."""
        trainer = self.trainer
        if not (trainer.args.process_index == 0 or self._sharded()):
            return
        with undisturbed(trainer.model, trainer.args.device):
            answers = [answer for index in self.indices if (answer := self.answer(index))]
        if trainer.args.process_index != 0 or not answers:
            return
        right = sum(answer.exact for answer in answers)
        step = trainer.state.global_step
        logger.info("step %d: %d of %d answers equal the reference", step, right, len(answers))
        for each in answers:
            logger.info("  %s: %r, reference %r", each.name, each.answer, each.reference)
        rows = [f"| {a.name} | {_cell(a.answer)} | {_cell(a.reference)} |" for a in answers]
        table = "\n".join(["| sample | answer | reference |", "|---|---|---|", *rows])
        due = trainer.control.should_log  # this step's own line, which logging would strike off
        trainer.log({"probe_exact": right / len(answers), "probe_answers": table})
        trainer.control.should_log = due

    def answer(self, index: int) -> Answer | None:
        """The model's answer to a sample, None for one without a question."""
        trainer, dataset = self.trainer, self.dataset
        question = first_question(dataset[index], dataset.describe(index))
        if question is None:
            return None
        tokenizer = trainer.processing_class
        room = min(len(question.reference) + MORE_THAN_REFERENCE, LONGEST_ANSWER)
        with trainer.accelerator.autocast():
            new = trainer.model.generate(
                **trainer._prepare_inputs(question.inputs),
                do_sample=False,
                num_beams=1,
                max_new_tokens=room,
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=self._sharded() and several_ranks(),  # no rank ends before the others
            )[0]
        texts = [
            tokenizer.decode(ids, skip_special_tokens=True).strip()
            for ids in (new, question.reference)
        ]
        return Answer(question.name, *texts)

    def _sharded(self) -> bool:
        """Whether the weights are spread over the ranks (ZeRO-3 or FSDP)."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        return bool(trainer.is_fsdp_enabled)


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
