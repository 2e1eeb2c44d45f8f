"""A run's folder: torn writes, other numbers of processes, what is refused, and the last line."""

from __future__ import annotations

import json

import pytest

from llava.eval import merge
from llava.eval.batches import Batch
from llava.eval.run_folder import RunFolder, write_answers
from llava.eval.throughput import PARTS, compare, format_line, summarise
from llava.utils import Ranks

UIDS = [f"set:{i}:aa" for i in range(6)]
BATCHES = (Batch(0, ((3, 4),)), Batch(1, ((0,), (1,))), Batch(2, ((2,), (5,))))
SETTINGS = {"plan": "none", "batch_size": 2, "decoding": {"temperature": 0.0}}


def record(place: int, text: str | None = None) -> dict:
    return {"uid": UIDS[place], "question_id": place, "text": text or f"answer {place}"}


def opened(path, world: int = 1, rank: int = 0, settings=SETTINGS) -> tuple[RunFolder, Ranks]:
    ranks = Ranks(rank, world, rank)
    folder = RunFolder(path / "run", settings)
    folder.open(UIDS, BATCHES, ranks, {"limit": None})
    return folder, ranks


def answer(folder: RunFolder, ranks: Ranks, *numbers: int) -> None:
    shard = folder.shard(ranks)
    for number in numbers:
        shard.append(number, [record(place) for place in BATCHES[number].places], timing())


def timing(seconds: float = 1.0, questions: int = 2, flops: int | None = 10) -> dict:
    return {
        "questions": questions,
        "seconds": dict.fromkeys(PARTS, seconds),
        "first_token_ms": 5.0,
        "flops": flops,
        "peak_bytes": 2**30,
    }


def test_answers_are_joined_in_the_order_of_the_questions(tmp_path):
    folder, ranks = opened(tmp_path)
    answer(folder, ranks, 0)
    assert folder.done() == {0}
    assert folder.merge().missing == [UIDS[i] for i in (0, 1, 2, 5)]
    other, two = opened(tmp_path, world=3, rank=1)
    answer(other, two, 2, 1)
    merged = RunFolder.at(tmp_path / "run").merge()
    assert merged.records == [record(i) for i in range(6)]
    assert merged.missing == []
    assert [each["batch"] for each in folder.timings()] == [0, 1, 2]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["plan"] == "none"
    assert run["attempts"][0]["world_size"] == 1
    assert run["environment"]["torch"]


def test_every_torn_end_loses_one_batch_and_is_repaired(tmp_path):
    """The file of answers is cut at every byte; what is read is whole batches, and goes on."""
    folder, ranks = opened(tmp_path)
    answer(folder, ranks, 0, 1)
    (shard,) = folder.shards.glob("answers.*")
    data = shard.read_bytes()
    whole = data.index(b"\n", data.index(b"\n") + 1) + 1  # of the first batch
    for cut in range(len(data) + 1):
        shard.write_bytes(data[:cut])
        done = {number for number, end in ((0, whole), (1, len(data))) if cut >= end}
        assert folder.done() == done
        answer(folder, ranks, *({0, 1, 2} - done))
        assert folder.merge().records == [record(i) for i in range(6)]
        assert shard.read_bytes().endswith(b"\n")
    # The same line damaged in the middle of a file is no torn end.
    shard.write_bytes(data[:whole].replace(b"}", b"", 1) + data[whole:])
    with pytest.raises(ValueError, match=r"answers\.rank0000\.of0001\.jsonl:1: no JSON"):
        folder.done()


def test_answers_that_disagree_are_reported(tmp_path, capsys):
    folder, ranks = opened(tmp_path)
    answer(folder, ranks, 0, 1, 2)
    shard = folder.shard(Ranks(0, 2, 0))
    shard.append(0, [record(3), record(4)], timing())  # the same again is no conflict
    assert folder.merge().records == [record(i) for i in range(6)]
    shard.append(0, [record(3), record(4, "other")], timing())
    with pytest.raises(SystemExit) as stop:
        merge.main([str(folder.path)])
    assert stop.value.code == 2
    assert f"{UIDS[4]} has two answers, 'answer 4' and 'other'" in capsys.readouterr().err
    assert not folder.answers.exists()


def test_merging_by_hand(tmp_path, capsys):
    folder, ranks = opened(tmp_path)
    answer(folder, ranks, 0, 2)
    for target, says in ((folder.path, "2 of 6 questions have no answer"), (tmp_path, "run.json")):
        with pytest.raises(SystemExit) as stop:
            merge.main([str(target)])
        assert stop.value.code == 2
        assert says in capsys.readouterr().err
    assert not folder.answers.exists()
    answer(folder, ranks, 1)
    assert merge.main([str(folder.path)]) == 0
    lines = folder.answers.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(i) for i in range(6)]


@pytest.mark.parametrize(
    ("settings", "uids", "says"),
    [
        ({**SETTINGS, "plan": "uniform"}, UIDS, "plan: 'none' there, 'uniform' asked"),
        ({**SETTINGS, "new": 1}, UIDS, "new: None there, 1 asked"),
        (SETTINGS, [*UIDS[:-1], "set:5:bb"], "other questions"),
    ],
)
def test_configurations_are_not_mixed(tmp_path, settings, uids, says):
    folder, ranks = opened(tmp_path)
    answer(folder, ranks, 0)
    files = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=says):
        RunFolder(folder.path, settings).open(uids, BATCHES, ranks, {})
    assert files == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_answers_of_unknown_settings_are_not_written_over(tmp_path):
    path = tmp_path / "a.jsonl"
    write_answers(path, [record(0)])
    before = path.read_bytes()
    folder = RunFolder(tmp_path / "a.jsonl.run", SETTINGS)
    assert folder.answers == path
    with pytest.raises(ValueError, match=r"a\.jsonl is there without the run\.json"):
        folder.open(UIDS, BATCHES, Ranks(), {})
    assert path.read_bytes() == before


def test_the_baseline_is_the_run_that_differs_in_its_plan_alone(tmp_path):
    plan, ranks = {**SETTINGS, "plan": "uniform"}, Ranks()
    folders = {}
    for name, settings in {"a": plan, "b": SETTINGS, "c": {**SETTINGS, "batch_size": 3}}.items():
        folders[name] = RunFolder(tmp_path / name, settings)
        folders[name].open(UIDS, BATCHES, ranks, {})
        folders[name].note(speed={"name": name})
    assert folders["a"].baseline_speed() == {"name": "b"}
    assert folders["b"].baseline_speed() is None
    environment = json.loads((tmp_path / "b" / "run.json").read_text())["environment"]
    folders["b"].note(environment={**environment, "cpu": "another"})
    assert folders["a"].baseline_speed() is None


def test_the_last_line_of_a_run():
    base = summarise([timing(), timing()], 1)
    assert base["questions_per_second"] == 4 / 8
    assert base["first_token_ms"] == base["first_token_p90_ms"] == 5.0
    assert "most time in wait (25%)" in format_line(base)
    fast = timing(0.25, flops=5)
    fast["seconds"]["decode"] = 1.0
    run = summarise([fast, fast], 2, base)
    assert run["ideal_speedup"] == 2.0
    assert run["speedup"] == 8 / 3.5
    assert (run["lost_in"], run["lost_seconds"]) == ("decode", 1.0)
    line = format_line(run)
    assert "2.29x the run without a plan, FLOPs allow 2.00x" in line
    assert "lost in decode (1.00 s above that ideal)" in line
    assert "2 processes" in line
    half = summarise([timing()], 1)  # a baseline over half of the questions
    assert compare(run, half)["ideal_speedup"] == 2.0
    assert compare(run, half)["speedup"] == run["speedup"]
    assert "speedup" not in summarise([timing(flops=None)], 1, base)
    assert format_line(summarise([], 1)) == "nothing was answered"


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2)),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (0, 2, 0)),
        ({"RANK": "8", "WORLD_SIZE": "8"}, None),
    ],
)
def test_ranks_come_from_torchrun_or_slurm(monkeypatch, env, found):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if found is None:
        with pytest.raises(ValueError, match="RANK=8 does not fit WORLD_SIZE=8"):
            Ranks.from_environment()
    else:
        assert tuple(Ranks.from_environment()) == found
