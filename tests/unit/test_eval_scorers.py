"""Scores, joins and intervals, against numbers worked out by hand or by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llava.eval.questions import Question
from llava.eval.scorers import join_answers, score
from llava.eval.scorers.exact import normalise
from llava.eval.scorers.interval import (
    accuracy_interval,
    cluster_bootstrap,
    mcnemar,
    paired_difference,
    wilson,
)


def question(uid: str, image: str | None = None, category: str = "default") -> Question:
    return Question(uid, 1, "?", (image,) if image else (), category)


def test_normalise():
    assert normalise(" Yes. ") == "yes"
    assert normalise("3  5\n1") == "3 5 1"
    assert normalise("St. Ives") == "st. ives"


def test_scores_an_item_at_a_time():
    questions = [question("a", category="x"), question("b", category="x"), question("c")]
    labels = {"a": "yes", "b": "no", "c": "3 5"}
    scores = score("exact", questions, labels, {"c": "3 5.", "a": "no"}, allow_missing=True)
    assert [item["score"] for item in scores.per_item] == [0, 0, 1]
    assert [item["uid"] for item in scores.per_item] == ["a", "b", "c"]
    assert scores.value == pytest.approx(100 / 3)
    assert (scores.metric, scores.n, scores.n_missing) == ("accuracy", 3, 1)
    values = {name: (entry["value"], entry["n"]) for name, entry in scores.metrics.items()}
    assert values == {
        "accuracy": (pytest.approx(100 / 3), 3),
        "accuracy/x": (0.0, 2),
        "accuracy/default": (100.0, 1),
    }
    assert scores.interval == "wilson"
    assert scores.low < scores.value < scores.high
    with pytest.raises(ValueError, match=r"1 of 3 questions have no answer: 1 \(b\)"):
        score("exact", questions, labels, {"c": "3 5.", "a": "no"})


def test_substring_is_no_match():
    assert score("exact", [question("a")], {"a": "3"}, {"a": "13"}).value == 0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no label"):
        score("exact", [question("a")], {}, {"a": "yes"})
    with pytest.raises(ValueError, match="no questions"):
        score("exact", [], {}, {})
    with pytest.raises(ValueError, match="unknown scorer 'f1'; accepted: exact"):
        score("f1", [question("a")], {"a": "yes"}, {"a": "yes"})
    with pytest.raises(ValueError, match="dialect 'lmms' of scorer exact; accepted: llava"):
        score("exact", [question("a")], {"a": "yes"}, {"a": "yes"}, "lmms")


@pytest.mark.parametrize(("name", "text"), [("pope", "nope"), ("mme", "maybe"), ("exact", "")])
def test_a_missing_answer_is_wrong_whatever_an_empty_one_would_be(name, text):
    questions = [question("a", "1.jpg", "count"), question("b", "1.jpg", "count")]
    for label in ("yes", "no"):  # POPE's script reads an empty answer as yes
        labels = {"a": label, "b": label}
        scores = score(name, questions, labels, {"a": text}, allow_missing=True)
        assert scores.per_item[1]["score"] == 0
        assert scores.n == 2
        assert scores.n_missing == 1


def test_answers_are_joined_by_uid_then_prompt_then_id():
    questions = [
        Question("u0", "pic", "How many?"),
        Question("u1", "pic", "Which?"),
        Question("u2", 7, "Colour?\nAnswer shortly."),
        Question("u3", "pic", "Which?"),  # asked twice
    ]
    plain = [
        {"question_id": "pic", "prompt": "Which?", "text": "first"},
        {"question_id": "7", "prompt": "<image>\nColour?", "text": "red"},
        {"question_id": "pic", "prompt": "Which?", "text": "second"},
        {"uid": "u0", "text": "two"},
    ]
    given = {"u0": "two", "u1": "first", "u2": "red", "u3": "second"}
    assert join_answers(questions, plain) == given
    assert join_answers(questions, [plain[3], plain[3]]) == {"u0": "two"}
    for record, message in [
        ({"uid": "x:0:1", "text": ""}, "another question file"),
        ({"question_id": 8, "text": ""}, "8, which is not asked here"),
        ({"question_id": 7, "prompt": "Size?", "text": ""}, "was asked 'Size\\?', here it is"),
        ({"question_id": "pic", "prompt": "Who?", "text": ""}, "another question file"),
        ({"question_id": 7, "prompt": "Colour?"}, "answer 1 has no text"),
    ]:
        with pytest.raises(ValueError, match=message):
            join_answers(questions, [record])
    with pytest.raises(ValueError, match="two different answers to u0: 'two' and '2'"):
        join_answers(questions, [plain[3], {"uid": "u0", "text": "2"}])


def test_an_f1_and_its_interval_are_worked_out_anew_in_every_draw():
    """Two pictures: the four equally likely draws give the exact distribution of the mean F1."""
    rows = [("p", "yes", "yes"), ("p", "no", "yes"), ("q", "yes", "no"), ("q", "yes", "yes")]
    questions = [question(str(i), image, "random") for i, (image, _, _) in enumerate(rows)]
    labels = {str(i): label for i, (_, label, _) in enumerate(rows)}
    given = {str(i): said for i, (_, _, said) in enumerate(rows)}
    scores = score("pope", questions, labels, given)
    assert scores.metric == "mean_f1"
    assert scores.value == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 1))
    draws = {"pp": 2 / 3, "pq": 2 / 3, "qq": 2 / 3}
    assert (scores.low, scores.high) == pytest.approx((100 * draws["pp"],) * 2)
    assert scores.metrics["recall/random"]["low"] == pytest.approx(50)
    assert scores.metrics["recall/random"]["high"] == pytest.approx(100)


def test_mme_adds_pictures_with_both_answers_right():
    rows = [("a", "yes", "Yes"), ("a", "no", "No."), ("b", "yes", "yes"), ("b", "no", "Sure")]
    questions = [question(str(i), f"count/{row[0]}", "count") for i, row in enumerate(rows)]
    labels = {str(i): label for i, (_, label, _) in enumerate(rows)}
    scores = score("mme", questions, labels, {str(i): row[2] for i, row in enumerate(rows)})
    assert scores.metric == "perception"
    assert scores.value == 75 + 50
    assert scores.details["table"]["count"]["other_num"] == 1
    assert (scores.low, scores.high) == (50, 200)


def test_wilson_against_known_values():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148; 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0
    for wrong in [(1, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="accepted"):
            wilson(*wrong)


def test_bootstrap_equals_all_resamples_of_four_clusters():
    """Four pictures: the 256 equally likely draws give the exact distribution."""
    right, asked = {"a": 2, "b": 0, "c": 1, "d": 3}, {"a": 2, "b": 1, "c": 3, "d": 4}
    scores = [int(i < right[k]) for k in right for i in range(asked[k])]
    clusters = [k for k in asked for _ in range(asked[k])]
    exact = [
        sum(right[k] for k in draw) / sum(asked[k] for k in draw)
        for draw in itertools.product("abcd", repeat=4)
    ]
    low, high = np.percentile(exact, [2.5, 97.5], method="inverted_cdf")
    assert 0 < low < high < 1
    assert cluster_bootstrap(scores, clusters, replicates=20000) == pytest.approx((low, high))
    assert cluster_bootstrap(scores, clusters) == cluster_bootstrap(scores, clusters)


def test_questions_about_one_picture_are_not_independent():
    rng = np.random.default_rng(0)
    right = rng.random(50) < 0.6
    scores = np.repeat(right, 18).astype(int).tolist()  # all 18 answers of a picture alike
    pictures = np.repeat(np.arange(50), 18).tolist()
    clustered = accuracy_interval(scores, pictures)
    alone = accuracy_interval(scores, list(range(900)))
    assert clustered.method == "bootstrap over pictures"
    assert alone.method == "wilson"
    assert (clustered.high - clustered.low) > 3 * (alone.high - alone.low)


def test_all_right_still_has_an_interval():
    low, high, method = accuracy_interval([1] * 36, [i // 18 for i in range(36)])
    assert (low, high) == pytest.approx(wilson(2, 2))
    assert low < 0.5
    assert method == "wilson over pictures"


def test_mcnemar_is_the_exact_binomial_test():
    for better, worse in [(0, 0), (1, 1), (1, 8), (5, 0), (12, 30)]:
        n, k = better + worse, min(better, worse)
        tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
        assert mcnemar(better, worse) == pytest.approx(min(1.0, 2 * tail))


def test_a_paired_difference_is_surer_than_either_score():
    rng = np.random.default_rng(1)
    pictures = [i // 3 for i in range(600)]
    first = (rng.random(600) < 0.7).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:20]] = 1
    second[np.flatnonzero(first == 1)[:4]] = 0
    found = paired_difference(first.tolist(), second.tolist(), pictures)
    assert found.value == pytest.approx(16 / 600)
    assert (found.better, found.worse, found.n) == (20, 4, 600)
    assert found.mcnemar_p == pytest.approx(mcnemar(20, 4))
    assert 0 < found.low < found.value < found.high
    alone = cluster_bootstrap(first.tolist(), pictures)
    assert found.high - found.low < (alone[1] - alone[0]) / 2
    flipped = paired_difference(second.tolist(), first.tolist(), pictures)
    assert flipped.value == -found.value
    assert paired_difference([0.3], [0.9], ["p"]).mcnemar_p is None
    with pytest.raises(ValueError, match="one each"):
        paired_difference([1], [1, 0], ["p"])
