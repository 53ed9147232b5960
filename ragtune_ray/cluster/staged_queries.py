"""Writes the queries of a bulk job to a Parquet file in the workspace, from which every worker reads its own rows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.storage import checksums, filesystem

ROWS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class StagedQueries:
    """The queries of a job in the workspace, where every worker can read them."""

    url: str
    """A Parquet file of `Query` rows, used by this job only."""
    fingerprint: str
    """Digest of ids, texts, answers and qrels, in order."""
    num_queries: int
    rejects: tuple[schema.Reject, ...]


@contextlib.contextmanager
def staged_queries(settings: config.Config) -> Iterator[StagedQueries]:
    """Write the selected queries to the workspace for the duration of the block; InputError if there are none."""
    if not settings.queries.path:
        raise config.ConfigError("queries.path is empty; name a file of queries")
    rejects: list[schema.Reject] = []
    fingerprint = hashlib.sha256()
    num_queries = 0
    with tempfile.TemporaryDirectory(prefix="ragtune-queries-") as temporary:
        local = Path(temporary) / "queries.parquet"
        with pq.ParquetWriter(local, schema.arrow_schema(schema.Query), write_page_checksum=True) as writer:
            for rows in _batched(_selected(settings.queries, rejects)):
                num_queries += len(rows)
                for row in rows:
                    fingerprint.update(json.dumps(dataclasses.astuple(row), ensure_ascii=False).encode() + b"\n")
                writer.write_table(schema.to_table(rows, schema.Query))
        if not num_queries:
            first = f"; the first reject: {rejects[0].place}: {rejects[0].reason}" if rejects else ""
            raise inputs.InputError(f"{settings.queries.path}: contains no usable query{first}")
        name = fingerprint.hexdigest()[:16]
        url = filesystem.join(settings.workspace, "runs", ".work", f"queries-{name}-{uuid.uuid4().hex[:8]}.parquet")
        filesystem.commit_file(local, url)
    if rejects:
        progress.say(f"queries: {len(rejects):,} rejected; the first: {rejects[0].place}: {rejects[0].reason}")
    try:
        yield StagedQueries(url, name, num_queries, tuple(rejects))
    finally:
        filesystem.remove(url)


def fingerprint(settings: config.Config) -> str:
    """Digest of the queries that the config selects."""
    with staged_queries(settings) as staged:
        return staged.fingerprint


def with_all_queries_of(settings: config.Config, path: str) -> config.Config:
    """The config that selects all queries of another file."""
    values = {"queries.path": path, "queries.split": "all", "queries.split_by": "given", "queries.limit": 0}
    return settings.with_values(values)


def selected_queries(settings: config.Config) -> list[schema.Query]:
    """The queries that the config selects, in memory."""
    with staged_queries(settings) as staged:
        return read_queries(staged.url, 0, staged.num_queries)


def judged_queries(settings: config.Config) -> list[schema.Query]:
    """The selected queries that have gold answers."""
    return [query for query in selected_queries(settings) if query.answers is not None]


def read_queries(url: str, start: int, stop: int) -> list[schema.Query]:
    """The staged queries in rows `start` to `stop` (excluded)."""
    folder, _, name = url.rpartition("/")
    path = filesystem.local_copy(folder, [name], checksums.digest(url)) / name
    first = 0
    found: list[schema.Query] = []
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < stop and first + rows > start:
                table = file.read_row_group(group).slice(max(0, start - first), stop - max(start, first))
                found += schema.from_table(table, schema.Query)
            first += rows
    return found


def units(staged: StagedQueries, unit_queries: int) -> list[dict[str, Any]]:
    """The staged queries as ranges of `unit_queries` rows."""
    starts = range(0, staged.num_queries, unit_queries)
    return [
        {"unit": number, "start": start, "stop": min(start + unit_queries, staged.num_queries)}
        for number, start in enumerate(starts)
    ]


def _selected(settings: config.Queries, rejects: list[schema.Reject]) -> Iterable[schema.Query]:
    def selected() -> Iterable[schema.Query]:
        for item in splits.selected_queries(settings):
            if isinstance(item, schema.Reject):
                rejects.append(item)
            else:
                yield item

    return itertools.islice(selected(), settings.limit or None)


def _batched(rows: Iterable[schema.Query]) -> Iterable[list[schema.Query]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, ROWS_AT_ONCE)):
        yield batch
