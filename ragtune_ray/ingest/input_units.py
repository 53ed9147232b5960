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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ragtune_ray.ingest import inputs, planned_file, sidecars
from ragtune_ray.ingest.inputs import Format
from ragtune_ray.ingest.parquet import blocks_of_footer, blocks_of_group, check_columns, parquet_errors
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import DOCUMENT_IDS, parse_json, reject, squad_contexts
from ragtune_ray.schema import Reject
from ragtune_ray.storage import checksums, filesystem


class Range(NamedTuple):
    """A part of a file: see the attributes of `Unit`."""

    start: int
    stop: int
    first_line: int = 0
    sha256: str = ""
    blocks: planned_file.Blocks = ()


_SHOWN_COLUMNS = 10
_MAX_RANGES_PER_ROW_GROUP = 4096


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that was read for planning."""

    path: str
    size_bytes: int
    sha256: str
    unread: tuple[str, ...] = ()
    """Columns of a Parquet file that cannot become text or metadata, with their types."""


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
    sha256s: tuple[str, ...] = ()
    """What is read must be what was planned. The sha256 of each path (files, squad) or of the range of bytes (jsonl)."""
    blocks: planned_file.Blocks = ()
    """The same for parquet: the blocks of the file that contain these rows and the footer."""
    sidecars: tuple[str, ...] = ()
    """For each of several document files, the sha256 of its sidecar (`sidecars.path_of`); "" if it has none."""

    @property
    def is_planned(self) -> bool:
        """Whether this unit comes from a plan, so that it can be compared; a part of one for a survey does not."""
        return bool(self.sha256s or self.blocks)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Unit:
        """A unit from the JSON of its `dataclasses.asdict`."""
        lists = {name: tuple(values[name]) for name in ("paths", "sha256s", "sidecars")}
        return cls(**{**values, **lists, "blocks": tuple((number, digest) for number, digest in values["blocks"])})

    def part(self, **changes: Any) -> Unit:
        """A part of this unit, which is not compared with the plan; `changes` are attributes."""
        return replace(self, **changes, sha256s=(), blocks=(), sidecars=())


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
    inputs.require_libraries(path, names)
    root = root or folder
    described, names = sidecars.split(names)
    units: list[Unit] = []
    files: list[InputFile] = []
    group: list[tuple[InputFile, str]] = []
    group_bytes = 0
    for name in names:
        place = filesystem.join(folder, name)
        try:
            sidecars.refuse_lone(name)
            form = inputs.format_of(name)
            sidecar = [_scan(sidecars.path_of(place), "files", unit_bytes)[0]] if name in described else []
            file, ranges = _scan(place, form, unit_bytes)
        except (ParseError, FileNotFoundError, PermissionError) as error:
            rejects.append(reject(place, inputs.why_unreadable(error), "file"))
            continue
        files += [file, *sidecar]
        if form == "files":
            group.append((file, sidecar[0].sha256 if sidecar else ""))
            group_bytes += file.size_bytes
            if group_bytes >= unit_bytes:
                units.append(_group_unit(len(units), group, root))
                group, group_bytes = [], 0
        units += [_range_unit(number, form, file, part, root) for number, part in enumerate(ranges, len(units))]
    if group:
        units.append(_group_unit(len(units), group, root))
    if not units:
        reasons = "; ".join(f"{item.place}: {item.reason}" for item in rejects[:3]) or "it is empty"
        raise inputs.InputError(f"{path}: nothing readable ({reasons}); accepted: {inputs.ACCEPTED}")
    return Plan(tuple(units), tuple(files), tuple(sorted(rejects, key=lambda item: item.place)))


def unread_line(plan: Plan) -> str:
    """One line about the columns that are left unread; "" if there are none.

    >>> unread_line(Plan((), (InputFile("a.parquet", 9, "", ("image (binary)",)),), ()))
    'left unread in 1 Parquet file: image (binary)'
    """
    files = [file for file in plan.files if file.unread]
    columns = list(dict.fromkeys(column for file in files for column in file.unread))
    more = f" and {len(columns) - _SHOWN_COLUMNS} more" if len(columns) > _SHOWN_COLUMNS else ""
    many = "" if len(files) == 1 else "s"
    return (
        f"left unread in {len(files):,} Parquet file{many}: {', '.join(columns[:_SHOWN_COLUMNS])}{more}"
        if files
        else ""
    )


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
        name, sidecar = posixpath.basename(root), sidecars.path_of(inner)
        return posixpath.dirname(root), [name, *([sidecars.path_of(name)] if store.exists(sidecar) else [])], []
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


def _group_unit(number: int, group: list[tuple[InputFile, str]], root: str) -> Unit:
    paths, sha256s = tuple(file.path for file, _ in group), tuple(file.sha256 for file, _ in group)
    return Unit(number, "files", paths, 0, 0, 0, root, sha256s, sidecars=tuple(sidecar for _, sidecar in group))


def _range_unit(number: int, form: Format, file: InputFile, part: Range, root: str) -> Unit:
    sha256s = () if form == "parquet" else (part.sha256 or file.sha256,)
    return Unit(number, form, (file.path,), part.start, part.stop, part.first_line, root, sha256s, part.blocks)


def _scan(path: str, form: Format, unit_bytes: int) -> tuple[InputFile, list[Range]]:
    """Hash a file and choose where to divide it, in one pass."""
    digest = hashlib.sha256()
    ranges: list[Range] = []
    unread: list[str] = []
    with inputs.open_file(path) as file:
        match form:
            case "jsonl":
                ranges = _line_ranges(_hashed_blocks(file, digest), unit_bytes)
            case "squad":
                data = b"".join(_hashed_blocks(file, digest))
                num_contexts = sum(1 for _ in squad_contexts(parse_json(data))) if data else 0
                ranges = _even_ranges(0, num_contexts, len(data), unit_bytes)
            case "parquet":
                hashed = _hashed_blocks(file, digest, planned_file.BLOCK_BYTES)
                digests = [planned_file.block_digest(block) for block in hashed]
            case _:
                deque(_hashed_blocks(file, digest), maxlen=0)
        size_bytes = file.tell()
        if size_bytes == 0:
            raise ParseError("the file is empty (0 bytes)")
        if form == "parquet":
            ranges, unread = _row_ranges(file, path, digests, unit_bytes)
    if form != "files" and not ranges:
        raise ParseError("the file contains no documents")
    return InputFile(path, size_bytes, digest.hexdigest(), tuple(unread)), ranges


def _hashed_blocks(file: Any, digest: Any, block_bytes: int = 0) -> Iterator[bytes]:
    while block := file.read(block_bytes or inputs.BLOCK_BYTES):
        digest.update(block)
        yield block


def _line_ranges(blocks: Iterable[bytes], unit_bytes: int) -> list[Range]:
    """Ranges of bytes; each ends with the line in which it reaches `unit_bytes`."""
    ranges: list[Range] = []
    position = start = 0
    line = first_line = 1
    digest = hashlib.sha256()
    for block in blocks:
        counted = 0
        while (end := block.find(b"\n", max(counted, start + unit_bytes - 1 - position)) + 1) > 0:
            line += block.count(b"\n", counted, end)
            digest.update(memoryview(block)[counted:end])
            ranges.append(Range(start, position + end, first_line, digest.hexdigest()))
            start, first_line, counted, digest = position + end, line, end, hashlib.sha256()
        line += block.count(b"\n", counted)
        digest.update(memoryview(block)[counted:])
        position += len(block)
    return [*ranges, Range(start, position, first_line, digest.hexdigest())] if position > start else ranges


def _even_ranges(start: int, stop: int, size_bytes: int, unit_bytes: int) -> list[Range]:
    # A broken file may claim any size and number of rows, so the number of ranges has its own limit.
    num_ranges = max(1, min(stop - start, math.ceil(size_bytes / unit_bytes), _MAX_RANGES_PER_ROW_GROUP))
    edges = [start + (stop - start) * number // num_ranges for number in range(num_ranges + 1)]
    return [Range(first, last) for first, last in itertools.pairwise(edges) if first < last]


def _row_ranges(raw: Any, path: str, digests: list[str], unit_bytes: int) -> tuple[list[Range], list[str]]:
    """Ranges of rows: consecutive row groups of at most `unit_bytes` uncompressed bytes, and parts of larger groups.

    The second result is what `check_columns` leaves unread.
    """
    numbered = tuple(enumerate(digests))
    with parquet_errors(), planned_file.opened(raw, path, numbered) as file:
        parquet = pq.ParquetFile(file)
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        columns, unread = check_columns(parquet.schema_arrow, DOCUMENT_IDS, ("text",), ("metadata",))
        needed = [blocks_of_group(group, columns, len(digests)) for group in groups]
        footer = blocks_of_footer(parquet.metadata, raw.seek(0, os.SEEK_END))
    ranges: list[Range] = []
    row = start = gathered_bytes = 0
    gathered: set[int] = set()

    def add(parts: list[Range]) -> None:
        blocks = tuple((number, digests[number]) for number in sorted(gathered.union(footer)))
        ranges.extend(part._replace(blocks=blocks) for part in parts)
        gathered.clear()

    for group, blocks in zip(groups, needed, strict=True):
        if gathered_bytes and gathered_bytes + group.total_byte_size > unit_bytes:
            add([Range(start, row)])
            start, gathered_bytes = row, 0
        row += group.num_rows
        gathered_bytes += group.total_byte_size
        gathered.update(blocks)
        if gathered_bytes > unit_bytes:  # this group alone is too large
            add(_even_ranges(start, row, gathered_bytes, unit_bytes))
            start, gathered_bytes = row, 0
    if row > start:
        add([Range(start, row)])
    return ranges, unread
