"""What plans do to one question: the tokens that are left, their scores, the cost, the answer.

Special here: pictures are shown as the tower saw them (made from its pixels, so padding, cropping
and tiles are right), and everything is returned as one JSON-ready dict: `llava show` draws it,
`llava quickstart` stores it in summary.json, `llava demo` shows it.

    scene = look(tokenizer, model, processor, "Is there a 3?", [picture], ["none", "uniform:..."])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.conversation import get_conversation, resolve_conv_mode
from llava.decoding import answer_text, cut_at_eos, eos_ids
from llava.drawing import Grid, data_uri
from llava.mm_utils import get_anyres_image_grid_shape, unpad_slices
from llava.prompting import move_batch, pad_token_id, questions_batch
from llava.reduction import ReductionPlan, flops
from llava.sequence import TokenSequence


@dataclass(frozen=True)
class Field:
    """One rectangle of visual tokens: a whole picture, a tile, or the tiles of a picture joined.

    picture: which picture of the question. image: what the tower saw there. top: the row of the
    picture's cells that is row 0 of `grid`.
    """

    picture: int
    image: Image.Image
    grid: Grid
    top: int


def look(
    tokenizer: Any,
    model: Any,
    image_processor: Any,
    question: str,
    pictures: Sequence[Image.Image],
    plans: Sequence[ReductionPlan | str],
    *,
    conv_mode: str | None = None,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """Ask one question about `pictures` with each plan.

    Returns ``question``, ``fields`` ({picture, image (data URI), rows, columns, newlines}) and
    ``runs``, one a plan: plan, answer, stages ({start, stop, length, kept}), cuts ({at, method,
    scores}), visual_per_layer, flops_per_layer, average_tokens, visual_tmacs, full_tflops. ``kept``
    holds for each field the numbers of its cells (`Grid.number`), ``scores`` for each field pairs
    (number, score).
    Raises ValueError for plans that do not fit, wrong marks, or a prompt that is too long.
    """
    parsed = [ReductionPlan.parse(plan) for plan in plans]
    for plan in parsed:
        plan.validate(model.config.num_hidden_layers)
    conv_mode, _ = resolve_conv_mode(conv_mode, model.config)
    batch = questions_batch(
        tokenizer, image_processor, model.config, conv_mode, [(question, pictures)]
    )
    moved = move_batch(batch, model.device, model.dtype)
    ids = moved.pop("input_ids")
    with torch.inference_mode():
        whole = model.build_sequence(ids, **moved)
    fields = find_fields(batch, whole, model, image_processor)
    stop, ends = get_conversation(conv_mode).stop_string, eos_ids(model, tokenizer)
    runs = []
    for plan in parsed:
        with torch.inference_mode():
            out = model(ids, **moved, reduction=plan, return_trace=True, logits_to_keep=1)
            new = model.generate(
                ids, **moved, reduction=plan, max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=pad_token_id(tokenizer),
            )  # fmt: skip
        ids_of_answer, _ = cut_at_eos(new[0].tolist(), ends)
        answer = answer_text(ids_of_answer, tokenizer, stop)
        runs.append({"plan": str(plan), "answer": answer, **facts(out, whole, fields, model)})
    return {
        "question": question,
        "fields": [
            {
                "picture": field.picture,
                "image": data_uri(field.image),
                "rows": field.grid.rows,
                "columns": field.grid.columns,
                "newlines": field.grid.newlines,
            }
            for field in fields
        ],
        "runs": runs,
    }


def facts(out: Any, whole: TokenSequence, fields: Sequence[Field], model: Any) -> dict[str, Any]:
    """Stages, scores and cost of one traced forward pass of one sample."""
    place = places(whole, fields)
    kept = sorted(place)
    stages = []
    left = [kept]
    cuts = []
    for cut in out.trace:
        left.append(sorted(cut.origin[cut.keep & cut.valid].tolist()))
        scores: list[list[tuple[int, float]]] = [[] for _ in fields]
        if cut.score is not None:
            seen = cut.valid.flatten().tolist()
            every = zip(
                seen, cut.origin.flatten().tolist(), cut.score.flatten().tolist(), strict=True
            )
            for is_real, origin, score in every:
                if is_real:
                    field, number = place[origin]
                    scores[field].append((number, score))
        cuts.append({"at": cut.at, "scores": scores})
    for stage, here in zip(out.stages, left, strict=True):
        numbers: list[list[int]] = [[] for _ in fields]
        for origin in here:
            field, number = place[origin]
            numbers[field].append(number)
        stages.append(
            {
                "start": stage.start,
                "stop": stage.stop,
                "length": stage.lengths[0],
                "kept": [sorted(each) for each in numbers],
            }
        )
        if stage.cut is not None:
            cuts[len(stages) - 2]["method"] = stage.cut.reducer.name
    return {"stages": stages, "cuts": cuts, **cost(out.stages, model)}


def cost(stages: Any, model: Any) -> dict[str, Any]:
    """Tokens and operations of a schedule of one sample, layer by layer and in all."""
    shape = flops.ModelShape.from_config(model.config, model.get_vision_tower().config)
    visual = flops.visual_counts(stages)
    per_layer = [cost.flops for stage in stages for cost in flops.layer_costs(shape, stage)]
    return {
        "visual_per_layer": visual,
        "flops_per_layer": per_layer,
        "average_tokens": sum(visual) / len(visual),
        "visual_tmacs": flops.mean_visual_macs(shape, stages) / flops.TERA,
        "full_tflops": flops.prefill_flops(shape, stages) / flops.TERA,
    }


# ----------------------------------------------------------------------------- where tokens lie
def visual_cells(whole: TokenSequence) -> list[tuple[int, int, int, int]]:
    """(origin, picture, row, column) of each visual token of a batch of one, in their order."""
    groups = whole.layout.groups
    rows = zip(whole.origin[0].tolist(), whole.cell[0].tolist(), strict=True)
    return [
        (origin, groups[group].image, row, column)
        for origin, (group, row, column) in rows
        if group >= 0
    ]


def places(whole: TokenSequence, fields: Sequence[Field]) -> dict[int, tuple[int, int]]:
    """(field, cell number) of each visual token of a batch of one, by its origin."""
    found = {}
    for origin, picture, row, column in visual_cells(whole):
        for number, field in enumerate(fields):
            cell = (row - field.top, column)
            if field.picture == picture and cell in field.grid:
                found[origin] = (number, field.grid.number(cell))
                break
        else:
            raise ValueError(f"token {origin} at row {row}, column {column} lies in no field")
    return found


def find_fields(batch: dict, whole: TokenSequence, model: Any, processor: Any) -> list[Field]:
    """The fields of all pictures of a batch of one, in the order of the marks."""
    images = batch["images"]
    if images is None:
        return []
    cells, found = visual_cells(whole), []
    for picture, (pixels, size) in enumerate(zip(images, batch["image_sizes"], strict=True)):
        columns = [column for _, owner, _, column in cells if owner == picture]
        stack = pixels[None] if pixels.dim() == 3 else pixels
        found += picture_fields(picture, stack, size, columns, model, processor)
    return found


def picture_fields(
    picture: int,
    tiles: Tensor,
    size: Sequence[int],
    columns: Sequence[int],
    model: Any,
    processor: Any,
) -> list[Field]:
    """The fields of one picture. tiles [T, 3, H, W]; columns: of the cells of its tokens."""
    config, side = model.config, model.get_vision_tower().num_patches_per_side
    seen = [unnormalised(tile, processor) for tile in tiles]
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    if merge == "flat" or len(seen) == 1:
        # One tile with unpad has a single newline, behind its last row.
        grid = Grid(side, side, newlines=sum(column >= side for column in columns))
        return [Field(picture, image, grid, side * i) for i, image in enumerate(seen)]
    pixel, unpad = seen[0].width, "unpad" in merge
    across, down = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, pixel)
    joined = Image.new("RGB", (across * pixel, down * pixel))
    for index, image in enumerate(seen[1:]):
        joined.paste(image, (index % across * pixel, index // across * pixel))
    rows, across_field = slice(0, down * side), slice(0, across * side)
    if unpad:
        rounding = getattr(config, "mm_unpad_rounding", None) or "llava"
        rows, across_field = unpad_slices(size, (down * side, across * side), rounding)
    patch = pixel / side
    box = [
        across_field.start * patch,
        rows.start * patch,
        across_field.stop * patch,
        rows.stop * patch,
    ]
    whole = Field(picture, seen[0], Grid(side, side), 0)
    if rows.stop <= rows.start or across_field.stop <= across_field.start:
        return [whole]
    height = rows.stop - rows.start
    field = Grid(height, across_field.stop - across_field.start, newlines=height if unpad else 0)
    return [whole, Field(picture, joined.crop([round(edge) for edge in box]), field, side)]


def unnormalised(tile: Tensor, processor: Any) -> Image.Image:
    """The picture that a tile's pixels [3, H, W] were made from."""
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    values = (tile.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(values.round().byte().permute(1, 2, 0).numpy())
