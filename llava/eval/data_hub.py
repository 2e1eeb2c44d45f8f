"""Which hub set becomes which benchmark: ids, needed columns, and the conversion of a row.

Special here: data in a table and one small function a set; loading, checking columns and writing
files is `data_prepare`'s. What a function writes are the files that the benchmark's own readers
(`layouts`) read: LLaVA's question file, and the annotations in their makers' format.

Ids and columns: the task folders of lmms-eval 0.7.3. In July 2026 its sets moved to another
organisation; both are tried.
"""

from __future__ import annotations

import ast
import base64
import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.layouts import (
    LETTER,
    LETTERS,
    OCR_LINE,
    SINGLE_WORD,
    VIZWIZ,
    WORD,
    mme_question,
)
from llava.eval.scorers.mmmu import answers_of

if TYPE_CHECKING:
    from llava.eval.data_prepare import Output

ORGANISATIONS = ("lmms-lab-encoder", "lmms-lab")
CAPTION = "Provide a one-sentence caption for the provided image."
CAPTION_KARPATHY = "Describe the image briefly."
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class HubSet:
    """path: hub id, of `ORGANISATIONS` where it names none; parts: (config, split) of each table;
    columns: needed in each; convert: (rows of the first, output, further tables)."""

    path: str
    parts: tuple[tuple[str | None, str], ...]
    columns: tuple[tuple[str, ...], ...]
    convert: Callable[..., None]


def _one(
    path: str, config: str | None, split: str, columns: str, convert: Callable[..., None]
) -> HubSet:
    return HubSet(path, ((config, split),), (tuple(columns.split()),), convert)


def _listed(options: Iterable[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def _parsed(value: Any) -> Any:
    """A list that some sets store as the text Python prints."""
    return ast.literal_eval(value) if isinstance(value, str) else value


# ----------------------------------------------------------------------------- short answers
def _vqav2(split: str) -> Callable[[Rows, Output], None]:
    def convert(rows: Rows, out: Output) -> None:
        annotations = []
        for row in rows:
            name = f"COCO_{split}_{int(row['image_id']):012d}.jpg"
            image = out.image(row["image"], name)
            out.question(row["question_id"], image, row["question"] + WORD)
            annotations.append(
                {
                    "question_id": row["question_id"],
                    "image_id": int(row["image_id"]),
                    "question_type": row.get("question_type"),
                    "answer_type": row.get("answer_type"),
                    "multiple_choice_answer": row.get("multiple_choice_answer"),
                    "answers": row.get("answers"),
                }
            )
        if split == "val2014":
            out.files["v2_mscoco_val2014_annotations.json"] = {"annotations": annotations}
        else:  # the upload covers all of test2015
            everything = "llava_vqav2_mscoco_test2015.jsonl"
            out.questions[everything] = out.questions[out.benchmark.questions]

    return convert


def _gqa(rows: Rows, out: Output, images: Any) -> None:
    places = {own: place for place, own in enumerate(images["id"])}
    entries = {}
    for row in rows:
        image = out.image(images[places[row["imageId"]]]["image"], f"{row['imageId']}.jpg")
        out.question(row["id"], image, row["question"] + WORD)
        entries[row["id"]] = {key: value for key, value in row.items() if key != "id"}
    out.files["data/testdev_balanced_questions.json"] = entries


def _textvqa(rows: Rows, out: Output) -> None:
    with_ocr = out.benchmark.name == "textvqa_ocr"
    entries = []
    for row in rows:
        image = out.image(row["image"], f"{row['image_id']}.jpg")
        ocr = f"\n{OCR_LINE} {', '.join(row['ocr_tokens'])}" if with_ocr else ""
        out.question(row["image_id"], image, row["question"] + ocr + WORD)
        keys = ("question", "image_id", "question_id", "answers", "ocr_tokens")
        entries.append({key: row[key] for key in keys})
    out.files["TextVQA_0.5.1_val.json"] = {"dataset_type": "val", "data": entries}


def _pope(rows: Rows, out: Output) -> None:
    first = {"adversarial": 10_000_000, "popular": 20_000_000, "random": 30_000_000}
    labels: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
    for row in rows:
        category, number = row["category"], int(row["question_id"])
        image = out.image(row["image"], f"{Path(row['image_source']).stem}.jpg")
        out.question(first[category] + number, image, row["question"] + WORD, category)
        labels[category].append(
            {
                "question_id": number,
                "image": image,
                "text": row["question"],
                "label": row["answer"].strip().lower(),
            }
        )
    for name, lines in labels.items():
        out.files[f"coco/coco_pope_{name}.json"] = lines


def _mme(rows: Rows, out: Output) -> None:
    texts: dict[str, list[str]] = {}
    for row in rows:
        own, category = row["question_id"], row["category"]
        image = out.image(row["image"], own)
        asked = mme_question(row["question"])
        out.question(own, image, asked + WORD, category)
        name = f"{out.benchmark.images}/{category}/{Path(own).stem}.txt"
        line = f"{asked} Please answer yes or no.\t{row['answer'].strip().capitalize()}\n"
        texts.setdefault(name, []).append(line)
    out.files |= {name: "".join(lines) for name, lines in texts.items()}


def _vizwiz(split: str) -> Callable[[Rows, Output], None]:
    def convert(rows: Rows, out: Output) -> None:
        entries = []
        for row in rows:
            name = Path(str(row["question_id"])).stem
            image = out.image(row["image"], f"{name}.jpg")
            number = int(name.rpartition("_")[2])
            out.question(number, image, row["question"] + VIZWIZ)
            answers = [{"answer": text} for text in row.get("answers") or ()]
            entries.append({"image": image, "question": row["question"], "answers": answers})
        if split == "val":
            out.files["val.json"] = entries

    return convert


def _docvqa(split: str) -> Callable[[Rows, Output], None]:
    def convert(rows: Rows, out: Output) -> None:
        entries = []
        for row in rows:
            own = int(row["questionId"])
            image = out.image(row["image"])
            out.question(own, image, row["question"] + WORD)
            entry = {"questionId": own, "question": row["question"], "image": image}
            entries.append(entry | {"answers": row.get("answers")})
        if split == "validation":
            out.files["val_v1.0.json"] = {"dataset_split": "val", "data": entries}

    return convert


def _chartqa(rows: Rows, out: Output) -> None:
    for number, row in enumerate(rows):
        text, kind = row["question"] + SINGLE_WORD, row["type"]
        out.question(number, out.image(row["image"]), text, kind, answer=row["answer"])


def _ocrvqa(rows: Rows, out: Output) -> None:
    number = 0
    for row in rows:
        image = out.image(row["image"])
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            out.question(number, image, question + WORD, answer=answer)
            number += 1


# ----------------------------------------------------------------------------- multiple choice
def _scienceqa(rows: Rows, out: Output) -> None:
    problems, test = {}, []
    conversations = out.questions[out.benchmark.questions]
    for number, row in enumerate(rows):
        own = str(number)
        hint = f"Context: {row['hint']}\n" if row["hint"] else ""
        text = f"{hint}{row['question']}\n{_listed(row['choices'])}"
        record: dict[str, Any] = {"id": own}
        if row["image"] is not None:
            record["image"] = out.image(row["image"], f"{own}/image.png")
            text = f"<image>\n{text}"
        record["conversations"] = [
            {"from": "human", "value": text},
            {"from": "gpt", "value": LETTERS[row["answer"]]},
        ]
        conversations.append(record)
        problem = {key: value for key, value in row.items() if key != "image"}
        problems[own] = problem | {"image": "image.png" if "image" in record else None}
        test.append(own)
    out.files["problems.json"] = problems
    out.files["pid_splits.json"] = {"train": [], "val": [], "test": test}


def _mmbench(rows: Rows, out: Output) -> None:
    columns = (
        "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
        "l2-category", "comment", "split",
    )  # fmt: skip
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, columns, delimiter="\t", lineterminator="\n")
    table.writeheader()
    for row in rows:
        cells = {name: "" if row.get(name) in (None, "nan") else row[name] for name in columns}
        cells["l2-category"] = row.get("l2-category") or row.get("L2-category") or ""
        picture = row["image"]
        data = picture["bytes"] or Path(picture["path"]).read_bytes()
        table.writerow(cells | {"image": base64.b64encode(data).decode()})
    out.files[out.benchmark.questions] = buffer.getvalue()


SEED_TYPES = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location",
    "Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning",
    "Text Understanding", "Action Recognition", "Action Prediction", "Procedure Understanding",
)  # fmt: skip


def _seed(rows: Rows, out: Output) -> None:
    entries = []
    for row in rows:
        frames = row["image"] if isinstance(row["image"], list) else [row["image"]]
        own, kind = str(row["question_id"]), int(row["question_type_id"])
        video = row["data_type"] == "video"
        name = f"SEED-Bench-video-image/{kind}_{own}" if video else (
            f"SEED-Bench-image/{row.get('data_id') or own}"
        )  # fmt: skip
        image = out.image(frames[len(frames) // 2], name)
        choices = [row[f"choice_{letter}"] for letter in "abcd"]
        text = f"{row['question']}\n{_listed(choices)}{LETTER}"
        out.question(int(own) if own.isdigit() else own, image, text, SEED_TYPES[kind - 1])
        keys = ("question", "answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_type")
        entry = {key: row[key] for key in keys}
        entries.append(entry | {"question_id": own, "question_type_id": kind})
    types = {name: number for number, name in enumerate(SEED_TYPES, start=1)}
    out.files["SEED-Bench.json"] = {"question_type": types, "questions": entries}


def _mmstar(rows: Rows, out: Output) -> None:
    for row in rows:
        image = out.image(row["image"])
        out.question(
            row["index"], image, row["question"] + out.benchmark.suffix, row["category"],
            answer=row["answer"], l2_category=row["l2_category"],
        )  # fmt: skip


def _ai2d(rows: Rows, out: Output) -> None:
    for number, row in enumerate(rows):
        image = out.image(row["image"])
        text = f"{row['question']}\n{_listed(row['options'])}{LETTER}"
        out.question(number, image, text, answer=str(row["answer"]), options=row["options"])


def _aokvqa(rows: Rows, out: Output) -> None:
    entries = []
    for row in rows:
        own, choices = row["question_id"], list(row["choices"])
        image = out.image(row["image"])
        if out.benchmark.name == "aokvqa":
            text = f"{row['question']}\n{_listed(choices)}{LETTER}"
            out.question(own, image, text, choices=choices)
        else:
            out.question(own, image, row["question"] + WORD)
        entry = {key: value for key, value in row.items() if key != "image"}
        entry["direct_answers"] = _parsed(row["direct_answers"])
        entries.append(entry | {"choices": choices})
    out.files["aokvqa_v1p0_val.json"] = entries


def _mmmu(rows: Rows, out: Output) -> None:
    for row in rows:
        options = _parsed(row["options"]) or []
        places = [place for place in range(1, 8) if row.get(f"image_{place}") is not None]
        text = row["question"] + ("\n" + _listed(options) if options else "")
        # As lmms-eval does, the pictures that are named go in front, in the order of their numbers.
        named = [place for place in places if f"<image {place}>" in text] or places
        images = [out.image(row[f"image_{place}"]) for place in named]
        ending = LETTER if options else WORD
        out.question(
            row["id"], images, f"{text}\n{ending}", subject=subject_of(row["id"]),
            options=options, answer=row["answer"] if options else answers_of(row["answer"]),
        )  # fmt: skip


def subject_of(own: str) -> str:
    """`validation_Art_Theory_12` -> `Art_Theory`."""
    return own.split("_", 1)[1].rpartition("_")[0]


# ----------------------------------------------------------------------------- captions
def _captions(
    file: str, texts: str, key: str = "", prompt: str = CAPTION
) -> Callable[[Rows, Output], None]:
    """file: column of the file's name; texts: column of the captions; key: column of the picture's
    id, which COCO has at the end of the name."""

    def convert(rows: Rows, out: Output) -> None:
        images, annotations = [], []
        for row in rows:
            file_name = f"{Path(row[file]).stem}.jpg"
            own = int(row[key]) if key else int(Path(file_name).stem.rpartition("_")[2])
            if "image" in row:
                out.image(row["image"], file_name)
            out.question(own, file_name, prompt)
            images.append({"id": own, "file_name": file_name})
            for text in row[texts]:
                number = len(annotations)
                annotations.append({"image_id": own, "id": number, "caption": text})
        (labels,) = out.benchmark.labels
        out.files[labels] = {"images": images, "annotations": annotations}

    return convert


# ----------------------------------------------------------------------------- judged
def _mmvet(rows: Rows, out: Output) -> None:
    entries = {}
    for row in rows:
        own = str(row["question_id"])
        image = out.image(row["image"], f"{own}.png")
        out.question(int(own.removeprefix("v1_")), image, row["question"])
        able = row["capability"]
        able = able.split(",") if isinstance(able, str) else able
        entries[own] = {
            "question": row["question"],
            "answer": row["answer"],
            "capability": [name.strip() for name in able],
        }
    out.files["mm-vet.json"] = entries


def _llava_bench(rows: Rows, out: Output) -> None:
    contexts, answers = {}, []
    for number, row in enumerate(rows):
        own = row.get("question_id", number)
        image = out.image(row["image"], f"{row.get('image_id') or number:0>3}.jpg")
        out.question(own, image, row["question"], row["category"])
        contexts[image] = {"id": len(contexts), "image": image, "caption": row["caption"]}
        answers.append({"question_id": own, "text": row["gpt_answer"]})
    out.files["context.jsonl"] = list(contexts.values())
    out.files["answers_gpt4.jsonl"] = answers


# ----------------------------------------------------------------------------- the table
HUB: dict[str, HubSet] = {
    "vqav2": _one("VQAv2", None, "test", "question_id image_id question image", _vqav2("test2015")),
    "vqav2_val": _one(
        "VQAv2", None, "validation",
        "question_id image_id question image answers question_type answer_type", _vqav2("val2014"),
    ),
    "gqa": HubSet(
        "GQA",
        (("testdev_balanced_instructions", "testdev"), ("testdev_balanced_images", "testdev")),
        (
            ("id", "imageId", "question", "answer", "isBalanced", "types", "semantic", "groups"),
            ("id", "image"),
        ),
        _gqa,
    ),
    "textvqa": _one(
        "textvqa", None, "validation", "image_id question_id question image answers ocr_tokens",
        _textvqa,
    ),
    "textvqa_ocr": _one(
        "textvqa", None, "validation", "image_id question_id question image answers ocr_tokens",
        _textvqa,
    ),
    "pope": _one(
        "POPE", "default", "test", "question_id question answer image_source image category", _pope
    ),
    "mme": _one("MME", None, "test", "question_id image question answer category", _mme),
    "scienceqa": _one(
        "ScienceQA", "ScienceQA-FULL", "test", "image question choices answer hint", _scienceqa
    ),
    "mmbench": _one(
        "MMBench", "en", "dev", "index question hint A B C D answer category image", _mmbench
    ),
    "mmbench_cn": _one(
        "MMBench", "cn", "dev", "index question hint A B C D answer category image", _mmbench
    ),
    "seed_bench": _one(
        "SEED-Bench", None, "test",
        "question_id question_type_id question answer choice_a choice_b choice_c choice_d "
        "data_type image", _seed,
    ),
    "vizwiz": _one("VizWiz-VQA", None, "test", "question_id image question", _vizwiz("test")),
    "vizwiz_val": _one(
        "VizWiz-VQA", None, "val", "question_id image question answers", _vizwiz("val")
    ),
    "mmvet": _one("MMVet", None, "test", "question_id image question answer capability", _mmvet),
    "llava_bench": _one(
        "llava-bench-in-the-wild", None, "train", "question image caption gpt_answer category",
        _llava_bench,
    ),
    "mmstar": _one(
        "Lin-Chen/MMStar", None, "val", "index question image answer category l2_category", _mmstar
    ),
    "mmmu": _one("MMMU", None, "validation", "id question options answer image_1", _mmmu),
    "docvqa": _one(
        "DocVQA", "DocVQA", "validation", "questionId question image answers", _docvqa("validation")
    ),
    "docvqa_test": _one("DocVQA", "DocVQA", "test", "questionId question image", _docvqa("test")),
    "infovqa": _one(
        "DocVQA", "InfographicVQA", "validation", "questionId question image answers",
        _docvqa("validation"),
    ),
    "infovqa_test": _one(
        "DocVQA", "InfographicVQA", "test", "questionId question image", _docvqa("test")
    ),
    "chartqa": _one("ChartQA", None, "test", "type question answer image", _chartqa),
    "ocrvqa": _one("howard-hou/OCR-VQA", None, "test", "image questions answers", _ocrvqa),
    "ai2d": _one("ai2d", None, "test", "question options answer image", _ai2d),
    "aokvqa": _one(
        "HuggingFaceM4/A-OKVQA", None, "validation",
        "image question_id question choices correct_choice_idx direct_answers "
        "difficult_direct_answer", _aokvqa,
    ),
    "aokvqa_direct": _one(
        "HuggingFaceM4/A-OKVQA", None, "validation",
        "image question_id question choices correct_choice_idx direct_answers "
        "difficult_direct_answer", _aokvqa,
    ),
    "coco2014_val": _one(
        "COCO-Caption", None, "val", "question_id image answer",
        _captions("question_id", "answer"),
    ),
    "coco2017_val": _one(
        "COCO-Caption2017", None, "val", "question_id image answer",
        _captions("question_id", "answer"),
    ),
    "coco_karpathy": _one(
        "yerevann/coco-karpathy", None, "test", "filename sentences",
        _captions("filename", "sentences", prompt=CAPTION_KARPATHY),
    ),
    "nocaps": _one(
        "NoCaps", None, "validation", "image image_id image_file_name annotations_captions",
        _captions("image_file_name", "annotations_captions", "image_id"),
    ),
    "flickr30k": _one(
        "flickr30k", None, "test", "image img_id caption filename",
        _captions("filename", "caption", "img_id"),
    ),
}  # fmt: skip
