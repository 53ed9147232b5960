"""p-values, Holm adjustment and numbers of questions, against definitions and simulation."""

import itertools
import math

import numpy as np
import pytest

from ragtune_ray.evaluation.metrics import MetricError
from ragtune_ray.evaluation.significance import (
    holm,
    questions_needed,
    questions_to_rule_out,
    sign_flip_test,
    unseen_share,
)


def exact(differences: np.ndarray) -> float:
    """The p-value over all sign flips, one by one."""
    observed = abs(differences.sum())
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-12 for value in sums) / len(sums)


@pytest.mark.parametrize("seed", range(4))
def test_random_flips_approximate_the_exact_p_value(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.3, 1, size=11)
    p = exact(differences)
    assert sign_flip_test(differences, 20_000, seed) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000) + 1e-3)


def test_pairs_without_a_difference_have_no_effect() -> None:
    moved = np.array([1.0, 1.0, 1.0, -1.0, 1.0])
    assert sign_flip_test(np.concatenate([moved, np.zeros(50)]), 5000, 1) == sign_flip_test(moved, 5000, 1)


def test_many_equal_gains_have_the_smallest_p_value() -> None:
    assert sign_flip_test(np.ones(100), 9999, 0) == pytest.approx(1 / 10_000)


def test_test_keeps_its_level_without_a_difference() -> None:
    source = np.random.default_rng(7)
    wrong = sum(sign_flip_test(source.choice([-1.0, 0.0, 1.0], size=40), 500, trial) <= 0.05 for trial in range(400))
    assert wrong / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_holm_equals_the_definition() -> None:
    p_values = [0.001, 0.2, 0.013, 0.04, 0.9, 0.011]
    order = np.argsort(p_values)
    expected = np.empty(6)
    for place, index in enumerate(order):
        expected[index] = max(min(1.0, (6 - j) * p_values[order[j]]) for j in range(place + 1))
    assert holm(p_values) == pytest.approx(expected)
    assert holm([]) == []


@pytest.mark.parametrize(("deviation", "difference"), [(0.5, 0.1), (0.3, 0.05)])
def test_needed_questions_show_the_difference_with_power_80_percent(deviation: float, difference: float) -> None:
    n = questions_needed(deviation, difference, 0.95)
    assert n is not None
    trials = np.random.default_rng(3).normal(difference, deviation, size=(2000, n))
    z = trials.mean(axis=1) / (deviation / math.sqrt(n))
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.035)


def test_zero_difference_needs_no_number_bad_values_are_refused() -> None:
    assert questions_needed(0.5, 0.0, 0.95) is None
    with pytest.raises(MetricError, match="finite"):
        sign_flip_test(np.array([math.nan]), 10, 0)
    with pytest.raises(MetricError, match="resamples=0"):
        sign_flip_test(np.array([1.0]), 0, 0)


@pytest.mark.parametrize(("n", "upper"), [(1, 0.975), (10, 0.3085), (100, 0.0362)])
def test_unseen_share_equals_clopper_pearson(n: int, upper: float) -> None:
    assert unseen_share(n, 0.95) == pytest.approx(upper, abs=5e-5)
    assert (1 - unseen_share(n, 0.95)) ** n == pytest.approx(0.025)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
def test_needed_questions_are_exactly_enough_to_rule_out(share: float) -> None:
    n = questions_to_rule_out(share, 0.95)
    assert unseen_share(n, 0.95) <= share < unseen_share(n - 1, 0.95)
