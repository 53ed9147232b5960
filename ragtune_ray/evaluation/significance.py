"""Tests whether a difference between two arms is real, and computes how many questions would show it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.metrics import MetricError

_BLOCK_SIGNS = 2**24
POWER = 0.8
"""Probability with which `questions_needed` questions show a real difference."""


def sign_flip_test(differences: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p-value of a paired permutation test that flips signs at random (Edgington and Onghena 2007).

    `differences` (n,) are one arm minus the other, over the same queries. The observed signs count as one of the permutations,
    so p is never 0. Pairs without a difference have no effect.

    >>> sign_flip_test(np.zeros(10), 1000, 0)
    1.0

    Raises:
        MetricError: `resamples` is below 1, or a difference is not finite.
    """
    if resamples < 1 or not np.isfinite(differences).all():
        raise MetricError(f"resamples={resamples}: must be at least 1, and every difference finite")
    moved = np.asarray(differences, dtype=np.float64)
    moved = moved[moved != 0]
    if not moved.size:
        return 1.0
    observed = abs(moved.sum())
    generator = np.random.default_rng(seed)
    as_large = 0
    block = max(1, _BLOCK_SIGNS // moved.size)
    for start in range(0, resamples, block):
        shape = (min(block, resamples - start), moved.size)
        sums = (generator.integers(0, 2, size=shape, dtype=np.int8) * 2 - 1) @ moved
        # A sum that differs only by rounding counts as equally large.
        as_large += int(np.count_nonzero(np.abs(sums) >= observed * (1 - 1e-12)))
    return (1 + as_large) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests so that together they err as rarely as one test (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - place)))
        adjusted[index] = largest
    return adjusted


def questions_needed(deviation: float, difference: float, confidence: float) -> int | None:
    """Number of paired questions for a two-sided test to show a difference with probability `POWER`; None if it is 0.

    Normal approximation: ((z of confidence + z of power) * deviation / difference) squared, with the standard deviation of the
    paired differences.

    >>> questions_needed(0.5, 0.1, 0.95)
    197
    """
    if difference == 0:
        return None
    normal = NormalDist()
    reach = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(POWER)
    return max(1, math.ceil((reach * deviation / difference) ** 2))


def unseen_share(n: int, confidence: float) -> float:
    """The largest plausible share of questions with an event that did not occur in any of n questions.

    The upper end of the two-sided Clopper-Pearson interval (1934) for no event in n: the "rule of three" (Hanley and
    Lippman-Hand 1983), about 3 / n at one-sided 95 %.

    >>> round(unseen_share(100, 0.95), 4)
    0.0362
    """
    tail = (1 - confidence) / 2
    return float(1 - tail ** (1 / n))


def with_unseen(interval: Interval, differences: np.ndarray, confidence: float) -> Interval:
    """Widen the bootstrap interval of a mean difference, at the same confidence, for losses and gains that no question showed.

    If the mean is at most 0, `low` is at most the mean gain - `unseen_share`, as if that share of all questions lost 1 each. If
    the mean is at least 0, `high` is at least `unseen_share` - the mean loss. The end nearer to 0 stays, so the bootstrap alone
    decides whether the arm that is ahead is better. Differences (n,) are between -1 and 1.
    """
    unseen = unseen_share(interval.n, confidence)
    # Observed losses do not raise `low`: otherwise one loss would prove more than none.
    gained, lost = (float(np.maximum(sign * differences, 0).mean()) for sign in (1, -1))
    low = min(interval.low, gained - unseen) if interval.value <= 0 else interval.low
    high = max(interval.high, unseen - lost) if interval.value >= 0 else interval.high
    return dataclasses.replace(interval, low=low, high=high)


def questions_to_rule_out(share: float, confidence: float) -> int:
    """Number of questions without an event that rules out more than this share; the inverse of `unseen_share`.

    >>> questions_to_rule_out(0.02, 0.95)
    183
    """
    return math.ceil(math.log((1 - confidence) / 2) / math.log1p(-share))
