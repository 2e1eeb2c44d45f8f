"""scripts/digits/compare_table.py: paired gains, their two-level intervals, the tables."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

pytest.importorskip("scipy")
SPEC = importlib.util.spec_from_file_location(
    "compare_table", ROOT / "scripts" / "digits" / "compare_table.py"
)
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)
PICTURES, EACH = 20, 5


def write(folder: Path, right: dict[tuple[str, str, int, str], int]) -> None:
    """Both comparisons of two seeds; `right` says how many pictures are answered (else all)."""
    for part, (_, plans) in table.PARTS.items():
        for seed in (0, 1):
            for name in table.rows_of(plans):
                for each in table.SETS:
                    good = right.get((part, name, seed, each), PICTURES)
                    items = [
                        {"uid": f"{picture}-{k}", "image": f"{picture}.png",
                         "score": float(picture < good)}
                        for picture in range(PICTURES) for k in range(EACH)
                    ]  # fmt: skip
                    run = folder / part / f"seed-{seed}" / "results" / name
                    run = run / f"digits_{each}" / "run"
                    run.mkdir(parents=True)
                    (run / "scores.json").write_text(json.dumps({"per_item": items}))


def test_equal_arms_differ_by_nothing_and_known_ones_by_what_they_do(tmp_path, capsys):
    plan = "pyramiddrop-with-pyramiddrop"
    right = {("learn", plan, 0, "gqa"): 15, ("learn", plan, 1, "gqa"): 17}
    write(tmp_path, right)
    _, same = table.read_all(tmp_path / "adapt", ("pyramiddrop", "mild"))
    assert all(
        gain == table.Gain(0.0, 0.0, 0.0, (0.0, 0.0))
        for gain in table.gains(same[table.BASE], same[plan]).values()
    )
    _, rows = table.read_all(tmp_path / "learn", ("pyramiddrop",))
    found = table.gains(rows[table.BASE], rows[plan])
    assert found["gqa"].value == pytest.approx(-20)
    assert found["gqa"].seeds == pytest.approx((-25, -15))
    assert found["mean"].value == pytest.approx(-4)
    assert found["mean"].seeds == pytest.approx((-5, -3))
    # A fifth of 20 pictures is lost: the interval over pictures alone would be about +-17 points.
    assert -45 < found["gqa"].low < -30 < -10 < found["gqa"].high < 0
    table.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| PyramidDrop | PyramidDrop | 100.0 (100.0-100.0) | 80.0 (75.0-85.0) |" in shown
    assert "-20.0 [" in shown
    assert shown.count("| mild PyramidDrop | all tokens |") == 4  # accuracy and gain, not of learn
    assert "| -5.0, -3.0 | [-16.7, +8.7] |" in shown


def test_seeds_and_pictures_are_both_levels():
    """Where every picture is gained alike the interval is that of the seeds, and the other way."""
    pictures = tuple(str(i // 4) for i in range(400))
    ids = tuple(map(str, range(400)))
    base = table.Scored(np.zeros((2, 400)), pictures, ids)
    by_seed = table.Scored(np.repeat([[0.1], [0.3]], 400, axis=1), pictures, ids)
    gain = table.gains({"a": base}, {"a": by_seed})["a"]
    assert (gain.low, gain.high) == pytest.approx((10, 30))
    ones = np.repeat(np.arange(100) % 2, 4)
    by_picture = table.Scored(np.stack([ones, ones]), pictures, ids)
    gain = table.gains({"a": base}, {"a": by_picture})["a"]
    half = 1.96 * 50 / np.sqrt(100)  # of 100 pictures, not of 400 questions or 800 answers
    assert gain.value == 50
    assert gain.high - gain.low == pytest.approx(2 * half, rel=0.1)


def test_what_is_not_whole_is_refused(tmp_path):
    write(tmp_path, {})
    folder = tmp_path / "adapt" / "seed-1" / "results" / "none-with-none"
    file = folder / "digits_pope" / "run" / "scores.json"
    scores = json.loads(file.read_text())
    scores["per_item"][0]["uid"] = "another"
    file.write_text(json.dumps(scores))
    with pytest.raises(ValueError, match="did not answer the same questions"):
        table.read_all(tmp_path / "adapt", ("pyramiddrop", "mild"))
    file.write_text("")
    with pytest.raises(ValueError, match=r"scores\.json: no JSON"):
        table.read_all(tmp_path / "adapt", ("pyramiddrop", "mild"))
    file.unlink()
    with pytest.raises(ValueError, match="0 scored runs"):
        table.read_all(tmp_path / "adapt", ("pyramiddrop", "mild"))
    with pytest.raises(ValueError, match="0 seeds"):
        table.read_all(tmp_path, ("pyramiddrop",))


def test_the_cost_table_shows_shares(capsys):
    def arm(plan: str, gflops: float, ms: float) -> dict:
        shares = {"ms_of_none": ms / 400, "ms_of_none_range": [0.5, 1.0]}
        tokens = {"tokens": 100.0, "computed_tokens": gflops}
        return {"plan": plan, "gflops": gflops, "tower_gflops": 10.0, "ms": ms, **shares, **tokens}

    lines = table.cost_table(
        {"arms": {"none": arm("none", 90, 400), "pyramiddrop": arm("p", 63, 300)}}
    )
    assert lines[2].startswith("| without dropping | `none` | 90 of 100 | 90.0 (100.0%) | 100.0")
    assert "| 63 of 100 | 63.0 (70.0%) | 73.0 (73.0%) | 300 | 75.0% (50.0%-100.0%) |" in lines[3]
