"""lmms-eval's own program over local data: its entry point, its POPE scorer, its requests.

The package is not among this one's requirements (its own ask for dozens of others):
``pip install -e ".[lmms]"`` and ``pip install --no-deps lmms-eval==0.7.3`` make these tests run,
which `scripts/test.sh` does. Without it they are skipped by name; with LLAVA_REQUIRE_LMMS=1 they
fail.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image, ImageFile
from places import ROOT

from llava.decoding import Decoding
from llava.digits.build import build_eval
from llava.eval.benchmarks import load_benchmark
from llava.eval.run import evaluate
from llava.model.builder import load_pretrained_model
from llava.prompting import build_prompt, prepare_batch

try:
    import datasets
    import lmms_eval
    from lmms_eval.api import task as harness_task
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import simple_parse_args_string

    from llava.eval.lmms_eval_models import (
        Llava,
        LlavaChat,
        Pictures,
        cut_until,
        marked_text,
        parts_of,
        picture_of,
        read_generation,
    )
except ModuleNotFoundError as error:
    if os.environ.get("LLAVA_REQUIRE_LMMS", "0") not in ("", "0"):
        raise
    pytest.skip(f"there is no {error.name}", allow_module_level=True)

MODEL = str(ROOT / "checkpoints" / "llava-digits")
PLAN = "pyramiddrop:layers=[2,4],ratios=[0.5,0.25]"
ASKED = 144


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Part of the digits POPE set, in LLaVA's layout and as a table of the hub's columns, with
    tasks over it: the harness's own scorer, and a multiple choice. Has folder and set."""
    folder = tmp_path_factory.mktemp("lmms")
    build_eval(folder, seed=11, sets=("pope",))
    found = load_benchmark("pope", folder / "eval" / "digits", limit=ASKED)
    rows = [
        {
            "question_id": question.question_id,
            "question": question.text,
            "answer": found.labels[question.uid],
            "image": str(found.image_folder / question.images[0]),
        }
        for question in found.questions
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "pope.parquet")
    tasks = folder / "tasks"
    tasks.mkdir()
    own = Path(lmms_eval.__file__).parent / "tasks" / "pope"
    data = f"""
dataset_path: parquet
dataset_name: null
dataset_kwargs: {{data_files: {{test: {folder / "pope.parquet"}}}}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
"""
    (tasks / "pope_local.yaml").write_text(f"include: {own}/pope.yaml\ntask: pope_local{data}")
    (tasks / "yes_or_no.yaml").write_text(f"""
task: yes_or_no{data}
test_split: test
output_type: multiple_choice
doc_to_visual: !function {own}/utils.pope_doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: ["yes", "no"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    return SimpleNamespace(folder=folder, set=found)


@pytest.fixture(scope="module")
def ours(local):
    """This package's answers and scores for the same questions, by plan."""
    tokenizer, model, processor, _ = load_pretrained_model(MODEL, device="cpu")
    return {
        plan: evaluate(model, tokenizer, processor, local.set, reduction=plan, batch_size=36)
        for plan in ("none", PLAN)
    }


def scores_of(result, dialect_scores):
    """The harness's two numbers and ours."""
    theirs = {name: result[f"pope_{name},none"] for name in ("accuracy", "f1_score")}
    metrics = dialect_scores.metrics
    own = {"accuracy": metrics["accuracy"]["value"], "f1_score": metrics["f1"]["value"]}
    return theirs, {name: pytest.approx(value / 100, abs=1e-12) for name, value in own.items()}


def check(result, samples, local, expected):
    """Same answers in the same order, and the same scores."""
    texts = [record["text"] for record in expected.answers]
    found = [sample["filtered_resps"] for sample in samples]  # texts in files, else in lists
    assert [one if isinstance(one, str) else one[0] for one in found] == texts
    theirs, own = scores_of(result, local.set.score(expected.answers, "lmms"))
    assert theirs == own
    assert 0.4 < theirs["accuracy"] < 1


@pytest.mark.slow
def test_their_program_finds_the_plugin_and_scores_as_we_do(local, ours, tmp_path):
    # The entry point as an installation writes it, from this checkout's own pyproject.toml.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (entry,) = re.findall(r'entry-points."lmms_eval.models"\]\nllava = "(.*)"', text)
    installed = tmp_path / "site" / "llava_plugin-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-plugin\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[lmms_eval.models]\nllava = {entry}\n")
    words = [
        sys.executable, "-m", "lmms_eval", "--model", "llava", "--batch_size", "36",
        "--model_args", f"pretrained={MODEL},device=cpu,reduction={PLAN.replace('],', '];')}",
        "--include_path", str(local.folder / "tasks"), "--tasks", "pope_local",
        "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    paths = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_DATASETS_OFFLINE": "1",
    }
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    (samples,) = (tmp_path / "out").rglob("*_samples_pope_local.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    check(json.loads(results.read_text())["results"]["pope_local"], found, local, ours[PLAN])


def run(model, local, task):
    """One task through the harness's own evaluator: its numbers and its samples."""
    own = TaskManager(include_path=str(local.folder / "tasks"), include_defaults=False)
    found = simple_evaluate(model=model, tasks=[task], task_manager=own, log_samples=True)
    return found["results"][task], found["samples"][task]


@pytest.mark.parametrize("kind", [Llava, LlavaChat])
def test_both_kinds_of_requests_ask_what_we_ask(local, ours, kind):
    model = kind(MODEL, device="cpu", batch_size="36", reduction="none")
    pictures = len({question.images for question in local.set.questions})
    with mock.patch.object(Pictures, "open", autospec=True, side_effect=Pictures.open) as opened:
        check(*run(model, local, "pope_local"), local, ours["none"])
    # Questions about one picture are answered together.
    assert pictures <= opened.call_count < 2 * pictures < ASKED / 4


@pytest.mark.parametrize("plan", ["none", PLAN])
def test_likelihoods_are_those_of_the_answers(local, ours, plan):
    """Multiple choice takes the answer that greedy search writes; for the rest see the loss."""
    model = Llava(MODEL, device="cpu", batch_size=36, reduction=plan.replace("],", "];"))
    result, samples = run(model, local, "yes_or_no")
    texts = [record["text"] for record in ours[plan].answers]
    greedy = [[bool(flag) for _, flag in sample["filtered_resps"]] for sample in samples]
    assert greedy == [[text == "yes", text == "no"] for text in texts]
    right = ours[plan].scores.metrics["accuracy"]["value"]
    assert result["acc,none"] == pytest.approx(right / 100)


def test_a_likelihood_is_the_mean_loss_of_the_continuation_and_its_end():
    tokenizer, model, processor, _ = load_pretrained_model(MODEL, device="cpu")
    picture = Image.effect_noise((112, 112), 80).convert("RGB")
    asked, wanted = "What is shown?", ("red", "the red digit is at the top")
    llava = Llava(MODEL, device="cpu", batch_size=2)
    llava.task_dict["t"] = {"test": [{}]}
    requests = [
        SimpleNamespace(args=(asked, f" {text}", lambda doc: [picture], 0, "t", "test"))
        for text in wanted
    ]
    found = [result.text[0] for result in llava.loglikelihood(requests)]
    for text, loss in zip(wanted, found, strict=True):
        opened, closed = (
            build_prompt(asked, "mistral_instruct", 1, answer=answer) for answer in (None, text)
        )
        start = prepare_batch(tokenizer, processor, model.config, [opened], [picture])
        batch = prepare_batch(tokenizer, processor, model.config, [closed], [picture])
        labels = batch["input_ids"].clone()
        labels[:, : start["input_ids"].shape[1]] = -100
        assert (labels != -100).sum() >= 2
        with torch.inference_mode():
            assert loss == pytest.approx(float(model(**batch, labels=labels).loss), abs=1e-5)
    short = SimpleNamespace(args=("", "red"))
    with pytest.raises(ValueError, match="acc_mutual_info"):
        llava.loglikelihood([short])
    with pytest.raises(NotImplementedError, match="several rounds"):
        llava.generate_until_multi_round(requests)


def test_pictures_beyond_memory_are_asked_for_again():
    pictures = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (1, 2, 1)]
    held = Pictures(room=50)
    names = held.add(pictures, lambda: pictures)
    assert names[0] == names[2] != names[1]
    assert list(held.held) == [names[0]]
    assert [held.open(name).tobytes() for name in names] == [p.tobytes() for p in pictures]


def test_cut_off_pictures_are_shown_where_the_harness_says_so(tmp_path, monkeypatch):
    """Its NoCaps has one; whether Pillow takes it is the harness's to say, and it does."""
    assert "ImageFile.LOAD_TRUNCATED_IMAGES = True" in inspect.getsource(harness_task)
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 80).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    for taken in (True, False):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", taken)
        for visual in (str(path), Image.open(path)):
            if taken:
                assert picture_of(visual).size == (64, 64)
            else:
                with pytest.raises((ValueError, OSError), match="truncated"):
                    picture_of(visual)


def test_generation_options_are_honoured_or_refused():
    built_in = {"until": ["\n\n"], "max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0,
                "num_beams": 1, "do_sample": False, "image_aspect_ratio": "original"}  # fmt: skip
    assert read_generation(built_in) == (Decoding(128), ("\n\n",))
    assert read_generation({}) == (Decoding(1024), ())
    assert read_generation({"do_sample": True, "until": "a"}) == (Decoding(1024, 1.0), ("a",))
    sampled = {"temperature": 0.2, "top_p": 0.9, "num_beams": 3}
    assert read_generation(sampled)[0] == Decoding(1024, 0.2, 0.9, 3)
    assert read_generation({"temperature": 0.7, "do_sample": False, "top_k": 1, "seed": 0,
                            "repetition_penalty": 1.0})[0] == Decoding(1024)  # fmt: skip
    for refused in ({"repetition_penalty": 1.2}, {"temperature": 1, "top_k": 5}, {"nosuch": 1}):
        with pytest.raises(ValueError, match=list(refused)[-1]):
            read_generation(refused)
    assert cut_until("a b\n\nc", ("c", "\n\n")) == "a b"


def test_until_and_length_reach_the_answer(local, ours):
    question = local.set.questions[0]
    picture = Image.open(local.set.image_folder / question.images[0])
    model = Llava(MODEL, device="cpu", batch_size="auto")
    model.task_dict["t"] = {"test": [{}]}

    def answer(**options):
        args = (question.text, options, lambda doc: [picture], 0, "t", "test")
        (result,) = model.generate_until([SimpleNamespace(args=args)])
        return result.text, result.token_counts.output_tokens

    whole = ours["none"].answers[0]["text"]
    assert answer() == (whole, ours["none"].answers[0]["n_out"])
    assert answer(until=[whole[-1:]])[0] == whole[:-1]
    assert answer(max_new_tokens=1)[1] == 1


def test_arguments_are_refused_by_name():
    for more, says in (
        ({"reduktion": "none"}, "reduktion.*accepted: pretrained, batch_size, reduction"),
        ({"reduction": "fastv:k=2", "r": 0.5}, 'unknown r;.*";" for ","'),
        ({"reduction": "nosuch"}, "nosuch"),
        ({"layer_list": "[8,16]"}, "belong together"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
    ):
        with pytest.raises(ValueError, match=says):
            Llava("not-looked-at", **more)
    words = 'pretrained=m,reduction="fastv:k=2,r=0.5",layer_list=[1,2]'
    assert simple_parse_args_string(words)["layer_list"] == "[1,2]"
    with pytest.raises(ValueError, match="exclude each other"):
        Llava.create_from_arg_string(words)


def test_messages_become_one_turn():
    picture = Image.new("RGB", (4, 4))
    shown, said = {"type": "image", "url": picture}, [{"type": "text", "text": t} for t in "ab"]

    def text(*content):
        return marked_text(parts_of([{"role": "user", "content": list(content)}]))

    assert text(shown, shown, said[0]) == "a"  # in front: marks come with the prompt
    assert text(said[0], shown, said[1]) == "a\n<image>\nb"
    assert text(shown, {"type": "text", "text": "x <image> y"}) == "x <image> y"
    assert parts_of([{"role": "user", "content": "a"}]) == [("text", "a")]
    for messages, says in (
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "system"),
        ([{"role": "user", "content": [{"type": "video", "url": "v"}]}], "video"),
    ):
        with pytest.raises(ValueError, match=says):
            parts_of(messages)
