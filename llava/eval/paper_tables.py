"""Figures that the papers print for their methods, to hold own runs against.

Special here: the papers' average is the mean of the columns with MME divided by 20 (its perception
part has at most 2,000 points), and the printed averages of PyramidDrop's tables follow from their
own columns by that rule (`tests/unit/test_results_report.py`). Columns have the names of
`Benchmark.published`; "MME P+C", perception and cognition together, is no column of ours.

Sources: PyramidDrop, arXiv 2410.17247v2 (CVPR 2025), read in a text form of the paper; FastV, the
README of its repository; YOPO, arXiv 2410.06169, table 2. docs/Results.md shows them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

V15_7B = "liuhaotian/llava-v1.5-7b"
V15_13B = "liuhaotian/llava-v1.5-13b"
NEXT_7B = "liuhaotian/llava-v1.6-vicuna-7b"
MME_SCALE = 20
"""The papers divide MME by it before they average."""
_MME = ("MME", "MME P+C")


@dataclass(frozen=True)
class PaperRow:
    """One line of a table. model: the published checkpoint of that shape (NEXT_7B: the paper's own
    reproduction of it). method: its name here, "none", or "" for one that is not here. words: what
    the table says of it. trained: the model was trained with the method."""

    model: str
    method: str
    words: str
    values: tuple[float, ...]
    average: float | None = None
    trained: bool = False


@dataclass(frozen=True)
class PaperTable:
    """source: paper and number of the table. columns: of each row's `values`."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    def scores(self, row: PaperRow) -> dict[str, float]:
        """column -> value of one of the rows."""
        return dict(zip(self.columns, row.values, strict=True))


def papers_average(scores: Mapping[str, float]) -> float:
    """Mean of the columns, MME divided by 20. ValueError for none."""
    if not scores:
        raise ValueError("papers_average: there are no columns")
    scaled = [value / MME_SCALE if name in _MME else value for name, value in scores.items()]
    return sum(scaled) / len(scaled)


def _row(model: str, method: str, words: str, figures: str, trained: bool = False) -> PaperRow:
    """figures: the line's values, and its average behind a bar where it has one."""
    values, _, average = figures.partition("|")
    numbers = tuple(map(float, values.split()))
    return PaperRow(model, method, words, numbers, float(average) if average else None, trained)


def _table(source: str, columns: str, *rows: PaperRow) -> PaperTable:
    table = PaperTable(source, tuple(columns.split(", ")), rows)
    for row in rows:
        table.scores(row)  # as many values as columns
    return table


PAPER_TABLES: tuple[PaperTable, ...] = (
    _table(
        "PyramidDrop, table 1", "MME, SQA, MMB-CN, GQA, POPE, TextVQA, SEED-IMG",
        _row(NEXT_7B, "none", "", "1534.1 70.4 60.5 64.2 86.1 67.2 71.1 | 70.9"),
        _row(NEXT_7B, "fastv", "10.6 T", "1504.0 69.3 60.0 63.5 86.3 66.5 69.3 | 70.1"),
        _row(NEXT_7B, "pyramiddrop", "9.5 T", "1533.0 69.4 59.9 63.9 86.4 67.0 70.0 | 70.5"),
        _row(V15_7B, "none", "", "1510.7 66.8 58.3 62.0 85.9 58.2 66.1 | 67.5"),
        _row(V15_7B, "fastv", "2.01 T", "1473.7 68.5 57.3 59.4 84.0 57.2 64.0 | 66.4"),
        _row(V15_7B, "pyramiddrop", "1.78 T", "1500.8 69.2 58.5 60.1 84.8 57.6 64.3 | 67.1"),
    ),
    _table(
        "PyramidDrop, table 2", "MME P+C, MMB, SQA, GQA, TextVQA",
        _row(V15_7B, "none", "576 tokens", "1862 64.7 69.5 61.9 58.2 | 69.4"),
        _row(V15_7B, "", "ToMe, 192 tokens", "1563 60.5 65.2 54.3 52.1 | 62.0"),
        _row(V15_7B, "fastv", "192 tokens", "1612 61.2 67.3 52.7 52.5 | 62.9"),
        _row(V15_7B, "", "SparseVLM, 192 tokens", "1721 62.5 69.1 57.6 56.1 | 66.3"),
        _row(V15_7B, "pyramiddrop", "192 tokens", "1797 63.3 69.2 57.3 56.5 | 67.2"),
        _row(V15_7B, "", "ToMe, 128 tokens", "1343 53.3 59.6 52.4 49.1 | 56.3"),
        _row(V15_7B, "fastv", "128 tokens", "1490 56.1 60.2 49.6 50.6 | 58.2"),
        _row(V15_7B, "", "SparseVLM, 128 tokens", "1696 60.0 67.1 56.0 54.9 | 64.6"),
        _row(V15_7B, "pyramiddrop", "128 tokens", "1761 61.6 68.4 57.1 56.6 | 66.4"),
        _row(V15_7B, "", "ToMe, 64 tokens", "1138 43.7 50.0 48.6 45.3 | 48.9"),
        _row(V15_7B, "fastv", "64 tokens", "1256 48.0 51.1 46.1 47.8 | 51.2"),
        _row(V15_7B, "", "SparseVLM, 64 tokens", "1505 56.2 62.2 52.7 51.8 | 59.6"),
        _row(V15_7B, "pyramiddrop", "64 tokens", "1561 58.8 69.0 47.5 50.6 | 60.8"),
    ),
    _table(
        "PyramidDrop, table 3", "MME, MMB, MMB-CN, SEED-IMG, MMStar, POPE, SQA, AI2D",
        _row(NEXT_7B, "none", "5 tiles", "1534.1 68.7 60.5 71.1 41.1 86.1 70.4 66.1 | 67.6"),
        _row(NEXT_7B, "pyramiddrop", "5 tiles",
             "1540.8 67.8 60.6 69.9 41.7 86.5 70.1 66.7 | 67.5", trained=True),
        _row(NEXT_7B, "none", "9 tiles", "1544.7 67.4 60.0 69.5 40.0 86.3 68.8 65.0 | 66.8"),
        _row(NEXT_7B, "pyramiddrop", "9 tiles",
             "1542.0 68.1 61.0 70.3 40.9 86.6 69.4 66.1 | 67.4", trained=True),
        _row(V15_7B, "none", "", "1510.7 64.3 58.3 66.1 33.2 85.9 66.8 55.6 | 63.2"),
        _row(V15_7B, "pyramiddrop", "",
             "1467.3 66.1 58.5 65.5 34.0 86.0 71.0 56.5 | 63.9", trained=True),
    ),
    _table(
        "PyramidDrop, table 4",
        "DocVQA, InfoVQA, TextVQA, ChartQA, OCR-VQA, VQAv2, VizWiz, GQA",
        _row(NEXT_7B, "none", "5 tiles", "70.0 33.3 67.2 64.0 63.7 81.7 59.6 64.2 | 63.0"),
        _row(NEXT_7B, "pyramiddrop", "5 tiles",
             "69.0 31.7 67.7 63.1 63.1 81.5 61.0 63.9 | 62.6", trained=True),
        _row(NEXT_7B, "none", "9 tiles", "74.3 36.2 67.6 63.0 63.8 81.6 58.0 63.5 | 63.5"),
        _row(NEXT_7B, "pyramiddrop", "9 tiles",
             "75.0 37.4 68.4 64.3 63.5 81.7 60.6 64.1 | 64.4", trained=True),
    ),
    _table(
        "PyramidDrop, table 5",
        "POPE, SQA, MMB, GQA, OCR-VQA, SEED-IMG, MMStar, AI2D, TextVQA",
        _row(V15_7B, "none", "576 tokens", "85.9 66.8 64.3 62.0 59.8 66.1 33.2 55.6 58.2"),
        _row(V15_7B, "", "Q-Former, 288 tokens",
             "67.2 66.9 53.8 41.3 19.0 49.2 28.6 51.8 44.4", trained=True),
        _row(V15_7B, "fastv", "306 tokens",
             "85.2 69.5 65.6 61.0 60.7 65.3 33.4 55.3 58.4", trained=True),
        _row(V15_7B, "", "LLaVolta, 339 tokens",
             "85.6 69.6 63.6 62.2 60.0 66.3 33.2 55.7 58.3", trained=True),
        _row(V15_7B, "pyramiddrop", "270 tokens",
             "86.0 71.0 66.1 61.9 61.0 65.5 34.0 56.5 58.5", trained=True),
    ),
    _table(
        "PyramidDrop, table 7", "MME, MMB, GQA, MMB-CN, SEED-IMG, DocVQA, InfoVQA",
        _row(NEXT_7B, "none", "", "1534.1 68.7 64.2 60.5 71.1 70.0 33.3 | 63.5"),
        _row(NEXT_7B, "pyramiddrop", "λ = 0.4",
             "1558.4 68.1 63.7 60.5 69.5 66.6 31.8 | 62.6", trained=True),
        _row(NEXT_7B, "pyramiddrop", "λ = 0.5",
             "1540.8 67.8 63.9 60.6 69.9 69.0 31.7 | 62.8", trained=True),
        _row(NEXT_7B, "pyramiddrop", "λ = 0.6",
             "1511.4 68.1 64.1 60.5 70.4 69.8 33.0 | 63.1", trained=True),
        _row(V15_7B, "none", "", "1510.7 64.3 62.0 58.3 66.1 21.4 20.4 | 52.6"),
        _row(V15_7B, "pyramiddrop", "λ = 0.4",
             "1478.8 66.2 61.7 58.0 64.5 21.1 19.9 | 52.2", trained=True),
        _row(V15_7B, "pyramiddrop", "λ = 0.5",
             "1467.3 66.1 61.9 58.5 65.5 21.5 20.2 | 52.4", trained=True),
        _row(V15_7B, "pyramiddrop", "λ = 0.6",
             "1471.8 65.9 62.0 58.9 65.1 22.5 21.0 | 52.7", trained=True),
    ),
    _table(
        "FastV, README", "GQA, SEED-IMG, MMMU, MME",
        _row(V15_7B, "none", "", "62.0 60.5 35.3 1510.8"),
        _row(V15_7B, "fastv", "K = 3, R = 50 %", "60.4 59.9 35.2 1511.7"),
    ),
    _table(
        "YOPO, table 2", "GQA, VQAv2, SQA, TextVQA, POPE, MME, MMB",
        _row(V15_7B, "none", "", "62.3 79.2 69.4 58.1 87.3 1492.8 65.4"),
        _row(V15_7B, "pyramiddrop", "1.91 T", "57.3 75.1 69.3 55.9 83.4 1300.8 59.4"),
        _row(V15_7B, "fastv", "1.91 T", "56.5 73.5 69.1 57.5 77.8 1380.2 62.9"),
        _row(V15_7B, "yopo", "1.91 T", "61.6 78.0 69.0 56.3 86.8 1483.6 65.5", trained=True),
        _row(V15_7B, "yopo", "0.92 T", "60.7 77.4 68.0 55.2 86.6 1429.6 64.1", trained=True),
        _row(V15_13B, "none", "", "63.0 79.7 72.4 59.8 86.4 1558.0 68.7"),
        _row(V15_13B, "pyramiddrop", "3.72 T", "58.4 76.7 72.3 58.1 83.3 1506.6 65.8"),
        _row(V15_13B, "fastv", "3.72 T", "59.4 77.1 71.2 58.5 82.0 1506.8 67.1"),
        _row(V15_13B, "yopo", "3.72 T", "62.5 78.9 71.3 58.3 86.3 1457.3 67.4", trained=True),
        _row(V15_13B, "yopo", "1.79 T", "61.2 78.1 70.7 56.7 86.4 1426.2 65.5", trained=True),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Printed:
    """A line of a paper for a page. words: method and what the table says of it; scores: by
    column."""

    source: str
    method: str
    words: str
    scores: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.words}, {self.source}" if self.words else self.source


def printed(model: str, methods: Sequence[str]) -> list[Printed]:
    """What the papers print for a published checkpoint and these methods ("none" among them)."""
    found = []
    for table in PAPER_TABLES:
        for row in table.rows:
            if row.model == model and row.method in methods:
                what = "no dropping" if row.method == "none" else row.method
                words = filter(None, [what, row.words, "trained with it" if row.trained else ""])
                line = Printed(table.source, row.method, ", ".join(words), table.scores(row))
                found.append(line)
    return found
