"""Reads one unit of the input: documents, and the passages of those that the base version lacks."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from ragtune_ray import config, schema
from ragtune_ray.cluster.indexing import units
from ragtune_ray.index import contents, segments
from ragtune_ray.ingest import input_units, readers, rows

if TYPE_CHECKING:
    from ragtune_ray.models.encoder import TokenCounter

Item: TypeAlias = schema.Document | schema.Reject
DOCUMENTS_AT_ONCE = 256
BYTES_AT_ONCE = 4 * 2**20
_PASSAGE_NAMES = schema.arrow_schema(schema.Passage).names


def read_unit(unit: input_units.Unit, settings: config.Config, known: contents.KnownDocuments) -> units.ReadUnit:
    """Read a unit and chunk the documents that are not known.

    Raises:
        ChangedError: a file is no longer the one that was listed.
    """
    from ragtune_ray.models.encoder import load_token_counter

    counter = load_token_counter(settings.encoder)
    found = readers.UnitRead()
    items = with_tenant(readers.read_documents(unit, settings.corpus, found), settings.index.tenant_field)
    rejects: list[schema.Reject] = []
    documents: list[dict[str, Any]] = []
    passages: list[pa.Table] = []
    too_long = 0
    first_of_id: dict[str, int] = {}
    for group in _groups(items):
        for item in group:
            found.tally.of(item)
        rejects += [item for item in group if isinstance(item, schema.Reject)]
        read = [item for item in group if isinstance(item, schema.Document)]
        records = _document_rows(read, len(documents), known)
        documents += records
        new = [
            (document, row)
            for document, row in zip(read, records, strict=True)
            # A copy within the unit needs no passages. `documents.find_duplicates` reports it, like those in other units.
            if not row["is_known"]
            and first_of_id.setdefault(row["document_id"], row["document_number"]) == row["document_number"]
        ]
        cut = _chunk([document for document, _ in new], counter, settings.chunking)
        too_long += _num_too_long(counter, settings.chunking, [passage.text for each in cut for passage in each])
        made = [_passage_row(each, row) for (_, row), part in zip(new, cut, strict=True) for each in part]
        passages.append(_with_tokens(pa.Table.from_pylist(made, schema=units.PASSAGES_SCHEMA), counter))
    facts: units.ReadFacts = {
        "known": sum(row["is_known"] for row in documents),
        "num_lines": found.num_lines,
        "sha256": found.sha256,
        "kinds": found.tally.counts(),
        "unread": list(found.unread),
        "too_long": too_long,
        "max_tokens": counter.max_tokens,
    }
    table = pa.Table.from_pylist(documents, schema=units.DOCUMENTS_SCHEMA)
    joined = pa.concat_tables(passages).combine_chunks() if passages else units.PASSAGES_SCHEMA.empty_table()
    return units.ReadUnit(joined, table, rejects, facts)


def with_tenant(items: Iterable[Item], tenant_field: str) -> Iterator[Item]:
    """The items, with a reject for each document whose metadata does not name its tenant in this field ("" for any)."""
    for item in items:
        if tenant_field and isinstance(item, schema.Document):
            reason = rows.missing_tenant(item, tenant_field)
            if reason:
                yield rows.reject(item.place, reason, "row")
                continue
        yield item


def _chunk(
    documents: list[schema.Document], counter: TokenCounter, chunking: config.Chunking
) -> list[list[schema.Passage]]:
    from ragtune_ray.ingest.chunking import chunk_all

    size = chunking.size_tokens - counter.num_added_tokens
    cut = chunk_all(documents, counter.token_spans, size, chunking.overlap_tokens)
    return [list(with_place(document, passages)) for document, passages in zip(documents, cut, strict=True)]


def _with_tokens(passages: pa.Table, counter: TokenCounter) -> pa.Table:
    """The passages with their token ids, so that an encoder on a GPU need not wait for its tokenizer."""
    if counter.token_ids is None:
        return passages
    found = counter.token_ids(passages["text"].to_pylist()) if passages.num_rows else []
    return passages.append_column("tokens", pa.array(found, pa.list_(pa.int32())))


def _num_too_long(counter: TokenCounter, chunking: config.Chunking, texts: list[str]) -> int:
    if not texts or chunking.size_tokens <= counter.max_tokens:
        return 0  # chunking keeps passages within the limit
    return sum(len(spans) + counter.num_added_tokens > counter.max_tokens for spans in counter.token_spans(texts))


def _groups(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Groups of a few hundred documents or a few megabytes: large enough to tokenize fast, smaller than a unit."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += len(item.text) if isinstance(item, schema.Document) else 0
        if len(group) >= DOCUMENTS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def with_place(document: schema.Document, passages: Iterable[schema.Passage]) -> Iterator[schema.Passage]:
    """The passages of a document, with their pages and the document's `modified` in their metadata."""
    if not document.page_starts and not document.modified:
        yield from passages
        return
    values = json.loads(document.metadata)
    values |= {"modified": document.modified} if document.modified else {}
    for passage in passages:
        page = bisect.bisect_right(document.page_starts, passage.start)
        placed = values | ({schema.PAGE: page} if page else {})
        yield dataclasses.replace(passage, metadata=json.dumps(placed, sort_keys=True, ensure_ascii=False))


def _passage_row(passage: schema.Passage, document: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: getattr(passage, name) for name in _PASSAGE_NAMES},
        "document_number": document["document_number"],
        "fingerprint": document["fingerprint"],
    }


def _document_rows(
    documents: list[schema.Document], first_number: int, known: contents.KnownDocuments
) -> list[dict[str, Any]]:
    ids = [document.document_id for document in documents]
    fingerprints = [segments.document_fingerprint(document) for document in documents]
    are_known = known.contain(ids, fingerprints)
    keys = segments.document_keys(ids)
    return [
        {
            "key": int(keys[place]),
            "document_id": document.document_id,
            "fingerprint": fingerprints[place],
            "is_known": are_known[place],
            "text_sha256": hashlib.sha256(document.text.encode()).digest(),
            "place": document.place,
            "document_number": first_number + place,
            # `units.placed` sets these, when it is known which passages have a vector.
            "first": 0,
            "count": 0,
        }
        for place, document in enumerate(documents)
    ]
