"""Judged sets against a local server that speaks OpenAI's chat completions."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from llava.cli import main as llava
from llava.eval import eval_gpt_review_visual
from llava.eval.judge import Endpoint, read_reviews
from llava.eval.scorers.review import read_pair, read_share, summary_lines
from llava.utils import json_dump

RULE = {
    "llava_bench_conv": {"role": "Assistant", "prompt": "Rate talk."},
    "default": {"role": "Assistant", "prompt": "Rate."},
}


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers with what the test put on the server: a number is an HTTP error, a text a judgement,
    anything else the whole answer."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            script = self.server.script
            say = script.pop(0) if len(script) > 1 else script[0]
        status = say if isinstance(say, int) else 200
        payload = (
            _reply(say) if isinstance(say, str) else {"error": "busy"} if status > 200 else say
        )
        data = json.dumps(payload).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def _reply(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.script, server.seen, server.lock = ["8 6\nfine"], [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def bench(tmp_path):
    """LLaVA-Bench with four questions about two pictures, and a run that answered them."""
    folder = tmp_path / "data" / "llava-bench-in-the-wild"
    kinds = ("conv", "detail", "conv", "complex")
    asked = [
        {"question_id": i, "image": f"00{i // 2}.jpg", "text": f"Q{i}?", "category": kind}
        for i, kind in enumerate(kinds)
    ]
    lines(folder / "questions.jsonl", asked)
    lines(folder / "context.jsonl", [{"image": f"00{i}.jpg", "caption": f"C{i}"} for i in (0, 1)])
    lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"G{i}"} for i in range(4)])
    run = tmp_path / "run"
    said = [{"question_id": i, "prompt": f"Q{i}?", "text": f"A{i}"} for i in range(4)]
    lines(run / "answers.jsonl", said)
    json_dump(
        run / "run.json",
        {"benchmark": "llava_bench", "question_file": str(folder / "questions.jsonl")},
    )
    json_dump(tmp_path / "rule.json", RULE)
    return tmp_path


def lines(path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run_judge(bench, *more: str) -> int:
    return llava(["judge", str(bench / "run"), "--rule", str(bench / "rule.json"), *more])


def test_a_run_is_judged_and_scored(bench, judge, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    judge.script = [503, "10 4", 429, "no numbers", "8 8", "8 6\nok"]
    monkeypatch.setattr("llava.eval.judge.time.sleep", lambda seconds: None)
    flags = ["--base-url", judge.url, "--judge", "j-1", "--key-env", "MY_KEY", "--workers", "1"]
    assert run_judge(bench, *flags) == 0
    reviews = read_reviews(bench / "run" / "reviews.jsonl")
    assert [entry["tuple"] for entry in reviews] == [[10, 4], [8, 8], [8, 6], [8, 6]]
    path, key, body = judge.seen[1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["max_tokens"]) == ("j-1", 1024)
    asked = body["messages"][1]["content"]
    for part in ("[Context]\nC0", "[Question]\nQ0?", "G0", "[Assistant 2]\nA0", "Rate talk."):
        assert part in asked
    assert "Rate." in judge.seen[-1][2]["messages"][1]["content"]
    scores = json.loads((bench / "run" / "scores.json").read_text())
    assert scores["value"] == pytest.approx(100 * 24 / 34)
    conv = scores["metrics"]["relative_score/conv"]
    assert conv["value"] == pytest.approx(100 * 10 / 18)
    assert scores["low"] <= scores["value"] <= scores["high"]
    assert "relative_score" in capsys.readouterr().out
    asked_before = len(judge.seen)
    assert run_judge(bench, *flags) == 0  # all reviews are there
    assert len(judge.seen) == asked_before


def test_a_stopped_run_goes_on_where_it_was(bench, judge, monkeypatch, capsys):
    monkeypatch.setattr("llava.eval.judge.time.sleep", lambda seconds: None)
    judge.script = ["9 5", "9 6", 400]
    flags = ["--base-url", judge.url, "--workers", "1"]
    with pytest.raises(SystemExit) as status:
        run_judge(bench, *flags)
    assert status.value.code == 2
    assert "answered HTTP 400" in capsys.readouterr().err
    path = bench / "run" / "reviews.jsonl"
    assert len(read_reviews(path)) == 2
    with open(path, "a") as file:
        file.write('{"uid": "torn')  # killed while it wrote
    judge.script, seen = ["7 7"], len(judge.seen)
    assert run_judge(bench, *flags) == 0
    assert len(judge.seen) == seen + 2
    assert [entry["tuple"][1] for entry in read_reviews(path)] == [5, 6, 7, 7]


def test_tries_are_counted(judge, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("llava.eval.judge.time.sleep", waits.append)
    judge.script = [500]
    with pytest.raises(OSError, match=r"did not answer in 3 tries; the last: HTTP 500"):
        Endpoint(judge.url, "j", tries=3, pause=1.5).ask([{"role": "user", "content": "?"}])
    assert (len(judge.seen), waits) == (3, [1.5, 3.0])
    judge.script = [{"choices": []}]
    with pytest.raises(ValueError, match="the judge's answer has no text: {'choices': "):
        Endpoint(judge.url, "j").ask([{"role": "user", "content": "?"}])


def test_export_and_reviews_need_no_network(bench, capsys):
    exported = bench / "requests.jsonl"
    assert run_judge(bench, "--export", str(exported), "--judge", "j-1") == 0
    requests = [json.loads(line) for line in exported.read_text().splitlines()]
    assert len(requests) == 4
    assert requests[0]["body"]["model"] == "j-1"
    # What OpenAI's batch interface gives back.
    given = [
        {"custom_id": request["custom_id"], "response": {"body": _reply("8 4")}}
        for request in requests
    ]
    lines(bench / "batch.jsonl", given)
    target = ["judge", str(bench / "run"), "--reviews", str(bench / "batch.jsonl")]
    assert llava(target) == 0
    assert json.loads((bench / "run" / "scores.json").read_text())["value"] == 50
    lines(bench / "batch.jsonl", given[:3])
    with pytest.raises(SystemExit) as status:
        llava(target)
    assert status.value.code == 2
    assert "1 questions have no review: 3" in capsys.readouterr().err
    for flags, reason in (
        (["judge", str(bench / "run")], "no reviews in"),
        (["judge", str(bench / "run"), "--export", "x"], "--rule FILE"),
        (["score", str(bench / "run")], "scored by a judge model"),
    ):
        with pytest.raises(SystemExit):
            llava(flags)
        assert reason in capsys.readouterr().err


def test_mm_vet_takes_shares(tmp_path, judge):
    folder = tmp_path / "data" / "mm-vet"
    asked = [{"question_id": i, "image": f"v1_{i}.png", "text": f"Q{i}?"} for i in range(3)]
    lines(folder / "llava-mm-vet.jsonl", asked)
    able = (["ocr"], ["ocr", "math"], ["know"])
    entries = {f"v1_{i}": {"answer": f"G{i}", "capability": able[i]} for i in range(3)}
    json_dump(folder / "mm-vet.json", entries)
    said = [{"question_id": i, "prompt": f"Q{i}?", "text": f"A{i}"} for i in range(3)]
    lines(tmp_path / "answers.jsonl", said)
    json_dump(
        tmp_path / "rule.json", {"default": {"prompt": "Grade.", "template": "{prediction}!"}}
    )
    judge.script = ["0.5", "1.0", "I give 0.3 of 1"]
    flags = ["--benchmark", "mmvet", "--data-root", str(tmp_path / "data"), "--workers", "1"]
    files = ["--reviews", str(tmp_path / "r.jsonl"), "--json", str(tmp_path / "s.json")]
    rule = ["--rule", str(tmp_path / "rule.json"), "--base-url", judge.url]
    assert llava(["judge", str(tmp_path / "answers.jsonl"), *flags, *files, *rule]) == 0
    assert [body["messages"][1]["content"] for _, _, body in judge.seen] == ["A0!", "A1!", "A2!"]
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["value"] == pytest.approx(60)
    assert scores["metrics"]["score/ocr"]["value"] == pytest.approx(75)
    assert scores["metrics"]["score/math"]["n"] == 1


def test_qa90_by_llavas_script(tmp_path, judge):
    lines(
        tmp_path / "q.jsonl",
        [{"question_id": 0, "image": "a.jpg", "text": "Q?", "category": "conv"}],
    )
    boxes = [{"category": "cat", "bbox": [1, 2, 3, 4]}]
    lines(tmp_path / "c.jsonl", [{"image": "a.jpg", "captions": ["x", "y"], "instances": boxes}])
    lines(tmp_path / "gold.jsonl", [{"question_id": 0, "text": "G"}])
    lines(tmp_path / "mine.jsonl", [{"question_id": 0, "prompt": "Q?", "text": "A"}])
    json_dump(tmp_path / "rule.json", RULE)
    eval_gpt_review_visual.main(
        [
            "-q", str(tmp_path / "q.jsonl"), "-c", str(tmp_path / "c.jsonl"),
            "-a", str(tmp_path / "gold.jsonl"), str(tmp_path / "mine.jsonl"),
            "-r", str(tmp_path / "rule.json"), "-o", str(tmp_path / "out.jsonl"),
            "--base-url", judge.url,
        ]
    )  # fmt: skip
    assert "x\ny\n\ncat: [1, 2, 3, 4]" in judge.seen[0][2]["messages"][1]["content"]
    assert summary_lines(read_reviews(tmp_path / "out.jsonl")) == [
        "all 75.0 80.0 60.0",
        "conv 75.0 80.0 60.0",
    ]


@pytest.mark.parametrize(
    ("text", "pair", "share"),
    [
        ("8 7\nGood.", (8, 7), None),
        ("8,7", (8, 7), None),
        ("8, 7", (-1, -1), None),
        ("8.5 9", (8.5, 9), None),
        ("0.7", (-1, -1), 0.7),
        ("Score: .5.", (-1, -1), 0.5),
        ("1", (-1, -1), 1),
        ("10 of 10: 1.0", (-1, -1), 1.0),
        ("", (-1, -1), None),
    ],
)
def test_judgements_are_read(text, pair, share):
    assert read_pair(text) == pair
    assert read_share(text) == share
