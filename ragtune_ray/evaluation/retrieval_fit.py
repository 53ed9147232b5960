"""Chooses how to retrieve on validation questions: dense, BM25 or both, with which weight and how many candidates.

A change is advised only if it is better than the current settings with confidence. Since the best of several
alternatives may look better by chance, that is the confidence of all of them together (Bonferroni). Dense retrieval and
BM25 are also tried alone, since one of them may only harm in hybrid retrieval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import intervals

WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
"""Weights of BM25 that are tried."""
MORE_CANDIDATES = (2, 4)
"""Multiples of `retrieval.candidates` that are tried with the best weight."""
MOST_TRIED = 2 + len(WEIGHTS) + len(MORE_CANDIDATES)
"""Alternatives to the current settings: dense, BM25, the weights, more candidates."""
MIN_QUESTIONS = 30
"""With fewer questions nothing is chosen."""

Scores = Mapping[str, Mapping[str, float]]
"""Query id -> metric -> value."""
Measure = Callable[[Mapping[str, Any]], Scores]
"""Retrieves with other settings, by dotted name, and returns the scores."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One way to retrieve, and how well it does."""

    settings: dict[str, Any]
    """Settings that differ from the current ones, by dotted name; empty: none."""
    score: float
    """Mean of the metric."""
    difference: intervals.Interval
    """From the current settings, on the same questions; the interval is corrected for the number of alternatives."""


@dataclass(frozen=True, slots=True)
class RetrievalFit:
    """What was tried, the current settings first, and what it advises."""

    metric: str
    num_questions: int
    tried: tuple[Tried, ...]
    advised: dict[str, Any]
    """Settings to change, by dotted name; empty: nothing is better with confidence."""
    recalls: dict[int, float]
    """k -> recall@k with the advised settings; k counts documents, not passages."""


def fit_retrieval(
    settings: config.Config, measure: Measure, weights: Sequence[str] = ("retrieval.lexical_weight",)
) -> RetrievalFit | None:
    """Try other ways to retrieve; None if fewer than `MIN_QUESTIONS` questions have relevant documents.

    Tries first dense, BM25 and the `WEIGHTS`, then more candidates with the best of them if that is hybrid.
    `weights` names the settings that get a tried weight.
    """
    metric = f"nDCG@{max(settings.evaluate.cutoffs)}"
    current = measure({})
    names = [name for name, values in current.items() if metric in values]
    if len(names) < MIN_QUESTIONS:
        return None
    measured: list[Scores] = [current]
    tried = [Tried({}, float(_values(current, names, metric).mean()), intervals.Interval(0.0, 0.0, 0.0, len(names)))]

    def attempt(values: dict[str, Any]) -> int:
        measured.append(measure(values))
        gain = _gain(settings, *(_values(scores, names, metric) for scores in (current, measured[-1])))
        tried.append(Tried(values, float(_values(measured[-1], names, metric).mean()), gain))
        return len(tried) - 1

    for mode in ("dense", "lexical"):
        attempt({"retrieval.mode": mode})
    for weight in WEIGHTS:
        attempt({"retrieval.mode": "hybrid", "retrieval.fusion": "scores", **dict.fromkeys(weights, weight)})
    best = _best(tried)
    if tried[best].settings.get("retrieval.mode", settings.retrieval.mode) == "hybrid":
        chosen = best
        for factor in MORE_CANDIDATES:
            more = {**tried[chosen].settings, "retrieval.candidates": factor * settings.retrieval.candidates}
            place = attempt(more)
            if _gain(settings, *(_values(measured[each], names, metric) for each in (best, place))).low > 0:
                best = place
    recalls = {
        k: float(_values(measured[best], names, f"recall@{k}").mean()) for k in sorted(settings.evaluate.cutoffs)
    }
    return RetrievalFit(metric, len(names), tuple(tried), _changed(settings, tried[best].settings), recalls)


def _gain(settings: config.Config, before: np.ndarray, after: np.ndarray) -> intervals.Interval:
    rule = settings.evaluate
    confidence = 1 - (1 - rule.confidence) / MOST_TRIED
    return intervals.paired_bootstrap(before, after, rule.resamples, confidence, settings.seed)


def _values(scores: Scores, names: list[str], metric: str) -> np.ndarray:
    return np.array([scores[name][metric] for name in names])


def _best(tried: list[Tried]) -> int:
    """The place of the best one that is better than the current settings with confidence; of equals the first."""
    places = [place for place, each in enumerate(tried) if place == 0 or each.difference.low > 0]
    return max(places, key=lambda place: (tried[place].score, -place))


def _changed(settings: config.Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the config's."""
    dumped = settings.retrieval.model_dump(mode="json")
    return {name: value for name, value in values.items() if dumped[name.partition(".")[2]] != value}


def summary_lines(fit: RetrievalFit) -> list[str]:
    """The fit in lines for people: each way with its score and its difference, then the settings to paste."""
    lines = [
        f"{fit.metric} on {fit.num_questions:,} validation questions; intervals corrected for {MOST_TRIED} alternatives"
    ]
    for each in fit.tried:
        name = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in each.settings.items()) or "now"
        gap = each.difference
        lines.append(f"  {each.score:.4f}  {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]  {name}")
    lines.append("  " + ", ".join(f"recall@{k} {recall:.3f}" for k, recall in fit.recalls.items()))
    if fit.advised:
        lines.append("set: " + " ".join(f"{name}={value}" for name, value in fit.advised.items()))
    else:
        lines.append("nothing is better than the current settings with confidence; keep them")
    return lines
