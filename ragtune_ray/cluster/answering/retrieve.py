"""`ragtune retrieve`: retrieves the hits of many queries in parallel, and scores them if the queries have qrels.

Out: `hits.parquet`, `run.trec`, `rejects.jsonl` (queries that failed) and, with qrels, `scores.parquet` (one row per query) and
`metrics.json`. An index larger than `cluster.shard_bytes` is searched in shards, with the same hits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, staged_queries, stages
from ragtune_ray.cluster.answering import finding, rewrite
from ragtune_ray.evaluation import intervals
from ragtune_ray.storage import artifacts, filesystem
from ragtune_ray.storage.results import Result

DEEPER = 4
"""Factor by which a search goes deeper if its hits are from too few documents for the metrics."""
MOST_HITS = 1000
"""A search for metrics goes no deeper than this, unless `evaluate.depth` or `retrieval.top_k` is larger."""


@dataclass(frozen=True)
class Hits(Result):
    """A run of `retrieve`; `to_arrow()` has one row per hit, as `schema.Hit`."""

    table: ClassVar[str | None] = "hits.parquet"

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metric -> {value, low, high, n}; empty if no query has qrels."""
        path = artifacts.open_artifact(self.path, "retrieve").path / "metrics.json"
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found


def retrieve(settings: config.Config) -> Hits:
    """Find the hits of every query; ArtifactError if there is no sound index."""
    with staged_queries.staged_queries(settings) as staged:
        version, index_manifest = runs.index_version(settings)
        searches = rewrite.Searching.of(settings, staged)
        fields = {"depth", "cutoffs", "resamples", "confidence"}
        identity = {
            **runs.inputs_identity(settings, staged, index_manifest),
            "retrieval": searches.identity(settings, index_manifest, staged),
            "evaluate": settings.evaluate.model_dump(mode="json", include=fields),
            "seed": settings.seed,
        }
        run = runs.Run.of(settings, "retrieve", identity)
        if not run.is_finished():
            _retrieve(run, version, staged, searches)
    return Hits(run.url)


def _retrieve(run: runs.Run, version: str, staged: staged_queries.StagedQueries, searches: rewrite.Searching) -> None:
    settings = run.settings
    depth = least = max(settings.retrieval.top_k, settings.evaluate.depth)
    with run.session(version):
        searches.write(staged)
        while True:
            # If documents are long, many hits may be passages of one document, which counts once.
            directory = filesystem.join(run.work, "hits" if depth == least else f"hits-{depth}")
            wanted = finding.Wanted(settings, version, depth, searches.url, settings.evaluate.cutoffs)
            work = filesystem.join(run.work, f"depth-{depth}")
            summaries, timed = finding.find_hits(wanted, staged, directory, work)
            short = sum(summary.get("short", 0) for summary in summaries)
            if not short or depth >= MOST_HITS:
                break
            depth = min(MOST_HITS, DEEPER * depth)
            progress.say(
                f"retrieve: the hits of {short:,} queries are from too few documents for metrics at "
                f"{max(settings.evaluate.cutoffs)}; searching {depth} hits deep"
            )
    facts = runs.index_facts(settings, version, staged)
    facts |= {"queries_per_second": runs.rate(staged, timed), "num_shards": len(wanted.shards()), **searches.facts()}
    _publish(run, directory, summaries, staged, facts)


def _publish(
    run: runs.Run,
    directory: str,
    summaries: Sequence[stages.Summary],
    staged: staged_queries.StagedQueries,
    facts: runs.RunFacts,
) -> None:
    staging = artifacts.stage(run.url)
    num_hits = 0
    hit_schema = schema.arrow_schema(schema.Hit)
    with (
        pq.ParquetWriter(staging / "hits.parquet", hit_schema, write_page_checksum=True) as writer,
        (staging / "run.trec").open("w", encoding="utf-8") as trec,
    ):
        for table in runs.merged(directory, summaries, "hits.parquet"):
            writer.write_table(table)
            num_hits += table.num_rows
            trec.writelines(trec_lines(schema.from_table(table, schema.Hit)))
    rejects = [*staged.rejects, *(schema.Reject(**row) for summary in summaries for row in summary["rejects"])]
    (staging / "rejects.jsonl").write_text(schema.reject_lines(rejects), encoding="utf-8")
    scores = [table for table in runs.merged(directory, summaries, "scores.parquet") if table.num_columns > 1]
    summary: dict[str, intervals.Interval] = {}
    if scores:
        table = pa.concat_tables(scores)
        pq.write_table(table, staging / "scores.parquet", write_page_checksum=True)
        summary = summarize(table, run.settings)
        (staging / "metrics.json").write_text(metrics_json(summary), encoding="utf-8")
    run.publish(staging, {**facts, "num_hits": num_hits, "num_rejects": len(rejects)})
    shown = "  ".join(f"{name} {interval.value:.4f}" for name, interval in summary.items())
    progress.say(f"retrieve: {staged.num_queries:,} queries, {num_hits:,} hits  {shown}".rstrip())


def trec_lines(hits: Iterable[schema.Hit]) -> Iterable[str]:
    r"""Hits, each query's best first, as lines of a TREC run file: query, Q0, passage, rank, score, run name.

    trec_eval ignores ranks and breaks ties of scores by passage id, so a score that does not fall is lowered to the next
    smaller float32.

    >>> list(trec_lines([schema.Hit("q1", "d#0", "d", 1, 0.5), schema.Hit("q1", "e#0", "e", 2, 0.5)]))
    ['q1 Q0 d#0 1 0.5 ragtune\n', 'q1 Q0 e#0 2 0.49999997 ragtune\n']
    """
    query_id, last = "", np.float32(np.inf)
    for hit in hits:
        below = np.nextafter(last, np.float32(-np.inf)) if hit.query_id == query_id else np.float32(np.inf)
        query_id, last = hit.query_id, min(np.float32(hit.score), below)
        yield f"{_word(hit.query_id)} Q0 {_word(hit.passage_id)} {hit.rank} {last:.9g} ragtune\n"


def _word(text: str) -> str:
    """An id with its spaces replaced, because they separate the fields of a TREC run file."""
    return "_".join(text.split())


def summarize(scores: pa.Table, settings: config.Config) -> dict[str, intervals.Interval]:
    """One interval per metric column of `scores.parquet`; nulls are not counted."""
    per_query: dict[str, dict[str, float]] = {}
    for row in scores.to_pylist():
        query_id = row.pop("query_id")
        per_query[query_id] = {name: value for name, value in row.items() if value is not None}
    return intervals.summarize(per_query, settings.evaluate.resamples, settings.evaluate.confidence, settings.seed)


def metrics_json(summary: dict[str, intervals.Interval]) -> str:
    """The content of a `metrics.json`: name -> {value, low, high, n}."""
    return json.dumps({name: dataclasses.asdict(interval) for name, interval in summary.items()}, indent=1) + "\n"
