"""Writes, with the generator, the texts with which the index is searched, before retrieval: queries -> `searches.parquet`.

`answer` and `retrieve` run it where `retrieval.rewrite=generator` or `retrieval.decompose` asks for it. Its result is a run of
its own, so that verbs and arms with the same generator share it, and a killed job repeats only unfinished units. A question for
which the generator writes nothing usable is searched as it is, and counted.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.answering import rewriting
from ragtune_ray.cluster import runs, session, staged_queries, stages
from ragtune_ray.storage import artifacts, checksums, filesystem

SEARCHES = "searches.parquet"
ATTEMPTS = 2
"""A unit whose worker died this many times is searched as it was asked."""


@dataclass(frozen=True, slots=True)
class Searching:
    """How the texts for the searches of a job are found."""

    run: runs.Run | None
    """Writes them with the generator; None: they follow from the queries alone."""
    method: str = ""
    """Digest of all that they depend on except the queries."""

    @classmethod
    def of(cls, settings: config.Config, staged: staged_queries.StagedQueries) -> Searching:
        """Decide whether the generator must write them; `settings` name the models of the arm."""
        given = settings.retrieval
        rewrites = given.rewrite == "generator" and staged.num_follow_ups > 0
        if not (rewrites or given.decompose):
            return cls(None)
        method = {
            "format": runs.RUN_FORMAT,
            "rewrite": given.rewrite if staged.num_follow_ups else "none",
            "decompose": given.decompose,
            "prompts": checksums.digest([rewriting.SYSTEM, rewriting.EXAMPLES]),
            "max_tokens": settings.prompt.max_tokens,
            "generator": settings.generator.model_dump(mode="json", include={"engine", "precision", "batch_tokens"}),
            "model": runs.generator_fingerprint(settings.generator),
            "unit_queries": settings.answer.unit_queries,
            "seed": settings.seed,
        }
        run = runs.Run.of(settings, "rewrite", {**method, "queries": staged.fingerprint})
        return cls(run, checksums.digest(method))

    @property
    def url(self) -> str:
        """The file with a `schema.Searches` for each staged query; empty if no generator is needed."""
        return filesystem.join(self.run.url, SEARCHES) if self.run else ""

    def identity(
        self, settings: config.Config, index_manifest: Mapping[str, Any], staged: staged_queries.StagedQueries
    ) -> dict[str, Any]:
        """The part of the job's identity for how hits are found."""
        run = self.run.url if self.run else ""
        return runs.retrieval_identity(settings, index_manifest, staged.num_follow_ups, run)

    def write(self, staged: staged_queries.StagedQueries, known: str = "") -> None:
        """Write them, unless they are already written or no generator is needed; a Ray session must be open.

        Args:
            staged: the queries.
            known: a run that wrote them for the first of these queries, and perhaps in another way; empty: none.
        """
        if self.run is None or artifacts.is_finished(self.run.url):
            return
        directory = filesystem.join(self.run.work, "searches")
        if known and artifacts.is_finished(known) and runs.read_manifest(known).get("method") == self.method:
            _take_over(known, directory, staged, self.run.settings.answer.unit_queries)
        summaries = _write_units(self.run.settings, staged, directory)
        _publish(self.run, directory, summaries, staged, self.method)

    def facts(self) -> runs.RunFacts:
        """What writing them cost, for the manifest of the job; nothing if no generator was needed."""
        if self.run is None:
            return {}
        manifest: Mapping[str, Any] = runs.read_manifest(self.run.url)
        kept = ("num_rewritten", "num_split", "fallbacks", "prompt_tokens", "completion_tokens")
        facts = {"path": self.run.url, **{name: manifest[name] for name in kept}}
        return {"rewriting": {**facts, "busy_seconds": manifest["busy_seconds"]["rewriting"]}}


def _write_units(settings: config.Config, staged: staged_queries.StagedQueries, directory: str) -> list[stages.Summary]:
    cluster = session.for_generators(settings)
    arguments = {"settings": settings, "queries": staged.url, "directory": directory}
    pool = session.pool(RewriteUnit, arguments, cluster.generator_workers, cluster)
    units = staged_queries.units(staged, settings.answer.unit_queries)
    work = stages.on_actors(pool)
    return stages.run_stage("rewrite", directory, units, work, counted="queries", rows_of=runs.num_queries)


def _take_over(known: str, directory: str, staged: staged_queries.StagedQueries, unit_queries: int) -> None:
    """Commit the units that another run has written, with its time, as if they had just been finished."""
    table = pq.read_table(artifacts.open_artifact(known, "rewrite").path / SEARCHES)
    count, busy, now = table.num_rows, runs.read_manifest(known)["busy_seconds"]["rewriting"], time.time()
    if table["query_id"].to_pylist() != [row.query_id for row in staged_queries.read_queries(staged.url, 0, count)]:
        return
    finished = stages.finished_units(directory)
    for unit in staged_queries.units(staged, unit_queries):
        if unit["stop"] <= count and unit["unit"] not in finished:
            rows = table.slice(unit["start"], unit["stop"] - unit["start"])
            _commit(directory, unit["unit"], rows, now - busy * rows.num_rows / count)


def _commit(directory: str, unit: int, rows: pa.Table, started: float) -> str:
    with tempfile.TemporaryDirectory(prefix="ragtune-rewrite-") as temporary:
        path = Path(temporary) / SEARCHES
        pq.write_table(rows, path, write_page_checksum=True)
        return stages.commit_unit(directory, unit, {"parquet": path}, started=started, ended=time.time())


class RewriteUnit(stages.UnitWorker):
    """A generator that writes the texts for the searches of one unit of queries at a time."""

    def __init__(self, settings: config.Config, queries: str, directory: str) -> None:
        from ragtune_ray.generation.generator import open_generator

        session.use_one_thread()
        self._generator, _ = open_generator(settings)
        self._settings, self._queries, self._directory = settings, queries, directory

    def run(self, unit: dict[str, Any]) -> str:
        """Write the texts for a unit of queries."""
        started = time.time()
        rows = staged_queries.read_queries(self._queries, unit["start"], unit["stop"])
        if stages.begin_attempt(self._directory, unit["unit"]) > ATTEMPTS:
            reason = ("the worker process died on these questions",)
            found = [schema.Searches(row.query_id, row.text, (row.text,), reason) for row in rows]
        else:
            found = rewriting.write_searches(rows, self._generator, self._settings)
        return _commit(self._directory, unit["unit"], schema.to_table(found, schema.Searches), started)


def _publish(
    run: runs.Run,
    directory: str,
    summaries: Sequence[stages.Summary],
    staged: staged_queries.StagedQueries,
    method: str,
) -> None:
    staging = artifacts.stage(run.url)
    counts: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    with pq.ParquetWriter(staging / SEARCHES, schema.arrow_schema(schema.Searches), write_page_checksum=True) as writer:
        for table in runs.merged(directory, summaries, "parquet"):
            writer.write_table(schema.conformed(table, schema.Searches))
            for row in schema.from_table(table, schema.Searches):
                counts["num_rewritten"] += row.texts[0] != row.query
                # With `last_turns`, the question alone comes second.
                counts["num_split"] += len(row.texts) > (2 if row.texts[1:2] == (row.query,) else 1)
                counts["prompt_tokens"] += row.prompt_tokens
                counts["completion_tokens"] += row.completion_tokens
                fallbacks.update(map(rewriting.kind_of, row.fallbacks))
    busy = sum(summary["ended"] - summary["started"] for summary in summaries)
    facts: runs.RunFacts = {
        "input": {"fingerprint": staged.fingerprint, "num_queries": staged.num_queries},
        "method": method,
        "num_rewritten": counts["num_rewritten"],
        "num_split": counts["num_split"],
        "fallbacks": dict(sorted(fallbacks.items())),
        "prompt_tokens": counts["prompt_tokens"],
        "completion_tokens": counts["completion_tokens"],
        "queries_per_second": runs.rate(staged, summaries),
        "busy_seconds": {"rewriting": round(busy, 3)},
    }
    run.publish(staging, facts)
    unusable = f"; {fallbacks.total():,} texts were not usable ({fallbacks.most_common(1)[0][0]})" if fallbacks else ""
    progress.say(
        f"rewrite: of {staged.num_queries:,} questions, {counts['num_rewritten']:,} rewritten and {counts['num_split']:,} "
        f"split{unusable}"
    )
