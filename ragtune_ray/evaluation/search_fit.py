"""Measures on validation questions whether rewriting follow-ups and splitting questions finds their documents better.

As in `retrieval_fit`, a change is advised only if it is better than the current settings with confidence, corrected for the
number of alternatives (Bonferroni); otherwise the settings stay. Rewriting is judged by the questions that follow a conversation
alone, since it changes no others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import intervals
from ragtune_ray.evaluation.retrieval_fit import MIN_QUESTIONS, Measure, Scores

REWRITES: tuple[config.Rewrite, ...] = ("none", "last_turns", "generator")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to search, and how well it finds the documents."""

    settings: dict[str, Any]
    """Settings that differ from the current ones, by dotted name; empty: none."""
    means: dict[str, float]
    """Metric -> mean over the questions: recall, MRR and nDCG at the largest of `evaluate.cutoffs`."""
    differences: dict[str, intervals.Interval]
    """Metric -> paired difference from the current settings; the intervals are corrected for the number of alternatives."""


@dataclass(frozen=True, slots=True)
class SearchFit:
    """What was tried, the current settings first in each list, and what it advises."""

    rewriting: tuple[Way, ...]
    """Empty: fewer than `MIN_QUESTIONS` questions follow a conversation and name relevant documents."""
    splitting: tuple[Way, ...]
    """Empty: fewer than `MIN_QUESTIONS` questions name relevant documents."""
    advised: dict[str, Any]
    """Settings to change, by dotted name; empty: nothing is better with confidence."""


def fit_searches(settings: config.Config, measure: Measure, follow_ups: Collection[str]) -> SearchFit | None:
    """Try the other ways to rewrite, then splitting with the best of them; None with fewer than `MIN_QUESTIONS` questions.

    Args:
        settings: the current ones.
        measure: retrieves with other settings and returns the scores of each question.
        follow_ups: ids of the questions that follow a conversation.
    """
    current = measure({})
    names = [name for name, values in current.items() if _metrics(settings)[-1] in values]
    if len(names) < MIN_QUESTIONS:
        return None
    followed = [name for name in names if name in follow_ups]
    advised: dict[str, Any] = {}
    rewriting: tuple[Way, ...] = ()
    if len(followed) >= MIN_QUESTIONS:
        others = [{"retrieval.rewrite": way} for way in REWRITES if way != settings.retrieval.rewrite]
        rewriting, advised = _compared(settings, measure, current, followed, others)
    chosen = measure(advised) if advised else current
    # The split questions are compared with whole ones that are rewritten in the same way.
    opposite = {**advised, "retrieval.decompose": not settings.retrieval.decompose}
    splitting, better = _compared(settings, measure, chosen, names, [opposite])
    return SearchFit(rewriting, splitting, {**advised, **better})


def _metrics(settings: config.Config) -> tuple[str, str, str]:
    """The metrics that are shown; the last one decides."""
    k = max(settings.evaluate.cutoffs)
    return f"recall@{k}", f"MRR@{k}", f"nDCG@{k}"


def _compared(
    settings: config.Config,
    measure: Callable[[Mapping[str, Any]], Scores],
    current: Scores,
    names: Sequence[str],
    others: Sequence[dict[str, Any]],
) -> tuple[tuple[Way, ...], dict[str, Any]]:
    """Every way, the current one first, and the settings of the best that is better with confidence; empty if none is."""
    ways = [_way(settings, {}, current, current, names, 1)]
    ways += [_way(settings, values, current, measure(values), names, len(others)) for values in others]
    decides = _metrics(settings)[-1]
    better = [way for way in ways[1:] if way.differences[decides].low > 0]
    best = max(better, key=lambda way: way.means[decides], default=ways[0])
    return tuple(ways), dict(best.settings)


def _way(
    settings: config.Config,
    values: dict[str, Any],
    before: Scores,
    after: Scores,
    names: Sequence[str],
    alternatives: int,
) -> Way:
    rule = settings.evaluate
    confidence = 1 - (1 - rule.confidence) / alternatives
    means: dict[str, float] = {}
    differences: dict[str, intervals.Interval] = {}
    for metric in _metrics(settings):
        a, b = (np.array([scores[name][metric] for name in names]) for scores in (before, after))
        means[metric] = float(b.mean())
        differences[metric] = intervals.paired_bootstrap(a, b, rule.resamples, confidence, settings.seed)
    return Way(values, means, differences)


def search_lines(fit: SearchFit) -> list[str]:
    """The fit in lines for people: each way with its scores and differences, then the settings to paste."""
    lines = []
    for what, ways in (("questions that follow a conversation", fit.rewriting), ("questions", fit.splitting)):
        for way in ways:
            name = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in way.settings.items()) or "now"
            if not way.settings:
                lines.append(f"{next(iter(way.differences.values())).n:,} validation {what}; intervals of differences")
            cells = [
                f"{metric} {mean:.4f} {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
                for (metric, mean), gap in zip(way.means.items(), way.differences.values(), strict=True)
            ]
            lines.append(f"  {name}: {'  '.join(cells)}")
    if fit.advised:
        lines.append("set: " + " ".join(f"{name}={_shown(value)}" for name, value in fit.advised.items()))
    else:
        lines.append("neither rewriting nor splitting is better than the current settings with confidence; keep them")
    return lines


def _shown(value: Any) -> str:
    """A value as on the command line.

    >>> _shown(True), _shown("generator")
    ('true', 'generator')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)
