"""How often two graders of the same answers agree, and how much of it is more than chance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ragtune_ray.evaluation.labelling.labels import Labels

ALIKE_WITHIN = 0.25
"""Grades less than this apart are alike: half of the step between two grades."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two graders of the same answers."""

    n: int
    """Answers that both graded."""
    alike: int
    """Answers with the same grade."""
    kappa: float | None = None
    """Cohen's kappa with linear weights: 1 if all grades are equal, 0 if they are as near as by chance; None: undefined, as
    all grades are equal anyway."""

    def sentence(self) -> str:
        """The numbers in words.

        >>> Agreement(50, 41, 0.712).sentence()
        '41 of 50 answers alike, kappa 0.71'
        """
        kappa = "" if self.kappa is None else f", kappa {self.kappa:.2f}"
        return f"{self.alike:,} of {self.n:,} answers alike{kappa}"


def agreement(one: Sequence[float], other: Sequence[float]) -> Agreement:
    """How well the grades of two graders agree, answer by answer; grades are from 0 to 1.

    Kappa is 1 - (mean distance of the two grades of an answer) / (mean distance if answers were paired by chance). For the three
    grades this is Cohen's kappa with linear weights (Cohen 1968): half right instead of right is half an error, as in the mean
    grade, which decides. The mean of several people is no grade of the three and counts as it is.

    >>> round(agreement([0, 0.5, 1, 1], [0, 1, 1, 1]).kappa, 3)  # 1 - .125 / .4375
    0.714
    """
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if not len(a):
        return Agreement(0, 0)
    apart = np.abs(a - b)
    (grades_a, times_a), (grades_b, times_b) = (np.unique(each, return_counts=True) for each in (a, b))
    by_chance = float(times_a @ np.abs(grades_a[:, np.newaxis] - grades_b) @ times_b) / len(a) ** 2
    kappa = 1 - float(apart.mean()) / by_chance if by_chance else None
    return Agreement(len(a), int((apart < ALIKE_WITHIN).sum()), kappa)


def between_labellers(labels: Labels) -> Agreement | None:
    """How well people agree with each other, over each pair of labels of one answer; None if no answer has two."""
    pairs = [
        (given[one], given[other])
        for given in labels.by_labeller().values()
        for one, other in itertools.combinations(sorted(given), 2)
    ]
    return agreement(*zip(*pairs, strict=True)) if pairs else None
