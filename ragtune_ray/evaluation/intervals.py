"""Computes bootstrap intervals of the means of metrics; the same seed yields the same interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ragtune_ray import config
from ragtune_ray.evaluation.metrics.errors import MetricError

FloatArray = npt.NDArray[np.float64]

# Indices drawn at once: half a megabyte, which fits the cache of the CPU.
_BLOCK_INDICES = 2**16


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap interval."""

    value: float
    low: float
    high: float
    n: int
    """Number of values: the queries that have the metric."""


def bootstrap(values: FloatArray, resamples: int, confidence: float, seed: int) -> Interval:
    """Percentile bootstrap of the mean (Efron & Tibshirani 1993, chapter 13); of width 0 if all values are equal.

    Args:
        values: (n,), n >= 1, one number per query.
        resamples: number of times that n values are drawn with replacement, at least 1.
        confidence: coverage of the interval, between 0 and 1.
        seed: at least 0; the same seed and n draw the same queries.

    Raises:
        MetricError: no values, more than one dimension, a value that is not finite (the message names its index), or a
            setting out of range.

    >>> bootstrap(np.array([0.5, 0.5]), resamples=100, confidence=0.95, seed=0)
    Interval(value=0.5, low=0.5, high=0.5, n=2)
    """
    return _intervals(_checked(values, "values")[:, np.newaxis], resamples, confidence, seed)[0]


def paired_bootstrap(a: FloatArray, b: FloatArray, resamples: int, confidence: float, seed: int) -> Interval:
    """Percentile bootstrap of mean(b - a), where `a` and `b` are (n,): one number for each of the same queries.

    If the interval does not contain 0, there is a difference at this confidence. Other arguments and errors are those of
    `bootstrap`.

    Raises:
        MetricError: a and b differ in length.

    >>> paired_bootstrap(np.array([0.0, 0.5]), np.array([0.5, 1.0]), resamples=100, confidence=0.95, seed=0).low
    0.5
    """
    a, b = _checked(a, "a"), _checked(b, "b")
    if a.size != b.size:
        raise MetricError(f"a has {a.size} values and b has {b.size}; pairs need the same queries in the same order")
    return bootstrap(b - a, resamples, confidence, seed)


def summarize(
    per_query: Mapping[str, Mapping[str, float]], resamples: int, confidence: float, seed: int
) -> dict[str, Interval]:
    """One interval per metric, over the queries that have it, from the scores that `scoring` computes.

    The result does not depend on the order of the queries. Metrics are sorted by name, then by k as a number. The other
    arguments are those of `bootstrap`.

    Raises:
        MetricError: a value is not finite (the message names query and metric), or a setting is out of range.

    >>> list(summarize({"q": {"recall@10": 1.0, "recall@5": 0.0, "EM": 1.0}}, 100, 0.95, 0))
    ['EM', 'recall@5', 'recall@10']
    """
    values: dict[str, list[float]] = {}
    for query_id in sorted(per_query):
        for name, value in per_query[query_id].items():
            if not math.isfinite(value):
                raise MetricError(f"query {query_id!r}: {name} is {value}; leave out a metric that is undefined")
            values.setdefault(name, []).append(value)
    names_by_n: dict[int, list[str]] = {}
    for name in sorted(values, key=_metric_order):
        names_by_n.setdefault(len(values[name]), []).append(name)
    intervals: dict[str, Interval] = {}
    for names in names_by_n.values():
        table = np.column_stack([values[name] for name in names])
        intervals |= zip(names, _intervals(table, resamples, confidence, seed), strict=True)
    return {name: intervals[name] for name in sorted(intervals, key=_metric_order)}


def mean_of(per_query: Mapping[str, Mapping[str, float]], metric: str, settings: config.Config) -> Interval | None:
    """The interval of one metric over the queries that have it; None if no query has it."""
    values = np.array([row[metric] for row in per_query.values() if metric in row])
    if not len(values):
        return None
    return bootstrap(values, settings.evaluate.resamples, settings.evaluate.confidence, settings.seed)


def _intervals(values: FloatArray, resamples: int, confidence: float, seed: int) -> list[Interval]:
    """One interval per column of (n, columns)."""
    if resamples < 1 or not 0 < confidence < 1 or seed < 0:
        raise MetricError(
            f"resamples={resamples}, confidence={confidence}, seed={seed}: resamples must be at least 1, "
            "confidence between 0 and 1, seed at least 0"
        )
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    lows, highs = np.quantile(_resampled_means(values, resamples, seed), ends, axis=0)
    # If all values are equal, so are all resamples; rounding must not widen the interval.
    return [
        Interval(float(column[0]), float(column[0]), float(column[0]), column.size)
        if column.min() == column.max()
        else Interval(float(column.mean()), float(low), float(high), column.size)
        for column, low, high in zip(values.T, lows, highs, strict=True)
    ]


def _resampled_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    """(resamples, columns): means of (n, columns) over n rows drawn with replacement, the same rows for every column.

    A matrix product of the counts of drawn rows and the values is ten times faster than indexing every column.
    """
    generator = np.random.default_rng(seed)
    n, columns = values.shape
    block = max(1, _BLOCK_INDICES // n)
    sums = np.empty((resamples, columns))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        rows = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, np.newaxis]
        counts = np.bincount(rows.ravel(), minlength=size * n).reshape(size, n)
        sums[start : start + size] = counts.astype(np.float64) @ values
    sums /= n
    return sums


def _metric_order(name: str) -> tuple[str, int, str]:
    stem, _, k = name.partition("@")
    return stem, int(k) if k.isdecimal() else 0, name


def _checked(values: FloatArray, name: str) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise MetricError(f"{name} has shape {values.shape}; it must have one dimension and at least one number")
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        index = int(wrong[0])
        raise MetricError(f"{name}[{index}] is {values[index]} ({wrong.size} such values); every value must be finite")
    return values
