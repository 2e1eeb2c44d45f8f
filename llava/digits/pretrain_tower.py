"""Pretrains the tiny CLIP tower on the train scans, so that it reads handwriting.

Special here: LLaVA reads the tower at `hidden_states[-2]`, so that is where the heads sit during
pretraining. Every visual token must say what stands in its cell (digit, colour, both together),
which cell it is, and what stands in the four cells around it. The heads are thrown away; what stays
is an ordinary `CLIPVisionModel` folder with its image processor. Scenes are drawn afresh for every
step from scans of the train split, with stronger jitter than the benchmark's pictures have.

    python -m llava.digits.pretrain_tower --out checkpoints/digits-tower [--steps 2000]

About 8 minutes on one core; 98.5 % or more of unseen handwritten cells are read.
Shapes: B scenes, T = 64 visual tokens, G = 4 grid side, D = width of the tower.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.digits.scenes import (
    COLOUR_NAMES,
    GRID,
    IMAGE_PIXELS,
    Scene,
    Split,
    draw,
    make_scene,
)
from llava.mm_utils import clip_image_processor_class
from llava.utils import environment, get_logger, json_dump, set_seed, user_errors

logger = get_logger(__name__)
PATCH = 14
SIDE = IMAGE_PIXELS // PATCH
N_DIGITS = 11  # 0 is an empty cell (and the outside of the grid), digit d is 1 + d
N_COLOURS = 1 + len(COLOUR_NAMES)
N_THINGS = 1 + 10 * len(COLOUR_NAMES)
AROUND = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
WEIGHTS = {"thing": 1.0, "digit": 1.0, "colour": 0.5, "cell": 0.5, **dict.fromkeys(AROUND, 0.25)}
EVAL_SCENES = 500


def tower_config() -> CLIPVisionConfig:
    """The tiny tower: 4 layers of width 128, 8x8 patches of 14 px."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=128,
    )


class Heads(nn.Module):
    """Linear readings of a visual token, used for pretraining only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"thing": N_THINGS, "digit": N_DIGITS, "colour": N_COLOURS, "cell": GRID * GRID}
        sizes |= dict.fromkeys(AROUND, N_DIGITS + N_COLOURS)
        self.heads = nn.ModuleDict({key: nn.Linear(width, n) for key, n in sizes.items()})

    def losses(self, hidden_BTD: torch.Tensor, things_BGG: torch.Tensor) -> torch.Tensor:
        """Weighted sum of all cross entropies."""
        total = hidden_BTD.new_zeros((), dtype=torch.float32)
        digits_BGG, colours_BGG = split_things(things_BGG)
        cells_BGG = torch.arange(GRID * GRID).view(1, GRID, GRID).expand_as(things_BGG)
        here = {"thing": things_BGG, "digit": digits_BGG, "colour": colours_BGG, "cell": cells_BGG}
        for key, target_BGG in here.items():
            logits = self.heads[key](hidden_BTD).flatten(0, 1).float()
            total = total + WEIGHTS[key] * F.cross_entropy(logits, to_tokens(target_BGG).flatten())
        for key, (down, right) in AROUND.items():
            padded = F.pad(things_BGG, (1, 1, 1, 1))
            rows = slice(1 + down, 1 + down + GRID)
            next_BGG = padded[:, rows, 1 + right : 1 + right + GRID]
            digits, colours = (to_tokens(part).flatten() for part in split_things(next_BGG))
            logits = self.heads[key](hidden_BTD).flatten(0, 1).float()
            loss = F.cross_entropy(logits[:, :N_DIGITS], digits)
            loss = loss + F.cross_entropy(logits[:, N_DIGITS:], colours)
            total = total + 0.5 * WEIGHTS[key] * loss
        return total

    def read(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What stands in each cell, [B, G, G], from the mean logits of the cell's tokens."""
        per_cell = SIDE // GRID
        logits = self.heads["thing"](hidden_BTD).float()
        shape = (len(logits), GRID, per_cell, GRID, per_cell, N_THINGS)
        return logits.view(shape).mean((2, 4)).argmax(-1)


def split_things(things: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Digit and colour classes of things (0 stays 0)."""
    zero = torch.zeros_like(things)
    return (
        torch.where(things > 0, (things - 1) % 10 + 1, zero),
        torch.where(things > 0, (things - 1) // 10 + 1, zero),
    )


def to_tokens(cells_BGG: torch.Tensor) -> torch.Tensor:
    """Per cell -> per visual token, [B, T]."""
    per_cell = SIDE // GRID
    return cells_BGG.repeat_interleave(per_cell, 1).repeat_interleave(per_cell, 2).flatten(1)


def scene_things(scene: Scene) -> list[int]:
    """Class of every cell: 0 empty, else 1 + 10 * colour + digit."""
    return [
        0 if digit < 0 else 1 + 10 * colour + digit
        for digit, colour in zip(scene.digits, scene.colours, strict=True)
    ]


class Scenes:
    """Batches of normalised pixels and cell classes."""

    def __init__(self, seed: int, mean: list[float], std: list[float]) -> None:
        self.seed = seed
        self.mean = np.array(mean, np.float32)
        self.std = np.array(std, np.float32)

    def batch(
        self, split: Split, start: int, size: int, jitter: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, 112, 112] and things [B, G, G] of scenes start .. start + size - 1."""
        scenes = [make_scene(self.seed, split, index) for index in range(start, start + size)]
        pixels = np.stack([draw(scene, jitter) for scene in scenes]).astype(np.float32) / 255
        pixels_BCHW = torch.from_numpy((pixels - self.mean) / self.std).permute(0, 3, 1, 2)
        things = torch.tensor([scene_things(scene) for scene in scenes]).view(-1, GRID, GRID)
        return pixels_BCHW.contiguous(), things


def features(tower: CLIPVisionModel, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """What LLaVA's projector will read: layer -2 without the class token, [B, T, D]."""
    return tower(pixels_BCHW, output_hidden_states=True).hidden_states[-2][:, 1:]


@torch.no_grad()
def rescale(tower: CLIPVisionModel, heads: Heads, pixels_BCHW: torch.Tensor) -> float:
    """Scale the residual stream so that the features LLaVA reads have unit variance; the old std.

    Every branch reads the stream through a layer norm, so scaling what is written into it scales
    the stream and changes nothing else; the heads are scaled back. A language model of this width
    learns much more slowly from features several times larger than its own embeddings.
    """
    std = float(features(tower, pixels_BCHW).std())
    model = getattr(tower, "vision_model", tower)
    writers: list[nn.Module] = [model.pre_layrnorm]
    for layer in model.encoder.layers:
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    for module in writers:
        module.weight /= std
        module.bias /= std
    for head in heads.heads.values():
        head.weight *= std
    return std


@torch.no_grad()
def evaluate(tower: CLIPVisionModel, heads: Heads, scenes: Scenes, number: int) -> float:
    """Per cent of filled cells of unseen scenes read right (digit and colour)."""
    right = total = 0
    for start in range(0, number, 100):
        pixels, things = scenes.batch("test", start, min(100, number - start), 1.0)
        filled = things > 0
        right += int((heads.read(features(tower, pixels)) == things)[filled].sum())
        total += int(filled.sum())
    return 100 * right / max(total, 1)


def pretrain(args: argparse.Namespace) -> dict:
    """Train, save into `args.out`, and return the facts that `training.json` holds."""
    set_seed(args.seed)
    began = time.time()
    processor = clip_image_processor_class()(
        size={"shortest_edge": IMAGE_PIXELS},
        crop_size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
    )
    scenes = Scenes(7 + args.seed, processor.image_mean, processor.image_std)
    tower = CLIPVisionModel(tower_config())
    heads = Heads(tower.config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, min(100, args.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        ),
    )
    for step in range(args.steps):
        pixels, things = scenes.batch("train", step * args.batch, args.batch, args.jitter)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = heads.losses(features(tower, pixels), things)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            logger.info("step %d of %d: loss %.3f", step + 1, args.steps, loss.item())
    tower.eval()
    std = rescale(tower, heads, scenes.batch("train", 0, 64, 1.0)[0])
    accuracy = evaluate(tower, heads, scenes, args.eval_scenes)
    logger.info("unseen handwriting: %.2f %% of cells right", accuracy)
    tower.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    facts = {
        "command": "python -m llava.digits.pretrain_tower",
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "seconds": round(time.time() - began, 1),
        "feature_std_before_rescaling": round(std, 3),
        "unseen_cells_right": round(accuracy, 2),
        "environment": environment(),
    }
    json_dump(args.out / "training.json", facts)
    return facts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ValueError for numbers that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished tower")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="scenes per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--jitter", type=float, default=1.6, help="1.0 is the benchmark's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-scenes", type=int, default=EVAL_SCENES)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    for key in ("steps", "batch", "eval_scenes"):
        if getattr(args, key) < 1:
            flag = key.replace("_", "-")
            raise ValueError(f"--{flag} must be 1 or more, got {getattr(args, key)}")
    if args.lr <= 0:
        raise ValueError(f"--lr must be positive, got {args.lr}")
    return args


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Pretrain unless the finished tower is there."""
    args = parse_args(argv)
    if (args.out / "training.json").is_file():
        logger.info("%s is there already; delete it to train again", args.out)
        return
    pretrain(args)


if __name__ == "__main__":
    main()
