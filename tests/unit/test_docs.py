"""What the documents show is what the code says."""

from __future__ import annotations

import ast
import difflib
import json
import re
import shlex

import numpy as np
from command_lines import all_flags, why_not
from places import ROOT

from llava.reduction import REDUCERS, ReductionPlan, budget, flops


def test_the_family_diff_in_the_design_page_is_real():
    folder = ROOT / "llava" / "model" / "language_model"
    llama = (folder / "llava_llama.py").read_text().splitlines(keepends=True)
    qwen3 = (folder / "llava_qwen3.py").read_text().splitlines(keepends=True)
    diff = "".join(list(difflib.unified_diff(llama, qwen3, n=0))[2:])
    assert diff in (ROOT / "docs" / "Design.md").read_text()


def _pages():
    """Every page that is written by hand."""
    tops = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*tops, *sorted((ROOT / "docs").glob("*.md")), ROOT / "checkpoints" / "README.md",
            ROOT / "playground" / "README.md"]  # fmt: skip


def _anchors(page):
    """What a heading is called in a link, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = [
        re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.M)
    ]
    return {title.replace(" ", "-") for title in titles}


def test_links_between_documents_exist():
    found = 0
    for page in _pages():
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in _anchors(there), f"{page.name} links to {target}"
            found += 1
    assert found > 30


START = r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:llava|python|bash|torchrun|srun|sbatch|pip|make)\b"


def _commands(page):
    """(command, whether it is a fragment): lines of blocks are whole, spans in sentences not."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^ *```(?:bash)?\n(.*?)^ *```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.strip().split(" && "):
                if re.match(START, command):
                    yield command, False
    for span in _spans(page):
        if re.match(START + " ", span) and "<" not in span:
            yield span, True


def _spans(page):
    """What stands in backticks outside of blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def _filled(command):
    """The command with something for what the reader puts in: "..." and {a,b}."""
    command = re.sub(r"(--[\w-]+|=)( ?)\.\.\.", r"\1\2x", command.split("  #")[0].strip())
    command = re.sub(r"(reduction |REDUCTION=)x", r"\1none", command).removesuffix(" ...")
    choices = re.search(r"\{(\w+(?:,\w+)+)\}", command)
    if not choices:
        return [command]
    return [command.replace(choices[0], each) for each in choices[1].split(",")]


def test_commands_in_the_documents_go_through_their_parsers():
    problems, found = {}, set()
    for page in _pages():
        for command, fragment in _commands(page) if page.name != "Migrating.md" else ():
            for each in _filled(command):
                if (each, fragment) not in found and not each.startswith("python -m venv"):
                    found.add((each, fragment))
                    problem = why_not(each, fragment)
                    problems |= {f"{page.name}: {each}": problem} if problem else {}
    assert not problems, "\n".join(f"{each}\n    {why}" for each, why in problems.items())
    assert len(found) > 120


def test_flags_in_the_documents_exist():
    known = all_flags() | {
        *(
            "--no-deps",
            "--force_simple",
            "--use_cache",
            "--tasks",
            "--model",
            "--model_args",
        ),  # others'
        *("--nodes", "--ntasks", "--ntasks-per-node", "--signal", "--nproc_per_node"),
    }
    wrong, found = [], 0
    for page in _pages():
        for span in _spans(page) if page.name != "Migrating.md" else ():
            if span.startswith("--"):
                found += 1
                flag = re.split(r"[ =]", span)[0]
                wrong += [f"{page.name}: {span}"] if flag not in known else []
    assert wrong == []
    assert found > 60


def test_paths_in_the_documents_exist():
    """Files of this repository; those of an original are cited in Comparison and Migrating."""
    theirs = (
        "docs/MODEL_ZOO.md",
        "llava/model/language_model/adaptprune.py",
        "llava/reduction/loudest.py",
    )
    wrong, found = [], 0
    for page in _pages():
        if page.name in ("Comparison.md", "Migrating.md"):
            continue
        for span in _spans(page):
            for path in re.findall(r"(?<![\w/.])(?:llava|tests|scripts|docs)/[\w/]+\.\w+", span):
                found += 1
                wrong += (
                    [] if (ROOT / path).exists() or path in theirs else [f"{page.name}: {path}"]
                )
    assert wrong == []
    assert found > 60


def test_names_in_the_pages_about_code_are_in_the_code():
    files = [
        ROOT / "pyproject.toml",
        *(ROOT / "llava").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text("utf-8"))}
    words |= {path.stem for path in files}
    for name in ("Design.md", "Checkpoints.md"):
        named = {
            (span, word)
            for span in _spans(ROOT / "docs" / name)
            for word in re.findall(r"[A-Za-z_]\w{3,}", span)
        }
        assert len(named) > 100
        assert {pair for pair in named if pair[1] not in words} == set()


def test_the_design_page_names_every_file_of_the_training_code():
    text = (ROOT / "docs" / "Design.md").read_text(encoding="utf-8")
    section = text.split("\n## Where the training code is")[1].split("\n## ")[0]
    there = {path.name for path in (ROOT / "llava" / "train").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", section)) == there


def test_tests_named_in_the_documents_exist():
    names = {name for path in (ROOT / "tests").rglob("test_*.py") for name in _tests_of(path)}
    named = {
        (page.name, name)
        for page in _pages()
        for name in re.findall(r"\btest_\w+", page.read_text(encoding="utf-8"))
        if not list((ROOT / "tests").rglob(f"{name}.py"))
    }
    assert len(named) > 40
    assert {pair for pair in named if pair[1] not in names} == set()


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


def _cells(page, header):
    """The rows of the table with that header, as lists of cells."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(header))
    end = next(at for at, line in enumerate(lines[start:], start) if not line.startswith("|"))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in lines[start + 2 : end]]


def test_the_table_of_costs_is_calculated():
    rows = _cells("Benchmarks.md", "| preset | visual tokens |")
    assert len(rows) > 10
    for preset, tokens, at, share, said, _ in rows:
        layers = [] if at == "none" else [int(layer) for layer in at.split(",")]
        plan = ReductionPlan.pyramid(
            layers, [float(share) ** power for power, _ in enumerate(layers, 1)]
        )
        cost = flops.cost(flops.with_tokens(flops.get_preset(preset), int(tokens), None), plan)
        assert f"{cost.visual_tmacs:.3f} T" == said, (preset, tokens, at, share)


def test_the_table_of_budgets_is_what_the_solver_finds():
    rows = _cells("Reduction.md", "| average | layers |")
    assert len(rows) == 3
    preset = flops.get_preset("llava-1.5-7b")
    for average, layers, kept, macs, full in rows:
        wanted = budget.Budget("average_tokens", float(average))
        best, _ = budget.solve(preset, "pyramiddrop", wanted)
        assert str(list(best.layers)) == layers
        cost = flops.cost(preset, best.plan)
        assert ", ".join(map(str, cost.kept_tokens[1:])) == kept
        assert f"{cost.visual_tmacs:.3f} T" == macs
        assert f"{cost.full_tflops:.3f} T" == full


def test_the_costs_of_methods_are_those_of_their_commands(tmp_path):
    page = (ROOT / "docs" / "Reduction.md").read_text(encoding="utf-8")
    costs = re.findall(r"^\| cost \| `llava flops (.*)`: ([\d.]+) -> ([\d.]+) T", page, re.M)
    assert len(costs) == 4
    for words, without, with_plan in costs:
        flops.main([*shlex.split(words), "--json", str(tmp_path / "flops.json")])
        found = json.loads((tmp_path / "flops.json").read_text())
        unit = 2 if "yopo" in words else 1  # its paper counts 2 FLOPs a multiply-accumulate
        for said, macs in (
            (without, found["none"]["visual_tmacs"]),
            (with_plan, found["visual_tmacs"]),
        ):
            digits = len(said.partition(".")[2])
            assert f"{unit * macs:.{digits}f}" == said, words


def test_the_extras_of_the_installation_page_are_all_there():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", table, re.M)
    assert sorted(row[0].strip("`") for row in _cells("Install.md", "| extra |")) == sorted(extras)
