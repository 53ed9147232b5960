"""Is a difference between two arms real, and how many questions would show it?

In: paired differences, p-values, numbers of questions. Out: p-values, shares and numbers of questions. The intervals themselves
are `intervals`'; this module knows nothing of arms, files or Ray.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.metrics import MetricError

__all__ = ["holm", "questions_needed", "questions_to_rule_out", "sign_flip_test", "unseen_share", "with_unseen"]

_BLOCK_SIGNS = 2**24
POWER = 0.8
"""The chance that `questions_needed` gives to see a difference that is there."""


def sign_flip_test(differences: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p-value of a paired permutation test: each pair's sign is flipped at random (Edgington and Onghena 2007).

    The observed signs count as one of the permutations, so that p is never 0. Pairs without a difference change nothing.

    >>> sign_flip_test(np.zeros(10), 1000, 0)
    1.0

    Args:
        differences: (n,) of one metric, one arm less the other, over the same queries.
        resamples: random flips.
        seed: of the flips.

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
        # Sums that are equal but for rounding are as large.
        as_large += int(np.count_nonzero(np.abs(sums) >= observed * (1 - 1e-12)))
    return (1 + as_large) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of tests, each adjusted so that the family errs as seldom as one test (Holm 1979).

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
    """How many paired questions would show a difference, with a chance of `POWER`, by a two-sided test.

    The usual normal approximation: ((z of confidence + z of power) * deviation / difference) squared.

    >>> questions_needed(0.5, 0.1, 0.95)
    197

    Args:
        deviation: standard deviation of the paired differences.
        difference: what is to be seen; its sign does not matter.
        confidence: 0 to 1.

    Returns:
        The number, or None where there is no difference to be seen.
    """
    if difference == 0:
        return None
    normal = NormalDist()
    reach = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(POWER)
    return max(1, math.ceil((reach * deviation / difference) ** 2))


def unseen_share(n: int, confidence: float) -> float:
    """The largest share of all questions in which something may happen that happened in none of n of them.

    The upper end of the two-sided interval of Clopper and Pearson (1934) for no event in n: the "rule of three" (Hanley and
    Lippman-Hand 1983), which at one-sided 95 % is about 3 / n.

    >>> round(unseen_share(100, 0.95), 4)
    0.0362

    Args:
        n: questions that were asked, at least 1.
        confidence: of the interval, 0 to 1.
    """
    tail = (1 - confidence) / 2
    return float(1 - tail ** (1 / n))


def with_unseen(interval: Interval, differences: np.ndarray, confidence: float) -> Interval:
    """The interval of a mean difference, its ends no nearer than losses and gains allow that no question showed.

    Where an arm is not ahead and lost no question, the lower end is at most value - `unseen_share`; where it lost some, no nearer
    than without them. So is the upper end, for gains, where it is not behind. Whether one that is ahead is better is asked of the
    interval as it was.

    Args:
        interval: of the bootstrap, at the same confidence.
        differences: (n,) between -1 and 1: a question loses or gains 1 at most.
        confidence: 0 to 1.
    """
    unseen = unseen_share(interval.n, confidence)
    # Less what was lost: else one loss would prove more than none.
    gained, lost = (float(np.maximum(sign * differences, 0).mean()) for sign in (1, -1))
    low = min(interval.low, gained - unseen) if interval.value <= 0 else interval.low
    high = max(interval.high, unseen - lost) if interval.value >= 0 else interval.high
    return dataclasses.replace(interval, low=low, high=high)


def questions_to_rule_out(share: float, confidence: float) -> int:
    """How many questions without an event rule out that it happens in more than a share of all; the inverse of `unseen_share`.

    >>> questions_to_rule_out(0.02, 0.95)
    183

    Args:
        share: above 0, below 1.
        confidence: as for `unseen_share`.
    """
    return math.ceil(math.log((1 - confidence) / 2) / math.log1p(-share))
