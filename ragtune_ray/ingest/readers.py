"""Reads the documents of a unit of the input."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from ragtune_ray.ingest import inputs
from ragtune_ray.ingest.input_units import Unit
from ragtune_ray.ingest.inputs import Row
from ragtune_ray.ingest.parquet import parquet_rows
from ragtune_ray.ingest.parsers import ParseError, parse_file
from ragtune_ray.ingest.rows import DOCUMENT_IDS, document_from_row, reject
from ragtune_ray.schema import Document, Reject


def read_documents(unit: Unit, max_document_bytes: int) -> Iterator[Document | Reject]:
    """Read the documents of one unit in order, with a reject for each bad row or file; memory use stays constant.

    Files, lines and texts longer than `max_document_bytes` are rejected.
    """
    if unit.format == "files":
        yield from _file_documents(unit, max_document_bytes)
        return
    try:
        for row in _document_rows(unit, max_document_bytes):
            yield row if isinstance(row, Reject) else _document(*row, max_document_bytes)
    except ParseError as error:  # the whole file is broken, or changed since it was planned
        yield reject(unit.paths[0], str(error), "file")


def _file_documents(unit: Unit, max_document_bytes: int) -> Iterator[Document | Reject]:
    for path in unit.paths:
        try:
            title, text = parse_file(path, _read_small(path, max_document_bytes), max_document_bytes)
            row = {"document_id": path.removeprefix(unit.root).lstrip("/"), "title": title, "text": text}
            yield document_from_row(row, path, max_document_bytes)
        except (ParseError, FileNotFoundError, PermissionError) as error:
            yield reject(path, inputs.why_unreadable(error), "file")


def _read_small(path: str, max_bytes: int) -> bytes:
    with inputs.open_file(path) as file:
        data: bytes = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            size_bytes = file.seek(0, os.SEEK_END)
            raise ParseError(f"file of {size_bytes:,} bytes is longer than max_document_bytes ({max_bytes:,})")
    return data


def _document_rows(unit: Unit, max_document_bytes: int) -> Iterator[Row]:
    (path,) = unit.paths
    match unit.format:
        case "jsonl":
            lines = inputs.read_lines(path, max_document_bytes, unit.start, unit.stop, unit.first_line)
            return inputs.jsonl_rows(lines)
        case "parquet":
            return parquet_rows(path, DOCUMENT_IDS, ("text",), ("metadata",), unit.start, unit.stop)
        case _:
            return _squad_documents(unit)


def _document(place: str, value: Any, max_document_bytes: int) -> Document | Reject:
    try:
        return document_from_row(value, place, max_document_bytes)
    except ParseError as error:
        return reject(place, str(error), "row")


def _squad_documents(unit: Unit) -> Iterator[Row]:
    (path,) = unit.paths
    for context in itertools.islice(inputs.read_squad(path), unit.start, unit.stop):
        if not context.is_repeat:
            row = {"document_id": context.document_id, "title": context.title, "text": context.text}
            yield f"{path}#{context.ordinal}", row
