"""From a question and pictures to what a model takes: the one path for evaluation and serving.

Special here: a batch may mix samples without, with one and with many pictures; ids are padded on
either side and the attention mask alone says where; pictures stay in the order of their marks.
A sample without a picture brings none: what the tower needs in that case is the model's business.

    prompt = build_prompt("What is shown?", "vicuna_v1")
    batch = prepare_batch(tokenizer, image_processor, model.config, [prompt], [picture])
    model.generate(inputs=batch.pop("input_ids"), **batch, max_new_tokens=16)

Methods that compare pictures with words (Simignore) need to know which words of the prompt are the
question and which are its answer options: `side_texts` finds them by their place in the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)
from llava.conversation import get_conversation
from llava.mm_utils import (
    check_image_marks,
    process_images,
    token_spans,
    tokenizer_image_token,
)
from llava.side_text import find_options

Pictures = Image.Image | Sequence[Image.Image] | None
Turn = Mapping[str, str] | Sequence[Any]
TEXTS = ("question", "options", "option_words")
"""What `side_texts` finds; a method may also ask for "all", the whole prompt."""
STAND_IN = "\ue000"
"""Stands for a text whose place in a prompt is asked for."""
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")


class Prompt(str):
    """A finished prompt that remembers where its last question stands: prompt[start:stop]."""

    question: tuple[int, int] | None = None


def build_prompt(
    question: str | Sequence[Turn],
    conv_mode: str,
    images: int = 1,
    mm_use_im_start_end: bool = False,
    tokenizer: Any = None,
    answer: str | None = None,
) -> Prompt:
    """The prompt of a question, or of a dialogue that ends with one, open for the answer.

    question: the user's text, or turns `{"role": "user", "content": text}` (LLaVA's
    `{"from": "human", "value": text}` and `(role, text)` too), user first, in alternation.
    `<image>` marks in the text stay where they are and must be `images` many; if there are none,
    `images` of them are put in front of the first question, each on a line of its own.
    tokenizer: asked for its chat template by the Llama-3 template only. answer: written behind
    the question, with what ends a turn.
    Raises ValueError for an unknown template, roles out of order, or a wrong number of marks.
    """
    conv = get_conversation(conv_mode)
    conv.tokenizer = tokenizer
    texts = [question] if isinstance(question, str) else _dialogue(question)
    marks = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in texts)
    if marks == 0:
        texts[0] = f"{DEFAULT_IMAGE_TOKEN}\n" * images + texts[0]
    else:
        check_image_marks(marks, images, "the question")
    if mm_use_im_start_end:
        wrapped = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        texts = [text.replace(DEFAULT_IMAGE_TOKEN, wrapped) for text in texts]
    prompt = Prompt(_written(conv, texts, answer))
    prompt.question = text_place(prompt, _written(conv, [*texts[:-1], STAND_IN], answer))
    return prompt


def _written(conv: Any, texts: Sequence[str], answer: str | None = None) -> str:
    """The template's prompt of alternating texts, open for the next answer or closed by one."""
    conv.messages = []
    for i, text in enumerate(texts):
        conv.append_message(conv.roles[i % 2], text)
    conv.append_message(conv.roles[1], answer)
    return conv.get_prompt()


def text_place(prompt: str, with_stand_in: str) -> tuple[int, int] | None:
    """Where a text stands in a prompt, from the same prompt with STAND_IN in its place; None for a
    template that does not write it."""
    before, mark, behind = with_stand_in.partition(STAND_IN)
    if not mark or not (prompt.startswith(before) and prompt.endswith(behind)):
        return None
    return len(before), len(prompt) - len(behind)


def _dialogue(turns: Sequence[Turn]) -> list[str]:
    """Texts of turns that alternate, begin and end with the user."""
    texts = []
    for i, turn in enumerate(turns):
        if isinstance(turn, Mapping):
            role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        else:
            role, text = turn
        accepted = _ASSISTANT if i % 2 else _USER
        if str(role).lower() not in accepted or not isinstance(text, str):
            raise ValueError(
                f"turn {i} is of {role!r} with a {type(text).__name__}; accepted: a text of "
                f"{' or '.join(accepted)}"
            )
        texts.append(text)
    if len(texts) % 2 == 0:
        raise ValueError(f"a dialogue of {len(texts)} turns has no open question at its end")
    return texts


def tokenize_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Ids of a prompt with one -200 a picture and exactly one BOS, where the tokenizer has one."""
    return tokenizer_image_token(without_bos(prompt, tokenizer), tokenizer)


def without_bos(prompt: str, tokenizer: Any) -> str:
    """The prompt without the BOS that a Llama-3 template writes into the text, if the tokenizer
    puts one in front by itself."""
    bos = getattr(tokenizer, "bos_token", None)
    if bos and prompt.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return prompt[len(bos) :]
    return prompt


def prepare_batch(
    tokenizer: Any,
    image_processor: Any,
    model_config: Any,
    prompts: Sequence[str],
    images: Sequence[Pictures],
    padding_side: Literal["left", "right"] = "left",
) -> dict[str, Any]:
    """Model inputs of a batch, on the CPU.

    prompts: B finished prompts; images: for each of them a picture, a list of pictures or None.
    Returns `input_ids` [B, L] and `attention_mask` [B, L] (padded on `padding_side`), `images`
    ([N, 3, H, W], or a list of [T, 3, H, W] for anyres; None if the batch has no picture),
    `image_sizes`, the (width, height) of the N pictures before preparation, or None, and `texts`,
    what methods may compare pictures with (`side_texts`; None for a slow tokenizer).
    Raises ValueError if a prompt's marks and pictures differ in number.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; accepted: 'left', 'right'")
    if not prompts or len(prompts) != len(images):
        raise ValueError(
            f"a batch needs as many prompts as entries of images, and at least one; got "
            f"{len(prompts)} and {len(images)}"
        )
    pictures = []
    for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        own = [] if own is None else [own] if isinstance(own, Image.Image) else list(own)
        check_image_marks(prompt.count(DEFAULT_IMAGE_TOKEN), len(own), f"prompt {i} of the batch")
        pictures.extend(own)
    ids = [tokenize_prompt(prompt, tokenizer) for prompt in prompts]
    input_ids, attention_mask = pad_ids(ids, pad_token_id(tokenizer), padding_side)
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "images": None,
        "image_sizes": None,
        "texts": None,
    }
    if getattr(tokenizer, "is_fast", False):
        batch["texts"] = pad_texts([side_texts(prompt, tokenizer) for prompt in prompts])
    if pictures:
        pixels = process_images(pictures, image_processor, model_config)
        # Anyres pictures go in as a list, so that equal and unequal numbers of tiles look alike.
        stacked = isinstance(pixels, torch.Tensor) and pixels.ndim == 4
        batch["images"] = pixels if stacked else list(pixels)
        batch["image_sizes"] = [picture.size for picture in pictures]
    return batch


def questions_batch(
    tokenizer: Any,
    image_processor: Any,
    model_config: Any,
    conv_mode: str,
    questions: Sequence[tuple[str | Sequence[Turn], Sequence[Image.Image]]],
) -> dict[str, Any]:
    """`prepare_batch` of questions as they are asked in evaluation: (text or turns, pictures)."""
    start_end = getattr(model_config, "mm_use_im_start_end", False)
    prompts = [
        build_prompt(text, conv_mode, len(pictures), start_end, tokenizer)
        for text, pictures in questions
    ]
    pictures = [list(own) for _, own in questions]
    return prepare_batch(tokenizer, image_processor, model_config, prompts, pictures)


def pad_ids(
    ids: Sequence[Sequence[int]], pad_id: int, padding_side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as two long tensors [B, L]: the ids, padded, and the mask of real ones."""
    width = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), width), dtype=torch.long)
    for i, row in enumerate(ids):
        columns = slice(width - len(row), width) if padding_side == "left" else slice(len(row))
        input_ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    return input_ids, mask


def side_texts(
    prompt: str, tokenizer: Any, question: tuple[int, int] | None = None
) -> dict[str, list[int]]:
    """Ids of the texts that a method may compare a prompt's pictures with, [] for one it lacks.

    question: the user's last turn, instructions included, without marks and template words; its
    place is `question`, else the prompt's own. options: the block of answer options in it (in the
    whole prompt where no question is known), heading and letters included. option_words: BOS and
    the options without their letters, tokenised by themselves (Simignore's 7B form; these ids are
    not in the prompt). White space counts for nothing.
    """
    question = getattr(prompt, "question", None) if question is None else question
    spans = token_spans(prompt, tokenizer)
    words = str(prompt)
    for mark in (DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN):
        words = words.replace(mark, " " * len(mark))

    def ids_of(start: int, stop: int) -> list[int]:
        return [
            token
            for token, first, last in spans
            if words[max(first, start) : min(last, stop)].strip()
        ]

    texts: dict[str, list[int]] = {name: [] for name in TEXTS}
    start, stop = (0, len(prompt)) if question is None else question
    if question is not None:
        texts["question"] = ids_of(start, stop)
    options = find_options(words[start:stop])
    if options is not None:
        texts["options"] = ids_of(start + options.start, start + options.stop)
        texts["option_words"] = list(tokenizer(" ".join(options.words)).input_ids)
    return texts


def pad_texts(samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """The texts of a batch by name, long [B, T], -1 behind the end of each."""
    padded = {}
    for name in samples[0]:
        rows = [sample[name] for sample in samples]
        padded[name] = torch.full((len(rows), max(1, *map(len, rows))), -1, dtype=torch.long)
        for row, ids in zip(padded[name], rows, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills rows: the tokenizer's pad, else its end of text, else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def move_batch(batch: Mapping[str, Any], device: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """The batch on a device; pixels also in `dtype`. Other entries are left as they are."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            wanted = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=wanted)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [move(item) for item in value]
        return value

    return {key: move(value) for key, value in batch.items()}


def blind_image(size: tuple[int, int], image_processor: Any) -> Image.Image:
    """A grey picture of this (width, height): what a model answers without seeing anything.

    The grey is the processor's mean colour, which normalising turns into zeros (to rounding).
    """
    return Image.new("RGB", size, tuple(round(255 * x) for x in image_processor.image_mean))
