"""Divides queries into train, validation and test so that no document is relevant in two of them.

Documents that are relevant to the same query stay together, and so do documents of one folder if `by` is `folder`. The
split of such a group depends only on its name and the seed: it does not change when the corpus grows, and two files of
questions on the same documents agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from ragtune_ray import RagtuneError, config
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.schema import Query, Reject

SPLITS = ("train", "validation", "test")
SHOWN_DOCUMENTS = 3


class LeakError(RagtuneError, ValueError):
    """A document is relevant to queries of two splits."""


def group_of(document_id: str, by: Literal["document", "folder"]) -> str:
    """The name of the group of documents that stay in one split.

    >>> group_of("Amazon_rainforest/3", "folder"), group_of("notes.md", "folder")
    ('Amazon_rainforest', 'notes.md')
    """
    return (document_id.rpartition("/")[0] or document_id) if by == "folder" else document_id


def positives(query: Query) -> tuple[str, ...]:
    """The documents that are relevant to a query."""
    return tuple(name for name, value in zip(query.document_ids, query.relevances, strict=True) if value > 0)


def assign_splits(
    queries: Iterable[Query], by: Literal["document", "folder"], shares: Sequence[float], seed: int
) -> dict[str, str]:
    """Draw the split of every query, by query_id.

    A query without relevant documents is a group of its own.

    Args:
        queries: all queries; their own `split` is ignored.
        by: which documents stay together; see `group_of`.
        shares: relative chances that a group is drawn for train, validation and test.
        seed: of the draw.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    first_group = {}
    for query in queries:
        groups = [group_of(name, by) for name in positives(query)] or [f"\0{query.query_id}"]
        first_group[query.query_id] = groups[0]
        for group in groups:
            low, high = sorted((root(group), root(groups[0])))
            parents[high] = low
    total = sum(shares)
    ends = [sum(shares[: number + 1]) / total for number in range(len(SPLITS))]
    return {
        query_id: next(split for split, end in zip(SPLITS, ends, strict=True) if draw(root(group), seed) < end)
        for query_id, group in first_group.items()
    }


def draw(name: str, seed: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on the seed and the name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def selected_queries(settings: config.Queries) -> Iterator[Query | Reject]:
    """The queries of `queries.split`, with a reject for each bad row.

    Unless `split_by` is `given`, the file is read twice: first to draw the splits, then for the queries.

    Raises:
        InputError: the queries cannot be read.
    """
    if settings.split_by == "given":
        yield from read_queries(settings.path, settings.split)
        return
    rows = (row for row in read_queries(settings.path) if isinstance(row, Query))
    splits = assign_splits(rows, settings.split_by, settings.split_shares, settings.split_seed)
    for row in read_queries(settings.path):
        if isinstance(row, Reject):
            yield row
        elif settings.split in ("all", splits[row.query_id]):
            yield dataclasses.replace(row, split=splits[row.query_id])


def check_leaks(splits: Mapping[str, Iterable[Query]]) -> None:
    """Raise a LeakError if two splits (name -> queries) share a relevant document."""
    seen: dict[str, str] = {}
    for split, queries in splits.items():
        shared: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for query in queries for name in positives(query)):
            other = seen.setdefault(name, split)
            if other != split:
                shared.setdefault(other, []).append(name)
        for other, names in shared.items():
            shown = ", ".join(map(repr, names[:SHOWN_DOCUMENTS])) + (", ..." if len(names) > SHOWN_DOCUMENTS else "")
            raise LeakError(
                f"{len(names)} document(s) are relevant to queries of both {other} and {split} ({shown}): a model would be "
                "tested on documents that it was trained on; set queries.split_by=document, or correct the split column"
            )
