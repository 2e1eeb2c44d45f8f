"""What the documents show is what the code says."""

from __future__ import annotations

import difflib
import re

from conftest import ROOT

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


def test_plans_in_the_documents_parse():
    text = (ROOT / "docs" / "Reduction.md").read_text() + (ROOT / "README.md").read_text()
    names = "|".join(REDUCERS)
    plans = re.findall(rf'(?:--reduction |")"?((?:{names}):[^"\n]+)"', text)
    assert len(plans) >= 3
    for plan in plans:
        assert ReductionPlan.parse(plan)
