"""Arms answered, scored, compared.

In: a config with queries that have gold answers. Out: a run directory with, for each arm, `ARM/metrics.json` (name ->
{value, low, high, n}) and `ARM/scores.parquet` (one row per query), and `differences.json`: each arm less the first, with paired
intervals over the same queries. The answers themselves stand in the run directories of `answer`, and nothing is answered twice.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import session, staged_queries
from ragtune_ray.cluster.answering import answer, retrieve
from ragtune_ray.evaluation import intervals, scoring
from ragtune_ray.index import versions
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, checksums, filesystem

__all__ = [
    "EvaluationError",
    "check_tuned",
    "evaluate",
    "held_out",
    "read_answers",
    "require_index",
    "require_judged",
    "scores_of",
]

logger = logging.getLogger(__name__)

SPLITTING = ("split_by", "split_shares", "split_seed")
"""Fields of `queries` that say which split a query falls into."""

Scores = dict[str, dict[str, float]]
MAX_CHANGES = 3


class EvaluationError(RagtuneError, ValueError):
    """The arms cannot be scored or compared; the message says what to change."""


def evaluate(settings: config.Config) -> Path | str:
    """Answer the queries in each arm of `evaluate.arms`, score the answers and compare the arms.

    Args:
        settings: where an arm is tuned, the queries of the test split are taken if `queries.split` is `all`.

    Returns:
        The run's directory.

    Raises:
        EvaluationError: no query has gold answers, or `check_tuned` refuses an arm.
        models.ModelError: nothing was trained for a tuned arm yet.
        answers.AnswerError: too many rows of an arm failed.
    """
    started = time.monotonic()
    settings = held_out(settings, settings.evaluate.arms)
    for arm in filter(config.is_tuned, settings.evaluate.arms):
        check_tuned(settings, arm)
    with staged_queries.staged_queries(settings) as staged:
        queries = staged_queries.read_queries(staged.url, 0, staged.num_queries)
    judged = [query for query in queries if query.answers is not None]
    require_judged(settings, judged)
    require_index(settings, settings.evaluate.arms)
    with session.ray_session(settings.cluster):
        runs = _answered(settings)
    identity = {
        "runs": {arm: artifacts.read_manifest(run)["manifest_sha256"] for arm, run in runs.items()},
        "evaluate": settings.evaluate.model_dump(mode="json"),
        "seed": settings.seed,
    }
    url = filesystem.join(settings.workspace, "runs", f"evaluate-{checksums.digest(identity)}")
    if artifacts.is_finished(url):
        progress.say("evaluate: this run is already finished; nothing to do")
        return url
    scores = {arm: scores_of(judged, read_answers(run), settings) for arm, run in runs.items()}
    staging = artifacts.stage(url)
    for arm, per_query in scores.items():
        (staging / arm).mkdir()
        summary = intervals.summarize(
            per_query, settings.evaluate.resamples, settings.evaluate.confidence, settings.seed
        )
        (staging / arm / "metrics.json").write_text(retrieve.metrics_json(summary), encoding="utf-8")
        rows = [{"query_id": query_id, **values} for query_id, values in per_query.items()]
        pq.write_table(_score_table(rows), staging / arm / "scores.parquet", write_page_checksum=True)
    differences = _differences(scores, settings)
    (staging / "differences.json").write_text(json.dumps(differences, indent=1) + "\n", encoding="utf-8")
    artifacts.publish(
        staging,
        url,
        "evaluate",
        config=settings.model_dump(mode="json"),
        runs=runs,
        input={"fingerprint": staged.fingerprint, "num_queries": staged.num_queries, "num_judged": len(judged)},
        seconds={"total": round(time.monotonic() - started, 3)},
    )
    return url


def _answered(settings: config.Config) -> dict[config.Arm, str]:
    """Each arm's run, all of those that search the index on the same content of it.

    What was answered before another publisher changed it is answered again: else an arm would win by what its index held.
    """
    arms = settings.evaluate.arms
    for _ in range(MAX_CHANGES):
        before = _index_content(settings)
        runs = {arm: str(answer.answer(settings.with_values({"answer.arm": arm}))) for arm in arms}
        if sum(map(config.retrieves, arms)) < 2 or _index_content(settings) == before:
            return runs
        progress.say("evaluate: the index changed meanwhile; arms that searched it before are answered again")
    raise EvaluationError(
        f"{settings.workspace}: its index changed {MAX_CHANGES} times while arms were answered, which would compare them on "
        "different documents; run the command again when nothing is published"
    )


def _index_content(settings: config.Config) -> str:
    try:
        name = versions.current_version(settings.workspace)
    except artifacts.ArtifactError:  # the arms search other indexes, or none
        return ""
    return versions.read_version(settings.workspace, name).content_id


def held_out(settings: config.Config, arms: Sequence[config.Arm]) -> config.Config:
    """The config that asks only what no arm learnt from: where one is tuned on these queries, the test split and not all."""
    if settings.queries.split != "all" or not any(_learns_from_these(settings, arm) for arm in arms):
        return settings
    progress.say(
        "queries: an arm is tuned, so of queries.split=all only the test split is asked: it learnt from the rest"
    )
    return settings.with_values({"queries.split": "test"})


def _learns_from_these(settings: config.Config, arm: config.Arm) -> bool:
    """Whether an arm was tuned on queries of `queries.path`, or is to be."""
    if not config.is_tuned(arm):
        return False
    try:
        manifest = artifacts.read_manifest(arms.tuned_model(settings.workspace, arm))
    except weights.ModelError:
        return True
    learnt: str = _queries_of(manifest).get("path", settings.queries.path)
    return learnt == settings.queries.path


def _queries_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The queries of the config that a model was tuned with."""
    found: dict[str, Any] = manifest.get("config", {}).get("queries", {})
    return found


def check_tuned(settings: config.Config, arm: config.Arm) -> None:
    """Refuse a tuned arm that cannot be compared with others: trained on other splits, or from another generator.

    What a model's manifest has no record of is not checked, nor are splits of other queries; a line says so.

    Args:
        settings: workspace, queries and generator are used.
        arm: a tuned one.

    Raises:
        EvaluationError: it was trained on other splits than are asked now, or from another model than `generator.model`.
        models.ModelError: nothing was trained for it yet, or `generator.model` cannot be had.
    """
    model = arms.tuned_model(settings.workspace, arm)
    manifest = artifacts.read_manifest(model)
    again = f"tune CONFIG tune.mode={arm}" if config.is_mode(arm) else f"train CONFIG training.arm={arm}"
    learnt, asked = _queries_of(manifest), settings.queries.model_dump(mode="json")
    if learnt.get("path", asked["path"]) != asked["path"]:
        progress.say(f"{model}: learnt from {learnt['path']}: whether it saw these questions there is not known")
        learnt = asked  # other questions are split otherwise
    if missing := [field for field in SPLITTING if field not in learnt]:
        progress.say(
            f"{model}: has no record of queries.{missing[0]}: whether it learnt from these questions is not known"
        )
    for field in SPLITTING:
        if learnt.get(field, asked[field]) != asked[field]:
            raise EvaluationError(
                f"{model}: was trained with queries.{field}={learnt[field]}, and this config has {asked[field]}: what it learnt "
                f"may be among the questions it would be examined on; train it again (ragtune {again}), or compare with the "
                "same splits"
            )
    if settings.generator.engine != "transformers":  # what a server answers with has no fingerprint
        return
    now = weights.resolve(settings.generator.model)
    base, fingerprint = _base(arm, manifest, now)
    if fingerprint != now.fingerprint:
        raise EvaluationError(
            f"{model}: was trained from {base} ({fingerprint}), and generator.model={now.name} is another model "
            f"({now.fingerprint}): arms that start from different models say nothing of what training is worth; train it again "
            f"(ragtune {again}), or set generator.model back to what it was trained from"
        )


def _base(arm: config.Arm, manifest: Mapping[str, Any], now: weights.Model) -> tuple[str, str]:
    """Name and fingerprint of the generator that a tuned arm started from; those of now where nothing is recorded."""
    if not config.is_mode(arm):
        return manifest.get("base", "another model"), manifest.get("base_fingerprint", now.fingerprint)
    # A tune records by name what it started from, and one model may have two names: a path may be relative.
    name = manifest.get("start", {}).get("generator_model", now.name)
    if name == now.name:
        return name, now.fingerprint
    try:
        return name, weights.resolve(name).fingerprint
    except weights.ModelError:
        return name, "no longer at hand"


def require_index(settings: config.Config, arms: Sequence[config.Arm]) -> None:
    """Find out before anything is answered whether arms that retrieve have an index to search; a mode brings its own.

    Raises:
        storage.ArtifactError: there is none.
    """
    if any(config.retrieves(arm) and not config.is_mode(arm) for arm in arms):
        versions.current_version(settings.workspace)


def require_judged(settings: config.Config, judged: Sequence[schema.Query]) -> None:
    """Refuse questions of which none has gold answers.

    Raises:
        EvaluationError: there are none.
    """
    if not judged:
        raise EvaluationError(f"{settings.queries.path}: no query has `answers`, so no answer can be scored")


def scores_of(queries: Sequence[schema.Query], rows: Sequence[schema.Answer], settings: config.Config) -> Scores:
    """Per query, every metric of one arm's answers; answers to other queries are ignored."""
    per_query = scoring.score_answers(queries, rows, settings.evaluate.language)
    for query_id, values in scoring.score_abstention(queries, rows).items():
        per_query[query_id].update(values)
    return per_query


def read_answers(run: str) -> list[schema.Answer]:
    """The rows of a run of `answer`, checked against its manifest."""
    path = artifacts.open_artifact(run, "answer").path
    return list(schema.from_table(pq.read_table(path / "answers.parquet"), schema.Answer))


def _score_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = sorted({name for row in rows for name in row if name != "query_id"})
    columns = pa.schema([pa.field("query_id", pa.string()), *(pa.field(name, pa.float64()) for name in names)])
    return pa.Table.from_pylist(rows, schema=columns)


def _differences(
    scores: Mapping[config.Arm, Scores], settings: config.Config
) -> dict[str, dict[str, dict[str, float]]]:
    """Each arm less the first: metric -> {value, low, high, n}, over the queries that both have."""
    (first, baseline), *others = scores.items()
    differences: dict[str, dict[str, dict[str, float]]] = {}
    for arm, per_query in others:
        shared = sorted({name for values in per_query.values() for name in values})
        for name in shared:
            ids = [query for query, values in per_query.items() if name in values and name in baseline[query]]
            if not ids:
                continue
            a = np.array([baseline[query][name] for query in ids])
            b = np.array([per_query[query][name] for query in ids])
            interval = intervals.paired_bootstrap(
                a, b, settings.evaluate.resamples, settings.evaluate.confidence, settings.seed
            )
            differences.setdefault(f"{arm} - {first}", {})[name] = dataclasses.asdict(interval)
    return differences
