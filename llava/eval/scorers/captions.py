"""Caption scores: CIDEr (the headline), BLEU-1..4, ROUGE-L, over Penn Treebank tokens.

Special here: CIDEr weighs an n-gram by how few of the *evaluated* pictures have it in a reference,
so a score on part of a set is no estimate of the score on all of it. Under resampling the weights
stay those of the whole set. METEOR needs Java and its tables: it is reported where pycocoevalcap is
installed.

Rules: pycocoevalcap 1.2 (Cider n=4, sigma=6; Rouge beta=1.2; Bleu "closest").
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava.eval.questions import Question
from llava.eval.scorers.base import Item, Metric, Scorer, base_item, mean_metric
from llava.eval.scorers.ptb import tokenise_all

ORDERS = 4
SIGMA = 6.0
BETA = 1.2
Grams = Counter[tuple[str, ...]]
Vectors = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def ngrams(words: Sequence[str]) -> Grams:
    """All n-grams of 1 to 4 words with their counts."""
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, ORDERS + 1)
        for start in range(len(words) - n + 1)
    )


# ----------------------------------------------------------------------------- CIDEr
class Cider:
    """Document frequencies of a set of references, one list of token texts a picture."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.references = [[ngrams(text.split()) for text in texts] for texts in references]
        self.frequency: Counter[tuple[str, ...]] = Counter()
        for grams in self.references:
            self.frequency.update(set().union(*grams))
        self.log_pictures = math.log(len(references))

    def score(self, place: int, caption: str) -> float:
        """CIDEr of one caption against the references of picture `place`: 0 to 10."""
        mine = self.vectors(ngrams(caption.split()))
        theirs = [self.vectors(grams) for grams in self.references[place]]
        total = sum(_similarity(mine, other) for other in theirs)
        return 10.0 * total / len(theirs)

    def vectors(self, grams: Grams) -> Vectors:
        """tf-idf weights and their norm for each n, and the number of bigrams."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        squares, bigrams = [0.0] * ORDERS, 0
        for gram, count in grams.items():
            idf = self.log_pictures - math.log(max(1.0, self.frequency[gram]))
            weight = count * idf
            weights[len(gram) - 1][gram] = weight
            squares[len(gram) - 1] += weight**2
            if len(gram) == 2:
                bigrams += count
        return weights, [math.sqrt(square) for square in squares], bigrams


def _similarity(mine: Vectors, theirs: Vectors) -> float:
    """Clipped cosine, averaged over n, less the more the lengths (in bigrams) differ."""
    total = 0.0
    for own, own_norm, other, other_norm in zip(
        mine[0], mine[1], theirs[0], theirs[1], strict=True
    ):
        dot = sum(
            min(weight, other[gram]) * other[gram] for gram, weight in own.items() if gram in other
        )
        if own_norm and other_norm:
            dot /= own_norm * other_norm
        total += dot
    return total / ORDERS * math.exp(-((mine[2] - theirs[2]) ** 2) / (2 * SIGMA**2))


# ----------------------------------------------------------------------------- ROUGE-L
def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, against in enumerate(other, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == against else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """Best precision and best recall over the references (not of one), recall weighing more."""
    words = caption.split(" ")
    common = [(common_length(words, text.split(" ")), len(text.split(" "))) for text in references]
    precision = max(length for length, _ in common) / len(words)
    recall = max(length / size for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def rouge_f1(said: str, right: str) -> float:
    """ROUGE-L as an F1 over lower-case words of letters and digits, as Hugging Face's metric."""
    one, other = (re.findall("[a-z0-9]+", text.lower()) for text in (said, right))
    common = common_length(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


# ----------------------------------------------------------------------------- BLEU
def bleu_counts(caption: str, references: Sequence[str]) -> list[int]:
    """Length, length of the closest reference, n-grams said (1 to 4), n-grams that are right."""
    words = caption.split()
    lengths = [len(text.split()) for text in references]
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    most: Grams = Counter()
    for text in references:
        most |= ngrams(text.split())
    right = [0] * ORDERS
    for gram, count in ngrams(words).items():
        right[len(gram) - 1] += min(count, most[gram])
    said = [max(0, len(words) - n) for n in range(ORDERS)]
    return [len(words), closest, *said, *right]


def bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """Corpus BLEU of [..., 10] counts, 0 to 1."""
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's guards against empty counts
    precision = np.prod((sums[..., 6 : 6 + order] + tiny) / (sums[..., 2 : 2 + order] + small), -1)
    length = (sums[..., 0] + tiny) / (sums[..., 1] + small)
    return precision ** (1 / order) * np.where(length < 1, np.exp(1 - 1 / length), 1.0)


# ----------------------------------------------------------------------------- METEOR
def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """pycocoevalcap's METEOR (0 to 1) of token texts; None where it or Java is not installed."""
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        return None
    from pycocoevalcap.meteor.meteor import Meteor

    said = {place: [text] for place, text in enumerate(captions)}
    right = {place: list(texts) for place, texts in enumerate(references)}
    return float(Meteor().compute_score(right, said)[0])


# ----------------------------------------------------------------------------- the scorer
def _items(
    questions: Sequence[Question],
    labels: Mapping[str, list[str]],
    given: Mapping[str, str],
    dialect: str,
) -> list[Item]:
    """labels: the reference captions of each picture."""
    sizes = [len(labels[question.uid]) for question in questions]
    tokenised = iter(tokenise_all([text for q in questions for text in labels[q.uid]]))
    references = [[next(tokenised) for _ in range(size)] for size in sizes]
    captions = tokenise_all([given.get(question.uid) or "" for question in questions])
    cider = Cider(references)
    items = []
    for place, (question, caption) in enumerate(zip(questions, captions, strict=True)):
        said = given.get(question.uid)
        items.append(
            base_item(question, said)
            | {
                "parsed": caption,
                "label": references[place],
                "score": cider.score(place, caption),
                "rouge_l": rouge_l(caption, references[place]),
                "bleu": bleu_counts(caption, references[place]),
            }
        )
    return items


def _metrics(items: Sequence[Item], dialect: str) -> dict[str, Metric]:
    counts = np.array([item["bleu"] for item in items], dtype=float)
    found = {"CIDEr": mean_metric(items, scale=100.0), "ROUGE_L": mean_metric(items, "rouge_l")}
    for order in range(1, ORDERS + 1):
        found[f"Bleu_{order}"] = Metric(
            counts, lambda sums, n=order: 100 * bleu(sums, n), len(items)
        )
    return found


def _details(items: Sequence[Item], dialect: str) -> dict[str, Any]:
    score = meteor([item["parsed"] for item in items], [item["label"] for item in items])
    return {} if score is None else {"METEOR": 100 * score}


CAPTIONS = Scorer(_items, _metrics, _details, ("lmms",))
