"""The training files in LLaVA's conversation format: captions that teach to find, then questions.

`align.json` (stage 1, first part): one dense caption a picture that names cells with their
addresses, half of them all 16 cells in an order drawn anew, half only the filled cells in reading
order. In the first kind what stands at a given address must be read from the picture; in the second
the next address must be.
`facts.json` (stage 1, second part): lists of short statements of one kind (where a thing is,
whether it is there, what is beside it, what a row reads), every word of which is supervised: the
cheapest way to show a small model many look-ups; one in ten is still a dense caption.
`relations.json` (stage 1, third part): the same, mostly of the kinds that are learned last.
`questions.json` (stage 2): questions in words, several a picture as in LLaVA-1.5's mixture.
`answers.json` (stage 2, second part): two questions a picture, of the kinds that the sets ask: with
a plan, tokens are ranked for few questions at once, as when the model is used.

All scenes are of the train split. A sample's text depends only on (seed, file, number).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llava.digits.questions import FACTS, ask, describe, facts
from llava.digits.scenes import CELLS, Scene, varied_scene
from llava.digits.sets import save_png
from llava.utils import json_dump, progress

CAPTION_REQUEST = "<image>\nDescribe the image."
CAPTION_SHARE = 0.1
TURNS = 6
RELATION_WEIGHTS: dict[str, float] = {
    "where": 1.0,
    "exists": 3.0,
    "side": 4.0,
    "beside": 1.0,
    "rows": 0.5,
    "side_check": 3.0,
    "color_check": 0.5,
    "digit_check": 3.0,
    "place_check": 0.5,
}
QUESTION_WEIGHTS: dict[str, float] = {
    "digit_at": 0.5,
    "color_at": 0.5,
    "filled_at": 0.5,
    "read_row": 0.75,
    "where": 1.0,
    "exists": 1.5,
    "side_digit": 1.5,
    "side_color": 1.5,
    "side_check": 1.5,
    "beside_digit": 1.0,
    "beside_color": 1.0,
    "beside_check": 1.0,
    "color_check": 0.5,
    "digit_check": 1.0,
    "place_check": 0.75,
}
ANSWER_TURNS = 2
ANSWER_WEIGHTS: dict[str, float] = {
    "digit_at": 0.75,
    "color_at": 0.25,
    "filled_at": 0.25,
    "read_row": 3.0,
    "exists": 3.0,
    "beside_digit": 1.0,
    "beside_color": 0.5,
    "beside_check": 1.5,
    "color_check": 0.5,
    "digit_check": 2.0,
    "place_check": 1.0,
}
PICTURES = "images"
# samples per picture
ALIGN_SAMPLES, FACT_SAMPLES, QUESTION_SAMPLES, RELATION_SAMPLES, ANSWER_SAMPLES = 1, 4, 4, 4, 8


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """All cells in random order, or the filled ones in reading order, with their addresses."""
    if rng.random() < 0.5 or not scene.filled():
        return describe(scene, rng.permutation(len(CELLS)).tolist())
    return describe(scene, scene.filled())


def statements(
    scene: Scene, rng: np.random.Generator, shares: dict[str, float] | None = None
) -> str:
    """A list of short statements of one kind, or now and then a dense caption."""
    if rng.random() < CAPTION_SHARE:
        return caption(scene, rng)
    shares = shares or FACTS
    kinds = list(shares)
    weights = np.array(list(shares.values()))
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    return facts(scene, kind, rng) or facts(scene, "exists", rng) or caption(scene, rng)


def conversation(
    scene: Scene,
    turns: int,
    rng: np.random.Generator,
    shares: dict[str, float] | None = None,
) -> list[dict[str, str]]:
    """`turns` questions and answers about one scene, the picture's mark before the first.

    `shares`: weights of the kinds (QUESTION_WEIGHTS by default). Raises ValueError if `turns` is
    not positive.
    """
    if turns < 1:
        raise ValueError(f"turns must be 1 or more, got {turns}")
    shares = shares or QUESTION_WEIGHTS
    kinds = list(shares)
    weights = np.array(list(shares.values()))
    messages: list[dict[str, str]] = []
    while len(messages) < 2 * turns:
        question = ask(scene, kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))], rng)
        if question is not None:
            mark = "" if messages else "<image>\n"
            messages.append({"from": "human", "value": mark + question.text})
            messages.append({"from": "gpt", "value": question.answer})
    return messages


def record(name: str, number: int, picture: int, messages: list[dict[str, str]]) -> dict:
    """One sample as LLaVA stores it."""
    return {"id": f"{name}-{number}", "image": f"{picture:06d}.png", "conversations": messages}


def captioned(text: str) -> list[dict[str, str]]:
    """A caption as a conversation for the `plain` template."""
    return [{"from": "human", "value": CAPTION_REQUEST}, {"from": "gpt", "value": text}]


def write_conversations(folder: Path, seed: int, pictures: int) -> None:
    """All conversation files."""
    scenes = [varied_scene(seed, "train", index) for index in range(pictures)]
    makers = {
        "align": (ALIGN_SAMPLES, lambda scene, rng: captioned(caption(scene, rng))),
        "facts": (FACT_SAMPLES, lambda scene, rng: captioned(statements(scene, rng))),
        "questions": (QUESTION_SAMPLES, lambda scene, rng: conversation(scene, TURNS, rng)),
        "relations": (
            RELATION_SAMPLES,
            lambda scene, rng: captioned(statements(scene, rng, RELATION_WEIGHTS)),
        ),
        "answers": (
            ANSWER_SAMPLES,
            lambda scene, rng: conversation(scene, ANSWER_TURNS, rng, ANSWER_WEIGHTS),
        ),
    }
    for place, (name, (per_picture, make)) in enumerate(makers.items()):
        records = []
        for number in range(per_picture * pictures):
            rng = np.random.default_rng([seed, 20 + place, number])
            picture = number % pictures
            records.append(record(name, number, picture, make(scenes[picture], rng)))
        json_dump(folder / f"{name}.json", records)


def write_all(folder: Path, seed: int, pictures: int) -> None:
    """Conversation files and pictures."""
    write_conversations(folder, seed, pictures)
    for index in progress(range(pictures), desc="training pictures", total=pictures):
        save_png(varied_scene(seed, "train", index), folder / PICTURES / f"{index:06d}.png")
