"""Pictures to pixel tensors, `<image>` marks to token ids, and the geometry of anyres tiles.

Special here: everything that says *how many* visual tokens a picture becomes is host arithmetic on
its size (`unpad_slices`, `anyres_token_grid`, `count_visual_tokens`), so that plans and batches can
be laid out before any tensor exists. Sizes of pictures are (width, height) as in PIL; grids of
patches are (rows, columns). Sources: LLaVA-1.5 and LLaVA-NeXT `mm_utils.py` and `unpad_image`,
whose names are kept because other projects import them from here. Checked against recorded pixels,
ids and 400 picture sizes by tests/parity/preprocess_cases.py.

Shape suffixes: T tiles, C channels, H height, W width, B batch.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.scaling import resize_padded
from llava.utils import get_logger

logger = get_logger(__name__)

Size = tuple[int, int]
Rounding = Literal["llava", "transformers"]
ASPECT_RATIOS = (None, "square", "pad", "anyres")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
EXTREME_RATIO = 24
"""Longer side over the shorter one from which on a picture is warned of: padded to CLIP-L/336's
square of 24 x 24 patches it is thinner than one of them."""
MOST_PIXELS = 2 * 89_478_485
"""Pixels to which a picture is scaled at most: as many as Pillow opens."""
MAX_WARNINGS = 10


# --- files ---------------------------------------------------------------------------------------
def load_image(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, as RGB.

    As in LLaVA the EXIF orientation is not applied: pixels are taken as they are stored, and of
    several frames the first. A warning names a picture that is extremely long or large.
    Raises FileNotFoundError if there is no such file and ValueError, naming the path, if it is a
    folder, no picture, a damaged one, or one that Pillow refuses for its size.
    """
    check_image_file(path)
    with open(path, "rb") as file:
        return decode_image(file, str(path))


def image_size(path: str | os.PathLike) -> Size:
    """(width, height) of the picture in a file, from its header alone. Raises as `load_image`."""
    check_image_file(path)
    with open(path, "rb") as file, opened_image(file, str(path)) as image:
        return image.size


def check_image_file(path: str | os.PathLike) -> None:
    """FileNotFoundError or ValueError, saying what is wrong, unless there is a file to read."""
    if os.path.isfile(path):
        return
    name = os.fspath(path)[:300].encode(errors="backslashreplace").decode()
    if os.path.exists(path):  # a pipe would be waited for
        kind = "a folder" if os.path.isdir(path) else "no regular file"
        raise ValueError(f"image path is {kind}, a file is needed: {name}")
    hint = ""
    if re.search(r"(^|/)((https?|ftp|s3|gs|file):/|data:)", name):
        hint = " (pictures are read from files: download it and give its path)"
    elif os.path.islink(path):
        hint = f" (it is a link to {os.readlink(path)}, which leads to no file)"
    raise FileNotFoundError(f"image file not found: {name}{hint}")


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The picture in a base64 string, decoded but not converted (LLaVA's name and behaviour).

    Raises ValueError if the string is no base64 or holds no picture.
    """
    try:
        data = base64.b64decode(image)
    except binascii.Error as err:
        raise ValueError(f"not a base64 string ({err}): {str(image)[:40]!r}") from err
    return decode_image(BytesIO(data), "base64 string", mode=None)


def decode_image(file: Any, name: str, mode: str | None = "RGB") -> Image.Image:
    """The picture in an open file, converted to `mode` (None: as stored). ValueError, with `name`,
    for what is no picture, a damaged one, or one that Pillow refuses for its size."""
    with opened_image(file, name) as image:
        for _, text in size_problems(image.size):
            _warn_once(f"{name} {text}")
        image.load()
        return image.copy() if mode is None else image.convert(mode)


@contextlib.contextmanager
def opened_image(file: Any, name: str) -> Iterator[Image.Image]:
    """The picture in an open file, its header read. Within the block too whatever Pillow raises is
    a ValueError with `name`."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as err:
        if file.seek(0, os.SEEK_END) == 0:
            raise ValueError(f"image file is empty: {name}") from err
        raise ValueError(f"not an image file (or an unknown format): {name}") from err
    except Image.DecompressionBombError as err:
        raise ValueError(f"image file is too large, scale it down: {name} ({err})") from err
    except Exception as err:  # PIL raises whatever its decoders do
        raise ValueError(f"damaged image file: {name} ({err})") from err


def size_problems(size: Size) -> list[tuple[str, str]]:
    """(kind, text) of what a run takes and a person should know: pictures so long that hardly
    anything of them is seen, and those so large that Pillow warns of them (twice that is refused).
    """
    short, long = sorted(size)
    found = []
    if long > EXTREME_RATIO * short:
        text = f"has {size[0]}x{size[1]} pixels: in a square hardly anything of it can be seen"
        found.append(("extreme_image", text))
    if Image.MAX_IMAGE_PIXELS is not None and short * long > Image.MAX_IMAGE_PIXELS:
        text = f"has {size[0]}x{size[1]} pixels, which takes long and much memory: scale it down"
        found.append(("large_image", text))
    return found


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    """Warn of each picture once in this process, and of so many at most."""
    if text in _warned or len(_warned) >= MAX_WARNINGS:
        return
    _warned.add(text)
    logger.warning(text)
    if len(_warned) == MAX_WARNINGS:
        logger.warning("further pictures of unusual size are not named")


# --- one picture to pixels -----------------------------------------------------------------------
def clip_image_processor_class() -> type:
    """CLIP's image processor on PIL and numpy, the backend of the published numbers.

    transformers 5 gives it a name of its own (`CLIPImageProcessor` means the torchvision backend
    there, which resamples differently); older versions know only the one name.
    """
    return _on_pil("CLIPImageProcessor")


def siglip_image_processor_class() -> type:
    """SigLIP's image processor on PIL and numpy, as `clip_image_processor_class`."""
    return _on_pil("SiglipImageProcessor")


def _on_pil(name: str) -> type:
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """The picture centred on a square canvas of its longer side; itself if it is square."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return canvas


def select_best_resolution(
    original_size: Sequence[int], possible_resolutions: Sequence[Sequence[int]]
) -> Size:
    """The resolution that shows most of the picture, and among equals wastes least; first wins.

    All sizes (width, height). Raises ValueError if there is no resolution to choose from or the
    picture has no area.
    """
    width, height = original_size
    if width < 1 or height < 1:
        raise ValueError(f"a picture of size {width}x{height} has no pixels")
    if not possible_resolutions:
        raise ValueError("image_grid_pinpoints is empty; anyres needs at least one (width, height)")

    def rank(resolution: Sequence[int]) -> tuple[int, int]:
        to_width, to_height = resolution
        scale = min(to_width / width, to_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - to_width * to_height

    best = max(possible_resolutions, key=rank)  # max keeps the first of equals
    return int(best[0]), int(best[1])


def resize_and_pad_image(image: Image.Image, target_resolution: Sequence[int]) -> Image.Image:
    """The picture scaled to fit (bicubic), centred on black; target (width, height)."""
    width, height = image.size
    to_width, to_height = target_resolution
    by_width, by_height = to_width / width, to_height / height
    if by_width < by_height:
        size = (to_width, min(math.ceil(height * by_width), to_height))
    else:
        size = (min(math.ceil(width * by_height), to_width), to_height)
    canvas = Image.new("RGB", (to_width, to_height), (0, 0, 0))
    canvas.paste(image.resize(size), ((to_width - size[0]) // 2, (to_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Tiles of `patch_size` squared, row by row."""
    width, height = image.size
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size: Sequence[int], grid_pinpoints: Any, patch_size: int
) -> Size:
    """Tiles of the chosen resolution as (columns, rows), LLaVA's order; size (width, height)."""
    pinpoints = parse_grid_pinpoints(grid_pinpoints, patch_size)
    width, height = select_best_resolution(image_size, pinpoints)
    return width // patch_size, height // patch_size


def parse_grid_pinpoints(grid_pinpoints: Any, tile_size: int | None = None) -> list[Size]:
    """`image_grid_pinpoints` of a config as a list of (width, height).

    Accepts a list of pairs, its string ("[[336, 672], [672, 336]]"), or LLaVA-NeXT's range of
    grids ("(1x1),...,(2x3)", times `tile_size`). Raises ValueError for anything else.
    """
    value = grid_pinpoints
    if isinstance(value, str):
        grids = re.findall(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)", value)
        if grids and tile_size:
            first_w, first_h = map(int, grids[0])
            last_w, last_h = map(int, grids[-1])
            return [
                (w * tile_size, h * tile_size)
                for w in range(first_w, last_w + 1)
                for h in range(first_h, last_h + 1)
            ]
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    try:
        pinpoints = [(int(w), int(h)) for w, h in value]
    except (TypeError, ValueError):
        pinpoints = []
    if not pinpoints or min(min(p) for p in pinpoints) < 1:
        raise ValueError(
            f"image_grid_pinpoints is {grid_pinpoints!r}; accepted: a list of (width, height) in "
            "pixels or its string, as in [[336, 672], [672, 336]]"
        )
    return pinpoints


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Any) -> torch.Tensor:
    """Pixels [T, 3, H, W] of an RGB picture: the whole of it squeezed to a square, then its tiles
    row by row."""
    tile = crop_side(processor)
    resolution = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints, tile))
    side = shortest_edge(processor)
    tiles = divide_to_patches(resize_and_pad_image(image, resolution), tile)
    pixels = processor.preprocess([image.resize((side, side)), *tiles], return_tensors="pt")
    return pixels["pixel_values"]


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pixels of the pictures as `model_cfg.image_aspect_ratio` asks.

    Returns [N, 3, H, W] (`pad`, `square` or none) or [N, T, 3, H, W] (`anyres`); a list of
    [T, 3, H, W] where the numbers of tiles differ. Pictures are converted to RGB.
    Raises ValueError for an unknown aspect ratio, an empty list, a model without a tower, whose
    image_processor is None, and as `check_scaled_size`.
    """
    aspect = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect not in ASPECT_RATIOS:
        raise ValueError(f"image_aspect_ratio is {aspect!r}; accepted: {ASPECT_RATIOS}")
    if len(images) == 0:
        raise ValueError("process_images got no image")
    if image_processor is None:
        raise ValueError("a picture was given to a model without a vision tower")
    rgb = [image.convert("RGB") for image in images]
    if aspect == "anyres":
        pixels = [
            process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints)
            for image in rgb
        ]
        same = all(p.shape == pixels[0].shape for p in pixels)
        return torch.stack(pixels) if same else pixels
    if aspect == "pad":
        rgb = [_padded(image, image_processor) for image in rgb]
    for image in rgb:
        check_scaled_size(image.size, image_processor)
    return image_processor.preprocess(rgb, return_tensors="pt")["pixel_values"]


def check_scaled_size(size: Size, processor: Any) -> None:
    """ValueError for a picture that is too long for CLIP's processor, which scales the shorter side
    of what is no square and takes the middle of the longer one."""
    squeezes = not isinstance(processor.size, int) and "shortest_edge" not in processor.size
    if squeezes or not getattr(processor, "do_resize", True):
        return
    short, long = sorted(size)
    pixels = shortest_edge(processor) ** 2 * long // short
    if pixels > MOST_PIXELS:
        raise ValueError(
            f"a picture of {size[0]}x{size[1]} pixels would be scaled to {pixels // 10**6} million "
            f"(accepted: {MOST_PIXELS // 10**6}); --image_aspect_ratio pad needs no such picture"
        )


def _padded(image: Image.Image, processor: Any) -> Image.Image:
    """The picture on a square, in the size to which the processor would scale that square."""
    mean = tuple(int(255 * x) for x in processor.image_mean)
    if not _scales_with_pillow(processor):
        return expand2square(image, mean)
    return resize_padded(image, shortest_edge(processor), mean, processor.resample)


def _scales_with_pillow(processor: Any) -> bool:
    """Whether the processor scales by `Image.resize`, so that it leaves alone what has its size."""
    pillow = getattr(processor, "backend", None) == "pil"
    return pillow and isinstance(processor.resample, int) and bool(processor.do_resize)


def crop_side(processor: Any) -> int:
    """Side in pixels of what the processor puts out (a tile)."""
    crop = getattr(processor, "crop_size", None)
    return _side(crop if crop and getattr(processor, "do_center_crop", True) else processor.size)


def shortest_edge(processor: Any) -> int:
    """Side in pixels to which the processor scales a picture before it crops."""
    return _side(processor.size)


def _side(size: Any) -> int:
    if isinstance(size, int):
        return size
    value = size["shortest_edge"] if "shortest_edge" in size else size["height"]
    return int(value)


# --- how many tokens a picture becomes -----------------------------------------------------------
def unpad_slices(
    size: Sequence[int], grid: Sequence[int], rounding: Rounding = "llava"
) -> tuple[slice, slice]:
    """Rows and columns of a padded grid of patches that hold picture.

    size: original (width, height). grid: (rows, columns) over all tiles. rounding: `llava` cuts
    the scaled side with `int`; `transformers` with `int(round(x, 7))`, as LlavaNext does: the two
    differ for a few sizes, and a checkpoint keeps the one it was trained with.
    Very flat or narrow pictures may leave no row or column at all.
    """
    if rounding not in ("llava", "transformers"):
        raise ValueError(f"rounding is {rounding!r}; accepted: 'llava', 'transformers'")
    width, height = size
    rows, cols = grid

    def whole(value: float) -> int:
        return int(value) if rounding == "llava" else int(round(value, 7))

    if width / height > cols / rows:
        pad = (rows - whole(height * (cols / width))) // 2
        return slice(pad, rows - pad), slice(0, cols)
    pad = (cols - whole(width * (rows / height))) // 2
    return slice(0, rows), slice(pad, cols - pad)


class TokenGrid(NamedTuple):
    """Visual tokens of one anyres picture: `tokens` = side**2 of the whole picture, then
    `rows` x `cols_with_newline` of the tiles (the newline column exists with unpad only)."""

    tiles: int
    rows: int
    cols_with_newline: int
    tokens: int


def anyres_token_grid(
    image_size_wh: Sequence[int],
    pinpoints: Any,
    tile_size: int,
    patches_per_side: int,
    merge_type: str = "spatial_unpad",
    rounding: Rounding = "llava",
) -> TokenGrid:
    """What an anyres picture of this size becomes, without looking at a pixel.

    tile_size: side of a tile in pixels; patches_per_side: patches along it (24 for CLIP-L/336).
    merge_type `flat` stacks the tiles (rows = tiles under each other), `spatial` joins them to one
    field, `spatial_unpad` also removes the padding and adds a newline token to each row.
    Raises ValueError for an unknown merge type or rounding.
    """
    if merge_type not in MERGE_TYPES:
        raise ValueError(f"mm_patch_merge_type is {merge_type!r}; accepted: {MERGE_TYPES}")
    grid_w, grid_h = get_anyres_image_grid_shape(image_size_wh, pinpoints, tile_size)
    side = patches_per_side
    if merge_type == "flat":
        rows, cols = grid_w * grid_h * side, side
    elif merge_type == "spatial":
        rows, cols = grid_h * side, grid_w * side
    else:
        down, across = unpad_slices(image_size_wh, (grid_h * side, grid_w * side), rounding)
        rows = max(down.stop - down.start, 0)
        cols = max(across.stop - across.start, 0) + 1
    return TokenGrid(1 + grid_w * grid_h, rows, cols, side * side + rows * cols)


def count_visual_tokens(
    image_sizes: Sequence[Sequence[int]],
    model_cfg: Any,
    tile_size: int,
    patches_per_side: int,
    rounding: Rounding | None = None,
) -> list[int]:
    """Visual tokens of each picture, sizes (width, height), under a model's settings
    (image_aspect_ratio, mm_patch_merge_type, image_grid_pinpoints and, unless `rounding` is given,
    mm_unpad_rounding). A class token that is kept beside the patches is not counted."""
    if getattr(model_cfg, "image_aspect_ratio", None) != "anyres":
        return [patches_per_side**2] * len(image_sizes)
    merge_type = getattr(model_cfg, "mm_patch_merge_type", None) or "flat"
    rounding = rounding or getattr(model_cfg, "mm_unpad_rounding", None) or "llava"
    pinpoints = model_cfg.image_grid_pinpoints
    return [
        anyres_token_grid(size, pinpoints, tile_size, patches_per_side, merge_type, rounding).tokens
        for size in image_sizes
    ]


# --- marks to ids --------------------------------------------------------------------------------
def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Ids of a prompt, one `image_token_index` for each `<image>`.

    The text between marks is tokenized piece by piece; a BOS is kept at the very front only.
    Vicuna's sentencepiece tokenizer, with which LLaVA was trained, gives a piece that starts with a
    space a space token of its own; today's fast form of it swallows that space, so it gets one more
    here, and the ids are again those of training.
    Returns a list, or a long tensor [L] for `return_tensors="pt"`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is {return_tensors!r}; accepted: None, 'pt'")
    pieces = [list(tokenizer(text).input_ids) for text, _ in _chunks(prompt, tokenizer)]
    skip = 1 if pieces[0][:1] == [tokenizer.bos_token_id] else 0
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, image_token_index, *piece[skip:]]
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def token_spans(prompt: str, tokenizer: Any) -> list[tuple[int, int, int]]:
    """(id, start, stop) of the text tokens of `tokenizer_image_token`: prompt[start:stop] became
    the token. A BOS that was put in front of a piece is left out, as it stands for no text.

    ValueError for a tokenizer that does not know (transformers' slow ones).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not tell which text a token stands for")
    found = []
    for text, first in _chunks(prompt, tokenizer):
        encoded = tokenizer(text, return_offsets_mapping=True)
        begin = first if prompt.startswith(text, first) else first + 1  # behind an added space
        for token, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if stop > start:
                found.append((token, max(first + start, begin), max(first + stop, begin)))
    return found


def _chunks(prompt: str, tokenizer: Any) -> list[tuple[str, int]]:
    """(text to tokenize, place of its first character in the prompt) of each piece."""
    chunks, place = [], 0
    for chunk in prompt.split(DEFAULT_IMAGE_TOKEN):
        chunks.append((chunk, place))
        place += len(chunk) + len(DEFAULT_IMAGE_TOKEN)
    if any(chunk.startswith(" ") for chunk, _ in chunks) and swallows_space(tokenizer):
        chunks = [(" " + c, at - 1) if c.startswith(" ") else (c, at) for c, at in chunks]
    return chunks


def swallows_space(tokenizer: Any) -> bool:
    """Whether a space at the very front of a text leaves no trace in its ids."""
    return tokenizer(" a").input_ids == tokenizer("a").input_ids


def check_image_marks(marks: int, images: int, where: str = "the prompt") -> None:
    """ValueError unless there are as many `<image>` marks as pictures."""
    if marks != images:
        raise ValueError(
            f"{where} has {marks} {DEFAULT_IMAGE_TOKEN} mark{'s' * (marks != 1)} but {images} "
            f"image{'s' * (images != 1)} came with it; the numbers must be equal"
        )


# --- prompts that do not fit ---------------------------------------------------------------------
class Fitted(NamedTuple):
    """A sample that fits: its ids and labels, the pictures it still holds (the first so many), and
    the number of tokens that were cut off, pictures counted in full."""

    ids: list[int]
    labels: list[int]
    images: int
    cut: int


def spliced_length(ids: Sequence[int], visual_counts: Sequence[int]) -> int:
    """Tokens of a prompt once each image placeholder is replaced by its visual tokens.

    Raises ValueError if the numbers of placeholders and pictures differ.
    """
    marks = sum(1 for i in ids if i == IMAGE_TOKEN_INDEX)
    check_image_marks(marks, len(visual_counts))
    return len(ids) - marks + sum(visual_counts)


def check_context(
    ids: Sequence[int], visual_counts: Sequence[int], max_length: int, new_tokens: int = 0
) -> None:
    """ValueError if a prompt and the answer to come are longer than the context (inference)."""
    length = spliced_length(ids, visual_counts)
    if length + new_tokens > max_length:
        room = f" and {new_tokens} new tokens" if new_tokens else ""
        raise ValueError(
            f"the prompt has {length} tokens ({sum(visual_counts)} of them visual){room}, "
            f"the context holds {max_length}; shorten the prompt or use fewer pictures"
        )


def truncate_to_context(
    ids: Sequence[int], labels: Sequence[int], visual_counts: Sequence[int], max_length: int
) -> Fitted:
    """Cut a training sample to the context without losing a query row or half a picture.

    ids [L] hold one placeholder a picture, labels [L] are -100 where there is no loss. If the
    context ends inside an answer the sample is cut there (LLaVA's rule); if it ends inside a
    question or a picture, at the end of the last whole answer: what is left out then has no loss,
    and no picture is kept in part. Raises ValueError if not one target would be left (the first
    question alone is too long): skip the sample or raise the limit.
    """
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} ids but {len(labels)} labels")
    length = spliced_length(ids, visual_counts)
    if length <= max_length:
        return Fitted(list(ids), list(labels), len(visual_counts), 0)
    used = pictures = end = images = kept = 0
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token == IMAGE_TOKEN_INDEX:
            used += visual_counts[pictures]
            pictures += 1
        else:
            used += 1
        if used > max_length:
            break
        if label != IGNORE_INDEX:
            end, images, kept = i + 1, pictures, used
    # A target at index 0 is never predicted, so at least two tokens are needed.
    if end < 2:
        raise ValueError(
            f"a training sample of {length} tokens has its first answer behind the limit of "
            f"{max_length}; nothing would be learned from it"
        )
    return Fitted(list(ids[:end]), list(labels[:end]), images, length - kept)


# --- names and stopping --------------------------------------------------------------------------
def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path; `<parent>_<checkpoint-N>` for a Trainer checkpoint."""
    parts = model_path.strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops each row once a keyword stands at the end of its ids or in its newest text.

    keywords: texts; input_ids [B, L]: the prompt, of which only the length matters. `generate` on
    embeddings hands over new tokens only; both forms of `output_ids` are understood.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt = input_ids
        self.keyword_ids = []
        for keyword in self.keywords:
            ids = list(tokenizer(keyword).input_ids)
            if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
                ids = ids[1:]
            self.keyword_ids.append(torch.tensor(ids))
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def __call__(
        self, output_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """Bool [B]: which rows are done."""
        new = output_ids[:, self._new_from(output_ids) :].cpu()
        done = [self._row_is_done(row) for row in new]
        return torch.tensor(done, dtype=torch.bool, device=output_ids.device)

    def _new_from(self, output_ids: torch.Tensor) -> int:
        width = self.prompt.shape[1]
        if output_ids.shape[1] < width or output_ids.shape[0] != self.prompt.shape[0]:
            return 0
        same = torch.equal(output_ids[:, :width].cpu(), self.prompt.cpu())
        return width if same else 0

    def _row_is_done(self, new: torch.Tensor) -> bool:
        for ids in self.keyword_ids:
            if len(ids) and len(new) >= len(ids) and torch.equal(new[-len(ids) :], ids):
                return True
        tail = new[-self.max_keyword_len :] if self.max_keyword_len else new[:0]
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)
