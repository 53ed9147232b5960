"""How many questions show a difference between two arms, before anything is measured."""

from __future__ import annotations

from ragtune_ray.evaluation import significance

ASSUMED_DEVIATION = 0.5
"""Of the paired differences of two arms, before anything is measured: as if a quarter of all questions were won or lost."""


def needed_questions(difference: float, confidence: float) -> int:
    """Number of questions that show a difference with 80 % probability, before the spread of the scores is known."""
    return significance.questions_needed(ASSUMED_DEVIATION, difference, confidence) or 1


def smallest_difference(n: int, confidence: float) -> float:
    """The smallest difference that n questions show with 80 % probability; 1 if they show none.

    >>> round(smallest_difference(201, 0.95), 3)
    0.1
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if needed_questions(middle, confidence) <= n else (middle, high)
    return high
