"""Labels of random dialogues in every template, against the templates written down once more here.

The dialogues hold what masking by searching the text would stumble over: separators, role words,
special tokens, line ends of every kind, white space at borders, combining characters.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from places import DATA
from test_train_preprocess import bpe, spans
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.prompting import tokenize_prompt
from llava.train.preprocess import preprocess, training_template

IM, END, HEAD, TAIL = "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"
WRITTEN = {
    # front of the first question, later question, what opens an answer, answer
    "default v0 llava_v0 v0_mmtag": (
        "{s}###Human: {q}###", "Human: {q}###", "Assistant:", " {a}###"),
    "v1 vicuna_v1 llava_v1 v1_mmtag": ("{s} USER: {q} ", "USER: {q} ", "ASSISTANT:", " {a}</s>"),
    "llama_2 llava_llama_2": (
        "[INST] <<SYS>>\n{s}\n<</SYS>>\n\n{q} ", "<s>[INST] {q} ", "[/INST]", " {a} </s>"),
    "mistral_instruct": ("[INST] {q} ", "[INST] {q} ", "[/INST]", " {a} </s>"),
    "chatml_direct mistral_direct mpt": (
        "{s}" + END + IM + "user\n{q}" + END, IM + "user\n{q}" + END, IM + "assistant\n",
        "{a}" + END),
    "qwen_1_5 qwen_2": (
        "{s}" + END + "\n" + IM + "user\n{q}" + END, "\n" + IM + "user\n{q}" + END,
        "\n" + IM + "assistant\n", "{a}" + END),
    "llava_llama_3": (
        f"<|begin_of_text|>{HEAD}system{TAIL}\n\n{{s}}<|eot_id|>{HEAD}user{TAIL}\n\n{{q}}<|eot_id|>",
        f"{HEAD}user{TAIL}\n\n{{q}}<|eot_id|>", f"{HEAD}assistant{TAIL}\n\n", "{a}<|eot_id|>"),
}  # fmt: skip
TEMPLATES = {key: row for keys, row in WRITTEN.items() for key in keys.split()}
WORDS = [
    "What is shown", "A red circle.", "USER:", "ASSISTANT:", " ASSISTANT: ", "###", "### Human:",
    "</s>", "<s>", "[INST]", "[/INST] ", "<<SYS>>", END, IM + "user\n", "<|eot_id|>", "\n", "\r\n",
    " ", "  ", "\t", "日本語", "é", "e\u0301", "🙂", "\u00a0", "\u200b", "a", "<Image>",
]  # fmt: skip


def llama_3() -> PreTrainedTokenizerFast:
    """Bytes, and a BOS that both the tokenizer and its chat template write."""
    tokenizer = bpe(byte_level=True)
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    bos = ("<|begin_of_text|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos]),
        ]
    )
    return tokenizer


def recorded(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DATA / "pyramiddrop" / "preprocess" / name)


TOKENIZERS = {
    "qwen": lambda: bpe(byte_level=True),
    "llama_3": llama_3,
    "vicuna": lambda: recorded("tokenizer_legacy"),
    "mistral": lambda: recorded("tokenizer_nonlegacy"),
}


def some_text(rng: random.Random) -> str:
    while True:
        words = [rng.choice(WORDS) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 4))]
        if "".join(words).strip():
            return "".join(words)


def dialogue(rng: random.Random) -> tuple[list[dict], list[str], list[str], int]:
    """A sample's turns, its questions as they should stand in the prompt, its answers, pictures."""
    asked = [some_text(rng) for _ in range(rng.randint(1, 3))]
    answers = [some_text(rng) for _ in asked]
    images, shown = rng.choice([0, 0, 1, 2]), list(asked)
    place = rng.randrange(len(asked))
    if images == 1:  # goes to the front of its question
        at = rng.randint(0, len(asked[place]))
        shown[place] = f"<image>\n{asked[place].strip()}"
        asked[place] = f"{asked[place][:at]}<image>{asked[place][at:]}"
    if images == 2:  # stay
        asked[place] = shown[place] = f"<image> {asked[place]}"
        asked[-1] = shown[-1] = f"{asked[-1]} <image>"
    turns = [
        {"from": name, "value": text}
        for pair in zip(asked, answers, strict=True)
        for name, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return turns, shown, answers, images


def written(key: str, questions: list[str], answers: list[str]) -> list[tuple[str, str]]:
    """(what is given, what is learned) of each round."""
    first, later, opening, answer = TEMPLATES[key]
    strip = str.strip if key == "llava_llama_3" else str
    rounds = []
    for number, (q, a) in enumerate(zip(questions, answers, strict=True)):
        given = (later if number else first).replace("{s}", conv_templates[key].system)
        if "mmtag" in key:
            q = q.replace("<image>", "<Image><image></Image>")
        rounds.append((given.replace("{q}", strip(q)) + opening, answer.replace("{a}", strip(a))))
    return rounds


def test_the_templates_are_all_there():
    assert {*TEMPLATES, "plain", "v0_plain"} == set(conv_templates)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_are_those_of_the_templates_written_once_more(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(name)
    for key in sorted(TEMPLATES) * 6:
        turns, questions, answers, images = dialogue(rng)
        encoded = preprocess(turns, tokenizer, training_template(key), n_images=images)
        rounds = written(key, questions, answers)
        ids, labels = encoded.input_ids, encoded.labels
        assert ids.count(IMAGE_TOKEN_INDEX) == images
        learned = [tokenizer.decode(span) for span in spans(ids, labels)]
        if name in ("qwen", "llama_3"):  # bytes come back as they were
            assert learned == [answer for _, answer in rounds], (key, turns)
            text = [t for t in ids if t not in (IMAGE_TOKEN_INDEX, tokenizer.bos_token_id)]
            whole = "".join(given + answer for given, answer in rounds)
            bos = tokenizer.bos_token or ""
            expected = whole.replace("<image>", "").replace(bos, "")
            assert tokenizer.decode(text) == expected, (key, turns)
        assert len(learned) == len(rounds), (key, turns)
        starts = [i for i, (a, b) in enumerate(pairwise(labels), 1) if a == IGNORE_INDEX != b]
        prompt = ""
        for start, (given, answer) in zip(starts, rounds, strict=True):
            prompt += given
            assert ids[:start] == tokenize_prompt(prompt, tokenizer), (key, turns)
            prompt += answer
            if name in ("qwen", "llama_3"):
                break  # these look ahead at spaces: behind the first answer one must give way


@pytest.mark.parametrize("key", sorted(TEMPLATES))
def test_behind_an_empty_answer_nothing_is_learned(key):
    tokenizer, rng = TOKENIZERS["llama_3"](), random.Random(key)
    ends = [("human", some_text(rng)), ("gpt", " \n"), ("human", "more"), ("gpt", "text")]
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "that"}]
    turns += [{"from": name, "value": text} for name, text in ends]
    encoded = preprocess(turns, tokenizer, training_template(key))
    (learned,) = spans(encoded.input_ids, encoded.labels)
    assert tokenizer.decode(learned) == written(key, ["what"], ["that"])[0][1]
    assert encoded.labels[-1] == IGNORE_INDEX
