"""Recorded runs of the original implementations: the stored selection, and all if present."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

import pytest
import reference_cases
from places import DATA, reference_root
from safetensors.torch import load_file, save_file

METHODS = sorted(reference_cases.CHECKERS)
CASE = DATA / "pyramiddrop" / "b_infer_b1_sdpa"


def failures(*folders: Path) -> list[str]:
    lines = list(reference_cases.run(list(folders)))
    assert lines, f"nothing was run in {folders}"
    return [line for good, line in lines if not good]


@pytest.mark.parametrize("method", [m for m in METHODS if (DATA / m).is_dir()])
def test_stored_cases(method):
    assert failures(DATA / method) == []


@pytest.mark.skipif(reference_root() is None, reason="no folder of recorded cases")
@pytest.mark.parametrize("method", METHODS)
def test_all_recorded_cases(method):
    """Those of the stored selection, byte for byte, have been run above."""
    root = reference_root()
    assert root is not None
    cases = [case for case in sorted((root / method).iterdir()) if case.name[0] not in "_."]
    others = [case for case in cases if case.is_dir() and not is_stored(case)]
    assert not others or failures(*others) == []


def is_stored(folder: Path) -> bool:
    """Whether the stored selection holds the same files in a folder of the same name."""
    stored = DATA / folder.parent.name / folder.name
    if not stored.is_dir():
        return False
    names = sorted(file.name for file in folder.iterdir())
    same, _, _ = filecmp.cmpfiles(folder, stored, names, shallow=False)
    return sorted(same) == names == sorted(file.name for file in stored.iterdir())


def copy_case(tmp_path: Path) -> Path:
    root = tmp_path / "pyramiddrop"
    shutil.copytree(CASE, root / CASE.name)
    shutil.copytree(CASE.parent / "_weights" / "mha16", root / "_weights" / "mha16")
    return root


def test_a_changed_float_fails(tmp_path, capsys):
    root = copy_case(tmp_path)
    file = root / CASE.name / "expected.safetensors"
    tensors = load_file(file)
    tensors["prefill_logits"][0, 0, 0] += 0.01
    save_file(tensors, file)
    assert reference_cases.main([str(root)]) == 1
    assert "prefill_logits: differs by 0.01" in capsys.readouterr().out


def test_a_changed_integer_fails(tmp_path):
    root = copy_case(tmp_path)
    file = root / CASE.name / "expected.safetensors"
    tensors = load_file(file)
    tensors["stage1_kept_abs"][7] += 1
    save_file(tensors, file)
    assert reference_cases.main([str(root)]) == 1


def test_missing_weights_are_a_failed_case(tmp_path, capsys):
    root = copy_case(tmp_path)
    shutil.rmtree(root / "_weights")
    assert reference_cases.main([str(root)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_exit_status(tmp_path, capsys):
    assert reference_cases.main([str(tmp_path)]) == 1
    assert "no recorded case" in capsys.readouterr().err
    assert reference_cases.main([str(tmp_path / "absent")]) == 1
    unknown = tmp_path / "another" / "case"
    unknown.mkdir(parents=True)
    for name in ("config.json", "inputs.safetensors", "expected.safetensors"):
        (unknown / name).write_text("{}")
    (unknown / "meta.json").write_text('{"method": "another"}')
    assert reference_cases.main([str(tmp_path / "another")]) == 1
    assert "'another' is not in this package" in capsys.readouterr().out


def test_underscored_folders_are_skipped(tmp_path):
    root = copy_case(tmp_path)
    (root / CASE.name).rename(root / f"_{CASE.name}")
    assert reference_cases.main([str(root)]) == 1
