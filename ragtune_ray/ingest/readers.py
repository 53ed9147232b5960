"""Reads the documents of a unit of the input."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import inputs, sidecars
from ragtune_ray.ingest.input_units import Unit
from ragtune_ray.ingest.inputs import Row
from ragtune_ray.ingest.parquet import parquet_rows
from ragtune_ray.ingest.parser_process import parse_file
from ragtune_ray.ingest.parsing.tally import Tally
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, TransientError
from ragtune_ray.ingest.rows import DOCUMENT_IDS, document_from_row, reject
from ragtune_ray.schema import Document, Reject
from ragtune_ray.storage import filesystem

_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of opening a file; if it was planned, it could be opened then."""


def read_documents(unit: Unit, corpus: Corpus, tally: Tally | None = None) -> Iterator[Document | Reject]:
    """Read the documents of one unit in order, with a reject for each bad row or file; memory use stays constant.

    Files, lines and texts longer than `corpus.max_document_bytes` are rejected, and files that hang or crash their parser.
    The tally counts what is read.

    Raises:
        ChangedError: a file is no longer the one that was planned. Documents may have been returned before, so that only
            a unit that was read to its end may be used.
    """
    if unit.format == "files":
        yield from _file_documents(unit, corpus, tally)
        return
    try:
        for row in _document_rows(unit, corpus.max_document_bytes):
            yield row if isinstance(row, Reject) else _document(*row, corpus.max_document_bytes)
    except ParseError as error:  # the whole file is broken
        yield reject(unit.paths[0], str(error), "file")
    except _GONE as error:
        if not unit.is_planned:
            raise
        raise inputs.changed(unit.paths[0]) from error


def _file_documents(unit: Unit, corpus: Corpus, tally: Tally | None) -> Iterator[Document | Reject]:
    for path, sha256, sidecar in itertools.zip_longest(unit.paths, unit.sha256s, unit.sidecars, fillvalue=""):
        try:
            parsed = parse_file(path, _read_small(path, corpus.max_document_bytes, sha256), corpus)
            name = path.removeprefix(unit.root).lstrip("/")
            stated = sidecars.parse(_read_small(sidecars.path_of(path), sidecars.MAX_BYTES, sidecar)) if sidecar else {}
            if parsed.rows:
                yield from _sheet_documents(path, name, parsed, corpus, stated)
                if tally:
                    tally.characters(path, parsed)
                continue
            title = stated.pop("title", None) or parsed.title
            metadata = {**sidecars.place_of(name), **parsed.metadata, **stated}
            row = {"document_id": name, "title": title, "text": parsed.text, "metadata": metadata}
            document = document_from_row(row, path, corpus.max_document_bytes)
            if tally:
                tally.characters(path, parsed)
            modified = filesystem.modified(path) if corpus.file_times else ""
            yield replace(document, page_starts=parsed.page_starts, modified=modified)
        except (ParseError, *_GONE) as error:
            if sha256 and isinstance(error, _GONE):
                raise inputs.changed(path) from error
            reason, is_transient = inputs.why_unreadable(error), isinstance(error, TransientError)
            yield reject(path, reason, "file", is_transient=is_transient)


def _sheet_documents(
    path: str, name: str, parsed: ParsedFile, corpus: Corpus, stated: dict[str, Any]
) -> Iterator[Document | Reject]:
    """The rows of a spreadsheet as documents, with what its sidecar states; the id of one without is `PATH#SHEET!ROW`."""
    shared = {key: value for key, value in stated.items() if key not in (*DOCUMENT_IDS, "text")}
    for place, row in parsed.rows:
        named = row if any(key in row for key in DOCUMENT_IDS) else {"document_id": f"{name}#{place}", **row}
        yield _document(f"{path}#{place}", {**shared, **named}, corpus.max_document_bytes)


def _read_small(path: str, max_bytes: int, sha256: str) -> bytes:
    with inputs.open_file(path) as file:
        data: bytes = file.read(max_bytes + 1)
        digest = hashlib.sha256(data)
        if is_long := len(data) > max_bytes:
            while block := file.read(inputs.BLOCK_BYTES):
                digest.update(block)
        size_bytes = file.tell()
    if sha256 not in ("", digest.hexdigest()):
        raise inputs.changed(path)
    if is_long:
        raise ParseError(f"file of {size_bytes:,} bytes is longer than max_document_bytes ({max_bytes:,})")
    return data


def _document_rows(unit: Unit, max_document_bytes: int) -> Iterator[Row]:
    (path,) = unit.paths
    match unit.format:
        case "jsonl":
            (sha256,) = unit.sha256s or ("",)
            lines = inputs.read_lines(path, max_document_bytes, unit.start, unit.stop, unit.first_line, sha256)
            return inputs.jsonl_rows(lines)
        case "parquet":
            return parquet_rows(path, DOCUMENT_IDS, ("text",), ("metadata",), unit.start, unit.stop, unit.blocks)
        case _:
            return _squad_documents(unit)


def _document(place: str, value: Any, max_document_bytes: int) -> Document | Reject:
    try:
        return document_from_row(value, place, max_document_bytes)
    except ParseError as error:
        return reject(place, str(error), "row")


def _squad_documents(unit: Unit) -> Iterator[Row]:
    (path,) = unit.paths
    (sha256,) = unit.sha256s or ("",)
    for context in itertools.islice(inputs.read_squad(path, sha256), unit.start, unit.stop):
        if not context.is_repeat:
            row = {"document_id": context.document_id, "title": context.title, "text": context.text}
            yield f"{path}#{context.ordinal}", row
