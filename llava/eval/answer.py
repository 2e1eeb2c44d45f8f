"""The answer generator: questions in, answers out; every way to run a benchmark goes through here.

    answerer = Answerer(model, tokenizer, image_processor, reduction="pyramiddrop:layers=[8],...")
    records = answerer.answer_all(questions)                # or answer_in_folder(...)

Special here: questions about one picture are answered together. They share its pass through the
tower and, up to the first cut that reads the question, the prefill of what their prompts have in
common (`llava.model.shared_prefix`); batches of different pictures are left-padded. Greedy by
default; sampling draws from the question's own seed. Work goes on after a kill with any number of
processes (`llava.eval.run_folder`); under torchrun or Slurm each takes whole batches, without a
word to the others.

Records have the keys of LLaVA's answers (`question_id, prompt, text, answer_id, model_id,
metadata`) and our own beside them (`Answerer.record`). `llava answer` and `llava eval` are its
command lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llava.conversation import get_conversation, resolve_conv_mode
from llava.decoding import Decoding, answer_text, cut_at_eos, eos_ids
from llava.eval.auto_batch import AUTO, fitting_size
from llava.eval.batches import Batch, plan_batches
from llava.eval.prepare import Prepared, Preparer, ahead, to_device
from llava.eval.questions import Question, check_images_exist
from llava.eval.run_folder import Merged, Record, RunFolder, config_hash, write_answers
from llava.eval.sampling import SeededSampling, question_seed
from llava.eval.throughput import Stopwatch, batch_flops, peak_bytes, summarise
from llava.prompting import pad_token_id
from llava.reduction import StageFacts, resolve_plan
from llava.reduction.base import counts_known
from llava.reduction.flops import ModelShape
from llava.utils import Ranks, get_logger, progress, set_seed

log = get_logger(__name__)
WORKERS = 2
"""Threads that prepare batches ahead of the model."""


@dataclass(frozen=True)
class Answered:
    """The records of a batch, in the order of its rows, and what it took."""

    batch: Batch
    records: list[Record]
    timing: dict[str, Any]


class Answerer:
    """A loaded model with everything that is the same for all questions of a run."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        *,
        image_folder: str | Path = "",
        conv_mode: str | None = None,
        reduction: Any = None,
        decoding: Decoding | None = None,
        batch_size: int | str = 8,
        seed: int = 0,
        blind: bool = False,
        share: bool = True,
        workers: int = WORKERS,
        model_id: str = "",
        open_picture: Callable[[str], Image.Image] | None = None,
    ) -> None:
        """reduction: None for the checkpoint's own plan, "none" for no dropping. blind: each
        picture is replaced by a grey one of its size. share: False runs whole prompts.
        open_picture: from a question's name of a picture to the picture, in place of files below
        `image_folder`; called from several threads. batch_size: "auto" finds the largest that
        fits. Raises ValueError for a plan or a template that does not fit, or a batch size below 1.
        """
        self.auto = batch_size == AUTO
        batch_size = 1 if self.auto else batch_size
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch size is {batch_size!r}; accepted: auto, 1 and more")
        self.model, self.tokenizer = model, tokenizer
        self.plan, self.plan_source = resolve_plan(reduction, model.config)
        self.plan.validate(model.config.num_hidden_layers)
        self.conv_mode, self.conv_source = resolve_conv_mode(conv_mode, model.config)
        self.decoding = decoding or Decoding()
        self.batch_size, self.seed, self.blind, self.share = batch_size, seed, blind, share
        self.workers, self.model_id = workers, model_id
        self.image_folder, self.open_picture = Path(image_folder), open_picture
        self.stop = get_conversation(self.conv_mode).stop_string
        self.eos = eos_ids(model, tokenizer)
        self.prepare = Preparer.of(
            model, tokenizer, image_processor, conv_mode=self.conv_mode, plan=self.plan,
            image_folder=image_folder, blind=blind, share=share, open_picture=open_picture,
        )  # fmt: skip
        tower = model.get_vision_tower()
        self.shape = ModelShape.from_config(model.config, getattr(tower, "config", None))
        self.device = torch.device(model.device)

    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the question and the weights."""
        return {
            "plan": str(self.plan),
            "conv_mode": self.conv_mode,
            "decoding": asdict(self.decoding),
            "seed": self.seed if self.decoding.temperature > 0 else None,
            "blind": self.blind,
            "batch_size": AUTO if self.auto else self.batch_size,
            "share_prefix": self.share,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": getattr(self.model.config, "_attn_implementation", None),
        }

    def batches(self, questions: Sequence[Question]) -> tuple[Batch, ...]:
        """The plan of work for these questions. FileNotFoundError for missing pictures."""
        if self.open_picture is None:
            check_images_exist(questions, self.image_folder)
        return plan_batches(questions, self.batch_size, self.prepare.visual_tokens)

    def answer(
        self, questions: Sequence[Question], batches: Iterable[Batch], run_id: str
    ) -> Iterator[Answered]:
        """Answers batch by batch. Raises ValueError for a damaged picture or a prompt that does not
        fit the context, naming it."""
        prepared = ahead(self.prepare, batches, questions, self.workers)
        watch = Stopwatch(self.device)
        for ready in prepared:
            watch.mark("wait")
            try:
                answered = self.answer_batch(ready, watch, run_id)
            except torch.OutOfMemoryError as err:
                count = len(ready.questions)
                raise ValueError(
                    f"{count} questions together need more memory than {self.device} has; "
                    "--batch-size sets how many"
                ) from err
            yield answered
            watch = Stopwatch(self.device)

    def answer_all(self, questions: Sequence[Question], desc: str = "answering") -> list[Record]:
        """One record a question, in their order."""
        if self.auto:
            self.batch_size = fitting_size(self, questions)
        batches, run_id = self.batches(questions), config_hash(self.settings())
        answered = self.answer(questions, batches, run_id)
        stream = (record for each in answered for record in each.records)
        shown = progress(stream, desc, len(questions), unit="q")
        by_uid = {record["uid"]: record for record in shown}
        return [by_uid[question.uid] for question in questions]

    @torch.inference_mode()
    def answer_batch(self, ready: Prepared, watch: Stopwatch, run_id: str) -> Answered:
        """One batch through the model."""
        model, shared = self.model, ready.shared
        images = to_device(ready.images, self.device, model.dtype)
        sequence = model.build_sequence(
            ready.ids.to(self.device), images=images, splice=ready.splice, kind="left"
        )
        watch.mark("vision")
        prefix = None
        if shared is not None:
            room = shared.ids.shape[1]
            prefix = model.encode_prefix(sequence, self.plan, questions=shared.counts, room=room)
            sequence = model.build_suffixes(shared.ids.to(self.device), shared.mask)
        out = model.generate(
            sequence=sequence,
            prefix=prefix,
            reduction=self.plan,
            pad_token_id=pad_token_id(self.tokenizer),
            stopping_criteria=StoppingCriteriaList([_FirstToken(watch)]),
            **self.generate_options(ready.questions),
        )
        ids = out.tolist()
        watch.mark("decode")
        stages = self.plan.schedule(ready.layout, self.shape.layers)
        latency = 1e3 * (sum(watch.seconds.values()) - watch.seconds.get("wait", 0.0))
        records = [
            {
                **self.record(question, row, run_id),
                "n_visual": self._visual(stages, place),
                "latency_ms": round(latency, 3),
            }
            for place, (question, row) in enumerate(zip(ready.questions, ids, strict=True))
        ]
        owners = None
        if shared is not None:
            heads = self.plan.schedule(ready.splice.layout, self.shape.layers)
            owner = [unit for unit, count in enumerate(shared.counts) for _ in range(count)]
            owners = (heads, owner, prefix.depth)
        new_tokens = max(record["n_out"] for record in records)
        timing = {
            "questions": len(records),
            "seconds": watch.seconds,
            "first_token_ms": 1e3 * (watch.seconds["vision"] + watch.seconds["prefill"]),
            "flops": batch_flops(self.shape, stages, ready.tiles, new_tokens, owners),
            "peak_bytes": peak_bytes(self.device),
        }
        return Answered(ready.batch, records, timing)

    def generate_options(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Arguments of `generate` for how answers are written."""
        decoding = self.decoding
        seeds = [question_seed(self.seed, question.uid) for question in questions]
        if decoding.temperature > 0 and decoding.num_beams == 1:
            sampler = SeededSampling(seeds, decoding.temperature, decoding.top_p)
            return {
                "max_new_tokens": decoding.max_new_tokens,
                "do_sample": False,
                "logits_processor": LogitsProcessorList([sampler]),
            }
        if decoding.temperature > 0:  # beams sample together, so one seed for the batch
            set_seed(seeds[0])
        return decoding.generate_kwargs()

    def _visual(self, stages: Sequence[StageFacts], row: int) -> dict[str, Any] | None:
        """Visual tokens of one prompt: at first, and behind each cut [layer, count]; None where a
        method decides on the device how many it keeps."""
        if not all(counts_known(cut.reducer) for cut in self.plan.cuts):
            return None
        cuts = [[stage.start, stage.visual[row]] for stage in stages if stage.cut is not None]
        return {"in": stages[0].visual[row], "layers": cuts}

    def record(self, question: Question, ids: Sequence[int], run_id: str) -> Record:
        """An answer, schema v1: LLaVA's keys and ours. ids: new tokens and what pads them.

        uid: the question in its file. finish: "eos" or "length". n_out: new tokens, the end
        included. MMBench's keys (`round_id`, `options`, `option_char`) come with its questions.
        """
        ids, ended = cut_at_eos(ids, self.eos)
        answer_id = hashlib.sha1(f"{question.uid} {run_id}".encode()).hexdigest()[:22]
        mmbench = {k: question.meta[k] for k in _MMBENCH if k in question.meta}
        return {
            "v": 1,
            "uid": question.uid,
            "question_id": question.question_id,
            **mmbench,
            "prompt": question.text if question.recorded is None else question.recorded,
            "text": answer_text(ids, self.tokenizer, self.stop),
            "answer_id": answer_id,
            "model_id": self.model_id,
            "run_id": run_id,
            "metadata": {},
            "finish": "eos" if ended else "length",
            "n_out": len(ids),
        }


_MMBENCH = ("round_id", "options", "option_char")


class _FirstToken(StoppingCriteria):
    """Never stops; ends the prefill on the stopwatch when the first tokens are there."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.seen = watch, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.seen:
            self.watch.mark("prefill")
            self.seen = True
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def answer_questions(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int | None = None,
    decoding: Decoding | None = None,
    desc: str = "answering",
    **settings: Any,
) -> list[Record]:
    """Answer questions with one model, without a folder; one record a question, in their order.

    max_new_tokens: shorthand for a greedy `Decoding`. settings: of `Answerer`. Raises
    FileNotFoundError for missing pictures (before anything is run), ValueError for damaged ones, an
    unknown template, a prompt longer than the context, or a plan that does not fit.
    """
    if decoding is not None and max_new_tokens is not None:
        raise ValueError("give decoding or max_new_tokens, not both")
    if max_new_tokens is not None:
        decoding = Decoding(max_new_tokens)
    answerer = Answerer(model, tokenizer, image_processor, decoding=decoding, **settings)
    return answerer.answer_all(questions, desc)


# ----------------------------------------------------------------------------- in a folder
def answer_in_folder(
    answerer: Answerer,
    folder: RunFolder,
    questions: Sequence[Question],
    ranks: Ranks,
    *,
    desc: str = "answering",
    notes: dict[str, Any] | None = None,
) -> Merged:
    """Answer what a run's folder still lacks and this process is to do; then what there is.

    notes: entries of run.json beside the settings. ValueError for a folder of another run, before
    anything in it is touched.
    """
    notes = dict(notes or {})
    if answerer.auto:
        answerer.batch_size = folder.batch_size(lambda: fitting_size(answerer, questions))
        notes["batch_size_found"] = answerer.batch_size
    batches = answerer.batches(questions)
    notes = {"plan_source": answerer.plan_source, "checkpoint": answerer.model_id, **notes}
    folder.open([question.uid for question in questions], batches, ranks, notes)
    log.info(
        "plan: %s (%s); template: %s (%s)",
        answerer.plan, answerer.plan_source, answerer.conv_mode, answerer.conv_source,
    )  # fmt: skip
    done = folder.done()
    mine = [batch for batch in batches if batch.number % ranks.world == ranks.rank]
    todo = [batch for batch in mine if batch.number not in done]
    total = sum(len(batch.places) for batch in mine)
    left = sum(len(batch.places) for batch in todo)
    shard = folder.shard(ranks)

    def records() -> Iterator[Record]:
        for answered in answerer.answer(questions, todo, folder.run_id):
            shard.append(answered.batch.number, answered.records, answered.timing)
            yield from answered.records

    for _ in progress(records(), desc, total, unit="q", done=total - left):
        pass
    return folder.merge()


def finish(folder: RunFolder, merged: Merged, ranks: Ranks) -> dict[str, Any] | None:
    """Write the answers file of a run that is complete and note its speed; None when it is not."""
    total = len(merged.records) + len(merged.missing)
    if merged.missing:
        log.warning(
            "%s: %d of %d questions answered; the rest is for the other processes, or for the same "
            "command again", folder.path, len(merged.records), total,
        )  # fmt: skip
        return None
    write_answers(folder.answers, merged.records)
    speed = summarise(folder.timings(), ranks.world, folder.baseline_speed())
    folder.note(speed=speed)
    return speed
