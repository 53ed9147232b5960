"""Queries -> train, validation and test, drawn by document so that nothing learnt can be looked up in the exam.

In: queries with their judged documents, and how documents belong together. Out: the split of each query, or an error where one
document stands on two sides. This module knows nothing of models, indexes or Ray.

Documents that one query judges relevant together are kept together, and so are those that share a folder where that is asked
for. A group's name and the seed alone decide its split: it stays there whatever is added to the corpus, and two files of
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

__all__ = ["SPLITS", "LeakError", "assign_splits", "check_leaks", "draw", "group_of", "positives", "selected_queries"]

SPLITS = ("train", "validation", "test")
SHOWN_DOCUMENTS = 3


class LeakError(RagtuneError, ValueError):
    """A document is a positive of queries of two splits; the message names some and the way out."""


def group_of(document_id: str, by: Literal["document", "folder"]) -> str:
    """What a document must not be parted from.

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
    """The split of every query, by query_id.

    A query without relevant documents is a group of its own: nothing is known that it could leak.

    Args:
        queries: all of them, whatever their own split says.
        by: what belongs together, `group_of`.
        shares: relative sizes of train, validation and test: the chance of a group to fall there.
        seed: another one draws other splits.
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
    """A number in [0, 1) that only the seed and the name decide."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def selected_queries(settings: config.Queries) -> Iterator[Query | Reject]:
    """The queries of `queries.split`, and a reject for each row that gives none.

    With `split_by` other than `given` the file is read twice: once for its documents, once for its queries.

    Raises:
        inputs.InputError: they cannot be read.
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
    """Refuse splits of which two share a relevant document.

    Args:
        splits: name -> its queries.

    Raises:
        LeakError: names the splits and some documents.
    """
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
                f"{len(names)} document(s) are relevant to queries of both {other} and {split} ({shown}): what is trained on "
                "them would be examined on them; set queries.split_by=document, or mend the queries' split column"
            )
