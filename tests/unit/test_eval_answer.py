"""The answer loop with a stand-in model: records, batches, lengths, files, messages.

The stand-in answers from what it is given (colour of each picture, number of real tokens), so a
picture or a mask in the wrong place changes an answer.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from places import DATA
from transformers import AutoTokenizer

from llava.decoding import Decoding
from llava.eval import answer_file as answer_module
from llava.eval import auto_batch, model_vqa_mmbench, model_vqa_science
from llava.eval import run as run_module
from llava.eval.answer import answer_questions
from llava.eval.answer_file import main
from llava.eval.batches import common_prefix, plan_batches
from llava.eval.benchmarks import load_benchmark, resolve_names
from llava.eval.layouts import LETTER, LETTER_CN
from llava.eval.merge import main as merge_main
from llava.eval.questions import Question, read_questions
from llava.eval.run_folder import RunFolder
from llava.eval.score import main as score_main
from llava.mm_utils import clip_image_processor_class
from llava.model.multimodal_prep import Splicer
from llava.prompting import build_prompt, tokenize_prompt
from llava.reduction import ReductionPlan

COLOURS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250)}
PLAN = "pyramiddrop:layers=[1,2],ratios=[0.5,0.25]"


@pytest.fixture(scope="module")
def tokenizer():
    folder = DATA / "pyramiddrop" / "preprocess" / "tokenizer_nonlegacy"
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor():
    size = {"height": 28, "width": 28}
    return clip_image_processor_class()(size={"shortest_edge": 28}, crop_size=size)


class Model:
    """Says the colour of each of a question's pictures, then its number of tokens.

    It takes what the generator gives a real model: ids, pictures, `Splicer`'s table and prefixes.
    """

    device, dtype = "cpu", torch.float32

    def __init__(self, tokenizer, context_length=512, **config):
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(
            image_aspect_ratio="pad",
            num_hidden_layers=4,
            num_attention_heads=2,
            hidden_size=8,
            intermediate_size=8,
            vocab_size=len(tokenizer),
            visual_token_reduction=None,
            conv_mode="v1",
        )
        vars(self.config).update(config)
        self.splicer = Splicer(self.config, 4, 2, 28, context_length)
        self.calls = []

    def eval(self):
        return self

    def get_vision_tower(self):
        return None

    def build_sequence(self, ids, images, splice, kind):
        assert kind == splice.layout.kind == "left"
        assert len(ids) == len(splice.shown)
        real = [int(group) for group in splice.layout.lengths]
        words = [[colour(images[i]) for i in shown] for shown in splice.shown]
        marks = [3 * len(shown) for shown in splice.shown]  # a mark becomes four tokens
        return [(own, n - more) for own, n, more in zip(words, real, marks, strict=True)]

    def encode_prefix(self, sequence, plan, *, questions, room):
        assert len(questions) == len(sequence)
        owners = [row for row, count in enumerate(questions) for _ in range(count)]
        return SimpleNamespace(rows=[sequence[row] for row in owners], depth=2, room=room)

    def build_suffixes(self, ids, mask):
        assert (mask[:, 0] == 1).all(), "padded on the wrong side"
        return [([], int(row.sum())) for row in mask]

    def generate(self, sequence, prefix, reduction, stopping_criteria, **kwargs):
        assert not torch.is_grad_enabled()
        (first_token,) = stopping_criteria
        assert not first_token(torch.zeros(len(sequence), 1), None).any()
        heads = [([], 0)] * len(sequence) if prefix is None else prefix.rows
        assert prefix is None or prefix.room == max(n for _, n in sequence)
        self.calls.append(
            SimpleNamespace(rows=len(sequence), reduction=reduction, shared=prefix, **kwargs)
        )
        rows = []
        for (seen, before), (more, behind) in zip(heads, sequence, strict=True):
            text = " ".join([*seen, *more, str(before + behind)])
            ids = self.tokenizer(text).input_ids[1:]
            rows.append((ids + [self.tokenizer.eos_token_id])[: kwargs["max_new_tokens"]])
        width = max(map(len, rows))
        pad = kwargs["pad_token_id"]
        return torch.tensor([r + [pad] * (width - len(r)) for r in rows])


def colour(pixels):
    channel = pixels.mean((1, 2))
    return "grey" if channel.abs().max() < 0.1 else list(COLOURS)[int(channel.argmax())]


@pytest.fixture
def folder(tmp_path):
    """Pictures, a question file of 7 mixed questions, and the answers they should get."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (28, 28), colour).save(tmp_path / f"{name}.png")
    asked = [
        ("red.png", "What colour is this?"),
        (None, "Hello, who are you and why?"),
        (["blue.png", "green.png"], "Which two?"),
        ("green.png", "Short?"),
        (["red.png", "red.png", "blue.png"], "A question that is somewhat longer than others."),
        ("green.png", "What?"),
        (None, "Hi"),
    ]
    with open(tmp_path / "q.jsonl", "w") as file:
        for number, (image, text) in enumerate(asked):
            record = {"question_id": number // 2, "text": text}
            file.write(json.dumps(record if image is None else {**record, "image": image}) + "\n")
    return tmp_path


def expected(questions, tokenizer, grey=False):
    texts = []
    for q in questions:
        words = ["grey" if grey else image.removesuffix(".png") for image in q.images]
        prompt = build_prompt(q.text, "v1", len(q.images))
        texts.append(" ".join([*words, str(len(tokenize_prompt(prompt, tokenizer)))]))
    return texts


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("share", [True, False])
def test_answers_do_not_depend_on_the_batch(folder, tokenizer, processor, batch_size, share):
    """Every question gets its own pictures and its own words, whatever it stands with."""
    model, questions = Model(tokenizer), read_questions(folder / "q.jsonl")
    records = answer_questions(
        model, tokenizer, processor, questions,
        image_folder=folder, batch_size=batch_size, model_id="m", share=share, workers=share,
    )  # fmt: skip
    assert [r["text"] for r in records] == expected(questions, tokenizer)
    assert max(call.rows for call in model.calls) <= batch_size
    assert sum(call.rows for call in model.calls) == 7
    # Two questions are about the green picture.
    assert any(call.shared for call in model.calls) == (share and batch_size > 1)


def test_a_picture_with_too_many_questions_is_split(tokenizer):
    asked = [Question(f"s:{i}:0", i, "x" * (9 - i), ("a.png",)) for i in range(7)]
    asked += [Question("s:7:0", 7, "longest of all", ("b.png",)), Question("s:8:0", 8, "y")]
    batches = plan_batches(asked, 3)
    assert [batch.pictures for batch in batches] == [
        ((7,), (0, 1)), ((2, 3),), ((4, 5, 6),), ((8,),),
    ]  # fmt: skip
    assert batches == plan_batches(asked, 3)
    assert [batch.number for batch in batches] == [0, 1, 2, 3]
    tall = plan_batches(asked, 9, lambda q: 5 if q.images == ("a.png",) else 1)
    assert [batch.pictures for batch in tall] == [(tuple(range(7)), (7,), (8,))]


@pytest.mark.parametrize(
    ("rows", "length"),
    [([[1, 2, 3]], 2), ([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 4]], 1), ([[1], [2]], 0)],
)
def test_what_prompts_have_in_common_leaves_each_a_token(rows, length):
    assert common_prefix(rows) == length


def test_a_picture_inside_the_question_is_not_shared(folder, tokenizer, processor):
    """What the prompts have in common ends in front of the picture: whole prompts, one tower."""
    text = ["Which one? <image>", "Whose is <image> this?"]
    asked = [Question(f"s:{i}:0", i, each, ("red.png",)) for i, each in enumerate(text)]
    model = Model(tokenizer)
    records = answer_questions(model, tokenizer, processor, asked, image_folder=folder)
    assert [call.shared for call in model.calls] == [None]
    assert [record["text"].split()[0] for record in records] == ["red", "red"]


def test_record_has_llavas_keys(folder, tokenizer, processor):
    questions = read_questions(folder / "q.jsonl")
    kwargs = {"image_folder": folder, "model_id": "m"}
    model = Model(tokenizer)
    first, *rest = answer_questions(model, tokenizer, processor, questions, **kwargs)
    mmbench = dataclasses.replace(questions[0], meta={"round_id": 0, "options": ["a"], "no": 1})
    (extended,) = answer_questions(model, tokenizer, processor, [mmbench], **kwargs)
    assert (extended["round_id"], extended["options"]) == (0, ["a"])
    assert "no" not in extended
    assert {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} < set(first)
    assert set(first) - set(rest[0]) == set()
    assert first["v"] == 1
    assert first["uid"] == questions[0].uid
    assert first["n_visual"] == {"in": 4, "layers": []}
    assert first["latency_ms"] > 0
    assert (first["question_id"], first["prompt"]) == (0, "What colour is this?")
    assert (first["model_id"], first["metadata"], first["finish"]) == ("m", {}, "eos")
    assert first["n_out"] == len(tokenizer(first["text"]).input_ids)  # its BOS stands for the EOS
    again = answer_questions(model, tokenizer, processor, questions, **kwargs)
    other = answer_questions(model, tokenizer, processor, questions, reduction=PLAN, **kwargs)
    assert other[0]["n_visual"] == {"in": 4, "layers": [[1, 2], [2, 1]]}
    ids = {r["answer_id"] for r in [first, *rest]}
    assert len(ids) == 7
    assert {r["answer_id"] for r in again} == ids
    assert not {r["answer_id"] for r in other} & ids


def test_an_answer_that_was_cut_says_so(folder, tokenizer, processor):
    record, *_ = answer_questions(
        Model(tokenizer), tokenizer, processor, read_questions(folder / "q.jsonl"),
        image_folder=folder, max_new_tokens=2,
    )  # fmt: skip
    assert (record["finish"], record["n_out"]) == ("length", 2)


def test_blind_shows_grey_only(folder, tokenizer, processor):
    questions = read_questions(folder / "q.jsonl")
    records = answer_questions(
        Model(tokenizer), tokenizer, processor, questions, image_folder=folder, blind=True
    )
    assert [r["text"] for r in records] == expected(questions, tokenizer, grey=True)


@pytest.mark.parametrize(
    ("stored", "asked", "plan"),
    [
        (None, None, "none"),
        (PLAN, None, PLAN),
        (PLAN, "none", "none"),
        (None, ReductionPlan.parse(PLAN), PLAN),
    ],
)
def test_which_plan_is_run(folder, tokenizer, processor, stored, asked, plan):
    stored = ReductionPlan.parse(stored).to_dict() if stored else None
    model = Model(tokenizer, visual_token_reduction=stored)
    answer_questions(
        model, tokenizer, processor, read_questions(folder / "q.jsonl"),
        image_folder=folder, reduction=asked,
    )  # fmt: skip
    assert {str(call.reduction) for call in model.calls} == {plan}


def test_decoding_reaches_generate(folder, tokenizer, processor):
    model = Model(tokenizer)
    beams = Decoding(9, temperature=0.2, top_p=0.9, num_beams=2)
    for decoding in (Decoding(), beams, Decoding(temperature=0.2, top_p=0.9)):
        answer_questions(
            model, tokenizer, processor, read_questions(folder / "q.jsonl")[:1],
            image_folder=folder, decoding=decoding,
        )  # fmt: skip
    greedy, sampled, own = model.calls
    assert own.do_sample is False
    (sampler,) = own.logits_processor
    assert (sampler.temperature, sampler.top_p.top_p) == (0.2, 0.9)
    assert (greedy.do_sample, greedy.num_beams, greedy.max_new_tokens) == (False, 1, 128)
    assert not hasattr(greedy, "temperature")
    assert (sampled.do_sample, sampled.temperature, sampled.top_p) == (True, 0.2, 0.9)
    for wrong in (
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"num_beams": 0},
        {"top_p": 2.0},
        {"temperature": float("nan")},
    ):
        with pytest.raises(ValueError, match="accepted"):
            Decoding(**wrong)


def test_a_prompt_that_does_not_fit_is_named(folder, tokenizer, processor):
    model = Model(tokenizer, context_length=60)
    questions = read_questions(folder / "q.jsonl")
    with pytest.raises(ValueError, match=r"question 2: the prompt has \d+ tokens \(12 of them"):
        answer_questions(model, tokenizer, processor, questions, image_folder=folder)
    assert model.calls == []


def test_wrong_settings_are_refused_before_anything_runs(folder, tokenizer, processor):
    model, questions = Model(tokenizer), read_questions(folder / "q.jsonl")
    rest = (model, tokenizer, processor, questions)
    plan = "pyramiddrop:layers=[9],ratios=[0.5]"
    with pytest.raises(ValueError, match="layer 9"):
        answer_questions(*rest, image_folder=folder, reduction=plan)
    with pytest.raises(ValueError, match="batch size is 0"):
        answer_questions(*rest, image_folder=folder, batch_size=0)
    with pytest.raises(ValueError, match="unknown conversation template"):
        answer_questions(*rest, image_folder=folder, conv_mode="v9")
    with pytest.raises(FileNotFoundError, match=r"red\.png"):
        answer_questions(*rest, image_folder=folder / "elsewhere")
    assert model.calls == []


# --- command lines -------------------------------------------------------------------------------
@pytest.fixture
def shipped(monkeypatch, tokenizer, processor):
    """Command lines load the stand-in model."""
    model = Model(tokenizer)
    loaded = (tokenizer, model, processor, "tiny")
    for module in (answer_module, run_module):
        monkeypatch.setattr(module, "load_from_flags", lambda args, ranks: loaded)
    return model


def flags(folder, *more: str) -> list[str]:
    return [
        "--model-path", "tiny", "--image-folder", str(folder),
        "--question-file", str(folder / "q.jsonl"),
        "--answers-file", str(folder / "out" / "a.jsonl"), "--batch-size", "3", *more,
    ]  # fmt: skip


def test_main_writes_chunks_that_make_the_whole(folder, shipped, tokenizer, capsys):
    texts = []
    for chunk in range(3):
        path, part = folder / "out" / f"3_{chunk}.jsonl", ["--num-chunks", "3"]
        argv = flags(folder, *part, "--chunk-idx", str(chunk), "--answers-file", str(path))
        assert main(argv) == 0
        lines = path.read_text().splitlines()
        texts += [json.loads(line)["text"] for line in lines]
    assert texts == expected(read_questions(folder / "q.jsonl"), tokenizer)
    # The same command again has nothing to do; another one does not write over its answers.
    shipped.calls.clear()
    assert main(argv) == 0
    assert shipped.calls == []
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--blind"])
    assert stop.value.code == 2
    assert "blind: False there, True asked" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_auto_takes_what_fits_and_writes_it_down(folder, shipped, monkeypatch, capsys):
    """Halved on a full device before anything is answered; restarts and other machines keep it."""
    room, generate = 3, shipped.generate

    def full(sequence, **kwargs):
        if len(sequence) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(sequence=sequence, **kwargs)

    monkeypatch.setattr(shipped, "generate", full)
    monkeypatch.setattr(auto_batch, "tells_when_full", lambda device: True)
    argv = flags(folder, "--batch-size", "auto")
    out = folder / "out" / "a.jsonl"
    shards = folder / "out" / "a.jsonl.run" / "shards"
    assert main(argv) == 0
    probe, *answering = [call.rows for call in shipped.calls]
    assert (probe, max(answering), sum(answering)) == (2, 2, 7)  # 64, ..., 4 did not fit
    run = json.loads((shards.parent / "run.json").read_text())
    assert (run["batch_size"], run["batch_size_found"]) == ("auto", 2)
    whole = out.read_bytes()
    # A run that lost its answers goes on with the same batches where more would fit.
    (shards / "answers.rank0000.of0001.jsonl").unlink()
    out.unlink()
    room = 64
    shipped.calls.clear()
    assert main(argv) == 0
    assert [call.rows for call in shipped.calls] == answering
    texts = [[json.loads(line)["text"] for line in each.splitlines()]
             for each in (whole, out.read_bytes())]  # fmt: skip
    assert texts[0] == texts[1] == expected(read_questions(folder / "q.jsonl"), shipped.tokenizer)
    # The first process decides for all.
    assert RunFolder.at(shards.parent).batch_size(lambda: 16) == 2
    # A size that was asked for and does not fit ends in one line.
    room = 1
    for more, says in ((["3"], "3 questions together need more"), (["auto"], None)):
        with pytest.raises(SystemExit) if says else contextlib.nullcontext():
            main(flags(folder, "--answers-file", str(folder / "b.jsonl"), "--batch-size", *more))
        assert (says or "") in capsys.readouterr().err
        shutil.rmtree(folder / "b.jsonl.run")
    room = 0
    with pytest.raises(SystemExit):
        main(flags(folder, "--answers-file", str(folder / "c.jsonl"), "--batch-size", "auto"))
    assert "too small for one question" in capsys.readouterr().err


def test_main_takes_the_flags_of_old_scripts(folder, shipped):
    old = [
        "--temperature", "0", "--conv-mode", "vicuna_v1", "--max_new_tokens", "5",
        "--layer_list", "[1,2]", "--image_token_ratio_list", "[0.5,0.25]", "--pdrop_infer", "True",
        "--num_beams", "1", "--model-base", "x", "--top_p", "0.5",
    ]  # fmt: skip
    assert main(flags(folder, *old)) == 0
    assert {str(call.reduction) for call in shipped.calls} == {PLAN}
    assert {call.max_new_tokens for call in shipped.calls} == {5}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--question-file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--reduction", "nonsense"], "nonsense"),
        (["--layer_list", "[2,1]", "--image_token_ratio_list", "[0.5,0.25]"], "rising"),
        (["--layer_list", "[1]"], "give both"),
        (["--num-chunks", "2", "--chunk-idx", "2"], "chunk"),
        (["--limit", "0"], "limit is 0"),
        (["--max_new_tokens", "0"], "max_new_tokens"),
        (["--image-folder", "nowhere"], "red.png"),
    ],
)
def test_main_refuses_bad_input_in_one_line(folder, shipped, capsys, more, says):
    with pytest.raises(SystemExit) as stop:
        main(flags(folder, *more))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert shipped.calls == []
    assert not (folder / "out").exists()


def test_a_damaged_picture_leaves_no_answers_file(folder, shipped, capsys):
    (folder / "blue.png").write_bytes((folder / "blue.png").read_bytes()[:40])
    with pytest.raises(SystemExit) as stop:
        main(flags(folder))
    assert stop.value.code == 2
    assert "blue.png" in capsys.readouterr().err
    assert not (folder / "out" / "a.jsonl").exists()


def test_scienceqa_under_its_old_name(folder, shipped):
    turns = [
        {"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"},
        {"from": "gpt", "value": "A"},
    ]
    asked = [
        {"id": "4", "image": "red.png", "conversations": turns},
        {"id": "12", "conversations": [{"from": "human", "value": "Why?\nA. x"}, turns[1]]},
    ]
    (folder / "q.json").write_text(json.dumps(asked))
    old = ["--question-file", str(folder / "q.json"), "--answer-prompter"]
    for more, suffix, mode in (
        (["--single-pred-prompt", "--conv-mode", "vicuna_v1"], LETTER, "vicuna_v1"),
        (["--answers-file", str(folder / "plain.jsonl")], "", "llava_v0"),
    ):
        argv = flags(folder, *old, *more)
        assert model_vqa_science.main(argv) == 0
        out = Path(argv[len(argv) - 1 - argv[::-1].index("--answers-file") + 1])
        first, second = (json.loads(line) for line in out.read_text().splitlines())
        assert [first["question_id"], second["question_id"]] == ["4", "12"]
        assert first["prompt"] == f"<image>\nWhich?\nA. x\nB. y{suffix}"
        assert second["prompt"] == f"Why?\nA. x{suffix}"
        assert first["text"].startswith("red ")
        settings = json.loads((out.parent / f"{out.name}.run" / "run.json").read_text())
        assert settings["conv_mode"] == mode
        assert {call.max_new_tokens for call in shipped.calls} == {1024}


def test_mmbench_under_its_old_name(folder, shipped):
    picture = base64.b64encode((folder / "red.png").read_bytes()).decode()
    table = folder / "mmbench.tsv"
    table.write_text(
        "index\tquestion\thint\tA\tB\tC\tanswer\timage\n"
        f"7\tWhich?\tLook.\tx\ty\tNone\tA\t{picture}\n9\tAnd?\t\tp\tq\t\tB\t7\n"
    )

    def answers(*more):
        name = f"{len(list(folder.glob('*.jsonl')))}.jsonl"
        path = ["--question-file", str(table), "--answers-file", str(folder / name)]
        assert model_vqa_mmbench.main(flags(folder, *path, *more)) == 0
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    asked = "Look.\nWhich?\nA. x\nB. y\nC. None"
    for lang, suffix in (("en", LETTER), ("cn", LETTER_CN)):
        first, second = answers("--single-pred-prompt", "--lang", lang)
        keys = ["question_id", "round_id", "prompt", "options", "option_char"]
        assert [first[key] for key in keys] == [7, 0, asked, ["x", "y", "None"], ["A", "B", "C"]]
        assert second["prompt"] == "And?\nA. p\nB. q"
        # The sentence was asked all the same: the stand-in counts tokens.
        prompt = build_prompt(asked + suffix, "v1")
        assert first["text"] == f"red {len(tokenize_prompt(prompt, shipped.tokenizer))}"
    rounds = answers("--all-rounds")
    assert [record["question_id"] for record in rounds] == [7, 7, 7, 9, 9]
    assert [record["round_id"] for record in rounds] == [0, 1, 2, 0, 1]
    assert rounds[1]["prompt"] == "Look.\nWhich?\nA. y\nB. None\nC. x"
    assert rounds[1]["options"] == ["y", "None", "x"]
    assert rounds[1]["option_char"] == ["B", "C", "A"]
    assert len({record["uid"] for record in rounds}) == 5


def test_llava_score_reads_what_llava_answer_wrote(folder, data_root, shipped, capsys):
    """The same questions under another set's name: uids agree but for the name."""
    place = data_root / "digits" / "vqav2"
    loaded = load_benchmark("digits_vqav2", data_root)
    out = folder / "a.jsonl"
    asked = ["--question-file", str(loaded.question_file), "--answers-file", str(out)]
    assert main(flags(folder, *asked, "--image-folder", str(loaded.image_folder))) == 0
    (name,) = {json.loads(line)["uid"].split(":")[0] for line in out.read_text().splitlines()}
    assert name == loaded.question_file.stem != "digits_vqav2"
    argv = [str(out), "--benchmark", "digits_vqav2", "--data-root", str(data_root)]
    assert score_main(argv) == 0
    assert place.is_dir()
    # An edited question no longer has that answer.
    text = loaded.question_file.read_text()
    loaded.question_file.write_text(text.replace("colour", "shape", 1))
    with pytest.raises(SystemExit) as stop:
        score_main(argv)
    assert stop.value.code == 2
    assert "another question file" in capsys.readouterr().err


# --- benchmarks ----------------------------------------------------------------------------------
@pytest.fixture
def data_root(folder):
    """A data root with one benchmark in the layout of the table, made of the pictures above."""
    place = folder / "root" / "digits" / "vqav2"
    (place / "val2014").mkdir(parents=True)
    questions, labels = [], []
    for i in range(6):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (28, 28), COLOURS[name]).save(place / "val2014" / f"{name}.png")
        text = ["What?", "Which colour is this?"][i % 2]
        ids = tokenize_prompt(build_prompt(text, "v1"), shipped_tokenizer())
        right = f"{name} {len(ids)}." if i else "wrong"
        questions.append({"question_id": i, "image": f"{name}.png", "text": text})
        labels.append({"question_id": i, "answer": right})
    for file, rows in (("llava_vqav2_mscoco_val2014.jsonl", questions), ("labels.jsonl", labels)):
        (place / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "root"


def shipped_tokenizer():
    folder = DATA / "pyramiddrop" / "preprocess" / "tokenizer_nonlegacy"
    return AutoTokenizer.from_pretrained(folder)


def test_llava_eval_scores_and_writes(data_root, tmp_path, shipped, capsys):
    out, results = tmp_path / "rows.json", tmp_path / "results"
    argv = [
        "digits_vqav2", "--model-path", "tiny", "--data-root", str(data_root),
        "--results", str(results), "--json", str(out), "--reduction", PLAN, "--batch-size", "4",
    ]  # fmt: skip
    assert run_module.main(argv) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["accuracy"] == pytest.approx(100 * 5 / 6)
    assert 0 <= row["low"] < row["accuracy"] <= row["high"] <= 100
    assert (row["set"], row["plan"], row["plan_source"]) == ("digits_vqav2", PLAN, "flag")
    assert (row["checkpoint"], row["n"], row["n_missing"]) == ("tiny", 6, 0)
    (run,) = (results / "digits_vqav2").iterdir()
    assert run.name.startswith("tiny-pyramiddrop-")
    names = {"run.json", "shards", "answers.jsonl", "scores.json"}
    assert {p.name for p in run.iterdir()} == names
    scores = json.loads((run / "scores.json").read_text())
    assert [item["score"] for item in scores["per_item"]] == [0, 1, 1, 1, 1, 1]
    settings = json.loads((run / "run.json").read_text())
    assert settings["conv_mode"] == "v1"
    assert len(settings["questions_sha256"]) == 64
    assert "accuracy 83.33 [" in capsys.readouterr().out
    # The same settings are the same run, others are another.
    run_module.main(argv)
    assert len(list((results / "digits_vqav2").iterdir())) == 1
    run_module.main([*argv, "--blind"])
    assert len(list((results / "digits_vqav2").iterdir())) == 2


def test_bad_input_is_one_line_and_writes_over_nothing(
    data_root, tmp_path, shipped, capsys, monkeypatch
):
    results, place = tmp_path / "results", data_root / "digits" / "vqav2"
    argv = [
        "digits_vqav2", "--model-path", "tiny", "--data-root", str(data_root),
        "--results", str(results), "--batch-size", "2",
    ]  # fmt: skip

    def refused(command, argv, says):
        before = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
        with pytest.raises(SystemExit) as stop:
            command(argv)
        assert stop.value.code == 2
        err = capsys.readouterr().err.splitlines()
        assert says in err[-1], err
        assert "Traceback" not in "".join(err)
        assert before == {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}

    refused(run_module.main, ["nosuch", *argv[1:]], "unknown benchmark 'nosuch'")
    picture = place / "val2014" / "red.png"
    data = picture.read_bytes()
    picture.unlink()
    refused(run_module.main, argv, "red.png")
    assert not results.exists()
    picture.write_bytes(data)

    # One of two processes: its part is there, and is no run that could be scored.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_module.main(argv)
    (run,) = (results / "digits_vqav2").iterdir()
    assert not (run / "answers.jsonl").exists()
    refused(score_main, [str(run)], "missing")
    refused(merge_main, [str(run)], "have no answer")
    partial = tmp_path / "partial.json"
    assert score_main([str(run), "--allow-missing", "--json", str(partial)]) == 0
    assert json.loads(partial.read_text())["n_missing"] == 4
    # A torn last line is cut off by the process that wrote it, and its batch answered again.
    (shard,) = run.glob("shards/answers.*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    run_module.main(argv)
    assert shard.read_bytes().count(b"\n") >= whole.count(b"\n")
    monkeypatch.delenv("RANK")
    run_module.main(argv)
    assert json.loads((run / "scores.json").read_text())["n_missing"] == 0
    lines = (run / "answers.jsonl").read_text().splitlines()
    assert len({json.loads(line)["uid"] for line in lines}) == len(lines) == 6

    # The question file has changed since: other questions, so another run, and no score of this.
    asked = (place / "llava_vqav2_mscoco_val2014.jsonl").read_text()
    changed = asked.replace("What?", "Which?")
    (place / "llava_vqav2_mscoco_val2014.jsonl").write_text(changed)
    refused(score_main, [str(run)], "the answers belong to another question file")
    run_module.main(argv)
    assert len(list((results / "digits_vqav2").iterdir())) == 2


def test_benchmark_files_are_checked(data_root):
    place = data_root / "digits" / "vqav2"
    assert len(load_benchmark("digits_vqav2", data_root, limit=2).questions) == 2
    with pytest.raises(FileNotFoundError, match=r"digits_gqa.*llava digits"):
        load_benchmark("digits_gqa", data_root)
    with pytest.raises(ValueError, match="limit is 0"):
        load_benchmark("digits_vqav2", data_root, limit=0)
    lines = (place / "labels.jsonl").read_text().splitlines()
    (place / "labels.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match=r"labels\.jsonl:1: .*order"):
        load_benchmark("digits_vqav2", data_root)
    (place / "labels.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="5 labels for 6 questions"):
        load_benchmark("digits_vqav2", data_root)


def test_benchmark_names():
    assert resolve_names(["digits_gqa", "digits"])[:2] == ["digits_gqa", "digits_vqav2"]
    assert len(resolve_names(["digits", "digits_pope"])) == 5
    with pytest.raises(ValueError, match=r"'pop'.*digits_pope"):
        resolve_names(["pop"])
