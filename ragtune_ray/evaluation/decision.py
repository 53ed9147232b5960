"""Compares the arms on the same questions and recommends one, with reasons that cite numbers.

The rule: among the arms that keep the user's constraints, an arm is recommended only if every other arm is shown

- to be worse, if it is cheaper: the interval of its difference to the recommended arm is below 0;
- to be better by no more than the margin, if it is not cheaper: the interval ends at the margin or below it.

An arm is cheaper only if its cost is lower by more than `compare.cost_margin`. Of several arms that pass, the cheapest is
recommended; of those that cost no more than the margin above it, the one with the fewest parts. If none passes there are too
few questions, and the reasons say how many would decide. A recommendation states no more than these two tests, so one interval
of the configured confidence per arm suffices: all of them must hold at once, and an arm that is ahead by chance is rarely ahead
of every other (Gutmann and Maymin 1987; Hung and Fithian 2019). Where nothing is recommended, the statements are about single
arms, and the intervals are widened so that all pairs hold together (Bonferroni). `bench/decision_rule.py` simulates how often
the rule errs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import get_args

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import prediction_powered, reasons, significance
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.evaluation.reasons import three_digits
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.evaluation.verdict import (
    MIN_QUESTIONS,
    Difference,
    Disagreement,
    Evidence,
    Ranking,
    Verdict,
    VerdictOutcome,
)


def differences(
    scores: Mapping[str, PerQuery], settings: config.Config, labels: Mapping[str, Mapping[str, float]] | None = None
) -> list[Difference]:
    """The difference of each pair of arms in `compare.metric`, over the queries that both answered, with its interval.

    Args:
        scores: arm -> query id -> metric -> value.
        settings: `compare.metric` and `evaluate.confidence`.
        labels: arm -> query id -> people's grade, which correct the differences (`prediction_powered`); None: do not correct.
    """
    metric, confidence = settings.compare.metric, settings.evaluate.confidence
    found = []
    values = {arm: _by_query(each, metric) for arm, each in scores.items()}
    for against, arm in itertools.combinations(scores, 2):
        moved = _moved(values[against], values[arm])
        if not moved:
            raise MetricError(f"compare.metric={metric}: no question has it in the arms {against} and {arm}")
        column = np.array(list(moved.values()))
        if np.abs(column).max() > 1:
            raise MetricError(f"compare.metric={metric}: scores must be between 0 and 1")
        row = Difference(arm, against, metric, float(column.mean()), 0.0, 0.0, len(column), confidence=confidence)
        if labels is not None:
            corrected = prediction_powered.estimate(moved, _moved(labels[against], labels[arm]))
            row = dataclasses.replace(
                row,
                value=max(-1.0, min(1.0, corrected.value)),
                labels=corrected.labels,
                error=corrected.error,
                degrees=corrected.degrees,
            )
        if len(column) > 1:
            row = dataclasses.replace(row, deviation=float(np.std(column, ddof=1)))
        low, high = row.ends(confidence)
        found.append(dataclasses.replace(row, low=low, high=high))
    return found


def _moved(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Query id -> second minus first, of the queries that both have."""
    return {query_id: second[query_id] - value for query_id, value in first.items() if query_id in second}


def decide(
    evidence: Mapping[str, Evidence],
    found: Sequence[Difference],
    settings: config.Config,
    *,
    any_time: bool = False,
    dropped: Collection[str] = (),
) -> Verdict:
    """Recommend one of the arms by their measurements and the `differences` between them.

    Args:
        evidence: arm -> its measurements.
        found: of every pair of these arms.
        settings: `compare` and `evaluate.confidence`.
        any_time: whether the decision may have been tried before on fewer of the questions, so that the intervals must hold at
            every look.
        dropped: arms that `beaten` named at an earlier look. Nothing needs to be shown against those that an eligible arm still
            rules out.
    """
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
            tuple(reasons.weighed(evidence, None, settings)),
            violations,
        )
    out = frozenset(dropped) & beaten(eligible, found, settings) if dropped else frozenset[str]()
    ranking = _rank(eligible, found, settings, any_time=any_time, out=out)
    disagreements = _disagreements(ranking, eligible, settings, any_time=any_time)
    return Verdict(
        ranking.outcome,
        ranking.arm,
        reasons.headline(ranking, disagreements[0] if disagreements else None),
        tuple(reasons.reasons(ranking, violations)),
        tuple(reasons.warnings(ranking, evidence)),
        tuple(reasons.weighed(evidence, ranking, settings)),
        violations,
        ranking.rows,
        disagreements,
    )


def _rank(
    eligible: Mapping[str, Evidence],
    found: Sequence[Difference],
    settings: config.Config,
    *,
    any_time: bool,
    out: Collection[str],
) -> Ranking:
    rule, confidence = settings.compare, settings.evaluate.confidence
    values = {arm: _by_query(each.scores, rule.metric) for arm, each in eligible.items()}
    means = {arm: _mean(values[arm], each.labels) for arm, each in eligible.items()}
    costs = {arm: each.cost for arm, each in eligible.items()}
    num_questions = max(map(len, values.values()))
    together = 1 - (1 - confidence) / (math.comb(len(eligible), 2) or 1)

    def rows(arm: str, confidence: float) -> list[Difference]:
        return [_difference_to(found, other, arm, confidence, any_time=any_time) for other in eligible if other != arm]

    def is_cheaper(row: Difference) -> bool:
        return _is_cheaper(costs[row.arm], costs[row.against], rule)

    def passes(row: Difference) -> bool:
        return row.arm in out or (row.high < 0 if is_cheaper(row) else row.high <= rule.margin)

    def standing(arm: str) -> float:
        """What orders the arms: the mean; or, as each mean and difference is corrected for itself, the least corrected lead."""
        if eligible[arm].labels is None:
            return means[arm]
        return min((0.0 - row.value for row in rows(arm, confidence)), default=0.0)

    candidates = [arm for arm in eligible if arm not in out]
    ahead = max(candidates, key=lambda arm: (standing(arm), -costs[arm].total))
    passing = [arm for arm in candidates if num_questions >= MIN_QUESTIONS and all(map(passes, rows(arm, confidence)))]
    if passing:
        cheapest = min(costs[arm].total for arm in passing)
        arm = min(
            (arm for arm in passing if costs[arm].total * (1 - rule.cost_margin) <= cheapest),
            key=lambda arm: (config.num_parts(arm), costs[arm].total, -standing(arm)),
        )
        against = rows(arm, confidence)
        same = bool(against) and all(row.low >= -rule.margin and row.high <= rule.margin for row in against)
        # "Worse" of a dearer arm says more than the recommendation needs, so it must hold together with all pairs.
        wide = {row.arm for row in rows(arm, together) if row.high < 0}
        words = ["as good" if same else _claim(row, rule.margin, wide, is_cheaper=is_cheaper(row)) for row in against]
        named = tuple(dataclasses.replace(row, conclusion=word) for row, word in zip(against, words, strict=True))
        outcome: VerdictOutcome = "no_difference" if same else "recommended"
        return Ranking(rule, means, costs, num_questions, outcome, arm, ahead, named)
    named = tuple(
        dataclasses.replace(
            row,
            conclusion="dropped" if row.arm in out else _word(row, rule.margin),
            needed=None if passes(row) else _needed(row, settings, is_cheaper=is_cheaper(row), any_time=any_time),
        )
        for row in rows(ahead, together)
    )
    return Ranking(rule, means, costs, num_questions, "too_few_questions", ahead, ahead, named)


def _is_cheaper(one: Cost, other: Cost, rule: config.Compare) -> bool:
    return one.total < other.total * (1 - rule.cost_margin)


def _claim(row: Difference, margin: float, worse: Collection[str], *, is_cheaper: bool) -> str:
    """What a recommendation states about another arm. Where it states nothing, the arm was dropped."""
    if is_cheaper:
        return "worse" if row.high < 0 else "dropped"
    if row.arm in worse:
        return "worse"
    return "no better" if row.high <= margin else "dropped"


def beaten(evidence: Mapping[str, Evidence], found: Sequence[Difference], settings: config.Config) -> set[str]:
    """The arms that no later look can recommend, because another arm rules them out.

    That is a cheaper arm that is shown to score at least as high, or any arm that is shown to be better by more than the margin.
    An arm that is ruled out already, or that breaks a constraint, rules out no other.
    """
    eligible = {arm for arm, each in evidence.items() if not _violations(each, settings.compare)}
    costs = {arm: each.cost for arm, each in evidence.items()}
    excluded = set[str]()
    for arm in evidence:
        for other in eligible - excluded - {arm}:
            row = _difference_to(found, other, arm, settings.evaluate.confidence, any_time=True)
            is_cheaper = _is_cheaper(costs[other], costs[arm], settings.compare)
            if row.low > settings.compare.margin or (row.low >= 0 and is_cheaper):
                excluded.add(arm)
                break
    return excluded


def _word(row: Difference, margin: float) -> str:
    if row.high < 0:
        return "worse"
    if row.low >= -margin and row.high <= margin:
        return "as good"
    return "no better" if row.high <= margin else "open"


def _needed(row: Difference, settings: config.Config, *, is_cheaper: bool, any_time: bool) -> int | None:
    """Number of questions that would probably settle an arm that is behind by -`value`, if that is the true difference.

    A dearer arm is settled by showing that it is no better by more than the margin. A cheaper one is settled either way: it is
    worse, or the arm that is ahead is no better by more than the margin.
    """
    # Of three arms, each may be behind another by their corrected differences.
    ahead, margin, confidence = max(0.0, -row.value), settings.compare.margin, settings.evaluate.confidence
    distance = max(ahead, margin - ahead) if is_cheaper else ahead + margin
    if row.labels:
        needed = prediction_powered.questions_needed(row.error, row.n, distance, confidence)
    else:
        needed = significance.questions_needed(row.deviation, distance, confidence, any_time=any_time)
    return None if needed is None else max(needed, row.n + 1, MIN_QUESTIONS)


def _by_query(scores: PerQuery, metric: str) -> dict[str, float]:
    return {query_id: values[metric] for query_id, values in scores.items() if metric in values}


def _mean(values: Mapping[str, float], labels: Mapping[str, float] | None) -> float:
    if labels is not None:
        return max(0.0, min(1.0, prediction_powered.estimate(values, labels).value))
    return float(np.mean(list(values.values())))


def _difference_to(
    found: Sequence[Difference], arm: str, against: str, confidence: float, *, any_time: bool
) -> Difference:
    """`arm` minus `against`, in whichever order the pair was compared, with an interval of this confidence."""
    for each in found:
        if {each.arm, each.against} == {arm, against}:
            value = each.value if each.arm == arm else 0.0 - each.value  # 0, not -0, which would be printed
            row = dataclasses.replace(each, arm=arm, against=against, value=value, confidence=confidence)
            low, high = row.ends(confidence, any_time=any_time)
            return dataclasses.replace(row, low=low, high=high)
    raise AssertionError(f"no difference between {arm} and {against}")


def _disagreements(
    ranking: Ranking, eligible: Mapping[str, Evidence], settings: config.Config, *, any_time: bool
) -> tuple[Disagreement, ...]:
    """The metrics that show another arm ahead of the verdict's arm, each with the arm that leads most; largest lead first."""
    scores = {arm: each.scores for arm, each in eligible.items()}
    found = []
    for metric in sorted({*get_args(config.DecidingMetric)} - {ranking.rule.metric}):
        if _num_shared(scores, metric) < MIN_QUESTIONS:
            continue
        if metric == "groundedness" and not all(map(config.retrieves, scores)):
            continue  # an arm without passages has none by definition, which says nothing about its answers
        rows = differences(scores, settings.with_values({"compare.metric": metric}))
        leads = [
            row
            for arm in scores.keys() - {ranking.arm}
            if (row := _difference_to(rows, arm, ranking.arm, settings.evaluate.confidence, any_time=any_time)).low > 0
        ]
        if leads:
            row = max(leads, key=lambda each: (each.value, each.arm))
            shared = _by_query(scores[row.arm], metric).keys()
            ours = {name: value for name, value in _by_query(scores[ranking.arm], metric).items() if name in shared}
            mean = _mean(ours, None)
            found.append(Disagreement(row.arm, metric, mean + row.value, mean, row.low, row.high, row.n))
    return tuple(sorted(found, key=lambda each: each.against - each.score))


def _num_shared(scores: Mapping[str, PerQuery], metric: str) -> int:
    """The fewest questions for which two arms both have a metric; a metric may be missing, as a failed grade is."""
    having = [{query_id for query_id, row in each.items() if metric in row} for each in scores.values()]
    return min((len(one & other) for one, other in itertools.combinations(having, 2)), default=0)


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
