"""`ragtune evaluate`: answers the same questions in several arms, scores the answers and compares the arms.

Out: per arm `ARM/metrics.json` (metric -> {value, low, high, n}) and `ARM/scores.parquet` (one row per query); and
`differences.json`: each arm minus the first, with intervals paired over the same queries. The answers stay in runs of `answer`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, retrieve
from ragtune_ray.cluster.grading import grade
from ragtune_ray.evaluation import intervals, scoring
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.index import versions
from ragtune_ray.ingest import splits
from ragtune_ray.models import arms, weights
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.storage.results import Result

SPLITTING = ("split_by", "split_shares", "split_seed", "split_record")
"""Fields of `queries` that decide which split a query belongs to."""

Scores = dict[str, dict[str, float]]
"""Query id -> metric -> value."""
NEWER_METRICS = ("ROUGE_L", "numeric_match")
"""Metrics that scores of older versions lack. Where one decides a comparison, the answers are scored again."""
MAX_CHANGES = 3
"""Number of changes of the index during an evaluation after which it fails."""


class EvaluationError(RagtuneError, ValueError):
    """The arms cannot be scored or compared with these settings."""


@dataclass(frozen=True)
class Evaluation(Result):
    """A finished run of `evaluate`."""

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Arm -> metric -> {value, low, high, n}."""
        path = artifacts.open_artifact(self.path, "evaluate").path
        evaluated = self.manifest["runs"]
        return {arm: json.loads((path / arm / "metrics.json").read_text(encoding="utf-8")) for arm in evaluated}

    @property
    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """Difference of two arms, such as "rag - base" -> metric -> {value, low, high, n}."""
        path = artifacts.open_artifact(self.path, "evaluate").path / "differences.json"
        found: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def to_arrow(self) -> pa.Table:
        """One row per arm, or difference of arms ("rag - base"), and metric: arm, metric, value, low, high, n."""
        rows = [
            {"arm": arm, "metric": metric, **interval}
            for arm, intervals_of in (self.metrics | self.differences).items()
            for metric, interval in intervals_of.items()
        ]
        return pa.Table.from_pylist(rows)


def evaluate(
    settings: config.Config,
    known: Mapping[config.Arm, str] | None = None,
    begin: Callable[[config.Arm], None] = lambda _: None,
) -> Evaluation:
    """Answer the queries in each arm of `evaluate.arms`, score the answers and compare the arms.

    If an arm is tuned or uses a model trained on these queries, `queries.split=all` means the test split. `known` has
    finished runs of arms over the first of these queries, which are not answered again. `begin` is called before an arm answers.

    Raises:
        EvaluationError: no query can be scored, or `check_tuned` or `check_used_models` refuses a model.
        ModelError: no model was trained yet for a tuned arm.
        GradingError: a metric of `evaluate.metrics` needs a model that is not named, or too many grades failed.
        AnswerError: too many rows of an arm failed.
        ChangedError: the queries changed after they were answered.
    """
    started = time.monotonic()
    settings = held_out(settings, settings.evaluate.arms)
    for arm in filter(config.is_tuned, settings.evaluate.arms):
        check_tuned(settings, arm)
    check_used_models(settings, settings.evaluate.arms)
    graders.require_models(settings)
    require_judged(settings, staged_queries.judged_queries(settings))
    require_index(settings, settings.evaluate.arms)
    with session.ray_session(settings.cluster):
        answered = _answered(settings, known or {}, begin)
    identity = {
        "runs": {arm: artifacts.read_manifest(run)["manifest_sha256"] for arm, run in answered.items()},
        "evaluate": settings.evaluate.identity(),
        **graders.identities(settings),
        "seed": settings.seed,
    }
    if settings.compare.metric in NEWER_METRICS:
        identity["metric"] = settings.compare.metric
    run = runs.Run.of(settings, "evaluate", identity, started=started)
    if not run.is_finished():
        with staged_queries.staged_queries(settings) as staged:
            for url in answered.values():
                staged_queries.require_same(settings, staged, runs.read_manifest(url)["input"]["fingerprint"])
            queries = staged_queries.read_queries(staged.url, 0, staged.num_queries)
        judged = [query for query in queries if settings.evaluate.can_score(query.answers)]
        graded = grade.grade(settings, judged, answered)
        if failed := graded.failed():
            # Another run, so that the next command does not find this one finished, and asks for the failed grades again.
            run = runs.Run.of(settings, "evaluate", {**identity, "failed": failed}, started=started)
        if not failed or not run.is_finished():
            _publish(run, judged, staged, answered, graded)
    return Evaluation(run.url)


def _publish(
    run: runs.Run,
    judged: Sequence[schema.Query],
    staged: staged_queries.StagedQueries,
    answered: dict[config.Arm, str],
    graded: grade.Graded,
) -> None:
    settings, options = run.settings, run.settings.evaluate
    scores = {arm: _with_grades(judged, url, settings, graded.values[arm]) for arm, url in answered.items()}
    for line in scoring.language_warnings(
        judged, {arm: read_answers(url) for arm, url in answered.items()}, options.language
    ):
        progress.say(f"evaluate: {line}")
    staging = artifacts.stage(run.url)
    for arm, per_query in scores.items():
        (staging / arm).mkdir()
        summary = intervals.summarize(per_query, options.resamples, options.confidence, settings.seed)
        (staging / arm / "metrics.json").write_text(retrieve.metrics_json(summary), encoding="utf-8")
        pq.write_table(
            _score_table(per_query, graded.columns[arm]), staging / arm / "scores.parquet", write_page_checksum=True
        )
    differences = _differences(scores, settings)
    (staging / "differences.json").write_text(json.dumps(differences, indent=1) + "\n", encoding="utf-8")
    counts = {"fingerprint": staged.fingerprint, "num_queries": staged.num_queries, "num_judged": len(judged)}
    facts: runs.RunFacts = {"runs": answered, "input": counts}
    run.publish(staging, {**facts, "grading": graded.facts} if graded.facts else facts)


def _answered(
    settings: config.Config, known: Mapping[config.Arm, str], begin: Callable[[config.Arm], None]
) -> dict[config.Arm, str]:
    """Each arm's run of `answer`, all from the same content of the index.

    If another process changes the index meanwhile, the arms that searched the old content answer again. Otherwise an arm could
    win because its index contained other documents.
    """
    evaluated = settings.evaluate.arms
    for _ in range(MAX_CHANGES):
        before = _index_content(settings)
        answered = {}
        for arm in evaluated:
            begin(arm)
            answered[arm] = str(answer.answer(settings.with_values({"answer.arm": arm}), known.get(arm, "")))
        if sum(map(config.retrieves, evaluated)) < 2 or _index_content(settings) == before:
            return answered
        progress.say("evaluate: the index changed meanwhile; arms that searched the old content answer again")
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
    """The config restricted to the test split if an arm, or a model that it uses, is tuned on other splits of these queries.

    Raises:
        EvaluationError: `queries.split` is `train`, and an arm or a model learned from these questions.
    """
    split = settings.queries.split
    if split == "test":
        return settings
    used = (role for role, _, manifest in _trained_models(settings, compared) if _is_from_these(settings, manifest))
    learned = "an arm" if any(_learns_from_these(settings, arm) for arm in compared) else next(used, "")
    if not learned:
        return settings
    if split == "train":
        raise EvaluationError(
            f"queries.split=train: {learned} is tuned on these questions, so its scores would say nothing; set queries.split=test"
        )
    if split == "validation":
        progress.say(
            f"queries: {learned} is tuned with these questions in view (the best step is chosen by them), so its scores are "
            "somewhat too high; set queries.split=test"
        )
        return settings
    progress.say(
        f"queries: {learned} was tuned on the other splits, so only the test split is used, despite queries.split=all"
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
    return _is_from_these(settings, manifest)


def _trained_models(
    settings: config.Config, compared: Sequence[config.Arm]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Role, directory and manifest of each model that the config names, an arm uses, and ragtune trained."""
    for role, name in _used_models(settings, compared):
        url = artifacts.current(name) or name if name else ""
        if url and artifacts.is_finished(url):
            manifest = artifacts.read_manifest(url)
            if "source" not in manifest:  # an embedded model, unpacked from its wheel
                yield role, url, manifest


def _used_models(settings: config.Config, compared: Sequence[config.Arm]) -> Iterator[tuple[str, str]]:
    """Role and name of each model that the config names and an arm uses; a mode has its own pair."""
    if any(map(config.retrieves, compared)):
        yield "the reranker", settings.retrieval.reranker
    if any(config.retrieves(arm) and not config.is_mode(arm) for arm in compared):
        yield "the encoder", settings.encoder.model
        yield "the encoder of queries", settings.encoder.query_model
    hosted = [name for arm in compared if (name := config.hosted_name(arm))]
    generators = [(settings.generator.engine, settings.generator.model)] if len(hosted) < len(compared) else []
    generators += [(settings.compare.hosted[name].engine, settings.compare.hosted[name].model) for name in hosted]
    for engine, model in generators:
        if engine != "openai":
            yield "the generator", model


def _is_from_these(settings: config.Config, manifest: Mapping[str, Any]) -> bool:
    """Whether a model was trained on queries of `queries.path`; also if its manifest does not say."""
    return _is_same_file(_queries_of(manifest).get("path", settings.queries.path), settings.queries.path)


def _is_same_file(one: str, other: str) -> bool:
    return filesystem.absolute(one) == filesystem.absolute(other)


def _queries_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The section `queries` of the config with which a model was tuned."""
    found: dict[str, Any] = manifest.get("config", {}).get("queries", {})
    return found


def check_tuned(settings: config.Config, arm: config.Arm) -> None:
    """Refuse a tuned arm that cannot be compared with others: trained on other splits, or from another generator.

    If the model was trained on other queries, or its manifest lacks facts, a progress line warns instead.

    Raises:
        EvaluationError: the model was trained on other splits, or from another model than `generator.model`.
        ModelError: no model was trained yet for the arm, or `generator.model` cannot be found.
    """
    model = arms.tuned_model(settings.workspace, arm)
    manifest = artifacts.read_manifest(model)
    command = f"tune CONFIG tune.mode={arm}" if config.is_mode(arm) else f"train CONFIG training.arm={arm}"
    _refuse_other_splits(settings, model, manifest, command)
    if settings.generator.engine == "openai":  # the model behind a server has no fingerprint
        return
    now = weights.resolve(settings.generator.model)
    base, fingerprint = _base(arm, manifest, now)
    if fingerprint != now.fingerprint:
        raise EvaluationError(
            f"{model}: was trained from {base} ({fingerprint}), but generator.model={now.name} is another model "
            f"({now.fingerprint}): arms with different base models do not show what training is worth; train it again "
            f"(ragtune {command}), or set generator.model back"
        )


def check_used_models(settings: config.Config, compared: Sequence[config.Arm]) -> None:
    """Refuse a model that the config names and an arm uses, where it was trained on other splits of these queries.

    As in `check_tuned`, a progress line warns of a model that was trained on other queries.

    Raises:
        EvaluationError: it was trained on other splits.
    """
    for role, url, manifest in _trained_models(settings, compared):
        objective = manifest.get("objective") or ("reranker" if role == "the reranker" else "contrastive")
        _refuse_other_splits(settings, url, manifest, f"train CONFIG training.objective={objective}")


def _refuse_other_splits(settings: config.Config, model: str, manifest: Mapping[str, Any], command: str) -> None:
    """Refuse a model if training questions of it may be among those that are asked."""
    trained, current = _queries_of(manifest), settings.queries.model_dump(mode="json")
    if not _is_same_file(trained.get("path", current["path"]), current["path"]):
        progress.say(
            f"{model}: was trained on {trained['path']}; whether that file contains these questions is unknown"
        )
        return  # the splits of other questions do not matter
    if trained:  # manifests from before the setting existed
        trained = {"split_record": "", **trained}
    if missing := [field for field in SPLITTING if field not in trained]:
        progress.say(
            f"{model}: has no record of queries.{missing[0]}; whether it was trained on these questions is unknown"
        )
    for field in SPLITTING:
        if trained.get(field, current[field]) != current[field]:
            raise EvaluationError(
                f"{model}: was trained with queries.{field}={trained[field]}, but this config has {current[field]}: some of "
                f"these questions may have been training data; train it again (ragtune {command}), or set queries.{field} back"
            )
    _refuse_another_draw(settings, model, manifest, command)


def _refuse_another_draw(settings: config.Config, model: str, manifest: Mapping[str, Any], command: str) -> None:
    """Refuse a model whose training questions were drawn in a record of splits that is gone or was drawn again."""
    drawn = manifest.get("split_record_id", "")
    now = splits.record_id(settings.queries)
    if drawn and now and drawn != now:
        raise EvaluationError(
            f"{model}: was trained on splits that were drawn before those in {settings.queries.split_record}, so some of these "
            f"questions may have been training data; restore that file, or train the model again (ragtune {command})"
        )


def _base(arm: config.Arm, manifest: Mapping[str, Any], now: weights.Model) -> tuple[str, str]:
    """Name and fingerprint of the generator from which a tuned arm was trained; by default those of `now`."""
    if not config.is_mode(arm):
        return manifest.get("base", "another model"), manifest.get("base_fingerprint", now.fingerprint)
    # A tune records only the name of its first model, and a model can have two names: a relative and an absolute path.
    name = manifest.get("start", {}).get("generator_model", now.name)
    if name == now.name:
        return name, now.fingerprint
    try:
        return name, weights.resolve(name).fingerprint
    except weights.ModelError:
        return name, "no longer available"


def require_index(settings: config.Config, compared: Sequence[config.Arm]) -> None:
    """Raise ArtifactError if an arm needs the workspace's index and there is none; modes have their own index."""
    if any(config.retrieves(arm) and not config.is_mode(arm) for arm in compared):
        versions.current_version(settings.workspace)


def require_judged(settings: config.Config, judged: Sequence[schema.Query]) -> None:
    """Raise EvaluationError if no question can be scored."""
    if not judged:
        raise EvaluationError(
            f"{settings.queries.path}: no query has `answers`, so no answer can be scored; add gold answers, or set "
            "compare.metric (for evaluate: evaluate.metrics) to judge or groundedness, which need none"
        )


def compared(settings: config.Config, judged: Sequence[schema.Query]) -> list[schema.Query]:
    """The queries for which `compare.metric` is defined.

    Raises:
        EvaluationError: it is defined for none.
    """
    metric = settings.compare.metric
    found = [query for query in judged if scoring.is_defined(metric, query, settings.evaluate)]
    if metric == "judge" and not any(map(config.retrieves, settings.compare.arms)):
        found = [query for query in found if query.answers is not None]
        if not found:
            raise EvaluationError(
                f"{settings.queries.path}: no query has gold answers, and no arm of compare.arms retrieves passages against "
                "which the judge could check an answer; add gold answers, or an arm that retrieves"
            )
    if not found:
        kind = "that are numbers " if metric == "numeric_match" else ""
        raise EvaluationError(
            f"{settings.queries.path}: no query has gold answers {kind}for {metric}, so no arm can be recommended; add some, or "
            "set another compare.metric: judge and groundedness need none"
        )
    return found


def scores_of(queries: Sequence[schema.Query], run: str, settings: config.Config) -> Scores:
    """Every metric of the answers of one run of `answer` to these queries; those of `evaluate.metrics` are graded."""
    (found,) = scores_of_runs(queries, [run], settings)
    return found


def scores_of_runs(queries: Sequence[schema.Query], answered: Sequence[str], settings: config.Config) -> list[Scores]:
    """As `scores_of`, for several runs that are graded together.

    Answers without passages are checked against those of another run, and a failed grade leaves its question out in all.
    """
    named = {str(place): run for place, run in enumerate(answered)}
    graded = grade.grade(settings, queries, named)
    return [_with_grades(queries, run, settings, graded.values[name]) for name, run in named.items()]


def _with_grades(queries: Sequence[schema.Query], run: str, settings: config.Config, grades: Scores) -> Scores:
    rows = read_answers(run)
    per_query = scoring.score_answers(queries, rows, settings.evaluate)
    for found in (scoring.score_abstention(queries, rows), grades):
        for query_id, values in found.items():
            per_query[query_id].update(values)
    return per_query


def read_scores(run: str, arm: config.Arm) -> Scores:
    """The scores of an arm in a finished run of `evaluate`; a metric that is undefined for a query is left out."""
    path = artifacts.open_artifact(run, "evaluate").path / arm / "scores.parquet"
    table = pq.read_table(path)
    numbers = [name for name in table.column_names if table.schema.field(name).type == pa.float64()]
    return {
        row.pop("query_id"): {name: value for name, value in row.items() if value is not None}
        for row in table.select(["query_id", *numbers]).to_pylist()
    }


def read_answers(run: str) -> list[schema.Answer]:
    """The answers of a finished run of `answer`."""
    path = artifacts.open_artifact(run, "answer").path
    return list(schema.from_table(pq.read_table(path / "answers.parquet"), schema.Answer))


def _score_table(scores: Scores, texts: Mapping[str, Mapping[str, str]]) -> pa.Table:
    """One row per query: its scores, and what the graders say."""
    names = sorted({name for values in scores.values() for name in values})
    said = sorted({name for values in texts.values() for name in values})
    columns = [pa.field("query_id", pa.string()), *(pa.field(name, pa.float64()) for name in names)]
    rows = [{"query_id": name, **values, **texts[name]} for name, values in scores.items()]
    return pa.Table.from_pylist(rows, schema=pa.schema([*columns, *(pa.field(name, pa.string()) for name in said)]))


def _differences(
    scores: Mapping[config.Arm, Scores], settings: config.Config
) -> dict[str, dict[str, dict[str, float]]]:
    """Each arm minus the first: metric -> {value, low, high, n}, over the queries that both answered."""
    (first, baseline), *others = scores.items()
    differences: dict[str, dict[str, dict[str, float]]] = {}
    for arm, per_query in others:
        for name in sorted({name for values in per_query.values() for name in values}):
            ids = [query for query, values in per_query.items() if name in values and name in baseline[query]]
            if not ids:
                continue
            a = np.array([baseline[query][name] for query in ids])
            b = np.array([per_query[query][name] for query in ids])
            rule = settings.evaluate
            interval = intervals.paired_bootstrap(a, b, rule.resamples, rule.confidence, settings.seed)
            differences.setdefault(f"{arm} - {first}", {})[name] = dataclasses.asdict(interval)
    return differences
