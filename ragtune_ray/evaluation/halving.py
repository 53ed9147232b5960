"""Successive halving: finds the best of several candidates with fewer answers than all would need on all questions.

All candidates answer a share of the questions, the better half of them answers as many again, and so on, until one is left or
the questions are used up (Jamieson and Talwalkar 2016). The best was chosen by these scores, so its own is optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ragtune_ray import RagtuneError

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


class HalvingError(RagtuneError, ValueError):
    """The candidates have no question in common; the message says what to do."""


def first_questions(num_candidates: int, num_questions: int) -> int:
    """Questions of the first round, so that the last two candidates answer all of them.

    >>> first_questions(2, 200), first_questions(5, 200), first_questions(16, 64), first_questions(4, 7)
    (200, 50, 20, 7)
    """
    num_rounds = (num_candidates - 1).bit_length()
    return min(num_questions, max(MIN_QUESTIONS, math.ceil(num_questions / (1 << (num_rounds - 1)))))


def halve(
    candidates: Sequence[str], num_questions: int, scores_of: Callable[[str, int, int], Sequence[float | None]]
) -> tuple[list[Round], dict[str, list[float | None]]]:
    """Search for the candidate with the highest mean score; of equal ones, the first wins.

    Args:
        candidates: at least two names.
        num_questions: number of questions available.
        scores_of: the scores of a candidate on the questions from the second argument to the third (excluded); None where
            a grade failed, so that no candidate of the round is scored on that question.

    Returns:
        The rounds (the last keeps only the best), and the scores of each candidate on the questions that it answered.

    Raises:
        HalvingError: in a round, no question has the scores of all candidates.
    """
    scores: dict[str, list[float | None]] = {name: [] for name in candidates}
    rounds: list[Round] = []
    alive, start, stop = list(candidates), 0, first_questions(len(candidates), num_questions)
    while len(alive) > 1:
        for name in alive:
            scores[name] += scores_of(name, start, stop)
        means = _means({name: scores[name] for name in alive})
        ranked = sorted(alive, key=lambda name: -means[name])  # stable: of equal ones, the first stays first
        kept = ranked[: 1 if stop == num_questions else math.ceil(len(ranked) / 2)]
        rounds.append(Round(stop, means, tuple(kept)))
        alive = [name for name in alive if name in kept]
        start, stop = stop, min(num_questions, 2 * stop)
    return rounds, scores


def _means(scores: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Candidate -> mean over the questions that have a score of every candidate."""
    rows = [row for row in zip(*scores.values(), strict=True) if None not in row]
    if not rows:
        raise HalvingError(
            f"no question has a score of each of {', '.join(scores)}, because grades failed; run the command again: only failed "
            "grades are asked for again"
        )
    columns = zip(*rows, strict=True)
    return {
        name: math.fsum(value for value in column if value is not None) / len(rows)
        for name, column in zip(scores, columns, strict=True)
    }
