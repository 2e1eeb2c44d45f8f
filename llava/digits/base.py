"""The tiny model before LLaVA's stages: word vectors, a base language model, an aligned projector.

A 1.3 M parameter model has no web text to learn from, so three things that Vicuna and CLIP bring
along are given here by construction, without any training of the language model:

- the words have orthogonal vectors, shared by input and output;
- attention starts as a copying head ("mimetic initialisation", Trockman and Kolter 2023,
  arXiv 2305.09828): query and key projections of a head are equal, so that a token looks at tokens
  that say the same, and value and output projections are transposes of each other;
- the projector is fitted, on scenes of the train split, to turn a visual token into the sum of the
  word vectors of its cell (address, colour, digit or `none`) and of faint, rotated copies of its
  neighbours' words: a picture and its words meet in one space, as in CLIP.

    python -m llava.digits.base --tower TOWER --tokenizer TOKENIZER --out BASE

writes a `LlamaForCausalLM` folder with its tokenizer, and `mm_projector.bin` as LLaVA names it.
Shapes: B scenes, T = 64 visual tokens, G = 4, H = 128 width of the language model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava.digits.pretrain_tower import Scenes, features, to_tokens
from llava.digits.questions import NOTHING, SIDES
from llava.digits.scenes import CELLS, COLOUR_NAMES, GRID
from llava.mm_utils import clip_image_processor_class
from llava.utils import atomic_write, environment, get_logger, json_dump, set_seed, user_errors

logger = get_logger(__name__)
HIDDEN = 128
LAYERS = 6
HEADS = 4
MLP = 384
CONTEXT = 512
MATCH = 0.7  # scale of the equal query and key projections
COPY = 0.1  # scale of what a copying head adds
JITTER = 0.02
NEIGHBOUR = 0.6  # how loud a neighbour's words are next to the cell's own


def base_config(tokenizer) -> LlamaConfig:  # noqa: ANN001 - any transformers tokenizer
    """The language model: 6 layers of width 128."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    """Random orthonormal rows, [rows, columns] with rows <= columns."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T.contiguous()


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Orthogonal word vectors and copying heads, in place."""
    config = model.config
    model.model.embed_tokens.weight.copy_(orthogonal(HIDDEN, HIDDEN)[: config.vocab_size])
    width = config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        same = torch.cat([orthogonal(width, HIDDEN) for _ in range(HEADS)])
        turn = orthogonal(HIDDEN, HIDDEN)
        for weight, start in (
            (attention.q_proj.weight, MATCH * same),
            (attention.k_proj.weight, MATCH * same),
            (attention.v_proj.weight, turn),
        ):
            weight.copy_(start + JITTER * torch.randn_like(start))
        attention.o_proj.weight.copy_(COPY * turn.T + JITTER / 4 * torch.randn_like(turn))


class Meaning:
    """What a visual token should say: word vectors of its cell and of the cells around it."""

    def __init__(self, vectors: torch.Tensor, vocabulary: dict[str, int]) -> None:
        colours = [vectors[vocabulary[name]] for name in COLOUR_NAMES]
        digits = [vectors[vocabulary[str(digit)]] for digit in range(10)]
        things = [vectors[vocabulary[NOTHING]]]
        things += [colour + digit for colour in colours for digit in digits]
        self.things = torch.stack(things)
        self.cells_GGH = torch.stack([vectors[vocabulary[cell]] for cell in CELLS]).view(
            GRID, GRID, -1
        )
        self.turns = {side: orthogonal(HIDDEN, HIDDEN) for side in SIDES}

    def __call__(self, things_BGG: torch.Tensor) -> torch.Tensor:
        """Targets [B, T, H] for scenes given as things per cell."""
        own_BGGH = self.things[things_BGG]
        padded = F.pad(own_BGGH, (0, 0, 1, 1, 1, 1))
        total = own_BGGH + self.cells_GGH
        for side, (down, right) in SIDES.items():
            rows, columns = 1 + down, 1 + right
            beside = padded[:, rows : rows + GRID, columns : columns + GRID]
            total = total + NEIGHBOUR * beside @ self.turns[side]
        numbers = torch.arange(len(things_BGG) * GRID * GRID).view(-1, GRID, GRID)
        return total.flatten(0, 2)[to_tokens(numbers)]


def fit_projector(
    tower: CLIPVisionModel, meaning: Meaning, steps: int, seed: int
) -> tuple[nn.Sequential, float]:
    """A 2-layer GELU projector from features to word vectors, and its relative error."""
    processor = clip_image_processor_class()()
    scenes = Scenes(7 + seed, processor.image_mean, processor.image_std)
    projector = nn.Sequential(
        nn.Linear(tower.config.hidden_size, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)
    )
    optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    error = float("nan")
    for step in range(steps):
        pixels, things = scenes.batch("train", 10_000_000 + step * 64, 64, 1.0)
        with torch.no_grad():
            hidden, target = features(tower, pixels), meaning(things)
        difference = (projector(hidden) - target).square().sum(-1).mean()
        optimizer.zero_grad()
        difference.backward()
        optimizer.step()
        schedule.step()
        error = difference.item() / target.square().sum(-1).mean().item()
    return projector, error


def build_base(args: argparse.Namespace) -> None:
    """Write the base language model, its tokenizer and the projector into `args.out`."""
    set_seed(args.seed)
    began = time.time()
    tokenizer = AutoTokenizer.from_pretrained(str(args.tokenizer))
    tower = CLIPVisionModel.from_pretrained(str(args.tower)).eval()
    model = LlamaForCausalLM(base_config(tokenizer))
    initialise(model)
    meaning = Meaning(model.model.embed_tokens.weight.detach().clone(), tokenizer.get_vocab())
    projector, error = fit_projector(tower, meaning, args.steps, args.seed)
    logger.info("projector: %.3f of the word vectors' energy unexplained", error)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    state = {f"model.mm_projector.{key}": value for key, value in projector.state_dict().items()}
    with atomic_write(args.out / "mm_projector.bin", "wb") as file:
        torch.save(state, file)
    facts = {
        "command": "python -m llava.digits.base",
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "seconds": round(time.time() - began, 1),
        "projector_error": round(error, 4),
        "environment": environment(),
    }
    json_dump(args.out / "training.json", facts)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ValueError for missing folders and senseless numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tower", type=Path, required=True, help="folder of the pretrained tower")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="steps of fitting the projector")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for folder in (args.tower, args.tokenizer):
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
    if args.steps < 1:
        raise ValueError(f"--steps must be 1 or more, got {args.steps}")
    return args


@user_errors()
def main(argv: list[str] | None = None) -> None:
    """Build unless the finished base is there."""
    args = parse_args(argv)
    if (args.out / "training.json").is_file():
        logger.info("%s is there already; delete it to build again", args.out)
        return
    build_base(args)


if __name__ == "__main__":
    main()
