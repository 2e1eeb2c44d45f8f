"""LLaVA's `run_llava`: one question about one or several pictures.

    python -m llava.eval.run_llava --model-path checkpoints/llava-digits \\
        --image-file picture.png --query "What digit is in C3?"

`eval_model(args)` takes any object with the fields that LLaVA's README names: model_path,
model_base, model_name, query, conv_mode, image_file, sep, temperature, top_p, num_beams,
max_new_tokens. It prints the answer and returns it. Read as well where they are there: reduction,
layer_list, image_token_ratio_list, device, load_8bit, load_4bit, seed. The folder's name decides
nothing, so model_name is not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.decoding import Decoding
from llava.loading_flags import add_loading_flags, loading_options
from llava.reduction.flags import add_reduction_flags
from llava.reduction.plan import plan_from_flags
from llava.serve.images import open_picture, split_sources
from llava.utils import set_seed, user_errors


def eval_model(args: Any) -> str:
    """Print and return the answer. Pictures are opened before the model is loaded.

    Raises FileNotFoundError or ValueError for a picture, checkpoint, template or plan that cannot
    be used; ValueError when the query's `<image-placeholder>` marks and the pictures differ.
    """

    def optional(name: str) -> Any:
        return getattr(args, name, None)

    plan = plan_from_flags(
        optional("reduction"), optional("layer_list"), optional("image_token_ratio_list")
    )
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.num_beams)
    pictures = [open_picture(source) for source in split_sources(args.image_file, args.sep)]
    from llava.serve.engine import Engine

    engine = Engine.load(
        args.model_path,
        args.model_base,
        conv_mode=args.conv_mode,
        reduction=plan,
        **loading_options(args),
    )
    set_seed(optional("seed") or 0)
    answer = engine.answer(plain_marks(args.query), pictures, decoding)
    print(answer.text)
    return answer.text


def plain_marks(query: str) -> str:
    """The query with LLaVA's placeholders, wrapped or not, as `<image>` marks."""
    wrapped = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN).replace(
        wrapped, DEFAULT_IMAGE_TOKEN
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line of LLaVA's `run_llava`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.run_llava", description="One question about pictures."
    )
    add_loading_flags(parser)
    parser.add_argument("--image-file", required=True, help="paths or http(s) URLs, joined by SEP")
    parser.add_argument("--query", required=True)
    parser.add_argument("--sep", default=",", help="what joins several image files (default ,)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default 0.2)")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="for sampling")
    add_reduction_flags(parser)
    parser.add_argument("--pdrop_infer", nargs="?", help="accepted from old scripts, not read")
    return parser


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m llava.eval.run_llava`."""
    eval_model(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
