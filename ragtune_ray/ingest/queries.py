"""Reads queries with their gold answers and judged documents."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ragtune_ray import progress
from ragtune_ray.config import Queries
from ragtune_ray.ingest import inputs
from ragtune_ray.ingest.exports import fields, tables
from ragtune_ray.ingest.inputs import Row
from ragtune_ray.ingest.parquet import parquet_rows
from ragtune_ray.ingest.parsing.text import ParseError, clean
from ragtune_ray.ingest.rows import (
    checked_id,
    parse_json,
    query_from_row,
    reject,
    split_name,
    squad_contexts,
)
from ragtune_ray.schema import Message, Query, Reject
from ragtune_ray.storage import filesystem

Placed = tuple[str, Query] | Reject
SUFFIXES = (".jsonl", ".parquet", ".csv", ".tsv", ".json")
"""Files from which questions are read."""
_MAX_QUERY_BYTES = 8 * 2**20
_NESTED = (*fields.TEXTS[4:], *fields.ANSWERS, *fields.NESTED, "document_ids", "document_id", "relevances", "messages")


def read_queries(path: str, split: str = "all", notices: fields.Notices | None = None) -> Iterator[Query | Reject]:
    """Read the queries of a .jsonl, .parquet, .csv or .json file or a BEIR folder, with a reject for each bad row.

    Args:
        path: local or any fsspec URL.
        split: `all`, or only the queries of this split; in BEIR, those judged in the qrels file of that name.
        notices: counts what was read as meant, or not read; None: it is said as progress, once per process.

    Raises:
        InputError: the path is missing or unreadable, one id has two texts, or no query has the split.
    """
    store, inner = inputs.locate(path)
    root = filesystem.absolute(path)
    if not store.isdir(inner):
        if store.size(inner) == 0:
            raise inputs.InputError(f"{path}: the file is empty (0 bytes)")
        if PurePosixPath(root).suffix.lower() not in SUFFIXES:
            raise inputs.InputError(
                f"{path}: queries are read from {' '.join(SUFFIXES)} (a list, or SQuAD) or a BEIR folder"
            )
        return _unique(_with_split(_noted(_query_rows(root), path, notices), split, path))
    if not store.exists(filesystem.join(inner, "queries.jsonl")):
        raise inputs.InputError(f"{path}: a folder of queries must be BEIR, with a queries.jsonl; or name a file")
    return _unique(_beir_queries(root, _qrels_files(root, split), split, notices))


def require_same_files(path: str, sha256: str) -> None:
    """Raise a ChangedError if `files_sha256` of a path is no longer this."""
    if files_sha256(path) != sha256:
        raise inputs.changed(path, "read")


def files_sha256(path: str) -> str:
    """One digest of all files from which the queries of a path are read.

    Raises:
        InputError: the path is missing.
    """
    store, inner = inputs.locate(path)
    root = filesystem.absolute(path)
    files = [root]
    if store.isdir(inner):
        folder = filesystem.join(root, "qrels")
        names = [name for name in filesystem.list_names(folder) if name.endswith(".tsv")]
        files = [filesystem.join(root, "queries.jsonl"), *(filesystem.join(folder, name) for name in names)]
    digest = hashlib.sha256()
    for file in files:
        with inputs.open_file(file) as opened:
            while block := opened.read(inputs.BLOCK_BYTES):
                digest.update(block)
        digest.update(f"\0{file}\0".encode())
    return digest.hexdigest()


def may_stand_in_corpus(given: Queries) -> bool:
    """Whether a query may be a document of its corpus, with the same id: see `queries.own_documents`."""
    if given.own_documents != "auto":
        return given.own_documents == "leave_out"
    store, inner = inputs.locate(given.path)
    return bool(store.isdir(inner))


def _query_rows(path: str) -> Iterator[Row]:
    try:
        match PurePosixPath(path).suffix.lower():
            case ".jsonl":
                yield from inputs.jsonl_rows(inputs.read_lines(path, _MAX_QUERY_BYTES))
            case ".parquet":
                yield from parquet_rows(path, (), fields.TEXTS[:4], _NESTED)
            case ".json":
                yield from _json_rows(path, parse_json(inputs.read_file(path)))
            case _:
                yield from ((f"{path}#{number}", row) for number, row in tables.csv_rows(inputs.read_file(path)))
    except ParseError as error:
        raise inputs.InputError(f"{path}: {error}") from None


def _json_rows(path: str, data: Any) -> Iterator[Row]:
    if (rows := tables.listed(data)) is None:
        yield from _squad_questions(path, data)
        return
    yield from ((f"{path}#{number}", row) for number, row in enumerate(rows))


def _squad_questions(path: str, data: Any) -> Iterator[Row]:
    ordinals = itertools.count()
    for context in squad_contexts(data):
        for question, ordinal in zip(context.questions, ordinals, strict=False):
            row = question
            if isinstance(question, dict):
                answers = [] if question.get("is_impossible") is True else question.get("answers")
                row = {"id": question.get("id"), "question": question.get("question"), "answers": answers}
                row["document_id"] = context.document_id
            yield f"{path}#{ordinal}", row


def _noted(rows: Iterable[Row], path: str, notices: fields.Notices | None) -> Iterator[Placed]:
    """The queries of rows; says at the end what was noted, if nobody else counts it."""
    if notices is not None:
        yield from _queries(rows, notices)
        return
    counted: fields.Notices = Counter()
    yield from _queries(rows, counted)
    for line in fields.lines(Counter({text: n for text, n in counted.items() if not text.startswith(fields.UNREAD)})):
        _say_once(f"{path}: {line}")


@functools.cache
def _say_once(line: str) -> None:
    progress.say(line)


def _queries(rows: Iterable[Row], notices: fields.Notices) -> Iterator[Placed]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        place, value = row
        try:
            yield place, query_from_row(value, notices)
        except ParseError as error:
            yield reject(place, str(error), "row")


def _with_split(queries: Iterable[Placed], split: str, path: str) -> Iterator[Placed]:
    found: set[str] = set()
    for query in queries:
        if not isinstance(query, Reject):
            found.add(query[1].split)
        if isinstance(query, Reject) or split in ("all", query[1].split):
            yield query
    if split != "all" and split not in found:
        raise inputs.InputError(
            f"{path}: no query has split {split!r}; found: {', '.join(sorted(found)) or 'no queries'}. Give the queries a "
            "`split`, or let queries.split_by=document draw them"
        )


def _unique(queries: Iterable[Placed]) -> Iterator[Query | Reject]:
    seen: dict[str, tuple[tuple[str, tuple[Message, ...]], str]] = {}
    for item in queries:
        if isinstance(item, Reject):
            yield item
            continue
        place, query = item
        asked = (query.text, query.messages)
        first, first_place = seen.setdefault(query.query_id, (asked, place))
        if first != asked:
            raise inputs.InputError(
                f"query id {query.query_id!r} has two {'texts' if first[0] != query.text else 'conversations'}, at {first_place} "
                f"and {place}; ids must be unique"
            )
        reason = f"query id {query.query_id!r} is already used at {first_place}"
        yield query if first_place == place else reject(place, reason, "row")


def _qrels_files(root: str, split: str) -> dict[str, str]:
    """Path -> split of the qrels files to use."""
    folder = filesystem.join(root, "qrels")
    store, inner = filesystem.locate(folder)
    names = store.ls(inner, detail=False) if store.isdir(inner) else []
    stems = sorted(PurePosixPath(name).stem for name in names if name.endswith(".tsv"))
    files = {filesystem.join(folder, f"{stem}.tsv"): split_name(stem) for stem in stems}
    kept = {path: name for path, name in files.items() if split in ("all", name)}
    if split != "all" and not kept:
        found = ", ".join(stems) or "nothing"
        raise inputs.InputError(f"{root}: no qrels file for split {split!r}; qrels/ contains: {found}")
    return kept


def _beir_queries(root: str, files: dict[str, str], split: str, notices: fields.Notices | None) -> Iterator[Placed]:
    judged: dict[str, dict[str, float]] = {}
    splits: dict[str, str] = {}
    for path, name in files.items():
        for row in _qrels_rows(path):
            if isinstance(row, Reject):
                yield row
                continue
            query_id, document_id, relevance = row
            documents = judged.setdefault(query_id, {})
            documents[document_id] = max(relevance, documents.get(document_id, relevance))
            splits[query_id] = name if splits.get(query_id, name) == name else "all"
    missing = set(judged)
    path = filesystem.join(root, "queries.jsonl")
    for item in _noted(inputs.jsonl_rows(inputs.read_lines(path, _MAX_QUERY_BYTES)), root, notices):
        if isinstance(item, Reject):
            yield item
            continue
        place, query = item
        missing.discard(query.query_id)
        if documents := judged.get(query.query_id, {}):
            relevances = tuple(documents.values())
            query = replace(query, document_ids=tuple(documents), relevances=relevances, split=splits[query.query_id])
        if documents or split == "all":
            yield place, query
    if missing:
        yield reject(path, f"{len(missing):,} judged queries are missing here, such as {min(missing)!r}", "file")


def _qrels_rows(path: str) -> Iterator[tuple[str, str, float] | Reject]:
    for line in inputs.read_lines(path, _MAX_QUERY_BYTES):
        if isinstance(line, Reject):
            yield line
            continue
        place, data = line
        try:
            *ids, score = clean(data.decode()).rstrip("\n").split("\t")
            query_id, document_id = (checked_id(each, "an id of qrels") for each in ids)
            relevance = float(score)
        except ValueError:
            if not place.endswith(":1"):  # the header
                yield reject(place, "a line of qrels must be query-id TAB corpus-id TAB score, in UTF-8", "row")
            continue
        if math.isfinite(relevance):
            yield query_id, document_id, relevance
        else:
            yield reject(place, f"score {score} is not a finite number", "row")
