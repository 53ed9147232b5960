"""Answers the same questions in several arms, scores the answers and compares the arms.

Out: for each arm `ARM/metrics.json` (metric -> {value, low, high, n}) and `ARM/scores.parquet` (one row per query); and
`differences.json`, each arm minus the first, with paired intervals over the same queries. The answers stay in the runs of
`answer`: nothing is answered twice.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, retrieve
from ragtune_ray.evaluation import intervals, scoring
from ragtune_ray.index import versions
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts
from ragtune_ray.storage.results import Result

SPLITTING = ("split_by", "split_shares", "split_seed")
"""Fields of `queries` that decide which split a query belongs to."""

Scores = dict[str, dict[str, float]]
"""Query id -> metric -> value."""
MAX_CHANGES = 3
"""How many changes of the index during an evaluation are tolerated."""


class EvaluationError(RagtuneError, ValueError):
    """The arms cannot be scored or compared; the message says what to change."""


@dataclass(frozen=True)
class Evaluation(Result):
    """A run of `evaluate`; `to_arrow()` has one row per arm (or difference of two arms) and metric: value, low, high, n."""

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Arm -> metric -> {value, low, high, n}."""
        path = artifacts.open_artifact(self.path, "evaluate").path
        evaluated = self.manifest["runs"]
        return {arm: json.loads((path / arm / "metrics.json").read_text(encoding="utf-8")) for arm in evaluated}

    @property
    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """Such as "rag - base" -> metric -> {value, low, high, n}, paired over the same queries."""
        path = artifacts.open_artifact(self.path, "evaluate").path / "differences.json"
        found: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def to_arrow(self) -> pa.Table:
        """Columns arm, metric, value, low, high, n; a difference such as "rag - base" is a row like an arm."""
        rows = [
            {"arm": arm, "metric": metric, **interval}
            for arm, intervals_of in (self.metrics | self.differences).items()
            for metric, interval in intervals_of.items()
        ]
        return pa.Table.from_pylist(rows)


def evaluate(settings: config.Config) -> Evaluation:
    """Answer the queries in each arm of `evaluate.arms`, score the answers and compare the arms.

    Args:
        settings: if an arm is tuned, `queries.split=all` means the test split.

    Raises:
        EvaluationError: no query has gold answers, or `check_tuned` refuses an arm.
        ModelError: no model was trained yet for a tuned arm.
        AnswerError: too many rows of an arm failed.
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
        answered = _answered(settings)
    identity = {
        "runs": {arm: artifacts.read_manifest(run)["manifest_sha256"] for arm, run in answered.items()},
        "evaluate": settings.evaluate.model_dump(mode="json"),
        "seed": settings.seed,
    }
    run = runs.Run.of(settings, "evaluate", identity, started=started)
    if not run.is_finished():
        _publish(run, judged, staged, answered)
    return Evaluation(run.url)


def _publish(
    run: runs.Run, judged: Sequence[schema.Query], staged: staged_queries.StagedQueries, answered: dict[config.Arm, str]
) -> None:
    settings, options = run.settings, run.settings.evaluate
    scores = {arm: scores_of(judged, read_answers(url), settings) for arm, url in answered.items()}
    staging = artifacts.stage(run.url)
    for arm, per_query in scores.items():
        (staging / arm).mkdir()
        summary = intervals.summarize(per_query, options.resamples, options.confidence, settings.seed)
        (staging / arm / "metrics.json").write_text(retrieve.metrics_json(summary), encoding="utf-8")
        rows = [{"query_id": query_id, **values} for query_id, values in per_query.items()]
        pq.write_table(_score_table(rows), staging / arm / "scores.parquet", write_page_checksum=True)
    differences = _differences(scores, settings)
    (staging / "differences.json").write_text(json.dumps(differences, indent=1) + "\n", encoding="utf-8")
    counts = {"fingerprint": staged.fingerprint, "num_queries": staged.num_queries, "num_judged": len(judged)}
    run.publish(staging, {"runs": answered, "input": counts})


def _answered(settings: config.Config) -> dict[config.Arm, str]:
    """Each arm's run of `answer`; all arms that retrieve search the same content of the index.

    If another process changes the index meanwhile, arms that searched the old content are answered again. Otherwise an arm
    could win because its index held other documents.
    """
    evaluated = settings.evaluate.arms
    for _ in range(MAX_CHANGES):
        before = _index_content(settings)
        answered = {arm: str(answer.answer(settings.with_values({"answer.arm": arm}))) for arm in evaluated}
        if sum(map(config.retrieves, evaluated)) < 2 or _index_content(settings) == before:
            return answered
        progress.say("evaluate: the index changed meanwhile; arms that searched the old content are answered again")
    raise EvaluationError(
        f"{settings.workspace}: its index changed {MAX_CHANGES} times during the evaluation, so the arms would be compared on "
        "different documents; run the command again when no other process changes the index"
    )


def _index_content(settings: config.Config) -> str:
    try:
        name = versions.current_version(settings.workspace)
    except artifacts.ArtifactError:  # no arm searches this index
        return ""
    return versions.read_version(settings.workspace, name).content_id


def held_out(settings: config.Config, compared: Sequence[config.Arm]) -> config.Config:
    """The config restricted to queries that no arm was trained on: the test split if an arm is tuned on these queries."""
    if settings.queries.split != "all" or not any(_learns_from_these(settings, arm) for arm in compared):
        return settings
    progress.say(
        "queries: an arm was tuned on the other splits, so only the test split is asked instead of queries.split=all"
    )
    return settings.with_values({"queries.split": "test"})


def _learns_from_these(settings: config.Config, arm: config.Arm) -> bool:
    """Whether an arm was or will be tuned on queries of `queries.path`."""
    if not config.is_tuned(arm):
        return False
    try:
        manifest = artifacts.read_manifest(arms.tuned_model(settings.workspace, arm))
    except weights.ModelError:
        return True
    learnt: str = _queries_of(manifest).get("path", settings.queries.path)
    return learnt == settings.queries.path


def _queries_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Section `queries` of the config that a model was tuned with."""
    found: dict[str, Any] = manifest.get("config", {}).get("queries", {})
    return found


def check_tuned(settings: config.Config, arm: config.Arm) -> None:
    """Refuse a tuned arm that cannot be compared with others: trained on other splits, or from another generator.

    Splits of other queries, and facts that the model's manifest does not record, are not checked; a progress line says so.

    Args:
        settings: uses workspace, queries and generator.
        arm: a tuned arm.

    Raises:
        EvaluationError: the model was trained on other splits, or from another model than `generator.model`.
        ModelError: no model was trained yet for the arm, or `generator.model` cannot be found.
    """
    model = arms.tuned_model(settings.workspace, arm)
    manifest = artifacts.read_manifest(model)
    again = f"tune CONFIG tune.mode={arm}" if config.is_mode(arm) else f"train CONFIG training.arm={arm}"
    learnt, asked = _queries_of(manifest), settings.queries.model_dump(mode="json")
    if learnt.get("path", asked["path"]) != asked["path"]:
        progress.say(f"{model}: was trained on {learnt['path']}; whether that file contains these questions is unknown")
        learnt = asked  # the splits of other questions do not matter
    if missing := [field for field in SPLITTING if field not in learnt]:
        progress.say(
            f"{model}: has no record of queries.{missing[0]}; whether it was trained on these questions is unknown"
        )
    for field in SPLITTING:
        if learnt.get(field, asked[field]) != asked[field]:
            raise EvaluationError(
                f"{model}: was trained with queries.{field}={learnt[field]}, but this config has {asked[field]}: some of these "
                f"questions may have been training data; train it again (ragtune {again}), or set queries.{field} back"
            )
    if settings.generator.engine != "transformers":  # the model behind a server has no fingerprint
        return
    now = weights.resolve(settings.generator.model)
    base, fingerprint = _base(arm, manifest, now)
    if fingerprint != now.fingerprint:
        raise EvaluationError(
            f"{model}: was trained from {base} ({fingerprint}), but generator.model={now.name} is another model "
            f"({now.fingerprint}): arms with different base models do not show what training is worth; train it again "
            f"(ragtune {again}), or set generator.model back"
        )


def _base(arm: config.Arm, manifest: Mapping[str, Any], now: weights.Model) -> tuple[str, str]:
    """Name and fingerprint of the generator that a tuned arm started from; the current ones if nothing is recorded."""
    if not config.is_mode(arm):
        return manifest.get("base", "another model"), manifest.get("base_fingerprint", now.fingerprint)
    # A tune records only the name of its start, and one model can have two names, such as a relative and an absolute path.
    name = manifest.get("start", {}).get("generator_model", now.name)
    if name == now.name:
        return name, now.fingerprint
    try:
        return name, weights.resolve(name).fingerprint
    except weights.ModelError:
        return name, "no longer at hand"


def require_index(settings: config.Config, compared: Sequence[config.Arm]) -> None:
    """Check, before anything is answered, that arms that retrieve have an index to search; a mode has its own.

    Raises:
        ArtifactError: there is none.
    """
    if any(config.retrieves(arm) and not config.is_mode(arm) for arm in compared):
        versions.current_version(settings.workspace)


def require_judged(settings: config.Config, judged: Sequence[schema.Query]) -> None:
    """Check that at least one question has gold answers.

    Raises:
        EvaluationError: there are none.
    """
    if not judged:
        raise EvaluationError(f"{settings.queries.path}: no query has `answers`, so no answer can be scored")


def scores_of(queries: Sequence[schema.Query], rows: Sequence[schema.Answer], settings: config.Config) -> Scores:
    """Every metric of one arm's answers, per query; answers to other queries are ignored."""
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
    """Each arm minus the first: metric -> {value, low, high, n}, over the queries that both answered."""
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
