"""Who may import whom, read from the source, and what importing the package costs.

The table is docs/Design.md's: an arrow may only point down; train, eval, serve and digits never
import one another; methods of `llava.reduction` never import one another.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS: tuple[tuple[str, int], ...] = (
    ("llava.constants", 0),
    ("llava.utils", 0),
    ("llava.drawing", 0),
    ("llava.timing", 0),
    ("llava.scaling", 0),
    ("llava.sequence", 1),
    ("llava.conversation", 1),
    ("llava.decoding", 1),
    ("llava.mm_utils", 1),
    ("llava.side_text", 1),
    ("llava.prompting", 2),
    ("llava.loading_flags", 2),
    ("llava.reduction", 2),
    ("llava.model", 3),
    ("llava.train", 4),
    ("llava.eval", 4),
    ("llava.serve", 4),
    ("llava.digits", 4),
    ("llava.cli", 5),
    ("llava.quickstart", 5),
    ("llava.verify", 5),
    ("llava", 0),  # the lazy names of __init__ are no imports
)

SHIMS: frozenset[str] = frozenset(
    f"llava.{name}"
    for name in (
        "model.modeling_llama_pdrop",
        "train.train_mem",
        "train.train_mem_pdrop",
        "train.train_mem_pdrop_next",
        "eval.model_vqa",
        "eval.model_vqa_loader",
        "eval.model_vqa_science",
        "eval.model_vqa_mmbench",
        "eval.run_llava",
        "eval.eval_pope",
        "eval.eval_textvqa",
        "eval.eval_science_qa",
        "eval.eval_gpt_review_bench",
        "eval.eval_gpt_review_visual",
        "eval.m4c_evaluator",
        "eval.summarize_gpt_review",
    )
)
"""Legacy entry points: layer 5 wherever they lie; nothing imports them."""

REDUCTION_SHARED = frozenset(
    f"llava.reduction{name}"
    for name in (
        "",
        ".base",
        ".budget",
        ".forms",
        ".plan",
        ".flags",
        ".flops",
        ".head_masks",
    )
)


def layer_of(module: str) -> int:
    """The layer of a module; KeyError for one the table does not know."""
    if module in SHIMS:
        return 5
    for prefix, layer in LAYERS:
        if module == prefix or (prefix != "llava" and module.startswith(prefix + ".")):
            return layer
    raise KeyError(f"{module} is in no layer: add it to LAYERS in {__file__}")


def unit_of(module: str) -> str:
    """``llava.train.dataset`` belongs to ``llava.train``."""
    return ".".join(module.split(".")[:2])


def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found = {}
    for path in sorted((ROOT / "llava").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's own modules that the file imports, wherever in the file it does."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(parts) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {module for module in found if module.split(".")[0] == "llava"}


def broken_arrows(name: str, path: Path, known: dict[str, Path]) -> list[str]:
    """Imports of one module that the table forbids."""
    mine, wrong = layer_of(name), []
    for other in sorted(imports(name, path, known)):
        theirs = layer_of(other)
        sideways = theirs == mine and unit_of(other) != unit_of(name) and mine not in (0, 5)
        if theirs > mine or sideways or other in SHIMS:
            wrong.append(f"{name} (layer {mine}) imports {other} (layer {theirs})")
    return wrong


def test_every_module_has_a_layer() -> None:
    known = modules()
    assert "llava.utils" in known
    for name in known:
        assert 0 <= layer_of(name) <= 5


def test_arrows_point_down() -> None:
    known = modules()
    wrong = [line for name, path in known.items() for line in broken_arrows(name, path, known)]
    assert not wrong, "\n".join(wrong)


def test_methods_do_not_import_one_another() -> None:
    known = modules()
    methods = {
        name
        for name in known
        if name.startswith("llava.reduction.") and name not in REDUCTION_SHARED
    }
    assert methods
    for name in methods:
        others = imports(name, known[name], known) & methods
        assert not others, f"{name} imports {others}: what two methods need belongs in base.py"


def test_the_walker_sees_a_forbidden_arrow(tmp_path: Path) -> None:
    known = modules()
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from llava.model import builder\n", encoding="utf-8")
    assert broken_arrows("llava.reduction.bad", bad, known)
    bad.write_text("from ..eval import answer\n", encoding="utf-8")
    assert broken_arrows("llava.train.bad", bad, known)
    bad.write_text("import llava.utils\n", encoding="utf-8")
    assert not broken_arrows("llava.reduction.bad", bad, known)


def test_the_design_page_has_this_table() -> None:
    page = (ROOT / "docs" / "Design.md").read_text(encoding="utf-8")
    rows = page.split("## Who may import whom")[1].split("\n## ")[0].splitlines()
    shown = {
        f"llava.{name}": int(row[2])
        for row in rows
        if row[:3].removeprefix("| ").isdigit()
        for name in re.findall(r"`(\w+)`", row)
    }
    assert shown == dict(LAYERS[:-1])


def test_every_shim_exists() -> None:
    assert set(modules()) >= SHIMS


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(KeyError, match=r"llava\.elsewhere"):
        layer_of("llava.elsewhere.thing")


def _loaded_after(statement: str, *names: str) -> list[str]:
    """Which of ``names`` a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return result.stdout.splitlines()[-1].split()


def test_import_llava_loads_no_torch() -> None:
    assert _loaded_after("import llava, llava.utils, llava.cli", "torch", "transformers") == []


def test_lazy_names_load_on_use() -> None:
    loaded = _loaded_after("import llava; llava.ReductionPlan", "torch", "transformers")
    assert loaded == ["torch"]


def test_help_loads_no_torch() -> None:
    statement = "from llava.cli import main; main(['--help'])"
    assert _loaded_after(statement, "torch", "transformers", "numpy") == []


def test_reduction_loads_no_transformers() -> None:
    every = [name for name in modules() if name.startswith("llava.reduction")]
    assert _loaded_after(f"import {', '.join(every)}", "transformers", "torch") == ["torch"]


def test_help_is_fast() -> None:
    best = min(_seconds([sys.executable, "-m", "llava.cli", "--help"]) for _ in range(3))
    assert best < 1.0, f"llava --help took {best:.2f} s"


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start
