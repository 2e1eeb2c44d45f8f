"""The benchmarks: one table of files, scorers and kinds of answers.

Special here: a benchmark is data and one pure scoring function; nothing else in the package knows a
set by name. Files are looked for below a data root laid out as LLaVA's docs say
(`playground/data/eval/<folder>/...`) and are never downloaded. `digits` stands for all five sets of
handwritten digits, which `llava digits` builds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.questions import Question, read_json_lines, read_questions, spread
from llava.eval.scorers import SCORERS, Scores

DATA_ROOT = Path("playground/data/eval")


@dataclass(frozen=True)
class Benchmark:
    """Where a set's files are (relative to `folder`), how it is scored and what its answers are.

    labels: JSON lines in the order of the question file, with `question_id`, `answer` and,
    to be sure where ids repeat, `text`.
    """

    name: str
    folder: str
    questions: str
    images: str
    labels: str
    scorer: str
    answer_type: str
    max_new_tokens: int
    hint: str


def _digits(kind: str, questions: str, images: str, answer_type: str) -> Benchmark:
    return Benchmark(
        name=f"digits_{kind}",
        folder=f"digits/{kind}",
        questions=questions,
        images=images,
        labels="labels.jsonl",
        scorer="exact",
        answer_type=answer_type,
        max_new_tokens=16,
        hint="build it with `llava digits --out playground/data`",
    )


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _digits("vqav2", "llava_vqav2_mscoco_val2014.jsonl", "val2014", "word or number"),
        _digits("gqa", "llava_gqa_testdev_balanced.jsonl", "data/images", "word or number"),
        _digits("textvqa", "llava_textvqa_val_v051.jsonl", "train_images", "number read aloud"),
        _digits("pope", "llava_pope_test.jsonl", "val2014", "yes or no"),
        _digits("mme", "llava_mme.jsonl", "MME_Benchmark_release_version", "yes or no"),
    )
}
GROUPS: dict[str, tuple[str, ...]] = {"digits": tuple(BENCHMARKS)}


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its questions, the folder of their pictures and the right answer of each
    question's uid."""

    benchmark: Benchmark
    questions: list[Question]
    image_folder: Path
    labels: dict[str, str]
    question_file: Path

    def score(self, answers: Sequence[Mapping[str, Any]]) -> Scores:
        """Scores of answer records over all questions that are held here."""
        scorer: Callable[..., Scores] = SCORERS[self.benchmark.scorer]
        return scorer(self.questions, self.labels, answers)


def resolve_names(names: Sequence[str]) -> list[str]:
    """Benchmark names with groups expanded, each once. Raises ValueError for an unknown one."""
    known = [*BENCHMARKS, *GROUPS]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown benchmark {name!r}; accepted: {', '.join(known)}")
    return list(dict.fromkeys(n for name in names for n in GROUPS.get(name, (name,))))


def load_benchmark(
    name: str, data_root: str | Path = DATA_ROOT, limit: int | None = None
) -> LoadedBenchmark:
    """Questions and labels of a benchmark, about `limit` of them (whole pictures, evenly spaced).

    Raises ValueError for an unknown name, a limit below 1, or a faulty or ill-matched file, and
    FileNotFoundError, saying how to get it, for a file that is not there.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; accepted: {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    folder = Path(data_root) / benchmark.folder
    question_file = folder / benchmark.questions
    for path in (question_file, folder / benchmark.labels):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: file not found: {path}; {benchmark.hint}")
    questions = read_questions(question_file, name)
    labels = _read_labels(folder / benchmark.labels, questions)
    return LoadedBenchmark(
        benchmark, spread(questions, limit), folder / benchmark.images, labels, question_file
    )


def _read_labels(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    lines = read_json_lines(path)
    if len(lines) != len(questions):
        raise ValueError(f"{path} has {len(lines)} labels for {len(questions)} questions")
    labels = {}
    for (number, record), question in zip(lines, questions, strict=True):
        # Several questions may share an id, so the text is compared where the label has it.
        found = record.get("question_id"), record.get("text", question.text)
        if found != (question.question_id, question.text):
            raise ValueError(
                f"{path}:{number}: label of {found} where question {question.question_id!r} asks "
                f"{question.text!r}; labels stand in the order of the questions"
            )
        if not isinstance(record.get("answer"), str):
            raise ValueError(f"{path}:{number}: no text under 'answer': {record}")
        labels[question.uid] = record["answer"]
    return labels
