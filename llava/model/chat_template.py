"""A conversation template as the Jinja text that transformers' processors carry.

Special here: made from the same row of the template table as the prompts of this project, so that
`processor.apply_chat_template` and `build_prompt` give the same ids. A picture in a message becomes
`<image>` and a line break, in front of the text as in LLaVA. LLaVA tokenises what stands behind a
picture as a text of its own, which opens with a space in Llama's vocabulary; `picture_text` finds
the characters that give the same ids behind a special token.
"""

from __future__ import annotations

from typing import Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import tokenizer_image_token

# The text of one message, pictures first.
_TEXT = (
    "{%- set ns.text = '' -%}"
    "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}"
    "{%- set ns.text = ns.text + PICTURE -%}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set ns.text = ns.text + part['text'] -%}{%- endfor -%}"
    "{%- endif -%}"
)


def picture_text(tokenizer: Any, config: Any = None) -> str:
    """What to write for a picture, `<image>` being a token that the tokenizer knows, so that the
    ids are LLaVA's: with <im_start> and <im_end> around it where the config says so, and with a
    line break, or what stands for one, behind it."""
    image_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    picture = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        picture = f"{DEFAULT_IM_START_TOKEN}{picture}{DEFAULT_IM_END_TOKEN}"
    question = "What is it?"
    wanted = tokenizer_image_token(f"a: {picture}\n{question}", tokenizer)
    wanted = [image_id if i == IMAGE_TOKEN_INDEX else i for i in wanted]
    for behind in ("\n", " \n"):
        if tokenizer(f"a: {picture}{behind}{question}").input_ids == wanted:
            return picture + behind
    return f"{picture}\n"


def chat_template(conv: Conversation, picture: str = f"{DEFAULT_IMAGE_TOKEN}\n") -> str | None:
    """The Jinja text of a template; picture: what a picture of a message is written as.

    None for the styles that transformers' chats cannot say (`plain`, and Llama-2 with a system
    text, which stands inside the first question).
    """
    user, assistant = conv.roles
    sep, sep2 = conv.sep, conv.sep2 or ""
    if conv.sep_style is SeparatorStyle.TWO:
        before = conv.system + sep
        turns = (f"{user}: ", sep), (f"{assistant}: ", sep2)
        opening = f"{assistant}:"
    elif conv.sep_style is SeparatorStyle.SINGLE:
        before = conv.system + sep
        turns = (f"{user}: ", sep), (f"{assistant}: ", sep)
        opening = f"{assistant}:"
    elif conv.sep_style is SeparatorStyle.MPT:
        before = conv.system + sep
        turns = (user, sep), (assistant, sep)
        opening = assistant
    elif conv.sep_style is SeparatorStyle.CHATML:
        before = f"{conv.system}{sep}\n" if conv.system else ""
        turns = (f"{user}\n", f"{sep}\n"), (f"{assistant}\n", f"{sep}\n")
        opening = f"{assistant}\n"
    elif conv.sep_style is SeparatorStyle.LLAMA_2 and not conv.system:
        before = ""
        turns = ("[INST] ", " [/INST]"), (" ", f" {sep2}")
        opening = ""
    else:
        return None
    said = [f"{{{{- {_quoted(a)} + ns.text + {_quoted(b)} -}}}}" for a, b in turns]
    return (
        "{%- set ns = namespace(text='') -%}"
        f"{{{{- {_quoted(before)} -}}}}"
        "{%- for message in messages if message['role'] != 'system' -%}"
        f"{_TEXT.replace('PICTURE', _quoted(picture))}"
        f"{{%- if message['role'] == 'user' -%}}{said[0]}{{%- else -%}}{said[1]}{{%- endif -%}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(opening)} -}}}}{{%- endif -%}}"
    )


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
