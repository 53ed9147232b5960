"""Finds and opens input files, and reads the lines of JSONL with their locations.

A path is local or any fsspec URL. The *place* of a row, as rejects name it, is `PATH:LINE` or `PATH#ROW`.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import fsspec

from ragtune_ray import RagtuneError
from ragtune_ray.config.extras import install_command
from ragtune_ray.ingest import parsers
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import parse_json, reject
from ragtune_ray.schema import Reject
from ragtune_ray.storage import filesystem

Format = Literal["files", "jsonl", "parquet", "squad"]
Row = tuple[str, Any] | Reject
"""A row's place and its unchecked value."""
_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".parquet": "parquet", ".json": "squad"}
_FORMATS |= dict.fromkeys(parsers.FILE_SUFFIXES, "files")
ACCEPTED = (
    "a folder of .md .txt .rst .html .pdf .docx .pptx .xlsx .csv .epub .eml .jsonl .parquet, one such file, a BEIR folder "
    "(corpus.jsonl, queries.jsonl, qrels/*.tsv) or SQuAD .json"
)
"""What an input may be, for error messages."""
BLOCK_BYTES = 4 * 2**20
"""Bytes per read."""


class InputError(RagtuneError, ValueError):
    """An input as a whole cannot be used."""


class ChangedError(InputError):
    """A file is no longer the one that was planned, or read before."""


def changed(path: str, during: str = "indexed") -> ChangedError:
    """The error for a file that changed while something was done with it."""
    return ChangedError(f"{path} changed while it was {during}; run again")


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an input, and the path within it.

    Raises:
        InputError: there is no such file or folder, or no installed package reads this kind of URL.
    """
    try:
        store, inner = filesystem.locate(filesystem.absolute(path))
    except filesystem.UrlError as error:
        raise InputError(f"{error}; accepted: {ACCEPTED}") from None
    if not path or not store.exists(inner):
        raise InputError(f"{path}: no such file or folder; accepted: {ACCEPTED}")
    return store, inner


def open_file(path: str) -> Any:
    """Open a file for reading bytes; use it in a `with` block."""
    store, inner = filesystem.locate(path)
    return store.open(inner, "rb")


def read_file(path: str) -> bytes:
    """The whole content of a file."""
    with open_file(path) as file:
        data: bytes = file.read()
    return data


def suffix_of(path: str) -> str:
    """The suffix that tells the type of a file, in lower case; "" if it has none. A pathlib.Path takes ten times as long.

    >>> suffix_of("a.b/c.TXT"), suffix_of("a.b/c")
    ('.txt', '')
    """
    return posixpath.splitext(path)[1].lower()


def format_of(path: str) -> Format:
    """How to read a file, judging by its suffix.

    Raises:
        ParseError: files of this type cannot be read.
        InputError: they can, but an extra must be installed first.

    >>> format_of("a/b.JSONL")
    'jsonl'
    """
    suffix = suffix_of(path)
    if suffix not in _FORMATS:
        raise ParseError(f"files of type {suffix or '(none)'!r} cannot be read; accepted: {' '.join(_FORMATS)}")
    extra = parsers.missing_extra(suffix)
    if extra:
        raise InputError(f"{path}: reading {suffix} needs a library that is missing; run: {install_command(extra)}")
    return _FORMATS[suffix]


def require_libraries(path: str, names: Iterable[str]) -> None:
    """Refuse the files of a corpus if libraries that read some of them are missing; names all of these at once.

    Raises:
        InputError: libraries are missing; the message has the command that installs them.
    """
    counts = Counter(map(suffix_of, names))
    needed = {suffix: extra for suffix in sorted(counts) if (extra := parsers.missing_extra(suffix))}
    if needed:
        files = ", ".join(f"{counts[suffix]:,} {suffix}" for suffix in needed)
        command = install_command(*dict.fromkeys(needed.values()))
        raise InputError(f"{path}: libraries that read {files} are missing; run: {command}")


def why_unreadable(error: Exception) -> str:
    """The reason for a reject, from the error that opening or parsing a file raised."""
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


@dataclass(slots=True)
class LinesRead:
    """What `read_lines` has read so far."""

    num_lines: int = 0
    """Lines, blank ones included."""
    digest: Any = field(default_factory=hashlib.sha256)
    """The sha256 of their bytes."""


def read_lines(
    path: str, max_bytes: int, start: int = 0, stop: int = sys.maxsize, found: LinesRead | None = None
) -> Iterator[Row]:
    """Read the lines that begin in bytes `start` to `stop` of a file, to their ends, except blank ones.

    A line longer than `max_bytes` is never loaded whole and becomes a reject. Lines are numbered from 1.
    """
    found = found or LinesRead()
    with open_file(path) as raw:
        raw.seek(max(0, start - 1))
        file = io.BufferedReader(raw, BLOCK_BYTES)  # the readline of some remote files takes no limit
        if start > 0:  # the line around the byte before `start` belongs to an earlier part
            skipped = b""
            start -= 1
            for skipped in _rest_of_line(file, stop - 1 - start):
                start += len(skipped)
            if not skipped.endswith(b"\n"):
                return
        while start < stop and (data := file.readline(max_bytes + 2)):
            found.num_lines += 1
            place = f"{path}:{found.num_lines}"
            found.digest.update(data)
            start += len(data)
            size_bytes = len(data.rstrip(b"\r\n"))
            if size_bytes > max_bytes or (len(data) == max_bytes + 2 and not data.endswith(b"\n")):
                for more in () if data.endswith(b"\n") else _rest_of_line(file):
                    found.digest.update(more)
                    start += len(more)
                    size_bytes += len(more.rstrip(b"\r\n"))
                reason = f"line of {size_bytes:,} bytes is longer than max_document_bytes ({max_bytes:,})"
                yield reject(place, reason, "row")
            elif data.strip():
                yield place, data


def _rest_of_line(file: io.BufferedReader, max_bytes: int = sys.maxsize) -> Iterator[bytes]:
    """The bytes up to the end of the line, in blocks; at most `max_bytes`."""
    while max_bytes > 0 and (data := file.readline(min(BLOCK_BYTES, max_bytes))):
        yield data
        max_bytes = 0 if data.endswith(b"\n") else max_bytes - len(data)


def resolve_place(place: str, lines_before: int) -> str:
    """The place of a row in its file, from its place in a unit of the file and the lines that earlier units own.

    >>> resolve_place("a.jsonl:3", 10), resolve_place("a.parquet#3", 10)
    ('a.jsonl:13', 'a.parquet#3')
    """
    path, _, line = place.rpartition(":")
    is_line = path.lower().endswith(".jsonl") and line.isdecimal()
    return f"{path}:{int(line) + lines_before}" if is_line else place


def jsonl_rows(lines: Iterable[Row]) -> Iterator[Row]:
    """Parse each line from `read_lines` as JSON; a line that is not JSON becomes a reject."""
    for line in lines:
        if isinstance(line, Reject):
            yield line
            continue
        place, data = line
        try:
            yield place, parse_json(data)
        except ParseError as error:
            yield reject(place, str(error), "row")
