"""Templates: what the recordings do not cover, and the recordings themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from places import DATA

from llava.conversation import (
    SeparatorStyle,
    conv_templates,
    default_conversation,
    get_conversation,
    infer_conv_mode,
    resolve_conv_mode,
)

LLAMA_3_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def dialogue(key: str, *texts: str | None):
    conv = get_conversation(key)
    conv.messages = []
    for i, text in enumerate(texts):
        conv.append_message(conv.roles[i % 2], text)
    return conv


def test_default_is_v1():
    assert default_conversation is conv_templates["v1"] is conv_templates["vicuna_v1"]


def test_qwen_prompt():
    prompt = dialogue("qwen_1_5", "<image>\nWhat?", "A cat.", "Why?", None).get_prompt()
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert conv_templates["qwen_2"] is conv_templates["qwen_1_5"]


def test_llama_3_built_in_equals_the_chat_template():
    """The built-in form and Llama-3's own template, through a tokenizer, are the same text."""
    from transformers import AutoTokenizer

    folder = DATA / "pyramiddrop" / "preprocess" / "tokenizer_nonlegacy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LLAMA_3_TEMPLATE
    conv = dialogue("llava_llama_3", "<image>\n What? ", "A cat.", "Why?", None)
    built_in = conv.get_prompt()
    conv.tokenizer = tokenizer
    assert conv.get_prompt() == built_in
    assert built_in.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou")
    assert built_in.endswith("Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_copy_is_independent_and_shares_the_tokenizer():
    conv = dialogue("v1", "Q", None)
    conv.tokenizer = object()
    other = conv.copy()
    other.messages[-1][1] = "A"
    other.append_message("USER", "more")
    assert [m for _, m in conv.messages] == ["Q", None]
    assert other.tokenizer is conv.tokenizer
    assert conv_templates["v1"].messages == []


def test_picture_in_a_tuple_moves_to_the_front():
    conv = dialogue("v1", ("Look <image> here", object(), "Pad"), None)
    assert "USER: <image>\nLook  here ASSISTANT:" in conv.get_prompt()
    tagged = dialogue("v1_mmtag", ("<image>\nWhat?", object(), "Pad"), None).get_prompt()
    assert "USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What? ASS" in tagged


def test_empty_answer_is_an_open_turn():
    assert dialogue("v1", "Q", "").get_prompt() == dialogue("v1", "Q", None).get_prompt()


def test_answer_in_plain_style_is_refused():
    assert dialogue("plain", "<image>", None).get_prompt() == "<image>\n"
    with pytest.raises(TypeError, match="plain"):
        dialogue("plain", "<image>", "a cat").get_prompt()


def test_llama_2_must_open_with_the_user():
    conv = get_conversation("llava_llama_2")
    conv.append_message(conv.roles[1], "hello")
    with pytest.raises(ValueError, match="opens with"):
        conv.get_prompt()


def test_unknown_template_names_the_accepted_ones():
    with pytest.raises(ValueError, match=r"'vicuna'.*vicuna_v1.*qwen_1_5"):
        get_conversation("vicuna")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-llama-2-13b", "llava_llama_2"),
        ("llama3-llava-next-8b", "llava_llama_3"),
        ("llava-qwen1.5-72b", "qwen_1_5"),
        ("llava-mpt-7b", "mpt"),
        ("something", "llava_v0"),
    ],
)
def test_infer_conv_mode(name: str, mode: str):
    assert infer_conv_mode(name) == mode


def test_which_template_wins():
    class Config:
        conv_mode = "plain"

    assert resolve_conv_mode("v1", Config()) == ("v1", "flag")
    assert resolve_conv_mode(None, Config()) == ("plain", "checkpoint")
    assert resolve_conv_mode(None, object()) == ("vicuna_v1", "config table")
    with pytest.raises(ValueError, match="nonsense"):
        resolve_conv_mode("nonsense", object())


@pytest.mark.parametrize(
    ("kind", "vocabulary", "mode"),
    [
        ("llava_llama", 32000, "vicuna_v1"),
        ("llava_llama", 32064, "vicuna_v1"),
        ("llava_llama", 64000, "chatml_direct"),
        ("llava_llama", 128256, "llava_llama_3"),
        ("llava_mistral", 32000, "mistral_instruct"),
        ("llava_qwen", 151936, "qwen_1_5"),
    ],
)
def test_the_table_of_templates(kind: str, vocabulary: int, mode: str):
    config = SimpleNamespace(model_type=kind, vocab_size=vocabulary)
    assert resolve_conv_mode(None, config) == (mode, "config table")


def test_stop_string_is_text_only_where_the_separator_is():
    assert get_conversation("v0").stop_string == "###"
    assert get_conversation("v1").stop_string is None
    assert get_conversation("v0").sep_style is SeparatorStyle.SINGLE


def test_dict_leaves_pictures_out():
    conv = dialogue("v1", ("Q", object(), "Pad"), None)
    assert conv.dict()["messages"] == [["USER", "Q"], ["ASSISTANT", None]]
