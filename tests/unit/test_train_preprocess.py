"""Conversations -> ids and labels: what is learned, and that ids are those of the prompt."""

from __future__ import annotations

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.prompting import tokenize_prompt
from llava.train.preprocess import (
    Segment,
    encode_segments,
    preprocess,
    preprocess_multimodal,
    segments,
    training_template,
)

CORPUS = [
    "A chat between a curious user and an assistant. USER: What is shown? ASSISTANT: A red circle.",
    "How many dogs are there in the picture? Two dogs on the mat, one cat. Describe the image.",
    "system user assistant Answer the questions. Human Assistant ### [INST] [/INST] hello\n\n",
]


def bpe(byte_level: bool) -> PreTrainedTokenizerFast:
    """A small trained BPE: like Llama's (space marks, BOS) or like Qwen's (bytes, no BOS)."""
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    alphabet = []
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        alphabet = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if not byte_level:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=["llama", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return bpe(byte_level=request.param == "qwen")


TWO_TURNS = [
    {"from": "human", "value": "<image>\nWhat is shown?"},
    {"from": "gpt", "value": "A red circle."},
    {"from": "human", "value": "How many dogs are there?"},
    {"from": "gpt", "value": "Two dogs."},
]
TEMPLATES = sorted({key for key in conv_templates if "plain" not in key})


def spans(ids: list[int], labels: list[int]) -> list[list[int]]:
    """Runs of supervised ids."""
    found: list[list[int]] = []
    last = IGNORE_INDEX
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE_INDEX:
            assert label == token
            if last == IGNORE_INDEX:
                found.append([])
            found[-1].append(token)
        last = label
    return found


@pytest.mark.parametrize("key", TEMPLATES)
def test_segments_are_the_prompt_and_answers_are_learned(tokenizer, key):
    conv = training_template(key)
    pieces = segments(conv, TWO_TURNS)
    text = "".join(piece.text for piece in pieces)
    whole = conv.copy()
    for i, turn in enumerate(TWO_TURNS):
        whole.append_message(conv.roles[i % 2], turn["value"])
    assert whole.get_prompt().startswith(text)
    learned = [piece.text for piece in pieces if piece.supervised]
    assert len(learned) == 2
    stop = conv.sep2 if key in ("llama_2", "llava_llama_2", "mistral_instruct") else None
    for piece, turn in zip(learned, TWO_TURNS[1::2], strict=True):
        assert piece.strip().startswith(turn["value"])
        assert piece.endswith(stop or conv.sep2 or conv.sep)
    encoded = preprocess(TWO_TURNS, tokenizer, conv, n_images=1)
    assert len(spans(encoded.input_ids, encoded.labels)) == 2
    assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == 1


@pytest.mark.parametrize("key", TEMPLATES)
def test_ids_before_an_answer_are_the_inference_prompt(tokenizer, key):
    """What the model saw in training up to the answer is what it is given at inference."""
    conv = training_template(key)
    encoded = preprocess(TWO_TURNS[:2], tokenizer, conv, n_images=1)
    asked = conv.copy()
    moved = preprocess_multimodal(TWO_TURNS[:1], 1, version=conv.version)
    asked.append_message(conv.roles[0], moved[0]["value"])
    asked.append_message(conv.roles[1], None)
    prompt = tokenize_prompt(asked.get_prompt(), tokenizer)
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert encoded.input_ids[:first] == prompt


@pytest.mark.parametrize("key", ["v1", "mistral_instruct", "qwen_2", "plain"])
def test_learned_tokens_decode_to_answer_and_stop(tokenizer, key):
    conv = training_template(key)
    encoded = preprocess(TWO_TURNS[:2], tokenizer, conv, n_images=1)
    (learned,) = spans(encoded.input_ids, encoded.labels)
    stop = {"plain": "\n"}.get(key) or conv.sep2 or conv.sep
    text = tokenizer.decode(learned).replace("▁", " ").replace(" ", "")
    assert text == ("A red circle." + stop).replace(" ", "")


def test_plain_learns_the_caption_only():
    tokenizer = bpe(byte_level=False)
    encoded = preprocess(TWO_TURNS[:2], tokenizer, training_template("plain"), n_images=1)
    assert encoded.input_ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert encoded.labels[:2] == [IGNORE_INDEX] * 2
    assert encoded.labels[2:] == encoded.input_ids[2:]
    caption = tokenizer("A red circle.\n")["input_ids"][1:]
    assert encoded.input_ids[2:] == caption


def test_a_token_that_would_straddle_a_border_is_cut_there():
    """Byte BPE merges two newlines; the ids of the prompt must stay those of the prompt alone."""
    tokenizer = bpe(byte_level=True)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    pieces = [Segment("hello\n", False), Segment("\nTwo dogs.", True)]
    encoded = encode_segments(tokenizer, pieces)
    prompt = tokenizer("hello\n")["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert tokenizer.decode(encoded.input_ids) == "hello\n\nTwo dogs."
    assert all(label != IGNORE_INDEX for label in encoded.labels[len(prompt) :])


def test_one_picture_moves_to_the_front_and_several_stay():
    one = preprocess_multimodal([{"from": "human", "value": "What is <image> this?"}], 1)
    assert one[0]["value"] == "<image>\nWhat is  this?"
    text = "Compare <image> and <image>"
    several = preprocess_multimodal([{"from": "human", "value": text}], 2)
    assert several[0]["value"] == text


@pytest.mark.parametrize("count", [0, 2])
def test_image_counts_are_checked(count):
    with pytest.raises(ValueError, match="1 <image> mark"):
        preprocess_multimodal(TWO_TURNS, count)


def test_a_border_behind_a_picture_keeps_the_space_that_inference_sees():
    """A fast Llama tokenizer swallows a space in front, so the prompt's pieces get one more."""
    tokenizer = bpe(byte_level=False)
    table = tokenizer.backend_tokenizer
    table.normalizer = normalizers.Sequence([])
    table.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    assert tokenizer(" hello")["input_ids"] == tokenizer("hello")["input_ids"]
    question = "<image> A re"
    prompt = tokenizer_image_token(question, tokenizer)
    for answer in ("?", "d circle."):  # as one text with the prompt; a token would straddle
        encoded = encode_segments(tokenizer, [Segment(question, False), Segment(answer, True)])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
        assert encoded.labels[len(prompt) :] == encoded.input_ids[len(prompt) :]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "non-empty"),
        ([{"from": "human", "value": "a"}], "no answer"),
        ([{"from": "human", "value": "a"}] * 2, "alternate"),
        ([{"from": "bot", "value": "a"}], "turn 0"),
        ([{"from": "human", "value": 3}], "turn 0"),
    ],
)
def test_bad_turns_are_refused(turns, message):
    with pytest.raises(ValueError, match=message):
        preprocess(turns, bpe(byte_level=True), training_template("v1"))


@pytest.mark.parametrize("turns", ["text", [], ["hello"], [{"from": "human"}], [{"value": "a"}],
                                   [{"from": "human", "value": None}], 5, None, {"from": "human"},
                                   [{"from": ["human"], "value": "a"}],
                                   [{"from": "human", "value": "\ud800"}]])  # fmt: skip
@pytest.mark.parametrize("version", ["v1", "v0", "plain", "mpt"])
@pytest.mark.parametrize("label_mode", ["legacy", "segments"])
def test_what_is_no_turn_is_refused_in_both_modes(turns, version, label_mode):
    with pytest.raises(ValueError, match="turn 0 must be|non-empty list"):
        preprocess(turns, bpe(byte_level=True), training_template(version), label_mode=label_mode)


@pytest.mark.parametrize("version", ["qwen_1_5", "qwen_2", "llava_llama_3"])
def test_templates_that_llava_had_not_have_no_legacy_labels(version):
    """Its last case would write them as '### user: ...'."""
    with pytest.raises(ValueError, match="has no template '(qwen|llama_v3)': use segments"):
        preprocess(
            TWO_TURNS, bpe(True), training_template(version), n_images=1, label_mode="legacy"
        )


def test_a_leading_answer_is_dropped():
    tokenizer = bpe(byte_level=False)
    conv = training_template("v1")
    hello = [{"from": "gpt", "value": "hello"}]
    assert preprocess(hello + TWO_TURNS, tokenizer, conv, n_images=1) == preprocess(
        TWO_TURNS, tokenizer, conv, n_images=1
    )


def test_an_empty_answer_leaves_nothing_to_learn():
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": ""}]
    encoded = preprocess(turns, bpe(byte_level=False), training_template("v1"))
    assert encoded.n_targets == 0


def test_the_worked_example_of_v0_is_no_training_text():
    assert training_template("v0").messages == []
    assert training_template("no such template").version == "v1"


def test_marks_of_the_mmtag_templates():
    """The tags of the template stand around those of --mm_use_im_start_end, as in LLaVA."""
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A dog."}]
    tagged = preprocess_multimodal(turns, 1, version="v1_mmtag")[0]["value"]
    assert tagged == "<Image><image></Image>\nWhat?"
    both = preprocess_multimodal(turns, 1, version="v1_mmtag", use_im_start_end=True)[0]["value"]
    assert both == "<Image><im_start><image><im_end></Image>\nWhat?"
