"""Bootstrap intervals, against exact distributions, the normal approximation and hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ragtune_ray.evaluation import intervals
from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.metrics.errors import MetricError


def ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def test_equal_values_have_an_interval_of_zero_width() -> None:
    for n in (1, 7, 1000):
        assert intervals.bootstrap(np.full(n, 0.1), 500, 0.95, 0) == Interval(0.1, 0.1, 0.1, n)


def test_intervals_cover_the_true_mean_as_often_as_promised() -> None:
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(3.0, 2.0, size=50)
        interval = intervals.bootstrap(values, 1000, 0.95, seed)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_ends_are_quantiles_of_the_exact_resampling_distribution() -> None:
    # Of 4 values 0 and 6 values 1 a resampled mean is Binomial(10, 0.6) / 10; its cumulative probabilities by hand:
    # P(X <= 2) = 0.0123, P(X <= 3) = 0.0548, P(X <= 4) = 0.1662, P(X <= 7) = 0.8327, P(X <= 8) = 0.9536, P(X <= 9) = 0.9940.
    values = np.array([0.0] * 4 + [1.0] * 6)
    for confidence, low, high in ((0.95, 0.3, 0.9), (0.8, 0.4, 0.8)):
        assert ends(intervals.bootstrap(values, 20_000, confidence, 0)) == pytest.approx((0.6, low, high))


def test_every_value_can_be_drawn() -> None:
    for place in range(3):
        values = np.arange(3) == place
        # The mean of three draws is 1 in 1 of 27 resamples, and 0 in 8 of 27.
        assert ends(intervals.bootstrap(values.astype(float), 2000, 0.95, 0)) == pytest.approx((1 / 3, 0, 1))


def test_resampled_means_are_those_of_the_drawn_rows() -> None:
    values = np.random.default_rng(0).random((40, 3))
    drawn = np.random.default_rng(7).integers(40, size=(25, 40))
    np.testing.assert_allclose(intervals._resampled_means(values, 25, 7), values[drawn].mean(axis=1), rtol=1e-12)


def test_width_equals_the_normal_approximation_for_many_values() -> None:
    values = np.random.default_rng(1).random(5000)
    interval = intervals.bootstrap(values, 5000, 0.95, 2)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(5000), rel=0.05)


def test_seed_determines_the_interval() -> None:
    values = np.random.default_rng(0).random(300)
    assert intervals.bootstrap(values, 1000, 0.95, 5) == intervals.bootstrap(values, 1000, 0.95, 5)
    assert intervals.bootstrap(values, 1000, 0.95, 5) != intervals.bootstrap(values, 1000, 0.95, 6)


@pytest.mark.parametrize("block", [1, 700, 10**9])
def test_the_block_size_does_not_change_the_interval(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(100)
    expected = intervals.bootstrap(values, 1001, 0.95, 5)  # the library may sum in another order: equal up to rounding
    monkeypatch.setattr(intervals, "_BLOCK_INDICES", block)
    assert ends(intervals.bootstrap(values, 1001, 0.95, 5)) == pytest.approx(ends(expected), abs=1e-12)


def test_paired_intervals_are_narrower_when_arms_correlate() -> None:
    generator = np.random.default_rng(0)
    a = generator.random(200)
    b = a + generator.normal(0.1, 0.05, size=200)
    paired = intervals.paired_bootstrap(a, b, 2000, 0.95, 0)
    alone = intervals.bootstrap(b, 2000, 0.95, 0)
    assert paired.value == pytest.approx(b.mean() - a.mean())
    assert 0 < paired.low < paired.value < paired.high < 0.2
    assert paired.high - paired.low < (alone.high - alone.low) / 2
    swapped = intervals.paired_bootstrap(b, a, 2000, 0.95, 0)
    assert ends(swapped) == pytest.approx((-paired.value, -paired.high, -paired.low))


def test_invalid_values_and_settings_are_refused() -> None:
    two = np.array([0.0, 1.0])
    with pytest.raises(MetricError, match=r"values has shape \(0,\)"):
        intervals.bootstrap(np.array([]), 100, 0.95, 0)
    with pytest.raises(MetricError, match=r"values\[1\] is nan"):
        intervals.bootstrap(np.array([0.0, math.nan]), 100, 0.95, 0)
    with pytest.raises(MetricError, match=r"b\[0\] is inf"):
        intervals.paired_bootstrap(two, np.array([math.inf, 0.0]), 100, 0.95, 0)
    with pytest.raises(MetricError, match="a has 2 values and b has 1"):
        intervals.paired_bootstrap(two, two[:1], 100, 0.95, 0)
    for resamples, confidence, seed in ((0, 0.95, 0), (100, 0.0, 0), (100, 1.0, 0), (100, 0.95, -1)):
        with pytest.raises(MetricError, match="resamples must be at least 1"):
            intervals.bootstrap(two, resamples, confidence, seed)


def test_summary_has_one_interval_per_defined_metric() -> None:
    generator = np.random.default_rng(0)
    per_query = {f"q{number:02}": {"recall@10": float(generator.random()), "failed": 0.0} for number in range(30)}
    for number in range(10):
        per_query[f"q{number:02}"] |= {"recall@5": float(number % 2), "EM": 1.0}
    summary = intervals.summarize(per_query, 1000, 0.95, 3)
    assert list(summary) == ["EM", "failed", "recall@5", "recall@10"]
    values = np.array([scores["recall@10"] for scores in per_query.values()])
    assert ends(summary["recall@10"]) == pytest.approx(ends(intervals.bootstrap(values, 1000, 0.95, 3)))
    recall_at_5 = intervals.bootstrap(np.array([0.0, 1.0] * 5), 1000, 0.95, 3)
    assert ends(summary["recall@5"]) == pytest.approx(ends(recall_at_5))
    assert summary["EM"] == Interval(1.0, 1.0, 1.0, 10)
    assert intervals.summarize(dict(reversed(per_query.items())), 1000, 0.95, 3) == summary
    assert intervals.summarize({}, 1000, 0.95, 3) == {}
    with pytest.raises(MetricError, match="query 'q1': EM is nan"):
        intervals.summarize({"q1": {"EM": math.nan}}, 1000, 0.95, 3)
