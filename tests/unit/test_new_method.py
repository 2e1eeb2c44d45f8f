"""The method that docs/Reduction.md shows in one file, taken from the page and run."""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import Any

import pytest
import torch
from places import ROOT
from tiny import batch, labels_of, prompts, tiny_model

from llava.reduction import REDUCERS, ReductionPlan


@pytest.fixture(scope="module")
def blocks() -> tuple[str, str]:
    """The file and the line in the table."""
    page = (ROOT / "docs" / "Reduction.md").read_text()
    section = page.split("## A new method in one file\n")[1].split("\n## ")[0]
    file, line = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    return file, line


@pytest.fixture
def method(blocks, tmp_path, monkeypatch) -> Any:
    """The class of the file, which stands in the table under the name that the line gives it."""
    file, line = blocks
    path = tmp_path / "loudest.py"
    path.write_text(file)
    spec = importlib.util.spec_from_file_location("llava.reduction.loudest", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    name, class_name = re.fullmatch(r'\s*"(\w+)": (\w+),\s*', line).groups()
    monkeypatch.setitem(REDUCERS, name, getattr(module, class_name))
    return REDUCERS[name]


TEXT = "loudest:layers=[2,4],ratios=[0.5,0.25]"


def test_it_is_a_plan(method, blocks, tmp_path):
    assert len(blocks[0].splitlines()) <= 45
    assert len(blocks[1].splitlines()) == 1
    plan = ReductionPlan.parse(TEXT)
    assert [type(cut.reducer) for cut in plan.cuts] == [method, method]
    assert str(plan) == TEXT
    assert ReductionPlan.parse(plan.to_dict()) == plan
    shares = [([cut.at for cut in plan.cuts], [0.5, 0.25])]
    assert [method.from_shares(*each).cuts for each in shares] == [method.from_options(
        {"layers": [2, 4], "ratios": [0.5, 0.25]}).cuts]  # fmt: skip
    for text, named in (("loudest:layers=[2],ratios=[2]", "kept share 2"),
                        (f"{TEXT},seed=1", "no option seed"),
                        ("loudest:layers=[2]", "lacks ratios")):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            ReductionPlan.parse(text)


def test_it_runs(method):
    """Kept tokens are those of the longest hidden states; batches, layouts, caches and training
    agree; it mixes with others."""
    model, samples = tiny_model("qwen2"), prompts()
    inputs = batch(samples)
    with torch.no_grad():
        states = model(**inputs, reduction="none", output_hidden_states=True, use_cache=False)
        out = model(**inputs, reduction=TEXT, return_trace=True)
    for group, place in enumerate(out.trace[0].origin):
        sample = out.trace[0].layout.groups[group].sample
        length = states.hidden_states[2][sample, place].norm(dim=-1)
        expected = sorted(place[length.topk(8).indices].tolist())
        assert place[out.trace[0].keep[group]].tolist() == expected
    together = model.generate(**inputs, reduction=TEXT, max_new_tokens=4, num_beams=2)
    for index, sample in enumerate(samples):
        alone = model.generate(**batch([sample]), reduction=TEXT, max_new_tokens=4, num_beams=2)
        assert together[index].tolist() == alone[0].tolist()
    model.train()
    labels, losses = labels_of(inputs), []
    mixed = f"simignore:ratio=0.8,text=all+{TEXT},per=image+fastv:k=5,r=0.9,positions=original"
    for plan in (TEXT, mixed):
        for kind in ("right", "packed"):
            sequence = model.build_sequence(**inputs, labels=labels, kind=kind)
            loss = model(sequence=sequence, reduction=plan, logits_to_keep="targets").loss
            loss.backward()
            losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[2] == pytest.approx(losses[3], abs=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-5
