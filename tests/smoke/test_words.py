"""Simignore from a question file to answers, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from llava.cli import main
from llava.model.builder import load_pretrained_model
from llava.prompting import build_prompt, prepare_batch

QUESTIONS = (
    ("Which digit is it?\nA. 1\nB. 2\nC. 3\nPlease answer .", 1),
    ("What is in A1 and B2?\n(A) red 4\n(B) blue 5", 2),
    ("What is a digit?", 0),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    save_tiny_checkpoint(folder / "llava-tiny")
    generator = torch.Generator().manual_seed(3)
    for number in range(3):
        noise = (torch.rand(56, 56, 3, generator=generator) * 255).byte()
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    lines, used = [], 0
    for number, (text, pictures) in enumerate(QUESTIONS):
        images = [f"{used + i}.png" for i in range(pictures)]
        used += pictures
        record = {"question_id": number, "text": text}
        lines.append(json.dumps(record | ({"image": images} if images else {})))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def answers(files: Path, out: Path, plan: str, *more: str) -> list[str]:
    code = main(
        ["answer", "--model-path", str(files / "llava-tiny"), "--image-folder", str(files),
         "--question-file", str(files / "questions.jsonl"), "--answers-file", str(out),
         "--max_new_tokens", "6", "--reduction", plan, *more]
    )  # fmt: skip
    assert not code
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def direct(files: Path, plan: str) -> list[str]:
    """The same questions one at a time, through prompt, batch and generate."""
    tokenizer, model, processor, _ = load_pretrained_model(
        str(files / "llava-tiny"), None, "llava-tiny", device="cpu"
    )
    found, used = [], 0
    for text, count in QUESTIONS:
        pictures = [Image.open(files / f"{used + i}.png") for i in range(count)]
        used += count
        prompt = build_prompt(text, "mistral_instruct", count)
        batch = prepare_batch(tokenizer, processor, model.config, [prompt], [pictures])
        ids = model.generate(**batch, reduction=plan, max_new_tokens=6, do_sample=False)
        found.append(tokenizer.decode(ids[0], skip_special_tokens=True).split("</s>")[0].strip())
    return found


@pytest.mark.parametrize("text", ["options", "option_words", "question", "all"])
def test_answers(files, tmp_path, text):
    plan = f"simignore:keep=5,text={text}+fastv:k=2,keep=3"
    batched = answers(files, tmp_path / "a.jsonl", plan, "--batch-size", "3")
    assert batched == direct(files, plan)
    assert batched[2] == answers(files, tmp_path / "b.jsonl", "none", "--batch-size", "1")[2]


def test_a_question_without_options_is_named(files, tmp_path, capsys):
    questions = files / "questions.jsonl"
    record = {"question_id": "q7", "text": "What is it?", "image": "0.png"}
    (tmp_path / "q.jsonl").write_text(questions.read_text() + json.dumps(record) + "\n")
    arguments = ["--question-file", str(tmp_path / "q.jsonl")]
    with pytest.raises(SystemExit) as stop:
        answers(files, tmp_path / "a.jsonl", "simignore:keep=5,text=options", *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: question 'q7' has no text 'options'")
    assert "text=options|all" in error
    plan = "simignore:keep=5,text=options|question"
    assert len(answers(files, tmp_path / "b.jsonl", plan, *arguments)) == 4
