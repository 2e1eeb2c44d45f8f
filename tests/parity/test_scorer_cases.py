"""Recorded scorers: the stored selection, and all of them where they are."""

from __future__ import annotations

import json
import shutil

import eval_cases
import pytest
import reference_cases
from places import DATA, reference_root

STORED = DATA / "eval"


def failures(folder) -> list[str]:
    lines = list(reference_cases.run([folder]))
    assert lines, f"nothing was run in {folder}"
    return [line for good, line in lines if not good]


def test_stored_cases():
    assert failures(STORED) == []


@pytest.mark.skipif(reference_root() is None, reason="no folder of recorded cases")
def test_all_recorded_cases():
    assert failures(reference_root() / "eval") == []


def test_every_recorded_value_counts(tmp_path):
    """A number, a text and a key that is not answered are each seen."""
    folder = tmp_path / "eval" / "pope"
    shutil.copytree(STORED / "pope", folder)
    path = folder / "expected.json"
    recorded = json.loads(path.read_text())
    recorded["categories"]["popular"]["f1"] += 1e-9
    recorded["per_item"][17]["parsed"] = "maybe"
    recorded["kappa"] = 0.5
    path.write_text(json.dumps(recorded))
    (good, line), *more = eval_cases.run_case(folder, "pope")
    assert not good
    assert not more
    for seen in ("categories/popular/f1", "per_item/17/parsed: ", "kappa: recorded, but nothing"):
        assert seen in line
    path.write_text("{}")
    (folder / "llava_pope_test.jsonl").unlink()
    assert reference_cases.main([str(folder)]) == 1
