"""What the documents show is what the code says."""

from __future__ import annotations

import ast
import difflib
import re

import numpy as np
from places import ROOT

from llava.reduction import REDUCERS, ReductionPlan


def test_the_family_diff_in_the_design_page_is_real():
    folder = ROOT / "llava" / "model" / "language_model"
    llama = (folder / "llava_llama.py").read_text().splitlines(keepends=True)
    qwen3 = (folder / "llava_qwen3.py").read_text().splitlines(keepends=True)
    diff = "".join(list(difflib.unified_diff(llama, qwen3, n=0))[2:])
    assert diff in (ROOT / "docs" / "Design.md").read_text()


def test_links_between_documents_exist():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_plans_in_the_documents_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the head masks lie that they name
    text = (ROOT / "docs" / "Reduction.md").read_text() + (ROOT / "README.md").read_text()
    names = "|".join(REDUCERS)
    plans = re.findall(rf'(?:--reduction |")"?((?:{names}):[^"\n]+)"', text)
    assert len(plans) >= 3
    for plan in plans:
        for mask in re.findall(r"heads=([\w/]+\.npy)", plan):
            np.save(tmp_path / mask, np.ones((32, 32), dtype=bool))
        assert ReductionPlan.parse(plan)


def _tests_of(path):
    """Names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_statement_of_the_comparison_names_a_test_that_exists():
    text = (ROOT / "docs" / "Comparison.md").read_text(encoding="utf-8")
    named = re.findall(r"(tests/\w+/\w+\.py)::(\w+)", text)
    assert len(named) > 30
    missing = [f"{path}::{name}" for path, name in named if name not in _tests_of(path)]
    assert missing == []
    for section in text.split("\n## ")[1:4]:  # using, training, evaluation
        rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert len(rows) > 5
        for row in rows:
            what, originals, here = (cell.strip() for cell in row.strip("|").split(" | "))
            assert what
            assert originals
            assert "tests/" in here, f"{what}: no test stands behind this row"


def test_the_rows_of_the_readme_are_rows_of_the_comparison():
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "Comparison.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What runs")[1]
    shown = re.findall(r"^\| ([^|]+?) \|", section.split("\n## ")[0], flags=re.MULTILINE)
    assert len(shown) == 6
    assert set(shown) <= {row[0] for row in rows}


def test_the_checkpoints_page_has_the_tables_of_the_code():
    from llava.conversation import _CONFIG_TABLE
    from llava.eval.published import PUBLISHED
    from llava.model.builder import PUBLISHED_PYRAMID
    from llava.model.key_maps import PREFIXES

    page = (ROOT / "docs" / "Checkpoints.md").read_text()
    columns = ("VQAv2", "GQA", "VizWiz", "SQA", "TextVQA", "POPE", "MME", "MMB", "MMB-CN")
    for entry in PUBLISHED:
        row = next(line for line in page.splitlines() if line.startswith(f"| {entry.name} |"))
        shown = [float(cell) for cell in row.split("|")[2 : 2 + len(columns)]]
        assert shown == [entry.scores[column] for column in columns], entry.name
    for _, least, mode in _CONFIG_TABLE:
        assert f"| `{mode}` |" in page
        assert not least or f"from {least}" in page
    assert PUBLISHED_PYRAMID in page
    for pairs in PREFIXES.values():
        for ours, theirs in pairs:
            for prefix in (ours, theirs):
                stem = prefix.removesuffix("vision_model.").removesuffix("2.")
                assert f"`{stem}" in page or "linear_" in stem, prefix
