"""Where the files of an input are, and what lines they hold.

In: a path as a user names it, local or any fsspec URL. Out: its filesystem, the file opened, its format; the lines of a
.jsonl file and the paragraphs of SQuAD JSON with their places. This module knows nothing of records, units or Ray.
What a user names is kept in places and ids; a local path is made absolute, since tasks run elsewhere.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ragtune_ray import RagtuneError
from ragtune_ray.ingest import parsers
from ragtune_ray.ingest.parsers import ParseError
from ragtune_ray.ingest.rows import Context, parse_json, reject, squad_contexts
from ragtune_ray.schema import Reject

__all__ = [
    "ACCEPTED",
    "BLOCK_BYTES",
    "Format",
    "InputError",
    "Row",
    "format_of",
    "join",
    "jsonl_rows",
    "locate",
    "open_file",
    "read_lines",
    "read_squad",
    "resolve",
    "root_of",
    "why_unreadable",
]

Format = Literal["files", "jsonl", "parquet", "squad"]
Row = tuple[str, Any] | Reject
"""A row's place and its value; nothing is checked yet."""
_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".parquet": "parquet", ".json": "squad"}
_FORMATS |= dict.fromkeys(parsers.FILE_SUFFIXES, "files")
ACCEPTED = (
    "a folder of .md .txt .html .pdf .docx .jsonl .parquet, one such file, a BEIR folder (corpus.jsonl, queries.jsonl, "
    "qrels/*.tsv) or SQuAD .json"
)
"""What an input may be, in the words of an error."""
BLOCK_BYTES = 4 * 2**20
"""Bytes read at once."""


class InputError(RagtuneError, ValueError):
    """The input as a whole cannot be used; the message names the path, the rule and what is accepted."""


def resolve(path: str) -> tuple[Any, str]:
    """The filesystem of a path, and the path within it.

    Raises:
        InputError: nothing installed reads such a URL.
    """
    if "://" not in path:  # url_to_fs would take a `::` in a local file name for a chain of filesystems
        return LocalFileSystem(), root_of(path)
    try:
        filesystem, inner = url_to_fs(path)
    except ImportError as error:
        raise InputError(f"{path}: {error}; for s3:// run: pip install 'ragtune-ray[s3]'") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; accepted: {ACCEPTED}") from None
    return filesystem, inner


def locate(path: str) -> tuple[Any, str]:
    """The filesystem of a path that must exist, and the path within it.

    Raises:
        InputError: there is no such file or folder, or nothing installed reads such a URL.
    """
    filesystem, inner = resolve(path)
    if not path or not filesystem.exists(inner):
        raise InputError(f"{path}: no such file or folder; accepted: {ACCEPTED}")
    return filesystem, inner


def root_of(path: str) -> str:
    """The path by which tasks elsewhere find the same file or folder.

    >>> root_of("s3://bucket/corpus/")
    's3://bucket/corpus'
    """
    if "://" in path:
        return path.rstrip("/")
    # Without its dots, so that a file below a folder begins with the folder's path; links stay as the user names them, but for
    # one before `..`, which leads out of where the link does.
    place = Path(path).expanduser().absolute()
    plain = Path(os.path.normpath(place))
    if not place.exists() or (plain.exists() and plain.samefile(place)):
        return str(plain)
    return str(place.resolve())


def join(root: str, name: str) -> str:
    """The path of a file in a folder.

    >>> join("s3://bucket/corpus/", "a.md")
    's3://bucket/corpus/a.md'
    """
    return f"{root.rstrip('/')}/{name}"


@contextmanager
def open_file(path: str) -> Iterator[Any]:
    """A file opened for reading bytes; closed at the end of the `with`."""
    filesystem, inner = resolve(path)
    with filesystem.open(inner, "rb") as file:
        yield file


def format_of(path: str) -> Format:
    """How a file is read, by its suffix.

    Raises:
        ParseError: files of this type are not read.
        InputError: they are, once an extra is installed.

    >>> format_of("a/b.JSONL")
    'jsonl'
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in _FORMATS:
        raise ParseError(f"files of type {suffix or '(none)'!r} are not read; accepted: {' '.join(_FORMATS)}")
    extra = parsers.missing_extra(suffix)
    if extra:
        raise InputError(f"{path}: reading {suffix} needs an extra that is missing; pip install 'ragtune-ray[{extra}]'")
    return _FORMATS[suffix]


def why_unreadable(error: Exception) -> str:
    """The reason of a reject for what opening or parsing a file raised."""
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def read_lines(path: str, max_bytes: int, start: int = 0, stop: int = sys.maxsize, line: int = 1) -> Iterator[Row]:
    """The lines that are not blank, as bytes, from byte `start`, whose line is number `line`, to byte `stop`.

    A line longer than `max_bytes` is skipped without loading it and comes out as a reject.
    """
    with open_file(path) as raw:
        raw.seek(start)
        file = io.BufferedReader(raw, BLOCK_BYTES)  # its readline takes a limit; that of some remote files does not
        for number in itertools.count(line):
            data = file.readline(min(max_bytes + 2, stop - start)) if start < stop else b""
            if not data:
                return
            start += len(data)
            size_bytes = len(data.rstrip(b"\r\n"))
            if size_bytes > max_bytes or (len(data) == max_bytes + 2 and not data.endswith(b"\n")):
                while not data.endswith(b"\n") and (data := file.readline(BLOCK_BYTES)):
                    start += len(data)
                    size_bytes += len(data.rstrip(b"\r\n"))
                reason = f"line of {size_bytes:,} bytes is longer than max_document_bytes ({max_bytes:,})"
                yield reject(f"{path}:{number}", reason, "row")
            elif data.strip():
                yield f"{path}:{number}", data


def jsonl_rows(lines: Iterable[Row]) -> Iterator[Row]:
    """The JSON value of each line from `read_lines`, at its place; a reject for a line that is not JSON."""
    for line in lines:
        if isinstance(line, Reject):
            yield line
            continue
        place, data = line
        try:
            yield place, parse_json(data)
        except ParseError as error:
            yield reject(place, str(error), "row")


def read_squad(path: str) -> Iterator[Context]:
    """The paragraphs of a SQuAD file, which is held in memory whole.

    Raises:
        ParseError: the file is not SQuAD JSON.
    """
    with open_file(path) as file:
        return squad_contexts(parse_json(file.read()))
