"""Reads the documents of a unit of the input."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import inputs, listing, sidecars
from ragtune_ray.ingest.input_units import Unit
from ragtune_ray.ingest.inputs import Row
from ragtune_ray.ingest.parquet import ALL_ROWS, RowsRead, count_rows, parquet_rows
from ragtune_ray.ingest.parser_process import parse_file
from ragtune_ray.ingest.parsing.tally import Tally
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, TransientError
from ragtune_ray.ingest.rows import (
    DOCUMENT_IDS,
    Context,
    document_from_row,
    parse_json,
    reject,
    squad_contexts,
)
from ragtune_ray.schema import Document, Reject
from ragtune_ray.storage import checksums, filesystem

_UNREADABLE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of opening a file that no plan names, and of one that may not be read."""
_EMPTY = "the file contains no documents"


@dataclass(slots=True)
class UnitRead:
    """What was read of a unit; complete after its last document."""

    tally: Tally = field(default_factory=Tally)
    num_lines: int = 0
    """Lines that begin in the unit, blank ones included; 0 for formats without lines."""
    sha256: str = ""
    """Of the bytes from which the documents were read."""
    unread: tuple[str, ...] = ()
    """Columns of a Parquet file that were left unread, with their types; only of the unit in which the file begins."""


def read_documents(
    unit: Unit, corpus: Corpus, found: UnitRead | None = None, rows: range = ALL_ROWS
) -> Iterator[Document | Reject]:
    """Read the documents of one unit in order, with a reject for each bad row or file; memory use stays constant.

    To a part of a file belong the lines that begin in it, the Parquet row groups that begin in it, or its share of the
    contexts of SQuAD JSON. Lines are numbered from the first of the unit; `inputs.resolve_place` makes that absolute.

    `rows` are the rows of Parquet, or contexts of SQuAD, to read of those in the unit; a probe reads only some.

    Files, lines and texts longer than `corpus.max_document_bytes` are rejected, and files that hang or crash their parser.

    Raises:
        ChangedError: a file is no longer the one that was planned. Documents may have been returned before, so that only
            a unit that was read to its end may be used.
    """
    found = found or UnitRead()
    if unit.format == "files":
        yield from _file_documents(unit, corpus, found)
        return
    (path,) = unit.paths
    try:
        with listing.unchanged(path, *unit.stamps or ("",)):
            for row in _document_rows(unit, corpus.max_document_bytes, found, rows):
                yield row if isinstance(row, Reject) else _document(*row, corpus.max_document_bytes)
    except PermissionError as error:
        if unit.start == 0:  # each part of the file meets the same
            yield reject(path, inputs.why_unreadable(error), "file", is_transient=True)


def _file_documents(unit: Unit, corpus: Corpus, found: UnitRead) -> Iterator[Document | Reject]:
    digest = hashlib.sha256()
    for path, stamp, sidecar in itertools.zip_longest(unit.paths, unit.stamps, unit.sidecars, fillvalue=""):
        try:
            name = path.removeprefix(unit.root).lstrip("/")
            digest.update(f"{name}\0".encode())
            with listing.unchanged(path, stamp):
                data = _read_small(path, corpus.max_document_bytes, digest)
                modified = filesystem.modified(path) if corpus.file_times else ""
            parsed = parse_file(path, data, corpus)
            stated = _stated(sidecars.path_of(path), sidecar, digest) if sidecar else {}
            if parsed.rows:
                yield from _sheet_documents(path, name, parsed, corpus, stated)
                found.tally.characters(path, parsed)
                continue
            title = stated.pop("title", None) or parsed.title
            metadata = {**sidecars.place_of(name), **parsed.metadata, **stated}
            row = {"document_id": name, "title": title, "text": parsed.text, "metadata": metadata}
            document = document_from_row(row, path, corpus.max_document_bytes)
            found.tally.characters(path, parsed)
            yield replace(document, page_starts=parsed.page_starts, modified=modified)
        except (ParseError, *_UNREADABLE) as error:
            # Rights may change while the file stays the same.
            reason, is_transient = inputs.why_unreadable(error), isinstance(error, TransientError | OSError)
            yield reject(path, reason, "file", is_transient=is_transient)
    found.sha256 = digest.hexdigest()


def _sheet_documents(
    path: str, name: str, parsed: ParsedFile, corpus: Corpus, stated: dict[str, Any]
) -> Iterator[Document | Reject]:
    """The rows of a spreadsheet as documents, with what its sidecar states; the id of one without is `PATH#SHEET!ROW`."""
    shared = {key: value for key, value in stated.items() if key not in (*DOCUMENT_IDS, "text")}
    for place, row in parsed.rows:
        named = row if any(key in row for key in DOCUMENT_IDS) else {"document_id": f"{name}#{place}", **row}
        yield _document(f"{path}#{place}", {**shared, **named}, corpus.max_document_bytes)


def _stated(path: str, stamp: str, digest: Any) -> dict[str, Any]:
    """What a sidecar says."""
    with listing.unchanged(path, stamp):
        return sidecars.parse(_read_small(path, sidecars.MAX_BYTES, digest))


def _read_small(path: str, max_bytes: int, digest: Any) -> bytes:
    """The content of a file, which is added to the digest."""
    with inputs.open_file(path) as file:
        data: bytes = file.read(max_bytes + 1)
        size_bytes = file.seek(0, os.SEEK_END)
    digest.update(f"{size_bytes} ".encode())
    digest.update(data)
    if size_bytes > max_bytes:
        raise ParseError(f"file of {size_bytes:,} bytes is longer than max_document_bytes ({max_bytes:,})")
    return data


def _document_rows(unit: Unit, max_document_bytes: int, found: UnitRead, rows: range) -> Iterator[Row]:
    (path,) = unit.paths
    match unit.format:
        case "jsonl":
            lines = inputs.LinesRead()
            yield from inputs.jsonl_rows(inputs.read_lines(path, max_document_bytes, unit.start, unit.stop, lines))
            found.num_lines, found.sha256 = lines.num_lines, lines.digest.hexdigest()
        case "parquet":
            yield from _table_rows(unit, found, rows)
        case _:
            yield from _squad_documents(unit, found, rows)


def _table_rows(unit: Unit, found: UnitRead, rows: range) -> Iterator[Row]:
    (path,) = unit.paths
    table = RowsRead()
    reason = ""
    try:
        yield from parquet_rows(path, DOCUMENT_IDS, ("text",), ("metadata",), unit.start, unit.stop, table, rows)
    except ParseError as error:
        reason = str(error)
    found.sha256 = table.sha256
    if unit.start == 0:
        found.unread = table.unread
        reason = reason if table.num_rows != 0 else _EMPTY
    # Each part of a file meets its broken footer, but only one meets a broken row group.
    if reason and (unit.start == 0 or table.num_rows is not None):
        yield reject(path, reason, "file")


def _document(place: str, value: Any, max_document_bytes: int) -> Document | Reject:
    try:
        return document_from_row(value, place, max_document_bytes)
    except ParseError as error:
        return reject(place, str(error), "row")


def _squad_documents(unit: Unit, found: UnitRead, rows: range) -> Iterator[Row]:
    (path,) = unit.paths
    data = inputs.read_file(path)
    found.sha256 = checksums.bytes_sha256(data)
    contexts: list[Context] = []
    reason = _EMPTY
    try:
        contexts = list(squad_contexts(parse_json(data)))
    except ParseError as error:
        reason = str(error)
    if not contexts and unit.start == 0:
        yield reject(path, reason, "file")
    for context in contexts[_share(unit, len(contexts), len(data))][rows.start : rows.stop]:
        if not context.is_repeat:
            row = {"document_id": context.document_id, "title": context.title, "text": context.text}
            yield f"{path}#{context.ordinal}", row


def num_rows(unit: Unit) -> int:
    """How many rows of Parquet, or contexts of SQuAD, belong to a unit; 0 for a broken file."""
    (path,) = unit.paths
    if unit.format == "parquet":
        return count_rows(path, unit.start, unit.stop)
    data = inputs.read_file(path)
    with contextlib.suppress(ParseError):
        contexts = range(sum(1 for _ in squad_contexts(parse_json(data))))
        return len(contexts[_share(unit, len(contexts), len(data))])
    return 0


def _share(unit: Unit, num_contexts: int, size_bytes: int) -> slice:
    """Which contexts of a SQuAD file of this size belong to a unit."""
    first, stop = (num_contexts * min(byte, size_bytes) // max(1, size_bytes) for byte in (unit.start, unit.stop))
    return slice(first, stop)
