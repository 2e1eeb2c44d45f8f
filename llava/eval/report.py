"""From measured rows to a table on the terminal and one self-contained page.

Special here: `summary.json` is the only input, so the page can be made again without a model; the
page has inline SVG and no script, font or picture from elsewhere.
``python -m llava.eval.report results/quickstart/summary.json`` writes ``index.html`` beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llava.drawing import colour, defs, stages
from llava.eval import charts
from llava.eval.controls import controls_section, sentences
from llava.eval.pages import document, dot, facts_list, method_of, section, table, two, unique
from llava.utils import atomic_write, user_errors

Row = Mapping[str, Any]
ROW_KEYS = (
    "checkpoint", "plan", "set", "accuracy", "low", "high", "n", "visual_tmacs", "full_tflops",
    "prefill_ms", "decode_ms", "share_of_ideal",
)  # fmt: skip
"""Keys every row of summary.json has. Accuracies are in per cent."""


# ----------------------------------------------------------------------------- numbers
def mean_row(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows of one plan over several sets as one row, set ``mean``.

    Each set counts the same. The sets hold different pictures, so the half-widths of their
    intervals add in squares.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("mean_row: there are no rows")
    count = len(rows)
    mean = sum(row["accuracy"] for row in rows) / count
    down = math.sqrt(sum((row["accuracy"] - row["low"]) ** 2 for row in rows)) / count
    up = math.sqrt(sum((row["high"] - row["accuracy"]) ** 2 for row in rows)) / count
    return {
        **rows[0],
        "set": "mean",
        "accuracy": mean,
        "low": mean - down,
        "high": mean + up,
        "n": sum(row["n"] for row in rows),
    }


def by_plan(rows: Sequence[Row], checkpoint: str) -> dict[str, list[Row]]:
    """A checkpoint's rows, grouped by plan in the order they were measured."""
    mine = [row for row in rows if row["checkpoint"] == checkpoint]
    return {
        plan: [row for row in mine if row["plan"] == plan]
        for plan in unique([row["plan"] for row in mine])
    }


def plan_label(row: Row) -> str:
    """How a plan is called in tables: ``pyramiddrop 67 %``, by the FLOPs it may use."""
    name, share = method_of(row["plan"]), row.get("flops_budget")
    return name if share is None else f"{name} {share:.0%}".replace("%", " %")


def by_budget(rows: Sequence[Row], checkpoint: str) -> list[tuple[float | None, list[list[Row]]]]:
    """A checkpoint's plans (lists of rows) grouped by budget, the largest first; what has no
    budget comes before."""
    plans = list(by_plan(rows, checkpoint).values())
    budgets = unique([str(group[0].get("flops_budget")) for group in plans])
    found = [
        (group[0][0].get("flops_budget"), group)
        for budget in budgets
        for group in [[g for g in plans if str(g[0].get("flops_budget")) == budget]]
    ]
    return sorted(found, key=lambda pair: -2.0 if pair[0] is None else -pair[0])


def read_summary(path: str | Path) -> dict[str, Any]:
    """Read and check a summary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or rows or keys are missing.
    """
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = data.get("rows") if isinstance(data, dict) else None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    for row in rows:
        missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            raise ValueError(f"{path}: a row lacks {', '.join(missing)}")
    return data


def figure(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number for a table, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


# ----------------------------------------------------------------------------- terminal
def format_table(rows: Sequence[Row]) -> str:
    """All plans and sets of all checkpoints as a text table."""
    sets = unique([row["set"] for row in rows])
    head = ["plan", *[name.removeprefix("digits_") for name in sets], "mean", "MFLOPs", "prefill",
            "decode", "of ideal"]  # fmt: skip
    blocks = []
    for checkpoint in unique([row["checkpoint"] for row in rows]):
        body, rules = [head], []
        for _, group in by_budget(rows, checkpoint):
            rules.append(len(body))
            body += [table_line(plan, sets) for plan in group]
        blocks.append(f"{checkpoint}\n{align(body, rules)}")
    n = sorted({row["n"] for row in rows})
    spread = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    note = (
        f"Accuracy in per cent, {spread} questions a set, mean with its 95 % interval. MFLOPs: "
        "prefill of one question, full convention. Times: a batch, CPU time; share of the ideal "
        "prefill speed-up."
    )
    return "\n\n".join([*blocks, note])


def format_summary(summary: Mapping[str, Any]) -> str:
    """The table, and who loses to the controls."""
    said = sentences(summary.get("comparisons", ()))
    return "\n\n".join([format_table(summary["rows"]), *(["\n".join(said)] if said else [])])


def table_line(group: Sequence[Row], sets: Sequence[str]) -> list[str]:
    """One plan's line of the text table."""
    found, mean = {row["set"]: row for row in group}, mean_row(group)
    return [
        plan_label(mean),
        *[figure(found[s]["accuracy"]) if s in found else "–" for s in sets],
        f"{mean['accuracy']:.1f} [{mean['low']:.0f}, {mean['high']:.0f}]",
        figure(scaled(mean["full_tflops"], 1e6), 0),
        figure(mean["prefill_ms"], 1, " ms"),
        figure(mean["decode_ms"], 1, " ms"),
        figure(scaled(mean["share_of_ideal"], 100), 0, " %"),
    ]


def scaled(value: float | None, factor: float) -> float | None:
    """``value * factor``; None stays None."""
    return None if value is None else value * factor


def align(table: Sequence[Sequence[str]], rules: Sequence[int] = (1,)) -> str:
    """Columns of equal width, the first to the left, the others to the right; a rule in front of
    the rows `rules`."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for number, row in enumerate(table):
        line = "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines += ["-" * len(line), line] if number in rules else [line]
    return "\n".join(lines)


# ----------------------------------------------------------------------------- page
def page(summary: Mapping[str, Any]) -> str:
    """The whole page as text.

    Args:
        summary: ``rows`` as in summary.json and, where they were measured, ``bench`` (what ``llava
            bench --json`` writes), ``examples``, ``sets``, ``timing_batch``, ``environment``.
    """
    rows = summary["rows"]
    checkpoints = unique([row["checkpoint"] for row in rows])
    parts = [
        introduction(summary),
        f'<div class="cards">{"".join(cards(summary))}</div>',
        section(
            "Accuracy against cost",
            "Mean over the sets with 95 % intervals. Cost is the decoder's prefill of one question "
            "in millions of floating-point operations: text included, causal attention halved. "
            "“blind” answers without seeing the picture.",
            legend(rows) + two(mean_charts(rows, checkpoints)),
        ),
        controls_section(summary.get("comparisons", ())),
        section("Set by set", "", "".join(set_charts(summary, name) for name in checkpoints)),
        section(
            "All figures",
            "Accuracy in per cent. The plans of one group may use the prefill FLOPs of the "
            "PyramidDrop plan in it; the budget solver (llava plan) found what the others keep.",
            "".join(full_table(rows, name) for name in checkpoints),
        ),
        times_section(summary, checkpoints),
        bench_section(summary.get("bench")),
        side_by_side_section(summary.get("every_method")),
        examples_section(summary.get("examples", ())),
        section(
            "How this was made",
            "",
            "<p><code>bash scripts/quickstart.sh</code> makes this page; <code>FULL=1</code> takes "
            "all questions. The figures are in <code>summary.json</code> beside it.</p>"
            + facts_list({**summary.get("run", {}), **summary.get("environment", {})}),
        ),
    ]
    return document("Fewer visual tokens: quickstart", parts)


def introduction(summary: Mapping[str, Any]) -> str:
    """Title and what was measured."""
    rows = summary["rows"]
    sets = len(unique([row["set"] for row in rows]))
    n = sum(row["n"] for row in by_first_plan(rows))
    amount = "all " if summary.get("full") else ""
    return (
        "<header><h1>What do fewer visual tokens cost, and what do they save?</h1>"
        '<p class="lead">A tiny LLaVA looks at pictures of handwritten digits and answers '
        f"questions about them: {amount}{n} questions of {sets} sets. After some of its layers it "
        "drops visual tokens. Which ones, and when, is up to the method; all of them may use the "
        "same FLOPs. The controls choose blindly: any token (random), or an even stride (uniform)."
        "</p></header>"
    )


def by_first_plan(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first checkpoint and plan: one a set."""
    first = rows[0]
    key = (first["checkpoint"], first["plan"])
    return [row for row in rows if (row["checkpoint"], row["plan"]) == key]


def cards(summary: Mapping[str, Any]) -> list[str]:
    """The headline figures."""
    rows, found = summary["rows"], []
    for checkpoint in unique([row["checkpoint"] for row in rows]):
        plans = by_plan(rows, checkpoint)
        half = next(
            (g for g in plans.values() if method_of(g[0]["plan"]) == "pyramiddrop"
             and g[0].get("budget") == 0.5), None
        )  # fmt: skip
        if half is None or "none" not in plans:
            continue
        none, cut = mean_row(plans["none"]), mean_row(half)
        found.append(
            card(
                f"{none['accuracy']:.1f} → {cut['accuracy']:.1f} %",
                f"{checkpoint}: mean accuracy without dropping → PyramidDrop, λ 0.5",
            )
        )
        if len(found) == 1:
            share = cut["full_tflops"] / none["full_tflops"]
            words = "of the prefill FLOPs are left with λ 0.5"
            found.insert(0, card(f"{100 * share:.0f} %", words))
    bench = summary.get("bench")
    if bench:
        prefill = bench["prefill"]
        found.append(
            card(
                f"{prefill['speedup']:.2f}×",
                f"faster prefill at a larger size (cpu-512), {prefill['share_of_ideal']:.0%} of "
                "the ideal",
            )
        )
    return found


def card(number: str, label: str) -> str:
    """One headline figure."""
    return f'<div class="card"><b>{escape(number)}</b><span>{escape(label)}</span></div>'


def legend(rows: Sequence[Row]) -> str:
    """Colours of the methods."""
    names = unique([method_of(row["plan"]) for row in rows])
    words = {"none": "no dropping"}
    items = (
        f'<span><i style="background:{colour(name)}"></i>{escape(words.get(name, name))}</span>'
        for name in names
    )
    return f'<div class="legend">{"".join(items)}</div>'


def accuracy_series(rows: Sequence[Row]) -> tuple[dict[str, list[charts.Point]], dict[str, float]]:
    """Rows (one a plan) as lines of a chart, and the level of ``blind``."""
    series: dict[str, list[charts.Point]] = {}
    levels: dict[str, float] = {}
    for row in rows:
        name = method_of(row["plan"])
        if name == "blind":
            levels["blind"] = row["accuracy"]
            continue
        interval = f"[{row['low']:.1f}, {row['high']:.1f}]"
        label = f"{plan_label(row)}: {row['accuracy']:.1f} % {interval}, n = {row['n']}"
        point = charts.Point(
            1e6 * row["full_tflops"], row["accuracy"], row["low"], row["high"], label
        )
        series.setdefault(name, []).append(point)
    return series, levels


def mean_charts(rows: Sequence[Row], checkpoints: Sequence[str]) -> list[str]:
    """One chart a checkpoint over the mean of all sets."""
    found = []
    for checkpoint in checkpoints:
        means = [mean_row(group) for group in by_plan(rows, checkpoint).values()]
        series, levels = accuracy_series(means)
        chart = charts.accuracy_chart(series, levels, x_title="MFLOPs a question (prefill)")
        found.append(f"<h3>{escape(checkpoint)}</h3>{chart}")
    return found


def set_charts(summary: Mapping[str, Any], checkpoint: str) -> str:
    """Small charts of one checkpoint, one a set."""
    rows = [row for row in summary["rows"] if row["checkpoint"] == checkpoint]
    facts = summary.get("sets", {})
    found = []
    for name in unique([row["set"] for row in rows]):
        series, levels = accuracy_series([row for row in rows if row["set"] == name])
        chart = charts.accuracy_chart(series, levels, x_title="MFLOPs", y_title="", size=(230, 190))
        chance = facts.get(name, {}).get("chance")
        note = f' <span class="note">chance {chance:.3g} %</span>' if chance is not None else ""
        label = escape(name.removeprefix("digits_"))
        found.append(f"<div><h3>{label}{note}</h3>{chart}</div>")
    return f'<h3>{escape(checkpoint)}</h3><div class="five">{"".join(found)}</div>'


def full_table(rows: Sequence[Row], checkpoint: str) -> str:
    """Every plan and set of one checkpoint."""
    sets = unique([row["set"] for row in rows if row["checkpoint"] == checkpoint])
    head = ["plan", *[name.removeprefix("digits_") for name in sets], "mean", "visual MACs, M",
            "MFLOPs", "kept tokens"]  # fmt: skip
    body = []
    for share, groups in by_budget(rows, checkpoint):
        if share is not None:
            words = f"at most {share:.0%} of the prefill FLOPs".replace("%", " %")
            body.append(f'<tr class="group"><td colspan="{len(head)}">{words}</td></tr>')
        body += [full_line(group, sets) for group in groups]
    return f"<h3>{escape(checkpoint)}</h3>" + table(head, body)


def full_line(group: Sequence[Row], sets: Sequence[str]) -> str:
    """One plan's line of the full table."""
    found, mean = {row["set"]: row for row in group}, mean_row(group)
    name, kept = method_of(mean["plan"]), mean.get("kept_tokens")
    cells = [
        dot(mean["plan"]) + f'<span title="{escape(mean["plan"])}">{escape(name)}</span>',
        *[with_interval(found[s]) if s in found else "–" for s in sets],
        with_interval(mean),
        figure(scaled(mean["visual_tmacs"], 1e6), 1),
        figure(scaled(mean["full_tflops"], 1e6), 1),
        " → ".join(str(count) for count in kept).replace(" ", "\u2009") if kept else "–",
    ]
    css = ' class="none"' if name == "none" else ""
    return f"<tr{css}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def with_interval(row: Row) -> str:
    """``97.5`` and the bounds of its interval as a table cell."""
    return f"{row['accuracy']:.1f} <small>{row['low']:.0f}–{row['high']:.0f}</small>"


def times_section(summary: Mapping[str, Any], checkpoints: Sequence[str]) -> str:
    """Measured prefill and decode times of the tiny models."""
    batch = summary.get("timing_batch", 32)
    found = []
    for checkpoint in checkpoints:
        grouped = by_budget(summary["rows"], checkpoint)
        first = [group[0] for _, groups in grouped for group in groups]
        for key, title in (("prefill_ms", "prefill"), ("decode_ms", "one decode step")):
            bars = [
                (plan_label(row), method_of(row["plan"]), row[key])
                for row in first
                if row[key] is not None and method_of(row["plan"]) != "blind"
            ]
            if bars:
                chart = charts.bar_chart(bars, unit="ms")
                found.append(f"<h3>{escape(checkpoint)}: {title}</h3>{chart}")
    if not found:
        return ""
    return section(
        f"Measured times at batch {batch}",
        "CPU time of the process, median of interleaved runs. This model is too small to show what "
        "dropping saves: a real LLaVA has thousands of times its weights and far longer prompts. "
        "The next box measures the same code at a larger size.",
        two(found),
    )


def bench_section(bench: Mapping[str, Any] | None) -> str:
    """One row of ``llava bench``."""
    if not bench:
        return ""
    body = []
    labels = {"prefill": "prefill", "decode": "decode, a step", "train_step": "training step"}
    for key, label in labels.items():
        part = bench.get(key)
        if not part:
            continue
        low, high = part["speedup_spread"]
        cells = [
            label, figure(part["none_ms"], 1, " ms"), figure(part["plan_ms"], 1, " ms"),
            f"{part['speedup']:.2f}× <small>[{low:.2f}, {high:.2f}]</small>",
            figure(part["ideal"], 2, "×"),
            figure(scaled(part["share_of_ideal"], 100), 0, " %"),
            figure(scaled(part.get("selection_share"), 100), 1, " %"),
        ]  # fmt: skip
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = ["cpu-512", "no dropping", "PyramidDrop", "speed-up", "ideal", "share of ideal",
            "selection"]  # fmt: skip
    threads = bench.get("threads", 1)
    count = "one thread" if threads == 1 else f"{threads} threads"
    return section(
        "What dropping saves at a larger size",
        "llava bench --preset cpu-512: 16 layers of width 512 with random weights, 576 visual and "
        f"64 text tokens, {count}. The ideal counts the operations of what is timed; selection is "
        "the share of the prefill spent on choosing tokens.",
        table(head, body),
    )


def examples_section(examples: Sequence[Mapping[str, Any]]) -> str:
    """Pictures with the tokens that survive each stage."""
    if not examples:
        return ""
    found = []
    for number, example in enumerate(examples):
        prefix, run = f"example{number}-", example["runs"][0]
        drawn = stages(example, run, prefix=prefix, scores=False)
        found.append(
            f'<div class="example"><h3>“{escape(example["question"])}”</h3>'
            f'<p class="note">{verdict(run["answer"], example)} · '
            f"{escape(example['checkpoint'])}, {escape(example['plan_label'])}</p>"
            f"{defs(example, prefix)}{drawn}</div>"
        )
    return section(
        "Which tokens survive",
        "Visual tokens that have been dropped are faded. What stays depends on the question.",
        f'<div class="examples">{"".join(found)}</div>',
    )


def verdict(answer: str, example: Mapping[str, Any]) -> str:
    """``answer “3” (right)``; what is right is looked up by the answer."""
    right = example["correct"] if "correct" in example else example["right"][answer]
    words = "right" if right else f"wrong, it is “{example['label']}”"
    return f"answer “{escape(answer)}” ({escape(words)})"


def side_by_side_section(example: Mapping[str, Any] | None) -> str:
    """One question with the plans of all methods at one budget."""
    if not example:
        return ""
    found = []
    for run in example["runs"]:
        if not run["cuts"]:
            continue
        drawn = stages(example, run, prefix="every-", scores=False)
        found.append(
            f'<div class="example"><h3>{dot(run["plan"])}{escape(method_of(run["plan"]))}</h3>'
            f'<p class="note">{verdict(run["answer"], example)}</p>'
            f"{drawn}</div>"
        )
    return section(
        f"One question, every method: “{example['question']}”",
        f"{example['checkpoint']}, all within the same FLOPs. The command llava show draws this, "
        "with the scores of each cut, for any picture, question and plans.",
        f'{defs(example, "every-")}<div class="examples">{"".join(found)}</div>',
    )


def write_page(summary: Mapping[str, Any], path: str | Path) -> None:
    """Write the page, whole or not at all."""
    content = page(summary)
    with atomic_write(path) as file:
        file.write(content)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Make the page of a summary again."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.report", description="summary.json -> table and index.html"
    )
    parser.add_argument("summary", help="a summary.json")
    parser.add_argument("--page", help="where the page goes (default: index.html beside it)")
    args = parser.parse_args(argv)
    summary = read_summary(args.summary)
    print(format_summary(summary))
    write_page(summary, args.page or Path(args.summary).with_name("index.html"))


if __name__ == "__main__":
    main()
