"""Divides queries into train, validation and test so that no document is relevant in two of them.

Documents that are relevant to the same query stay together, and so do documents of one folder if `by` is `folder`. Without
`queries.split_record`, the split of such a group depends only on its name and the seed: it does not change when the corpus
grows, and two files of questions on the same documents agree, but the sizes of the splits are left to chance. With it, the
splits keep to their shares, and a file records them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from ragtune_ray import RagtuneError, config
from ragtune_ray.ingest import balanced_splits
from ragtune_ray.ingest.balanced_splits import SPLITS, SplitRecord
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.schema import Query, Reject
from ragtune_ray.storage import filesystem

AnswerKind: TypeAlias = Literal["answerable", "unanswerable", "unlabelled"]
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


def groups_of(query: Query, by: Literal["document", "folder"]) -> list[str]:
    """The groups of a query's relevant documents; a query without any is a group of its own."""
    return list(dict.fromkeys(group_of(name, by) for name in positives(query))) or [f"\0{query.query_id}"]


def linked_groups(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Group -> the first name, in order, of all groups that queries link to it; `groups` are those of each query."""
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    for linked in groups:
        for group in linked:
            low, high = sorted((root(group), root(linked[0])))
            parents[high] = low
    return {group: root(group) for group in list(parents)}


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
    groups = {query.query_id: groups_of(query, by) for query in queries}
    roots = linked_groups(groups.values())
    total = sum(shares)
    ends = [sum(shares[: number + 1]) / total for number in range(len(SPLITS))]
    return {
        query_id: next(split for split, end in zip(SPLITS, ends, strict=True) if draw(roots[linked[0]], seed) < end)
        for query_id, linked in groups.items()
    }


def draw(name: str, seed: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on the seed and the name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def record_splits(queries: Iterable[Query], settings: config.Queries, *, write: bool = True) -> dict[str, str]:
    """The split of every query by `queries.split_record`, which new documents are added to; "" if a query fits in none.

    Documents in the record keep their split. The others are placed so that the splits of these queries keep to their
    shares. Answerable, unanswerable and unlabelled questions, and documents with few and many questions, are divided alike
    (`balanced_splits`). A new query whose documents are already in different splits fits in none.

    Args:
        queries: all queries; their own `split` is ignored.
        settings: `split_by`, `split_shares`, `split_seed` and `split_record`.
        write: whether new documents are added to the file.

    Raises:
        InputError: the record is damaged, or was drawn with another `split_by` or `split_seed`.
    """
    by, seed, url = settings.split_by, settings.split_seed, settings.split_record
    assert by != "given"
    known = balanced_splits.read_record(url)
    if known and (known.by, known.seed) != (by, seed):
        raise InputError(
            f"{url}: was drawn with queries.split_by={known.by} and split_seed={known.seed}, but this config has {by} and "
            f"{seed}; set them back, or name another file in queries.split_record"
        )
    kept = known.groups if known else {}
    groups: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for query in queries:
        groups[query.query_id] = groups_of(query, by)
        kinds[query.query_id] = answer_kind(query)
    found = _filled(groups, kinds, kept, dict(zip(SPLITS, settings.split_shares, strict=True)), seed)
    if write and found.keys() - kept.keys():
        record = dataclasses.replace(known, groups={**kept, **found}) if known else SplitRecord.of(by, seed, found)
        filesystem.replace_text(url, record.text())
    in_splits = {query_id: {found[group] for group in linked} for query_id, linked in groups.items()}
    return {query_id: min(splits) if len(splits) == 1 else "" for query_id, splits in in_splits.items()}


def answer_kind(query: Query) -> AnswerKind:
    """Whether a query has a gold answer, is known to have none, or is unlabelled."""
    return "unlabelled" if query.answers is None else "answerable" if query.answers else "unanswerable"


def _filled(
    groups: Mapping[str, Sequence[str]],
    kinds: Mapping[str, str],
    kept: Mapping[str, str],
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, str]:
    """Group -> split; `groups` and `kinds` are those of each query, by its id."""
    roots = linked_groups(groups.values())
    counts: dict[str, Counter[str]] = {root: Counter() for root in roots.values()}
    for query_id, linked in groups.items():
        counts[roots[linked[0]]].update([balanced_splits.TOTAL, kinds[query_id]])
    for counted in counts.values():
        size = counted[balanced_splits.TOTAL]
        counted[f"of documents with {size.bit_length()} binary digits of questions"] = size
    placed = {roots[group]: split for group, split in sorted(kept.items(), reverse=True) if group in roots}
    drawn = {name: counts[name] for name in sorted(counts, key=lambda name: draw(name, seed))}
    filled = balanced_splits.fill(drawn, placed, shares)
    return {group: kept.get(group, filled[root]) for group, root in roots.items()}


def selected_queries(settings: config.Queries, *, write: bool = True) -> Iterator[Query | Reject]:
    """The queries of `queries.split`, with a reject for each bad row.

    Unless `split_by` is `given`, all queries are kept in memory to draw their splits: a second reading could find others.
    `write` is that of `record_splits`.

    Raises:
        InputError: the queries cannot be read, or the record of their splits cannot be used.
    """
    if settings.split_by == "given":
        yield from read_queries(settings.path, settings.split)
        return
    rows = list(read_queries(settings.path))
    queries = [row for row in rows if isinstance(row, Query)]
    if settings.split_record:
        splits = record_splits(queries, settings, write=write)
    else:
        splits = assign_splits(queries, settings.split_by, settings.split_shares, settings.split_seed)
    for row in rows:
        if isinstance(row, Reject):
            yield row
        elif not splits[row.query_id]:
            yield Reject(
                f"{settings.path}: query {row.query_id!r}",
                f"its relevant documents are in different splits of {settings.split_record}, so it fits in none",
                "row",
            )
        elif settings.split in ("all", splits[row.query_id]):
            yield dataclasses.replace(row, split=splits[row.query_id])


def record_id(settings: config.Queries) -> str:
    """Identity of the draw in `queries.split_record`; empty if there is no such file or splits are not drawn."""
    is_used = settings.split_record and settings.split_by != "given"
    record = balanced_splits.read_record(settings.split_record) if is_used else None
    return record.identity if record else ""


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
