"""Reads queries with their gold answers and judged documents."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from ragtune_ray.config import Queries
from ragtune_ray.ingest import inputs
from ragtune_ray.ingest.inputs import Row
from ragtune_ray.ingest.parquet import parquet_rows
from ragtune_ray.ingest.parsing.text import ParseError, clean
from ragtune_ray.ingest.rows import (
    QUERY_ANSWERS,
    QUERY_IDS,
    QUERY_TEXTS,
    checked_id,
    query_from_row,
    reject,
    split_name,
)
from ragtune_ray.schema import Message, Query, Reject
from ragtune_ray.storage import filesystem

Placed = tuple[str, Query] | Reject
_MAX_QUERY_BYTES = 8 * 2**20


def read_queries(path: str, split: str = "all") -> Iterator[Query | Reject]:
    """Read the queries of a .jsonl or .parquet file, SQuAD JSON or a BEIR folder, with a reject for each bad row.

    Args:
        path: local or any fsspec URL.
        split: `all`, or only the queries of this split; in BEIR, those judged in the qrels file of that name.

    Raises:
        InputError: the path is missing or unreadable, one id has two texts, or no query has the split.
    """
    store, inner = inputs.locate(path)
    root = filesystem.absolute(path)
    if not store.isdir(inner):
        if store.size(inner) == 0:
            raise inputs.InputError(f"{path}: the file is empty (0 bytes)")
        if PurePosixPath(root).suffix.lower() not in (".jsonl", ".parquet", ".json"):
            raise inputs.InputError(f"{path}: queries are read from .jsonl, .parquet, SQuAD .json or a BEIR folder")
        return _unique(_with_split(_queries(_query_rows(root)), split, path))
    if not store.exists(filesystem.join(inner, "queries.jsonl")):
        raise inputs.InputError(f"{path}: a folder of queries must be BEIR, with a queries.jsonl; or name a file")
    return _unique(_beir_queries(root, _qrels_files(root, split), split))


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
        match inputs.format_of(path):
            case "jsonl":
                yield from inputs.jsonl_rows(inputs.read_lines(path, _MAX_QUERY_BYTES))
            case "parquet":
                yield from parquet_rows(
                    path, QUERY_IDS, QUERY_TEXTS, (*QUERY_ANSWERS, "document_ids", "relevances", "messages")
                )
            case _:
                yield from _squad_questions(path)
    except ParseError as error:
        raise inputs.InputError(f"{path}: {error}") from None


def _squad_questions(path: str) -> Iterator[Row]:
    ordinals = itertools.count()
    for context in inputs.read_squad(path):
        for question, ordinal in zip(context.questions, ordinals, strict=False):
            row = question
            if isinstance(question, dict):
                answers = [] if question.get("is_impossible") is True else question.get("answers")
                row = {"id": question.get("id"), "question": question.get("question"), "answers": answers}
                row["document_id"] = context.document_id
            yield f"{path}#{ordinal}", row


def _queries(rows: Iterable[Row]) -> Iterator[Placed]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        place, value = row
        try:
            yield place, query_from_row(value)
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
                f"query id {query.query_id!r} has two texts, at {first_place} and {place}; ids must be unique"
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


def _beir_queries(root: str, files: dict[str, str], split: str) -> Iterator[Placed]:
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
    for item in _queries(inputs.jsonl_rows(inputs.read_lines(path, _MAX_QUERY_BYTES))):
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
