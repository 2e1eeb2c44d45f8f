"""What ranks say to one another, with threads in their place (with ranks: tests/distributed)."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.train import ranks


class Threads:
    """Two ranks of `llava.train.ranks` that are threads of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = threading.local()
        self.said: list[Any] = [None, None]
        self.meeting = threading.Barrier(2, timeout=20)
        self.rounds = 0
        monkeypatch.setattr(ranks, "several_ranks", lambda: True)
        monkeypatch.setattr(ranks, "dist", SimpleNamespace(get_rank=lambda: self.own.rank))
        monkeypatch.setattr(ranks, "from_all_ranks", self.exchange)
        monkeypatch.setattr(ranks, "highest", self.highest)

    def exchange(self, value: Any) -> list[Any]:
        self.said[self.own.rank] = value
        self.meeting.wait()
        found = list(self.said)
        self.meeting.wait()
        return found

    def highest(self, values: list[int], device: torch.device) -> list[int]:
        self.rounds += self.own.rank
        return [max(each) for each in zip(*self.exchange(values), strict=True)]

    def run(self, function: Any, *arguments: Any) -> list[Any]:
        """What each rank's call returns or raises; arguments: one of each rank."""

        def call(rank: int, *mine: Any) -> Any:
            self.own.rank = rank
            try:
                return function(*mine)
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(call, (0, 1), *arguments))


@pytest.mark.parametrize("fault", ["", "no room"])
def test_others_hear_of_a_long_work_while_it_lasts(fault: str, monkeypatch) -> None:
    two, done = Threads(monkeypatch), []

    def work() -> None:
        time.sleep(1.5)
        done.append(threading.get_ident())
        if fault:
            raise ValueError(fault)

    found = two.run(lambda _: ranks.while_others_wait(work, torch.device("cpu")), (0, 1))
    assert found == [fault or None] * 2
    assert len(done) == 1
    assert two.rounds == 2  # after a second, and when it was done


def test_what_ranks_do_not_have_in_common_is_named_on_all(monkeypatch) -> None:
    two = Threads(monkeypatch)
    facts = {"data_hash": "ab", "plan": {"cuts": [1]}, "--seed": None}
    assert two.run(ranks.agreed, (facts, dict(facts))) == [None, None]
    found = two.run(ranks.agreed, (facts, {**facts, "plan": {"cuts": [2]}}))
    assert found == [found[0]] * 2
    assert found[0].startswith(
        "the ranks differ in plan: {'cuts': [1]} on rank 0, {'cuts': [2]} on rank 1; give every"
    )


def test_a_disk_is_shared_where_rank_0s_file_is_seen(monkeypatch, tmp_path) -> None:
    two = Threads(monkeypatch)
    first, second = tmp_path / "first", tmp_path / "second"
    assert two.run(ranks.sees_rank_0, (first, first)) == [True, True]
    assert two.run(ranks.sees_rank_0, (first, second)) == [True, False]
    assert not list(first.iterdir())
    assert not second.exists()
