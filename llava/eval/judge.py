"""`llava judge RUN`: sets that a language model scores (LLaVA-Bench, LLaVA-QA90, MM-Vet).

    llava judge results/llava_bench/RUN --rule rule.json --export requests.jsonl     # no network
    llava judge results/llava_bench/RUN --rule rule.json --base-url https://api.openai.com/v1 \\
        --judge gpt-4-0613 --key-env OPENAI_API_KEY
    llava judge results/llava_bench/RUN --reviews reviews.jsonl                      # no network

Special here: any endpoint that speaks OpenAI's chat completions will do, and none is needed to see
what would be asked or to add up what was answered. The rule (what the judge is told) is the user's
file. Reviews are appended one by one and found again by id, so a run that was stopped goes on where
it was; a request is tried so many times and then ends the run with the reason.

A rule file is JSON: category (or "default") -> {"role", "prompt"}, as LLaVA's rule.json; optional
"system", and "template" with {question} {context} {answer} {prediction} {role} {prompt} for another
layout.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import LoadedBenchmark, load_references
from llava.eval.layouts import read_json
from llava.eval.questions import Question
from llava.eval.score import add_target_flags, open_answers, score_lines
from llava.eval.scorers import SCORERS, Scores, join_answers, review
from llava.eval.scorers.base import Item, base_item, check_complete, summarise
from llava.utils import atomic_write, get_logger, json_dump, progress, user_errors

log = get_logger(__name__)

SYSTEM = "You compare answers about a picture that is described to you, carefully and without bias."
PAIR_TEMPLATE = (
    "[Context]\n{context}\n\n[Question]\n{question}\n\n"
    "[{role} 1]\n{answer}\n\n[End of {role} 1]\n\n"
    "[{role} 2]\n{prediction}\n\n[End of {role} 2]\n\n[System]\n{prompt}\n\n"
)
SHARE_TEMPLATE = (
    "{prompt}\nQuestion: {question}\nAnswer: {answer}\nPrediction: {prediction}\nScore:"
)
RETRIED = frozenset((408, 409, 429, 500, 502, 503, 504))
"""HTTP answers that are worth another try."""


# ----------------------------------------------------------------------------- requests
@dataclass(frozen=True)
class Reference:
    """What a judge is shown of a question: the picture in words and a right answer."""

    answer: str
    context: str = ""
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One judgement to be asked for."""

    uid: str
    question_id: str | int
    category: str
    messages: tuple[Mapping[str, str], ...]


def rule_for(rule: Mapping[str, Mapping[str, str]], category: str) -> Mapping[str, str]:
    """The entry of a category, else the default one. Raises ValueError if there is neither."""
    found = rule.get(category) or rule.get("default")
    if found is None or "prompt" not in found:
        raise ValueError(
            f"the rule file has no {category!r} and no 'default' with a 'prompt'; it has: "
            f"{', '.join(rule)}"
        )
    return found


def build_requests(
    questions: Sequence[Question],
    given: Mapping[str, str],
    references: Mapping[str, Reference],
    rule: Mapping[str, Mapping[str, str]],
    template: str = PAIR_TEMPLATE,
    prefix: str = "",
) -> list[Request]:
    """One request a question. prefix: put before a question's category to find its rule."""
    found = []
    for question in questions:
        category = prefix + question.category
        own, reference = rule_for(rule, category), references[question.uid]
        layout = own.get("template", template)
        text = layout.format(
            question=question.text,
            context=reference.context,
            answer=reference.answer,
            prediction=given[question.uid],
            role=own.get("role", "Assistant"),
            prompt=own["prompt"],
        )
        messages = (
            {"role": "system", "content": own.get("system", SYSTEM)},
            {"role": "user", "content": text},
        )
        found.append(Request(question.uid, question.question_id, category, messages))
    return found


# ----------------------------------------------------------------------------- endpoint
@dataclass(frozen=True)
class Endpoint:
    """Where judgements come from: `POST base_url/chat/completions`."""

    base_url: str
    model: str
    key: str = ""
    max_tokens: int = 1024
    temperature: float = 0.2
    timeout: float = 120.0
    tries: int = 5
    pause: float = 2.0

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The judge's text. Raises OSError when every try failed, ValueError for a strange answer.

        Waits `pause` seconds before the second try, twice as long before each further one, or as
        long as the server says.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        reason = ""
        for attempt in range(self.tries):
            try:
                return _text_of(self._post(body))
            except urllib.error.HTTPError as err:
                detail = err.read().decode("utf-8", "replace")[:200]
                reason, wait = f"HTTP {err.code}: {detail}", err.headers.get("Retry-After", "")
                if err.code not in RETRIED:
                    raise OSError(f"{self.base_url} answered {reason}") from err
            except (urllib.error.URLError, TimeoutError, ConnectionError) as err:
                reason, wait = str(err), ""
            if attempt + 1 < self.tries:
                time.sleep(float(wait) if wait.isdigit() else self.pause * 2**attempt)
        raise OSError(f"{self.base_url} did not answer in {self.tries} tries; the last: {reason}")

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return json.loads(answer.read())


def _text_of(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as err:
        raise ValueError(f"the judge's answer has no text: {str(answer)[:200]}") from err
    if not isinstance(text, str):
        raise ValueError(f"the judge's answer has no text: {str(answer)[:200]}")
    return text


# ----------------------------------------------------------------------------- reviews
def read_reviews(path: str | Path) -> list[dict[str, Any]]:
    """Reviews of a file, a torn last line left out.

    A line of OpenAI's batch output (`custom_id`, `response`) counts as the review of that uid.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        log.warning("%s: the last line is torn and is left out", path)
        lines = lines[:-1]
    return [_review(json.loads(line)) for line in lines if line.strip()]


def _review(record: dict[str, Any]) -> dict[str, Any]:
    if "custom_id" not in record:
        return record
    return {"uid": record["custom_id"], "content": _text_of(record["response"]["body"])}


def collect_reviews(
    requests: Sequence[Request],
    ask: Callable[[Sequence[Mapping[str, str]]], str],
    path: str | Path,
    read: Callable[[str], Any],
    workers: int = 4,
    again: int = 2,
) -> list[dict[str, Any]]:
    """Ask for every request that has no review in `path` yet, and append each as it comes.

    read: judgement -> score; one that says it is unreadable is asked for `again` times more.
    Returns all reviews in the order of the requests. Raises what `ask` raises, after the reviews
    that were under way have been written.
    """
    path = Path(path)
    done = {entry["uid"]: entry for entry in read_reviews(path)} if path.is_file() else {}
    if path.is_file():  # without its torn line, so that what is appended starts on a line
        _rewrite(path, list(done.values()))
    left = [request for request in requests if request.uid not in done]
    if done:
        log.info("%d of %d reviews are there already", len(requests) - len(left), len(requests))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def work(request: Request) -> None:
        for _ in range(again + 1):
            content = ask(request.messages)
            score = read(content)
            if score not in (None, review.UNREADABLE):
                break
        record = {
            "uid": request.uid,
            "question_id": request.question_id,
            "category": request.category,
            "content": content,
            **({"tuple": list(score)} if isinstance(score, tuple) else {"score": score}),
        }
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done[request.uid] = record

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, request) for request in left]
        try:
            for future in progress(
                concurrent.futures.as_completed(futures), "judging", len(futures)
            ):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[request.uid] for request in requests]


def _rewrite(path: Path, reviews: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in reviews)


# ----------------------------------------------------------------------------- scores
def review_items(
    questions: Sequence[Question],
    given: Mapping[str, str],
    reviews: Sequence[Mapping[str, Any]],
    references: Mapping[str, Reference],
    pairs: bool,
) -> list[Item]:
    """The items that judgements give. Reviews are joined by uid, else by question id.

    Raises ValueError naming the questions without a review.
    """
    by_uid = {entry["uid"]: entry for entry in reviews if "uid" in entry}
    by_id = {str(entry.get("question_id")): entry for entry in reviews if "uid" not in entry}
    found, lacking = [], []
    for question in questions:
        entry = by_uid.get(question.uid) or by_id.get(str(question.question_id))
        if entry is None:
            lacking.append(repr(question.question_id))
            continue
        own = _pair(entry) if pairs else _share(entry)
        if not pairs:
            own["capabilities"] = list(references[question.uid].capabilities)
        found.append(base_item(question, given.get(question.uid)) | own)
    if lacking:
        raise ValueError(f"{len(lacking)} questions have no review: {', '.join(lacking[:5])}")
    return found


def _pair(entry: Mapping[str, Any]) -> Item:
    pair = tuple(entry["tuple"]) if "tuple" in entry else review.read_pair(entry["content"])
    readable = pair != review.UNREADABLE
    return {"pair": list(pair), "parsed": pair[1] if readable else None, "score": pair[1] / 10}


def _share(entry: Mapping[str, Any]) -> Item:
    score = entry["score"] if "score" in entry else review.read_share(entry["content"])
    return {"parsed": score, "score": 0.0 if score is None else float(score)}


# ----------------------------------------------------------------------------- command line
def references_of(loaded: LoadedBenchmark) -> dict[str, Reference]:
    """What the judge is shown of each question of a judged set."""
    return {
        uid: Reference(entry["answer"], entry["context"], tuple(entry["capabilities"]))
        for uid, entry in load_references(loaded).items()
    }


def parser() -> argparse.ArgumentParser:
    """The command line of `llava judge`."""
    flags = argparse.ArgumentParser(
        prog="llava judge", description="Have answers scored by a language model."
    )
    add_target_flags(flags)
    flags.add_argument("--rule", metavar="FILE", help="JSON: what the judge is told, by category")
    flags.add_argument("--base-url", help="an OpenAI-compatible endpoint, such as http://host/v1")
    flags.add_argument(
        "--judge",
        default="gpt-4-0613",
        help="the judge's name at the endpoint (default %(default)s)",
    )
    flags.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        help="variable that holds the key (default %(default)s)",
    )
    flags.add_argument("--reviews", metavar="FILE", help="default: RUN/reviews.jsonl")
    flags.add_argument("--export", metavar="FILE", help="only write what would be asked there")
    flags.add_argument(
        "--max-tokens", type=int, default=1024, help="longest judgement (default 1024)"
    )
    flags.add_argument("--temperature", type=float, default=0.2, help="of the judge (default 0.2)")
    flags.add_argument(
        "--workers", type=int, default=4, help="requests at a time (default %(default)s)"
    )
    flags.add_argument("--tries", type=int, default=5, help="of one request (default %(default)s)")
    flags.add_argument(
        "--timeout", type=float, default=120.0, help="seconds of one try (default %(default)s)"
    )
    flags.add_argument("--json", metavar="FILE", help="where scores go (default: RUN/scores.json)")
    return flags


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    """Export requests, collect reviews, or score the reviews that are there."""
    args = parser().parse_args(argv)
    answered = open_answers(args.target, args.benchmark, args.data_root, args.limit)
    loaded, folder = answered.loaded, answered.folder
    given = join_answers(loaded.questions, answered.records)
    check_complete(loaded.questions, given, allow_missing=False)
    references = references_of(loaded)
    reviews_file = Path(args.reviews) if args.reviews else folder and folder / "reviews.jsonl"
    if args.export or args.base_url:
        requests = _requests(args, loaded, given, references)
        if args.export:
            _export(args, requests)
            return 0
        if reviews_file is None:
            raise ValueError("say where the reviews of a lone answers file go: --reviews FILE")
        endpoint = Endpoint(
            args.base_url, args.judge, os.environ.get(args.key_env, ""), args.max_tokens,
            args.temperature, args.timeout, args.tries,
        )  # fmt: skip
        read = review.read_pair if loaded.benchmark.judged == "pairs" else review.read_share
        collect_reviews(requests, endpoint.ask, reviews_file, read, args.workers)
    if reviews_file is None or not reviews_file.is_file():
        raise ValueError(
            f"no reviews in {reviews_file}: ask a judge (--base-url), write the requests "
            "(--export), or name a file of reviews (--reviews)"
        )
    scores = score_reviews(loaded, given, read_reviews(reviews_file), references)
    path = args.json or folder and folder / "scores.json"
    if path:
        json_dump(path, asdict(scores))
    sys.stdout.write("\n".join(score_lines(loaded.benchmark.name, scores, everything=True)) + "\n")
    if scores.details["unreadable"]:
        log.warning("%d judgements could not be read", scores.details["unreadable"])
    return 0


def score_reviews(
    loaded: LoadedBenchmark,
    given: Mapping[str, str],
    reviews: Sequence[Mapping[str, Any]],
    references: Mapping[str, Reference],
) -> Scores:
    """Scores of a judged set from its reviews."""
    kind = loaded.benchmark.judged
    items = review_items(loaded.questions, given, reviews, references, kind == "pairs")
    return summarise(kind, SCORERS[kind], items, "llava")


def _requests(
    args: argparse.Namespace,
    loaded: LoadedBenchmark,
    given: Mapping[str, str],
    references: Mapping[str, Reference],
) -> list[Request]:
    if not args.rule:
        raise ValueError("what the judge is told is not part of this package: --rule FILE")
    rule = read_json(args.rule)
    if not isinstance(rule, dict):
        raise ValueError(f"{args.rule}: a JSON object is needed: category -> rule")
    benchmark = loaded.benchmark
    # LLaVA's rule file knows LLaVA-Bench's categories under this prefix.
    prefix = "llava_bench_" if benchmark.name == "llava_bench" else ""
    template = PAIR_TEMPLATE if benchmark.judged == "pairs" else SHARE_TEMPLATE
    return build_requests(loaded.questions, given, references, rule, template, prefix)


def _export(args: argparse.Namespace, requests: Sequence[Request]) -> None:
    """JSON lines in the form of OpenAI's batch interface; `custom_id` is the question's uid."""
    with atomic_write(args.export) as file:
        for request in requests:
            body = {
                "model": args.judge,
                "messages": list(request.messages),
                "temperature": args.temperature,
                "max_tokens": args.max_tokens,
            }
            line = {
                "custom_id": request.uid,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    log.info("wrote %s: %d requests", args.export, len(requests))


if __name__ == "__main__":
    raise SystemExit(main())
