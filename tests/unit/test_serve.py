"""Engine, chat and `run_llava` on a tiny random checkpoint; pictures from a local http server."""

from __future__ import annotations

import io
import math
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from places import ROOT
from tiny_checkpoint import save_tiny_checkpoint

from llava.decoding import Decoding
from llava.eval import run_llava
from llava.prompting import build_prompt, prepare_batch
from llava.serve import cli
from llava.serve.engine import Engine, trimmed
from llava.serve.images import fetch, open_picture, split_sources

PLANS = [None, "pyramiddrop:layers=[1,3],ratios=[0.5,0.2]"]
QUESTIONS = ["What is in C3?", "Is there a 7?", "red or blue?"]
GREEDY = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder)


@pytest.fixture
def picture():
    torch.manual_seed(4)
    pixels = torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def file(picture, tmp_path):
    picture.save(tmp_path / "a, b.png")
    return str(tmp_path / "a, b.png")


def by_hand(engine, turns, pictures, plan, new_tokens=12):
    """The answer without the engine: one prefill of the whole dialogue."""
    prompt = build_prompt(turns, engine.conv_mode, len(pictures))
    batch = prepare_batch(
        engine.tokenizer, engine.image_processor, engine.model.config, [prompt], [pictures]
    )
    ids = engine.model.generate(**batch, reduction=plan, max_new_tokens=new_tokens, do_sample=False)
    return engine.tokenizer.decode(ids[0], skip_special_tokens=True).strip()


# --- engine ------------------------------------------------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_every_turn_is_one_prefill_of_the_dialogue(engine, picture, plan, images):
    pictures, turns = [picture, picture.rotate(90)][:images], []
    engine.use_plan(plan)
    for question in QUESTIONS:
        turns.append({"role": "user", "content": question})
        expected = by_hand(engine, turns, pictures, plan or "none")
        answer = engine.answer(turns, pictures, GREEDY)
        assert answer.text == expected
        assert answer.prompt == build_prompt(turns, engine.conv_mode, images)
        assert answer.ended or answer.tokens == 12
        assert "".join(engine.stream(turns, pictures, GREEDY)) == expected
        turns.append({"role": "assistant", "content": expected or "nothing"})
    if images:
        assert engine.answer(turns[:1], pictures, GREEDY).text == by_hand(
            engine, turns[:1], pictures, plan or "none"
        )


def test_sampling_and_beams_stream_too(engine, picture):
    sampled = Decoding(max_new_tokens=20, temperature=1.5, top_p=0.9)
    texts = []
    for call in (lambda: engine.answer("what?", [picture], sampled).text,
                 lambda: "".join(engine.stream("what?", [picture], sampled))):  # fmt: skip
        torch.manual_seed(5)
        texts.append(call())
    assert texts[0] == texts[1]
    beams = Decoding(max_new_tokens=6, num_beams=3)
    pieces = list(engine.stream("what?", [picture], beams))
    assert pieces == [engine.answer("what?", [picture], beams).text]


def slow_down(engine, monkeypatch, interrupt_at=None):
    """Generation takes 10 ms a token and never ends by itself; the list grows with each token.
    interrupt_at: the token with which Ctrl-C comes; those behind it take their time."""
    steps, generate = [], engine.model.generate

    def counted(**call):
        def count(ids, scores, **_):
            steps.append(1)
            if len(steps) == interrupt_at:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.01 if len(steps) < (interrupt_at or math.inf) else 0.1)
            return torch.zeros(len(ids), dtype=torch.bool)

        call["stopping_criteria"].insert(0, count)
        return generate(**{**call, "eos_token_id": None})

    monkeypatch.setattr(engine.model, "generate", counted)
    return steps


def generating():
    return [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_leaving_a_stream_ends_the_generation(engine, picture, monkeypatch):
    steps = slow_down(engine, monkeypatch)
    stream = engine.stream("what?", [picture], Decoding(max_new_tokens=150))
    next(stream)
    assert generating()
    stream.close()
    assert not generating()
    assert 0 < len(steps) < 140


def test_an_error_inside_a_stream_reaches_its_reader(engine, picture, monkeypatch):
    def broken(**call):
        raise ValueError("no luck")

    monkeypatch.setattr(engine.model, "generate", broken)
    with pytest.raises(ValueError, match="no luck"):
        list(engine.stream("what?", [picture]))


def test_the_answer_fits_the_context(engine, picture):
    context = engine.model.context_length
    answer = engine.answer("what?", [picture], Decoding(max_new_tokens=4 * context))
    assert answer.ended or answer.tokens < context - 16
    with pytest.raises(ValueError, match=f"context.*{context}"):
        engine.answer("what? " * context, [picture])


def test_a_plan_that_does_not_fit_changes_nothing(engine):
    engine.use_plan("none")
    with pytest.raises(ValueError, match="layer 9"):
        engine.use_plan("uniform:layers=[9],ratios=[0.5]")
    assert str(engine.plan) == "none"


@pytest.mark.parametrize("stop", [None, "###"])
@pytest.mark.parametrize(
    "text", ["  two words ", "a#b## c", "x ### y ###", "###", "", " \n", "end #", "a  b\n\n c##"]
)
def test_pieces_are_cut_where_the_whole_text_is(text, stop):
    expected = (text.split(stop)[0] if stop else text).strip()
    for size in range(1, len(text) + 2):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        found = list(trimmed(pieces, stop))
        assert "".join(found) == expected
        assert all(found)


# --- pictures ----------------------------------------------------------------------------------
class Handler(BaseHTTPRequestHandler):
    png = b""

    def do_GET(self):  # noqa: N802
        name = self.path.strip("/")
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            return
        if name == "absent":
            self.send_error(404)
            return
        body = b"<html>" if name == "page" else self.png
        self.send_response(200)
        length = {"short": len(body) + 9, "huge": 10**9}.get(name, len(body))
        if name != "unsized":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if name == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        elif name != "huge":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    Handler.png = buffer.getvalue()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_pictures_from_a_server(server, picture):
    for name in ("picture.png?a=1,2", "moved", "unsized"):
        assert open_picture(f"{server}/{name}").tobytes() == picture.tobytes()
    assert fetch(f"{server}/picture.png", limit=len(Handler.png)) == Handler.png


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "answered 404"),
        ("page", "not an image"),
        ("short", "connection ended after"),
        ("huge", "1000000000 bytes; accepted: up to"),
        ("drip", "within 0.3 s"),
    ],
)
def test_bad_answers_of_a_server_are_named(server, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_picture(f"{server}/{name}", timeout=0.3)
    assert f"{server}/{name}" in str(caught.value)


def test_what_comes_unannounced_is_limited_too(server):
    for name in ("unsized", "picture.png"):
        with pytest.raises(ValueError, match="more than 100 bytes|up to 100"):
            open_picture(f"{server}/{name}", limit=100)


def test_sources_and_schemes(file, tmp_path):
    assert split_sources(file) == [file]
    assert split_sources("a.png, http://host/b.png,") == ["a.png", "http://host/b.png"]
    assert split_sources("a.png;b,c.png", ";") == ["a.png", "b,c.png"]
    for text, sep in ((" , ", ","), ("a.png", "")):
        with pytest.raises(ValueError, match="image file"):
            split_sources(text, sep)
    with pytest.raises(ValueError, match="accepted: a path, http"):
        open_picture("file:///etc/passwd")
    with pytest.raises(FileNotFoundError, match="absent.png"):
        open_picture(str(tmp_path / "absent.png"))
    with pytest.raises(ValueError, match="cannot be read"):
        open_picture("http://127.0.0.1:9/none.png", timeout=2)


# --- run_llava ---------------------------------------------------------------------------------
def readme_args(folder, file, **changes):
    fields = {
        "model_path": str(folder),
        "model_base": None,
        "model_name": "llava-v1.5-7b",
        "query": QUESTIONS[0],
        "conv_mode": None,
        "image_file": file,
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 12,
    }
    return type("Args", (), {**fields, **changes})()


def test_eval_model_takes_the_readmes_fields_alone(folder, file, engine, picture, capsys):
    expected = by_hand(engine, QUESTIONS[0], [picture], "none")
    assert run_llava.eval_model(readme_args(folder, file)) == expected
    assert capsys.readouterr().out == expected + "\n"
    two = readme_args(
        folder, f"{file};{file}", sep=";", query="<image-placeholder> or <image-placeholder>?"
    )
    two.reduction = PLANS[1]
    expected = by_hand(engine, "<image> or <image>?", [picture, picture], PLANS[1])
    assert run_llava.eval_model(two) == expected


def test_run_llava_speaks_of_mistakes(folder, file, capsys):
    words = ["--model-path", str(folder), "--query", "what?", "--max_new_tokens", "4"]
    assert run_llava.main([*words, "--image-file", file]) == 0
    for wrong, message in (
        (["--image-file", "absent.png"], "absent.png"),
        (["--image-file", file, "--layer_list", "[1]"], "belong together"),
        (["--image-file", file, "--temperature", "-1"], "temperature"),
        (["--image-file", file, "--query", "<image> <image>"], "2 <image> marks but 1 image"),
        (["--image-file", file, "--conv-mode", "nosuch"], "nosuch"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_llava.main([*words, *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


# --- chat --------------------------------------------------------------------------------------
def type_lines(monkeypatch, *lines):
    """input() gives these lines, exceptions raised, and then the end of the input."""
    left = list(lines)

    def read(prompt):
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        sys.stdout.write(prompt)
        return line

    monkeypatch.setattr("builtins.input", read)


def chat(folder, *more):
    words = ["--model-path", str(folder), "--temperature", "0", "--max-new-tokens", "12", *more]
    return cli.main(words)


@pytest.mark.parametrize("plan", PLANS)
def test_a_chat_of_three_turns(folder, file, engine, picture, plan, monkeypatch, capsys):
    type_lines(monkeypatch, *QUESTIONS)
    more = ["--reduction", plan] if plan else []
    assert chat(folder, "--image-file", file, "--debug", *more) == 0
    out, turns = capsys.readouterr().out, []
    assert out.startswith("[model on cpu; picture 60 x 40;")
    for question in QUESTIONS:
        turns.append({"role": "user", "content": question})
        answer = by_hand(engine, turns, [picture], plan or "none")
        assert f"USER: {question}\nASSISTANT: {answer}\n[{len(turns)} turns" in out
        turns.append({"role": "assistant", "content": answer})


def test_commands_and_mistakes_inside_a_chat(folder, file, server, monkeypatch, capsys):
    lines = ["what?", "/image absent.png", f"/image '{file}'", f"/image {server}/picture.png",
             "/reduction uniform:layers=[2],ratios=[0.5]", "/reduction nosuch:k=1", "/nosuch",
             "/image", "what? " * 300, "and?", "/reset", "/help", "/exit", "never"]  # fmt: skip
    type_lines(monkeypatch, *lines)
    assert chat(folder) == 0
    out = capsys.readouterr().out
    assert "no picture" in out
    assert "[error: image file not found: absent.png]" in out
    assert out.count("[picture 60 x 40; the dialogue starts over]") == 2
    assert "[plan: uniform:layers=[2],ratios=[0.5]]" in out
    assert "[error: method 'nosuch' is unknown" in out
    assert "[error: /nosuch is no command; /help lists them]" in out
    assert "[error: /image needs a path or URL]" in out
    assert "the model's context holds" in out
    assert out.count("ASSISTANT: ") == 2
    assert "never" not in out


@pytest.mark.parametrize("last", ["", EOFError(), KeyboardInterrupt()])
def test_ways_to_end_a_chat(folder, last, monkeypatch, capsys):
    type_lines(monkeypatch, "what?", last, "never read")
    assert chat(folder) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_ctrl_c_ends_an_answer_and_keeps_what_came(engine, monkeypatch, capsys):
    steps = slow_down(engine, monkeypatch, interrupt_at=20)
    one = cli.Chat(engine, [], Decoding(200))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test workers ignore it
    try:
        one.ask("what?")
    finally:
        signal.signal(signal.SIGINT, before)
    assert 20 <= len(steps) < 190
    assert not generating()
    text = one.turns[-1]["content"]
    assert capsys.readouterr().out == f"ASSISTANT: {text} [interrupted]\n"
    assert text


def test_a_question_without_an_answer_is_forgotten(engine, monkeypatch, capsys):
    one = cli.Chat(engine, [], GREEDY)
    monkeypatch.setattr(engine, "stream", lambda *_: iter([]))
    one.ask("and?")
    assert one.turns == []
    assert "answered nothing" in capsys.readouterr().out


def test_a_chat_that_cannot_begin(folder, file, tmp_path, capsys):
    for words, message in (
        (["--image-file", "absent.png"], "absent.png"),
        (["--conv-mode", "nosuch"], "nosuch"),
        (["--model-path", str(tmp_path)], "config.json"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
    ):
        with pytest.raises(SystemExit) as stop:
            chat(folder, *words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_quantisation_flags_reach_the_loader(folder, file, engine, monkeypatch):
    seen = []

    def loader(path, base, **options):
        seen.append(options)
        return engine

    monkeypatch.setattr("llava.serve.engine.load_checkpoint", loader)
    type_lines(monkeypatch)
    assert chat(folder, "--load-4bit", "--device", "cpu") == 0
    run_llava.eval_model(SimpleNamespace(**vars(run_llava.build_parser().parse_args(
        ["--model-path", str(folder), "--image-file", file, "--query", "x", "--load-8bit"]
    ))))  # fmt: skip
    flags = [(one["load_4bit"], one["load_8bit"], one.get("device")) for one in seen]
    assert flags == [(True, False, "cpu"), (False, True, None)]


@pytest.mark.parametrize("flag", ["--load-4bit", "--load-8bit"])
def test_a_quantised_chat(file, flag, monkeypatch, capsys):
    """Tower, projector and head stay as they are; the decoder's layers are quantised. The shipped
    model, because bitsandbytes has no 4-bit rows shorter than 64 on a CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made, load = [], Engine.load

    def remember(*args, **options):
        made.append(load(*args, **options))
        return made[-1]

    monkeypatch.setattr(Engine, "load", remember)
    type_lines(monkeypatch, "what?", "and?")
    shipped = ROOT / "checkpoints" / "llava-digits"
    assert chat(shipped, "--image-file", file, flag, "--device", "cpu") == 0
    assert capsys.readouterr().out.count("ASSISTANT: ") == 2
    kind = {"--load-4bit": "Linear4bit", "--load-8bit": "Linear8bitLt"}[flag]
    quantised = getattr(bitsandbytes.nn, kind)
    for name, module in made[0].model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, quantised) is name.startswith("model.layers."), name
