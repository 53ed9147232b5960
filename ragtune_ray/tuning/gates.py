"""Decides whether to accept the model that a tuning round produced.

In: scores of the same questions before and after, and objections of guards, which detect models that score well but are
broken. Out: a `Verdict` with its numbers and its reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import intervals
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS
from ragtune_ray.training import teaching

RANDOM_PASSAGES = 512
"""Number of passages whose mean cosine shows whether an encoder has collapsed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a round's change of one component was accepted, and why."""

    component: config.Component
    accepted: bool
    reason: str
    num_examples: int
    metric: str = ""
    before: float | None = None
    """Mean score over the validation questions."""
    after: float | None = None
    low: float | None = None
    """Lower end of the gain's confidence interval."""
    high: float | None = None
    n: int = 0
    """Number of questions."""

    def facts(self) -> dict[str, Any]:
        """The fields as JSON values, for the ledger."""
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
    """Accept a change that scores better on the same questions, unless a guard objects or a loss cannot be ruled out.

    `before` and `after` are scores by query id; `problems` has one sentence per guard, empty if the guard does not object.
    """
    old, new = _paired(before, after)
    if len(old) < MIN_QUESTIONS:
        reason = f"{len(old)} validation questions are scored, fewer than {MIN_QUESTIONS}"
        return refused(component, reason, num_examples)
    rule, gain = settings.tune, _gain(old, new, settings)
    objections = [problem for problem in problems if problem]
    if objections:
        reason = "; ".join(objections)
    elif gain.value <= 0:
        reason = "no gain" if gain.value == 0 else "a loss"
    elif gain.low < -rule.margin:
        reason = f"a loss of more than {rule.margin:g} cannot be ruled out"
    else:
        reason = "better" if gain.low > 0 else f"better, and not worse by more than {rule.margin:g}"
    return Verdict(
        component,
        accepted=not objections and gain.value > 0 and gain.low >= -rule.margin,
        reason=reason,
        num_examples=num_examples,
        metric=metric,
        before=float(old.mean()),
        after=float(new.mean()),
        low=gain.low,
        high=gain.high,
        n=gain.n,
    )


def refused(component: config.Component, reason: str, num_examples: int = 0) -> Verdict:
    """The verdict on a change that was not tried."""
    return Verdict(component, False, reason, num_examples)


def mean_cosine(vectors: np.ndarray) -> float:
    """Mean cosine of all pairs of unit vectors (n, dimension), n >= 2; near 1 if an encoder has collapsed.

    >>> mean_cosine(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    0.3333333333333333
    """
    n = len(vectors)
    total = vectors.sum(axis=0, dtype=np.float64)
    return float((total @ total - n) / (n * (n - 1)))


def spread_problem(before: float, after: float, most: float) -> str:
    """A sentence if the mean cosine of random passages rose by more than `most`, so the encoder has collapsed; else empty."""
    if after <= before + most:
        return ""
    return f"its passages collapse: the mean cosine of random ones rose from {before:.2f} to {after:.2f}"


def probe_problem(before: Mapping[str, float], after: Mapping[str, float], settings: config.Config) -> str:
    """A sentence if the scores on the probe questions dropped significantly; else empty."""
    old, new = _paired(before, after)
    if not len(old) or (change := _gain(old, new, settings)).high >= 0:
        return ""
    return f"it forgets: {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] on the probe questions"


def teacher_problem(teacher: Mapping[str, float]) -> str:
    """Why the generator must not teach the retriever, by its `teaching.teacher_facts`; empty if it may."""
    if not teacher["n"]:
        return "no question has a candidate that answers it, so the generator's ranking cannot be checked"
    if teacher["MRR"] <= teacher["retriever_MRR"]:
        return (
            f"the generator ranks passages no better than the retriever (MRR {teacher['MRR']:.3f} against "
            f"{teacher['retriever_MRR']:.3f} over {teacher['n']:,} questions)"
        )
    if teacher["entropy"] > teaching.MAX_ENTROPY:
        return f"{teaching.UNDECIDED} (entropy {teacher['entropy']:.3f} of 1)"
    return ""


def _paired(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the questions that both contain, in the same order."""
    ids = sorted(before.keys() & after.keys())
    return np.array([before[name] for name in ids]), np.array([after[name] for name in ids])


def _gain(before: np.ndarray, after: np.ndarray, settings: config.Config) -> intervals.Interval:
    return intervals.paired_bootstrap(
        before, after, settings.evaluate.resamples, settings.tune.confidence, settings.seed
    )
