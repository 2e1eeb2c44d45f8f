"""The benchmarks: one table of files, scorers and kinds of answers.

Special here: a benchmark is data and one pure scorer; nothing else in the package knows a set by
name. Files are looked for below a data root laid out as LLaVA's docs say
(`playground/data/eval/<folder>/...`) and are never downloaded. `digits` stands for all five sets of
handwritten digits, which `llava digits` builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.layouts import READERS, WORD, read_question_file
from llava.eval.questions import Question, spread
from llava.eval.scorers import Scores, join_answers, score

DATA_ROOT = Path("playground/data/eval")


@dataclass(frozen=True)
class Benchmark:
    """One row of the table; paths are relative to `folder`, which is relative to the data root.

    labels: files with the right answers, read by `reader`; none where only a server knows them.
    dialect: the reading of answers that is the default here, one of the scorer's. suffix: the last
    sentences of a prompt; question files in JSON lines hold it already. upload: what `llava export`
    writes for the server. published: the column of the papers' tables. count: questions of the
    full set. hint: how to get the files.
    """

    name: str
    folder: str
    questions: str
    images: str
    scorer: str
    labels: tuple[str, ...] = ()
    reader: str = ""
    dialect: str = "llava"
    answer_type: str = "word or phrase"
    max_new_tokens: int = 128
    suffix: str = WORD
    upload: str | None = None
    published: str | None = None
    count: int | None = None
    hint: str = "see docs/Evaluation.md"


def _digits(kind: str, questions: str, images: str, answer_type: str) -> Benchmark:
    return Benchmark(
        name=f"digits_{kind}",
        folder=f"digits/{kind}",
        questions=questions,
        images=images,
        labels=("labels.jsonl",),
        reader="in_order",
        scorer="exact",
        answer_type=answer_type,
        max_new_tokens=16,
        suffix="",
        hint="build it with `llava digits --out playground/data`",
    )


_ROWS = (
    _digits("vqav2", "llava_vqav2_mscoco_val2014.jsonl", "val2014", "word or number"),
    _digits("gqa", "llava_gqa_testdev_balanced.jsonl", "data/images", "word or number"),
    _digits("textvqa", "llava_textvqa_val_v051.jsonl", "train_images", "number read aloud"),
    _digits("pope", "llava_pope_test.jsonl", "val2014", "yes or no"),
    _digits("mme", "llava_mme.jsonl", "MME_Benchmark_release_version", "yes or no"),
    Benchmark(
        "vqav2", "vqav2", "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015", "vqav2",
        upload="vqav2", published="VQAv2", count=107_394,
    ),
    Benchmark(
        "vqav2_val", "vqav2", "llava_vqav2_mscoco_val2014.jsonl", "val2014", "vqav2",
        labels=("v2_mscoco_val2014_annotations.json",), reader="vqa_annotations", count=214_354,
    ),
    Benchmark(
        "gqa", "gqa", "llava_gqa_testdev_balanced.jsonl", "data/images", "gqa",
        labels=("data/testdev_balanced_questions.json",), reader="gqa",
        upload="gqa", published="GQA", count=12_578,
    ),
    Benchmark(
        "textvqa_ocr", "textvqa", "llava_textvqa_val_v051_ocr.jsonl", "train_images", "ten_answers",
        labels=("TextVQA_0.5.1_val.json",), reader="textvqa",
        published="TextVQA", count=5_000,
    ),
    Benchmark(
        "textvqa", "textvqa", "llava_textvqa_val_v051.jsonl", "train_images", "ten_answers",
        labels=("TextVQA_0.5.1_val.json",), reader="textvqa", count=5_000,
    ),
    Benchmark(
        "pope", "pope", "llava_pope_test.jsonl", "val2014", "pope",
        labels=tuple(f"coco/coco_pope_{c}.json" for c in ("adversarial", "popular", "random")),
        reader="pope", answer_type="yes or no", published="POPE",
    ),
    Benchmark(
        "mme", "MME", "llava_mme.jsonl", "MME_Benchmark_release_version", "mme",
        labels=("MME_Benchmark_release_version",), reader="mme",
        answer_type="yes or no", published="MME", count=2_374,
    ),
)  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in _ROWS}
GROUPS: dict[str, tuple[str, ...]] = {
    "digits": tuple(name for name in BENCHMARKS if name.startswith("digits_")),
}


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its questions, the folder of their pictures and the label of each question's
    uid (None for a set whose labels only a server has)."""

    benchmark: Benchmark
    questions: list[Question]
    image_folder: Path
    labels: dict[str, Any] | None
    question_file: Path

    def score(
        self,
        answers: Sequence[Mapping[str, Any]],
        dialect: str | None = None,
        allow_missing: bool = False,
    ) -> Scores:
        """Scores of answer records over all questions that are held here.

        Raises ValueError for a set without labels, answers to other questions, an unknown dialect,
        or missing answers unless they are allowed (and then wrong).
        """
        name = self.benchmark.name
        if self.labels is None:
            raise ValueError(
                f"{name}: the right answers are with its server; write the file to upload with "
                f"`llava export`, or score a set that has labels"
            )
        given = join_answers(self.questions, answers)
        dialect = dialect or self.benchmark.dialect
        scorer = self.benchmark.scorer
        return score(scorer, self.questions, self.labels, given, dialect, allow_missing)


def resolve_names(names: Sequence[str]) -> list[str]:
    """Benchmark names with groups expanded, each once. Raises ValueError for an unknown one."""
    known = [*BENCHMARKS, *GROUPS]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown benchmark {name!r}; accepted: {', '.join(known)}")
    return list(dict.fromkeys(n for name in names for n in GROUPS.get(name, (name,))))


def get_benchmark(name: str) -> Benchmark:
    """The row of a name. Raises ValueError for an unknown one."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; accepted: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def benchmark_folder(benchmark: Benchmark, data_root: str | Path) -> Path:
    """The folder of a set below the root; a folder that differs in capitals only is taken too."""
    folder = Path(data_root) / benchmark.folder
    if not folder.is_dir() and folder.parent.is_dir():
        for other in sorted(folder.parent.iterdir()):
            if other.name.lower() == folder.name.lower() and other.is_dir():
                return other
    return folder


def load_benchmark(
    name: str, data_root: str | Path = DATA_ROOT, limit: int | None = None
) -> LoadedBenchmark:
    """Questions and labels of a benchmark, about `limit` of them (whole pictures, evenly spaced).

    Raises ValueError for an unknown name, a limit below 1, or a faulty or ill-matched file, and
    FileNotFoundError, saying how to get it, for a file that is not there.
    """
    benchmark = get_benchmark(name)
    folder = benchmark_folder(benchmark, data_root)
    question_file = folder / benchmark.questions
    label_files = [folder / label for label in benchmark.labels]
    for path in (question_file, *label_files):
        if not path.exists():
            raise FileNotFoundError(f"{name}: file not found: {path}; {benchmark.hint}")
    questions = read_question_file(question_file, name, benchmark.suffix)
    labels = READERS[benchmark.reader](label_files, questions) if benchmark.reader else None
    return LoadedBenchmark(
        benchmark, spread(questions, limit), folder / benchmark.images, labels, question_file
    )
