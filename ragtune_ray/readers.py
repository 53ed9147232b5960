"""Files -> documents and queries, in pieces that tasks can read one by one.

In: a folder, a .jsonl or .parquet file, a BEIR folder or SQuAD JSON, local or any fsspec URL. Out: a `Plan` of `Unit`s,
and from each unit its `Document`s, in order; or the `Query`s of a file; with a `Reject` for every row or file left out.
This module knows nothing of Ray, models or chunking; what stands in a file or a row is the business of `parsers`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import posixpath
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ragtune_ray import parsers
from ragtune_ray.parsers import ParseError, clean
from ragtune_ray.schema import Document, Query, Reject

__all__ = ["InputError", "InputFile", "Plan", "Unit", "plan_units", "read_documents", "read_queries"]

Format = Literal["files", "jsonl", "parquet", "squad"]
Row = tuple[str, Any] | Reject
"""A row's place and its value; nothing is checked yet."""
Placed = tuple[str, Query] | Reject
Range = tuple[int, int, int]
"""Start, stop and first_line of a unit."""
Columns = tuple[str, ...]

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".parquet": "parquet", ".json": "squad"}
_FORMATS |= dict.fromkeys(parsers.FILE_SUFFIXES, "files")
_ACCEPTED = (
    "a folder of .md .txt .html .pdf .docx .jsonl .parquet, one such file, a BEIR folder (corpus.jsonl, queries.jsonl, "
    "qrels/*.tsv) or SQuAD .json"
)
_BLOCK_BYTES = 4 * 2**20
_BATCH_BYTES = 4 * 2**20
_MAX_QUERY_BYTES = 8 * 2**20
_MAX_RANGES_PER_ROW_GROUP = 4096


class InputError(ValueError):
    """The input as a whole cannot be used; the message names the path, the rule and what is accepted."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that was read while planning."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the input that one task reads; the same input and `unit_bytes` always give the same units."""

    number: int
    format: Format
    paths: tuple[str, ...]
    """One file, or a group of files of a folder."""
    start: int
    """First byte (jsonl), row (parquet) or context (squad); 0 for files."""
    stop: int
    """One past the last."""
    first_line: int
    """1-based number of the line that begins at byte `start`; 0 where there are no lines."""
    root: str
    """The corpus folder, to which the ids of files are relative."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All units of an input, the files they rest on, and what was left out already."""

    units: tuple[Unit, ...]
    files: tuple[InputFile, ...]
    rejects: tuple[Reject, ...]


def plan_units(path: str, unit_bytes: int) -> Plan:
    """Cut an input into units of about `unit_bytes`, reading every file once, in blocks.

    Only SQuAD JSON is held in memory whole. A row group of Parquet larger than `unit_bytes` is cut into ranges of rows;
    reading a later range decodes the earlier ones of its group again.

    Args:
        path: a folder or a file, local or any fsspec URL; a folder that holds corpus.jsonl is BEIR.
        unit_bytes: input bytes per unit, at least 1.

    Returns:
        Units, files and rejects, sorted by path.

    Raises:
        InputError: the path is missing, holds nothing readable, or needs an extra that is not installed.
    """
    root, names, rejects = _list_input(path)
    units: list[Unit] = []
    files: list[InputFile] = []
    group: list[InputFile] = []
    for name in names:
        place = _join(root, name)
        try:
            form = _format(name)
            file, ranges = _scan(place, form, unit_bytes)
        except (ParseError, FileNotFoundError, PermissionError) as error:
            rejects.append(_reject(place, _why(error), "file"))
            continue
        files.append(file)
        if form == "files":
            group.append(file)
            if sum(member.size_bytes for member in group) >= unit_bytes:
                units.append(_group_unit(len(units), group, root))
                group = []
        units += [
            Unit(number, form, (place,), start, stop, line, root)
            for number, (start, stop, line) in enumerate(ranges, len(units))
        ]
    if group:
        units.append(_group_unit(len(units), group, root))
    if not units:
        reasons = "; ".join(f"{reject.place}: {reject.reason}" for reject in rejects[:3]) or "it is empty"
        raise InputError(f"{path}: nothing readable ({reasons}); accepted: {_ACCEPTED}")
    return Plan(tuple(units), tuple(files), tuple(sorted(rejects, key=lambda reject: reject.place)))


def read_documents(unit: Unit, max_document_bytes: int) -> Iterator[Document | Reject]:
    """The documents of one unit in order, and a reject for each row or file that gives none; memory stays flat.

    Args:
        unit: from `plan_units`.
        max_document_bytes: longer files, lines and texts are rejected; a long line is skipped without loading it.
    """
    if unit.format == "files":
        yield from _file_documents(unit, max_document_bytes)
        return
    try:
        for row in _document_rows(unit, max_document_bytes):
            yield row if isinstance(row, Reject) else _document(*row, max_document_bytes)
    except ParseError as error:  # the file as a whole: broken inside, or changed since it was planned
        yield _reject(unit.paths[0], str(error), "file")


def read_queries(path: str, split: str = "all") -> Iterator[Query | Reject]:
    """The queries of a .jsonl or .parquet file, SQuAD JSON or a BEIR folder, and a reject for each row that gives none.

    Args:
        path: local or any fsspec URL.
        split: `all`, or only the queries whose split it is; in BEIR, those judged in the qrels file of that name.

    Raises:
        InputError: the path is missing or unreadable, one id has two texts, or nothing carries the split.
    """
    filesystem, inner = _locate(path)
    root = _root(path)
    if not filesystem.isdir(inner):
        if filesystem.size(inner) == 0:
            raise InputError(f"{path}: the file is empty (0 bytes)")
        if PurePosixPath(root).suffix.lower() not in (".jsonl", ".parquet", ".json"):
            raise InputError(f"{path}: queries are read from .jsonl, .parquet, SQuAD .json or a BEIR folder")
        return _unique(_with_split(_queries(_query_rows(root)), split, path))
    if not filesystem.exists(_join(inner, "queries.jsonl")):
        raise InputError(f"{path}: a folder of queries must be BEIR and hold queries.jsonl; or name a file")
    return _unique(_beir_queries(root, _qrels_files(root, split), split))


# Paths: what a user names is kept in places and ids; a local path is made absolute, since tasks run elsewhere.


def _resolve(path: str) -> tuple[Any, str]:
    """The filesystem of a path, and the path within it."""
    if "://" not in path:  # url_to_fs would take a `::` in a local file name for a chain of filesystems
        return LocalFileSystem(), _root(path)
    try:
        filesystem, inner = url_to_fs(path)
    except ImportError as error:
        raise InputError(f"{path}: {error}; for s3:// run: pip install 'ragtune-ray[s3]'") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; accepted: {_ACCEPTED}") from None
    return filesystem, inner


def _locate(path: str) -> tuple[Any, str]:
    """The same, of a path that must exist."""
    filesystem, inner = _resolve(path)
    if not path or not filesystem.exists(inner):
        raise InputError(f"{path}: no such file or folder; accepted: {_ACCEPTED}")
    return filesystem, inner


def _root(path: str) -> str:
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().absolute())


def _join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


@contextmanager
def _open(path: str) -> Iterator[Any]:
    filesystem, inner = _resolve(path)
    with filesystem.open(inner, "rb") as file:
        yield file


def _format(path: str) -> Format:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in _FORMATS:
        raise ParseError(f"files of type {suffix or '(none)'!r} are not read; accepted: {' '.join(_FORMATS)}")
    extra = parsers.missing_extra(suffix)
    if extra:
        raise InputError(f"{path}: reading {suffix} needs an extra that is missing; pip install 'ragtune-ray[{extra}]'")
    return _FORMATS[suffix]


def _reject(place: str, reason: str, kind: Literal["file", "row"]) -> Reject:
    return Reject(clean(place), clean(reason), kind)


def _why(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


# Planning


def _list_input(path: str) -> tuple[str, list[str], list[Reject]]:
    """The corpus folder, the sorted names of the files in it, and what was refused by name alone."""
    filesystem, inner = _locate(path)
    root = _root(path)
    if not filesystem.isdir(inner):
        return posixpath.dirname(root), [posixpath.basename(root)], []
    if filesystem.exists(_join(inner, "corpus.jsonl")):
        return root, ["corpus.jsonl"], []
    if isinstance(filesystem, LocalFileSystem):
        names, rejects = _walk(inner)
    else:
        found = [name.removeprefix(inner.rstrip("/")).lstrip("/") for name in filesystem.find(inner)]
        names, rejects = [name for name in found if not any(map(_is_hidden, name.split("/")))], []
    return root, sorted(names), rejects


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$"))  # ~$ are the lock files of an open Word document


def _walk(root: str) -> tuple[list[str], list[Reject]]:
    names: list[str] = []
    rejects: list[Reject] = []

    def refuse(error: OSError) -> None:
        rejects.append(_reject(str(error.filename), _why(error), "file"))

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in itertools.filterfalse(_is_hidden, [*files, *links]):
            entry = Path(folder, name)
            try:
                _check_entry(entry, root)
            except ParseError as error:
                rejects.append(_reject(str(entry), str(error), "file"))
                continue
            if entry.is_file():  # else a link to a folder in here, whose files are read where they really are
                names.append(entry.relative_to(root).as_posix())
    return names, rejects


def _check_entry(entry: Path, root: str) -> None:
    try:
        str(entry).encode()
    except UnicodeEncodeError:
        raise ParseError("the file's name is not UTF-8; rename it") from None
    if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(os.path.realpath(root)):
        raise ParseError("a symlink that leaves the folder is not followed; copy the file instead")
    if not entry.is_file() and not entry.is_dir():
        raise ParseError("not a regular file, or a broken symlink")


def _group_unit(number: int, group: list[InputFile], root: str) -> Unit:
    return Unit(number, "files", tuple(file.path for file in group), 0, 0, 0, root)


def _scan(path: str, form: Format, unit_bytes: int) -> tuple[InputFile, list[Range]]:
    """Hash a file and find where to cut it, in one pass."""
    digest = hashlib.sha256()
    ranges: list[Range] = []
    with _open(path) as file:
        blocks = _hashed_blocks(file, digest)
        match form:
            case "jsonl":
                ranges = _line_ranges(blocks, unit_bytes)
            case "squad":
                data = b"".join(blocks)
                num_contexts = sum(1 for _ in parsers.squad_contexts(parsers.parse_json(data))) if data else 0
                ranges = _even_ranges(0, num_contexts, len(data), unit_bytes)
            case _:
                deque(blocks, maxlen=0)
        size_bytes = file.tell()
        if size_bytes == 0:
            raise ParseError("the file is empty (0 bytes)")
        if form == "parquet":
            ranges = _row_ranges(file, unit_bytes)
    if form != "files" and not ranges:
        raise ParseError("the file holds no documents")
    return InputFile(path, size_bytes, digest.hexdigest()), ranges


def _hashed_blocks(file: Any, digest: Any) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        yield block


def _line_ranges(blocks: Iterable[bytes], unit_bytes: int) -> list[Range]:
    """Byte ranges that end at the first line end at or after `unit_bytes`, with the number of their first line."""
    ranges: list[Range] = []
    position = start = 0
    line = first_line = 1
    for block in blocks:
        counted = 0
        while (end := block.find(b"\n", max(counted, start + unit_bytes - 1 - position)) + 1) > 0:
            line += block.count(b"\n", counted, end)
            ranges.append((start, position + end, first_line))
            start, first_line, counted = position + end, line, end
        line += block.count(b"\n", counted)
        position += len(block)
    return [*ranges, (start, position, first_line)] if position > start else ranges


def _even_ranges(start: int, stop: int, size_bytes: int, unit_bytes: int) -> list[Range]:
    # A broken file may claim any size for any number of rows, so the number of ranges has a limit of its own.
    num_ranges = max(1, min(stop - start, math.ceil(size_bytes / unit_bytes), _MAX_RANGES_PER_ROW_GROUP))
    edges = [start + (stop - start) * number // num_ranges for number in range(num_ranges + 1)]
    return [(first, last, 0) for first, last in itertools.pairwise(edges) if first < last]


def _row_ranges(file: Any, unit_bytes: int) -> list[Range]:
    """Ranges of rows: whole row groups together up to `unit_bytes` uncompressed, and pieces of larger ones."""
    with _parquet_errors():
        parquet = pq.ParquetFile(file)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        _check_columns(parquet.schema_arrow, parsers.DOCUMENT_IDS, ("text",))
    ranges: list[Range] = []
    row = start = gathered_bytes = 0
    for group in groups:
        if gathered_bytes and gathered_bytes + group.total_byte_size > unit_bytes:
            ranges.append((start, row, 0))
            start, gathered_bytes = row, 0
        row += group.num_rows
        gathered_bytes += group.total_byte_size
        if gathered_bytes > unit_bytes:  # then it is this group alone
            ranges += _even_ranges(start, row, gathered_bytes, unit_bytes)
            start, gathered_bytes = row, 0
    return [*ranges, (start, row, 0)] if row > start else ranges


# Rows


def _file_documents(unit: Unit, max_document_bytes: int) -> Iterator[Document | Reject]:
    for path in unit.paths:
        try:
            title, text = parsers.parse_file(path, _read_small(path, max_document_bytes), max_document_bytes)
            row = {"document_id": path.removeprefix(unit.root).lstrip("/"), "title": title, "text": text}
            yield parsers.document_from_row(row, path, max_document_bytes)
        except (ParseError, FileNotFoundError, PermissionError) as error:
            yield _reject(path, _why(error), "file")


def _read_small(path: str, max_bytes: int) -> bytes:
    with _open(path) as file:
        data: bytes = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            size_bytes = file.seek(0, os.SEEK_END)
            raise ParseError(f"file of {size_bytes:,} bytes is longer than max_document_bytes ({max_bytes:,})")
    return data


def _lines(path: str, max_bytes: int, start: int = 0, stop: int = sys.maxsize, line: int = 1) -> Iterator[Row]:
    """The lines that are not blank, as bytes, from byte `start`, whose line is number `line`, to byte `stop`."""
    with _open(path) as raw:
        raw.seek(start)
        file = io.BufferedReader(raw, _BLOCK_BYTES)  # its readline takes a limit; that of some remote files does not
        for number in itertools.count(line):
            data = file.readline(min(max_bytes + 2, stop - start)) if start < stop else b""
            if not data:
                return
            start += len(data)
            size_bytes = len(data.rstrip(b"\r\n"))
            if size_bytes > max_bytes or (len(data) == max_bytes + 2 and not data.endswith(b"\n")):
                while not data.endswith(b"\n") and (data := file.readline(_BLOCK_BYTES)):
                    start += len(data)
                    size_bytes += len(data.rstrip(b"\r\n"))
                reason = f"line of {size_bytes:,} bytes is longer than max_document_bytes ({max_bytes:,})"
                yield _reject(f"{path}:{number}", reason, "row")
            elif data.strip():
                yield f"{path}:{number}", data


def _jsonl_rows(lines: Iterable[Row]) -> Iterator[Row]:
    for line in lines:
        if isinstance(line, Reject):
            yield line
            continue
        place, data = line
        try:
            yield place, parsers.parse_json(data)
        except ParseError as error:
            yield _reject(place, str(error), "row")


def _document_rows(unit: Unit, max_document_bytes: int) -> Iterator[Row]:
    (path,) = unit.paths
    match unit.format:
        case "jsonl":
            return _jsonl_rows(_lines(path, max_document_bytes, unit.start, unit.stop, unit.first_line))
        case "parquet":
            return _parquet_rows(path, parsers.DOCUMENT_IDS, ("text",), ("metadata",), unit.start, unit.stop)
        case _:
            return _squad_documents(unit)


def _document(place: str, value: Any, max_document_bytes: int) -> Document | Reject:
    try:
        return parsers.document_from_row(value, place, max_document_bytes)
    except ParseError as error:
        return _reject(place, str(error), "row")


def _squad(path: str) -> Iterator[parsers.Context]:
    with _open(path) as file:
        return parsers.squad_contexts(parsers.parse_json(file.read()))


def _squad_documents(unit: Unit) -> Iterator[Row]:
    (path,) = unit.paths
    for context in itertools.islice(_squad(path), unit.start, unit.stop):
        if not context.is_repeat:
            row = {"document_id": context.document_id, "title": context.title, "text": context.text}
            yield f"{path}#{context.ordinal}", row


def _squad_questions(path: str) -> Iterator[Row]:
    ordinals = itertools.count()
    for context in _squad(path):
        for question, ordinal in zip(context.questions, ordinals, strict=False):
            row = question
            if isinstance(question, dict):
                answers = [] if question.get("is_impossible") is True else question.get("answers")
                row = {"id": question.get("id"), "question": question.get("question"), "answers": answers}
                row["document_id"] = context.document_id
            yield f"{path}#{ordinal}", row


# Parquet


@contextmanager
def _parquet_errors() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter: a column's name
        raise ParseError(f"Parquet is broken: {error}") from None
    except OSError as error:
        if error.errno is not None:  # the disk or the network failed, not the file
            raise
        raise ParseError(f"Parquet is broken: {error}") from None


def _parquet_rows(
    path: str, ids: Columns, texts: Columns, nested: Columns, start: int = 0, stop: int = sys.maxsize
) -> Iterator[Row]:
    """Rows `start` to `stop` of the columns that hold scalars, and of those in `nested`."""
    with _open(path) as file, _parquet_errors():
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BATCH_BYTES)
        columns = _check_columns(parquet.schema_arrow, ids, texts, nested)
        first = 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            row, first = first, first + group.num_rows
            if row >= stop or first <= start:
                continue
            batch_rows = max(1, min(1024, _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
            for batch in parquet.iter_batches(batch_rows, [number], columns):
                low, high = max(start - row, 0), min(stop - row, len(batch))
                if low < high:
                    yield from _batch_rows(path, batch.slice(low, high - low), row + low)
                row += len(batch)
                if row >= stop:
                    break


def _batch_rows(path: str, batch: Any, first: int) -> Iterator[Row]:
    try:
        yield from [(f"{path}#{row}", value) for row, value in enumerate(batch.to_pylist(), first)]
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            yield _reject(f"{path}#{first}", f"not UTF-8: {error}", "row")
            return
        for offset in range(len(batch)):
            yield from _batch_rows(path, batch.slice(offset, 1), first + offset)


def _check_columns(schema: Any, ids: Columns, texts: Columns, nested: Columns = ()) -> list[str]:
    """The columns to read; refuses a file that lacks one, or that holds one of a type that may carry code or bytes."""
    for field in schema:
        if _is_opaque(field):
            raise ParseError(f"column {field.name!r} is of type {field.type}, binary or extension; drop or cast it")
    found = ", ".join(schema.names)
    if len(set(schema.names)) < len(schema.names):
        raise ParseError(f"two columns have one name; found {found}")
    for wanted in (ids, texts):
        if not set(wanted) & set(schema.names):
            raise ParseError(f"no column {' or '.join(map(repr, wanted))}; found {found}")
    for field in schema:
        if field.name in texts and not _is_text(field.type):
            raise ParseError(f"column {field.name!r} must be text, found {field.type}")
    return [field.name for field in schema if _is_readable(field.type, is_nested=field.name in nested)]


def _is_opaque(field: Any) -> bool:
    kind = field.type
    children = (kind.field(number) for number in range(kind.num_fields))
    return (
        isinstance(kind, pa.BaseExtensionType)
        or b"ARROW:extension:name" in (field.metadata or {})
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
        or any(map(_is_opaque, children))
    )


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_readable(kind: Any, *, is_nested: bool) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_struct(kind):
        children = [kind.field(number).type for number in range(kind.num_fields)]
        return is_nested and all(_is_readable(child, is_nested=True) for child in children)
    tests = (_is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(test(kind) for test in tests)


# Queries


def _query_rows(path: str) -> Iterator[Row]:
    try:
        match _format(path):
            case "jsonl":
                yield from _jsonl_rows(_lines(path, _MAX_QUERY_BYTES))
            case "parquet":
                nested = ("answers", "document_ids", "relevances")
                yield from _parquet_rows(path, parsers.QUERY_IDS, parsers.QUERY_TEXTS, nested)
            case _:
                yield from _squad_questions(path)
    except ParseError as error:
        raise InputError(f"{path}: {error}") from None


def _queries(rows: Iterable[Row]) -> Iterator[Placed]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        place, value = row
        try:
            yield place, parsers.query_from_row(value)
        except ParseError as error:
            yield _reject(place, str(error), "row")


def _with_split(queries: Iterable[Placed], split: str, path: str) -> Iterator[Placed]:
    found: set[str] = set()
    for query in queries:
        if not isinstance(query, Reject):
            found.add(query[1].split)
        if isinstance(query, Reject) or split in ("all", query[1].split):
            yield query
    if split != "all" and split not in found:
        raise InputError(f"{path}: no query has split {split!r}; found: {', '.join(sorted(found)) or 'no queries'}")


def _unique(queries: Iterable[Placed]) -> Iterator[Query | Reject]:
    seen: dict[str, tuple[str, str]] = {}
    for item in queries:
        if isinstance(item, Reject):
            yield item
            continue
        place, query = item
        text, first_place = seen.setdefault(query.query_id, (query.text, place))
        if text != query.text:
            raise InputError(
                f"query id {query.query_id!r} has two texts, at {first_place} and {place}; ids must be unique"
            )
        if first_place == place:
            yield query
        else:
            yield _reject(place, f"query id {query.query_id!r} stands already at {first_place}", "row")


def _qrels_files(root: str, split: str) -> dict[str, str]:
    """Paths of the qrels files to use, with the split that each stands for."""
    folder = _join(root, "qrels")
    filesystem, inner = _resolve(folder)
    names = filesystem.ls(inner, detail=False) if filesystem.isdir(inner) else []
    stems = sorted(PurePosixPath(name).stem for name in names if name.endswith(".tsv"))
    files = {_join(folder, f"{stem}.tsv"): parsers.split_name(stem) for stem in stems}
    kept = {path: name for path, name in files.items() if split in ("all", name)}
    if split != "all" and not kept:
        raise InputError(f"{root}: no qrels file for split {split!r}; qrels/ holds: {', '.join(stems) or 'nothing'}")
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
    path = _join(root, "queries.jsonl")
    for item in _queries(_jsonl_rows(_lines(path, _MAX_QUERY_BYTES))):
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
        yield _reject(path, f"{len(missing):,} judged queries are not here, such as {min(missing)!r}", "file")


def _qrels_rows(path: str) -> Iterator[tuple[str, str, float] | Reject]:
    for line in _lines(path, _MAX_QUERY_BYTES):
        if isinstance(line, Reject):
            yield line
            continue
        place, data = line
        try:
            query_id, document_id, score = parsers.clean(data.decode()).rstrip("\n").split("\t")
            relevance = float(score)
        except ValueError:
            if not place.endswith(":1"):  # the header
                yield _reject(place, "a line of qrels must read query-id TAB corpus-id TAB score, in UTF-8", "row")
            continue
        if math.isfinite(relevance):
            yield query_id, document_id, relevance
        else:
            yield _reject(place, f"score {score} is not a finite number", "row")
