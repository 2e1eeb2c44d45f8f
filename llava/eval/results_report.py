"""``llava report RUNS...``: many runs as one table, one self-contained page, and files.

    llava report results/* --out results/report.html --markdown table.md --csv table.csv

Special here: only runs of one checkpoint over the same questions on the same hardware stand side by
side; each figure comes from the run's own files, nothing is computed by a model again. Where
questions share their prefill, the page says in words which plans lose to no dropping and why.
Damaged folders are refused by name (``--skip-damaged`` leaves them out and names them).
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llava.eval import charts
from llava.eval.collect import (
    FIELDS,
    Average,
    Collected,
    Run,
    averages,
    collect,
    column,
    grouped,
    papers_of,
    published_of,
    rows,
    sharing,
    sharing_sentences,
    variants,
)
from llava.eval.pages import document, dot, facts_list, method_of, section, table, two, unique
from llava.eval.paper_tables import MME_SCALE, Printed, papers_average
from llava.eval.report import align, figure, legend
from llava.utils import atomic_write, json_dump, user_errors

STYLE = """
td.plan { white-space: normal; min-width: 170px; max-width: 340px; }
td.plan small { display: block; padding-left: 17px; overflow-wrap: anywhere; }
tbody tr.published td { color: #5c6472; font-style: italic; }
.two + .scroll, .scroll + .scroll, .scroll + dl { margin-top: 14px; }
td.papers { white-space: normal; text-align: left; width: 85%; }
th:last-child:nth-child(2) { text-align: left; white-space: normal; }
td.papers span { display: inline-block; margin-right: 20px; }
.scroll + ul { margin-top: 8px; }
@media (max-width: 480px) { td.source { white-space: normal; min-width: 90px; }
  .two svg .tick, .two svg .axis { font-size: 14px; } }
h3 small { color: #5c6472; font-weight: 400; }
"""
HEAD = (
    "plan",
    "score",
    "95 % interval",
    "FLOPs",
    "ms",
    "questions/s",
    "first token",
    "tokens @layer",
)


# ----------------------------------------------------------------------------- words, numbers
def flops_text(tera: float | None) -> str:
    """FLOPs of a question with a unit that fits: ``3.82 T``, ``78.9 M``."""
    if tera is None:
        return "–"
    for factor, unit in ((1.0, "T"), (1e3, "G")):
        if tera * factor >= 1:
            return f"{tera * factor:.3g} {unit}"
    return f"{tera * 1e6:.3g} M"


def kept_text(run: Run) -> str:
    """``64 → 32 @2 → 8 @5``: visual tokens, mean over the questions, and from which layer on."""
    first, *later = run.kept
    cuts = [f"{tokens:.4g} @{layer}" for layer, tokens in later]
    return " → ".join([f"{first[1]:.4g}", *cuts])


def cells(run: Run) -> list[str]:
    """The figures of `HEAD` behind the plan."""
    scores, speed = run.scores, run.run["speed"]
    score = "not scored" if scores is None else f"{scores['value']:.2f}"
    low_high = "–"
    if scores is not None and scores["low"] is not None:
        low_high = f"{scores['low']:.2f} – {scores['high']:.2f}"
    return [
        score,
        low_high,
        flops_text(run.tera_flops),
        f"{run.milliseconds:.3g}",
        "–" if run.rate is None else f"{run.rate:.3g}",
        figure(speed["first_token_ms"], 0, " ms"),
        kept_text(run),
    ]


def title(group: Sequence[Run]) -> str:
    """``digits_pope, llava-digits: accuracy of 72 questions``."""
    run = group[0]
    scored = next((r.scores for r in group if r.scores), None)
    what = f"{scored['metric']} of " if scored else ""
    return f"{run.benchmark}, {run.checkpoint}: {what}{run.run['n']} questions"


def plan_words(run: Run, variant: str) -> str:
    """Plan and variant as plain text."""
    return f"{run.plan} [{variant}]" if variant else run.plan


def published_rows(group: Sequence[Run]) -> list[tuple[str, float]]:
    """What is published for the group's checkpoint on its set, without dropping."""
    known = published_of(group[0])
    value = known.scores.get(column(group[0])) if known else None
    return [] if known is None or value is None else [(f"published: {known.name}", value)]


def paper_lines(group: Sequence[Run]) -> dict[str, list[Printed]]:
    """Source -> what the papers print of the group's checkpoint on its set: for the methods that
    were run, and no dropping."""
    found: dict[str, list[Printed]] = {}
    for line in papers_of(group[0], methods(group)):
        if line.words and column(group[0]) in line.scores:
            found.setdefault(line.source, []).append(line)
    return found


def paper_sentences(group: Sequence[Run]) -> list[str]:
    """The same, a sentence a source."""
    name = column(group[0])
    return [
        f"{source}: " + "; ".join(f"{line.words} {line.scores[name]:.1f}" for line in lines)
        for source, lines in paper_lines(group).items()
    ]


def methods(group: Sequence[Run]) -> list[str]:
    """The methods of a group's runs, no dropping among them."""
    return unique(["none", *(method_of(run.plan) for run in group)])


def average_sentence(found: Sequence[Average]) -> str:
    """Which columns the averages are over."""
    columns = ", ".join(found[0].columns)
    mme = f"; MME's perception counts divided by {MME_SCALE}" if "MME" in found[0].columns else ""
    return f"{found[0].checkpoint}: mean of {columns}{mme}"


def average_head(found: Sequence[Average]) -> list[str]:
    """Titles of an average's table."""
    return ["plan", *found[0].columns, "average", "FLOPs", "ms"]


def average_cells(each: Average) -> list[str]:
    """The figures behind a plan: every set, their average, what a question costs."""
    scores = [f"{value:.2f}" for value in each.scores.values()]
    costs = [flops_text(each.tera_flops), f"{each.milliseconds:.3g}"]
    return [*scores, f"{each.value:.2f}", *costs]


def published_averages(found: Sequence[Average]) -> list[list[str]]:
    """Lines of the papers that have all columns, averaged by their rule."""
    columns = found[0].columns
    runs = [run for each in found for run in each.runs]
    found: dict[tuple[str, ...], str] = {}
    for line in papers_of(runs[0], methods(runs)):
        if set(columns) <= set(line.scores):
            scores = {name: line.scores[name] for name in columns}
            figures = [*scores.values(), papers_average(scores)]
            key = line.method, *(f"{value:.2f}" for value in figures)
            found.setdefault(key, line.name)  # papers repeat each other's figures
    return [[f"published: {name}", *figures, "–", "–"] for (_, *figures), name in found.items()]


def by_columns(found: Sequence[Average]) -> list[list[Average]]:
    """Averages that may stand in one table."""
    tables: dict[tuple[Any, ...], list[Average]] = {}
    for each in found:
        tables.setdefault((each.checkpoint, each.columns), []).append(each)
    return list(tables.values())


# ----------------------------------------------------------------------------- terminal, files
def format_text(groups: Sequence[Sequence[Run]]) -> str:
    """All groups as text tables."""
    blocks = []
    for group in groups:
        body = [list(HEAD)]
        for run, variant in zip(group, variants(group), strict=True):
            body.append([plan_words(run, variant), *cells(run)])
        for name, value in published_rows(group):
            body.append([name, f"{value:.2f}", *["–"] * (len(HEAD) - 2)])
        said = [*paper_sentences(group), *sharing_sentences(group)]
        blocks.append("\n".join([title(group), align(body), *said]))
    for found in by_columns(averages(groups)):
        lines = [average_head(found)]
        lines += [[_named(each), *average_cells(each)] for each in found]
        lines += published_averages(found)
        blocks.append(f"{average_sentence(found)}\n{align(lines)}")
    return "\n\n".join(blocks)


def _named(each: Average) -> str:
    return f"{each.plan} [{each.variant}]" if each.variant else each.plan


def format_markdown(groups: Sequence[Sequence[Run]]) -> str:
    """The same for a Markdown file."""
    parts = []
    for group in groups:
        body = []
        for run, variant in zip(group, variants(group), strict=True):
            body.append([f"`{run.plan}`" + (f" {variant}" if variant else ""), *cells(run)])
        for name, value in published_rows(group):
            body.append([name, f"{value:.2f}", *["–"] * (len(HEAD) - 2)])
        parts += [f"### {title(group)}", _markdown_table(HEAD, body)]
        said = [*paper_sentences(group), *sharing_sentences(group)]
        parts += ["\n".join(f"- {sentence}" for sentence in said)] if said else []
    for found in by_columns(averages(groups)):
        body = [[f"`{e.plan}` {e.variant}".strip(), *average_cells(e)] for e in found]
        body += published_averages(found)
        parts += [f"### Average, {average_sentence(found)}"]
        parts += [_markdown_table(average_head(found), body)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in [head, rule, *body]]
    return "\n".join(f"| {line} |" for line in lines)


def format_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the columns `FIELDS`; kept tokens as ``0:576 8:288``."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in found:
        kept = " ".join(f"{layer}:{tokens:.6g}" for layer, tokens in row["kept_tokens"])
        writer.writerow({**row, "kept_tokens": kept})
    return buffer.getvalue()


# ----------------------------------------------------------------------------- page
def page(collected: Collected) -> str:
    """The whole page as text."""
    groups = grouped(collected.runs)
    parts = [
        introduction(groups),
        legend([{"plan": run.plan} for run in collected.runs]),
        *[group_section(group) for group in groups],
        average_section(averages(groups)),
        sharing_section(groups),
        left_out_section(collected),
        provenance_section(groups),
    ]
    return document("Visual tokens dropped: results", parts, STYLE)


def introduction(groups: Sequence[Sequence[Run]]) -> str:
    """Title and what is on the page."""
    count = sum(len(group) for group in groups)
    sets = len({group[0].benchmark for group in groups})
    amount = f"{count} run{'s' * (count > 1)} on {sets} set{'s' * (sets > 1)}"
    return (
        "<header><h1>Accuracy, operations and time of every run</h1>"
        f'<p class="lead">{amount}. FLOPs and '
        "milliseconds are those of one question in the mean: tower, prefill with what questions "
        "about one picture share, and decoding. Milliseconds are of one process. Bars are 95 % "
        "intervals; rings are runs of whole prompts, without sharing. The vertical axes do not "
        "start at 0.</p></header>"
    )


def group_section(group: Sequence[Run]) -> str:
    """Charts and table of runs over the same questions."""
    drawn = chart_pair(group)
    return section(title(group), group[0].hardware, drawn + group_table(group) + papers(group))


def papers(group: Sequence[Run]) -> str:
    """What the papers print of the same set and checkpoint, a line a source."""
    name, body = column(group[0]), []
    for source, lines in paper_lines(group).items():
        items = "".join(
            f"<span>{dot(line.method)}{escape(line.words)} <b>{line.scores[name]:.1f}</b></span>"
            for line in lines
        )
        body.append(
            f'<tr><td class="source">{escape(source)}</td><td class="papers">{items}</td></tr>'
        )
    if not body:
        return ""
    return table(("in the papers", f"{name} with the methods above"), body)


def chart_pair(group: Sequence[Run]) -> str:
    """Score against FLOPs and against time; nothing for a set without scores."""
    scored = [
        (run, variant)
        for run, variant in zip(group, variants(group), strict=True)
        if run.scores is not None
    ]
    if not scored:
        return ""
    metric = scored[0][0].scores["metric"]
    known = [(run, variant) for run, variant in scored if run.tera_flops]
    factor, unit = flops_unit([run.tera_flops for run, _ in known])
    found = []
    if known:
        series = points(known, [factor * run.tera_flops for run, _ in known])
        chart = charts.scatter_chart(series, x_title=f"{unit} a question", y_title=metric)
        found.append(chart)
    series = points(scored, [run.milliseconds for run, _ in scored])
    found.append(charts.scatter_chart(series, x_title="ms a question, measured", y_title=metric))
    return two(found)


def flops_unit(values: Sequence[float]) -> tuple[float, str]:
    """A factor and a unit for an axis of TFLOPs."""
    largest = max(values, default=1.0)
    if largest >= 1:
        return 1.0, "TFLOPs"
    return (1e3, "GFLOPs") if largest >= 1e-3 else (1e6, "MFLOPs")


def points(
    scored: Sequence[tuple[Run, str]], across: Sequence[float]
) -> dict[str, list[charts.Point]]:
    """Points of a chart by method."""
    series: dict[str, list[charts.Point]] = {}
    for (run, variant), x in zip(scored, across, strict=True):
        scores = run.scores
        low, high = scores["low"], scores["high"]
        value = scores["value"]
        label = f"{plan_words(run, variant)}: {value:.2f}"
        bounds = (value if low is None else low, value if high is None else high)
        point = charts.Point(x, value, *bounds, label, hollow=not run.shared)
        name = "blind" if run.run["blind"] else method_of(run.plan)
        series.setdefault(name, []).append(point)
    return series


def plan_cell(plan: str, variant: str = "") -> str:
    """Dot, method, and in small print its numbers and what else is different."""
    name = method_of(plan)
    rest = plan if plan.startswith("{") else plan.partition(":")[2] if ":" in plan else ""
    if "+" in name:
        rest = plan
    small = "".join(f"<small>{escape(words)}</small>" for words in (rest, variant) if words)
    return f'<td class="plan">{dot(plan)}{escape(name)}{small}</td>'


def group_table(group: Sequence[Run]) -> str:
    """One line a run, and what is published."""
    body = []
    for run, variant in zip(group, variants(group), strict=True):
        css = ' class="none"' if run.plan == "none" and not variant else ""
        figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells(run))
        body.append(f"<tr{css}>{plan_cell(run.plan, variant)}{figures}</tr>")
    for name, value in published_rows(group):
        blank = "<td>–</td>" * (len(HEAD) - 2)
        body.append(
            f'<tr class="published"><td class="plan">{escape(name)}</td><td>{value:.2f}</td>'
            f"{blank}</tr>"
        )
    return table(HEAD, body)


def average_section(found: Sequence[Average]) -> str:
    """The papers' average: charts, and every set in a column."""
    if not found:
        return ""
    content = ""
    for group in by_columns(found):
        body = []
        for each in group:
            figures = "".join(f"<td>{cell}</td>" for cell in average_cells(each))
            body.append(f"<tr>{plan_cell(each.plan, each.variant)}{figures}</tr>")
        for name, *figures in published_averages(group):
            line = "".join(f"<td>{cell}</td>" for cell in figures)
            body.append(f'<tr class="published"><td class="plan">{escape(name)}</td>{line}</tr>')
        words = escape(average_sentence(group))
        content += f'<p class="note">{words}</p>' + average_charts(group)
        content += table(average_head(group), body)
    return section("Average over the sets", "Only plans that were run on all of them.", content)


def average_charts(group: Sequence[Average]) -> str:
    """The average against FLOPs and against time of a question, both means over the sets."""
    axes = [("ms a question, measured", [each.milliseconds for each in group])]
    costs = [each.tera_flops for each in group]
    if None not in costs:
        factor, unit = flops_unit(costs)
        axes.insert(0, (f"{unit} a question", [factor * cost for cost in costs]))
    drawn = []
    for title_, across in axes:
        series: dict[str, list[charts.Point]] = {}
        for each, x in zip(group, across, strict=True):
            label = f"{_named(each)}: {each.value:.2f}"
            hollow = not all(run.shared for run in each.runs)
            point = charts.Point(x, each.value, each.value, each.value, label, hollow=hollow)
            series.setdefault(method_of(each.plan), []).append(point)
        drawn.append(charts.scatter_chart(series, x_title=title_, y_title="average"))
    return two(drawn)


def sharing_section(groups: Sequence[Sequence[Run]]) -> str:
    """Questions/s with and without sharing, and who loses by it."""
    content = ""
    for group in groups:
        body = []
        for pair in sharing(group):
            shared, whole = (run and run.rate for run in (pair.shared, pair.whole))
            gain = f"{shared / whole:.2f}×" if shared and whole else "–"
            rates = ["–" if rate is None else f"{rate:.3g}" for rate in (shared, whole)]
            costs = [
                flops_text(run.tera_flops if run else None) for run in (pair.shared, pair.whole)
            ]
            line = "".join(f"<td>{cell}</td>" for cell in (*rates, gain, *costs))
            body.append(f"<tr>{plan_cell(pair.plan, pair.variant)}{line}</tr>")
        head = ("plan", "shared, q/s", "whole, q/s", "gain", "shared, FLOPs", "whole, FLOPs")
        said = "".join(f"<li>{escape(words)}</li>" for words in sharing_sentences(group))
        name = f"<h3>{escape(group[0].benchmark)} <small>{escape(group[0].checkpoint)}</small></h3>"
        content += name + table(head, body) + (f"<ul>{said}</ul>" if said else "")
    return section(
        "What sharing brings",
        "Questions about one picture share the tower and the prefill of what their prompts have in "
        "common, up to the first cut that reads the question. A dash: no such run (--no-share "
        "makes one).",
        content,
    )


def left_out_section(collected: Collected) -> str:
    """Folders that are not on the page, and why."""
    words = [f"{path}: not finished" for path in collected.unfinished] + collected.damaged
    items = "".join(f"<li>{escape(each)}</li>" for each in words)
    return section("Left out", "", f"<ul>{items}</ul>") if words else ""


def provenance_section(groups: Sequence[Sequence[Run]]) -> str:
    """Where each figure comes from."""
    body, there = [], {}
    for group in groups:
        for run in group:
            there = run.run.get("environment", {})
            line = (
                run.run["run_id"], there.get("commit"), there.get("torch"),
                there.get("transformers"), run.run.get("dtype"), run.run.get("attention"),
                run.run.get("batch_size"), run.hardware, run.run["questions_sha256"][:12],
            )  # fmt: skip
            figures = "".join(f"<td>{escape(str(cell or '–'))}</td>" for cell in line)
            body.append(f"<tr><td>{escape(run.benchmark)}</td>{figures}</tr>")
    head = ("set", "run", "commit", "torch", "transformers", "type", "attention", "batch",
            "hardware", "questions")  # fmt: skip
    facts = facts_list({"python": there.get("python"), "platform": there.get("platform")})
    return section(
        "Where the figures come from",
        "run: hash of all settings; questions: hash of the question file; commit: + where files "
        "differed from it.",
        table(head, body) + facts,
    )


# ----------------------------------------------------------------------------- command
def parser() -> argparse.ArgumentParser:
    """The command line of `llava report`."""
    flags = argparse.ArgumentParser(prog="llava report", description="Compare runs on one page.")
    flags.add_argument("results", nargs="*", default=["results"], metavar="RESULTS",
                       help="folders of runs, or above them (default: results)")  # fmt: skip
    flags.add_argument("--out", metavar="PAGE", default="results/report.html",
                       help="the page (default: %(default)s)")  # fmt: skip
    flags.add_argument("--markdown", metavar="FILE", help="the tables in Markdown")
    flags.add_argument("--csv", metavar="FILE", help="one row a run")
    flags.add_argument("--json", metavar="FILE", help="one object a run")
    flags.add_argument(
        "--skip-damaged", action="store_true", help="leave out damaged folders, naming them"
    )
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Collect runs, print the tables and write the files."""
    args = parser().parse_args(argv)
    collected = collect(args.results)
    if collected.damaged and not args.skip_damaged:
        listed = "; ".join(collected.damaged)
        raise ValueError(f"damaged runs (--skip-damaged leaves them out): {listed}")
    if not collected.runs:
        raise ValueError("none of the runs is finished: " + ", ".join(collected.unfinished))
    groups = grouped(collected.runs)
    sys.stdout.write(format_text(groups) + "\n")
    for path in collected.unfinished:
        sys.stderr.write(f"not finished, left out: {path}\n")
    found = rows(groups)
    texts = {args.out: page(collected), args.markdown: format_markdown(groups),
             args.csv: format_csv(found)}  # fmt: skip
    for path, content in texts.items():
        if path:
            with atomic_write(path) as file:
                file.write(content)
    if args.json:
        json_dump(args.json, {"runs": found, "unfinished": collected.unfinished})
    sys.stderr.write(f"{args.out} written\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
