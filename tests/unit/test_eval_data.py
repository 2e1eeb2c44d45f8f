"""Hub sets become files that the benchmarks' own readers take, and damaged files are found.

Each set of the hub table is built here as a small table with the columns of the real one; the right
answers to what comes out of it must score full marks.
"""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from llava.cli import main as llava
from llava.eval.benchmarks import BENCHMARKS, load_benchmark, load_references
from llava.eval.data_check import check_benchmark
from llava.eval.data_hub import HUB
from llava.eval.data_prepare import prepare
from llava.eval.layouts import LETTER
from llava.utils import json_dump

datasets = pytest.importorskip("datasets")


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (6, 4), colour)


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    picture(colour).save(buffer, "PNG")
    return buffer.getvalue()


TEN = ["red"] * 10
VQA = {
    "question_id": 9001, "image_id": 77, "question": "What colour?", "image": picture(),
    "question_type": "what", "answer_type": "other", "multiple_choice_answer": "red",
    "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)],
}  # fmt: skip
OPTIONS = {"A": "cat", "B": "dog", "C": "cow", "D": "nan"}
CHOICES = {"choice_a": "cat", "choice_b": "dog", "choice_c": "cow", "choice_d": "pig"}
COCO = {
    "question_id": "COCO_val2014_000000000042.jpg", "image": picture(), "id": 900,
    "answer": ["A red square.", "a square"],
}  # fmt: skip
AOKVQA = {
    "question_id": "q1", "image": picture(), "question": "What is it?",
    "choices": ["cat", "dog", "cow", "pig"], "correct_choice_idx": 1,
    "direct_answers": str(["dog"] * 10), "difficult_direct_answer": False, "rationales": ["-"],
}  # fmt: skip
DOC = {"questionId": "65", "question": "How much?", "image": picture(), "answers": ["12 c", "12"]}
TEXT = {
    "image_id": "ab12", "question_id": 5, "question": "what brand?", "image": picture(),
    "answers": TEN, "ocr_tokens": ["ACME", "12"],
}  # fmt: skip
BENCH = {
    "index": 3, "question": "Which?", "hint": "Look.", **OPTIONS, "answer": "B",
    "category": "ocr", "image": picture(), "L2-category": "perception", "source": "s",
    "split": "dev",
}  # fmt: skip
# rows of the first table; (rows, rows) where a set has two
ROWS: dict[str, list | tuple] = {
    "vqav2": [{key: VQA[key] for key in ("question_id", "image_id", "question", "image")}],
    "vqav2_val": [VQA],
    "gqa": (
        [
            {
                "id": "201", "imageId": "n1", "question": "Is it red?", "answer": "yes",
                "isBalanced": True, "types": {"structural": "verify", "semantic": "attr"},
                "semantic": [{"operation": "verify", "argument": "red", "dependencies": [0]}],
                "groups": {"global": "colour", "local": None},
            },
        ],
        [{"id": "n0", "image": picture("blue")}, {"id": "n1", "image": picture()}],
    ),
    "textvqa": [TEXT, {**TEXT, "question_id": 6, "question": "What number?"}],
    "textvqa_ocr": [TEXT],
    "pope": [
        {
            "question_id": str(1 + place % 2), "question": f"Is there a {thing} in the image?",
            "answer": answer, "image_source": "COCO_val2014_000000000042", "image": picture(),
            "category": category,
        }
        for category in ("adversarial", "popular", "random")
        for place, (thing, answer) in enumerate((("cat", "yes"), ("dog", "no")))
    ],
    "mme": [
        {
            "question_id": "count/0001.png", "image": picture(), "category": "count",
            "question": f"Are there {many} cups?  Please answer yes or no.", "answer": answer,
        }
        for many, answer in (("two", "Yes"), ("six", "No"))
    ],
    "scienceqa": [
        {
            "image": image, "question": "Which one?", "choices": ["a", "b"], "answer": 1,
            "hint": hint, "subject": "x",
        }
        for image, hint in ((picture(), "A hint."), (None, ""))
    ],
    "mmbench": [BENCH, {**BENCH, "index": 1_000_003, "A": "dog", "B": "cat", "answer": "A"}],
    "mmbench_cn": [BENCH],
    "seed_bench": [
        {
            "question_id": own, "question_type_id": kind, "question": "Which?", **CHOICES,
            "answer": "C", "data_type": data_type, "data_id": "x1", "image": frames,
        }
        for own, kind, data_type, frames in (
            ("101", 2, "image", [picture()]),
            ("v7", 10, "video", [picture("blue"), picture("green"), picture("blue")]),
        )
    ],
    "vizwiz": [{"question_id": "VizWiz_test_00000007.jpg", "image": picture(), "question": "?"}],
    "vizwiz_val": [
        {
            "question_id": "VizWiz_val_00000007.jpg", "image": picture(), "question": "What?",
            "answers": TEN,
        }
    ],
    "mmvet": [
        {
            "question_id": "v1_3", "image": picture(), "question": "What?", "answer": "x",
            "capability": "ocr,math",
        }
    ],
    "llava_bench": [
        {
            "question_id": 4, "image_id": "002", "image": picture(), "question": "What?",
            "caption": "A red field.", "gpt_answer": "red", "category": "conv",
        }
    ],
    "mmstar": [
        {
            "index": 0, "question": "Which?\nOptions: A: cat, B: dog", "image": picture(),
            "answer": "B", "category": "math", "l2_category": "geometry",
        }
    ],
    "mmmu": [
        {
            "id": "validation_Art_Theory_3", "question": "See <image 2> and <image 1>.",
            "options": "['cat', 'dog']", "answer": "B", "question_type": "multiple-choice",
            "image_1": picture(), "image_2": picture("blue"), "image_3": None,
        },
        {
            "id": "validation_Math_1", "question": "How much is <image 1>?", "options": "[]",
            "answer": "['12.5', 'twelve and a half']", "question_type": "open",
            "image_1": picture(), "image_2": None, "image_3": None,
        },
    ],
    "docvqa": [DOC, {**DOC, "questionId": "66", "question": "Who?"}],
    "docvqa_test": [{**DOC, "answers": None}],
    "infovqa": [DOC],
    "infovqa_test": [{**DOC, "answers": None}],
    "chartqa": [
        {"type": kind, "question": "How many?", "answer": "12%", "image": picture(colour)}
        for kind, colour in (("human_test", "red"), ("augmented_test", "blue"))
    ],
    "ocrvqa": [{"image": picture(), "questions": ["Who?", "What?"], "answers": ["Ann", "Yes"]}],
    "ai2d": [
        {"question": "Which?", "options": ["x", "y"], "answer": "1", "image": picture()},
    ],
    "aokvqa": [AOKVQA],
    "aokvqa_direct": [AOKVQA],
    "coco2014_val": [COCO, {**COCO, "question_id": "COCO_val2014_000000000043.jpg"}],
    "coco2017_val": [{**COCO, "question_id": "000000000042.jpg"}],
    "coco_karpathy": [
        {"filename": "COCO_val2014_000000000042.jpg", "sentences": ["A cat.", "a cat sits"]}
    ],
    "nocaps": [
        {
            "image": picture(), "image_id": 8, "image_file_name": "0a.jpg",
            "annotations_captions": ["a cat"],
        }
    ],
    "flickr30k": [
        {"image": picture(), "img_id": "8", "filename": "10.jpg", "caption": ["a cat", "cats"]}
    ],
}  # fmt: skip


def save(name: str, folder) -> None:
    """The set as it would lie on disk after a download."""
    rows = ROWS[name] if isinstance(ROWS[name], tuple) else (ROWS[name],)
    for (config, _), table in zip(HUB[name].parts, rows, strict=True):
        place = folder / config if config else folder
        datasets.Dataset.from_list(table).save_to_disk(str(place))


def right_answer(scorer: str, label) -> str:
    """What a model that knows everything would say."""
    if scorer in ("ten_answers", "vqav2", "anls"):
        return label["answers"][0]
    if scorer == "scienceqa":
        return "AB"[label["answer"]]
    if scorer == "ai2d":
        return "AB"[int(label["answer"])]
    if scorer == "aokvqa":
        return "ABCD"[label["correct_choice_idx"]]
    if scorer == "aokvqa_direct":
        return label["direct_answers"][0]
    if scorer == "captions":
        return label[0]
    answer = label if isinstance(label, str) else label["answer"]
    return answer[0] if isinstance(answer, list) else answer


FULL = {"mme": 200.0, "captions": None}


def test_the_table_knows_every_set():
    assert set(ROWS) == set(HUB)
    missing = {name for name in BENCHMARKS if not name.startswith("digits_")} - set(HUB)
    assert missing == {"llava_qa90"}  # its files come with LLaVA's repository


@pytest.mark.parametrize("name", HUB)
def test_a_prepared_set_is_read_and_scored(name, tmp_path):
    save(name, tmp_path / "hub")
    out = prepare(name, tmp_path / "eval", str(tmp_path / "hub"))
    loaded = load_benchmark(name, tmp_path / "eval")
    rows = ROWS[name][0] if isinstance(ROWS[name], tuple) else ROWS[name]
    assert len(loaded.questions) == (2 if name == "ocrvqa" else len(rows))
    assert all(question.text.endswith(_suffix(name, question)) for question in loaded.questions)
    if name != "coco_karpathy":  # its pictures come from elsewhere
        report = check_benchmark(name, tmp_path / "eval")
        counts = report.missing_images, report.broken_images, report.repeated_questions
        assert counts == (0, 0, 0)
        assert all("the full set has" in problem for problem in report.problems)
    with pytest.raises(ValueError, match="is there already"):
        prepare(name, tmp_path / "eval", str(tmp_path / "hub"))
    assert not list(out.folder.rglob("*.tmp"))
    if loaded.labels is None:
        with pytest.raises(ValueError, match="judge|server"):
            loaded.score([])
        return
    scorer = loaded.benchmark.scorer
    answers = [
        {"uid": q.uid, "text": right_answer(scorer, loaded.labels[q.uid])} for q in loaded.questions
    ]
    scores = loaded.score(answers)
    assert scores.n == len(loaded.questions)
    if scorer == "captions":
        assert scores.metrics["ROUGE_L"]["value"] == pytest.approx(100)
    else:
        assert scores.value == (200 if scorer == "mme" else 100)


def _suffix(name: str, question) -> str:
    if name.startswith("mmmu"):
        return (
            LETTER
            if question.meta["options"]
            else "\nAnswer the question using a single word or phrase."
        )
    return BENCHMARKS[name].suffix


def test_prepared_files_are_the_official_ones(tmp_path):
    for name in ("gqa", "mmbench", "textvqa_ocr", "mme", "seed_bench", "mmvet", "mmmu", "docvqa"):
        save(name, tmp_path / name)
        prepare(name, tmp_path / "eval", str(tmp_path / name))
    root = tmp_path / "eval"
    asked = json.loads((root / "gqa" / "llava_gqa_testdev_balanced.jsonl").read_text())
    assert asked == {
        "question_id": "201", "image": "n1.jpg", "category": "default",
        "text": "Is it red?\nAnswer the question using a single word or phrase.",
    }  # fmt: skip
    # Bytes as they came: the hub's table stores what was given to it, here a PNG.
    with Image.open(root / "gqa" / "data" / "images" / "n1.jpg") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    bench = load_benchmark("mmbench", root)
    assert bench.questions[0].text == f"Look.\nWhich?\nA. cat\nB. dog\nC. cow{LETTER}"
    assert bench.questions[1].meta["options"] == ["dog", "cat", "cow"]
    data = bench.questions[0].images[0].removeprefix("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (6, 4)
    text = load_benchmark("textvqa_ocr", root).questions[0].text
    assert text.startswith("what brand?\nReference OCR token: ACME, 12\nAnswer the question")
    notes = (root / "MME" / "MME_Benchmark_release_version" / "count" / "0001.txt").read_text()
    assert notes.splitlines()[1] == "Are there six cups? Please answer yes or no.\tNo"
    image, video = load_benchmark("seed_bench", root).questions
    assert (image.question_id, image.images) == (101, ("SEED-Bench-image/x1.png",))
    assert (video.question_id, video.images) == ("v7", ("SEED-Bench-video-image/10_v7.png",))
    with Image.open(root / "seed_bench" / video.images[0]) as frame:  # the middle one
        assert frame.getpixel((0, 0)) == (0, 128, 0)
    vet = load_benchmark("mmvet", root)
    reference = load_references(vet)[vet.questions[0].uid]
    assert reference["capabilities"] == ["ocr", "math"]
    two, one = load_benchmark("mmmu", root).questions
    assert (len(two.images), len(one.images)) == (2, 1)
    assert two.meta["subject"] == "Art_Theory"
    pages = {question.images for question in load_benchmark("docvqa", root).questions}
    assert len(pages) == 1  # one page asked about twice is one file


def test_columns_are_looked_at_first(tmp_path, capsys):
    rows = [{key: value for key, value in row.items() if key != "category"} for row in ROWS["mme"]]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "hub"))
    flags = ["--source", str(tmp_path / "hub"), "--data-root", str(tmp_path / "eval")]
    with pytest.raises(SystemExit) as exit_status:
        llava(["data", "prepare", "mme", *flags])
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert "columns category are missing; needed: question_id, image, question" in error
    assert "found: question_id, image, question, answer" in error
    assert not (tmp_path / "eval").exists()


def test_check_finds_what_goes_wrong_quietly(tmp_path, capsys):
    folder = tmp_path / "vizwiz"
    (folder / "val").mkdir(parents=True)
    names = [f"VizWiz_val_{place:08d}.jpg" for place in range(5)]
    for name in names[:4]:
        (folder / "val" / name).write_bytes(png())
    (folder / "val" / names[1]).write_bytes(png()[:50])
    (folder / "val" / names[2]).write_bytes(b"<html>not found</html>")
    lines = [{"question_id": i, "image": name, "text": "What?"} for i, name in enumerate(names)]
    lines.append(lines[0])
    questions = folder / "llava_val.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = [{"image": name, "answers": [{"answer": "x"}] * 10} for name in names]
    json_dump(folder / "val.json", entries)
    report_file = tmp_path / "report.json"
    flags = ["--data-root", str(tmp_path), "--json", str(report_file)]
    assert llava(["data", "check", "all", *flags]) == 1
    table = capsys.readouterr().out
    for problem in (
        "6 questions, the full set has 4319",
        "missing pictures: 1",
        "pictures that do not decode: 2",
        "questions that stand more than once: 1",
        "0 of 1 sets without a problem",
    ):
        assert problem in table
    (found,) = json.loads(report_file.read_text())["sets"]
    assert found["examples"]["missing_images"] == [names[4]]
    assert [name.split(":")[0] for name in found["examples"]["broken_images"]] == names[1:3]
    json_dump(folder / "val.json", entries[:3])
    assert llava(["data", "check", "vizwiz_val", *flags]) == 1
    assert "has no label for 2 questions" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_status:
        llava(["data", "check", "all", "--data-root", str(tmp_path / "nowhere")])
    assert exit_status.value.code == 2
