"""The folder of a run: what was asked with which settings, answers as they come, the whole at last.

    results/<benchmark>/<run>/
        run.json                              settings, versions, attempts, speed
        shards/plan.json                      uids in order, and which questions make which batch
        shards/answers.rank0000.of0002.jsonl  answers of one process, appended batch by batch
        shards/timing.rank0000.of0002.jsonl   seconds of each batch, apart: they differ every time
        answers.jsonl                         all answers in the order of the questions
        scores.json

Special here: killed at any moment, a run loses at most the batches that were being answered.
A shard gets all lines of a batch in one write, flushed to the disk, and a batch counts only when
all its lines are there; a process repairs the torn end of its own shard before it goes on. Shards
of any earlier number of processes are read. Processes never talk to each other: whoever finds all
batches answered joins them, and whoever does so writes the same file.
A folder takes one configuration only. ``python -m llava.eval.merge RUN`` joins by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.batches import Batch
from llava.eval.questions import read_json_lines
from llava.utils import Ranks, atomic_write, environment, json_dump

VERSION = 1
Record = dict[str, Any]


def config_hash(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits of all settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_answers(path: str | Path, records: Iterable[Record]) -> None:
    """Write an answers file, one JSON object a line; whole or not at all."""
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_answers(run: str | Path) -> list[Record]:
    """The answers of a run's folder; while it is not complete, those that its shards hold."""
    folder = RunFolder.at(run)
    if folder.answers.is_file():
        return [record for _, record in read_json_lines(folder.answers)]
    return folder.merge().records


@dataclass(frozen=True)
class Merged:
    """Answers in the order of the questions, and the uids that have none."""

    records: list[Record]
    missing: list[str]


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. settings: everything that an answer depends on, as JSON values."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def answers(self) -> Path:
        """The answers file: of `answers.jsonl.run`, which `llava answer` makes, the one beside."""
        if self.path.suffix == ".run":
            return self.path.with_suffix("")
        return self.path / "answers.jsonl"

    @classmethod
    def at(cls, path: str | Path) -> RunFolder:
        """A run that is there. ValueError for a folder that holds none."""
        path = Path(path)
        if not (path / "run.json").is_file():
            raise ValueError(f"{path} is not the folder of a run: run.json is missing")
        run = read_object(path / "run.json")
        return cls(path, {key: run[key] for key in run.get("hashed", ())})

    @property
    def run_id(self) -> str:
        return config_hash(self.settings)

    # Opening

    def open(
        self, uids: Sequence[str], batches: Sequence[Batch], ranks: Ranks, notes: Mapping[str, Any]
    ) -> None:
        """Make the folder, or check that it holds this very run.

        notes: what is written beside the settings and may differ between attempts. ValueError for
        a folder with other settings or other questions; nothing in it is touched then.
        """
        groups = [[list(own) for own in batch.pictures] for batch in batches]
        plan = {"v": VERSION, "uids": list(uids), "batches": groups}
        self.check()
        if (self.shards / "plan.json").is_file():
            if read_object(self.shards / "plan.json") != plan:
                raise ValueError(
                    f"{self.path} holds a run over other questions or batches; give another folder"
                )
        else:
            json_dump(self.shards / "plan.json", plan)
        attempt = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "world_size": ranks.world}
        if ranks.rank == 0 or not (self.path / "run.json").is_file():
            self._write_run([*self._run().get("attempts", []), attempt], notes)

    def batch_size(self, find: Callable[[], int]) -> int:
        """How many questions of this run are answered together, where its settings say "auto": what
        the first process found. ValueError for a folder with other settings."""
        self.check()
        path = self.shards / "batch_size.json"
        if not path.is_file():
            own = self.shards / f"batch_size.{uuid.uuid4().hex}.json"
            json_dump(own, {"batch_size": find()})
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(own, path)
            own.unlink()
        return int(read_object(path)["batch_size"])

    def check(self) -> None:
        """ValueError when the folder holds a run with other settings, naming what differs."""
        run = self._run()
        if not run:
            if self.answers.exists() or any(self.shards.glob("answers.*.jsonl")):
                raise ValueError(
                    f"{self.answers} is there without the run.json of its run, so the settings "
                    "that made it are not known; give another name, or remove it"
                )
            return
        asked = json.loads(json.dumps(dict(self.settings)))
        differ = [key for key in asked if run.get(key) != asked[key]]
        if differ:
            what = "; ".join(f"{k}: {run.get(k)!r} there, {asked[k]!r} asked" for k in differ)
            raise ValueError(
                f"{self.path} holds a run with other settings ({what}); answers of two "
                "configurations are not mixed: give another folder, or remove this one"
            )

    def _run(self) -> dict[str, Any]:
        path = self.path / "run.json"
        return read_object(path) if path.is_file() else {}

    def _write_run(self, attempts: list[Any], notes: Mapping[str, Any]) -> None:
        run = {
            "v": VERSION,
            "run_id": self.run_id,
            "hashed": sorted(self.settings),
            **self.settings,
            **notes,
            "attempts": attempts,
            "environment": environment(),
        }
        json_dump(self.path / "run.json", run)

    def note(self, **more: Any) -> None:
        """Add entries to run.json."""
        json_dump(self.path / "run.json", {**self._run(), **more})

    def baseline_speed(self) -> dict[str, Any] | None:
        """Speed of the run beside this one that differs in its plan alone, and that is none."""
        if self.settings.get("plan") == "none":
            return None
        own = self._run().get("environment", {})
        wanted = json.loads(json.dumps({**self.settings, "plan": "none"}))
        for path in sorted(self.path.parent.glob("*/run.json")):
            run = read_object(path)
            same = all(run.get(key) == value for key, value in wanted.items())
            there = run.get("environment", {})
            if same and "speed" in run and all(there.get(k) == own.get(k) for k in ("cpu", "gpu")):
                return run["speed"]
        return None

    # Answering

    def done(self) -> set[int]:
        """Numbers of the batches that some process has answered."""
        return {number for number, _ in self._batches()}

    def shard(self, ranks: Ranks) -> Shard:
        """The place where a process puts its batches; its torn end is cut off first."""
        name = f"rank{ranks.rank:04d}.of{ranks.world:04d}.jsonl"
        return Shard(self.shards / f"answers.{name}", self.shards / f"timing.{name}")

    # Joining

    def merge(self) -> Merged:
        """All answers, once each, in the order of the questions.

        ValueError when two shards answer a question differently.
        """
        uids: list[str] = self._plan()["uids"]
        answers: dict[str, Record] = {}
        for _, records in self._batches():
            for record in records:
                old = answers.setdefault(record["uid"], record)
                if old["text"] != record["text"]:
                    raise ValueError(
                        f"{self.shards}: question {record['uid']} has two answers, "
                        f"{old['text']!r} and {record['text']!r}; remove the shard that is wrong"
                    )
        foreign = sorted(set(answers) - set(uids))
        if foreign:
            raise ValueError(f"{self.shards} has answers that were not asked for: {foreign[:3]}")
        return Merged(
            [answers[uid] for uid in uids if uid in answers],
            [uid for uid in uids if uid not in answers],
        )

    def timings(self) -> list[dict[str, Any]]:
        """What each batch took, one entry a batch: that of its last attempt."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.shards.glob("timing.*.jsonl"), key=lambda p: p.stat().st_mtime):
            found |= {line["batch"]: line for line in read_whole_lines(path)}
        return [found[number] for number in sorted(found)]

    def _plan(self) -> dict[str, Any]:
        path = self.shards / "plan.json"
        if not path.is_file():
            raise ValueError(f"{self.path} is not the folder of a run: {path} is missing")
        return read_object(path)

    def _batches(self) -> Iterable[tuple[int, list[Record]]]:
        """(number, records) of all whole batches in all shards, without our bookkeeping."""
        for path in sorted(self.shards.glob("answers.*.jsonl")):
            held: list[Record] = []
            for line in read_whole_lines(path):
                number, place, of = line.pop("batch")
                held = [*held, line] if place == len(held) else [line] if place == 0 else []
                if len(held) == of:
                    yield number, held
                    held = []


class Shard:
    """Appends batches to two files; a batch of answers is there whole or does not count."""

    def __init__(self, answers: Path, timing: Path) -> None:
        self.paths = (answers, timing)
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            repair(path)

    def append(self, number: int, records: Sequence[Record], timing: Mapping[str, Any]) -> None:
        """Put a batch on the disk before anything else happens."""
        answers, times = self.paths
        # Timing first: a batch that counts always has one.
        _commit(times, json.dumps({"batch": number, **timing}) + "\n")
        lines = [
            json.dumps({**record, "batch": [number, place, len(records)]}, ensure_ascii=False)
            for place, record in enumerate(records)
        ]
        _commit(answers, "\n".join(lines) + "\n")


def _commit(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def repair(path: Path) -> None:
    """Cut off a last line without an end, which a kill in the middle of a write leaves."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            file.truncate(whole)
            os.fsync(file.fileno())


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that may still be written to: a last line without an end does not
    count. ValueError, naming the line, for any other that is no JSON object."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: no JSON ({error}); remove the line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: a JSON object is needed")
        found.append(record)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. ValueError, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON object is needed")
    return found
