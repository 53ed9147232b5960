"""Per-query scores and costs of the arms -> paired differences and one recommendation, with its reasons.

In: what was measured of each arm. Out: differences with intervals and p-values, and a verdict of sentences that cite numbers.
This module knows nothing of models, files or Ray.

The rule: of the arms that keep the user's constraints, the best is the one that scores highest. An arm is as good if the whole
interval of its difference to the best lies above -margin (a test of non-inferiority: Piaggio et al. 2012). Of the best and those,
the cheapest is recommended. "No difference" and "too few questions to tell" are verdicts too.

That no question told two arms apart proves little where questions are few: what 3 % of all questions would lose is lost by none
of 30 in two samples of five. A bootstrap cannot draw what was not seen, so where "as good" is asked, no interval is narrower than
unseen losses and gains allow (`significance.unseen_share`). Whether an arm is better is asked of the bootstrap alone.

Several pairs are looked at, so intervals are widened (Bonferroni) and p-values adjusted (Holm): all statements together hold with
the stated confidence.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import intervals, significance
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.scoring import PerQuery

__all__ = [
    "MIN_QUESTIONS",
    "Difference",
    "Evidence",
    "Outcome",
    "Verdict",
    "Weighed",
    "decide",
    "differences",
    "three_digits",
]

MIN_QUESTIONS = 20
"""With fewer questions no interval is to be trusted, whatever it says: a bootstrap cannot draw what it has not seen."""
Outcome = Literal["recommended", "no_difference", "too_few_questions", "none_qualifies"]
MEANINGS = {
    "base": "ask the model as it is",
    "rag": "retrieve, with the generator as it is",
    "ft": "ask the tuned generator, without retrieving",
    "rag+ft": "retrieve, with the tuned generator",
    "staged": "retrieve, with both models tuned on what failed",
    "joint": "retrieve, with two models that taught each other",
    "iterative": "retrieve, with models tuned on their own filtered answers",
    "domain": "retrieve, with models adapted to the corpus first",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured of one arm."""

    scores: PerQuery
    """Every arm has the same queries."""
    cost: Cost
    p95_seconds: float
    """Of 100 answers given one at a time, 95 take no longer."""
    visible_seconds: float
    """From a change of the documents until answers show it; infinite where they never do."""
    cited_share: float
    """Of the answers that were given, the share that names a passage."""
    forgotten: intervals.Interval | None = None
    """What the arm's generator lost on the probe questions, as a difference to the base model; None: not measured."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One arm less another, over the same queries."""

    arm: str
    against: str
    metric: str
    value: float
    low: float
    high: float
    """Ends of an interval that is widened so that those of all pairs hold together."""
    n: int
    p_value: float
    p_adjusted: float
    needed: int | None
    """Questions that would show a difference of this size; None where there is none."""
    needed_for_margin: int | None
    """Questions that would show a difference of the size of the margin; None where the margin is 0."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """What one dimension was asked, and what it said."""

    dimension: str
    rule: str
    result: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which arm, and why."""

    outcome: Outcome
    arm: str
    """Empty where no arm keeps the constraints."""
    headline: str
    reason: tuple[str, ...]
    warnings: tuple[str, ...]
    weighed: tuple[Weighed, ...]
    violations: Mapping[str, tuple[str, ...]]
    """Arm -> the constraints that it breaks."""


def differences(scores: Mapping[str, PerQuery], settings: config.Config) -> list[Difference]:
    """Each arm less each arm before it, in `compare.metric`.

    The intervals are those of the paired bootstrap, or wider: where an arm is not ahead and lost no question, `low` is at most
    value - p, where p is the share of losses that so many questions may hide (`significance.unseen_share`; a question loses 1 at
    most). Where it lost some, `low` is no nearer than without them. So is `high`, of one that is not behind, for gains.

    Args:
        scores: arm -> scores of the same queries.
        settings: compare, evaluate and seed are used.
    """
    metric, pairs = settings.compare.metric, list(itertools.combinations(scores, 2))
    confidence = _confidence_of_each(settings, len(pairs))
    found = []
    for against, arm in pairs:
        a, b = (_values(scores[name], metric) for name in (against, arm))
        bootstrapped = intervals.paired_bootstrap(a, b, settings.evaluate.resamples, confidence, settings.seed)
        interval = significance.with_unseen(bootstrapped, b - a, confidence)
        deviation = float(np.std(b - a, ddof=1)) if len(a) > 1 else 0.0
        found.append(
            Difference(
                arm,
                against,
                metric,
                interval.value,
                interval.low,
                interval.high,
                interval.n,
                significance.sign_flip_test(b - a, settings.evaluate.resamples, settings.seed),
                1.0,
                _needed(deviation, interval.value, confidence),
                _needed(deviation, settings.compare.margin, confidence),
            )
        )
    adjusted = significance.holm([each.p_value for each in found])
    return [_with_p(each, p) for each, p in zip(found, adjusted, strict=True)]


def decide(evidence: Mapping[str, Evidence], found: Sequence[Difference], settings: config.Config) -> Verdict:
    """The verdict over some arms.

    Args:
        evidence: arm -> what was measured.
        found: their `differences`.
        settings: `compare` is used.
    """
    rule = settings.compare
    violations = {arm: tuple(_violations(each, rule)) for arm, each in evidence.items()}
    eligible = [arm for arm in evidence if not violations[arm]]
    if not eligible:
        return Verdict(
            "none_qualifies",
            "",
            "No arm keeps all constraints.",
            tuple(f"{arm}: {'; '.join(broken)}." for arm, broken in violations.items()),
            (),
            tuple(_weighed(evidence, violations, (), settings)),
            violations,
        )
    ranking = _Ranking(evidence, found, eligible, rule)
    outcome = ranking.outcome()
    return Verdict(
        outcome,
        ranking.chosen,
        _headline(outcome, ranking),
        tuple(_reason(ranking, violations)),
        tuple(_warnings(ranking, evidence)),
        tuple(_weighed(evidence, violations, ranking.as_good, settings)),
        violations,
    )


class _Ranking:
    """Which eligible arms are as good as the best, and which of those is cheapest."""

    def __init__(
        self,
        evidence: Mapping[str, Evidence],
        found: Sequence[Difference],
        eligible: Sequence[str],
        rule: config.Compare,
    ) -> None:
        self.rule, self.evidence, self.eligible = rule, evidence, eligible
        self.means = {arm: float(_values(evidence[arm].scores, rule.metric).mean()) for arm in eligible}
        self.num_questions = len(_values(evidence[eligible[0]].scores, rule.metric))
        # Of arms with equal scores the cheapest is the best.
        self.best = max(eligible, key=lambda arm: (self.means[arm], -evidence[arm].cost.total))
        self.to_best = {arm: _between(found, arm, self.best) for arm in eligible if arm != self.best}
        self.as_good = (
            self.best,
            *(arm for arm, difference in self.to_best.items() if difference.low >= -rule.margin),
        )
        self.chosen = min(self.as_good, key=lambda arm: evidence[arm].cost.total)
        cheaper = [arm for arm in eligible if evidence[arm].cost.total < evidence[self.chosen].cost.total]
        self.undecided = [arm for arm in cheaper if arm not in self.as_good and self.to_best[arm].high >= 0]
        # The best for its cost alone: that it is not worse than they are was not shown either.
        self.tied = [
            arm for arm, difference in self.to_best.items() if difference.value >= 0 and arm not in self.as_good
        ]
        self.undecided += self.tied

    def outcome(self) -> Outcome:
        if self.undecided or self.num_questions < MIN_QUESTIONS:
            return "too_few_questions"
        if len(self.eligible) > 1 and len(self.as_good) == len(self.eligible):
            return "no_difference"
        return "recommended"


def _values(scores: PerQuery, metric: str) -> np.ndarray:
    return np.array([values[metric] for values in scores.values() if metric in values])


def _needed(deviation: float, difference: float, confidence: float) -> int | None:
    """Questions that would show a difference, by how much questions differ and by what may be unseen; None: it is 0."""
    needed = significance.questions_needed(deviation, difference, confidence)
    if needed is None or abs(difference) >= 1:
        return needed
    return max(needed, significance.questions_to_rule_out(abs(difference), confidence))


def _confidence_of_each(settings: config.Config, num_pairs: int) -> float:
    """Bonferroni: the chance to err is shared out over the pairs."""
    return 1 - (1 - settings.evaluate.confidence) / max(1, num_pairs)


def _with_p(difference: Difference, p_adjusted: float) -> Difference:
    return dataclasses.replace(difference, p_adjusted=p_adjusted)


def _between(found: Sequence[Difference], arm: str, best: str) -> Difference:
    """The arm less the best, whichever way round the pair was taken."""
    for each in found:
        if (each.arm, each.against) == (arm, best):
            return each
        if (each.arm, each.against) == (best, arm):
            value = 0.0 - each.value  # of no difference 0, not -0, which would be shown
            return dataclasses.replace(each, arm=arm, against=best, value=value, low=-each.high, high=-each.low)
    raise AssertionError(f"no difference between {arm} and {best}")


def _violations(each: Evidence, rule: config.Compare) -> list[str]:
    broken = []
    cost_per_1000 = each.cost.total / each.cost.answers * 1000
    if rule.max_p95_seconds and each.p95_seconds > rule.max_p95_seconds:
        broken.append(
            f"95 of 100 answers take up to {each.p95_seconds:.2f} s, over compare.max_p95_seconds={rule.max_p95_seconds:g}"
        )
    if rule.max_cost_per_1000 and cost_per_1000 > rule.max_cost_per_1000:
        broken.append(
            f"a thousand answers cost {three_digits(cost_per_1000)} {each.cost.unit}, over "
            f"compare.max_cost_per_1000={rule.max_cost_per_1000:g}"
        )
    if rule.max_visible_seconds and each.visible_seconds > rule.max_visible_seconds:
        shown = "never" if math.isinf(each.visible_seconds) else f"after {each.visible_seconds:.1f} s"
        broken.append(f"changes show {shown}, over compare.max_visible_seconds={rule.max_visible_seconds:g}")
    if rule.min_cited_share and each.cited_share < rule.min_cited_share:
        broken.append(
            f"{each.cited_share:.1%} of the answers cite a passage, under compare.min_cited_share={rule.min_cited_share:g}"
        )
    return broken


def _headline(outcome: Outcome, ranking: _Ranking) -> str:
    arm, meaning = ranking.chosen, MEANINGS[ranking.chosen]
    match outcome:
        case "recommended":
            return f"Use {arm}: {meaning}."
        case "no_difference":
            return f"No difference that matters: take the cheapest, {arm} ({meaning})."
        case _ if ranking.tied:
            return f"Too few questions to tell; {arm} ({meaning}) is the cheapest of those that are ahead so far."
        case _:
            return f"Too few questions to tell; {arm} ({meaning}) is ahead so far."


def _reason(ranking: _Ranking, violations: Mapping[str, tuple[str, ...]]) -> list[str]:
    """One sentence per arm, each with its numbers, then what the choice costs."""
    rule, best = ranking.rule, ranking.best
    highest = f"{best} scores highest of {len(ranking.eligible)}: {rule.metric} {ranking.means[best]:.3f}"
    lines = [f"{highest} over {ranking.num_questions:,} questions."]
    for arm, difference in ranking.to_best.items():
        lines.append(f"{arm} less {best}: {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}], ")
        lines[-1] += _judged(difference, rule.margin, is_as_good=arm in ranking.as_good)
    lines += [f"{arm} does not qualify: {'; '.join(broken)}." for arm, broken in violations.items() if broken]
    if len(ranking.as_good) > 1:
        costs = ", ".join(f"{arm} {three_digits(ranking.evidence[arm].cost.total)}" for arm in ranking.as_good)
        unit = ranking.evidence[best].cost
        lines.append(
            f"Of {len(ranking.as_good)} arms that are as good, {ranking.chosen} is the cheapest over {unit.answers:,} answers, "
            f"all included: {costs} {unit.unit}."
        )
    return lines


def _judged(difference: Difference, margin: float, *, is_as_good: bool) -> str:
    p_value = f"p {'< 0.001' if difference.p_adjusted < 0.001 else f'= {difference.p_adjusted:.3f}'}"
    if is_as_good:
        return f"not worse by more than {margin:g}: as good ({p_value})."
    if difference.high < 0:
        return f"worse ({p_value})."
    needed = difference.needed_for_margin
    more = f"; about {needed:,} questions would show a difference of {margin:g}" if needed else ""
    return f"which leaves open whether it is worse ({p_value}{more})."


def _warnings(ranking: _Ranking, evidence: Mapping[str, Evidence]) -> list[str]:
    rule, lines = ranking.rule, []
    if ranking.num_questions < MIN_QUESTIONS:
        lines.append(
            f"{ranking.num_questions} questions are fewer than {MIN_QUESTIONS}: no interval is to be trusted, and no arm "
            "recommended; add questions."
        )
    needed = [each.needed_for_margin or 0 for each in ranking.to_best.values()]
    if ranking.undecided and max(needed) > ranking.num_questions:
        lines.append(
            f"To tell {', '.join(ranking.undecided)} from {ranking.best} to within {rule.margin:g} takes about "
            f"{max(needed):,} questions; there are {ranking.num_questions:,}."
        )
    if ranking.means[ranking.best] < rule.margin:
        lines.append(f"Every arm scores under {rule.margin:g} in {rule.metric}: none answers these questions.")
    for arm, each in evidence.items():
        failed = float(np.mean([values.get("failed", 0.0) for values in each.scores.values()]))
        if failed:
            lines.append(f"{failed:.1%} of the rows of {arm} failed; they count as wrong.")
        if each.forgotten is not None and each.forgotten.high < 0:
            lines.append(
                f"The generator of {arm} lost {-each.forgotten.value:.3f} "
                f"[{-each.forgotten.high:.3f}, {-each.forgotten.low:.3f}] on the probe questions."
            )
    return lines


def _weighed(
    evidence: Mapping[str, Evidence],
    violations: Mapping[str, tuple[str, ...]],
    as_good: Sequence[str],
    settings: config.Config,
) -> list[Weighed]:
    """What each dimension weighed: constraints keep arms out, quality ranks, cost chooses."""
    rule = settings.compare
    out = [arm for arm in evidence if not violations[arm] and arm not in as_good]
    ranked = f"as good as the best: {', '.join(as_good) or 'none'}" + (
        f"; not shown to be: {', '.join(out)}" if out else ""
    )
    confidence = settings.evaluate.confidence
    unit = next(iter(evidence.values())).cost.unit
    return [
        Weighed(
            "quality", f"{rule.metric}, margin {rule.margin:g}, confidence {confidence:.0%} over all pairs", ranked
        ),
        _constraint("latency", "max_p95_seconds", "s", {arm: each.p95_seconds for arm, each in evidence.items()}, rule),
        Weighed(
            "cost",
            f"the cheapest of the arms that are as good, over {rule.answers:,} answers"
            + (f"; at most {rule.max_cost_per_1000:g} a thousand" if rule.max_cost_per_1000 else ""),
            _listed({arm: each.cost.total for arm, each in evidence.items()}, unit),
        ),
        _constraint(
            "freshness", "max_visible_seconds", "s", {arm: each.visible_seconds for arm, each in evidence.items()}, rule
        ),
        _constraint(
            "explainability",
            "min_cited_share",
            "cited",
            {arm: each.cited_share for arm, each in evidence.items()},
            rule,
        ),
        Weighed(
            "forgetting",
            "shown, not weighed; a loss is a warning",
            _listed({arm: each.forgotten.value for arm, each in evidence.items() if each.forgotten}, "on the probe")
            if any(each.forgotten for each in evidence.values())
            else "not measured (compare.probe_path)",
        ),
    ]


def _constraint(dimension: str, field: str, unit: str, values: Mapping[str, float], rule: config.Compare) -> Weighed:
    limit = getattr(rule, field)
    return Weighed(dimension, f"compare.{field}={limit:g}" if limit else "no constraint", _listed(values, unit))


def _listed(values: Mapping[str, float], unit: str) -> str:
    shown = {arm: "never" if math.isinf(value) else three_digits(value) for arm, value in values.items()}
    return ", ".join(f"{arm} {value}" for arm, value in shown.items()) + f" {unit}"


def three_digits(number: float) -> str:
    """A number to three digits, or to the whole, with an exponent only where it is tiny or huge.

    >>> three_digits(0.1), three_digits(12), three_digits(123456.7), three_digits(0)
    ('0.100', '12.0', '123,457', '0')
    """
    if 99.95 <= abs(number) < 1e9:
        return f"{number:,.0f}"
    return f"{number:#.3g}" if 0.1 <= abs(number) < 1e9 else f"{number:.3g}"
