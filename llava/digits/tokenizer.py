"""The tiny model's own tokenizer: one token per word, saved as an ordinary transformers folder.

`[INST]`, `[/INST]` and the line break are tokens, so the `mistral_instruct` and `plain` templates
come through without loss; spaces are not kept, which makes a prompt tokenised in pieces equal to
the prompt tokenised whole. Every piece gets a leading `<s>`, as LLaVA's tokenising expects.
"""

from __future__ import annotations

from pathlib import Path

from llava.digits.questions import NOTHING, SIDES
from llava.digits.scenes import CELLS, COLOUR_NAMES, GRID, ROWS

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
MODEL_MAX_LENGTH = 512
_WORDS = (
    "What Is Are How Where digit digits color number there is are in the a an row column image many"
    " of to how what where yes no , . ? : ; Please answer or and"
)


def vocabulary() -> list[str]:
    """All words in the order of their ids."""
    words = [*SPECIAL, "[INST]", "[/INST]", "\n", *[str(digit) for digit in range(10)]]
    words += [*COLOUR_NAMES, NOTHING, *ROWS, *[str(i + 1) for i in range(GRID)], *CELLS]
    words += [word for side in SIDES for word in side.split()]
    words += ["USER", "ASSISTANT", *_WORDS.split()]
    return list(dict.fromkeys(words))


def build_tokenizer(path: str | Path) -> None:
    """Write the tokenizer's files into the folder `path`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    pieces = Regex(r"\n|\[/?INST\]|[A-Za-z]+[0-9]*|[0-9]|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MODEL_MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(path))
