"""Is what a round made taken over? Paired scores, and guards against models that score well and are broken.

In: scores of the same questions before and after, and what the guards measured. Out: a `Verdict` with its numbers and its reason.
This module knows nothing of how anything was trained, of files or of Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import intervals
from ragtune_ray.evaluation.decision import MIN_QUESTIONS

__all__ = ["Verdict", "judge", "mean_cosine", "probe_problem", "refused", "spread_problem", "teacher_problem"]

RANDOM_PASSAGES = 512
"""Whose mean cosine tells a collapsed encoder."""
MAX_ENTROPY = 0.95
"""Of a teacher's distributions, as a share of the most that they could have: beyond it the teacher says nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a round's work on one component."""

    component: config.Component
    accepted: bool
    reason: str
    num_examples: int
    metric: str = ""
    before: float | None = None
    """Means over the validation questions."""
    after: float | None = None
    low: float | None = None
    """Ends of the interval of the gain."""
    high: float | None = None
    n: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON values, for a ledger."""
        return dataclasses.asdict(self)


def judge(
    component: config.Component,
    metric: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    problems: Sequence[str],
    num_examples: int,
    settings: config.Config,
) -> Verdict:
    """Accept what is better on the same questions, unless a guard objects or a loss cannot be ruled out.

    Args:
        component: that was tuned.
        metric: what the scores are.
        before: query_id -> score, as it was.
        after: with what the round made.
        problems: what guards found, a sentence each; an empty one is a guard that found nothing.
        num_examples: learnt from.
        settings: tune, evaluate and seed are used.
    """
    a, b = _paired(before, after)
    if len(a) < MIN_QUESTIONS:
        return refused(component, f"{len(a)} validation questions are scored, fewer than {MIN_QUESTIONS}", num_examples)
    rule, gain = settings.tune, _gain(a, b, settings)
    objections = [problem for problem in problems if problem]
    if objections:
        reason = "; ".join(objections)
    elif gain.value <= 0:
        reason = "no gain" if gain.value == 0 else "a loss"
    elif gain.low < -rule.margin:
        reason = f"a loss of more than {rule.margin:g} cannot be ruled out"
    else:
        reason = "better" if gain.low > 0 else f"better, and not worse by more than {rule.margin:g}"
    accepted = not objections and gain.value > 0 and gain.low >= -rule.margin
    return Verdict(
        component,
        accepted,
        reason,
        num_examples,
        metric,
        float(a.mean()),
        float(b.mean()),
        gain.low,
        gain.high,
        gain.n,
    )


def refused(component: config.Component, reason: str, num_examples: int = 0) -> Verdict:
    """The verdict on what was not even tried."""
    return Verdict(component, False, reason, num_examples)


def mean_cosine(vectors: np.ndarray) -> float:
    """The mean cosine of all pairs of different rows; near 1 where an encoder has collapsed.

    >>> mean_cosine(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    0.3333333333333333

    Args:
        vectors: (n, dimension) unit vectors, n >= 2.
    """
    n = len(vectors)
    total = vectors.sum(axis=0, dtype=np.float64)
    return float((total @ total - n) / (n * (n - 1)))


def spread_problem(before: float, after: float, most: float) -> str:
    """What is wrong with an encoder's spread of random passages; empty: nothing.

    Args:
        before: mean cosine of random passages, as it was.
        after: with the tuned encoder.
        most: by which it may rise.
    """
    if after <= before + most:
        return ""
    return f"its passages collapse: the mean cosine of random ones rose from {before:.2f} to {after:.2f}"


def probe_problem(before: Mapping[str, float], after: Mapping[str, float], settings: config.Config) -> str:
    """What was lost on the probe questions; empty: nothing that the interval of the difference does not leave open."""
    a, b = _paired(before, after)
    if not len(a):
        return ""
    lost = _gain(a, b, settings)
    if lost.high >= 0:
        return ""
    return f"it forgets: {lost.value:+.3f} [{lost.low:+.3f}, {lost.high:+.3f}] on the probe questions"


def teacher_problem(teacher: Mapping[str, float]) -> str:
    """Why a teacher must not teach; empty: it may.

    Args:
        teacher: `MRR` of the passages that answer, as the teacher ranks the candidates; `retriever_MRR`, as the retriever does;
            `entropy`, the mean of the teacher's distributions, 1 being even; `n`, questions with such a passage.
    """
    if not teacher["n"]:
        return "no question has a candidate that answers it, so nobody can tell whether the generator teaches well"
    if teacher["MRR"] <= teacher["retriever_MRR"]:
        return (
            f"the generator is no better a judge of passages than the retriever (MRR {teacher['MRR']:.3f}, "
            f"the retriever's {teacher['retriever_MRR']:.3f} over {teacher['n']:,} questions)"
        )
    if teacher["entropy"] > MAX_ENTROPY:
        return f"the generator tells its passages apart too little (entropy {teacher['entropy']:.3f} of 1)"
    return ""


def _paired(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the questions that both have, in one order."""
    ids = sorted(before.keys() & after.keys())
    return np.array([before[name] for name in ids]), np.array([after[name] for name in ids])


def _gain(before: np.ndarray, after: np.ndarray, settings: config.Config) -> intervals.Interval:
    return intervals.paired_bootstrap(
        before, after, settings.evaluate.resamples, settings.tune.confidence, settings.seed
    )
