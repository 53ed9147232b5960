"""Writes the queries of a bulk job to a Parquet file in the workspace, from which every worker reads its own rows."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray import config, progress, schema
from ragtune_ray.index import contents, versions
from ragtune_ray.ingest import inputs, queries, splits
from ragtune_ray.storage import artifacts, checksums, filesystem

ROWS_AT_ONCE = 8192
ROWS_PER_GROUP = 512
"""A worker reads a whole group of the staged rows for each of its units."""
Row: TypeAlias = schema.Query | schema.Reject
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class StagedQueries:
    """The queries of a job in the workspace, where every worker can read them."""

    url: str
    """A Parquet file of `Query` rows, used by this job only."""
    fingerprint: str
    """Digest of ids, texts, conversations, answers and qrels, in order."""
    num_queries: int
    rejects: tuple[schema.Reject, ...]
    stand_in_corpus: bool = False
    """Whether the document with a query's id may be the query itself, as in BEIR; it is then no hit of the query."""
    num_follow_ups: int = 0
    """Queries that follow turns of a conversation."""


@contextlib.contextmanager
def staged_queries(settings: config.Config) -> Iterator[StagedQueries]:
    """Write the selected queries to the workspace for the duration of the block; InputError if there are none."""
    if not settings.queries.path:
        raise config.ConfigError("queries.path is empty; name a file of queries")
    rejects: list[schema.Reject] = []
    with staged_rows(settings.workspace, _selected(settings, rejects)) as staged:
        if not staged.num_queries:
            first = f"; the first reject: {rejects[0].place}: {rejects[0].reason}" if rejects else ""
            raise inputs.InputError(f"{settings.queries.path}: contains no usable query{first}")
        if rejects:
            progress.say(f"queries: {len(rejects):,} rejected; the first: {rejects[0].place}: {rejects[0].reason}")
        own = queries.may_stand_in_corpus(settings.queries)
        yield dataclasses.replace(staged, rejects=tuple(rejects), stand_in_corpus=own)


@contextlib.contextmanager
def staged_rows(workspace: str, given: Iterable[schema.Query]) -> Iterator[StagedQueries]:
    """Write queries to the workspace for the duration of the block."""
    fingerprint = hashlib.sha256()
    num_queries = num_follow_ups = 0
    with tempfile.TemporaryDirectory(prefix="ragtune-queries-") as temporary:
        local = Path(temporary) / "queries.parquet"
        with pq.ParquetWriter(local, schema.arrow_schema(schema.Query), write_page_checksum=True) as writer:
            for rows in _batched(given):
                num_queries += len(rows)
                num_follow_ups += sum(bool(row.history) for row in rows)
                for row in rows:
                    fingerprint.update(json.dumps(row.identity(), ensure_ascii=False).encode() + b"\n")
                writer.write_table(schema.to_table(rows, schema.Query), row_group_size=ROWS_PER_GROUP)
        name = fingerprint.hexdigest()[:16]
        url = filesystem.join(workspace, "runs", ".work", f"queries-{name}-{uuid.uuid4().hex[:8]}.parquet")
        filesystem.commit_file(local, url)
    try:
        yield StagedQueries(url, name, num_queries, (), num_follow_ups=num_follow_ups)
    finally:
        filesystem.remove(url)


def fingerprint(settings: config.Config) -> str:
    """Digest of the queries that the config selects."""
    with staged_queries(settings) as staged:
        return staged.fingerprint


def with_all_queries_of(settings: config.Config, path: str) -> config.Config:
    """The config that selects all queries of another file, whose documents need not be in the index."""
    values = {
        "queries.path": path,
        "queries.split": "all",
        "queries.split_by": "given",
        "queries.limit": 0,
        "queries.order": "given",
        "queries.unindexed": "keep",
        "queries.own_documents": "auto",
    }
    return settings.with_values(values)


def own_documents_setting(settings: config.Config) -> dict[str, str]:
    """The setting that a file needs to which these queries are copied, since its format no longer says it."""
    return {"queries.own_documents": "leave_out" if queries.may_stand_in_corpus(settings.queries) else "keep"}


def selected_queries(settings: config.Config) -> list[schema.Query]:
    """The queries that the config selects, in memory."""
    with staged_queries(settings) as staged:
        return read_queries(staged.url, 0, staged.num_queries)


def judged_queries(settings: config.Config, fingerprint: str = "") -> list[schema.Query]:
    """The selected queries that can be scored: those with gold answers; all, if a metric of `evaluate.metrics` needs none.

    Raises:
        ChangedError: `fingerprint` is not "" and not theirs when staged.
    """
    with staged_queries(settings) as staged:
        if fingerprint:
            require_same(settings, staged, fingerprint)
        found = read_queries(staged.url, 0, staged.num_queries)
        return [query for query in found if settings.evaluate.can_score(query.answers)]


def require_same(settings: config.Config, staged: StagedQueries, fingerprint: str) -> None:
    """Raise a ChangedError if a step before this one had other queries; `fingerprint` is that of its staged queries."""
    if staged.fingerprint != fingerprint:
        path = settings.queries.path
        raise inputs.ChangedError(f"{path} or the index changed while the queries were evaluated; run again")


def read_queries(url: str, start: int, stop: int) -> list[schema.Query]:
    """The staged queries in rows `start` to `stop` (excluded)."""
    return read_rows(url, start, stop, schema.Query)


def read_rows(url: str, start: int, stop: int, record: type[Item]) -> list[Item]:
    """Rows `start` to `stop` (excluded) of a Parquet file of records with one row per staged query."""
    if start >= stop:
        return []
    folder, _, name = url.rpartition("/")
    path = filesystem.local_copy(folder, [name], checksums.digest(url), scratch=True) / name
    metadata, ends = _groups(path)
    found: list[Item] = []
    with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as file:
        for group in range(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop)) + 1):
            first = int(ends[group - 1]) if group else 0
            table = file.read_row_group(group).slice(max(0, start - first), stop - max(start, first))
            found += schema.from_table(table, record)
    return found


@functools.lru_cache(maxsize=8)
def _groups(path: Path) -> tuple[pq.FileMetaData, np.ndarray]:
    """The metadata of a file, which never changes, and the number of rows up to the end of each of its groups."""
    metadata = pq.read_metadata(path)
    return metadata, np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])


def units(staged: StagedQueries, unit_queries: int) -> list[dict[str, Any]]:
    """The staged queries as ranges of `unit_queries` rows."""
    starts = range(0, staged.num_queries, unit_queries)
    return [
        {"unit": number, "start": start, "stop": min(start + unit_queries, staged.num_queries)}
        for number, start in enumerate(starts)
    ]


def _selected(settings: config.Config, rejects: list[schema.Reject]) -> Iterable[schema.Query]:
    def selected() -> Iterable[schema.Query]:
        for item in indexed_queries(settings, splits.selected_queries(settings.queries)):
            if isinstance(item, schema.Reject):
                rejects.append(item)
            else:
                yield item

    given = settings.queries
    if given.order == "shuffled":
        shuffled = sorted(selected(), key=lambda row: splits.draw(f"order\0{row.query_id}", given.split_seed))
        return itertools.islice(shuffled, given.limit or None)
    return itertools.islice(selected(), given.limit or None)


def indexed_queries(settings: config.Config, rows: Iterable[Row]) -> Iterator[Row]:
    """The queries with the relevant documents that the workspace's index contains; a reject for each query that has none left.

    All queries pass if there is no index, or with `queries.unindexed=keep`. Queries without relevant documents pass, too.

    Raises:
        InputError: a relevant document is not in the index, and `corpus.strict` is set.
    """
    version = _current_index(settings) if settings.queries.unindexed == "leave_out" else None
    if version is None:
        yield from rows
        return
    for batch in _batched(rows):
        names = {name for row in batch if isinstance(row, schema.Query) for name in splits.positives(row)}
        missing = names - contents.present(settings.workspace, version, sorted(names)) if names else set()
        for row in batch:
            yield _without(row, missing, settings) if isinstance(row, schema.Query) and missing else row


def _current_index(settings: config.Config) -> versions.Version | None:
    try:
        return versions.read_version(settings.workspace, versions.current_version(settings.workspace))
    except artifacts.ArtifactError:  # a command that needs the index says so
        return None


def _without(query: schema.Query, missing: set[str], settings: config.Config) -> Row:
    positives = splits.positives(query)
    gone = [name for name in positives if name in missing]
    if not gone:
        return query
    which = f"relevant document {gone[0]!r}" + (f" and {len(gone) - 1} more are" if len(gone) > 1 else " is")
    place, reason = f"{settings.queries.path}: query {query.query_id!r}", f"{which} not in the index"
    if settings.corpus.strict:
        raise inputs.InputError(
            f"{place}: {reason} (corpus.strict); index the documents, correct document_ids, or set queries.unindexed=keep"
        )
    if len(gone) == len(positives):
        return schema.Reject(place, f"{reason}; index it, or set queries.unindexed=keep", "row")
    kept = [pair for pair in zip(query.document_ids, query.relevances, strict=True) if pair[0] not in gone]
    return dataclasses.replace(
        query, document_ids=tuple(name for name, _ in kept), relevances=tuple(value for _, value in kept)
    )


def _batched(rows: Iterable[Item]) -> Iterable[list[Item]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, ROWS_AT_ONCE)):
        yield batch
