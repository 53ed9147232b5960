"""Intervals of the difference between two arms, and how many questions would show a difference."""

from __future__ import annotations

import bisect
import math
from statistics import NormalDist

POWER = 0.8
"""Probability with which `questions_needed` questions show a real difference."""
_TIGHTEST_AT = 200
"""Number of questions at which the interval for any time is narrowest, compared with the interval for one look."""
_ROUNDING = 1e-9  # two equal means differ by less, when their sums are rounded


def difference_ends(
    value: float, deviation: float, n: int, confidence: float, *, any_time: bool = False
) -> tuple[float, float]:
    """The interval of the mean of paired differences, each between -1 and 1.

    A t interval after one difference of +1 and one of -1 are added. For scores of 0 and 1 this is the interval of Bonett and
    Price (2012), which Fagerland, Lydersen and Laake (2014) recommend for paired proportions. The two additions are a gain
    and a loss that n questions may not have shown, so the interval has a width even where all differences are equal.

    Args:
        value: mean of the differences, one arm minus the other, over the same questions.
        deviation: their standard deviation (with n - 1 in the denominator; 0 for n = 1).
        n: number of questions, at least 1.
        confidence: between 0 and 1.
        any_time: widen the interval so that it also holds for someone who looks after every question and stops when it suits
            (asymptotic confidence sequence: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024, theorem 2.2).

    >>> [round(end, 3) for end in difference_ends(0.0, 0.0, 100, 0.95)]
    [-0.028, 0.028]
    """
    from scipy.special import stdtrit

    total = n + 2
    squares = (n - 1) * deviation**2 + n * value**2 + 2
    mean = n * value / total
    spread = math.sqrt(max(0.0, squares / total - mean**2) * total / (total - 1))
    reach = _any_time_reach(total, confidence) if any_time else float(stdtrit(total - 1, (1 + confidence) / 2))
    half = reach * spread / math.sqrt(total)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _any_time_reach(n: int, confidence: float) -> float:
    """Half the width of the confidence sequence at n, in standard errors; narrowest at `_TIGHTEST_AT`."""
    error = 1 - confidence
    tightest = -2 * math.log(error) + math.log(-2 * math.log(error)) + 1
    rho_squared = max(tightest, 1.0) / _TIGHTEST_AT  # any positive number is valid; the formula is for high confidences
    grown = n * rho_squared + 1
    return math.sqrt(2 * grown / (n * rho_squared) * math.log(math.sqrt(grown) / error))


def questions_needed(deviation: float, difference: float, confidence: float, *, any_time: bool = False) -> int | None:
    """Number of paired questions that show a difference with probability `POWER`; None if it is 0, or nothing but rounding.

    The smallest n at which the half width of `difference_ends`, with the normal distribution, plus the z of the power in standard
    errors is at most `difference`. For `any_time` see there.

    >>> questions_needed(0.5, 0.1, 0.95), questions_needed(0.0, 0.02, 0.95)
    (201, 197)
    """
    if difference < _ROUNDING:
        return None
    normal, variance = NormalDist(), min(1.0, deviation**2)
    power, once = normal.inv_cdf(POWER), normal.inv_cdf((1 + confidence) / 2)

    def shows(n: int) -> bool:
        reach = _any_time_reach(n + 2, confidence) if any_time else once
        error = math.sqrt((n * variance + 2) / (n + 2)) / math.sqrt(n + 2)
        return (reach + power) * error <= difference

    enough = 1
    while not shows(enough):
        enough *= 2
    return bisect.bisect_left(range(enough + 1), x=True, lo=1, key=shows)
