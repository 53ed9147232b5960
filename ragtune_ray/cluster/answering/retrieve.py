"""Ray Data: queries -> hits, in bulk, scored where the queries have qrels.

In: a config that names queries and an index. Out: a run directory: `hits.parquet`, `run.trec`, `rejects.jsonl` and, when the
queries have qrels, `scores.parquet` (one row per query) and `metrics.json`. A query that cannot be retrieved becomes a reject.
An index of more than `cluster.shard_bytes` is searched in shards, with the same hits.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, session, staged_queries, stages
from ragtune_ray.cluster.answering import sharded
from ragtune_ray.cluster.answering.workers import RetrieveUnit
from ragtune_ray.evaluation import intervals
from ragtune_ray.index import retention, snapshot, versions
from ragtune_ray.storage import artifacts, checksums, filesystem

__all__ = ["metrics_json", "retrieve", "summarize", "trec_lines"]

RETRIEVE_UNIT_QUERIES = 512


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
    with staged_queries.staged_queries(settings) as staged:
        return _retrieve(settings, staged)


def _retrieve(settings: config.Config, staged: staged_queries.StagedQueries) -> Path | str:
    version, opened = runs.index_version(settings)
    identity = {
        **runs.common(settings, staged, opened),
        "retrieval": settings.retrieval.model_dump(mode="json"),
        "evaluate": settings.evaluate.model_dump(mode="json", include={"depth", "cutoffs", "resamples", "confidence"}),
        "seed": settings.seed,
    }
    url, work = runs.places(settings, f"retrieve-{checksums.digest(identity)}")
    if runs.already(url, "retrieve"):
        return url
    started = time.monotonic()
    depth = max(settings.retrieval.top_k, settings.evaluate.depth)
    directory = filesystem.join(work, "hits")
    units = staged_queries.units(staged, RETRIEVE_UNIT_QUERIES)
    with retention.held(settings.workspace, version), session.ray_session(settings.cluster):
        shards = snapshot.shards(
            settings.workspace, versions.read_version(settings.workspace, version), settings.cluster.shard_bytes
        )
        if len(shards) > 1:
            places = tuple(map(tuple, shards))
            job = sharded.Job(settings, version, staged.url, len(units), depth, places, work, directory)
            summaries, timed = sharded.scatter_gather(job, units)
        else:
            summaries = timed = _from_the_whole(settings, version, staged, depth, directory, units)
    facts = {
        **runs.facts(settings, version, staged, started),
        "queries_per_second": runs.rate(staged, timed),
        "num_shards": max(1, len(shards)),
    }
    _publish_hits(settings, url, directory, summaries, staged, facts)
    filesystem.remove(work)
    return url


def _from_the_whole(
    settings: config.Config,
    version: str,
    staged: staged_queries.StagedQueries,
    depth: int,
    directory: str,
    units: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Retrieval by workers that have the whole index open."""
    arguments = {
        "settings": settings,
        "version": version,
        "queries": staged.url,
        "depth": depth,
        "directory": directory,
    }
    count = min(len(units), session.workers(settings.cluster.encoder_workers, settings.cluster.gpus_per_worker))
    return stages.run_stage(
        "retrieve",
        directory,
        units,
        lambda dataset: runs.pool(dataset, RetrieveUnit, count, arguments, session.worker_options(settings.cluster)),
        counted="queries",
        rows_of=lambda unit: int(unit["stop"] - unit["start"]),
    )


def _publish_hits(
    settings: config.Config,
    url: str,
    directory: str,
    summaries: list[dict[str, Any]],
    staged: staged_queries.StagedQueries,
    facts: dict[str, Any],
) -> None:
    staging = artifacts.stage(url)
    num_hits = 0
    hit_schema = schema.arrow_schema(schema.Hit)
    with (
        pq.ParquetWriter(staging / "hits.parquet", hit_schema, write_page_checksum=True) as writer,
        (staging / "run.trec").open("w", encoding="utf-8") as run,
    ):
        for table in runs.merged(directory, summaries, "hits.parquet"):
            writer.write_table(table)
            num_hits += table.num_rows
            run.writelines(trec_lines(schema.from_table(table, schema.Hit)))
    rejects = [*staged.rejects, *(schema.Reject(**row) for summary in summaries for row in summary["rejects"])]
    (staging / "rejects.jsonl").write_text(schema.reject_lines(rejects), encoding="utf-8")
    scores = [table for table in runs.merged(directory, summaries, "scores.parquet") if table.num_columns > 1]
    summary: dict[str, intervals.Interval] = {}
    if scores:
        table = pa.concat_tables(scores)
        pq.write_table(table, staging / "scores.parquet", write_page_checksum=True)
        summary = summarize(table, settings)
        (staging / "metrics.json").write_text(metrics_json(summary), encoding="utf-8")
    artifacts.publish(staging, url, "retrieve", num_hits=num_hits, num_rejects=len(rejects), **facts)
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
