"""``llava chat``: a dialogue about pictures in the terminal (LLaVA's `llava.serve.cli`).

    llava chat --model-path checkpoints/llava-digits --image-file picture.png
    python -m llava.serve.cli --model-path liuhaotian/llava-v1.5-7b --image-file URL --load-4bit

Answers stream; Ctrl-C ends an answer, an empty line or Ctrl-D the chat. Each turn is a new prefill
with all turns before it, so a plan chooses its tokens for each question (`llava.serve.engine`).
Mistakes inside the chat (a wrong path, a dialogue that fills the context) end no chat.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.decoding import Decoding
from llava.loading_flags import add_loading_flags, loading_options
from llava.reduction.flags import add_reduction_flags, plan_from_args
from llava.serve.images import open_picture, split_sources
from llava.utils import USER_ERRORS, describe_error, set_seed, user_errors

if TYPE_CHECKING:
    from PIL import Image

    from llava.serve.engine import Engine

COMMANDS = {
    "/image FILES": "other pictures (paths or URLs); the dialogue starts over",
    "/reset": "the dialogue starts over, with the same pictures",
    "/reduction PLAN": "another plan from the next answer on, e.g. none",
    "/help": "this list",
    "/exit": "end (as an empty line or Ctrl-D)",
}


class Chat:
    """Turns and pictures of one dialogue, and what a line of the user does to them."""

    def __init__(
        self,
        engine: Engine,
        pictures: list[Image.Image],
        decoding: Decoding,
        *,
        sep: str = ",",
        debug: bool = False,
    ) -> None:
        self.engine, self.pictures, self.decoding = engine, pictures, decoding
        self.sep, self.debug = sep, debug
        self.turns: list[dict[str, str]] = []

    def handle(self, line: str) -> bool:
        """One line of the user; False ends the chat."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in ("", "/exit"):
            return False
        if command == "/image":
            if not rest:
                raise ValueError("/image needs a path or URL")
            self.pictures = [open_picture(one) for one in split_sources(unquoted(rest), self.sep)]
            self.turns = []
            print(f"[{describe(self.pictures)}; the dialogue starts over]")
        elif command == "/reset":
            self.turns = []
            print("[the dialogue starts over]")
        elif command == "/reduction":
            self.engine.use_plan(rest or None)
            print(f"[plan: {self.engine.plan}]")
        elif command == "/help":
            print("\n".join(f"  {name:<16}  {what}" for name, what in COMMANDS.items()))
        elif command.startswith("/"):
            raise ValueError(f"{command} is no command; /help lists them")
        else:
            self.ask(line)
        return True

    def ask(self, question: str) -> None:
        """Stream the answer. A question without an answer leaves the dialogue as it was."""
        turns = [*self.turns, {"role": "user", "content": question}]
        pieces, start, interrupted = [], time.perf_counter(), False
        stream = self.engine.stream(turns, self.pictures, self.decoding)
        print("ASSISTANT: ", end="", flush=True)
        try:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if hasattr(stream, "close"):
                stream.close()
            print(" [interrupted]" if interrupted else "")
        text = "".join(pieces)
        if text:
            self.turns = [*turns, {"role": "assistant", "content": text}]
        elif not interrupted:
            print("[the model answered nothing; the question is forgotten]")
        if self.debug:
            seconds = time.perf_counter() - start
            print(f"[{len(turns)} turns, {seconds:.2f} s: {turns[-1]['content']!r} -> {text!r}]")


def describe(pictures: Sequence[Image.Image]) -> str:
    """``picture 640 x 480``, ``2 pictures 640 x 480, 320 x 240`` or ``no picture``."""
    sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures)
    if not pictures:
        return "no picture"
    return f"picture {sizes}" if len(pictures) == 1 else f"{len(pictures)} pictures {sizes}"


def unquoted(text: str) -> str:
    """A path as terminals paste it, without the quotes around it."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def read_line() -> str | None:
    """The user's next line; None when there is none (Ctrl-D, Ctrl-C, end of a pipe)."""
    try:
        line = input("USER: ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    if not sys.stdin.isatty():
        print(line)  # a piped question is not echoed by a terminal
    return line.strip()


def converse(chat: Chat) -> None:
    """Read and answer until the user has enough. What a user gets wrong is told, not fatal."""
    while (line := read_line()) is not None:
        try:
            if not chat.handle(line):
                return
        except USER_ERRORS as error:
            print(f"[error: {describe_error(error)}]")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``llava chat``; LLaVA's flags and the plan's."""
    parser = argparse.ArgumentParser(
        prog="llava chat",
        description="A dialogue about pictures in the terminal. In the dialogue:\n\n"
        + "\n".join(f"  {name:<16} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_loading_flags(parser)
    parser.add_argument("--image-file", help="paths or http(s) URLs, joined by SEP")
    parser.add_argument("--sep", default=",", help="what joins several image files (default ,)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default 0.2)")
    parser.add_argument("--top_p", type=float, help="nucleus sampling, where temperature is not 0")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="longest answer (default 512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for sampling")
    parser.add_argument("--debug", action="store_true", help="print time and text of each turn")
    add_reduction_flags(parser)
    return parser


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """``llava chat``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    # What can be wrong is looked at before the model is loaded.
    plan = plan_from_args(args)
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p)
    sources = split_sources(args.image_file, args.sep) if args.image_file else []
    pictures = [open_picture(source) for source in sources]
    from llava.serve.engine import Engine

    engine = Engine.load(
        args.model_path,
        args.model_base,
        conv_mode=args.conv_mode,
        reduction=plan,
        **loading_options(args),
    )
    set_seed(args.seed)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history
    print(f"[{engine.name} on {engine.model.device}; {describe(pictures)}; /help lists commands]")
    converse(Chat(engine, pictures, decoding, sep=args.sep, debug=args.debug))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
