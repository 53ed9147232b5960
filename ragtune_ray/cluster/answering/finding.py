"""Finds the hits of a job's queries, in one process or in shards, and commits them with the passages that the job reads.

`retrieve` publishes the hits. `answer` and `train` read hits and passages back, a unit of queries at a time, so that neither a
generator nor a trainer opens the index. With an index larger than `cluster.shard_bytes` no process opens more than one shard:
the hits are merged as in `sharded`, and the shard that contains a passage supplies its text.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ragtune_ray import config
from ragtune_ray.cluster import runs, session, staged_queries, stages
from ragtune_ray.cluster.answering import passages, sharded
from ragtune_ray.cluster.answering.passages import Found, Shown
from ragtune_ray.cluster.answering.workers import RetrieveUnit
from ragtune_ray.index import snapshot, versions
from ragtune_ray.index.retriever import OWN_PASSAGES
from ragtune_ray.storage import checksums, filesystem

UNIT_QUERIES = 512
"""Queries that are encoded and searched together."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job needs from the index for its queries."""

    settings: config.Config
    version: str
    depth: int
    """Hits per query; 0: none."""
    searches: str = ""
    """The texts that a generator wrote for the searches; see `workers.read_searches`."""
    cutoffs: tuple[int, ...] = ()
    """The k of the metrics of the hits; empty: they are not scored."""
    shown: Shown | None = None
    """Which passages are needed, besides those of the hits; None: none at all."""

    def shards(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the segments of each shard; one shard if a process may open the whole index."""
        workspace = self.settings.workspace
        opened = versions.read_version(workspace, self.version)
        groups = snapshot.shards(workspace, opened, self.settings.cluster.shard_bytes)
        return tuple(map(tuple, groups)) or ((),)


def find(
    wanted: Wanted,
    staged: staged_queries.StagedQueries,
    work: str,
    pending: Sequence[dict[str, Any]] | None = None,
) -> tuple[Found, list[stages.Summary]]:
    """Find and commit what a job reads, below `work`; a Ray session must be open.

    `pending` are ranges of the queries ("start", "stop") that still need it; None: all do. If any does, shards are searched
    for all.

    Returns:
        Where it is, and the summaries of all units so far.
    """
    assert wanted.shown is not None
    units, shards = staged_queries.units(staged, UNIT_QUERIES), wanted.shards()
    # Units of one shard contain the passages, others do not; and approximate kinds may find others in shards.
    division = checksums.digest(shards)[:16]
    hits = filesystem.join(work, "hits" if len(shards) == 1 else f"hits-{division}") if wanted.depth else ""
    found = Found(hits, hits, len(units), UNIT_QUERIES)
    needed = {
        number
        for part in (units if pending is None else pending)
        for number in range(part["start"] // UNIT_QUERIES, (part["stop"] - 1) // UNIT_QUERIES + 1)
    }
    if wanted.depth and len(shards) == 1:
        timed = _search_whole(wanted, staged, [unit for unit in units if unit["unit"] in needed], hits)
        if len(needed) < len(units):  # earlier runs of this job may have searched for the others
            timed = list(stages.finished_units(hits).values())
        return found, timed
    if not needed:
        return found, []
    timed = find_hits(wanted, staged, hits, work)[1] if wanted.depth else []
    directory = filesystem.join(work, f"passages-{division}")
    found = Found(hits, directory, len(units), UNIT_QUERIES, len(shards))
    arguments = {"settings": wanted.settings, "version": wanted.version, "shards": shards, "queries": staged.url}
    arguments |= {"found": found, "shown": wanted.shown}
    pairs = [
        {**unit, "unit": found.number(shard, unit["unit"]), "queries": unit["unit"], "shard": shard}
        for shard in range(len(shards))
        for unit in units
    ]
    cluster = wanted.settings.cluster.model_copy(update={"gpus_per_worker": 0.0})
    return found, timed + runs.run_over_queries("passages", directory, pairs, PassagesUnit, arguments, cluster)


def find_hits(
    wanted: Wanted, staged: staged_queries.StagedQueries, hits: str, work: str
) -> tuple[list[stages.Summary], list[stages.Summary]]:
    """Find and commit the hits of all queries in directory `hits`; those of shards are searched for below `work`.

    Returns:
        The summaries of the units of hits, and of all units.
    """
    units, shards = staged_queries.units(staged, UNIT_QUERIES), wanted.shards()
    if len(shards) == 1:
        found = _search_whole(wanted, staged, units, hits)
        return found, found
    follows = wanted.settings.retrieval.rewrite == "last_turns" and staged.num_follow_ups > 0
    job = sharded.Job(
        wanted.settings,
        wanted.version,
        staged.url,
        len(units),
        wanted.depth,
        shards,
        work,
        hits,
        OWN_PASSAGES if staged.stand_in_corpus else 0,
        wanted.searches,
        fuses=bool(wanted.searches) or follows,
        cutoffs=wanted.cutoffs,
    )
    return sharded.scatter_gather(job, units)


def _search_whole(
    wanted: Wanted, staged: staged_queries.StagedQueries, units: Sequence[dict[str, Any]], hits: str
) -> list[stages.Summary]:
    arguments = {"settings": wanted.settings, "version": wanted.version, "queries": staged.url}
    arguments |= {"depth": wanted.depth, "directory": hits, "leave_out_own": staged.stand_in_corpus}
    arguments |= {"searches": wanted.searches, "cutoffs": wanted.cutoffs, "shown": wanted.shown}
    return runs.run_over_queries("retrieve", hits, units, RetrieveUnit, arguments, wanted.settings.cluster)


class PassagesUnit(stages.UnitWorker):
    """Reads, one shard after another, the passages that a job needs for a unit of queries."""

    def __init__(
        self,
        settings: config.Config,
        version: str,
        shards: Sequence[Sequence[int]],
        queries: str,
        found: Found,
        shown: Shown,
    ) -> None:
        session.use_one_thread()
        self._shards = sharded.OneShard(settings.workspace, version, shards)
        self._queries, self._found, self._shown = queries, found, shown

    def run(self, unit: dict[str, Any]) -> str:
        """Commit the passages of a shard for a unit of queries."""
        started = time.time()
        names: list[str] = []
        if self._found.hits:
            with filesystem.fetched(stages.unit_file(self._found.hits, unit["queries"], "hits.parquet")) as path:
                names = pq.read_table(path, columns=["passage_id"])["passage_id"].to_pylist()
        rows = staged_queries.read_queries(self._queries, unit["start"], unit["stop"]) if self._shown.gold else []
        table = passages.passages_of(self._shards.open(unit["shard"]), names, rows, self._shown)
        with tempfile.TemporaryDirectory(prefix="ragtune-passages-") as temporary:
            files = {"passages.parquet": Path(temporary) / "passages.parquet"}
            pq.write_table(table, files["passages.parquet"], write_page_checksum=True)
            return stages.commit_unit(self._found.passages, unit["unit"], files, started=started, ended=time.time())
