"""Asks the questions of a comparison in batches, until the verdict stands (`compare.until: decided`).

After each batch the arms are weighed with intervals that hold at every look. Arms that cannot win any more are dropped: they
answer no further questions, except for an arm whose passages the judge needs. Latency is measured once, after the first batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, staged_queries
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.evaluation import decision
from ragtune_ray.evaluation.comparison import Looks
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS, Evidence
from ragtune_ray.storage import artifacts

BATCH_QUESTIONS = 100
"""Questions between two looks, rounded up to whole units of `answer`."""

Weigh = Callable[[config.Config, Mapping[config.Arm, str]], Mapping[config.Arm, Evidence]]
"""From the config with the questions asked so far, and each arm's run of `evaluate`, to each arm's evidence."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Where asking stopped."""

    settings: config.Config
    """Selects the questions that the arms still in the running have answered."""
    evaluated: dict[config.Arm, str]
    """Arm -> the run of `evaluate` with its answers; a dropped arm's has fewer questions."""
    looks: Looks


def ask_until_decided(settings: config.Config, weigh: Weigh) -> Asked:
    """Ask in batches until an arm is recommended or every question is asked.

    Args:
        settings: of the comparison; its queries are taken in random order.
        weigh: measures what the decision uses, from the answers so far.
    """
    settings = settings.with_values({"queries.order": "shuffled"})
    selected = staged_queries.selected_queries(settings)
    available = len(selected)
    unit = settings.answer.unit_queries
    step = math.ceil(BATCH_QUESTIONS / unit) * unit
    so_far, num_looks = settings, 0
    evaluated: dict[config.Arm, str] = {}
    asked: dict[config.Arm, int] = {}
    dropped: list[config.Arm] = []
    for count in [*range(step, available, step), available]:
        num_judged = sum(settings.evaluate.can_score(query.answers) for query in selected[:count])
        if count < available and num_judged < MIN_QUESTIONS:
            continue
        alive = tuple(arm for arm in settings.compare.arms if arm not in dropped)
        so_far = settings.with_values({"queries.limit": count})
        known = {arm: runs.read_manifest(url)["runs"][arm] for arm, url in evaluated.items() if arm in alive}
        found = str(evaluate.evaluate(so_far.with_values({"evaluate.arms": alive}), known))
        evaluated |= dict.fromkeys(alive, found)
        asked |= dict.fromkeys(alive, count)
        evidence = weigh(so_far, evaluated)
        differences = decision.differences({arm: each.scores for arm, each in evidence.items()}, settings)
        num_looks += 1
        verdict = decision.decide(evidence, differences, settings, any_time=True, dropped=dropped)
        progress.say(f"compare: {count:,} of {available:,} questions asked: {verdict.headline}")
        if verdict.outcome in ("recommended", "no_difference"):
            break
        new = decision.beaten(evidence, differences, settings) - {*dropped, _shows_evidence(settings, selected)}
        if count < available and new:
            progress.say(f"compare: can no longer win, so no further questions for: {', '.join(sorted(new))}")
            dropped += sorted(new)
    return Asked(so_far, evaluated, Looks(available=available, looks=num_looks, asked=asked, dropped=tuple(dropped)))


def _shows_evidence(settings: config.Config, selected: Sequence[schema.Query]) -> config.Arm:
    """The arm whose passages the judge reads to check the answers of arms that retrieve nothing; empty if it needs none."""
    reads = "judge" in settings.evaluate.metrics and any(query.answers is None for query in selected)
    return next(filter(config.retrieves, settings.compare.arms), "") if reads else ""


def identity(evaluated: Mapping[config.Arm, str]) -> str | dict[str, str]:
    """The part of a comparison's identity for its runs of `evaluate`: one digest, or one per arm where they differ."""
    digests = {arm: str(artifacts.read_manifest(url)["manifest_sha256"]) for arm, url in evaluated.items()}
    return digests if len(set(digests.values())) > 1 else next(iter(digests.values()))
