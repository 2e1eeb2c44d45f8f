"""Conversations -> token ids and labels, driven by the conversation template.

Special here: one algorithm for every template. The template itself says where an answer starts
(the prompt with that turn left open, i.e. what inference feeds) and where it ends (its stop mark);
the text is cut there, the pieces are tokenised and joined, and a piece is either supervised
throughout or not at all. Ids and labels are made together, so they cannot disagree, and the ids in
front of an answer are those of the inference prompt.

``label_mode="legacy"`` repeats LLaVA-1.5's masking (train.py, preprocess_*): rounds are tokenised
alone and their lengths added up; where the sum misses, the whole sample is masked. It exists to
reproduce old runs and is checked against recorded masks:
``python tests/parity/reference_cases.py tests/data/pyramiddrop``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import swallows_space, tokenizer_image_token
from llava.prompting import STAND_IN, side_texts, text_place, without_bos
from llava.utils import get_logger, warn_once_for_all

logger = get_logger(__name__)

LabelMode = Literal["segments", "legacy"]
Turn = dict[str, str]

HUMAN_NAMES = ("human", "user")
ANSWER_NAMES = ("gpt", "assistant")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of the conversation's text; `supervised` when the model is to learn to write it."""

    text: str
    supervised: bool


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids (one IMAGE_TOKEN_INDEX a picture) and labels (IGNORE_INDEX = no loss). texts: of
    the first turn, where they were asked for (`llava.prompting.side_texts`)."""

    input_ids: list[int]
    labels: list[int]
    warning: str | None = None
    texts: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def n_targets(self) -> int:
        """Number of supervised tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)


# ------------------------------------------------------------------------------------ the template
def training_template(version: str) -> Conversation:
    """An empty conversation for `--version`; an unknown one means vicuna_v1, as in LLaVA."""
    if version not in conv_templates:
        warn_once_for_all(
            logger,
            "unknown --version %r: using vicuna_v1 (known: %s)",
            version,
            ", ".join(conv_templates),
        )
    conv = conv_templates.get(version, conv_templates["vicuna_v1"]).copy()
    conv.messages = []
    return conv


def is_plain(conv: Conversation) -> bool:
    """Whether `conv` is the caption template of projector pretraining."""
    return conv.sep_style is SeparatorStyle.PLAIN


# ---------------------------------------------------------------------------------------- messages
def count_image_marks(turns: Sequence[Turn]) -> int:
    """Number of ``<image>`` marks in all turns."""
    return sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)


def _check_marks(turns: Sequence[Turn], n_images: int) -> None:
    marks = count_image_marks(turns)
    if marks != n_images:
        raise ValueError(
            f"{marks} {DEFAULT_IMAGE_TOKEN} mark(s) in the conversation but {n_images} image(s) "
            "listed; the two counts must be equal"
        )


def preprocess_multimodal(
    turns: Sequence[Turn],
    n_images: int,
    *,
    version: str = "v1",
    use_im_start_end: bool = False,
) -> list[Turn]:
    """Put image marks where the model expects them; returns new turns.

    One picture: its mark goes to the front of its turn, followed by a newline (LLaVA's rule).
    Several: the marks stay where they stand, because their order carries meaning.

    Raises ValueError when the number of marks differs from `n_images`, or a mark stands in an
    answer.
    """
    _check_marks(turns, n_images)
    for turn in turns:
        if turn["from"] in ANSWER_NAMES and DEFAULT_IMAGE_TOKEN in turn["value"]:
            raise ValueError(
                f"{DEFAULT_IMAGE_TOKEN} stands in an answer ({turn['value'][:60]!r}); "
                "only questions may hold image marks"
            )
    if n_images == 1:
        return legacy_multimodal(turns, version, use_im_start_end)
    return _write_marks(turns, version, use_im_start_end)


def _write_marks(turns: Sequence[Turn], version: str, use_im_start_end: bool) -> list[Turn]:
    """Each mark as the template and the flags want it."""
    mark = DEFAULT_IMAGE_TOKEN
    if use_im_start_end:
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    if "mmtag" in version:
        mark = f"<Image>{mark}</Image>"
    return [
        {"from": turn["from"], "value": turn["value"].replace(DEFAULT_IMAGE_TOKEN, mark)}
        for turn in turns
    ]


def check_form(turns: Any, speakers: Sequence[str] | None = HUMAN_NAMES + ANSWER_NAMES) -> None:
    """ValueError unless `turns` are turns with a text, each from one of `speakers` (None: anybody
    with a name)."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"'conversations' must be a non-empty list of turns, got {turns!r:.80}")
    for i, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        known = isinstance(speaker, str) and (speakers is None or speaker in speakers)
        if not known or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"turn {i} must be {{'from': 'human' or 'gpt', 'value': text}}, got {turn!r:.80}"
            )
        try:
            turn["value"].encode()  # JSON can hold half of a surrogate pair, which has no ids
        except UnicodeEncodeError as error:
            raise ValueError(f"turn {i} must be text that can be written: {error}") from error


def check_turns(turns: Any) -> list[Turn]:
    """`turns` without a leading answer; ValueError unless question and answer alternate."""
    check_form(turns)
    if turns[0]["from"] not in HUMAN_NAMES:
        turns = turns[1:]
    for i, turn in enumerate(turns):
        if turn["from"] not in (HUMAN_NAMES, ANSWER_NAMES)[i % 2]:
            raise ValueError(
                f"turn {i} is from {turn['from']!r}; questions (human) and answers (gpt) must "
                "alternate, a question first"
            )
    if len(turns) < 2:
        raise ValueError("the conversation holds no answer")
    return list(turns)


# ---------------------------------------------------------------------------------------- segments
_STOPS_WITH_SEP2 = (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)


def segments(conv: Conversation, turns: Sequence[Turn]) -> list[Segment]:
    """The conversation's text, cut where supervision starts and ends.

    The texts joined are the template's prompt for `turns`, up to the end of the last answer.
    Raises ValueError if the template does not continue its own open prompt (a broken template).
    """
    if is_plain(conv):
        return _plain_segments(conv, turns)
    conv = conv.copy()
    conv.messages = []
    stop = conv.sep2 if conv.sep_style in _STOPS_WITH_SEP2 else conv.sep
    pieces: list[Segment] = []
    done = ""
    for i in range(0, len(turns) - 1, 2):
        answer = turns[i + 1]["value"]
        conv.append_message(conv.roles[0], turns[i]["value"])
        conv.append_message(conv.roles[1], None)
        prompt = conv.get_prompt()  # the last turn is open: what inference would feed now
        if not prompt.startswith(done):
            raise ValueError(f"template {conv.version!r} rewrites earlier turns; cannot label it")
        pieces.append(Segment(prompt[len(done) :], False))
        done = prompt
        conv.messages[-1][1] = answer
        if not answer.strip():
            break  # an empty answer is an open turn: nothing to learn behind it
        spoken = _answer_text(conv, prompt, answer, stop or "")
        pieces.append(Segment(spoken, True))
        done += spoken
    return pieces


def _answer_text(conv: Conversation, prompt: str, answer: str, stop: str) -> str:
    """What the template writes behind `prompt` for `answer`, up to and with its stop mark."""
    full = conv.get_prompt()
    if not full.startswith(prompt):
        raise ValueError(
            f"template {conv.version!r} does not continue its own open prompt; cannot label it"
        )
    tail = full[len(prompt) :]
    start = tail.find(answer.strip())
    end = tail.find(stop, start + len(answer.strip())) if start >= 0 else -1
    if end < 0:
        raise ValueError(
            f"template {conv.version!r} does not write the answer {answer[:60]!r} followed by its "
            f"stop mark {stop!r}; cannot label it"
        )
    return tail[: end + len(stop)]


def _plain_segments(conv: Conversation, turns: Sequence[Turn]) -> list[Segment]:
    """Captions: the prompt is the image marks alone (text-only: the question's text), and the
    caption with the separator behind it is learned."""
    if len(turns) != 2:
        raise ValueError(
            f"the plain template takes one question and one answer, got {len(turns)} turns"
        )
    question, caption = turns[0]["value"], turns[1]["value"]
    marks = DEFAULT_IMAGE_TOKEN * question.count(DEFAULT_IMAGE_TOKEN)
    prompt = marks or (question + conv.sep if question else "")
    return [Segment(prompt, False), Segment(caption + conv.sep, True)]


# ------------------------------------------------------------------------------------ tokenisation
def encode_segments(tokenizer: Any, pieces: Sequence[Segment]) -> Encoded:
    """Token ids and labels of `pieces`.

    Text between pictures is tokenised as a whole. Where that would give the text in front of an
    answer other ids than it has alone (a token straddles the border, or the tokenizer looks
    ahead), the pieces are tokenised apart, because the model will be given the prompt alone.
    """
    ids: list[int] = []
    labels: list[int] = []
    if pieces:
        first = dataclasses.replace(pieces[0], text=without_bos(pieces[0].text, tokenizer))
        pieces = [first, *pieces[1:]]
    for n, chunk in enumerate(_split_at_images(pieces)):
        if n:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        for token, supervised in _encode_chunk(tokenizer, chunk, first=n == 0):
            ids.append(token)
            labels.append(token if supervised else IGNORE_INDEX)
    return Encoded(ids, labels)


def _split_at_images(pieces: Iterable[Segment]) -> list[list[Segment]]:
    """The pieces between the image marks; one more list than there are marks."""
    chunks: list[list[Segment]] = [[]]
    for piece in pieces:
        for n, text in enumerate(piece.text.split(DEFAULT_IMAGE_TOKEN)):
            if n:
                chunks.append([])
            if text:
                chunks[-1].append(Segment(text, piece.supervised))
    return chunks


def _encode_chunk(
    tokenizer: Any, chunk: Sequence[Segment], *, first: bool
) -> list[tuple[int, bool]]:
    """(token, supervised) of one chunk; only the first chunk keeps the tokenizer's BOS."""
    text = "".join(piece.text for piece in chunk)
    if not text and not first:
        return []
    if text.startswith(" ") and swallows_space(tokenizer):  # see tokenizer_image_token
        text = f" {text}"
        chunk = [dataclasses.replace(chunk[0], text=f" {chunk[0].text}"), *chunk[1:]]
    borders: list[tuple[int, bool]] = []  # (end offset, supervised) of each piece
    end = 0
    for piece in chunk:
        end += len(piece.text)
        borders.append((end, piece.supervised))
    encoded = tokenizer(text, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    skip = _n_bos(tokenizer, tokens)
    out: list[tuple[int, bool]] = [(token, False) for token in tokens[:skip]] if first else []
    at = 0
    for token, (start, _) in zip(tokens[skip:], offsets[skip:], strict=True):
        while at < len(borders) - 1 and start >= borders[at][0]:
            at += 1
        out.append((token, borders[at][1] if borders else False))
    for n, piece in enumerate(chunk[:-1]):
        if chunk[n + 1].supervised and not piece.supervised:
            prompt = tokenizer(text[: borders[n][0]])["input_ids"]
            if tokens[: len(prompt)] != prompt:
                return _encode_pieces_apart(tokenizer, chunk, first=first)
    return out


def _encode_pieces_apart(
    tokenizer: Any, chunk: Sequence[Segment], *, first: bool
) -> list[tuple[int, bool]]:
    """As `_encode_chunk`, each piece as the continuation of the one before it, or alone where that
    would change the ids in front of the border."""
    out: list[tuple[int, bool]] = []
    before = ""
    for n, piece in enumerate(chunk):
        head = _ids(tokenizer, before)
        both = _ids(tokenizer, before + piece.text)
        own = both[len(head) :] if both[: len(head)] == head else _ids(tokenizer, piece.text)
        if n == 0 and first:
            whole = tokenizer(piece.text)["input_ids"]
            out += [(token, False) for token in whole[: _n_bos(tokenizer, whole)]]
        out += [(token, piece.supervised) for token in own]
        before = piece.text
    return out


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` without BOS."""
    tokens = tokenizer(text)["input_ids"]
    return tokens[_n_bos(tokenizer, tokens) :]


def _n_bos(tokenizer: Any, tokens: Sequence[int]) -> int:
    """1 if the tokenizer put its BOS in front of `tokens`, else 0."""
    return int(bool(tokens) and tokens[0] == tokenizer.bos_token_id)


# ------------------------------------------------------------------------------------- entry point
def preprocess(
    turns: Sequence[Turn],
    tokenizer: Any,
    conv: Conversation,
    *,
    n_images: int = 0,
    use_im_start_end: bool = False,
    label_mode: LabelMode = "segments",
) -> Encoded:
    """One conversation as ids and labels.

    `turns` are LLaVA's ``[{"from": "human", "value": ...}, {"from": "gpt", ...}]``. Raises
    ValueError for turns that do not alternate, wrong image counts, or an unknown `label_mode`.
    """
    if label_mode not in ("segments", "legacy"):
        raise ValueError(f"label_mode {label_mode!r}; accepted: 'segments', 'legacy'")
    if label_mode == "legacy":
        check_form(turns, speakers=None)
        if n_images:
            turns = legacy_multimodal(turns, conv.version, use_im_start_end)
            _check_marks(turns, n_images)
        return legacy_labels(turns, tokenizer, conv, has_image=n_images > 0)
    turns, conv = _ready(turns, tokenizer, conv, n_images, use_im_start_end)
    return encode_segments(tokenizer, segments(conv, turns))


def _ready(
    turns: Any, tokenizer: Any, conv: Conversation, n_images: int, use_im_start_end: bool
) -> tuple[list[Turn], Conversation]:
    """The turns, checked and with their image marks in place, and the template with all it needs to
    write them (Llama 3's own one asks the tokenizer)."""
    turns = preprocess_multimodal(
        check_turns(turns), n_images, version=conv.version, use_im_start_end=use_im_start_end
    )
    if conv.sep_style is SeparatorStyle.LLAMA_3 and conv.tokenizer is None:
        conv = dataclasses.replace(conv, tokenizer=tokenizer)
    return turns, conv


def first_turn_texts(
    turns: Sequence[Turn],
    tokenizer: Any,
    conv: Conversation,
    *,
    n_images: int = 0,
    use_im_start_end: bool = False,
) -> dict[str, list[int]]:
    """The texts of the first question, as inference finds them in the prompt that ends with it.

    A method that compares pictures with words must not see answers, and a picture is cut once for
    all turns, so the later questions do not count. Arguments and errors as `preprocess`.
    """
    turns, conv = _ready(turns, tokenizer, conv, n_images, use_im_start_end)
    first = turns[:2]
    marked = [{**first[0], "value": STAND_IN}, first[1]]
    prompt, with_stand_in = (segments(conv, pair)[0].text for pair in (first, marked))
    place = text_place(prompt, with_stand_in) or (0, 0)
    return side_texts(prompt, tokenizer, place)


# ------------------------------------------------------------------------------ the legacy masking
def legacy_labels(
    turns: Sequence[Turn], tokenizer: Any, conv: Conversation, *, has_image: bool
) -> Encoded:
    """LLaVA-1.5's labels for turns that `preprocess_multimodal` has been through.

    Raises ValueError where the original stops with an assertion (turns that do not alternate,
    captions without an image mark), and for templates that LLaVA-1.5 has not.
    """
    if conv.sep_style in (SeparatorStyle.CHATML, SeparatorStyle.LLAMA_3):
        raise ValueError(
            f"--label_mode legacy repeats LLaVA-1.5's masking, which has no template "
            f"{conv.version!r}: use segments"
        )
    with_images = functools.partial(tokenizer_image_token, tokenizer=tokenizer)
    if is_plain(conv):
        return _legacy_plain(turns, conv, with_images)

    def text_only(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    encode = with_images if has_image else text_only
    # Text alone is cut here, with pictures later; the rounds are counted uncut in either case.
    limit = None if has_image else tokenizer.model_max_length
    if conv.sep_style is SeparatorStyle.LLAMA_2:
        return _legacy_rounds(turns, tokenizer, conv, encode, limit, "[/INST] ", correct=False)
    if conv.version.startswith("v1"):
        answer = conv.sep + conv.roles[1] + ": "
        return _legacy_rounds(turns, tokenizer, conv, encode, limit, answer, correct=True)
    if conv.version == "mpt":
        return _legacy_mpt(turns, tokenizer, conv, encode, limit)
    return _legacy_v0(turns, tokenizer, conv, encode, limit)


def legacy_multimodal(turns: Sequence[Turn], version: str, use_im_start_end: bool) -> list[Turn]:
    """LLaVA-1.5's rule for marks: all marks of a turn become one at its front."""
    single = []
    for turn in turns:
        value, mark = turn["value"], DEFAULT_IMAGE_TOKEN
        if mark in value:
            value = f"{mark}\n{value.replace(mark, '').strip()}".strip()
        single.append({"from": turn["from"], "value": value})
    return _write_marks(single, version, use_im_start_end)


def _legacy_prompt(turns: Sequence[Turn], conv: Conversation) -> str:
    """The template's prompt of all turns, a leading answer dropped."""
    roles = {"human": conv.roles[0], "gpt": conv.roles[1]}
    if turns and roles.get(turns[0]["from"]) != conv.roles[0]:
        turns = turns[1:]
    conv = conv.copy()
    conv.messages = []
    for i, turn in enumerate(turns):
        role = roles.get(turn["from"])
        if role != conv.roles[i % 2]:
            raise ValueError(f"turn {i} is from {turn['from']!r}; human and gpt must alternate")
        conv.append_message(role, turn["value"])
    return conv.get_prompt()


def _mask(labels: list[int], start: int, stop: int) -> None:
    """Take labels[start:stop] out of the loss."""
    for i in range(max(start, 0), min(stop, len(labels))):
        labels[i] = IGNORE_INDEX


def _legacy_finish(
    ids: list[int], labels: list[int], counted: int, total: int, max_length: int
) -> Encoded:
    """Mask what was not counted, and everything if the count missed."""
    _mask(labels, counted, len(labels))
    warning = None
    if counted < max_length and counted != total:
        labels = [IGNORE_INDEX] * len(labels)
        warning = f"WARNING: tokenization mismatch: {counted} vs. {total}. (ignored)"
    return Encoded(ids, labels, warning)


def _legacy_rounds(
    turns: Sequence[Turn],
    tokenizer: Any,
    conv: Conversation,
    encode: Any,
    limit: int | None,
    mark: str,
    correct: bool,
) -> Encoded:
    """v1 and llama_2: rounds end with sep2; in each, all up to and with `mark` is masked, two
    tokens less than it has alone (its BOS, and the space that joins the answer's first word)."""
    text = _legacy_prompt(turns, conv)
    ids = encode(text)[:limit]
    labels = list(ids)
    shift = int(correct and not getattr(tokenizer, "legacy", True))
    at = 1
    _mask(labels, 0, at)
    for i, part in enumerate(text.split(conv.sep2)):
        halves = part.split(mark)
        if not part or len(halves) != 2:
            break
        less = shift if i else 0
        masked = len(encode(halves[0] + mark)) - 2 - less
        _mask(labels, at, at + masked)
        at += len(encode(part)) - less
    total = sum(token != tokenizer.pad_token_id for token in ids)
    return _legacy_finish(ids, labels, at, total, tokenizer.model_max_length)


def _legacy_mpt(
    turns: Sequence[Turn], tokenizer: Any, conv: Conversation, encode: Any, limit: int | None
) -> Encoded:
    """mpt and chatml: the first round is system + question + answer, later ones two parts each."""
    text = _legacy_prompt(turns, conv)
    ids = encode(text)[:limit]
    labels = list(ids)
    mark = conv.sep + conv.roles[1]
    parts = text.split(conv.sep)
    rounds = [conv.sep.join(parts[:3])]
    rounds += [conv.sep.join(parts[i : i + 2]) for i in range(3, len(parts), 2)]
    more = int(bool(getattr(tokenizer, "legacy", False)))
    at = 0
    for i, part in enumerate(rounds):
        halves = part.split(mark)
        if not part or len(halves) != 2:
            break
        extra = more if i else 0
        masked = len(encode(halves[0] + mark)) - 1 + extra
        _mask(labels, at, at + masked)
        at += len(encode(part)) + extra
    total = sum(token != tokenizer.pad_token_id for token in ids)
    return _legacy_finish(ids, labels, at, total, tokenizer.model_max_length)


def _legacy_v0(
    turns: Sequence[Turn], tokenizer: Any, conv: Conversation, encode: Any, limit: int | None
) -> Encoded:
    """v0: '### Role: text' lines; questions are masked but for the first two tokens of each. Of
    text alone each line is cut too, and a padding id in it is not counted."""

    def length(part: str) -> int:
        ids = encode(part)
        if limit is None:
            return len(ids)
        return sum(token != tokenizer.pad_token_id for token in ids[:limit])

    names = {"human": conv.roles[0], "gpt": conv.roles[1]}
    header = f"{conv.system}\n\n"
    lines = [f"### {names.get(turn['from'], 'unknown')}: {turn['value']}\n" for turn in turns]
    ids = encode(header + "".join(lines) + "### ")[:limit]
    labels = list(ids)
    at = length(header)
    _mask(labels, 0, at)
    for turn, line in zip(turns, lines, strict=True):
        count = length(line)
        if turn["from"] == "human":
            _mask(labels, at + 2, at + count)
        at += count
    return Encoded(ids, labels)


def _legacy_plain(turns: Sequence[Turn], conv: Conversation, encode: Any) -> Encoded:
    """Captions: everything but the image mark is learned."""
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0]["value"]:
        raise ValueError("captions need exactly one question with an <image> mark and one answer")
    ids = list(encode(DEFAULT_IMAGE_TOKEN + turns[1]["value"] + conv.sep))
    labels = list(ids)
    masked = len(encode(DEFAULT_IMAGE_TOKEN))
    _mask(labels, 0, masked)
    return Encoded(ids, labels)
