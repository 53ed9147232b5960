"""Ray Data: queries -> hits -> answers, in bulk.

In: a config that names queries, an index and a generator. Out: a run directory: `hits.parquet`, `run.trec` and, when the
queries have qrels, `metrics.json` from `retrieve`; `answers.parquet` from `answer`. A row that cannot be retrieved or answered
becomes a row with a status, never a dead job; a killed worker or driver costs only the units under way.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, intervals, models, progress, schema, segments, storage
from ragtune_ray.cluster import questions, session, stages
from ragtune_ray.cluster.generating import GenerateUnit, RetrieveUnit

if TYPE_CHECKING:
    import ray.data

__all__ = ["AnswerError", "answer", "retrieve"]

RUN_FORMAT = 1
"""Part of a run's identity: raise it when the same input would give other rows."""
RETRIEVE_UNIT_QUERIES = 512


class AnswerError(RuntimeError):
    """A bulk job ended without a usable result; the message says what failed and what the next run will do."""


def retrieve(settings: config.Config) -> Path | str:
    """Find the hits of every query.

    Args:
        settings: workspace, queries, encoder, retrieval, evaluate and cluster are used.

    Returns:
        The run's directory.

    Raises:
        storage.ArtifactError: there is no sound index.
        inputs.InputError: the queries cannot be read.
        stages.StageError: the stage failed.
    """
    version, opened = _index_version(settings)
    staged = questions.stage_queries(settings)
    identity = {
        **_common(settings, staged, opened),
        "retrieval": settings.retrieval.model_dump(mode="json"),
        "evaluate": {"depth": settings.evaluate.depth, "cutoffs": settings.evaluate.cutoffs},
    }
    url, work = _places(settings, f"retrieve-{storage.digest(identity)}")
    if _already(url, "retrieve"):
        return url
    started = time.monotonic()
    depth = max(settings.retrieval.top_k, settings.evaluate.depth)
    with session.ray_session(settings.cluster):
        directory = storage.join(work, "hits")
        units = questions.units(staged, RETRIEVE_UNIT_QUERIES)
        arguments = {
            "settings": settings,
            "version": version,
            "queries": staged.url,
            "depth": depth,
            "directory": directory,
        }
        count = min(len(units), session.workers(settings.cluster.encoder_workers, settings.cluster.gpus_per_worker))
        summaries = stages.run_stage(
            "retrieve",
            directory,
            units,
            lambda dataset: _pool(dataset, RetrieveUnit, count, arguments, session.worker_options(settings.cluster)),
            counted="queries",
            rows_of=lambda unit: int(unit["stop"] - unit["start"]),
        )
    facts = {**_facts(settings, version, staged, started), "queries_per_second": _rate(staged, summaries)}
    _publish_hits(settings, url, directory, summaries, staged, facts)
    storage.remove(work)
    return url


def answer(settings: config.Config) -> Path | str:
    """Answer every query in the arm of `answer.arm`.

    Args:
        settings: workspace, seed, queries, encoder, retrieval, prompt, generator, answer and cluster are used.

    Returns:
        The run's directory.

    Raises:
        AnswerError: more than `answer.max_failed_share` of the rows failed.
        storage.ArtifactError: arm rag, and there is no sound index.
        inputs.InputError: the queries cannot be read.
        stages.StageError: the stage failed.
    """
    arm = settings.answer.arm
    version, opened = _index_version(settings) if arm == "rag" else ("", {})
    staged = questions.stage_queries(settings)
    generator = generator_fingerprint(settings.generator)
    identity = {
        **_common(settings, staged, opened),
        "arm": arm,
        "retrieval": settings.retrieval.model_dump(mode="json") if arm == "rag" else None,
        "prompt": settings.prompt.model_dump(mode="json"),
        "generator": settings.generator.model_dump(
            mode="json", include={"engine", "precision", "max_new_tokens", "temperature", "stop", "batch_tokens"}
        ),
        "model": generator,
        "unit_queries": settings.answer.unit_queries,
        "seed": settings.seed,
    }
    url, work = _places(settings, f"answer-{arm}-{storage.digest(identity)}")
    if _already(url, f"answer ({arm})"):
        return url
    started = time.monotonic()
    directory = storage.join(work, "answers")
    with session.ray_session(settings.cluster):
        units = questions.units(staged, settings.answer.unit_queries)
        summaries = stages.run_stage(
            f"answer ({arm})",
            directory,
            units,
            lambda dataset: _answering(dataset, settings, version, staged.url, directory, generator, len(units)),
            counted="queries",
            rows_of=lambda unit: int(unit["stop"] - unit["start"]),
        )
    _refuse_failures(settings, directory, summaries, staged.num_queries)
    facts = {**_facts(settings, version, staged, started), "queries_per_second": _rate(staged, summaries)}
    _publish_answers(url, directory, summaries, staged, {**facts, "arm": arm, "model": generator})
    storage.remove(work)
    return url


def generator_fingerprint(settings: config.Generator) -> str:
    """What identifies the generator: its files, or the server and its name for the model."""
    match settings.engine:
        case "transformers":
            return models.resolve(settings.model).fingerprint
        case "openai":
            return f"{settings.base_url}#{settings.model}"


def _index_version(settings: config.Config) -> tuple[str, dict[str, Any]]:
    """The version that the whole job uses, and its manifest."""
    version = segments.current_version(settings.workspace)
    return version, storage.read_manifest(segments.version_url(settings.workspace, version))


def _common(settings: config.Config, staged: questions.StagedQueries, opened: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": RUN_FORMAT,
        "queries": staged.fingerprint,
        "index": opened.get("build_id"),
        "encoder": settings.encoder.model_dump(mode="json", exclude={"model"}) if opened else None,
    }


def _places(settings: config.Config, name: str) -> tuple[str, str]:
    """Where the finished run stands, and where it is worked on."""
    return (
        storage.join(settings.workspace, "runs", name),
        storage.join(settings.workspace, "runs", ".work", name),
    )


def _already(url: str, verb: str) -> bool:
    finished = storage.is_finished(url)
    if finished:
        progress.say(f"{verb}: this run is already finished; nothing to do")
    return finished


def _facts(settings: config.Config, version: str, staged: questions.StagedQueries, started: float) -> dict[str, Any]:
    return {
        "config": settings.model_dump(mode="json"),
        "index_version": version,
        "input": {"fingerprint": staged.fingerprint, "num_queries": staged.num_queries},
        "seconds": {"total": round(time.monotonic() - started, 3)},
    }


def _rate(staged: questions.StagedQueries, summaries: Sequence[dict[str, Any]]) -> float:
    """Queries per second from the first unit's start to the last one's end; the gaps between resumed runs count too."""
    span = max(summary["ended"] for summary in summaries) - min(summary["started"] for summary in summaries)
    return round(staged.num_queries / max(span, 1e-9), 3)


def _pool(
    dataset: ray.data.Dataset, worker: type, count: int, arguments: dict[str, Any], options: dict[str, Any]
) -> ray.data.Dataset:
    """Run a unit's worker class in an autoscaling pool of at most `count` actors."""
    import ray.data

    compute = ray.data.ActorPoolStrategy(
        min_size=1, max_size=max(1, count), initial_size=max(1, count), max_tasks_in_flight_per_actor=1
    )
    return dataset.map_batches(worker, batch_size=1, compute=compute, fn_constructor_kwargs=arguments, **options)


def _answering(
    dataset: ray.data.Dataset,
    settings: config.Config,
    version: str,
    queries: str,
    directory: str,
    generator: str,
    num_units: int,
) -> ray.data.Dataset:
    """Queries -> (hits with their passages) -> answers, streaming: the generators never wait for all of retrieval."""
    if settings.answer.arm == "rag":
        arguments = {"settings": settings, "version": version, "queries": queries, "depth": settings.retrieval.top_k}
        # Generating takes a hundred times as long as retrieving: the one retriever must not cost a generator its core.
        dataset = _pool(dataset, RetrieveUnit, 1, arguments, {"num_cpus": 0})
    count = session.workers(settings.cluster.generator_workers, settings.cluster.gpus_per_worker)
    arguments = {
        "settings": settings,
        "version": version,
        "queries": queries,
        "directory": directory,
        "fingerprint": generator,
    }
    options = session.worker_options(settings.cluster)
    return _pool(dataset, GenerateUnit, min(num_units, count), arguments, options)


def _merged(directory: str, summaries: Iterable[dict[str, Any]], suffix: str) -> Iterable[pa.Table]:
    """The parts of a stage, one after another, in the order of the queries."""
    for summary in summaries:
        name = Path(stages.unit_file(directory, summary["unit"], suffix)).name
        yield pq.read_table(storage.local_copy(directory, [name], storage.digest(directory)) / name)


def _publish_hits(
    settings: config.Config,
    url: str,
    directory: str,
    summaries: list[dict[str, Any]],
    staged: questions.StagedQueries,
    facts: dict[str, Any],
) -> None:
    staging = storage.stage(url)
    num_hits = 0
    hit_schema = schema.arrow_schema(schema.Hit)
    with (
        pq.ParquetWriter(staging / "hits.parquet", hit_schema, write_page_checksum=True) as writer,
        (staging / "run.trec").open("w", encoding="utf-8") as run,
    ):
        for table in _merged(directory, summaries, "hits.parquet"):
            writer.write_table(table)
            num_hits += table.num_rows
            run.writelines(trec_lines(schema.from_table(table, schema.Hit)))
    rejects = [*staged.rejects, *(schema.Reject(**row) for summary in summaries for row in summary["rejects"])]
    (staging / "rejects.jsonl").write_text(schema.reject_lines(rejects), encoding="utf-8")
    scores = [table for table in _merged(directory, summaries, "scores.parquet") if table.num_columns > 1]
    summary: dict[str, intervals.Interval] = {}
    if scores:
        table = pa.concat_tables(scores)
        pq.write_table(table, staging / "scores.parquet", write_page_checksum=True)
        summary = summarize(table, settings)
        (staging / "metrics.json").write_text(metrics_json(summary), encoding="utf-8")
    storage.publish(staging, url, "retrieve", num_hits=num_hits, num_rejects=len(rejects), **facts)
    shown = "  ".join(f"{name} {interval.value:.4f}" for name, interval in summary.items())
    progress.say(f"retrieve: {staged.num_queries:,} queries, {num_hits:,} hits  {shown}".rstrip())


def trec_lines(hits: Iterable[schema.Hit]) -> Iterable[str]:
    r"""Hits as lines of a TREC run: query, Q0, passage, rank, score, name of the run.

    >>> list(trec_lines([schema.Hit("q1", "d#0", "d", 1, 0.5)]))
    ['q1 Q0 d#0 1 0.5 ragtune\n']
    """
    for hit in hits:
        yield f"{_word(hit.query_id)} Q0 {_word(hit.passage_id)} {hit.rank} {hit.score:.9g} ragtune\n"


def _word(text: str) -> str:
    """An id as one word: the fields of a TREC run are separated by spaces."""
    return "_".join(text.split())


def summarize(scores: pa.Table, settings: config.Config) -> dict[str, intervals.Interval]:
    """One interval per metric column of a table of per-query scores; null means not scored."""
    per_query: dict[str, dict[str, float]] = {}
    for row in scores.to_pylist():
        query_id = row.pop("query_id")
        per_query[query_id] = {name: value for name, value in row.items() if value is not None}
    return intervals.summarize(per_query, settings.evaluate.resamples, settings.evaluate.confidence, settings.seed)


def metrics_json(summary: dict[str, intervals.Interval]) -> str:
    """The content of a `metrics.json`: name -> {value, low, high, n}."""
    return json.dumps({name: dataclasses.asdict(interval) for name, interval in summary.items()}, indent=1) + "\n"


def _refuse_failures(
    settings: config.Config, directory: str, summaries: Sequence[dict[str, Any]], num_queries: int
) -> None:
    """End the job when too many rows failed, and let the next run try those units again."""
    failed = sum(summary["failed"] for summary in summaries)
    if failed <= settings.answer.max_failed_share * num_queries:
        return
    reasons: Counter[str] = Counter()
    for summary in summaries:
        reasons.update(summary["errors"])
        if summary["failed"]:
            storage.remove(stages.unit_file(directory, summary["unit"], "json"))
    reason, count = reasons.most_common(1)[0]
    raise AnswerError(
        f"{failed} of {num_queries} rows failed, more than answer.max_failed_share ({settings.answer.max_failed_share}) "
        f"allows; most often ({count}): {reason}; mend that and run the command again: only failed units are done again"
    )


def _publish_answers(
    url: str,
    directory: str,
    summaries: Sequence[dict[str, Any]],
    staged: questions.StagedQueries,
    facts: dict[str, Any],
) -> None:
    staging = storage.stage(url)
    answer_schema = schema.arrow_schema(schema.Answer)
    ids: list[np.ndarray] = []
    statuses: Counter[str] = Counter()
    with pq.ParquetWriter(staging / "answers.parquet", answer_schema, write_page_checksum=True) as writer:
        for table in _merged(directory, summaries, "parquet"):
            schema.check(table.schema, schema.Answer)
            writer.write_table(table.cast(answer_schema))
            ids.append(table["query_id"].to_numpy())
            statuses.update(table["status"].to_pylist())
    answered = int(sum(len(part) for part in ids))
    if answered != staged.num_queries:
        raise AnswerError(f"{url}: {answered} answers for {staged.num_queries} queries; run the command again")
    (staging / "rejects.jsonl").write_text(schema.reject_lines(staged.rejects), encoding="utf-8")
    storage.publish(staging, url, "answer", num_answers=answered, statuses=dict(sorted(statuses.items())), **facts)
    progress.say(f"answer: {answered:,} answers" + (f", {statuses['failed']:,} failed" if statuses["failed"] else ""))
