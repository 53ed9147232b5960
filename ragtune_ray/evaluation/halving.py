"""Successive halving: finds the best of several candidates with fewer answers than all would need on all questions.

All candidates answer a share of the questions, the better half of them answers as many again, and so on, until one is left or
the questions are used up (Jamieson and Talwalkar 2016). The best was chosen by these scores, so its own is optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIN_QUESTIONS = 20
"""Questions of the first round, if there are so many; fewer would drop candidates by chance."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round: the candidates that took part and those that went on."""

    num_questions: int
    """Questions that each of its candidates has answered so far."""
    means: dict[str, float]
    """Candidate -> mean score over these questions."""
    kept: tuple[str, ...]
    """Best first."""


def first_questions(num_candidates: int, num_questions: int) -> int:
    """Questions of the first round, so that the last two candidates answer all of them.

    >>> first_questions(2, 200), first_questions(5, 200), first_questions(16, 64), first_questions(4, 7)
    (200, 50, 20, 7)
    """
    num_rounds = (num_candidates - 1).bit_length()
    return min(num_questions, max(MIN_QUESTIONS, math.ceil(num_questions / (1 << (num_rounds - 1)))))


def halve(
    candidates: Sequence[str], num_questions: int, scores_of: Callable[[str, int, int], Sequence[float]]
) -> tuple[list[Round], dict[str, list[float]]]:
    """Search for the candidate with the highest mean score; of equal ones, the first wins.

    Args:
        candidates: at least two names.
        num_questions: number of questions available.
        scores_of: the scores of a candidate on the questions from the second argument to the third (excluded).

    Returns:
        The rounds (the last keeps only the best), and the scores of each candidate on the questions that it answered.
    """
    scores: dict[str, list[float]] = {name: [] for name in candidates}
    rounds: list[Round] = []
    alive, start, stop = list(candidates), 0, first_questions(len(candidates), num_questions)
    while len(alive) > 1:
        for name in alive:
            scores[name] += scores_of(name, start, stop)
        means = {name: math.fsum(scores[name]) / stop for name in alive}
        ranked = sorted(alive, key=lambda name: -means[name])  # stable: of equal ones, the first stays first
        kept = ranked[: 1 if stop == num_questions else math.ceil(len(ranked) / 2)]
        rounds.append(Round(stop, means, tuple(kept)))
        alive = [name for name in alive if name in kept]
        start, stop = stop, min(num_questions, 2 * stop)
    return rounds, scores
