"""The names that code written for LLaVA imports from its answer evaluators.

    EvalAIAnswerProcessor()("The cat's!")        TextVQAAccuracyEvaluator().eval_pred_list(entries)

Entries are `{"pred_answer": text, "gt_answers": texts}`; results are means in 0..1. The rules are
those of `llava.eval.scorers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava.eval.scorers.anls import anls
from llava.eval.scorers.vqa_accuracy import consensus, evalai_answer

Entries = Sequence[Mapping[str, Any]]


class EvalAIAnswerProcessor:
    """Calls itself `evalai_answer`."""

    def __call__(self, item: str) -> str:
        """The processed answer."""
        return evalai_answer(item)


def _mean(score: Callable[[str, list[str]], float], entries: Entries) -> float:
    if not entries:
        raise ValueError("there are no answers to score")
    return sum(score(e["pred_answer"], e["gt_answers"]) for e in entries) / len(entries)


class TextVQAAccuracyEvaluator:
    """Agreement with ten people."""

    def eval_pred_list(self, pred_list: Entries) -> float:
        """Mean accuracy."""
        return _mean(
            lambda said, right: consensus(evalai_answer(said), list(map(evalai_answer, right))),
            pred_list,
        )


class STVQAAccuracyEvaluator:
    """Equality with one of the answers, after the processor."""

    def eval_pred_list(self, pred_list: Entries) -> float:
        """Mean accuracy."""
        return _mean(
            lambda said, right: float(evalai_answer(said) in map(evalai_answer, right)), pred_list
        )


class STVQAANLSEvaluator:
    """Edit distance to the closest answer."""

    def eval_pred_list(self, pred_list: Entries) -> float:
        """Mean ANLS."""
        return _mean(lambda said, right: anls(said, right, "llava"), pred_list)
