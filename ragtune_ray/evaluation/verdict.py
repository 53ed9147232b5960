"""What a decision between arms is made of: the evidence, the differences, and the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ragtune_ray import config
from ragtune_ray.evaluation import intervals, prediction_powered, significance
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.scoring import PerQuery

MIN_QUESTIONS = 20
"""With fewer questions no interval is reliable, and no arm is recommended."""
VerdictOutcome = Literal["recommended", "no_difference", "too_few_questions", "none_qualifies"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The measurements of one arm that the decision uses."""

    scores: PerQuery
    """Of the same queries for every arm."""
    cost: Cost
    p95_seconds: float
    """95th percentile of the time for one question."""
    visible_seconds: float
    """From a change of the documents until answers show it; infinite: never."""
    cited_share: float
    """Share of answers that cite a passage, without failures and abstentions."""
    forgotten: intervals.Interval | None = None
    """Score on the probe questions minus that of the base model; None: not measured."""
    labels: Mapping[str, float] | None = None
    """query_id -> people's grade of the arm's answer, which corrects `compare.metric`; None: it is not corrected."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`arm` minus `against`, over the same questions."""

    arm: str
    against: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    deviation: float = 0.0
    """Standard deviation of the paired differences, before any correction."""
    confidence: float = 0.95
    """Of the interval."""
    conclusion: str = ""
    """What the interval shows about `arm`: worse, no better (by more than the margin), as good (within the margin), better,
    open, or dropped at an earlier look; empty in a comparison by an old version."""
    needed: int | None = None
    """Questions that would probably show what is open, if the difference is as observed; None: nothing is open."""
    labels: int = 0
    """Questions whose labels correct the difference; 0: it is not corrected."""
    error: float = 0.0
    """Standard error of a corrected difference."""
    degrees: float = 0.0
    """Degrees of freedom of the t distribution of a corrected difference."""

    def ends(self, confidence: float, *, any_time: bool = False) -> tuple[float, float]:
        """The interval of this confidence. `any_time` is as in `significance.difference_ends`; a corrected one has none."""
        if not self.labels:
            return significance.difference_ends(self.value, self.deviation, self.n, confidence, any_time=any_time)
        if any_time:
            raise ValueError("a corrected difference has no interval that holds at every look")
        low, high = prediction_powered.t_ends(self.value, self.error, self.degrees, confidence)
        return max(-1.0, low), min(1.0, high)


@dataclass(frozen=True, slots=True)
class Weighed:
    """One step of the decision: a dimension, the rule applied to it, and the result."""

    dimension: str
    rule: str
    result: str


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An arm that another metric shows to be ahead of the verdict's arm."""

    arm: str
    metric: str
    score: float
    """Of this arm in this metric."""
    against: float
    """Of the verdict's arm."""
    low: float = 0.0
    """Ends of the interval of the lead."""
    high: float = 0.0
    n: int = 0
    """Questions for which both arms have this metric."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The recommended arm and the reasons."""

    outcome: VerdictOutcome
    arm: str
    """Empty where no arm keeps the constraints."""
    headline: str
    reason: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    weighed: tuple[Weighed, ...] = ()
    violations: Annotated[Mapping[str, tuple[str, ...]], Field(exclude=True)] = dataclasses.field(default_factory=dict)
    """Arm -> the constraints that it breaks. `comparison.json` lists them with each arm instead."""
    differences: Annotated[tuple[Difference, ...], Field(exclude=True)] = ()
    """Each other arm minus this one, with the interval and the word that the verdict uses. `comparison.json` has them beside
    the verdict."""
    disagreements: Annotated[tuple[Disagreement, ...], Field(exclude=True)] = ()
    """The metrics by which another arm is ahead, largest lead first. `comparison.json` has them as `contested`."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The eligible arms, the arm that the verdict names, and each other arm's difference to it."""

    rule: config.Compare
    means: Mapping[str, float]
    """Eligible arm -> mean score."""
    costs: Mapping[str, Cost]
    num_questions: int
    outcome: VerdictOutcome
    arm: str
    """The recommended arm; without a recommendation, the one that is ahead."""
    best: str
    """Of the arms that answered all questions, the one that scores highest; of equals, the cheapest."""
    rows: tuple[Difference, ...]
