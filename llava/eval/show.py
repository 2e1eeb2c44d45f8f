"""``llava show``: one question, several plans, and the visual tokens each of them leaves.

Special here: every plan is really run (the cuts are those of its own forward pass), and the page
needs nothing but itself: pictures are stored once and drawn over with inline SVG.

    llava show --model-path checkpoints/llava-digits-pdrop --question "What digit is in C3?" \\
        --image playground/data/eval/digits/vqav2/val2014/000000.png --out show.html \\
        --reduction "pyramiddrop:layers=[2,4,5],ratios=[0.6,0.36,0.216]" \\
        --reduction "uniform:layers=[2,4,5],ratios=[0.6,0.36,0.216]"

``--out NAME.html`` writes the page, ``--out FOLDER`` one PNG a plan and ``overview.png``. In score
maps dark is low and light is high; each map has its own scale.
"""

from __future__ import annotations

import argparse
import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from llava.drawing import (
    CELL,
    Grid,
    Scene,
    aspect,
    caption,
    colour,
    defs,
    grids,
    run_stages,
    stages,
    survivors,
)
from llava.eval import charts
from llava.eval.pages import (
    document,
    dot,
    facts_list,
    method_of,
    section,
    table,
    two,
)
from llava.loading_flags import add_loading_flags, loading_options
from llava.reduction import CONFIG_KEY, ReductionPlan, plan_from_flags
from llava.reduction.budget import tera
from llava.utils import atomic_write, get_logger, json_dump, user_errors

log = get_logger(__name__)


# ----------------------------------------------------------------------------- facts of a scene
def names(scene: Scene) -> list[str]:
    """What each plan is called: its method, numbered where a method comes twice."""
    methods = [method_of(run["plan"]) for run in scene["runs"]]
    return [
        f"{name} {methods[: i + 1].count(name)}" if methods.count(name) > 1 else name
        for i, name in enumerate(methods)
    ]


# ----------------------------------------------------------------------------- page
SHOW_STYLE = """
.run { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; margin-bottom: 2px; }
.run span { font-size: 17px; }
h2 i.dot { width: 13px; height: 13px; }
.stages { --unit: 210px; gap: 16px 20px; grid-template-columns:
  repeat(auto-fill, minmax(min(100%, calc(var(--share) * var(--unit))), 1fr)); }
@media (max-width: 560px) { .stages { --unit: 140px; gap: 12px; } }
.pictures { display: flex; flex-wrap: wrap; gap: 16px; }
.pictures figure { margin: 0; }
"""


def page(scene: Scene, facts: Mapping[str, Any]) -> str:
    """The whole page as text. facts: what stands at its end (model, environment)."""
    parts = [
        f"<header><h1>“{escape(scene['question'])}”</h1><p class='lead'>The same question with "
        f"{len(scene['runs'])} plans: which visual tokens are left after each cut, how they "
        "scored, and what is answered.</p></header>",
        defs(scene),
        pictures_section(scene),
        summary_section(scene),
        *run_sections(scene),
        section("How this was made", "", facts_list(facts)),
    ]
    return document(scene["question"], parts, SHOW_STYLE)


def pictures_section(scene: Scene) -> str:
    """The pictures as the vision tower saw them."""
    if not scene["fields"]:
        return ""
    figures = []
    for number, (field, grid) in enumerate(zip(scene["fields"], grids(scene), strict=True)):
        count = grid.rows * grid.columns + grid.newlines
        words = f"{grid.rows} × {grid.columns} cells"
        words += f" and {grid.newlines} newlines" if grid.newlines else ""
        drawn = survivors(f"#field{number}", grid, [*grid.cells(), *grid.newline_cells], CELL)
        figures.append(
            f'<figure style="flex:0 1 {220 * aspect(grid):.0f}px">{drawn}<figcaption>'
            f"picture {field['picture'] + 1}: {words}, {count} "
            "visual tokens</figcaption></figure>"
        )
    return section(
        "What the vision tower saw", "", f'<div class="pictures">{"".join(figures)}</div>'
    )


def summary_section(scene: Scene) -> str:
    """A table of all plans, and the tokens and operations of each layer."""
    runs, labels = scene["runs"], names(scene)
    body = []
    for run, label in zip(runs, labels, strict=True):
        share = run["full_tflops"] / runs[0]["full_tflops"]
        cells = [
            dot(run["plan"]) + escape(label), shortened(run["answer"]),
            f"{run['average_tokens']:.1f}", str(run["visual_per_layer"][-1]),
            tera(run["visual_tmacs"]), tera(run["full_tflops"]), f"{share:.0%}",
        ]  # fmt: skip
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = ["plan", "answer", "tokens, mean", "last layer", "visual MACs", "prefill FLOPs",
            f"of {labels[0]}"]  # fmt: skip
    drawn = []
    for title, key, factor, y_title in (
        ("Visual tokens in each layer", "visual_per_layer", 1, "tokens"),
        ("Operations of each layer", "flops_per_layer", 1e-6, "MFLOPs"),
    ):
        series = [
            (label, method_of(run["plan"]), [factor * value for value in run[key]])
            for run, label in zip(runs, labels, strict=True)
        ]
        drawn.append(
            f"<h3>{title}</h3>" + charts.step_chart(series, x_title="layer", y_title=y_title)
        )
    return section(
        "Answers and cost",
        "Tokens: mean over the decoder layers. Visual MACs is the papers' figure, over visual "
        "tokens alone; prefill FLOPs count text, the causal half of the attention and the head.",
        table(head, body) + two(drawn),
    )


def shortened(answer: str) -> str:
    """An answer for a table cell; all of it shows on hovering."""
    words = textwrap.shorten(answer, 48, placeholder=" …")
    return f'<span title="{escape(answer)}">{escape(words) or "<small>(nothing)</small>"}</span>'


def run_sections(scene: Scene) -> list[str]:
    """One box a plan that cuts: a figure a stage, with the scores that made the next one."""
    scale = (
        '<p class="note" style="margin-top:20px">Dropped tokens are faded. Score maps, below the '
        'tokens they rank: low <span class="scale"></span> high, each on its own scale.</p>'
    )
    return [
        scale,
        *(
            f'<section><div class="run"><h2>{dot(run["plan"])}{escape(label)}</h2>'
            f"<span>answers “{escape(run['answer'])}”</span></div>"
            f"<p><code>{escape(run['plan'])}</code></p>"
            f"{stages(scene, run)}</section>"
            for run, label in zip(scene["runs"], names(scene), strict=True)
            if run["cuts"]
        ),
    ]


# ----------------------------------------------------------------------------- PNG
SCALE, MARGIN, LABELS, GAP = 2, 14, 186, 14
"""Pixels a point; and in points: the margin, the words in front of a row, between pictures."""
INK, FAINT, PAPER, EDGE = "#1a1d23", "#5c6472", "#ffffff", "#d5d9e0"


def overview(scene: Scene, only: int | None = None, thumb: int = 132) -> Image.Image:
    """All plans (or run `only`) as one picture: a row a plan, a column a stage.

    thumb: height of a stage's picture in points; the result has `SCALE` pixels a point.
    """
    every, labels = grids(scene), names(scene)
    pixels = [read_uri(field["image"]).height for field in scene["fields"]]
    if pixels and max(pixels) <= thumb * SCALE:  # a whole zoom keeps small pictures sharp
        thumb = max(pixels) * (thumb * SCALE // max(pixels)) // SCALE
    chosen = range(len(scene["runs"])) if only is None else [only]
    shown = {i: stage_strips(scene, scene["runs"][i], every, thumb) for i in chosen}
    head, row_height = MARGIN + 40, thumb + 38
    widest = max(sum(strip.width // SCALE + GAP for strip, _ in row) for row in shown.values())
    width = max(MARGIN + LABELS + widest + MARGIN - GAP, 520)
    canvas = Image.new("RGB", (SCALE * width, SCALE * (head + row_height * len(shown))), PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, (MARGIN, MARGIN), f"“{scene['question']}”", 18, INK)
    for row, (number, strips) in enumerate(shown.items()):
        top, left = head + row * row_height, MARGIN + LABELS
        describe(draw, scene, number, labels[number], top)
        for strip, words in strips:
            canvas.paste(strip, (SCALE * left, SCALE * top))
            write(draw, (left, top + thumb + 5), words, 11, FAINT)
            left += strip.width // SCALE + GAP
    return canvas


def describe(draw: ImageDraw.ImageDraw, scene: Scene, number: int, label: str, top: int) -> None:
    """The words in front of a plan's pictures."""
    run, base = scene["runs"][number], scene["runs"][0]
    box = [SCALE * edge for edge in (MARGIN, top + 5, MARGIN + 11, top + 16)]
    draw.ellipse(box, fill=colour(method_of(run["plan"])))
    write(draw, (MARGIN + 18, top + 1), label, 15, INK)
    answer = run["answer"] if len(run["answer"]) < 24 else run["answer"][:21] + "..."
    words = (
        f"answers “{answer}”",
        f"{run['average_tokens']:.1f} tokens a layer",
        f"{run['full_tflops'] / base['full_tflops']:.0%} of the FLOPs",
    )
    for i, line in enumerate(words):
        write(draw, (MARGIN + 18, top + 26 + 18 * i), line, 13, FAINT)


def write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], words: str, size: int, fill: str
) -> None:
    """Text at a place in points. Pillow's own font has no dash but the hyphen."""
    font = ImageFont.load_default(size * SCALE)
    where = (place[0] * SCALE, place[1] * SCALE)
    draw.text(where, words.replace("–", "-"), font=font, fill=fill)


def stage_strips(
    scene: Scene, run: Mapping[str, Any], every: Sequence[Grid], thumb: int
) -> list[tuple[Image.Image, str]]:
    """Each stage's fields side by side, with what is written below them."""
    found = []
    for stage in run_stages(run):
        tiles = []
        for field, grid, kept in zip(scene["fields"], every, stage["kept"], strict=True):
            picture = read_uri(field["image"])
            width = round(thumb * grid.columns / grid.rows)
            tiles.append(
                faded(picture, grid, [grid.cell(n) for n in kept], (width * SCALE, thumb * SCALE))
            )
        width = sum(tile.width for tile in tiles) + 6 * SCALE * (len(tiles) - 1)
        strip = Image.new("RGB", (max(width, 1), thumb * SCALE), PAPER)
        left = 0
        for tile in tiles:
            strip.paste(tile, (left, 0))
            left += tile.width + 6 * SCALE
        found.append((strip, caption(stage)))
    return found


def read_uri(uri: str) -> Image.Image:
    """The picture in a `data:` URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")


def faded(
    picture: Image.Image, grid: Grid, kept: Sequence[tuple[int, int]], size: tuple[int, int]
) -> Image.Image:
    """A picture of `size` pixels with the cells of dropped tokens faded, in a thin frame."""
    grid.check(kept)
    whole = size[0] % picture.width == 0 and size[1] % picture.height == 0
    method = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    drawn = picture.resize(size, method)
    pale = Image.blend(drawn, Image.new("RGB", size, PAPER), 0.88)
    mask = Image.new("L", size, 255)
    draw = ImageDraw.Draw(mask)
    here = set(kept)
    for row, column in grid.cells():
        if (row, column) in here:
            x, y = (column * size[0]) // grid.columns, (row * size[1]) // grid.rows
            right, bottom = (
                ((column + 1) * size[0]) // grid.columns,
                ((row + 1) * size[1]) // grid.rows,
            )
            draw.rectangle((x, y, right - 1, bottom - 1), fill=0)
    drawn.paste(pale, (0, 0), mask)
    ImageDraw.Draw(drawn).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=EDGE, width=SCALE)
    return drawn


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_write(path, "wb") as file:
        picture.save(file, "PNG", optimize=True)


# ----------------------------------------------------------------------------- command
def build_parser() -> argparse.ArgumentParser:
    """The parser of ``llava show``."""
    parser = argparse.ArgumentParser(
        prog="llava show", description="Which visual tokens plans keep, drawn on the picture."
    )
    add_loading_flags(parser)
    parser.add_argument("--image", nargs="+", required=True, help="one picture or several")
    parser.add_argument("--question", required=True, help="what is asked about the pictures")
    plans = parser.add_argument_group("plans (no dropping is always shown)")
    plans.add_argument(
        "--reduction",
        action="append",
        metavar="PLAN",
        help="a plan; again for more (default: the checkpoint's own)",
    )
    plans.add_argument(
        "--layer_list", metavar="LIST", help="PyramidDrop's layers, as one more plan"
    )
    plans.add_argument("--image_token_ratio_list", metavar="LIST", help="its kept shares")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, help="longest answer (default 32)"
    )
    parser.add_argument(
        "--out",
        default="show.html",
        help="NAME.html, NAME.png, or a folder for PNGs (default %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write what was drawn there too")
    return parser


def plans_of(args: argparse.Namespace, stored: Any = None) -> list[ReductionPlan]:
    """No dropping and each plan that the flags ask for, else the checkpoint's; each once."""
    asked = [ReductionPlan.parse(text) for text in args.reduction or ()]
    pyramid = plan_from_flags(None, args.layer_list, args.image_token_ratio_list)
    asked += [] if pyramid is None else [pyramid]
    asked = asked or [ReductionPlan.parse(stored)]
    return list({str(plan): plan for plan in [ReductionPlan(), *asked]}.values())


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """``llava show``: see the module's docstring."""
    args = build_parser().parse_args(argv)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}; accepted: 1 or more")
    plans_of(args)  # a plan that cannot be read is said before anything is loaded
    from llava.mm_utils import load_image
    from llava.model.builder import load_pretrained_model
    from llava.model.tracing import look
    from llava.utils import environment

    pictures = [load_image(path) for path in args.image]
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, args.model_base, **loading_options(args)
    )
    plans = plans_of(args, getattr(model.config, CONFIG_KEY, None))
    scene = look(
        tokenizer, model, processor, args.question, pictures, plans, conv_mode=args.conv_mode,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    facts = {"model": Path(args.model_path).name, "pictures": ", ".join(args.image)}
    for path in write_scene(scene, Path(args.out), {**facts, **environment()}):
        log.info("wrote %s", path)
    if args.json:
        json_dump(args.json, scene)


def write_scene(scene: Scene, out: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write a page (`*.html`), a picture (`*.png`) or a folder of pictures; what was written."""
    if out.suffix == ".html":
        content = page(scene, facts)
        with atomic_write(out) as file:
            file.write(content)
        return [out]
    if out.suffix == ".png":
        save_png(overview(scene), out)
        return [out]
    written = [out / "overview.png"]
    save_png(overview(scene), written[0])
    for number, name in enumerate(names(scene)):
        path = out / f"{number}-{name.replace(' ', '-')}.png"
        save_png(overview(scene, number), path)
        written.append(path)
    return written


if __name__ == "__main__":
    main()
