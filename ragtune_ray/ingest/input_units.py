"""Divides an input into units that tasks read in parallel.

In: a folder, a .jsonl or .parquet file, a BEIR folder or SQuAD JSON. Out: a `Plan` with the units, the sha256 of every
file, and a reject for each file that is left out.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import posixpath
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ragtune_ray.ingest import inputs
from ragtune_ray.ingest.inputs import Format
from ragtune_ray.ingest.parquet import check_columns, parquet_errors
from ragtune_ray.ingest.parsers import ParseError
from ragtune_ray.ingest.rows import DOCUMENT_IDS, parse_json, reject, squad_contexts
from ragtune_ray.schema import Reject
from ragtune_ray.storage import checksums, filesystem

Range = tuple[int, int, int]
"""`start`, `stop` and `first_line` of a unit."""
_MAX_RANGES_PER_ROW_GROUP = 4096


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that was read for planning."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the input that one task reads; it depends only on the input and `unit_bytes`."""

    number: int
    format: Format
    paths: tuple[str, ...]
    """One file, or several document files."""
    start: int
    """First byte (jsonl), row (parquet) or context (squad); 0 for files."""
    stop: int
    """One past the last."""
    first_line: int
    """1-based number of the line that begins at byte `start`; 0 for formats without lines."""
    root: str
    """The corpus folder; the ids of document files are relative to it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All units of an input, sorted by path, with their files and the files that were left out."""

    units: tuple[Unit, ...]
    files: tuple[InputFile, ...]
    rejects: tuple[Reject, ...]


def plan_units(path: str, unit_bytes: int, root: str | None = None) -> Plan:
    """Divide an input into units of about `unit_bytes`, reading every file once, in blocks.

    Only SQuAD JSON is loaded into memory completely. A Parquet row group larger than `unit_bytes` is divided into ranges
    of rows; reading a later range decodes the earlier ones of its group again.

    Args:
        path: a folder or a file, local or any fsspec URL; a folder with a corpus.jsonl is BEIR.
        unit_bytes: input bytes per unit, at least 1.
        root: the folder to which ids of document files are relative; None means the path, or the folder of a single file.

    Raises:
        InputError: the path is missing, contains nothing readable, or needs an extra that is not installed.
    """
    folder, names, rejects = list_input(path)
    root = root or folder
    units: list[Unit] = []
    files: list[InputFile] = []
    group: list[InputFile] = []
    for name in names:
        place = filesystem.join(folder, name)
        try:
            form = inputs.format_of(name)
            file, ranges = _scan(place, form, unit_bytes)
        except (ParseError, FileNotFoundError, PermissionError) as error:
            rejects.append(reject(place, inputs.why_unreadable(error), "file"))
            continue
        files.append(file)
        if form == "files":
            group.append(file)
            if sum(member.size_bytes for member in group) >= unit_bytes:
                units.append(_group_unit(len(units), group, root))
                group = []
        units += [Unit(number, form, (place,), *part, root) for number, part in enumerate(ranges, len(units))]
    if group:
        units.append(_group_unit(len(units), group, root))
    if not units:
        reasons = "; ".join(f"{item.place}: {item.reason}" for item in rejects[:3]) or "it is empty"
        raise inputs.InputError(f"{path}: nothing readable ({reasons}); accepted: {inputs.ACCEPTED}")
    return Plan(tuple(units), tuple(files), tuple(sorted(rejects, key=lambda item: item.place)))


def input_fingerprint(plan: Plan) -> str:
    """A fingerprint of the files' contents and of their paths below the corpus folder, which become document ids."""
    root = plan.units[0].root.rstrip("/") + "/" if plan.units else ""
    return checksums.digest(
        [[file.path.removeprefix(root), file.size_bytes, file.sha256] for file in plan.files]
        + [[u.format, [path.removeprefix(root) for path in u.paths], u.start, u.stop] for u in plan.units]
    )


def list_input(path: str) -> tuple[str, list[str], list[Reject]]:
    """The corpus folder, the sorted relative names of its files, and rejects for those that must not be opened."""
    store, inner = inputs.locate(path)
    root = filesystem.absolute(path)
    if not store.isdir(inner):
        return posixpath.dirname(root), [posixpath.basename(root)], []
    if store.exists(filesystem.join(inner, "corpus.jsonl")):
        return root, ["corpus.jsonl"], []
    if isinstance(store, LocalFileSystem):
        names, rejects = _walk(inner)
    else:
        found = [name.removeprefix(inner.rstrip("/")).lstrip("/") for name in store.find(inner)]
        names, rejects = [name for name in found if not any(map(_is_hidden, name.split("/")))], []
    return root, sorted(names), rejects


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$"))  # ~$ are the lock files of an open Word document


def _walk(root: str) -> tuple[list[str], list[Reject]]:
    names: list[str] = []
    rejects: list[Reject] = []

    def refuse(error: OSError) -> None:
        rejects.append(reject(str(error.filename), inputs.why_unreadable(error), "file"))

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in itertools.filterfalse(_is_hidden, [*files, *links]):
            entry = Path(folder, name)
            try:
                _check_entry(entry, root)
            except ParseError as error:
                rejects.append(reject(str(entry), str(error), "file"))
                continue
            if entry.is_file():  # else a link to a folder inside `root`, whose files are read at their real path
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
    """Hash a file and choose where to divide it, in one pass."""
    digest = hashlib.sha256()
    ranges: list[Range] = []
    with inputs.open_file(path) as file:
        blocks = _hashed_blocks(file, digest)
        match form:
            case "jsonl":
                ranges = _line_ranges(blocks, unit_bytes)
            case "squad":
                data = b"".join(blocks)
                num_contexts = sum(1 for _ in squad_contexts(parse_json(data))) if data else 0
                ranges = _even_ranges(0, num_contexts, len(data), unit_bytes)
            case _:
                deque(blocks, maxlen=0)
        size_bytes = file.tell()
        if size_bytes == 0:
            raise ParseError("the file is empty (0 bytes)")
        if form == "parquet":
            ranges = _row_ranges(file, unit_bytes)
    if form != "files" and not ranges:
        raise ParseError("the file contains no documents")
    return InputFile(path, size_bytes, digest.hexdigest()), ranges


def _hashed_blocks(file: Any, digest: Any) -> Iterator[bytes]:
    while block := file.read(inputs.BLOCK_BYTES):
        digest.update(block)
        yield block


def _line_ranges(blocks: Iterable[bytes], unit_bytes: int) -> list[Range]:
    """Byte ranges with the number of their first line; each ends with the line in which it reaches `unit_bytes`."""
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
    # A broken file may claim any size and number of rows, so the number of ranges has its own limit.
    num_ranges = max(1, min(stop - start, math.ceil(size_bytes / unit_bytes), _MAX_RANGES_PER_ROW_GROUP))
    edges = [start + (stop - start) * number // num_ranges for number in range(num_ranges + 1)]
    return [(first, last, 0) for first, last in itertools.pairwise(edges) if first < last]


def _row_ranges(file: Any, unit_bytes: int) -> list[Range]:
    """Ranges of rows: consecutive row groups of at most `unit_bytes` uncompressed bytes, and parts of larger groups."""
    with parquet_errors():
        parquet = pq.ParquetFile(file)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        check_columns(parquet.schema_arrow, DOCUMENT_IDS, ("text",))
    ranges: list[Range] = []
    row = start = gathered_bytes = 0
    for group in groups:
        if gathered_bytes and gathered_bytes + group.total_byte_size > unit_bytes:
            ranges.append((start, row, 0))
            start, gathered_bytes = row, 0
        row += group.num_rows
        gathered_bytes += group.total_byte_size
        if gathered_bytes > unit_bytes:  # this group alone is too large
            ranges += _even_ranges(start, row, gathered_bytes, unit_bytes)
            start, gathered_bytes = row, 0
    return [*ranges, (start, row, 0)] if row > start else ranges
