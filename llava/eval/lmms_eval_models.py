"""LLaVA as models of lmms-eval 0.7: its requests through this package's answer generator.

    llava = Llava("checkpoints/llava-digits", batch_size=32, reduction="fastv:k=2;r=0.5")
    evaluator.simple_evaluate(model=llava, tasks=["pope"])

Special here: all requests of a task are seen before the first is answered, so documents that show
the same picture are found by its pixels, answered together, and share its pass through the tower
and the prefill of what their prompts have in common (`llava.eval.answer`). `Llava` takes the
harness's simple requests, `LlavaChat` its messages; a task asks both the same prompt.

Likelihoods come from the same generator with the continuation forced token by token, so a plan
drops for the prompt what it drops when the model answers, never having seen the continuation. As in
the harness's own LLaVA the value is the mean loss of the continuation's tokens, its end included:
multiple choice takes the smallest.

The harness's evaluator sets Pillow's LOAD_TRUNCATED_IMAGES for its whole process, because its
NoCaps has a picture that is cut off. Here that is left as it is: put back, the task would fail.
Nothing else in this package imports the harness, so pictures that are cut off stay errors there.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.decoding import Decoding, cut_at_eos
from llava.eval.answer import Answered, Answerer
from llava.eval.auto_batch import AUTO
from llava.eval.flags import default_device
from llava.eval.prepare import Prepared
from llava.eval.questions import Question, make_uid
from llava.eval.throughput import Stopwatch
from llava.mm_utils import get_model_name_from_path, load_image
from llava.prompting import build_prompt, tokenize_prompt
from llava.reduction.plan import plan_from_flags
from llava.utils import Ranks

Visuals = Callable[[], Sequence[Image.Image]]
KEPT_BYTES = 2 << 30
"""Decoded pictures that are held in memory; others are asked of their document again."""
MAX_NEW_TOKENS = 1024
"""Where a task does not say: what the harness's own LLaVA takes."""


# ----------------------------------------------------------------------------- pictures
class Pictures:
    """Pictures by the hash of their pixels, as many in memory as `room` bytes hold."""

    def __init__(self, room: int = KEPT_BYTES) -> None:
        self.room = room
        self.held: dict[str, Image.Image] = {}
        self.sources: dict[str, tuple[Visuals, int]] = {}
        self.lock = threading.Lock()

    def add(self, pictures: Sequence[Image.Image], again: Visuals) -> tuple[str, ...]:
        """Names of a document's pictures; again: makes them once more."""
        return tuple(self._name(picture, again, i) for i, picture in enumerate(pictures))

    def _name(self, picture: Image.Image, again: Visuals, place: int) -> str:
        pixels = picture.tobytes()
        name = hashlib.sha1(f"{picture.size}".encode() + pixels).hexdigest()
        with self.lock:
            if name not in self.sources:
                self.sources[name] = again, place
                if len(pixels) <= self.room:
                    self.room -= len(pixels)
                    self.held[name] = picture
        return name

    def open(self, name: str) -> Image.Image:
        """The picture of a name that `add` gave."""
        if name in self.held:
            return self.held[name]
        again, place = self.sources[name]
        return again()[place]


def picture_of(visual: Any) -> Image.Image:
    """One of a document's visuals as RGB: a picture, or a path to one. ValueError for what is
    neither (videos, sounds)."""
    if isinstance(visual, Image.Image):
        return visual.convert("RGB")
    if isinstance(visual, str):
        return load_image(visual)
    raise ValueError(f"a task shows a {type(visual).__name__}; accepted: pictures")


# ----------------------------------------------------------------------------- generation
def read_generation(options: Mapping[str, Any]) -> tuple[Decoding, tuple[str, ...]]:
    """What a task's `generation_kwargs` ask for: decoding, and texts an answer ends in front of.

    Keys: max_new_tokens, temperature, do_sample, top_p, num_beams, until. The picture's form is the
    checkpoint's, so `image_aspect_ratio` is accepted and not read; `top_k` and `seed` mean nothing
    to a greedy answer. ValueError for a key or a value that would change answers and cannot be
    honoured.
    """
    said = {key: value for key, value in options.items() if value is not None}
    until = said.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    sample, temperature = said.pop("do_sample", None), said.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if sample else 0.0
    greedy = sample is False or float(temperature) == 0
    top_p, top_k = said.pop("top_p", None), said.pop("top_k", None)
    decoding = Decoding(
        int(said.pop("max_new_tokens", MAX_NEW_TOKENS)),
        0.0 if greedy else float(temperature),
        None if greedy or top_p is None else float(top_p),
        int(said.pop("num_beams", 1)),
    )
    said.pop("image_aspect_ratio", None)
    if greedy:
        said.pop("seed", None)
    elif top_k:
        said["top_k"] = top_k
    if said.get("repetition_penalty") == 1:
        del said["repetition_penalty"]
    if said:
        raise ValueError(
            f"generation_kwargs {said} cannot be honoured; accepted: max_new_tokens, temperature, "
            "do_sample, top_p, num_beams, until"
        )
    return decoding, tuple(text for text in until if text)


def cut_until(text: str, until: Iterable[str]) -> str:
    """The text in front of the first of `until` that stands in it."""
    places = [text.find(end) for end in until]
    return text[: min((place for place in places if place >= 0), default=len(text))].strip()


# ----------------------------------------------------------------------------- likelihoods
class Forced(LogitsProcessor):
    """Makes greedy search write given ids, and notes what the model thought of them.

    targets: ids of each row; behind them rows write `end`. One object serves one `generate`.
    """

    def __init__(self, targets: Sequence[Sequence[int]], end: int) -> None:
        width = max(map(len, targets))
        rows = [[*row, *[end] * (width - len(row))] for row in targets]
        self.targets = torch.tensor(rows)
        self.lengths = torch.tensor([len(row) for row in targets])
        self.end, self.step = end, 0
        self.loss = torch.zeros(len(targets), dtype=torch.float64)
        self.greedy = torch.ones(len(targets), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] whose argmax is the row's next id."""
        wanted = self.targets[:, self.step].to(scores.device)
        logs = torch.log_softmax(scores.float(), dim=-1)
        loss = -logs.gather(1, wanted[:, None])[:, 0]
        counts = self.step < self.lengths
        self.loss += torch.where(counts, loss.double().cpu(), 0.0)
        self.greedy &= (scores.argmax(dim=-1) == wanted).cpu() | ~counts
        self.step += 1
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, wanted[:, None], 0.0)

    def results(self) -> list[tuple[float, bool]]:
        """(mean loss, whether greedy search would have written it) of each row."""
        return list(zip((self.loss / self.lengths).tolist(), self.greedy.tolist(), strict=True))


class Scorer(Answerer):
    """An answerer that is told what to write. targets: uid -> ids; its records have `loss` and
    `greedy`."""

    targets: Mapping[str, Sequence[int]]
    forced: Forced

    def generate_options(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Greedy search with the targets forced."""
        targets = [self.targets[question.uid] for question in questions]
        self.forced = Forced(targets, next(iter(self.eos), 0))
        return {
            "max_new_tokens": max(map(len, targets)),
            "do_sample": False,
            "logits_processor": LogitsProcessorList([self.forced]),
        }

    def answer_batch(self, ready: Prepared, watch: Stopwatch, run_id: str) -> Answered:
        """One batch; see `Answerer`."""
        answered = super().answer_batch(ready, watch, run_id)
        for record, (loss, greedy) in zip(answered.records, self.forced.results(), strict=True):
            record.update(loss=loss, greedy=greedy)
        return answered


# ----------------------------------------------------------------------------- models
class Llava(lmms):
    """For the harness's simple requests: a text, and pictures in front of it."""

    is_simple = True
    options_place = 1
    """Where in a request's arguments its generation options stand."""

    def __init__(
        self,
        pretrained: str = "liuhaotian/llava-v1.5-7b",
        *,
        batch_size: int | str = 1,
        reduction: str | None = None,
        layer_list: str | None = None,
        image_token_ratio_list: str | None = None,
        conv_template: str | None = None,
        model_base: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        load_4bit: bool = False,
        load_8bit: bool = False,
        attn_implementation: str | None = None,
        image_aspect_ratio: str | None = None,
        vision_tower: str | None = None,
        share: bool = True,
        workers: int = 4,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        """The arguments of `--model_args`; conv_template: the checkpoint's by default. reduction: a
        plan with ";" between its pairs, or a plan's .json file; without one, the checkpoint's own.
        ValueError for unknown arguments, by name, and for what `Answerer` refuses."""
        super().__init__()
        if unknown:
            raise ValueError(_unknown(unknown))
        plan = plan_from_flags(*map(_unquoted, (reduction, layer_list, image_token_ratio_list)))
        size = str(batch_size)
        if size != AUTO and (not size.isdecimal() or int(size) < 1):
            raise ValueError(f"batch_size is {batch_size!r}; accepted: auto, 1 and more")
        from llava.model.builder import load_pretrained_model

        if device is None and device_map in (None, "none"):
            device = default_device(Ranks.from_environment())
        self._tokenizer, self._model, self._image_processor, self._max_length = (
            load_pretrained_model(
                pretrained, model_base, device=device, device_map=device_map, dtype=dtype,
                load_4bit=load_4bit, load_8bit=load_8bit, conv_mode=conv_template,
                attn_implementation=attn_implementation, reduction=plan,
                image_aspect_ratio=image_aspect_ratio, vision_tower=vision_tower,
            )
        )  # fmt: skip
        self.device = torch.device(self._model.device)
        self.batch_size, self.workers = AUTO if size == AUTO else int(size), workers
        self.pictures = Pictures()
        self.settings = {
            "conv_mode": conv_template,
            "reduction": plan,
            "batch_size": self.batch_size,
            "seed": seed,
            "share": share,
            "workers": workers,
            "model_id": get_model_name_from_path(str(pretrained)),
        }

    def clean(self) -> None:
        """Free the model; the harness calls it before tasks are scored."""
        self.pictures = Pictures()
        super().clean()

    # -- requests ----------------------------------------------------------------------
    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer for each request, in their order."""
        asked = self._questions(requests)
        groups: dict[Any, list[Question]] = {}
        for question, request in zip(asked, requests, strict=True):
            options = request.args[self.options_place]
            groups.setdefault(read_generation(options), []).append(question)
        found: dict[str, GenerationResult] = {}
        for (decoding, until), own in groups.items():
            for record in self._answerer(Answerer, decoding).answer_all(own, "lmms-eval"):
                counts = TokenCounts(output_tokens=record["n_out"])
                text = cut_until(record["text"], until)
                found[record["uid"]] = GenerationResult(text, counts)
        return [found[question.uid] for question in asked]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(mean loss, is greedy) for each request, as the text of a result: the harness turns bare
        tuples into text."""
        if any(len(request.args) != 6 for request in requests):
            raise ValueError("acc_mutual_info needs likelihoods without a question; ask for acc")
        asked = self._questions(requests)
        if not asked:
            return []
        scorer = self._answerer(Scorer, Decoding())
        scorer.targets = {
            question.uid: self._target(scorer, question, self._continuation(request))
            for question, request in zip(asked, requests, strict=True)
        }
        records = scorer.answer_all(asked, "lmms-eval")
        return [GenerationResult((record["loss"], record["greedy"])) for record in records]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not offered."""
        raise NotImplementedError("tasks of several rounds are not offered by llava's plug-in")

    # -- parts -------------------------------------------------------------------------
    def _document(self, request: Any) -> Any:
        place, task, split = request.args[-3:]
        return self.task_dict[task][split][place]

    def _shown(self, request: Any) -> tuple[str, list[Image.Image]]:
        """The user's turn, with `<image>` marks where pictures do not stand in front; and the
        pictures."""
        text, _, doc_to_visual = request.args[:3]
        found = None if doc_to_visual is None else doc_to_visual(self._document(request))
        return text, [picture_of(each) for each in found or ()]

    def _continuation(self, request: Any) -> str:
        wanted = request.args[1]
        return wanted if isinstance(wanted, str) else wanted(self._document(request))

    def _questions(self, requests: Sequence[Any]) -> list[Question]:
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            return list(pool.map(self._question, range(len(requests)), requests))

    def _question(self, number: int, request: Any) -> Question:
        text, pictures = self._shown(request)
        names = self.pictures.add(pictures, lambda: self._shown(request)[1])
        place, task, _ = request.args[-3:]
        uid = make_uid(str(task), number, str(place), text)
        return Question(uid, str(place), text, names)

    def _answerer(self, kind: type[Answerer], decoding: Decoding) -> Any:
        return kind(
            self._model, self._tokenizer, self._image_processor, decoding=decoding,
            open_picture=self.pictures.open, **self.settings,
        )  # fmt: skip

    def _target(self, scorer: Answerer, question: Question, continuation: str) -> list[int]:
        """Ids of a continuation and of what ends the turn behind it."""
        start_end = getattr(self._model.config, "mm_use_im_start_end", False)
        opened, closed = (
            tokenize_prompt(
                build_prompt(
                    question.text, scorer.conv_mode, len(question.images), start_end,
                    self._tokenizer, answer,
                ),
                self._tokenizer,
            )
            for answer in (None, continuation.strip())
        )  # fmt: skip
        if closed[: len(opened)] != opened or len(closed) == len(opened):
            raise ValueError(
                f"the tokens of {continuation!r} run into those of the prompt under the template "
                f"{scorer.conv_mode!r}: its likelihood cannot be told apart"
            )
        return cut_at_eos(closed[len(opened) :], scorer.eos)[0]


class LlavaChat(Llava):
    """For the harness's messages: texts and pictures in the order of one user's turn."""

    is_simple = False
    options_place = 2

    def _shown(self, request: Any) -> tuple[str, list[Image.Image]]:
        parts = parts_of(request.args[1](self._document(request)))
        pictures = [picture_of(content) for kind, content in parts if kind == "image"]
        return marked_text(parts), pictures


def parts_of(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """("image" or "text", content) of what a user's only turn is made of. ValueError for other
    turns and other media."""
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise ValueError(f"a task gives turns of {roles}; accepted: one of the user")
    content = messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    strange = {part["type"] for part in parts} - {"text", "image"}
    if strange:
        raise ValueError(f"a task shows {', '.join(sorted(strange))}; accepted: text, image")
    return [(part["type"], part["text" if part["type"] == "text" else "url"]) for part in parts]


def marked_text(parts: Sequence[tuple[str, Any]]) -> str:
    """The text of a turn, with `<image>` marks unless its pictures stand in front of it, or the
    text has marks of its own."""
    kinds = [kind for kind, _ in parts]
    texts = [content for kind, content in parts if kind == "text"]
    in_front = kinds == sorted(kinds)  # "image" before "text"
    if in_front or any(DEFAULT_IMAGE_TOKEN in text for text in texts):
        return "\n".join(texts)
    return "\n".join(DEFAULT_IMAGE_TOKEN if kind == "image" else it for kind, it in parts)


def _unquoted(value: Any) -> Any:
    """A value of --model_args without the quotes that keep its commas together."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value


def _unknown(arguments: Mapping[str, Any]) -> str:
    names = Llava.__init__.__kwdefaults__
    return (
        f"model_args has unknown {', '.join(arguments)}; accepted: pretrained, {', '.join(names)}. "
        'Inside a plan write ";" for ",": reduction=fastv:k=2;r=0.5'
    )
