"""LLaVA's training files -> samples -> padded batches.

Special here: everything that a batch will become is known on the host before a model sees it. The
visual tokens of a picture are counted from its size, a sample that is too long is cut so that no
picture is kept in part and no question without its answer, and every complaint names the sample.
A batch may mix text-only, one-image and many-image samples; the mask comes from true lengths, so a
pad id inside the text stays text. The files themselves are read in records.py.
``python -m llava.train.train --dry_run_data 5 ...`` shows what samples teach.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.mm_utils import (
    Fitted,
    count_visual_tokens,
    crop_side,
    image_size,
    load_image,
    process_images,
    truncate_to_context,
)
from llava.model.multimodal_prep import Splicer, tile_counts
from llava.prompting import pad_texts
from llava.reduction.base import Signal, check_texts
from llava.train.preprocess import Encoded, LabelMode, first_turn_texts, preprocess
from llava.train.records import Records, image_names
from llava.utils import get_logger

logger = get_logger(__name__)

IMAGE_LENGTH = 128
"""What a picture counts in the sampler's word counts (LLaVA's figure)."""
MAX_WARNINGS = 10


# ------------------------------------------------------------------------------------------ images
@dataclasses.dataclass
class ImageReader:
    """Opens and processes the pictures of a sample.

    `image_processor` and `model_cfg` are the tower's and the model's (aspect ratio, pinpoints,
    merge type); `patches_per_side` is the tower's. `cache_mb` > 0 keeps processed pixels in the
    memory of this process until that much is used (for small data that is read many times).
    """

    image_processor: Any
    model_cfg: Any
    patches_per_side: int
    folder: str = ""
    cache_mb: int = 0
    _cache: dict[str, tuple[torch.Tensor, tuple[int, int]]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    _cached_bytes: int = dataclasses.field(default=0, init=False, repr=False)

    def __call__(self, name: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Pixels ([3, H, W], or [tiles, 3, H, W] for anyres) and (width, height) of a picture.

        Raises ValueError or FileNotFoundError, naming the file, for one that cannot be read.
        """
        if name in self._cache:
            return self._cache[name]
        image = load_image(os.path.join(self.folder, name))
        pixels = process_images([image], self.image_processor, self.model_cfg)[0]
        found = (pixels, image.size)
        size = pixels.numel() * pixels.element_size()
        if self._cached_bytes + size <= self.cache_mb * 2**20:
            self._cache[name] = found
            self._cached_bytes += size
        return found

    def sizes(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """(width, height) of pictures as far as `visual_tokens` needs them: only tiled pictures are
        looked at, in their headers. Raises as `image_size`."""
        if getattr(self.model_cfg, "image_aspect_ratio", None) != "anyres":
            return [(0, 0)] * len(names)
        return [image_size(os.path.join(self.folder, name)) for name in names]

    def visual_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Visual tokens of pictures of these (width, height)."""
        side = self.patches_per_side
        counts = count_visual_tokens(sizes, self.model_cfg, crop_side(self.image_processor), side)
        if getattr(self.model_cfg, "mm_vision_select_feature", "patch") != "cls_patch":
            return counts
        return [count + count // side**2 for count in counts]  # a class token a tile


# ----------------------------------------------------------------------------------------- dataset
class Measured(NamedTuple):
    """Tokens that a sample brings into the model, and how many are cut off before."""

    text: int
    visual: int
    cut: int


class LazySupervisedDataset(Dataset):
    """Samples of a training file; pictures are opened and text is tokenised on access.

    `__getitem__` returns a dict of ``input_ids`` and ``labels`` (lists), ``images`` (list of
    tensors), ``image_sizes`` (list of (width, height)) and ``index`` (its own, for `describe`).
    Raises ValueError, naming the sample,
    for anything that cannot be trained on; with `skip_bad_samples` the next sample takes its
    place, with a warning (with `token_lengths`, the tokens of each sample, the next that is not
    longer). `cache_text` keeps ids and labels in memory. `texts` are what the plan
    compares pictures with (`ReductionPlan.texts`); a sample then also has ``texts``, ids by name.
    """

    def __init__(
        self,
        records: Records | Sequence[Mapping[str, Any]],
        tokenizer: Any,
        conv: Conversation,
        *,
        reader: ImageReader | None = None,
        max_length: int = 2048,
        label_mode: LabelMode = "segments",
        use_im_start_end: bool = False,
        cache_text: bool = False,
        skip_bad_samples: bool = False,
        texts: Sequence[Signal] = (),
    ) -> None:
        self.records = records if isinstance(records, Records) else Records.of(records)
        self.tokenizer = tokenizer
        self.conv = conv
        self.reader = reader
        self.max_length = max_length
        self.label_mode: LabelMode = label_mode
        self.use_im_start_end = use_im_start_end
        self.skip_bad_samples = skip_bad_samples
        self.texts = texts
        self.token_lengths: np.ndarray | None = None
        self._text: dict[int, Encoded] | None = {} if cache_text else None
        self._warnings: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.records)

    # -- lengths for the sampler -------------------------------------------------------------------
    @property
    def modality_lengths(self) -> list[int]:
        """Words of each sample (at least 1), negative for text-only ones (LLaVA's counts)."""
        words = np.maximum(self.records.words, 1)
        return np.where(self.records.pictured, words, -words).tolist()

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, a picture counting as 128."""
        return (self.records.words + IMAGE_LENGTH * self.records.pictured).tolist()

    # -- samples -----------------------------------------------------------------------------------
    def describe(self, index: int) -> str:
        """How messages name a sample: file, position and its id."""
        place = self.records.place(index)
        return f"{place.name}, sample {place.number} (id {self.records[index].get('id', '-')})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            at = (index + step) % len(self)
            if step and not self._may_replace(index, at):
                continue
            try:
                return self._sample(at)
            except (ValueError, OSError) as error:
                message = f"{self.describe(at)}: {error}"
                if not self.skip_bad_samples:
                    raise ValueError(message) from error
                self._warn("bad", f"skipped: {message}")
        raise ValueError("not one sample can be trained on")

    def _may_replace(self, index: int, other: int) -> bool:
        lengths = self.token_lengths
        return lengths is None or 0 < lengths[other] <= lengths[index]

    def _sample(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        names = self._pictures(index, record)
        pictures = [self.reader(name) for name in names] if self.reader else []
        encoded, fitted, _ = self._fit(index, record, [size for _, size in pictures])
        if fitted.cut:
            self._warn(
                "cut",
                f"{self.describe(index)}: {fitted.cut} of its tokens are cut off to fit "
                f"--model_max_length {self.max_length}",
            )
        kept = pictures[: fitted.images]
        sample = {
            "input_ids": fitted.ids,
            "labels": fitted.labels,
            "images": [pixels for pixels, _ in kept],
            "image_sizes": [size for _, size in kept],
            "index": index,
        }
        if self.texts:
            sample["texts"] = encoded.texts
            check_texts(self.texts if kept else (), encoded.texts)
        return sample

    def measure(self, index: int) -> Measured:
        """Tokens of a sample, without opening a picture beyond its header. Raises ValueError or
        OSError for one that cannot be trained on."""
        record = self.records[index]
        names = self._pictures(index, record)
        sizes = self.reader.sizes(names) if self.reader else []
        _, fitted, counts = self._fit(index, record, sizes)
        text = len(fitted.ids) - fitted.images
        return Measured(text, sum(counts[: fitted.images]), fitted.cut)

    def with_max_length(self, max_length: int) -> LazySupervisedDataset:
        """The same samples under another limit, nothing kept in memory."""
        other = copy.copy(self)
        other.max_length, other._text = max_length, None
        return other

    def _fit(
        self, index: int, record: dict[str, Any], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Encoded, Fitted, list[int]]:
        """Ids and labels of a sample whose pictures have these sizes, whole and cut to the context;
        and the visual tokens of each picture."""
        encoded = self._encode(index, record, len(sizes))
        counts = self.reader.visual_tokens(sizes) if self.reader else []
        fitted = truncate_to_context(encoded.input_ids, encoded.labels, counts, self.max_length)
        return encoded, fitted, counts

    def _pictures(self, index: int, record: Mapping[str, Any]) -> list[str]:
        """The picture files of a record, from the folder that its data file comes with."""
        names = image_names(record)
        if names and self.reader is None:
            raise ValueError(
                f"has an image ({names[0]}) but the run has no vision tower: give --vision_tower"
            )
        folder = self.records.image_folder(index)
        return [os.path.join(folder or "", name) for name in names]

    def _encode(self, index: int, record: dict[str, Any], n_images: int) -> Encoded:
        if self._text is not None and index in self._text:
            return self._text[index]
        if "conversations" not in record:
            raise ValueError(f"has no 'conversations' (its keys: {', '.join(record)})")
        encoded = preprocess(
            record["conversations"],
            self.tokenizer,
            self.conv,
            n_images=n_images,
            use_im_start_end=self.use_im_start_end,
            label_mode=self.label_mode,
        )
        if encoded.warning:
            self._warn("mismatch", f"{self.describe(index)}: {encoded.warning}")
        elif encoded.n_targets == 0:
            raise ValueError("has nothing to learn: its answers are empty")
        if any(name != "all" for signal in self.texts for name in signal.alternatives):
            texts = first_turn_texts(
                record["conversations"],
                self.tokenizer,
                self.conv,
                n_images=n_images,
                use_im_start_end=self.use_im_start_end,
            )
            encoded = dataclasses.replace(encoded, texts=texts)
        if self._text is not None:
            self._text[index] = encoded
        return encoded

    def _warn(self, kind: str, message: str) -> None:
        seen = self._warnings[kind] = self._warnings.get(kind, 0) + 1
        if seen <= MAX_WARNINGS:
            logger.warning(message)
        if seen == MAX_WARNINGS:
            logger.warning("further warnings of this kind are not shown")


# ---------------------------------------------------------------------------------------- collator
@dataclasses.dataclass(frozen=True)
class Collator:
    """Samples -> one batch.

    Returns input_ids, labels and attention_mask [B, L], padded on the right; images (a tensor
    [n, 3, H, W] if all pictures have one shape, else a list; absent when there is none) and
    image_sizes, one entry a picture in the order of the batch; with a `splicer` (of the model) also
    `splice`: where every token of the batch will stand, padded or `packed`, so that the forward
    pass reads nothing back from the device; and ``ids``, which samples these are (the trainer takes
    them out again). Texts that the plan compares with are in `splice`,
    without a splicer in `texts`.
    """

    pad_token_id: int
    splicer: Splicer | None = None
    packed: bool = False

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        shape = (len(samples), max(lengths))
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        mask = np.zeros(shape, dtype=bool)
        for row, sample in enumerate(samples):
            ids[row, : lengths[row]] = sample["input_ids"]
            labels[row, : lengths[row]] = sample["labels"]
            mask[row, : lengths[row]] = True
        images = [pixels for sample in samples for pixels in sample["images"]]
        sizes = [size for sample in samples for size in sample["image_sizes"]]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
        }
        if images:
            same = all(pixels.shape == images[0].shape for pixels in images)
            batch["images"] = torch.stack(images) if same else images
            batch["image_sizes"] = sizes
        if all("index" in sample for sample in samples):
            batch["ids"] = [sample["index"] for sample in samples]
        texts = pad_texts([sample.get("texts", {}) for sample in samples])
        if texts and self.splicer is None:
            batch["texts"] = texts
        if self.splicer is not None:
            pictures = self.splicer.pictures(tile_counts(batch.get("images")), sizes or None)
            kind = "packed" if self.packed else "right"
            arrays = {name: rows.numpy() for name, rows in texts.items()}
            batch["splice"] = self.splicer(ids, mask, labels, pictures, kind, arrays)
        return batch


def check_first_samples(dataset: LazySupervisedDataset, count: int = 4) -> None:
    """Read the first samples now, so that a wrong folder or format ends a run before it starts."""
    for index in range(min(count, len(dataset))):
        dataset[index]


def check_max_length(max_length: int, visual_tokens: int) -> None:
    """ValueError unless a picture and some text fit into `max_length`."""
    if visual_tokens >= max_length:
        raise ValueError(
            f"--model_max_length {max_length} cannot hold a picture of {visual_tokens} visual "
            f"tokens and text; give more than {visual_tokens}"
        )


def supervised_text(sample: dict[str, Any], decode: Callable[[list[int]], str]) -> list[str]:
    """The stretches of a sample that are learned, decoded (for looking at data)."""
    spans: list[list[int]] = []
    open_span = False
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        learned = label != IGNORE_INDEX and token != IMAGE_TOKEN_INDEX
        if learned and not open_span:
            spans.append([])
        if learned:
            spans[-1].append(token)
        open_span = learned
    return [decode(span) for span in spans]
