"""The passages of a job's hits, in files next to the hits, so that generators and trainers need not open the index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import schema
from ragtune_ray.cluster import stages
from ragtune_ray.index import segments, snapshot
from ragtune_ray.ingest.splits import positives
from ragtune_ray.storage import filesystem

VECTOR = "vector"
"""The column of the stored vectors."""


class Shown(NamedTuple):
    """What a job reads of the index besides the passages of its hits."""

    gold: bool = False
    """All passages of the relevant documents."""
    vectors: bool = False
    """The stored vectors of all these passages."""


def passages_of(
    opened: snapshot.Index, passage_ids: Iterable[str], queries: Iterable[schema.Query], shown: Shown
) -> pa.Table:
    """The `Passage` rows of an index, or a shard of one, that have these ids, ascending, and what is to be shown besides."""
    hits = set(passage_ids)
    relevant = {name for query in queries for name in positives(query)} if shown.gold else set[str]()
    (owned,) = opened.of_documents([sorted(relevant | {schema.document_id_of(name) for name in hits})])
    owned = np.unique(owned)
    names = segments.take_rows(opened.passages.select(["passage_id", "document_id"]), owned)
    pairs = zip(names["passage_id"].to_pylist(), names["document_id"].to_pylist(), strict=True)
    ordinals = owned[np.array([passage in hits or document in relevant for passage, document in pairs], dtype=bool)]
    table = segments.take_rows(opened.passages, ordinals)
    return table.append_column(VECTOR, vector_column(opened.vectors.take(ordinals))) if shown.vectors else table


def vector_column(vectors: np.ndarray) -> pa.Array:
    """Vectors, (num_rows, dimension), as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1])


@dataclass(frozen=True, slots=True)
class Found:
    """Where the hits of a job's queries, and the passages that it reads, were committed."""

    hits: str
    """Directory of the hits of each unit; empty: the job reads passages alone."""
    passages: str
    """Directory of the passages, for each shard and unit."""
    num_units: int
    unit_queries: int
    """Queries per unit."""
    num_shards: int = 1

    def number(self, shard: int, unit: int) -> int:
        """The number under which the passages of a shard and a unit were committed."""
        return shard * self.num_units + unit


class OfQuery(NamedTuple):
    """What was found for one query."""

    retrieved: tuple[schema.Passage, ...]
    """The passages of its hits, best first."""
    scores: tuple[float, ...]
    gold: tuple[schema.Passage, ...]
    """The passages of its relevant documents, in the order of the documents; empty if they were not wanted."""
    error: str
    """Why retrieval failed; empty if it succeeded."""


@dataclass(frozen=True, slots=True)
class OfUnit:
    """What was found for a unit of queries."""

    hits: Mapping[str, list[tuple[str, float]]]
    """Query id -> passage id and score of each hit, best first."""
    errors: Mapping[str, str]
    """Query id -> why retrieval failed."""
    passages: Mapping[str, schema.Passage]
    """By passage id, in the order of the index."""
    of_documents: Mapping[str, list[schema.Passage]]
    vectors: Mapping[str, np.ndarray]
    """The stored vector of each passage; empty if they were not wanted."""

    def of(self, query: schema.Query) -> OfQuery:
        """What was found for one of the unit's queries."""
        hits = self.hits.get(query.query_id, [])
        return OfQuery(
            tuple(self.passages[name] for name, _ in hits),
            tuple(score for _, score in hits),
            tuple(passage for name in positives(query) for passage in self.of_documents.get(name, [])),
            self.errors.get(query.query_id, ""),
        )


class Reader:
    """Reads what was found; it keeps the last unit that it read, as a generator takes smaller units than a search."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._last: tuple[int, OfUnit] | None = None

    def read(self, unit: int) -> OfUnit:
        """What was found for a unit of queries."""
        if self._last is None or self._last[0] != unit:
            self._last = (unit, _read_unit(self._found, unit))
        return self._last[1]

    def of(self, queries: Sequence[schema.Query], start: int) -> list[OfQuery]:
        """What was found for consecutive queries, the first of which is in row `start` of all."""
        return [self.read(row // self._found.unit_queries).of(query) for row, query in enumerate(queries, start)]

    def vectors(self, start: int, stop: int) -> Mapping[str, np.ndarray]:
        """The stored vector of each passage that was found for rows `start` to `stop` (excluded) of the queries."""
        size = self._found.unit_queries
        found: dict[str, np.ndarray] = {}
        for unit in range(start // size, (stop - 1) // size + 1):
            found.update(self.read(unit).vectors)
        return found


def _read_unit(found: Found, unit: int) -> OfUnit:
    hits: dict[str, list[tuple[str, float]]] = {}
    errors: dict[str, str] = {}
    if found.hits:
        table = _read(stages.unit_file(found.hits, unit, "hits.parquet"))
        columns = (table[name].to_pylist() for name in ("query_id", "passage_id", "score"))
        for query_id, passage_id, score in zip(*columns, strict=True):
            hits.setdefault(query_id, []).append((passage_id, score))
        marker: dict[str, Any] = json.loads(filesystem.read_text(stages.unit_file(found.hits, unit, "json")))
        errors = {reject["place"]: reject["reason"] for reject in marker["rejects"]}
    numbers = [found.number(shard, unit) for shard in range(found.num_shards)]
    tables = [_read(stages.unit_file(found.passages, number, "passages.parquet")) for number in numbers]
    passages: dict[str, schema.Passage] = {}
    vectors: dict[str, np.ndarray] = {}
    of_documents: dict[str, list[schema.Passage]] = {}
    for table in tables:
        rows = list(schema.from_table(table, schema.Passage))
        passages.update((row.passage_id, row) for row in rows)
        for row in rows:
            of_documents.setdefault(row.document_id, []).append(row)
        if VECTOR in table.column_names and rows:
            flat = table[VECTOR].combine_chunks().flatten().to_numpy()
            vectors.update(zip((row.passage_id for row in rows), flat.reshape(len(rows), -1), strict=True))
    return OfUnit(hits, errors, passages, of_documents, vectors)


def _read(url: str) -> pa.Table:
    with filesystem.fetched(url) as path:
        return pq.read_table(path, page_checksum_verification=True)
