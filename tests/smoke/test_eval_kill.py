"""Runs that are killed and started again with another number of processes, ten times over.

The processes are real ones and the signal is SIGKILL. They are forked from this process, so that
none has to import and load anything before there is something to kill.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from llava.decoding import Decoding
from llava.eval.answer import Answerer, answer_in_folder, finish
from llava.eval.questions import read_questions
from llava.eval.run_folder import RunFolder
from llava.model.builder import load_pretrained_model
from llava.utils import Ranks

TIMING = ("latency_ms",)
WORDS = ("red", "blue", "digit", "row", "image", "cell", "left")


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answerer, list]:
    """A tiny model that samples, and 46 questions: 6 pictures, two texts without one."""
    folder = tmp_path_factory.mktemp("kill")
    checkpoint = save_tiny_checkpoint(folder / "checkpoint")
    loaded = load_pretrained_model(str(checkpoint), device="cpu")
    lines = []
    for number in range(46):
        line = {"question_id": number // 2, "text": f"Is {WORDS[number % 7]} in row {number}?"}
        if number % 23:
            line["image"] = f"{number % 6}.png"
        lines.append(json.dumps(line))
    (folder / "q.jsonl").write_text("\n".join(lines))
    for number in range(6):
        picture = Image.effect_noise((56, 56), 20 + 30 * number).convert("RGB")
        picture.save(folder / f"{number}.png")
    torch.set_num_threads(1)
    made = Answerer(
        *(loaded[1], loaded[0], loaded[2]), image_folder=folder, batch_size=4, workers=1,
        reduction="pyramiddrop:layers=[2],ratios=[0.5]", decoding=Decoding(6, temperature=1.0),
    )  # fmt: skip
    return made, read_questions(folder / "q.jsonl")


def work(answerer: Answerer, questions: list, path: Path, ranks: Ranks) -> None:
    """One process of a run."""
    folder = RunFolder(path, answerer.settings())
    finish(folder, answer_in_folder(answerer, folder, questions, ranks), ranks)


def start(answerer: Answerer, questions: list, path: Path, world: int) -> list:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=work, args=(answerer, questions, path, Ranks(rank, world, rank)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def written(path: Path) -> int:
    return sum(shard.stat().st_size for shard in path.glob("shards/answers.*.jsonl"))


def kill_amid(processes: list, path: Path, dice: random.Random) -> bool:
    """SIGKILL to all, somewhere between the next batch on the disk and a little later; True when
    it came before they were done."""
    before, limit = written(path), time.monotonic() + 60
    while written(path) == before and any(p.is_alive() for p in processes):
        assert time.monotonic() < limit
        time.sleep(0.001)
    time.sleep(dice.random() * 0.03)
    amid = any(process.is_alive() for process in processes)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    return amid and not (path / "answers.jsonl").exists()


def answers(path: Path) -> list[dict]:
    """The answers file without what a clock says."""
    records = [json.loads(line) for line in (path / "answers.jsonl").read_text().splitlines()]
    for record in records:
        for name in TIMING:
            assert record.pop(name) > 0
    return records


def test_killed_ten_times_over_is_undisturbed(answerer, tmp_path):
    made, questions = answerer
    work(made, questions, tmp_path / "undisturbed", Ranks())
    expected = answers(tmp_path / "undisturbed")
    assert [record["uid"] for record in expected] == [question.uid for question in questions]
    assert len({record["text"] for record in expected}) > 20
    assert {record["finish"] for record in expected} == {"eos", "length"}
    dice, interrupted = random.Random(5), 0
    for trial in range(10):
        path = tmp_path / f"run{trial}"
        worlds = dice.sample(range(1, 5), 3)
        for world in worlds[:2]:
            processes = start(made, questions, path, world)
            interrupted += kill_amid(processes, path, dice)
        for process in start(made, questions, path, worlds[2]):
            process.join(60)
            assert process.exitcode == 0
        assert answers(path) == expected
        run = json.loads((path / "run.json").read_text())
        assert run["speed"]["questions"] == len(questions)
        assert {attempt["world_size"] for attempt in run["attempts"]} == set(worlds)
    assert interrupted >= 10, interrupted
