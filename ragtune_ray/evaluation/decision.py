"""Compares the arms on the same questions and recommends one, with reasons that cite numbers.

The rule: among the arms that keep the user's constraints, the best is the one with the highest score. Another arm is as good if
the whole interval of its difference to the best is above -margin (a non-inferiority test: Piaggio et al. 2012). The cheapest of
these arms is recommended. "No difference" and "too few questions" are also possible verdicts.

With few questions, observing no loss proves little: if an arm loses 3 % of all questions, two in five samples of 30 questions
show none of these losses, and a bootstrap cannot draw what was not observed. So intervals are widened for unseen losses and gains
(`significance.with_unseen`) when they decide whether an arm is as good; the bootstrap alone decides whether it is better.

Several pairs are compared, so intervals are widened (Bonferroni) and p-values adjusted (Holm): all statements together have the
configured confidence.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ragtune_ray import config
from ragtune_ray.evaluation import intervals, significance
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.scoring import PerQuery

MIN_QUESTIONS = 20
"""With fewer questions no bootstrap interval is reliable."""
VerdictOutcome = Literal["recommended", "no_difference", "too_few_questions", "none_qualifies"]
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


@dataclass(frozen=True, slots=True)
class Difference:
    """`arm` minus `against`, over the same questions."""

    arm: str
    against: str
    metric: str
    value: float
    low: float
    high: float
    """Ends of an interval that is wide enough for the confidence to apply to all pairs together."""
    n: int
    p_value: float = 1.0
    p_adjusted: float = 1.0
    needed: int | None = None
    """Questions needed to show a difference of this size; None where the difference is 0."""
    needed_for_margin: int | None = None
    """Questions needed to show a difference as large as the margin; None where the margin is 0."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """One step of the decision: a dimension, the rule applied to it, and the result."""

    dimension: str
    rule: str
    result: str


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


@dataclass(frozen=True, slots=True)
class _Ranking:
    """The order of the eligible arms: the best, those as good as it, and the cheapest among these."""

    rule: config.Compare
    means: Mapping[str, float]
    """Eligible arm -> mean score."""
    costs: Mapping[str, Cost]
    num_questions: int
    best: str
    to_best: Mapping[str, Difference]
    """Arm -> its difference to the best."""
    as_good: tuple[str, ...]
    """The best and the arms as good as it."""
    chosen: str
    tied: tuple[str, ...]
    """Arms with the score of the best, which is best only by its cost, that were not shown to be as good."""
    undecided: tuple[str, ...]
    """The tied arms, and cheaper ones that may be as good but were not shown to be."""

    @property
    def outcome(self) -> VerdictOutcome:
        if self.undecided or self.num_questions < MIN_QUESTIONS:
            return "too_few_questions"
        if len(self.means) > 1 and len(self.as_good) == len(self.means):
            return "no_difference"
        return "recommended"


def differences(scores: Mapping[str, PerQuery], settings: config.Config) -> list[Difference]:
    """The difference of each pair of arms in `compare.metric`, over the same queries.

    Intervals are those of the paired bootstrap, widened for unseen losses and gains (`significance.with_unseen`).
    """
    metric, pairs = settings.compare.metric, list(itertools.combinations(scores, 2))
    # Bonferroni: the pairs share the probability of an error.
    confidence = 1 - (1 - settings.evaluate.confidence) / max(1, len(pairs))
    resamples, seed = settings.evaluate.resamples, settings.seed
    found = []
    for against, arm in pairs:
        a, b = (_values(scores[name], metric) for name in (against, arm))
        bootstrapped = intervals.paired_bootstrap(a, b, resamples, confidence, seed)
        interval = significance.with_unseen(bootstrapped, b - a, confidence)
        deviation = float(np.std(b - a, ddof=1)) if len(a) > 1 else 0.0
        found.append(
            Difference(
                arm,
                against,
                metric,
                **dataclasses.asdict(interval),
                p_value=significance.sign_flip_test(b - a, resamples, seed),
                needed=_needed(deviation, interval.value, confidence),
                needed_for_margin=_needed(deviation, settings.compare.margin, confidence),
            )
        )
    adjusted = significance.holm([each.p_value for each in found])
    return [dataclasses.replace(each, p_adjusted=p) for each, p in zip(found, adjusted, strict=True)]


def decide(evidence: Mapping[str, Evidence], found: Sequence[Difference], settings: config.Config) -> Verdict:
    """Recommend one of the arms by their measurements and the `differences` between them."""
    rule = settings.compare
    violations = {arm: tuple(_violations(each, rule)) for arm, each in evidence.items()}
    eligible = {arm: each for arm, each in evidence.items() if not violations[arm]}
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
    ranking = _rank(eligible, found, rule)
    return Verdict(
        ranking.outcome,
        ranking.chosen,
        _headline(ranking),
        tuple(_reason(ranking, violations)),
        tuple(_warnings(ranking, evidence)),
        tuple(_weighed(evidence, violations, ranking.as_good, settings)),
        violations,
    )


def _rank(eligible: Mapping[str, Evidence], found: Sequence[Difference], rule: config.Compare) -> _Ranking:
    values = {arm: _values(each.scores, rule.metric) for arm, each in eligible.items()}
    means = {arm: float(column.mean()) for arm, column in values.items()}
    costs = {arm: each.cost for arm, each in eligible.items()}
    # Among arms with equal scores the cheapest is the best.
    best = max(eligible, key=lambda arm: (means[arm], -costs[arm].total))
    to_best = {arm: _difference_to(found, arm, best) for arm in eligible if arm != best}
    as_good = (best, *(arm for arm, difference in to_best.items() if difference.low >= -rule.margin))
    chosen = min(as_good, key=lambda arm: costs[arm].total)
    others = {arm: difference for arm, difference in to_best.items() if arm not in as_good}
    cheaper = [arm for arm in others if costs[arm].total < costs[chosen].total]
    tied = tuple(arm for arm, difference in others.items() if difference.value >= 0)
    return _Ranking(
        rule=rule,
        means=means,
        costs=costs,
        num_questions=len(values[next(iter(values))]),
        best=best,
        to_best=to_best,
        as_good=as_good,
        chosen=chosen,
        tied=tied,
        undecided=(*(arm for arm in cheaper if others[arm].high >= 0), *tied),
    )


def _values(scores: PerQuery, metric: str) -> np.ndarray:
    return np.array([values[metric] for values in scores.values() if metric in values])


def _needed(deviation: float, difference: float, confidence: float) -> int | None:
    """Number of questions to show a difference despite the spread of scores and unseen losses; None for a difference of 0."""
    needed = significance.questions_needed(deviation, difference, confidence)
    if needed is None or abs(difference) >= 1:
        return needed
    return max(needed, significance.questions_to_rule_out(abs(difference), confidence))


def _difference_to(found: Sequence[Difference], arm: str, best: str) -> Difference:
    """The arm minus the best, in whichever order the pair was compared."""
    for each in found:
        if (each.arm, each.against) == (arm, best):
            return each
        if (each.arm, each.against) == (best, arm):
            value = 0.0 - each.value  # 0, not -0, which would be printed
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


def _headline(ranking: _Ranking) -> str:
    arm, meaning = ranking.chosen, _meaning(ranking.chosen)
    match ranking.outcome:
        case "recommended":
            return f"Use {arm}: {meaning}."
        case "no_difference":
            return f"No difference that matters: take the cheapest, {arm} ({meaning})."
        case _ if ranking.tied:
            return f"Too few questions to tell; {arm} ({meaning}) is the cheapest of those that are ahead so far."
        case _:
            return f"Too few questions to tell; {arm} ({meaning}) is ahead so far."


def _meaning(arm: str) -> str:
    """What it means to use an arm.

    >>> _meaning("rag@gpt")
    'retrieve, with gpt as the generator'
    """
    if name := config.hosted_name(arm):
        return f"retrieve, with {name} as the generator" if config.retrieves(arm) else f"ask {name}"
    return MEANINGS[arm]


def _reason(ranking: _Ranking, violations: Mapping[str, tuple[str, ...]]) -> list[str]:
    """One sentence per arm with its numbers, then the costs that decided."""
    rule, best = ranking.rule, ranking.best
    highest = f"{best} scores highest of {len(ranking.means)}: {rule.metric} {ranking.means[best]:.3f}"
    lines = [f"{highest} over {ranking.num_questions:,} questions."]
    for arm, difference in ranking.to_best.items():
        interval = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        lines.append(f"{arm} - {best}: {interval}, {_conclusion(difference, rule.margin, arm in ranking.as_good)}")
    lines += [f"{arm} does not qualify: {'; '.join(broken)}." for arm, broken in violations.items() if broken]
    if len(ranking.as_good) > 1:
        totals = ", ".join(f"{arm} {three_digits(ranking.costs[arm].total)}" for arm in ranking.as_good)
        cost = ranking.costs[best]
        lines.append(
            f"Of {len(ranking.as_good)} arms that are as good, {ranking.chosen} is the cheapest over {cost.answers:,} answers, "
            f"all included: {totals} {cost.unit}."
        )
    return lines


def _conclusion(difference: Difference, margin: float, is_as_good: bool) -> str:
    p_value = f"p {'< 0.001' if difference.p_adjusted < 0.001 else f'= {difference.p_adjusted:.3f}'}"
    if is_as_good:
        return f"not worse by more than {margin:g}: as good ({p_value})."
    if difference.high < 0:
        return f"worse ({p_value})."
    needed = difference.needed_for_margin
    more = f"; about {needed:,} questions would show a difference of {margin:g}" if needed else ""
    return f"inconclusive ({p_value}{more})."


def _warnings(ranking: _Ranking, evidence: Mapping[str, Evidence]) -> list[str]:
    rule, lines = ranking.rule, []
    if ranking.num_questions < MIN_QUESTIONS:
        lines.append(
            f"{ranking.num_questions} questions are fewer than {MIN_QUESTIONS}: the intervals are unreliable and no arm is "
            "recommended; add questions."
        )
    needed = max((each.needed_for_margin or 0 for each in ranking.to_best.values()), default=0)
    if ranking.undecided and needed > ranking.num_questions:
        lines.append(
            f"To tell {', '.join(ranking.undecided)} from {ranking.best} to within {rule.margin:g} takes about {needed:,} "
            f"questions; there are {ranking.num_questions:,}."
        )
    if ranking.means[ranking.best] < rule.margin:
        lines.append(f"Every arm scores under {rule.margin:g} in {rule.metric}: none answers these questions.")
    for arm, each in evidence.items():
        if failed := float(np.mean([values.get("failed", 0.0) for values in each.scores.values()])):
            lines.append(f"{failed:.1%} of the rows of {arm} failed; they count as wrong.")
        if each.forgotten is not None and each.forgotten.high < 0:
            lost = each.forgotten
            ends = f"[{-lost.high:.3f}, {-lost.low:.3f}]"
            lines.append(f"The generator of {arm} lost {-lost.value:.3f} {ends} on the probe questions.")
    return lines


def _weighed(
    evidence: Mapping[str, Evidence],
    violations: Mapping[str, tuple[str, ...]],
    as_good: Sequence[str],
    settings: config.Config,
) -> list[Weighed]:
    """The steps of the decision: constraints exclude arms, quality ranks them, cost chooses."""
    rule = settings.compare
    out = [arm for arm in evidence if not violations[arm] and arm not in as_good]
    rest = f"; not shown to be: {', '.join(out)}" if out else ""
    ranked = f"as good as the best: {', '.join(as_good) or 'none'}{rest}"
    confidence = settings.evaluate.confidence
    unit = next(iter(evidence.values())).cost.unit
    return [
        Weighed(
            "quality", f"{rule.metric}, margin {rule.margin:g}, confidence {confidence:.0%} over all pairs", ranked
        ),
        _constraint("latency", "max_p95_seconds", "s", evidence, rule),
        Weighed(
            "cost",
            f"the cheapest of the arms that are as good, over {rule.answers:,} answers"
            + (f"; at most {rule.max_cost_per_1000:g} a thousand" if rule.max_cost_per_1000 else ""),
            _listed({arm: each.cost.total for arm, each in evidence.items()}, unit),
        ),
        _constraint("freshness", "max_visible_seconds", "s", evidence, rule),
        _constraint("explainability", "min_cited_share", "cited", evidence, rule),
        Weighed(
            "forgetting",
            "shown, not weighed; a loss is a warning",
            _listed({arm: each.forgotten.value for arm, each in evidence.items() if each.forgotten}, "on the probe")
            if any(each.forgotten for each in evidence.values())
            else "not measured (compare.probe_path)",
        ),
    ]


def _constraint(
    dimension: str, field: str, unit: str, evidence: Mapping[str, Evidence], rule: config.Compare
) -> Weighed:
    """The step that applies a limit of the config to the measurement of the same name without `max_` or `min_`."""
    limit = getattr(rule, field)
    values = {arm: getattr(each, field.partition("_")[2]) for arm, each in evidence.items()}
    return Weighed(dimension, f"compare.{field}={limit:g}" if limit else "no constraint", _listed(values, unit))


def _listed(values: Mapping[str, float], unit: str) -> str:
    shown = {arm: "never" if math.isinf(value) else three_digits(value) for arm, value in values.items()}
    return ", ".join(f"{arm} {value}" for arm, value in shown.items()) + f" {unit}"


def three_digits(number: float) -> str:
    """A number with three significant digits, whole from 100 on, with an exponent only where it is tiny or huge.

    >>> three_digits(0.1), three_digits(12), three_digits(123456.7), three_digits(0)
    ('0.100', '12.0', '123,457', '0')
    """
    if 99.95 <= abs(number) < 1e9:
        return f"{number:,.0f}"
    return f"{number:#.3g}" if 0.1 <= abs(number) < 1e9 else f"{number:.3g}"
