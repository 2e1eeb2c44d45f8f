"""Conversation templates: from turns to the one string a checkpoint was trained on.

All templates stand in one table, `conv_templates`; the strings are part of the checkpoints and
must not change by a single character. Sources: LLaVA-1.5 `conversation.py` (default to mpt) and
LLaVA-NeXT (qwen_1_5, qwen_2, llava_llama_3).

    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message(conv.roles[0], "<image>\\nWhat is shown?")
    conv.append_message(conv.roles[1], None)
    prompt = conv.get_prompt()

A turn whose message is None or empty is open: the prompt ends with its role, and the model goes on
from there. Checked against recorded prompts by tests/parity/preprocess_cases.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any


class SeparatorStyle(Enum):
    """How turns are joined to one prompt; see `Conversation.get_prompt`."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    CHATML = auto()
    LLAMA_3 = auto()


@dataclasses.dataclass
class Conversation:
    """A template and the turns so far.

    `messages` is a list of `[role, message]`; a message is a string, None (an open turn), or a
    tuple `(text, image, mode)` as LLaVA's demo uses it. `tokenizer` is read by the Llama-3 style
    only (its chat template is the prompt's); without one an equal built-in form is used.
    """

    system: str
    roles: Sequence[str]
    messages: list[Any]
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False
    tokenizer: Any = None

    def get_prompt(self) -> str:
        """The prompt of all turns. Raises TypeError for an answer in the `plain` style, which has
        no second separator, and ValueError if a Llama-2 dialogue does not open with the user."""
        return _STYLES[self.sep_style](self, self._plain_messages())

    def append_message(self, role: str, message: Any) -> None:
        """Add a turn; `message=None` leaves it open."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent conversation with the same template and turns (tokenizer shared)."""
        return dataclasses.replace(self, messages=[list(turn) for turn in self.messages])

    def dict(self) -> dict[str, Any]:
        """The facts of the conversation as plain data; pictures are left out."""
        return {
            "system": self.system,
            "roles": list(self.roles),
            "messages": [[role, _text(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    @property
    def stop_string(self) -> str | None:
        """The text that ends an answer, where it is ordinary text to the tokenizer ("###")."""
        return self.sep if self.sep_style is SeparatorStyle.SINGLE else None

    def _plain_messages(self) -> list[tuple[str, str | None]]:
        """Turns with text only. A picture handed over in the first turn becomes an image mark in
        front of its text (in the mmtag templates: a turn of its own, which is acknowledged)."""
        turns = [(role, _text(message)) for role, message in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return turns
        role, text = turns[0]
        text = (text or "").replace("<image>", "").strip()
        if "mmtag" in self.version:
            shown = [(self.roles[0], "<Image><image></Image>"), (self.roles[1], "Received.")]
            return [*shown, (role, text), *turns[1:]]
        return [(role, "<image>\n" + text), *turns[1:]]


def _text(message: Any) -> str | None:
    return message[0] if isinstance(message, tuple) else message


Turns = list[tuple[str, "str | None"]]


def _single(conv: Conversation, turns: Turns) -> str:
    parts = [conv.system + conv.sep]
    for role, text in turns:
        parts.append(f"{role}: {text}{conv.sep}" if text else f"{role}:")
    return "".join(parts)


def _two(conv: Conversation, turns: Turns) -> str:
    seps = (conv.sep, conv.sep2 or "")
    parts = [conv.system + conv.sep]
    for i, (role, text) in enumerate(turns):
        parts.append(f"{role}: {text}{seps[i % 2]}" if text else f"{role}:")
    return "".join(parts)


def _mpt(conv: Conversation, turns: Turns) -> str:
    parts = [conv.system + conv.sep]
    for role, text in turns:
        parts.append(role + text + conv.sep if text else role)
    return "".join(parts)


def _plain(conv: Conversation, turns: Turns) -> str:
    seps = (conv.sep, conv.sep2)
    parts = [conv.system]
    for i, (_, text) in enumerate(turns):
        if not text:
            continue
        sep = seps[i % 2]
        if sep is None:
            raise TypeError(
                f"turn {i} ({text[:40]!r}) cannot be written in the plain style: sep2 is None; "
                "plain prompts hold the user's turn only"
            )
        parts.append(text + sep)
    return "".join(parts)


def _llama_2(conv: Conversation, turns: Turns) -> str:
    if turns and (not turns[0][1] or turns[0][0] != conv.roles[0]):
        raise ValueError(
            f"a {conv.version} dialogue opens with a message of {conv.roles[0]!r}, got {turns[0]!r}"
        )
    parts = []
    for i, (_, text) in enumerate(turns):
        if not text:
            continue
        if i == 0 and conv.system:
            text = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n{text}"
        if i % 2 == 0:
            parts.append(f"{conv.sep}[INST] {text} [/INST]")
        else:
            parts.append(f" {text} {conv.sep2}")
    # The first BOS comes from the tokenizer; LLaVA removes the separator's characters here.
    return "".join(parts).lstrip(conv.sep)


def _chatml(conv: Conversation, turns: Turns) -> str:
    parts = [f"{conv.system}{conv.sep}\n" if conv.system else ""]
    for role, text in turns:
        parts.append(f"{role}\n{text}{conv.sep}\n" if text else f"{role}\n")
    return "".join(parts)


def _llama_3(conv: Conversation, turns: Turns) -> str:
    messages = [{"role": "system", "content": conv.system}]
    messages += [{"role": role, "content": text} for role, text in turns if text]
    if conv.tokenizer is not None and getattr(conv.tokenizer, "chat_template", None):
        return conv.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    parts = ["<|begin_of_text|>"]
    for message in messages:
        header = f"<|start_header_id|>{message['role']}<|end_header_id|>"
        parts.append(f"{header}\n\n{message['content'].strip()}{conv.sep}")
    parts.append(f"<|start_header_id|>{conv.roles[1]}<|end_header_id|>\n\n")
    return "".join(parts)


_STYLES = {
    SeparatorStyle.SINGLE: _single,
    SeparatorStyle.TWO: _two,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.PLAIN: _plain,
    SeparatorStyle.LLAMA_2: _llama_2,
    SeparatorStyle.CHATML: _chatml,
    SeparatorStyle.LLAMA_3: _llama_3,
}

# --- the table -----------------------------------------------------------------------------------
_ASSISTANT = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_SEES = (
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_USER = _ASSISTANT.format("user")
_HUMAN = _ASSISTANT.format("human")
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    + _SEES
    + "The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_LLAVA = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_META = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
    "or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_IM = "<|im_start|>"
_MPT_SYSTEM = (
    f"{_IM}system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_LOWER = ("user", "assistant")
_UPPER = ("USER", "ASSISTANT")
_TITLE = ("Human", "Assistant")
_IM_LINES = (f"{_IM}user\n", f"{_IM}assistant\n")
_IM_ROLES = (f"{_IM}user", f"{_IM}assistant")
# v0 opens with a worked example; the wording is this project's own.
_EXAMPLE = (
    "How do renewable and non-renewable energy differ?",
    "Renewable energy, such as wind and sunlight, is replaced by nature as fast as it is used. "
    "Non-renewable energy, such as coal and oil, is used up and adds carbon to the air.\n",
)
_S = SeparatorStyle

# keys: (style, system, roles, sep, sep2, version); an alias shares the row of the first key.
_TABLE = {
    "default v0": (_S.SINGLE, _HUMAN, _TITLE, "###", None, "Unknown"),
    "v1 vicuna_v1": (_S.TWO, _USER, _UPPER, " ", "</s>", "v1"),
    "llama_2": (_S.LLAMA_2, _META, _UPPER, "<s>", "</s>", "llama_v2"),
    "mistral_instruct": (_S.LLAMA_2, "", _UPPER, "", "</s>", "llama_v2"),
    "chatml_direct mistral_direct": (
        _S.MPT,
        f"{_IM}system\nAnswer the questions.",
        _IM_LINES,
        "<|im_end|>",
        None,
        "mpt",
    ),
    "plain v0_plain": (_S.PLAIN, "", ("", ""), "\n", None, "Unknown"),
    "llava_v0": (_S.SINGLE, _HUMAN, _TITLE, "###", None, "Unknown"),
    "v0_mmtag": (_S.SINGLE, _MMTAG, _TITLE, "###", None, "v0_mmtag"),
    "llava_v1": (_S.TWO, _HUMAN, _UPPER, " ", "</s>", "v1"),
    "v1_mmtag": (_S.TWO, _MMTAG, _UPPER, " ", "</s>", "v1_mmtag"),
    "llava_llama_2": (_S.LLAMA_2, _LLAVA, _UPPER, "<s>", "</s>", "llama_v2"),
    "mpt": (_S.MPT, _MPT_SYSTEM, _IM_LINES, "<|im_end|>", None, "mpt"),
    "qwen_1_5 qwen_2": (
        _S.CHATML,
        f"{_IM}system\nYou are a helpful assistant.",
        _IM_ROLES,
        "<|im_end|>",
        None,
        "qwen",
    ),
    "llava_llama_3": (_S.LLAMA_3, _LLAVA, _LOWER, "<|eot_id|>", None, "llama_v3"),
}


def _build_table() -> dict[str, Conversation]:
    table = {}
    for keys, (style, system, roles, sep, sep2, version) in _TABLE.items():
        conv = Conversation(system, roles, [], 0, style, sep, sep2, version)
        for key in keys.split():
            table[key] = conv
    worked = [list(turn) for turn in zip(_TITLE, _EXAMPLE, strict=True)]
    example = dataclasses.replace(table["default"], messages=worked, offset=2)
    return {**table, "default": example, "v0": example}


conv_templates: dict[str, Conversation] = _build_table()
default_conversation: Conversation = conv_templates["v1"]

# Which template a published name means, first match wins (LLaVA's `run_llava`, with the families
# of LLaVA-NeXT in front). A hint for people, never a rule: `resolve_conv_mode` reads the config.
_NAME_HINTS = (
    ("qwen", "qwen_1_5"),
    ("llama-3", "llava_llama_3"),
    ("llama3", "llava_llama_3"),
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def infer_conv_mode(model_name: str) -> str:
    """The template key that a model's name suggests, `llava_v0` if nothing matches."""
    name = model_name.lower()
    return next((mode for hint, mode in _NAME_HINTS if hint in name), "llava_v0")


def get_conversation(conv_mode: str) -> Conversation:
    """A fresh conversation of the template `conv_mode`. Raises ValueError for an unknown key."""
    if conv_mode not in conv_templates:
        raise ValueError(
            f"unknown conversation template {conv_mode!r}; accepted: {', '.join(conv_templates)}"
        )
    return conv_templates[conv_mode].copy()


# Which template a checkpoint means that does not say: by decoder and size of the vocabulary, first
# match wins. (model types, least vocabulary, template). Published checkpoints it stands for:
# docs/Checkpoints.md. LLaVA over Llama-2-chat cannot be told from Vicuna: give --conv-mode there.
_CONFIG_TABLE = (
    (("llava_mistral", "mistral"), 0, "mistral_instruct"),
    (("llava_qwen", "qwen2", "llava_qwen3", "qwen3"), 0, "qwen_1_5"),
    (("llava_llama", "llava", "llama"), 128_000, "llava_llama_3"),
    (("llava_llama", "llava", "llama"), 64_000, "chatml_direct"),  # Yi-34B
)


def conv_mode_of_config(config: object) -> str:
    """The template of the documented table: by `model_type` and `vocab_size`, else vicuna_v1."""
    kind, vocabulary = getattr(config, "model_type", None), getattr(config, "vocab_size", None) or 0
    for kinds, least, mode in _CONFIG_TABLE:
        if kind in kinds and vocabulary >= least:
            return mode
    return "vicuna_v1"


def resolve_conv_mode(flag: str | None, config: object) -> tuple[str, str]:
    """Which template wins and where it came from: the flag's ("flag"), else the checkpoint's own
    `conv_mode` ("checkpoint"), else the table's ("config table"). ValueError if unknown."""
    stored = getattr(config, "conv_mode", None)
    source = "flag" if flag else "checkpoint" if stored else "config table"
    mode = flag or stored or conv_mode_of_config(config)
    get_conversation(mode)
    return mode, source
