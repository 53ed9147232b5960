"""Measures one arm: its answers, latency, cost, freshness, forgetting, and the effect of its calibration."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer
from ragtune_ray.cluster.answering import evaluate as evaluate_module
from ragtune_ray.cluster.comparing import calibrate, freshness, latency
from ragtune_ray.evaluation import costs, intervals, scoring
from ragtune_ray.evaluation.comparison import Adaptive, Forgetting, Latency
from ragtune_ray.evaluation.grading import trust
from ragtune_ray.evaluation.labelling import checking
from ragtune_ray.evaluation.verdict import Evidence
from ragtune_ray.index import versions
from ragtune_ray.models import arms
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.training.manifest import TrainingCost, read_training_cost
from ragtune_ray.tuning.manifest import read_tune_manifest


class MeasureError(RagtuneError, ValueError):
    """A measurement is impossible with these settings."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one arm."""

    settings: config.Config
    """Of the arm, with its own models."""
    rows: dict[str, schema.Answer]
    """query_id -> answer."""
    scores: scoring.PerQuery
    manifest: runs.RunManifest
    """Of the arm's run of `answer`."""
    rounds: list[dict[str, Any]]
    """The verdicts of a mode's tune; empty for other arms."""
    summary: dict[str, intervals.Interval]
    """Metric -> mean, from `evaluate`."""
    cited: intervals.Interval
    """Share of the answers that cite a passage."""
    latency: Latency
    cost: costs.Cost
    visible_seconds: float
    changed: intervals.Interval | None
    """Score on the questions about the change."""
    forgetting: Forgetting | None
    adaptive: Adaptive | None
    """None if the arm was not calibrated."""
    labels: Mapping[str, float] | None = None
    """query_id -> people's grade, if labels correct `compare.metric`; `summary` then has its corrected mean."""

    def evidence(self) -> Evidence:
        """The measurements that the decision uses."""
        return Evidence(
            scores=self.scores,
            cost=self.cost,
            p95_seconds=self.latency.total.p95_seconds,
            visible_seconds=self.visible_seconds,
            cited_share=self.cited.value,
            forgotten=self.forgetting.difference if self.forgetting else None,
            labels=self.labels,
        )

    def corrected(self, labelled: Mapping[str, float], settings: config.Config) -> Measured:
        """The same with the mean of `compare.metric` corrected by people's grades."""
        mean = checking.corrected_mean(self.scores, labelled, settings)
        return dataclasses.replace(self, labels=labelled, summary={**self.summary, settings.compare.metric: mean})


def measure_latencies(
    settings: config.Config, evaluated: Mapping[config.Arm, str], queries: Sequence[schema.Query]
) -> dict[config.Arm, Latency]:
    """Ask every arm `compare.latency_queries` of the questions, one at a time; `evaluated` has their runs of `evaluate`."""
    timed = _spread(queries, settings.compare.latency_queries)
    progress.say(f"compare: each arm answers {len(timed)} questions one at a time")
    answered = [_answered(settings, arm, evaluated[arm]) for arm in settings.compare.arms]
    found = latency.measure([(of_arm, manifest["index_version"]) for of_arm, _, manifest in answered], timed)
    return dict(zip(settings.compare.arms, found, strict=True))


def measure(
    settings: config.Config,
    arm: config.Arm,
    evaluated: str,
    queries: Sequence[schema.Query],
    changed: Mapping[str, tuple[config.Config, float]],
    one_by_one: Latency,
) -> Measured:
    """Measure one arm.

    Args:
        settings: of the comparison.
        arm: the arm to measure.
        evaluated: the finished run of `evaluate` with its answers.
        queries: those that can be scored.
        changed: workspace of an index -> result of `freshness.follow_changes`; empty if no change is measured.
        one_by_one: the arm's latency.
    """
    of_arm, run, manifest = _answered(settings, arm, evaluated)
    rows = {row.query_id: row for row in evaluate_module.read_answers(run)}
    queries = [query for query in queries if query.query_id in rows]
    model = arms.tuned_model(settings.workspace, arm) if config.is_tuned(arm) else ""
    timed = _spread(queries, settings.compare.latency_queries)
    follows = changed.get(of_arm.workspace)
    metrics = artifacts.open_artifact(evaluated, "evaluate").path / arm / "metrics.json"
    means = json.loads(metrics.read_text(encoding="utf-8"))
    plain = settings.with_values({"answer.arm": arm})
    cost, visible_seconds = _cost_and_freshness(of_arm, manifest, list(rows.values()), changed)
    return Measured(
        settings=of_arm,
        rows=rows,
        scores=evaluate_module.read_scores(evaluated, arm),
        manifest=manifest,
        rounds=read_tune_manifest(model).get("rounds", []) if config.is_mode(arm) else [],
        summary={metric: intervals.Interval(**ends) for metric, ends in means.items()},
        cited=scoring.cited_share(list(rows.values()), settings.evaluate, settings.seed),
        latency=one_by_one,
        cost=cost,
        visible_seconds=visible_seconds,
        changed=freshness.changed_scores(settings, follows[0], arm) if follows else None,
        forgetting=_forgetting(settings, of_arm) if model and _is_probed(settings) else None,
        adaptive=calibrate.effect(plain, queries, run, timed, one_by_one) if config.retrieves(arm) else None,
    )


def evidence_so_far(
    settings: config.Config,
    arm: config.Arm,
    evaluated: str,
    changed: Mapping[str, tuple[config.Config, float]],
    one_by_one: Latency,
) -> Evidence:
    """What a decision on a part of the questions uses: as `measure`, without what only the report shows."""
    of_arm, run, manifest = _answered(settings, arm, evaluated)
    rows = evaluate_module.read_answers(run)
    cost, visible_seconds = _cost_and_freshness(of_arm, manifest, rows, changed)
    return Evidence(
        scores=evaluate_module.read_scores(evaluated, arm),
        cost=cost,
        p95_seconds=one_by_one.total.p95_seconds,
        visible_seconds=visible_seconds,
        cited_share=scoring.cited_share(rows, settings.evaluate, settings.seed).value,
    )


def _cost_and_freshness(
    settings: config.Config,
    manifest: runs.RunManifest,
    rows: Sequence[schema.Answer],
    changed: Mapping[str, tuple[config.Config, float]],
) -> tuple[costs.Cost, float]:
    """The cost of an arm, and the seconds until it shows a change; `settings` are the arm's own."""
    arm = settings.answer.arm
    tuned = read_training_cost(arms.tuned_model(settings.workspace, arm)) if config.is_tuned(arm) else None
    indexed = _index_seconds(settings, manifest)
    follows = changed.get(settings.workspace)
    to_index = follows[1] if follows else sum(each["total"] for each in indexed[-1:])
    cost = _cost(settings, indexed, manifest["busy_seconds"], tuned, rows, manifest.get("rewriting", {}))
    return cost, freshness.visible_seconds(arm, to_index, tuned)


def cut_warnings(measured: Mapping[config.Arm, Measured]) -> list[str]:
    """For each arm whose answers were cut, how many; a cut answer can score less than a whole one."""
    notices = {
        arm: runs.cut_notice(each.manifest, each.settings.generator.max_new_tokens) for arm, each in measured.items()
    }
    return [f"{arm}: {notice}." for arm, notice in notices.items() if notice]


def grade_warnings(settings: config.Config, measured: Mapping[config.Arm, Measured]) -> list[str]:
    """Sentences about a verdict that rests on grades; none if `compare.metric` needs no model."""
    generator = settings.generator.model
    return trust.warnings(
        settings,
        {arm: generator if config.is_tuned(arm) else each.settings.generator.model for arm, each in measured.items()},
        {arm: each.scores for arm, each in measured.items()},
        {arm: {name: len(row.answer) for name, row in each.rows.items()} for arm, each in measured.items()},
    )


def cost_warnings(measured: Mapping[config.Arm, Measured]) -> list[str]:
    """Sentences about arms whose cost lacks the work of a server, or tokens that it did not report."""
    at_server = {arm: each for arm, each in measured.items() if each.settings.generator.engine == "openai"}
    prices = {arm: each.settings.prices for arm, each in at_server.items()}
    priced = [arm for arm, each in prices.items() if each.million_prompt_tokens or each.million_completion_tokens]
    unpriced = [arm for arm in at_server if arm not in priced]
    uncounted = [
        arm for arm in priced if any(row.answer and not row.completion_tokens for row in at_server[arm].rows.values())
    ]
    lines = []
    if unpriced:
        lines.append(
            f"A server answers {_listed(unpriced)}: their cost covers the requests, not the server's own computing; set "
            "million_prompt_tokens and million_completion_tokens."
        )
    if uncounted:
        lines.append(
            f"The server of {_listed(uncounted)} does not report the tokens of its answers: their cost is too low."
        )
    return lines


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> _listed(["base", "rag"])
    'base and rag'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _answered(settings: config.Config, arm: config.Arm, evaluated: str) -> tuple[config.Config, str, runs.RunManifest]:
    """The arm's config with its own models, its run of `answer`, and the manifest of that run."""
    of_arm = arms.with_tuned_models(settings.with_values({"answer.arm": arm}))
    run = artifacts.read_manifest(evaluated)["runs"][arm]
    manifest = runs.read_manifest(run)
    manifest["index_version"] = runs.living_version(of_arm.workspace, manifest)
    return of_arm, run, manifest


def _spread(queries: Sequence[schema.Query], count: int) -> list[schema.Query]:
    """At most `count` queries, evenly spaced."""
    places = np.linspace(0, len(queries) - 1, min(count, len(queries))).round().astype(int)
    return [queries[place] for place in places]


def _index_seconds(settings: config.Config, manifest: runs.RunManifest) -> list[dict[str, float]]:
    """Seconds and workers of the index version of a run and its remaining ancestors, oldest first."""
    name, found = manifest["index_version"], list[dict[str, float]]()
    while name and filesystem.exists(versions.version_url(settings.workspace, name)):
        facts = versions.read_version(settings.workspace, name).manifest
        workers = facts.get("encoding", {}).get("workers", 1)
        found.append({"total": facts.get("seconds", {}).get("total", 0.0), "workers": float(workers)})
        name = facts.get("parent", "")
    return found[::-1]


def _cost(
    settings: config.Config,
    indexed: Sequence[dict[str, float]],
    busy: dict[str, float],
    tuned: TrainingCost | None,
    rows: Sequence[schema.Answer],
    rewriting: Mapping[str, Any] = types.MappingProxyType({}),
) -> costs.Cost:
    gpus = settings.cluster.gpus_per_worker
    built = costs.Compute()
    for each in indexed:
        busy_seconds = each["total"] * each["workers"]
        built += costs.Compute(busy_seconds, busy_seconds * gpus)
    trained = costs.Compute()
    if tuned:
        seconds = tuned["seconds"]["steps"] * tuned["num_workers"]
        trained = costs.Compute(seconds * tuned.get("cores_per_worker", 1), seconds * gpus)
    at_server = settings.generator.engine == "openai"
    generating = busy["generation"] + rewriting.get("busy_seconds", 0.0)
    generating_gpus = session.for_generators(settings).gpus_per_worker
    answered = costs.Compute(busy["retrieval"] + generating, generating * generating_gpus)
    prices, unit = settings.prices, costs.unit_of(settings.prices, with_gpus=gpus > 0)
    return costs.cost_of(
        built,
        trained,
        answered.times(1 / len(rows)),
        answers=settings.compare.answers,
        prices=prices,
        unit=unit,
        charged=_charged(rows, prices, rewriting) / len(rows) if at_server else 0.0,
    )


def _charged(rows: Sequence[schema.Answer], prices: config.Prices, rewriting: Mapping[str, Any]) -> float:
    """What a server charged for these answers and the texts for their searches; failed requests are not charged."""
    charged = [row for row in rows if row.status != "failed"]
    prompts = sum(row.prompt_tokens for row in charged) + rewriting.get("prompt_tokens", 0)
    completions = sum(row.completion_tokens for row in charged) + rewriting.get("completion_tokens", 0)
    return costs.tokens_price(prompts, completions, prices)


def _is_probed(settings: config.Config) -> bool:
    """Whether the probe questions are asked: they are answered without passages, on which groundedness rests."""
    return bool(settings.compare.probe_path) and settings.compare.metric != "groundedness"


def _forgetting(settings: config.Config, tuned: config.Config) -> Forgetting:
    """How well the base model and the tuned generator answer the probe questions, without passages."""
    probe = staged_queries.with_all_queries_of(settings, settings.compare.probe_path)
    queries = [query for query in staged_queries.judged_queries(probe) if query.answers is not None]
    if not queries:
        raise MeasureError(f"compare.probe_path={settings.compare.probe_path}: no question has `answers`")
    base = probe.with_values({"answer.arm": "base"})
    changed = base.with_values({"generator.model": tuned.generator.model, "generator.engine": tuned.generator.engine})
    before, after = (evaluate_module.scores_of(queries, str(answer.answer(each)), base) for each in (base, changed))
    metric, evaluate = settings.compare.metric, settings.evaluate
    shared = [name for name, row in before.items() if metric in row and metric in after[name]]
    a, b = (np.array([scores[name][metric] for name in shared]) for scores in (before, after))
    if not shared:
        raise MeasureError(f"compare.probe_path={settings.compare.probe_path}: no question has {metric}")
    resamples, confidence, seed = evaluate.resamples, evaluate.confidence, settings.seed
    return Forgetting(
        before=intervals.bootstrap(a, resamples, confidence, seed),
        after=intervals.bootstrap(b, resamples, confidence, seed),
        difference=intervals.paired_bootstrap(a, b, resamples, confidence, seed),
    )
