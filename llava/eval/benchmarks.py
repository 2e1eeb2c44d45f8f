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

from llava.eval.layouts import (
    LETTER,
    LETTER_CN,
    READERS,
    SINGLE_WORD,
    VIZWIZ,
    WORD,
    read_question_file,
)
from llava.eval.questions import Question, spread
from llava.eval.scorers import Scores, join_answers, score

DATA_ROOT = Path("playground/data/eval")


@dataclass(frozen=True)
class Benchmark:
    """One row of the table; paths are relative to `folder`, which is relative to the data root.

    labels: files with the right answers, read by `reader`; none where only a server knows them.
    judged: what a judge model gives an answer, "pairs" of numbers or "shares"; its labels are what
    the judge is shown and are read by `llava judge` alone.
    dialect: the reading of answers that is the default here, one of the scorer's. suffix: the last
    sentences of a prompt; question files in JSON lines hold it already. upload: what `llava export`
    writes for the server. published: the column of the papers' tables. count: questions of the
    full set. hint: how to get the files. elsewhere: other folders where the files may lie.
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
    judged: str = ""
    upload: str | None = None
    published: str | None = None
    count: int | None = None
    hint: str = "see docs/Evaluation.md"
    elsewhere: tuple[str, ...] = ()


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
    Benchmark(
        "scienceqa", "scienceqa", "llava_test_CQM-A.json", "images/test", "scienceqa",
        labels=("problems.json",), reader="scienceqa", answer_type="letter",
        max_new_tokens=1024, suffix=LETTER, published="SQA", count=4_241,
    ),
    Benchmark(
        "mmbench", "mmbench", "mmbench_dev_20230712.tsv", "", "mmbench",
        labels=("mmbench_dev_20230712.tsv",), reader="mmbench", answer_type="letter",
        max_new_tokens=1024, suffix=LETTER, upload="mmbench", published="MMB",
    ),
    Benchmark(
        "mmbench_cn", "mmbench_cn", "mmbench_dev_cn_20231003.tsv", "", "mmbench",
        labels=("mmbench_dev_cn_20231003.tsv",), reader="mmbench", answer_type="letter",
        max_new_tokens=1024, suffix=LETTER_CN, upload="mmbench_cn", published="MMB-CN",
        elsewhere=("mmbench",),
    ),
    Benchmark(
        "seed_bench", "seed_bench", "llava-seed-bench.jsonl", "", "seed",
        labels=("SEED-Bench.json",), reader="seed", answer_type="letter",
        suffix=LETTER, upload="seed", published="SEED", count=19_242,
    ),
    Benchmark(
        "vizwiz", "vizwiz", "llava_test.jsonl", "test", "ten_answers",
        suffix=VIZWIZ, upload="vizwiz", published="VizWiz", count=8_000,
    ),
    Benchmark(
        "vizwiz_val", "vizwiz", "llava_val.jsonl", "val", "ten_answers",
        labels=("val.json",), reader="vizwiz", suffix=VIZWIZ, count=4_319,
    ),
    Benchmark(
        "mmvet", "mm-vet", "llava-mm-vet.jsonl", "images", "shares",
        labels=("mm-vet.json",), reader="mmvet", judged="shares", answer_type="text",
        max_new_tokens=1024, suffix="", upload="mm-vet", published="MM-Vet", count=218,
    ),
    Benchmark(
        "llava_bench", "llava-bench-in-the-wild", "questions.jsonl", "images", "pairs",
        labels=("context.jsonl", "answers_gpt4.jsonl"), reader="llava_bench", judged="pairs",
        answer_type="text", max_new_tokens=1024, suffix="", published="LLaVA-W", count=60,
    ),
    Benchmark(
        "llava_qa90", "llava-qa90", "qa90_questions.jsonl", "images", "pairs",
        labels=("caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl"),
        reader="llava_qa90", judged="pairs", answer_type="text", max_new_tokens=1024, suffix="",
        count=90,
    ),
    Benchmark(
        "mmstar", "mmstar", "llava_mmstar_val.jsonl", "", "mmstar", reader="inline",
        dialect="lmms", answer_type="letter", suffix=LETTER.rstrip("."), count=1_500,
    ),
    Benchmark(
        "mmmu", "mmmu", "llava_mmmu_val.jsonl", "", "mmmu", reader="inline", dialect="lmms",
        answer_type="letter, word or number", suffix=LETTER, published="MMMU", count=900,
    ),
    Benchmark(
        "docvqa", "docvqa", "llava_docvqa_val.jsonl", "", "anls",
        labels=("val_v1.0.json",), reader="docvqa", dialect="vlmevalkit", max_new_tokens=32,
        published="DocVQA", count=5_349,
    ),
    Benchmark(
        "docvqa_test", "docvqa", "llava_docvqa_test.jsonl", "", "anls", dialect="vlmevalkit",
        max_new_tokens=32, upload="docvqa", count=5_188,
    ),
    Benchmark(
        "infovqa", "infovqa", "llava_infovqa_val.jsonl", "", "anls",
        labels=("val_v1.0.json",), reader="docvqa", dialect="vlmevalkit", max_new_tokens=32,
        published="InfoVQA", count=2_801,
    ),
    Benchmark(
        "infovqa_test", "infovqa", "llava_infovqa_test.jsonl", "", "anls", dialect="vlmevalkit",
        max_new_tokens=32, upload="docvqa", count=3_288,
    ),
    Benchmark(
        "chartqa", "chartqa", "llava_chartqa_test.jsonl", "", "chartqa", reader="inline",
        dialect="lmms", max_new_tokens=16, suffix=SINGLE_WORD, published="ChartQA", count=2_500,
    ),
    Benchmark(
        "ocrvqa", "ocrvqa", "llava_ocrvqa_test.jsonl", "", "ocrvqa", reader="inline",
        dialect="vlmevalkit", published="OCR-VQA",
    ),
    Benchmark(
        "ai2d", "ai2d", "llava_ai2d_test.jsonl", "", "ai2d", reader="inline", dialect="lmms",
        answer_type="letter", suffix=LETTER, count=3_088,
    ),
    Benchmark(
        "aokvqa", "aokvqa", "llava_aokvqa_val.jsonl", "", "aokvqa",
        labels=("aokvqa_v1p0_val.json",), reader="aokvqa", answer_type="letter", suffix=LETTER,
        upload="aokvqa", published="A-OKVQA", count=1_145,
    ),
    Benchmark(
        "aokvqa_direct", "aokvqa", "llava_aokvqa_val_direct.jsonl", "", "aokvqa_direct",
        labels=("aokvqa_v1p0_val.json",), reader="aokvqa", upload="aokvqa", count=1_145,
    ),
    *(
        Benchmark(
            name, folder, questions, images, "captions", labels=(labels,), reader="captions",
            dialect="lmms", answer_type="caption", max_new_tokens=64, suffix="",
            upload="captions", published=published, count=count,
        )
        for name, folder, questions, images, labels, published, count in (
            ("coco2014_val", "coco_caption", "llava_coco2014_val.jsonl", "val2014",
             "captions_val2014.json", "COCO 2014", 40_504),
            ("coco2017_val", "coco_caption", "llava_coco2017_val.jsonl", "val2017",
             "captions_val2017.json", "COCO 2017", 5_000),
            ("coco_karpathy", "coco_caption", "llava_coco_karpathy_test.jsonl", "val2014",
             "captions_karpathy_test.json", None, 5_000),
            ("nocaps", "nocaps", "llava_nocaps_val.jsonl", "images",
             "nocaps_val_4500_captions.json", "nocaps", 4_500),
            ("flickr30k", "flickr30k", "llava_flickr30k_test.jsonl", "images",
             "captions_test.json", "Flickr30k", None),
        )
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
        if self.benchmark.judged:
            raise ValueError(f"{name} is scored by a judge model: see `llava judge --help`")
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
    for other in benchmark.elsewhere:
        place = Path(data_root) / other
        if not (folder / benchmark.questions).is_file() and (place / benchmark.questions).is_file():
            return place
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
    return load_folder(benchmark, benchmark_folder(benchmark, data_root), limit)


def load_folder(benchmark: Benchmark, folder: Path, limit: int | None = None) -> LoadedBenchmark:
    """`load_benchmark` for a set that lies in a folder of its own."""
    name, question_file = benchmark.name, folder / benchmark.questions
    own_labels = benchmark.labels if not benchmark.judged else ()
    label_files = [folder / label for label in own_labels]
    for path in (question_file, *label_files):
        if not path.exists():
            raise FileNotFoundError(f"{name}: file not found: {path}; {benchmark.hint}")
    questions = read_question_file(question_file, name, benchmark.suffix)
    labels = None
    if benchmark.reader and not benchmark.judged:
        labels = READERS[benchmark.reader](label_files, questions)
    return LoadedBenchmark(
        benchmark, spread(questions, limit), folder / benchmark.images, labels, question_file
    )


def load_references(loaded: LoadedBenchmark) -> dict[str, Any]:
    """What the judge of a judged set is shown of each question's uid.

    Raises ValueError for a set that no judge scores, FileNotFoundError for a file that is missing.
    """
    benchmark = loaded.benchmark
    if not benchmark.judged:
        raise ValueError(f"{benchmark.name} needs no judge; judged: {', '.join(judged_names())}")
    folder = loaded.question_file.parent
    paths = [folder / label for label in benchmark.labels]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{benchmark.name}: file not found: {path}; {benchmark.hint}")
    return READERS[benchmark.reader](paths, loaded.questions)


def judged_names() -> list[str]:
    """The sets that a judge model scores."""
    return [row.name for row in BENCHMARKS.values() if row.judged]
