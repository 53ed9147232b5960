"""Corrects a judge's grades by people's labels of a random part of the answers: prediction-powered inference.

The judge grades the answers to all n questions, people those to m of them, drawn at random. The estimate is the mean of the
labels plus b times the judge's mean over all questions minus its mean over the labelled ones. It is unbiased however wrong
the judge is, for the labels measure the judge's error (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023). The slope b
of labels on grades makes its variance the least (power tuning: Angelopoulos, Duchi and Zrnic 2023): a judge that knows
nothing has b = 0, which leaves the labels alone. As labelled questions are part of all questions, this is the regression
estimator of double sampling (Cochran 1977, chapter 12). A difference of two arms is estimated like a mean, from the
differences of both kinds of grades.

m is small, so the interval is one of Student's t, with the degrees of freedom of Welch and Satterthwaite, and a little is
added to what the labels show (`UNSEEN`). `bench/prediction_powered.py` simulates how often it contains the truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ragtune_ray.evaluation import significance
from ragtune_ray.evaluation.metrics.errors import MetricError

UNSEEN = 0.2
"""Weight of two added labels, one a whole grade above the judge's and one below: errors that m labels may not have shown. Without
them a judge that agrees with every label would get an interval that is far too narrow; with weight 1 intervals are too wide."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimated mean, or mean difference, and how uncertain it is."""

    value: float
    error: float
    """Standard error."""
    degrees: float
    """Degrees of freedom of the t distribution."""
    n: int
    """Questions that the judge graded."""
    labels: int
    """Questions that people labelled."""

    def ends(self, confidence: float) -> tuple[float, float]:
        """The interval of this confidence, between 0 and 1, not cut at the least or greatest possible mean."""
        return t_ends(self.value, self.error, self.degrees, confidence)


def t_ends(value: float, error: float, degrees: float, confidence: float) -> tuple[float, float]:
    """The interval of Student's t around `value`.

    >>> [round(end, 3) for end in t_ends(0.5, 0.1, 10, 0.95)]
    [0.277, 0.723]
    """
    from scipy.special import stdtrit

    half = float(stdtrit(degrees, (1 + confidence) / 2)) * error
    return value - half, value + half


def estimate(graded: Mapping[str, float], labelled: Mapping[str, float]) -> Estimate:
    """The mean of what people would grade over all questions, or the mean difference of two arms.

    Args:
        graded: query id -> the judge's grade, or its grade of one arm minus that of the other; in [-1, 1].
        labelled: query id -> the same by people, for a random part of the questions; those that the judge did not grade are
            left out.

    Raises:
        MetricError: fewer than 3 questions have both.

    >>> graded = {str(number): float(number % 2) for number in range(1000)}
    >>> found = estimate(graded, {str(number): 0.5 * (number % 2) for number in range(100)})
    >>> round(found.value, 3), [round(end, 3) for end in found.ends(0.95)]
    (0.25, [0.23, 0.27])
    """
    shared = sorted(graded.keys() & labelled.keys())
    if len(shared) < 3:
        raise MetricError(f"{len(shared)} questions have a label and a grade of the judge; a correction needs 3")
    people = np.array([labelled[query_id] for query_id in shared])
    judge = np.array([graded[query_id] for query_id in shared])
    everywhere = np.array(list(graded.values()))
    slope, remaining, weight = _regression(people, judge)
    moved = float(everywhere.mean() - judge.mean())
    n, degrees = len(everywhere), weight - 2
    # What people's labels leave uncertain, with the uncertainty of the slope; and the spread of questions as the judge sees it.
    of_labels = remaining / degrees * (1 / weight + (moved**2 / _squares(judge, UNSEEN) if slope else 0.0))
    of_judge = slope**2 * float(everywhere.var(ddof=1)) / n
    total = of_labels + of_judge
    freedom = total**2 / (of_labels**2 / degrees + of_judge**2 / (n - 1))
    return Estimate(float(people.mean()) + slope * moved, math.sqrt(total), freedom, n, len(shared))


def labels_alone(labelled: Mapping[str, float]) -> Estimate:
    """The mean of the labels, with the same additions, for where no judge graded.

    Raises:
        MetricError: fewer than 2 labels.
    """
    people = np.array(list(labelled.values()))
    if len(people) < 2:
        raise MetricError(f"{len(people)} questions have a label; an interval needs 2")
    # One label half a grade above the mean and one below it, as in `significance.difference_ends`.
    weight = len(people) + 2
    error = math.sqrt(_squares(people, 1.0) / (weight - 1) / weight)
    return Estimate(float(people.mean()), error, weight - 1, len(people), len(people))


def questions_needed(error: float, n: int, difference: float, confidence: float) -> int | None:
    """Number of questions that show a difference with probability `significance.POWER`, if the same share of them is labelled.

    Args:
        error: standard error of the difference over `n` questions; it shrinks with the root of their number.
        n: number of questions so far.
        difference: what is to be shown; None is returned for 0.
        confidence: of the interval.

    >>> questions_needed(0.05, 1000, 0.1, 0.95)  # (1.96 + 0.84) * 0.05 = 0.14 is 1.4 times too wide
    1963
    """
    if difference == 0:
        return None
    normal = NormalDist()
    reach = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(significance.POWER)
    return math.ceil(n * (reach * error / difference) ** 2)


def _regression(people: FloatArray, judge: FloatArray) -> tuple[float, float, float]:
    """Slope of labels on grades between 0 and 1, squares that remain, and the weight of all labels with the added ones.

    For the slope, the added labels are half a grade from the means, on opposite sides for people and judge.
    """
    away = judge - judge.mean()
    together = float((people - people.mean()) @ away) - UNSEEN / 2
    slope = min(1.0, max(0.0, together / _squares(judge, UNSEEN)))
    remaining = float(((people - people.mean() - slope * away) ** 2).sum()) + 2 * UNSEEN
    return slope, remaining, len(people) + 2 * UNSEEN


def _squares(values: FloatArray, added: float) -> float:
    """Sum of squared distances from the mean, with two values of this weight, half a grade above and below it."""
    return float(((values - values.mean()) ** 2).sum()) + added / 2
