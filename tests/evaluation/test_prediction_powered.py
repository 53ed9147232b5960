"""Grades of a judge, corrected by labels: against another library's numbers, a closed formula, and simulated truth."""

import numpy as np
import pytest
from scipy import stats

from bench import prediction_powered as simulation
from ragtune_ray.evaluation import prediction_powered
from ragtune_ray.evaluation.metrics.errors import MetricError


def named(values: np.ndarray) -> dict[str, float]:
    return {str(place): float(value) for place, value in enumerate(values)}


def graded(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """People's grades, and a judge's, which are by chance in a fifth of the cases."""
    generator = np.random.default_rng(seed)
    people = generator.integers(0, 3, n) / 2
    return people, np.where(generator.random(n) < 0.8, people, generator.integers(0, 3, n) / 2)


def test_with_many_labels_it_agrees_with_ppi_python() -> None:
    people, judge = graded(4000, seed=7)
    found = prediction_powered.estimate(named(judge), named(people[:800]))
    assert (found.n, found.labels) == (4000, 800)
    # ppi_mean_pointestimate and ppi_mean_ci of ppi-python 0.2.3 for the same grades.
    assert found.value == pytest.approx(0.51196485, abs=2e-4)
    assert found.ends(0.95) == pytest.approx((0.49195384, 0.53197587), abs=3e-4)


def test_it_is_the_regression_estimator_of_double_sampling() -> None:
    people, judge = graded(3000, seed=1)
    found = prediction_powered.estimate(named(judge), named(people[:1500]))
    line = stats.linregress(judge[:1500], people[:1500])
    assert found.value == pytest.approx(line.intercept + line.slope * judge.mean(), abs=2e-4)
    remaining = float(np.var(people[:1500] - line.intercept - line.slope * judge[:1500], ddof=2))
    variance = remaining / 1500 + line.slope**2 * float(judge.var(ddof=1)) / 3000  # Cochran 1977, equation 12.51
    assert found.error == pytest.approx(np.sqrt(variance), rel=0.01)


def test_a_judge_that_agrees_with_all_labels_leaves_uncertainty() -> None:
    judge = np.tile([0.0, 1.0], 100)
    found = prediction_powered.estimate(named(judge), named(judge[:20]))
    low, high = found.ends(0.95)
    # Rule of three: 20 answers without an error leave up to 14 % with one; half of it in either direction.
    assert 0.15 < high - low < 0.35
    constant = prediction_powered.estimate(named(np.ones(200)), named(np.ones(20)))
    assert constant.value == 1.0
    assert constant.ends(0.95)[0] < 0.95


def test_a_judge_that_knows_nothing_leaves_the_labels_alone() -> None:
    generator = np.random.default_rng(3)
    people, judge = generator.integers(0, 3, 1000) / 2, generator.integers(0, 3, 1000) / 2
    found = prediction_powered.estimate(named(judge), named(people[:100]))
    alone = prediction_powered.labels_alone(named(people[:100]))
    assert found.value == pytest.approx(alone.value, abs=0.01)
    assert found.error == pytest.approx(alone.error, rel=0.05)
    backwards = prediction_powered.estimate(named(1 - people), named(people[:100]))
    assert backwards.value == alone.value, "a judge that says the opposite is not turned around"


def test_labels_alone_are_a_mean_with_two_added_labels() -> None:
    found = prediction_powered.labels_alone({"a": 1.0, "b": 0.0, "c": 0.5})
    assert found.value == 0.5
    assert found.error == pytest.approx(np.sqrt((0.5 + 0.5) / 4 / 5))
    assert found.degrees == 4


def test_too_few_labels_are_refused() -> None:
    with pytest.raises(MetricError, match="2 questions have a label and a grade"):
        prediction_powered.estimate({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0, "other": 1.0})
    with pytest.raises(MetricError, match="1 questions have a label"):
        prediction_powered.labels_alone({"a": 1.0})


@pytest.mark.parametrize("errors", ["even", "for one arm", "for length"])
def test_intervals_contain_the_truth_and_are_narrower_than_the_labels_alone(errors: simulation.Errors) -> None:
    found = simulation.simulate(errors, 0.85, 50, draws=300, n=1000, seed=5)
    corrected, labels, judge = found[:, 0], found[:, 1], found[:, 2]
    assert ((corrected[:, 0] > 0.9) & (corrected[:, 0] < 0.99)).all()
    assert (corrected[:, 1] < 0.8 * labels[:, 1]).all()
    assert judge[1, 0] < 0.85, "the judge's own grades of the difference mislead"
