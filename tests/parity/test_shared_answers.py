"""Answers of the digits sets, together and with a shared prefix, against one question at a time.

Float32, greedy, for every method that a plan can name; the picture's answers come from the shipped
checkpoint. A difference is allowed only where the model itself is undecided: the two best logits
of the first token that differs are closer than rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from llava.decoding import Decoding
from llava.digits.build import build_eval
from llava.digits.sets import SETS
from llava.eval.answer import Answerer
from llava.eval.benchmarks import LoadedBenchmark, load_benchmark
from llava.eval.questions import Question
from llava.model.builder import load_pretrained_model
from llava.reduction import REDUCERS

MARGIN = 1e-4
PLANS = {
    "none": "none",
    "pyramiddrop": "pyramiddrop:layers=[2,4,5],ratios=[0.6,0.36,0.216]",
    "pyramiddrop, original": "pyramiddrop:layers=[1,3],ratios=[0.5,0.2],positions=original",
    "random": "random:layers=[2,4],ratios=[0.5,0.2]",
    "uniform": "uniform:layers=[0,3],ratios=[0.7,0.3]",
    "fastv": "fastv:k=2,r=0.5",
    "adaptprune": "adaptprune:k=2,keep=0.3",
    "simignore": "simignore:keep=32,text=question",
    "yopo": "yopo:layers=4,window=3,ffn=2,heads=0.5",
    "drop_visual": "drop_visual:k=3",
    "random, then fastv": "random:layers=[1],ratios=[0.7]+fastv:k=3,keep=16,positions=original",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[LoadedBenchmark]]:
    """A loaded checkpoint and a few pictures of each set, with all their questions."""
    out = tmp_path_factory.mktemp("digits")
    build_eval(out, seed=7)
    loaded = load_pretrained_model(str(ROOT / "checkpoints" / "llava-digits-pdrop"), device="cpu")
    return loaded, [load_benchmark(f"digits_{kind}", out / "eval", limit=5) for kind in SETS]


def answerer(loaded: Any, folder: Path, plan: str, **settings: Any) -> Answerer:
    return Answerer(
        *(loaded[1], loaded[0], loaded[2]), image_folder=folder, reduction=plan,
        decoding=Decoding(12), workers=0, **settings,
    )  # fmt: skip


def undecided(single: Answerer, question: Question, place: int) -> bool:
    """Whether the two best logits of new token `place` are as good as equal."""
    ready = single.prepare(single.batches([question])[0], [question])
    with torch.inference_mode():
        sequence = single.model.build_sequence(ready.ids, images=ready.images, splice=ready.splice)
        out = single.model.generate(
            sequence=sequence, reduction=single.plan, max_new_tokens=place + 1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    first, second = out.logits[place][0].topk(2).values.tolist()
    return first - second < MARGIN


@pytest.mark.parametrize("plan", PLANS)
def test_together_is_alone(parts, plan):
    loaded, sets = parts
    asked = 0
    for each in sets:
        single = answerer(loaded, each.image_folder, PLANS[plan], batch_size=1, share=False)
        alone = single.answer_all(each.questions)
        for settings in ({"batch_size": 32, "share": False}, {"batch_size": 32}):
            together = answerer(loaded, each.image_folder, PLANS[plan], **settings)
            for one, other, question in zip(
                alone, together.answer_all(each.questions), each.questions, strict=True
            ):
                assert one["n_visual"] == other["n_visual"]
                if one["text"] != other["text"]:
                    words = zip(one["text"].split(), other["text"].split(), strict=False)
                    place = next((i for i, (a, b) in enumerate(words) if a != b), 0)
                    assert undecided(single, question, place), (one["text"], other["text"])
        asked += len(alone)
    assert asked >= 25


def test_every_method_is_here():
    named = {part.partition(":")[0] for plan in PLANS.values() for part in plan.split("+")}
    assert named - {"none"} == set(REDUCERS)
