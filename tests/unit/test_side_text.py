"""Which words of a prompt are its question and its answer options, in text and in ids."""

from __future__ import annotations

import pytest
import torch
from places import DATA
from transformers import AutoTokenizer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import token_spans
from llava.prompting import build_prompt, pad_texts, side_texts, tokenize_prompt
from llava.side_text import find_options

SCIENCE = (
    "Context: Look at the map (A).\nQuestion: Which state is highlighted?\n"
    "Options: (A) New York (B) Maine (C) Ohio\n"
    "Answer with the option's letter from the given choices directly."
)
LINES = (
    "What is it?\nA. a cat.\nB. a dog, or B) nothing\nC. U.S.A.\n"
    "Answer with the option's letter from the given choices directly."
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(
        DATA / "pyramiddrop" / "preprocess" / "tokenizer_nonlegacy"
    )


@pytest.mark.parametrize(
    ("text", "block", "words"),
    [
        (SCIENCE, "Options: (A) New York (B) Maine (C) Ohio", ("New York", "Maine", "Ohio")),
        (
            LINES,
            "A. a cat.\nB. a dog, or B) nothing\nC. U.S.A.",
            ("a cat.", "a dog, or B) nothing", "U.S.A."),
        ),
        ("Is it?\nChoices:\n(A) yes\n(B) no", "Choices:\n(A) yes\n(B) no", ("yes", "no")),
        ("Is it? options: A) yes\nB) no\n\nThink.", "options: A) yes\nB) no", ("yes", "no")),
        ("Is it?\n(A) yes (B) no\nAnswer (A) or (B).", "(A) or (B).", ("or", ".")),
        ("(A) yes (B) no\nGive (A) only.", "(A) yes (B) no", ("yes", "no")),
        ("Is it?\nA: 1\nB: 2\nD: 4", "A: 1\nB: 2", ("1", "2")),
        ("f(A) and g(B) are equal", None, ()),
        ("What is (A)?", None, ()),
        ("B. no\nC. yes", None, ()),
        ("A. Smith said so.\nWho?", None, ()),
        ("", None, ()),
    ],
)
def test_options(text, block, words):
    found = find_options(text)
    if block is None:
        assert found is None
        return
    assert text[found.start : found.stop] == block
    assert found.words == words


PROMPTS = (
    "<image>\nWhat is it?",
    "Is <image> like <image> ?",
    " <image>",
    "plain words, no picture",
    "<image> two  spaces and\n\nlines <image>",
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_spans_are_those_of_the_ids(tokenizer, prompt):
    """Without BOS and marks the ids are the same, and the spans cover the prompt's text."""
    spans = token_spans(prompt, tokenizer)
    ids = tokenize_prompt(prompt, tokenizer)
    assert [token for token, _, _ in spans] == [
        i for i in ids if i not in (IMAGE_TOKEN_INDEX, tokenizer.bos_token_id)
    ]
    covered = {i for _, start, stop in spans for i in range(start, stop)}
    assert (
        "".join(prompt[i] for i in sorted(covered)).split() == prompt.replace("<image>", "").split()
    )
    assert [span[1:] for span in spans] == sorted(span[1:] for span in spans)


def squeezed(tokenizer, ids: list[int]) -> str:
    """The text of ids without white space, which side texts leave out where it is a token."""
    return "".join(tokenizer.decode(ids).split())


def is_run_of(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole)))


@pytest.mark.parametrize("template", sorted(set(conv_templates) - {"llava_llama_3"}))
@pytest.mark.parametrize("question", ["A", "ASSISTANT: USER", SCIENCE, f"<image>\n{LINES}"])
def test_the_question_of_a_prompt(tokenizer, template, question):
    """Its ids stand in the prompt as they are; the template's words are not among them."""
    prompt = build_prompt(question, template)
    texts = side_texts(prompt, tokenizer)
    plain = question.replace("<image>", "")
    assert squeezed(tokenizer, texts["question"]) == "".join(plain.split())
    assert set(texts["question"]) <= set(tokenize_prompt(prompt, tokenizer))
    options = find_options(question)
    if options is None:
        assert texts["options"] == texts["option_words"] == []
        return
    block = question[options.start : options.stop]
    assert squeezed(tokenizer, texts["options"]) == "".join(block.split())
    assert is_run_of(texts["options"][1:-1], texts["question"])
    words = texts["option_words"]
    assert words[0] == tokenizer.bos_token_id
    assert squeezed(tokenizer, words[1:]) == "".join("".join(options.words).split())


def test_the_last_turn_is_the_question(tokenizer):
    turns = [("user", f"<image>\n{LINES}"), ("assistant", "B"), ("user", "B or C?")]
    prompt = build_prompt(turns, "v1")
    texts = side_texts(prompt, tokenizer)
    assert squeezed(tokenizer, texts["question"]) == "BorC?"
    assert texts["options"] == []
    # Where nobody says what the question is, options are looked for in the whole prompt.
    unknown = side_texts(str(prompt), tokenizer)
    assert unknown["question"] == []
    assert squeezed(tokenizer, unknown["options"]).endswith("C.U.S.A.")
    start = prompt.index("What is it")
    given = side_texts(str(prompt), tokenizer, (start, start + 11))
    assert squeezed(tokenizer, given["question"]) == "Whatisit?"


def test_start_and_end_marks_are_no_words(tokenizer):
    prompt = build_prompt("Is <image> red?", "v1", 1, True)
    texts = side_texts(prompt, tokenizer)
    assert squeezed(tokenizer, texts["question"]) == "Isred?"


def test_texts_of_a_batch():
    padded = pad_texts([{"question": [3, 4], "options": []}, {"question": [5], "options": []}])
    assert padded["question"].tolist() == [[3, 4], [5, -1]]
    assert padded["options"].tolist() == [[-1], [-1]]
    assert padded["options"].dtype == torch.long


def test_a_tokenizer_that_does_not_tell():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not tell"):
        token_spans("a", Slow())
