"""Tokens against those of Stanford's program, and caption scores worked out by hand."""

from __future__ import annotations

import importlib.util
import math
import shutil

import pytest

from llava.eval.questions import Question
from llava.eval.scorers import score
from llava.eval.scorers.captions import bleu_counts, rouge_f1, rouge_l
from llava.eval.scorers.ptb import tokenise_all

# What PTBTokenizer (CoreNLP 3.4.1, -preserveLines -lowerCase) returned, punctuation dropped.
TOKENS = {
    "A man's dog (brown) isn't here.": "a man 's dog -lrb- brown -rrb- is n't here",
    'Two dogs!! "Hello" in the U.S.': "two dogs !! hello in the u.s.",
    "It cost $5.00, 50% of 1/2 & AT&T; grey": "it cost $ 5.00 50 % of 1/2 & at&t grey",
    "a well-known man -- at 10:30am p.m. Mr. Smith": "a well-known man at 10:30 am p.m. mr. smith",
    "cannot gonna it's he'd we've 'tis 90's '90s": (
        "can not gon na it 's he 'd we 've 't is 90 's '90s"
    ),
    "see http://x.y/z :) #tag @me c/o and/or": "see http://x.y/z :-rrb- #tag @me c/o and/or",
    "café naïve – … “quoted” ‘x’ ½ € £5": "café naïve quoted x 1/2 $ # 5",
    "No. 5 on St. James Ave. No.": "no. 5 on st. james ave. no",
    "word.Word word,word word?word": "word.word word word word?word",
    "x... y wait... so": "x. y wait so",
    "* / \\ | ~ [x] {y}": "* / \\ | ~ -lsb- x -rsb- -lcb- y -rcb-",
    "T-shirt 20-year-old man/woman 3-D": "t-shirt 20-year-old man/woman 3-d",
    "y'all o'clock rock'n'roll O'Hare d'oeuvres": "y' all o'clock rock 'n' roll o'hare d'oeuvres",
    "emoji 😀 a\u200bb ok": "emoji a b ok",
    "6'2\" 12\" 5ft 1990's": "6 2 12 5ft 1990 's",
    "call (555) 555-1234 1 1/2 cups": "call -lrb-555-rrb-\u00a0555-1234 1\u00a01/2 cups",
    "foo.jpg www.a.com a.com. me@x.com": "foo.jpg www.a.com a.com me@x.com",
    "iPhone., word.; end.": "iphone. word. end",
    "R&B r&b B&W's w/ w/out": "r&b r & b b&w 's w / w/out",
    "Jan. Sept. approx. etc. vs. Inc. fig. 3": "jan. sept. approx etc. vs. inc. fig. 3",
    "don’t it’s -- --- ----- _ __": "do n't it 's ----- _ __",
    "-5 +5 5$ £ ¥ 5° ©": "-5 +5 5 $ # ¥ 5 ° ©",
    "see plan B. The cat, by J. Smith, vitamin C.": "see plan b the cat by j. smith vitamin c",
    "A cat and I.": "a cat and i.",  # what stands on the next line decides
    "": "",
}


def test_tokens_are_those_of_stanfords_program():
    assert tokenise_all(list(TOKENS)) == list(TOKENS.values())


@pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap and Java",
)
def test_the_program_itself_says_so():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {place: [{"caption": text}] for place, text in enumerate(TOKENS)}
    given = PTBTokenizer().tokenize(captions)
    assert [given[place][0] for place in captions] == list(TOKENS.values())


def test_captions_by_hand():
    """Two pictures: an n-gram of one picture's references weighs log 2, one of both nothing."""
    questions = [Question("a", 1, "?", ("a.jpg",)), Question("b", 2, "?", ("b.jpg",))]
    labels = {"a": ["the cat sat down now"], "b": ["the dog ran off fast"]}
    same = score("captions", questions, labels, {"a": "The cat sat down now.", "b": "x"})
    first, second = same.per_item
    assert first["score"] == pytest.approx(10)
    assert second["score"] == 0
    assert same.value == pytest.approx(500)
    assert same.metrics["ROUGE_L"]["value"] == pytest.approx(50)
    # "the" is in both; of the four other words two match; of four bigrams two; lengths differ.
    part = score("captions", questions, labels, {"a": "the cat sat", "b": "x"}).per_item[0]
    cosines = [2 / math.sqrt(2 * 4), 2 / math.sqrt(2 * 4), 1 / math.sqrt(1 * 3), 0]
    penalty = math.exp(-((2 - 4) ** 2) / (2 * 36))
    assert part["score"] == pytest.approx(10 * sum(cosines) / 4 * penalty)
    assert part["bleu"] == [3, 5, 3, 2, 1, 0, 3, 2, 1, 0]


def test_rouge_and_bleu_counts():
    precision, recall = 2 / 3, 2 / 4
    both = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l("a b x", ["a b c d"]) == pytest.approx(both)
    assert rouge_l("", ["a"]) == 0
    # The closest length, of two equally close the shorter; each reference clips on its own.
    assert bleu_counts("a a a b", ["a a", "a b c d e f"]) == [4, 2, 4, 3, 2, 1, 3, 2, 0, 0]
    assert rouge_f1("The Cat!", "the cat sat") == pytest.approx(0.8)
