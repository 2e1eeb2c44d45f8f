"""The five evaluation sets in the file formats of VQAv2, GQA, TextVQA, POPE and MME.

Each set is a folder with pictures, a LLaVA question file (`question_id`, `image`, `text`,
`category`), the annotation files of the benchmark it imitates under their official names, and
`labels.jsonl`, one line per question with the right answer and the kind of question, for plain
exact match. `set.json` names the parts and states the chance level: what always giving the most
frequent answer to each kind of question (to each sort of number read, for TextVQA) would score.

Pictures are scenes of the test split; no two sets share a picture.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava.digits.questions import KINDS, Question, ask, name
from llava.digits.scenes import COLOUR_NAMES, Scene, render, varied_scene
from llava.utils import atomic_write, json_dump

SETS = ("vqav2", "gqa", "textvqa", "pope", "mme")
POPE_CATEGORIES = ("random", "popular", "adversarial")
POPE_PAIRS = 3  # yes and no questions per picture and category: 3 x 3 x 2 = 18
POPULAR = 20
VQA_KINDS = {
    "digit_at": "number",
    "color_at": "other",
    "filled_at": "yes/no",
}
GQA_KINDS = {
    "beside_digit": ("query", "rel"),
    "beside_color": ("query", "rel"),
    "beside_check": ("verify", "rel"),
}
MME_KINDS = {
    "existence": "exists",
    "position": "place_check",
    "color": "color_check",
    "OCR": "digit_check",
}
MME_TAIL = " Please answer yes or no."
SIZES = {"vqav2": 400, "gqa": 420, "textvqa": 400, "pope": 540, "mme": 400}
MME_FOLDER = "MME_Benchmark_release_version"


@dataclass
class SetBuilder:
    """Collects one set in a folder: pictures, LLaVA questions and labels."""

    folder: Path
    seed: int
    set_name: str
    images: str
    questions: str
    records: list[dict] = field(default_factory=list)
    labels: list[dict] = field(default_factory=list)

    def rng(self) -> np.random.Generator:
        """The set's own generator."""
        return np.random.default_rng([self.seed, SETS.index(self.set_name), 2])

    def scene(self, index: int) -> Scene:
        """Scene number `index` of this set."""
        return varied_scene(self.seed, "test", (SETS.index(self.set_name) + 1) * 1_000_000 + index)

    def picture(self, scene: Scene, image: str) -> None:
        """Write one picture below the set's image folder."""
        save_png(scene, self.folder / self.images / image)

    def add(
        self, question_id: int | str, image: str, question: Question, category: str = "default"
    ) -> None:
        """One more question with its label."""
        record = {"question_id": question_id, "image": image, "text": question.text}
        self.records.append({**record, "category": category})
        label = {"answer": question.answer, "category": category, "kind": question.kind}
        self.labels.append({**record, **label})

    def finish(self, annotation: str) -> None:
        """Write the question file, the labels and `set.json`."""
        write_jsonl(self.folder / self.questions, self.records)
        write_jsonl(self.folder / "labels.jsonl", self.labels)
        facts = {
            "name": self.set_name,
            "questions": self.questions,
            "images": self.images,
            "annotation": annotation,
            "labels": "labels.jsonl",
            "n": len(self.records),
            "pictures": len({record["image"] for record in self.records}),
            "chance": round(chance(self.labels), 2),
        }
        json_dump(self.folder / "set.json", facts)


def chance(labels: list[dict]) -> float:
    """Per cent right when each kind of question gets its own most frequent answer."""
    kinds: dict[str, Counter[str]] = {}
    for label in labels:
        kinds.setdefault(label["kind"], Counter())[label["answer"]] += 1
    return 100 * sum(max(answers.values()) for answers in kinds.values()) / len(labels)


def save_png(scene: Scene, path: Path) -> None:
    """Write a scene's picture (parts are built aside and moved when complete: see build.py)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(path, format="PNG", compress_level=1)


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Write one JSON object per line, atomically."""
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def _draw(
    builder: SetBuilder, kinds: tuple[str, ...], per_picture: int, suffix: str
) -> list[tuple[int, Question]]:
    """SIZES[set] questions, `per_picture` a picture, kinds in turn, rarest answers first."""
    rng = builder.rng()
    used = {kind: Counter() for kind in kinds}
    asked: list[tuple[int, Question]] = []
    index = turn = 0
    while len(asked) < SIZES[builder.set_name]:
        scene, here = builder.scene(index), []
        for _ in range(per_picture):
            question = ask(scene, kinds[turn % len(kinds)], rng, used[kinds[turn % len(kinds)]])
            turn += 1
            if question is not None and all(question.text != other.text for other in here):
                here.append(question)
        if here:
            builder.picture(scene, f"{index:06d}{suffix}")
            asked += [(index, question) for question in here]
        index += 1
    return asked[: SIZES[builder.set_name]]


def build_vqav2(folder: Path, seed: int) -> None:
    """Digits, colours and presence by address; VQAv2's question and annotation files."""
    builder = SetBuilder(folder, seed, "vqav2", "val2014", "llava_vqav2_mscoco_val2014.jsonl")
    questions, annotations = [], []
    for number, (index, question) in enumerate(_draw(builder, tuple(VQA_KINDS), 4, ".png")):
        question_id = index * 1000 + number % 1000
        builder.add(question_id, f"{index:06d}.png", question)
        key = {"image_id": index, "question_id": question_id}
        questions.append({**key, "question": question.text})
        humans = [
            {"answer": question.answer, "answer_confidence": "yes", "answer_id": i + 1}
            for i in range(10)
        ]
        annotations.append(
            {
                **key,
                "question_type": " ".join(question.text.split()[:2]).lower(),
                "answer_type": VQA_KINDS[question.kind],
                "multiple_choice_answer": question.answer,
                "answers": humans,
            }
        )
    head = {
        "info": {"description": "handwritten digits in a grid"},
        "license": {},
        "data_type": "digits",
        "data_subtype": "val2014",
    }
    json_dump(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    json_dump(folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})
    builder.finish("v2_mscoco_val2014_annotations.json")


def build_gqa(folder: Path, seed: int) -> None:
    """What stands beside a cell; GQA's question file, which also holds the answers."""
    annotation = "data/testdev_balanced_questions.json"
    builder = SetBuilder(folder, seed, "gqa", "data/images", "llava_gqa_testdev_balanced.jsonl")
    entries = {}
    for number, (index, question) in enumerate(_draw(builder, tuple(GQA_KINDS), 4, ".png")):
        question_id = f"{20_000_000 + number}"
        builder.add(question_id, f"{index:06d}.png", question)
        structural, semantic = GQA_KINDS[question.kind]
        entries[question_id] = {
            "imageId": f"{index:06d}",
            "question": question.text,
            "answer": question.answer,
            "fullAnswer": question.answer,
            "isBalanced": True,
            "groups": {"global": question.kind, "local": None},
            "entailed": [question_id],
            "equivalent": [question_id],
            "types": {"structural": structural, "semantic": semantic, "detailed": question.kind},
            "semantic": [
                {"operation": "select", "argument": "digit", "dependencies": []},
                {"operation": "relate", "argument": question.kind, "dependencies": [0]},
                {"operation": structural, "argument": "name", "dependencies": [1]},
            ],
            "semanticStr": f"select: digit->relate: {question.kind}->{structural}: name",
        }
    json_dump(folder / annotation, entries)
    builder.finish(annotation)


def build_textvqa(folder: Path, seed: int) -> None:
    """Rows read as numbers; TextVQA's question file without a line of OCR tokens."""
    annotation = "TextVQA_0.5.1_val.json"
    builder = SetBuilder(folder, seed, "textvqa", "train_images", "llava_textvqa_val_v051.jsonl")
    data = []
    for number, (index, question) in enumerate(_draw(builder, ("read_row",), 2, ".png")):
        question_id, image = 30_000 + number, f"{index:06d}"
        builder.add(image, f"{image}.png", question)  # LLaVA's file names questions by picture
        data.append(
            {
                "question_id": question_id,
                "question": question.text,
                "image_id": image,
                "answers": [question.answer] * 10,
                "set_name": "val",
            }
        )
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    json_dump(folder / annotation, {**head, "data": data})
    builder.finish(annotation)


def _pope_absent(scenes: list[Scene], scene: Scene, category: str) -> list[tuple[int, int]]:
    """Things to ask for that are not there, most fitting first where the category ranks them."""
    here = set(scene.things())
    everything = [(c, d) for c in range(len(COLOUR_NAMES)) for d in range(10)]
    absent = [thing for thing in everything if thing not in here]
    if category == "popular":
        often = Counter(thing for other in scenes for thing in set(other.things()))
        ranked = sorted(everything, key=lambda thing: (-often[thing], thing))
        return [thing for thing in ranked[: POPULAR + len(here)] if thing not in here]
    if category == "adversarial":
        colours, digits = {c for c, _ in here}, {d for _, d in here}
        return [(c, d) for c, d in absent if c in colours and d in digits]
    return absent


def build_pope(folder: Path, seed: int) -> None:
    """Is there a red 3? 18 questions a picture: 3 categories x 3 yes + 3 no, as in POPE.

    The three things that are there are the same in all categories. Things that are not there are
    any (random), among the most frequent of the set (popular), or a digit that is there in a colour
    that is there (adversarial).
    """
    builder = SetBuilder(folder, seed, "pope", "val2014", "llava_pope_test.jsonl")
    rng = builder.rng()
    pictures = SIZES["pope"] // (2 * POPE_PAIRS * len(POPE_CATEGORIES))
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < pictures:
        scene = builder.scene(index)
        index += 1
        absent = _pope_absent([], scene, "adversarial")
        if min(len(set(scene.things())), len(absent)) >= POPE_PAIRS:
            scenes.append(scene)
    present = [
        rng.permutation(sorted(set(scene.things())))[:POPE_PAIRS].tolist() for scene in scenes
    ]
    for number, scene in enumerate(scenes):
        builder.picture(scene, f"{number:06d}.png")
    for place, category in enumerate(POPE_CATEGORIES):
        lines = []
        for number, scene in enumerate(scenes):
            pool = _pope_absent(scenes, scene, category)
            absent = rng.permutation(pool)[:POPE_PAIRS].tolist()
            pairs = zip(present[number], absent, strict=True)
            for thing, label in (
                (t, "yes") if k == 0 else (t, "no") for p in pairs for k, t in enumerate(p)
            ):
                question_id = 10_000_001 + place * 1_000_000 + len(lines)
                text = f"Is there a {name((thing[0], thing[1]))} in the image?"
                image = f"{number:06d}.png"
                builder.add(question_id, image, Question("exists", text, label), category)
                lines.append(
                    {"question_id": question_id, "image": image, "text": text, "label": label}
                )
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", lines)
    builder.finish("coco")


def build_mme(folder: Path, seed: int) -> None:
    """Paired yes/no questions, two a picture, in five of MME's categories."""
    builder = SetBuilder(folder, seed, "mme", MME_FOLDER, "llava_mme.jsonl")
    rng = builder.rng()
    per_category = SIZES["mme"] // (2 * len(MME_KINDS))
    index = 0
    for category, kind in MME_KINDS.items():
        number = 0
        while number < per_category:
            scene = builder.scene(index)
            index += 1
            pool = KINDS[kind](scene)
            if set(pool) != {"yes", "no"}:
                continue
            image = f"{category}/{number:04d}.png"
            lines = []
            for answer in ("yes", "no"):
                text = pool[answer][int(rng.integers(len(pool[answer])))]
                builder.add(image, image, Question(kind, text, answer), category)
                lines.append(f"{text}{MME_TAIL}\t{answer.capitalize()}\n")
            builder.picture(scene, image)
            with atomic_write(folder / MME_FOLDER / category / f"{number:04d}.txt") as file:
                file.writelines(lines)
            number += 1
    builder.finish(MME_FOLDER)


BUILDERS: dict[str, Callable[[Path, int], None]] = {
    "vqav2": build_vqav2,
    "gqa": build_gqa,
    "textvqa": build_textvqa,
    "pope": build_pope,
    "mme": build_mme,
}
