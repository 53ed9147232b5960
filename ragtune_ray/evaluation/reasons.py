"""Says in words and numbers why an arm is recommended, or why none is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS, Difference, Disagreement, Evidence, Ranking, Weighed

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


def headline(ranking: Ranking, disagreement: Disagreement | None) -> str:
    """The verdict in a sentence; where another metric has another winner, with both metrics' numbers."""
    arm, rule = ranking.arm, ranking.rule
    meaning, by_rule, but = _meaning(arm), "", ""
    if disagreement is not None:
        other = disagreement
        (behind,) = (row.value for row in ranking.rows if row.arm == other.arm)
        by_rule = f" by {rule.metric} ({ranking.means[arm]:.3f} against {ranking.means[arm] + behind:.3f})"
        but = f", but {other.arm} is ahead by {other.metric} ({other.score:.3f} against {other.against:.3f})"
    match ranking.outcome:
        case "recommended":
            return f"Use {arm}{by_rule}{but}: {meaning}."
        case "no_difference":
            chosen = "simplest" if _cheaper(ranking) else "cheapest"
            return f"No difference that matters{by_rule}{but}: take the {chosen}, {arm} ({meaning})."
        case _:
            return f"Too few questions to tell; {arm} ({meaning}) is ahead so far{by_rule}{but}."


def _meaning(arm: str) -> str:
    """What it means to use an arm.

    >>> _meaning("rag@gpt")
    'retrieve, with gpt as the generator'
    """
    if name := config.hosted_name(arm):
        return f"retrieve, with {name} as the generator" if config.retrieves(arm) else f"ask {name}"
    return MEANINGS[arm]


def reasons(ranking: Ranking, violations: Mapping[str, tuple[str, ...]]) -> list[str]:
    """One sentence per arm with its numbers, then the costs."""
    rule, best, means = ranking.rule, ranking.best, ranking.means
    highest = f"{best} scores highest of {len(means)}: {rule.metric} {means[best]:.3f}"
    lines = [f"{highest} over {ranking.num_questions:,} questions."]
    for row in ranking.rows:
        interval = f"{row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        lines.append(f"{row.arm} - {row.against}: {interval}, {_conclusion(row, rule.margin)}.")
    against = (row for row in ranking.rows if row.labels and (means[row.arm] - means[row.against]) * row.value < 0)
    if contrary := [row.arm for row in against]:
        lines.append(
            f"Each mean and each difference is corrected for itself. The means order {ranking.arm} and {' and '.join(contrary)} "
            "the other way round; the differences, which are more precise, decide."
        )
    lines += [f"{arm} does not qualify: {'; '.join(broken)}." for arm, broken in violations.items() if broken]
    if len(ranking.costs) > 1:
        cost = ranking.costs[ranking.arm]
        totals = ", ".join(f"{arm} {three_digits(each.total)}" for arm, each in ranking.costs.items())
        lines.append(f"Cost of {cost.answers:,} answers, all included: {totals} {cost.unit}.")
    if cheaper := _cheaper(ranking):
        has = "has fewer parts" if len(cheaper) == 1 else "has the fewest parts"
        lines.append(
            f"{' and '.join(cheaper)} cost{'s' * (len(cheaper) == 1)} less than {ranking.arm}, but by no more than "
            f"compare.cost_margin={rule.cost_margin:g} of it, as costs vary from run to run; {ranking.arm} {has}."
        )
    return lines


def _cheaper(ranking: Ranking) -> list[str]:
    """The arms that cost less than the recommended one by so little that its fewer parts decided."""
    arm, costs = ranking.arm, ranking.costs
    return [
        row.arm
        for row in ranking.rows
        if row.conclusion in ("as good", "no better")
        and costs[row.arm].total < costs[arm].total
        and config.num_parts(row.arm) > config.num_parts(arm)
    ]


def _conclusion(row: Difference, margin: float) -> str:
    words = {
        "no better": f"no better by more than {margin:g}",
        "as good": f"as good: within {margin:g}",
    }.get(row.conclusion, row.conclusion)
    if row.needed is None:
        return words
    return f"{words}: about {row.needed:,} questions{_labelled(row, row.needed)} would probably show more"


def _labelled(row: Difference, needed: int) -> str:
    """How many of the needed questions people must label, where labels correct the difference: the same share as now."""
    return f" with {math.ceil(needed * row.labels / row.n):,} of them labelled" if row.labels else ""


def warnings(ranking: Ranking, evidence: Mapping[str, Evidence]) -> list[str]:
    """What the reader of the verdict must know before acting on it."""
    rule, lines = ranking.rule, []
    if ranking.num_questions < MIN_QUESTIONS:
        lines.append(
            f"{ranking.num_questions} questions are fewer than {MIN_QUESTIONS}: the intervals are unreliable and no arm is "
            "recommended; add questions."
        )
    if unsettled := [row for row in ranking.rows if row.needed is not None]:
        names, most = ", ".join(row.arm for row in unsettled), max(unsettled, key=lambda row: row.needed or 0)
        needed = most.needed or 0
        there = f"{ranking.num_questions:,}" + (f", {most.labels:,} of them labelled" if most.labels else "")
        lines.append(
            f"To decide between {ranking.arm} and {names} takes about {needed:,} questions{_labelled(most, needed)} if the "
            f"arms differ as they do so far; there are {there}."
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


def weighed(
    evidence: Mapping[str, Evidence],
    ranking: Ranking | None,
    settings: config.Config,
) -> list[Weighed]:
    """The steps of the decision: constraints exclude arms, quality and cost choose; `ranking` is None if no arm is left."""
    rule, confidence = settings.compare, settings.evaluate.confidence
    unit = next(iter(evidence.values())).cost.unit
    return [
        Weighed("quality", f"{rule.metric}, margin {rule.margin:g}, confidence {confidence:.0%}", _ranked(ranking)),
        _constraint("latency", "max_p95_seconds", "s", evidence, rule),
        Weighed(
            "cost",
            f"the cheapest arm that no other beats, over {rule.answers:,} answers; a dearer one must win by more than the margin"
            + (f"; costs within {rule.cost_margin:.0%} are equal, and fewer parts decide" if rule.cost_margin else "")
            + (f"; at most {rule.max_cost_per_1000:g} per 1,000 answers" if rule.max_cost_per_1000 else ""),
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


def _ranked(ranking: Ranking | None) -> str:
    """The arms by the word that the verdict has for them."""
    if ranking is None:
        return "no arm is left"
    named: dict[str, list[str]] = {"recommended" if ranking.outcome != "too_few_questions" else "ahead": [ranking.arm]}
    for row in ranking.rows:
        named.setdefault(row.conclusion, []).append(row.arm)
    return "; ".join(f"{word}: {', '.join(arms)}" for word, arms in named.items())


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
