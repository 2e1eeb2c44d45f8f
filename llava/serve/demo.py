"""``llava demo``: one page in a browser that shows what dropping visual tokens does to an answer.

Special here: one process, nothing leaves the machine (no analytics, no fonts or scripts from
elsewhere, no share link). Each question is answered twice, without a plan and with one; the plan is
found by the budget solver for the picture at hand; times are medians of runs made in turn after a
warm-up. `Demo.ask` is the page without the page: it takes plain values and returns plain values.

    pip install "llava[serve]"; llava demo --model-path checkpoints/llava-digits-pdrop
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.drawing import colour, stages
from llava.loading_flags import add_loading_flags, loading_options
from llava.model.tracing import look
from llava.prompting import move_batch, questions_batch
from llava.reduction import REDUCERS, ReductionPlan
from llava.reduction.budget import Budget, solve, tera
from llava.reduction.flops import ModelShape, Preset
from llava.sequence import TokenSequence
from llava.serve.engine import Engine
from llava.timing import Clock, Region, Series, interleave
from llava.utils import get_logger, user_errors

log = get_logger(__name__)

DIGITS = ("vqav2", "gqa", "textvqa", "pope", "mme")
REPEATS = 7


# ----------------------------------------------------------------------------- without the page
@dataclass(frozen=True)
class Reply:
    """What one question came to. scene: as `look` returns it, the run without a plan first.
    times: prefill of both runs. flags: the plan, ready to paste."""

    scene: Mapping[str, Any]
    times: tuple[Series, Series]
    flags: str

    @property
    def speedup(self) -> float:
        """Prefill time without the plan over prefill time with it."""
        return self.times[0].wall_ms / self.times[1].wall_ms


class Demo:
    """One engine, asked with and without a plan."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        config, tower = engine.model.config, engine.model.get_vision_tower()
        if tower is None:
            raise ValueError(f"{engine.name} has no vision tower: there is nothing to ask it about")
        self.shape = ModelShape.from_config(config, tower.config)
        stored = ReductionPlan.parse(getattr(config, "visual_token_reduction", None))
        self.trained_layers = [cut.at for cut in stored.cuts]

    def methods(self) -> list[str]:
        """Methods that a budget can be given for, on this model."""
        preset, found = Preset(self.shape, 16, self.shape.patches, 16, "none"), []
        for name in REDUCERS:
            try:
                solve(preset, name, Budget("average_tokens", 0.5 * preset.visual))
            except ValueError:
                continue
            found.append(name)
        return found

    def sequence(self, picture: Image.Image, question: str) -> TokenSequence:
        """The uncut sequence of a question."""
        engine = self.engine
        batch = questions_batch(
            engine.tokenizer, engine.image_processor, engine.model.config, engine.conv_mode,
            [(question, [picture])],
        )  # fmt: skip
        moved = move_batch(batch, engine.model.device, engine.model.dtype)
        with torch.inference_mode():
            return engine.model.build_sequence(**moved, kind="left")

    def plan(self, sequence: TokenSequence, method: str, percent: float) -> ReductionPlan:
        """The plan of a method that leaves `percent` of the visual tokens, averaged over layers.

        The layers that the checkpoint was trained with are taken where they can meet the budget.
        Raises ValueError, with the range that can be reached.
        """
        visual = sequence.layout.visual[0]
        text = sequence.layout.lengths[0] - visual
        preset = Preset(self.shape, text // 2, visual, text - text // 2, "none")
        budget = Budget("average_tokens", percent / 100 * visual)
        if self.trained_layers:
            try:
                return solve(preset, method, budget, self.trained_layers)[0].plan
            except ValueError:
                log.debug("%s with cuts at %s cannot meet %s", method, self.trained_layers, budget)
        return solve(preset, method, budget)[0].plan

    def ask(
        self,
        picture: Image.Image | None,
        question: str,
        method: str,
        percent: float,
        own_plan: str = "",
        repeats: int = REPEATS,
    ) -> Reply:
        """Answer a question about a picture without and with a plan, and time both.

        own_plan: a plan's text; it replaces method and percent. Raises ValueError for a missing
        picture or question, and for a plan that does not fit.
        """
        if picture is None:
            raise ValueError("there is no picture; give one, or pick an example")
        if not question.strip():
            raise ValueError("there is no question; write one, or pick an example")
        engine, question = self.engine, question.strip()
        sequence = self.sequence(picture, question)
        if own_plan.strip():
            plan = ReductionPlan.parse(own_plan)
        else:
            plan = self.plan(sequence, method, percent)
        none = ReductionPlan()
        scene = look(
            engine.tokenizer, engine.model, engine.image_processor, question, [picture],
            [none, plan], conv_mode=engine.conv_mode,
        )  # fmt: skip
        times = interleave(
            {"none": self.prefill(sequence, none), "plan": self.prefill(sequence, plan)},
            Clock(engine.model.device),
            repeats,
        )
        return Reply(scene, (times["none"], times["plan"]), f'--reduction "{plan}"')

    def prefill(self, sequence: TokenSequence, plan: ReductionPlan) -> Region:
        """What is timed: the decoder over the prompt, cache written, logits of the last row."""

        @torch.inference_mode()
        def run(_: Any) -> None:
            self.engine.model(sequence=sequence, reduction=plan, use_cache=True, logits_to_keep=1)

        return Region(run)


# ----------------------------------------------------------------------------- pieces of HTML
STYLE = """
.llava-two { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); }
.llava-card { border: 1px solid var(--border-color-primary); border-radius: 10px;
  padding: 14px 16px; background: var(--background-fill-primary); }
.llava-card b { display: block; font-size: 24px; line-height: 1.25; overflow-wrap: anywhere; }
.llava-card span { color: var(--body-text-color); opacity: .72; font-size: 13.5px; }
.llava-card i { display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 7px; }
.llava-table { width: 100%; border-collapse: collapse; margin-top: 12px; font-size: 14px;
  font-variant-numeric: tabular-nums; border: 0 !important; }
.llava-table th, .llava-table td { padding: 5px 8px; text-align: right; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.llava-table tr { border: 0 !important; }
.llava-table th:first-child, .llava-table td:first-child { text-align: left; }
.llava-note { color: var(--body-text-color); opacity: .72; font-size: 13px; margin-top: 8px; }
.stages { display: grid; gap: 12px; grid-template-columns:
  repeat(auto-fill, minmax(min(100%, calc(var(--share) * 130px)), 1fr)); }
#picture img { min-height: 220px; object-fit: contain; }
.stages figure { margin: 0; }
.stages svg { display: block; width: 100%; height: auto; border: 1px solid #d5d9e0;
  border-radius: 4px; background: #fff; }
.stages figcaption { font-size: 12px; color: var(--body-text-color); opacity: .72;
  margin: 4px 0 8px; }
.stages .fields { display: flex; gap: 6px; align-items: flex-start; }
.stages .fields > div { min-width: 0; }
"""


SLOW = (
    " It is well above the share of the operations: one question to a small model is bound by "
    "launching operations, not by their number, and a cut adds some."
)


def answers_html(reply: Reply) -> str:
    """Both answers, what they cost, and how long the prefill took."""
    none, run = reply.scene["runs"]
    method = run["plan"].split(":")[0]
    label = method if method in REDUCERS else "your plan"
    cards = [
        f'<div class="llava-card"><span><i style="background:{colour(name)}"></i>{escape(title)}'
        f"</span><b>{escape(each['answer']) or '(nothing)'}</b></div>"
        for each, name, title in ((none, "none", "no dropping"), (run, method, label))
    ]
    a, b = reply.times
    rows = [
        ("visual tokens, mean over layers", f"{none['average_tokens']:.0f}",
         f"{run['average_tokens']:.1f}", share(run, none, "average_tokens")),
        ("prefill FLOPs", tera(none["full_tflops"]), tera(run["full_tflops"]),
         share(run, none, "full_tflops")),
        ("prefill time, ms", spread(a), spread(b), f"{b.wall_ms / a.wall_ms:.0%}"),
    ]  # fmt: skip
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    slow = "" if b.wall_ms / a.wall_ms < 1.2 * run["full_tflops"] / none["full_tflops"] else SLOW
    return (
        f'<div class="llava-two">{"".join(cards)}</div><table class="llava-table"><thead><tr>'
        f"<th></th><th>no dropping</th><th>{escape(label)}</th><th>share</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
        f'<p class="llava-note">Time: the decoder over the prompt, median of {len(a.samples)} runs '
        "of each side in turn after a warm-up [quartiles], wall clock; choosing tokens is in it, "
        f"the vision tower and writing the answer are not.{slow}</p>"
    )


def share(run: Mapping[str, Any], none: Mapping[str, Any], key: str) -> str:
    """A figure of the plan as a share of the one without."""
    return f"{run[key] / none[key]:.0%}"


def spread(series: Series) -> str:
    """``12.3 [12.1, 12.8]`` of wall times."""
    walls = sorted(sample.wall_ms for sample in series.samples)
    low, high = walls[len(walls) // 4], walls[-1 - len(walls) // 4]
    return f"{series.wall_ms:.1f} [{low:.1f}, {high:.1f}]"


def tokens_html(reply: Reply) -> str:
    """The tokens that are left in each stage, and the scores of the cuts."""
    return stages(reply.scene, reply.scene["runs"][1], prefix=None)


# ----------------------------------------------------------------------------- the page
def digits_examples(data: Path, count: int = 1) -> list[list[str]]:
    """(picture, question) of the digits sets; none where they have not been built."""
    root, found = data / "eval" / "digits", []
    index = root / "index.json"
    if not index.is_file():
        return []
    facts = json.loads(index.read_text(encoding="utf-8"))
    for name in DIGITS:
        folder = root / name
        lines = (folder / facts[name]["labels"]).read_text(encoding="utf-8").splitlines()
        for line in lines[:count]:
            entry = json.loads(line)
            found.append([str(folder / facts[name]["images"] / entry["image"]), entry["text"]])
    return found


def build_page(demo: Demo, examples: Sequence[Sequence[str]]) -> tuple[Any, dict[str, Any]]:
    """The gradio page, and what its `launch` must be given (theme and style, where they go there).

    Raises:
        ValueError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise ValueError('llava demo needs gradio: pip install "llava[serve]"') from None

    def ask(picture: Any, question: str, method: str, percent: float, own: str, n: float) -> Any:
        try:
            reply = demo.ask(picture, question or "", method, percent, own or "", int(n))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return answers_html(reply), tokens_html(reply), reply.flags

    system = ["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"]
    looks = {
        "theme": gr.themes.Base(font=system, font_mono=["ui-monospace", "monospace"]),
        "css": STYLE,
    }
    at_launch = "css" in inspect.signature(gr.Blocks.launch).parameters  # gradio 6; 5 takes it here
    methods = demo.methods()
    blocks = gr.Blocks(
        title="Fewer visual tokens", analytics_enabled=False, **({} if at_launch else looks)
    )
    with blocks:
        gr.Markdown(
            f"# Fewer visual tokens\n{demo.engine.name}: the same question without and with "
            "dropping visual tokens inside the model."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(
                    type="pil", label="picture", sources=["upload", "clipboard"], elem_id="picture"
                )
                question = gr.Textbox(label="question", elem_id="question")
                method = gr.Dropdown(methods, value=methods[0], label="method", elem_id="method")
                percent = gr.Slider(
                    5, 100, value=50, step=1, elem_id="percent",
                    label="budget: visual tokens, % of all, averaged over the layers",
                )  # fmt: skip
                with gr.Accordion("more", open=False):
                    own = gr.Textbox(
                        label="a plan of your own instead", elem_id="own",
                        placeholder="pyramiddrop:layers=[2,4,5],ratios=[0.6,0.36,0.216]",
                    )  # fmt: skip
                    repeats = gr.Slider(3, 31, value=REPEATS, step=2, label="timed runs a side")
                button = gr.Button("ask", variant="primary", elem_id="ask")
                if examples:
                    gr.Examples([list(each) for each in examples], [picture, question])
            with gr.Column(scale=3, min_width=320):
                answers = gr.HTML(elem_id="answers")
                flags = gr.Code(label="the plan, to paste behind a command", elem_id="plan",
                                language="shell", interactive=False, lines=1)  # fmt: skip
                tokens = gr.HTML(elem_id="tokens")
        inputs = [picture, question, method, percent, own, repeats]
        gr.on(
            [button.click, question.submit], ask, inputs, [answers, tokens, flags],
            concurrency_limit=1,
        )  # fmt: skip
    return blocks, looks if at_launch else {}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava demo``."""
    parser = argparse.ArgumentParser(
        prog="llava demo", description="Ask a model with and without dropping, in a browser."
    )
    add_loading_flags(parser)
    parser.add_argument(
        "--data", default="playground/data", help="where the digits sets are (default %(default)s)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    return parser


def check_port(host: str, port: int) -> None:
    """ValueError for an address that cannot be listened on, before a model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}); give another"
        ) from None


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava demo``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    if not 0 < args.port < 65536:
        raise ValueError(f"--port {args.port}; accepted: 1 to 65535")
    check_port(args.host, args.port)
    engine = Engine.load(
        args.model_path, args.model_base, conv_mode=args.conv_mode, **loading_options(args)
    )
    examples = digits_examples(Path(args.data))
    if not examples:
        log.info("no examples: `llava digits --out %s` builds the digits sets", args.data)
    blocks, looks = build_page(Demo(engine), examples)
    log.info("http://%s:%d (Ctrl-C ends it)", args.host, args.port)
    blocks.launch(
        server_name=args.host, server_port=args.port, share=False, quiet=True, ssr_mode=False,
        allowed_paths=[str(Path(args.data).resolve())], **looks,
    )  # fmt: skip


if __name__ == "__main__":
    main()
