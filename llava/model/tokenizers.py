"""Read a checkpoint's tokenizer so that it gives the ids it was trained with.

Special here: what transformers 5 does silently otherwise, tried out with recorded ids. Beside a
config.json of model_type "llava" (the published LLaVA-1.5), AutoTokenizer takes a sentencepiece
file for a generic tokenizer and loses the space in front of the first word; `LlamaTokenizer` reads
a tokenizer.json as if it had been made with `legacy: false`; and a tokenizer_config.json without
`legacy` meant true in transformers 4. So a tokenizer.json is taken as it stands, and a lone
tokenizer.model is read as Llama's, with version 4's defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from llava.model.checkpoint_layout import read_json

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_LLAMA = (None, "LlamaTokenizer", "LlamaTokenizerFast")
_VERSION_4 = {"legacy": True, "add_bos_token": True, "add_eos_token": False}


def load_tokenizer(folders: tuple[Path, ...], **options: Any) -> Any:
    """The tokenizer of the first folder that has one. ValueError when none has."""
    for folder in folders:
        if any((folder / name).is_file() for name in FILES):
            try:
                return read_tokenizer(folder, **options)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    raise ValueError(f"{folders[0]} has no tokenizer; looked for {', '.join(FILES)}")


def read_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer in a folder; options go to `from_pretrained`."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    if settings.get("tokenizer_class") in _LLAMA:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
        if (folder / "tokenizer.model").is_file():
            absent = {k: v for k, v in _VERSION_4.items() if settings.get(k) is None}
            return LlamaTokenizer.from_pretrained(folder, **absent, **options)
    return AutoTokenizer.from_pretrained(folder, **options)
