"""Intervals of paired differences: exact coverage, an independent formula, and looking at any time."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ragtune_ray.evaluation.significance import difference_ends, questions_needed


def ends(differences: np.ndarray, confidence: float = 0.95, *, any_time: bool = False) -> tuple[float, float]:
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return difference_ends(float(np.mean(differences)), deviation, len(differences), confidence, any_time=any_time)


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 30), (3, 9, 60), (30, 40, 160), (0, 5, 20)])
def test_interval_of_paired_proportions_is_that_of_bonett_and_price(lost: int, won: int, n: int) -> None:
    differences = np.concatenate([-np.ones(lost), np.ones(won), np.zeros(n - lost - won)])
    first, second = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    # Their variance with the normal quantile; ours divides by N - 1 and uses the t quantile.
    error = math.sqrt((first + second - (first - second) ** 2) / (n + 2)) * math.sqrt((n + 2) / (n + 1))
    half = stats.t.ppf(0.975, n + 1) * error
    assert ends(differences) == pytest.approx((first - second - half, first - second + half))


@pytest.mark.parametrize("n", [20, 35])
def test_exact_coverage_of_paired_proportions(n: int) -> None:
    """All outcomes of n questions, weighted by their probability: 95 % intervals cover at least 93.5 %."""
    outcomes = [(lost, won) for lost in range(n + 1) for won in range(n + 1 - lost)]
    covering = np.array([ends(np.repeat([-1.0, 1.0, 0.0], [a, b, n - a - b])) for a, b in outcomes])
    rates = np.concatenate([[0.0, 0.01], np.linspace(0.05, 0.5, 6)])
    for lose, win in itertools.product(rates, rates):
        chances = stats.multinomial.pmf([(a, b, n - a - b) for a, b in outcomes], n, [lose, win, 1 - lose - win])
        covers = (covering[:, 0] <= win - lose) & (win - lose <= covering[:, 1])
        assert chances[covers].sum() >= 0.935, (lose, win)


def test_interval_keeps_a_width_where_no_difference_was_seen() -> None:
    low, high = ends(np.zeros(100))
    half = stats.t.ppf(0.975, 101) * math.sqrt(2 / 101) / math.sqrt(102)
    assert (low, high) == pytest.approx((-half, half))
    assert difference_ends(1.0, 0.0, 1, 0.95) == (pytest.approx(-1.0), 1.0), "ends stay between -1 and 1"


def test_any_time_interval_holds_at_every_look() -> None:
    """Looking after every question from the 20th to the 600th misses the true mean in at most 5 % of the runs."""
    generator = np.random.default_rng(5)
    looks, missed, fooled = range(20, 601), 0, 0
    for _ in range(200):
        drawn = generator.choice([-1.0, 0.0, 1.0], size=600, p=[0.2, 0.5, 0.3])
        sums, squares = np.cumsum(drawn), np.cumsum(drawn**2)
        for n in looks:
            mean = sums[n - 1] / n
            deviation = math.sqrt(max(0.0, (squares[n - 1] - n * mean**2) / (n - 1)))
            low, high = difference_ends(mean, deviation, n, 0.95, any_time=True)
            if not low <= 0.1 <= high:
                missed += 1
                break
        fooled += any(
            not low <= 0.1 <= high
            for low, high in (
                difference_ends(sums[n - 1] / n, float(np.std(drawn[:n], ddof=1)), n, 0.95) for n in looks[::10]
            )
        )
    assert missed <= 0.05 * 200
    assert fooled > 0.15 * 200, "the interval for one look does not hold at every look"


@pytest.mark.parametrize(("deviation", "difference"), [(0.5, 0.1), (0.3, 0.02), (0.0, 0.02), (0.9, 0.3)])
def test_needed_questions_reach_the_difference(deviation: float, difference: float) -> None:
    reach = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)

    def reaches(n: int) -> bool:
        variance = (n * deviation**2 + 2) / (n + 2)  # with one gain and one loss added
        return reach * math.sqrt(variance / (n + 2)) <= difference

    n = questions_needed(deviation, difference, 0.95)
    assert reaches(n)
    assert not reaches(n - 1)
    assert questions_needed(deviation, 0.0, 0.95) is None


def test_needed_questions_for_any_time_shrink_that_interval() -> None:
    n = questions_needed(0.5, 0.05, 0.95, any_time=True)
    low, high = difference_ends(0.0, 0.5, n, 0.95, any_time=True)
    error = 0.5 / math.sqrt(n)
    assert (high - low) / 2 + stats.norm.ppf(0.8) * error == pytest.approx(0.05, rel=0.01)
    assert n > 1.5 * questions_needed(0.5, 0.05, 0.95)


def test_needed_questions_have_the_promised_power() -> None:
    n = questions_needed(math.sqrt(0.4 - 0.1**2), 0.1, 0.95)
    generator = np.random.default_rng(3)
    shown = [ends(generator.choice([-1.0, 0.0, 1.0], n, p=[0.15, 0.6, 0.25]))[0] > 0 for _ in range(2000)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)


def test_a_difference_of_rounding_needs_no_number_of_questions() -> None:
    assert questions_needed(0.5, 1.1e-17, 0.95) is None
    assert questions_needed(0.5, 1e-6, 0.95) is not None


def test_any_time_intervals_exist_for_every_confidence() -> None:
    widths = [difference_ends(0.0, 0.5, 100, confidence, any_time=True)[1] for confidence in (0.05, 0.1, 0.5, 0.95)]
    assert widths == sorted(widths)
    assert widths[0] > 0
