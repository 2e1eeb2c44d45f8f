"""The host's part of a batch, done in threads ahead of the model.

Special here: pictures are opened, cut to tiles and normalised, prompts tokenised, and everything
that the host knows about the batch worked out (`Splicer`), while the model still answers earlier
batches; decoding and resizing release Python's lock. Questions about one picture are split into
what their prompts have in common and their own ids, when the plan lets them share layers.

    prepare = Preparer.of(model, tokenizer, image_processor, conv_mode="vicuna_v1", plan=plan)
    for batch in ahead(prepare, batches, questions, workers=4): ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.batches import Batch, common_prefix
from llava.eval.questions import Question
from llava.mm_utils import (
    check_context,
    count_visual_tokens,
    crop_side,
    image_size,
    load_image,
    load_image_from_base64,
    process_images,
)
from llava.model.multimodal_prep import Picture, Splice, Splicer, tile_counts
from llava.model.shared_prefix import needs_whole_prompts
from llava.prompting import (
    blind_image,
    build_prompt,
    pad_ids,
    pad_texts,
    pad_token_id,
    side_texts,
    tokenize_prompt,
)
from llava.reduction import ReductionPlan
from llava.reduction.base import check_texts
from llava.sequence import Layout


@dataclass(frozen=True)
class Prepared:
    """A batch on the CPU. questions: in the order of the rows. layout: of the whole prompts, left-
    padded. images, ids and splice: what `build_sequence` takes; with `shared` the ids are those of
    the prefixes, one row a picture."""

    batch: Batch
    questions: tuple[Question, ...]
    layout: Layout
    ids: Tensor
    images: Any
    splice: Splice
    shared: Shared | None

    @property
    def tiles(self) -> int:
        """Tiles that the tower sees."""
        return sum(count or 1 for count in tile_counts(self.images))


@dataclass(frozen=True)
class Shared:
    """What stands behind the prefixes. ids, mask [B, L]: padded on the right. counts: questions of
    each prefix."""

    ids: Tensor
    mask: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Preparer:
    """Makes batches ready. share: whether questions about one picture share their prefix.
    open_picture: where pictures come from if not from files below `image_folder`."""

    tokenizer: Any
    image_processor: Any
    config: Any
    splicer: Splicer
    conv_mode: str
    plan: ReductionPlan
    image_folder: Path
    blind: bool
    share: bool
    open_picture: Callable[[str], Image.Image] | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        *,
        conv_mode: str,
        plan: ReductionPlan,
        image_folder: str | Path = "",
        blind: bool = False,
        share: bool = True,
        open_picture: Callable[[str], Image.Image] | None = None,
    ) -> Preparer:
        """For a loaded model. A plan without a layer to share gets whole prompts."""
        splicer = model.splicer
        depth = plan.shared_depth(model.config.num_hidden_layers)
        share = share and depth > 0 and needs_whole_prompts(plan) is None
        return cls(
            tokenizer, image_processor, model.config, splicer, conv_mode, plan,
            Path(image_folder), blind, share, open_picture,
        )  # fmt: skip

    def visual_tokens(self, question: Question) -> int:
        """Visual tokens of a question's pictures. Only tiled pictures need a look at the file."""
        if not question.images:
            return 0
        if getattr(self.config, "image_aspect_ratio", None) != "anyres":
            return self.splicer.patches_per_tile * len(question.images)
        sizes = [self._size(image) for image in question.images]
        tile = crop_side(self.image_processor)
        return sum(count_visual_tokens(sizes, self.config, tile, self.splicer.side))

    def __call__(self, batch: Batch, questions: Sequence[Question]) -> Prepared:
        """Raises ValueError naming the question whose prompt does not fit, and for a damaged
        picture; FileNotFoundError for one that is gone."""
        units = [[questions[place] for place in own] for own in batch.pictures]
        rows = tuple(question for own in units for question in own)
        pictures = [[self._open(image) for image in own[0].images] for own in units]
        prompts = [self._prompt(question) for question in rows]
        ids = [tokenize_prompt(prompt, self.tokenizer) for prompt in prompts]
        images = self._pixels([picture for own in pictures for picture in own])
        sizes = [picture.size for own in pictures for picture in own]
        fields = self.splicer.pictures(tile_counts(images), sizes or None)
        index: list[list[int]] = []  # the pictures of each row
        first = 0
        for own, shown in zip(units, pictures, strict=True):
            index += [list(range(first, first + len(shown)))] * len(own)
            first += len(shown)
        for question, row, shown in zip(rows, ids, index, strict=True):
            self._check_length(question, row, [len(fields[i]) for i in shown])
        heads = self._heads(units, ids)
        if heads is not None:
            return self._shared(batch, rows, ids, heads, images, fields)
        texts = None
        if self.plan.texts and getattr(self.tokenizer, "is_fast", False):
            found = [side_texts(prompt, self.tokenizer) for prompt in prompts]
            for question, own in zip(rows, found, strict=True):
                self._check_texts(question, own)
            texts = {name: value.numpy() for name, value in pad_texts(found).items()}
        flat = [i for shown in index for i in shown]
        padded_ids, splice = self._splice(ids, fields, flat, texts)
        return Prepared(batch, rows, splice.layout, padded_ids, images, splice, None)

    def _heads(self, units: list[list[Question]], ids: list[list[int]]) -> list[int] | None:
        """Ids that the questions of each picture have in common; None when nothing is shared, or a
        picture does not lie in what is common."""
        if not self.share or all(len(own) == 1 for own in units):
            return None
        heads, row = [], 0
        for own in units:
            rows = ids[row : row + len(own)]
            head = common_prefix(rows)
            if IMAGE_TOKEN_INDEX in rows[0][head:] or head == 0:
                return None
            heads.append(head)
            row += len(own)
        return heads

    def _shared(
        self,
        batch: Batch,
        rows: tuple[Question, ...],
        ids: list[list[int]],
        heads: list[int],
        images: Any,
        fields: list[Picture],
    ) -> Prepared:
        counts = tuple(len(own) for own in batch.pictures)
        owners = [unit for unit, count in enumerate(counts) for _ in range(count)]
        starts = [sum(counts[:unit]) for unit in range(len(counts))]
        prefixes = [ids[start][:head] for start, head in zip(starts, heads, strict=True)]
        tails = [row[heads[owner] :] for row, owner in zip(ids, owners, strict=True)]
        prefix_ids, splice = self._splice(prefixes, fields, None, None)
        tail_ids, mask = pad_ids(tails, pad_token_id(self.tokenizer), "right")
        lengths = tuple(map(len, tails))
        behind = Layout(lengths, (), (1,) * len(rows), "right")
        layout, _ = splice.layout.take(owners).append(behind)
        shared = Shared(tail_ids, mask, counts)
        return Prepared(batch, rows, layout, prefix_ids, images, splice, shared)

    def _splice(
        self,
        ids: list[list[int]],
        fields: list[Picture],
        index: list[int] | None,
        texts: Any,
    ) -> tuple[Tensor, Splice]:
        """Left-padded ids and where everything in them goes."""
        padded, mask = pad_ids(ids, pad_token_id(self.tokenizer), "left")
        rows, real = padded.numpy(), mask.bool().numpy()
        return padded, self.splicer(rows, real, None, fields, "left", texts, index)

    def _prompt(self, question: Question) -> str:
        start_end = getattr(self.config, "mm_use_im_start_end", False)
        return build_prompt(
            question.text, self.conv_mode, len(question.images), start_end, self.tokenizer
        )

    def _size(self, image: str) -> tuple[int, int]:
        """(width, height) of a picture; files are not decoded for it."""
        if self.open_picture is None and not image.startswith("data:"):
            return image_size(self.image_folder / image)
        return self._open(image).size

    def _open(self, image: str) -> Image.Image:
        """A picture, or what stands for it in a blind run."""
        if self.open_picture is not None:
            picture = self.open_picture(image)
        elif image.startswith("data:"):
            picture = load_image_from_base64(image.partition(",")[2])
        else:
            picture = load_image(self.image_folder / image)
        return blind_image(picture.size, self.image_processor) if self.blind else picture

    def _pixels(self, pictures: list[Image.Image]) -> Any:
        if not pictures:
            return None
        pixels = process_images(pictures, self.image_processor, self.config)
        # Anyres pictures go in as a list, so that equal and unequal numbers of tiles look alike.
        stacked = isinstance(pixels, Tensor) and pixels.ndim == 4
        return pixels if stacked else list(pixels)

    def _check_texts(self, question: Question, texts: dict[str, list[int]]) -> None:
        try:
            check_texts(self.plan.texts if question.images else (), texts)
        except ValueError as err:
            raise ValueError(f"question {question.question_id!r} {err}") from err

    def _check_length(self, question: Question, ids: list[int], counts: list[int]) -> None:
        try:
            check_context(ids, counts, self.splicer.max_length)
        except ValueError as err:
            raise ValueError(f"question {question.question_id!r}: {err}") from err


def ahead(
    prepare: Preparer, batches: Iterable[Batch], questions: Sequence[Question], workers: int
) -> Iterator[Prepared]:
    """Prepared batches in their order, `workers` threads ahead; 0 prepares in the caller's own."""
    if workers < 1:
        for batch in batches:
            yield prepare(batch, questions)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prepare")
    pending: deque[Future[Prepared]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(prepare, batch, questions))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def to_device(images: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Pixels, stacked or listed, on the device."""
    if images is None:
        return None
    if isinstance(images, Tensor):
        return images.to(device, dtype, non_blocking=True)
    return [image.to(device, dtype, non_blocking=True) for image in images]
