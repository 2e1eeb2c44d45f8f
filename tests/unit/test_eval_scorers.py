"""Exact match and its intervals, against numbers worked out by hand or by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llava.eval.questions import Question
from llava.eval.scorers import SCORERS, score_exact
from llava.eval.scorers.exact import normalise
from llava.eval.scorers.interval import accuracy_interval, cluster_bootstrap, wilson


def question(uid: str, image: str | None = None, category: str = "default") -> Question:
    return Question(uid, 1, "?", (image,) if image else (), category)


def test_normalise():
    assert normalise(" Yes. ") == "yes"
    assert normalise("3  5\n1") == "3 5 1"
    assert normalise("St. Ives") == "st. ives"


def test_scores_an_item_at_a_time():
    questions = [question("a", category="x"), question("b", category="x"), question("c")]
    labels = {"a": "yes", "b": "no", "c": "3 5"}
    answers = [{"uid": "c", "text": "3 5."}, {"uid": "a", "text": "no"}]
    scores = SCORERS["exact"](questions, labels, answers)
    assert [item["score"] for item in scores.per_item] == [0, 0, 1]
    assert [item["uid"] for item in scores.per_item] == ["a", "b", "c"]
    assert scores.accuracy == pytest.approx(100 / 3)
    assert (scores.n, scores.n_missing) == (3, 1)
    assert scores.per_category == {
        "x": {"accuracy": 0.0, "n": 2},
        "default": {"accuracy": 100.0, "n": 1},
    }
    assert scores.interval == "wilson"
    assert scores.low < scores.accuracy < scores.high


def test_substring_is_no_match():
    scores = score_exact([question("a")], {"a": "3"}, [{"uid": "a", "text": "13"}])
    assert scores.accuracy == 0


def test_bad_answers_are_refused():
    twice = [{"uid": "a", "text": "yes"}, {"uid": "a", "text": "no"}]
    with pytest.raises(ValueError, match="two different answers to a"):
        score_exact([question("a")], {"a": "yes"}, twice)
    assert score_exact([question("a")], {"a": "yes"}, [twice[0]] * 2).accuracy == 100
    with pytest.raises(ValueError, match="no label"):
        score_exact([question("a")], {}, [])
    with pytest.raises(ValueError, match="no questions"):
        score_exact([], {}, [])


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
