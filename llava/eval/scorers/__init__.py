"""Scorers: pure functions from questions, right answers and given answers to scores.

One table, `SCORERS`: name -> `score(questions, labels, answers) -> Scores`.
"""

from llava.eval.scorers.exact import Scores, score_exact

SCORERS = {"exact": score_exact}

__all__ = ["SCORERS", "Scores", "score_exact"]
