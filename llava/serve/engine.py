"""One loaded model that answers dialogues about pictures: what chat, demo and scripts stand on.

Special here: a dialogue is plain turns and pictures; the engine keeps none of it. Every turn is a
prefill of its own, because a cut chooses its tokens by the last question: what an earlier question
had no use for may be what this one asks about.

    engine = Engine.load("checkpoints/llava-digits", reduction="none")
    turns = [{"role": "user", "content": "What digit is in C3?"}]
    print(engine.answer(turns, [picture]).text)
    for piece in engine.stream(turns, [picture]):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from llava.conversation import get_conversation, resolve_conv_mode
from llava.decoding import Decoding, answer_text, cut_at_eos, eos_ids
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path
from llava.model.builder import load_checkpoint
from llava.prompting import Turn, build_prompt, move_batch, pad_token_id, prepare_batch
from llava.reduction import ReductionPlan, resolve_plan


@dataclass(frozen=True)
class Answer:
    """text; ended: the model ended it by itself; tokens: new ones; prompt: what the model saw."""

    text: str
    ended: bool
    tokens: int
    prompt: str


class Engine:
    """tokenizer, model and image processor of one checkpoint.

    conv_mode: template; None for the checkpoint's own. reduction: None for the checkpoint's plan.
    Both are those of `model.config` for an engine from `load`.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        image_processor: Any,
        *,
        conv_mode: str | None = None,
        reduction: Any = None,
        name: str = "",
    ) -> None:
        self.tokenizer, self.model, self.image_processor = tokenizer, model.eval(), image_processor
        self.name = name
        self.conv_mode, _ = resolve_conv_mode(conv_mode, model.config)
        self.plan = ReductionPlan()
        self.use_plan(reduction)

    @classmethod
    def load(
        cls,
        model_path: str | os.PathLike[str],
        model_base: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Engine:
        """The engine of a checkpoint; options: the keywords of `load_checkpoint` (which logs what
        was chosen and why), with LLaVA's dtype (float16 on a GPU, float32 on the CPU)."""
        loaded = load_checkpoint(os.fspath(model_path), model_base, **{"dtype": None, **options})
        return cls(
            loaded.tokenizer,
            loaded.model,
            loaded.image_processor,
            conv_mode=options.get("conv_mode"),
            name=get_model_name_from_path(os.fspath(model_path)),
        )

    def use_plan(self, reduction: Any) -> None:
        """From now on this plan; None for the one it was loaded with. ValueError for one that does
        not fit; then the present one stays."""
        plan, _ = resolve_plan(reduction, self.model.config)
        plan.validate(self.model.config.num_hidden_layers)
        self.plan = plan

    def answer(
        self,
        turns: str | Sequence[Turn],
        pictures: Sequence[Image.Image] = (),
        decoding: Decoding | None = None,
    ) -> Answer:
        """The answer to a question, or to a dialogue that ends with one (as `build_prompt`).

        Raises ValueError for marks and pictures that differ in number and for a prompt that leaves
        no room in the context.
        """
        prompt, call = self._call(turns, pictures, decoding or Decoding())
        return self._finish(prompt, self._generate(call))

    def stream(
        self,
        turns: str | Sequence[Turn],
        pictures: Sequence[Image.Image] = (),
        decoding: Decoding | None = None,
    ) -> Iterator[str]:
        """The same answer piece by piece, as soon as words are whole; joined they are its text.

        Closing the iterator (leaving the loop) ends the generation. Beams have no order to stream
        in: with them there is one piece.
        """
        decoding = decoding or Decoding()
        prompt, call = self._call(turns, pictures, decoding)
        if decoding.num_beams > 1:
            return iter([self._finish(prompt, self._generate(call)).text])
        return self._stream(call)

    def _stream(self, call: dict[str, Any]) -> Iterator[str]:
        pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        halt = _Halt()
        call["stopping_criteria"].append(halt)
        call["streamer"] = _QueueStreamer(self.tokenizer, pieces)

        def work() -> None:
            try:
                self._generate(call)
                pieces.put(None)
            except BaseException as error:  # handed to the reader, whose thread it concerns
                pieces.put(error)

        worker = threading.Thread(target=work, daemon=True, name="generate")
        worker.start()
        try:
            yield from trimmed(_read(pieces), get_conversation(self.conv_mode).stop_string)
        finally:
            halt.event.set()
            worker.join()

    def _call(
        self, turns: str | Sequence[Turn], pictures: Sequence[Image.Image], decoding: Decoding
    ) -> tuple[str, dict[str, Any]]:
        """(prompt, arguments for `generate`)."""
        config = self.model.config
        prompt = build_prompt(
            turns,
            self.conv_mode,
            len(pictures),
            getattr(config, "mm_use_im_start_end", False),
            self.tokenizer,
        )
        batch = prepare_batch(
            self.tokenizer, self.image_processor, config, [prompt], [list(pictures)]
        )
        ids = batch["input_ids"]
        batch = move_batch(batch, self.model.device, self.model.dtype)
        with torch.inference_mode():
            sequence = self.model.build_sequence(**batch, kind="left")
        room = self.model.context_length - sequence.layout.width
        if room < 1:
            raise ValueError(
                f"the dialogue fills the context of {self.model.context_length} tokens; no room is "
                "left for an answer"
            )
        criteria = StoppingCriteriaList()
        stop = get_conversation(self.conv_mode).stop_string
        if stop:
            criteria.append(KeywordsStoppingCriteria([stop], self.tokenizer, ids))
        limit = min(decoding.max_new_tokens, room)
        return prompt, {
            "sequence": sequence,
            "reduction": self.plan,
            "stopping_criteria": criteria,
            "pad_token_id": pad_token_id(self.tokenizer),
            **replace(decoding, max_new_tokens=limit).generate_kwargs(),
        }

    @torch.inference_mode()
    def _generate(self, call: dict[str, Any]) -> list[int]:
        return self.model.generate(**call)[0].tolist()

    def _finish(self, prompt: str, new: list[int]) -> Answer:
        stop = get_conversation(self.conv_mode).stop_string
        ids, ended = cut_at_eos(new, eos_ids(self.model, self.tokenizer))
        return Answer(answer_text(ids, self.tokenizer, stop), ended, len(ids), prompt)


class _Halt(StoppingCriteria):
    """Ends a generation from another thread, at the next token."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _QueueStreamer(TextStreamer):
    """Puts text into a queue once its words are whole."""

    def __init__(self, tokenizer: Any, pieces: queue.SimpleQueue[Any]) -> None:
        # generate hands over the (empty) prompt first
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = pieces

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.put(text)


def _read(pieces: queue.SimpleQueue[Any]) -> Iterator[str]:
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def trimmed(pieces: Iterable[str], stop: str | None = None) -> Iterator[str]:
    """The pieces up to `stop`, without white space at both ends; none is empty.

    What may turn out to be the beginning of `stop`, or the white space at the end, is held back
    until more is known.
    """
    held, begun = "", False
    for piece in pieces:
        held += piece
        if not begun:
            held = held.lstrip()
        if stop and stop in held:
            held = held.split(stop)[0]
            break
        body = held.rstrip()
        if stop:
            overlap = max(n for n in range(len(stop)) if body.endswith(stop[:n]))
            body = body[: len(body) - overlap].rstrip()
        if body:
            yield body
            held, begun = held[len(body) :], True
    if held.rstrip():
        yield held.rstrip()
