"""Lists the files of an input with their sizes and version stamps, and notices files that changed since.

A *stamp* names the state of a file without reading it: size and times on a disk, size and ETag in S3. No file is opened,
except in stores that say nothing of a file's version: there, the stamp is the sha256 of the content.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from ragtune_ray.ingest import inputs, sidecars
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import reject
from ragtune_ray.schema import Reject
from ragtune_ray.storage import filesystem

VERSION_NAMES = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "created")
"""What a store may say about the version of a file; the first that it says is part of the stamp."""
_THREADS = 32
_ROWS_AT_ONCE = 8192
_SCHEMA = pa.schema([("name", pa.large_string()), ("size_bytes", pa.int64()), ("stamp", pa.large_string())])


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that was listed."""

    path: str
    size_bytes: int
    stamp: str
    sha256: str = ""
    """Of its content; "" if planning did not read it."""

    @property
    def identity(self) -> str:
        """What names the content: the sha256 if it is known, else the stamp."""
        return self.sha256 or self.stamp


class Listed(NamedTuple):
    """The name of a file below the corpus folder, its size and its stamp."""

    name: str
    size_bytes: int
    stamp: str


class Files(Sequence[InputFile]):
    """Files below a folder in about 100 bytes each: columns instead of objects, which are made when they are asked for."""

    def __init__(self, folder: str, table: pa.Table) -> None:
        self.folder, self._table = folder, table
        self.sizes: np.ndarray = table["size_bytes"].to_numpy()

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return int(self.sizes.sum())

    @property
    def name_column(self) -> pa.ChunkedArray:
        """The paths below the folder."""
        return self._table["name"]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, place: int) -> InputFile: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[InputFile]: ...
    def __getitem__(self, place: int | slice) -> InputFile | Sequence[InputFile]:
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        return self.take([range(len(self))[place]])[0]

    def __iter__(self) -> Iterator[InputFile]:
        for first in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.take(range(first, min(first + _ROWS_AT_ONCE, len(self))))

    def take(self, places: Sequence[int] | np.ndarray) -> list[InputFile]:
        """The files at these places."""
        rows = self._table.take(pa.array(places, pa.int64())).to_pydict()
        sha256s = rows.get("sha256", itertools.repeat(""))
        paths = (filesystem.join(self.folder, name) for name in rows["name"])
        return [InputFile(*values) for values in zip(paths, rows["size_bytes"], rows["stamp"], sha256s, strict=False)]

    def subset(self, places: np.ndarray) -> Files:
        """Only the files at these places."""
        return Files(self.folder, self._table.take(pa.array(places, pa.int64())))

    def names(self) -> Iterator[str]:
        """The paths below the folder, in order."""
        for batch in self._table["name"].chunks:
            for first in range(0, len(batch), _ROWS_AT_ONCE):
                yield from batch.slice(first, _ROWS_AT_ONCE).to_pylist()

    def hashed(self) -> Files:
        """These files with the sha256 of each, except of those that cannot be opened; reading them tells why."""
        with ThreadPoolExecutor(_THREADS) as threads:
            found = threads.map(lambda name: _sha256(filesystem.join(self.folder, name)), self.names())
            column = pa.array(list(found), pa.large_string())
        return Files(self.folder, self._table.append_column("sha256", column))


def list_files(path: str) -> tuple[Files, list[Reject]]:
    """The files of an input, sorted by name, and a reject for each that must not be opened.

    Raises:
        InputError: the path is missing.
    """
    store, inner = inputs.locate(path)
    root = filesystem.absolute(path)
    rejects: list[Reject] = []
    if not store.isdir(inner):
        folder, name = posixpath.dirname(root), posixpath.basename(root)
        names = [name, *([sidecars.path_of(name)] if store.exists(sidecars.path_of(inner)) else [])]
        return Files(folder, _table(_stamped(folder, name) for name in names)), rejects
    if store.exists(filesystem.join(inner, "corpus.jsonl")):
        return Files(root, _table([_stamped(root, "corpus.jsonl")])), rejects
    found = _walk(inner, rejects) if isinstance(store, LocalFileSystem) else _find(store, inner, root)
    return Files(root, _table(found)), rejects


def stamp_of(path: str) -> str:
    """The stamp of a file as it is now.

    Raises:
        FileNotFoundError: it is gone.
    """
    store, inner = filesystem.locate(path)
    if isinstance(store, LocalFileSystem):
        return _local_stamp(Path(inner).stat())
    store.invalidate_cache(inner)
    info = store.info(inner)
    return f"{info.get('size')}-{_version(info) or _sha256(path)}"


@contextlib.contextmanager
def unchanged(path: str, stamp: str) -> Iterator[None]:
    """Raise a ChangedError unless the file has this stamp before and after the block; "" stands for any.

    It replaces an error of the block, which may come from a mixture of two states of the file.
    """
    _require(path, stamp)
    try:
        yield
    except Exception as error:
        _require(path, stamp, error)
        raise
    _require(path, stamp)


def _require(path: str, stamp: str, cause: Exception | None = None) -> None:
    if not stamp:
        return
    try:
        found = stamp_of(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise inputs.changed(path) from error
    if found != stamp:
        raise inputs.changed(path) from cause


def _stamped(folder: str, name: str) -> Listed:
    path = filesystem.join(folder, name)
    store, inner = filesystem.locate(path)
    size_bytes = store.size(inner)
    return Listed(name, sum(map(len, _blocks(path))) if size_bytes is None else int(size_bytes), stamp_of(path))


def _local_stamp(status: os.stat_result) -> str:
    return f"{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"


def _version(info: Mapping[str, Any]) -> str:
    """What a store says about the version of a file, in the same words however it was asked; "" if nothing."""
    version = next((info[name] for name in VERSION_NAMES if info.get(name) is not None), "")
    if isinstance(version, dt.datetime):
        version = version.timestamp()
    return f"{version:.6f}" if isinstance(version, float) else str(version).strip('"')


def _blocks(path: str) -> Iterator[bytes]:
    with inputs.open_file(path) as file:
        while block := file.read(inputs.BLOCK_BYTES):
            yield block


def _sha256(path: str) -> str:
    """The sha256 of a file's content; "" if it cannot be opened."""
    digest = hashlib.sha256()
    try:
        for block in _blocks(path):
            digest.update(block)
    except (FileNotFoundError, PermissionError):
        return ""
    return digest.hexdigest()


def _table(rows: Iterable[Listed]) -> pa.Table:
    """The rows, sorted by name. Columns are sorted one by one, so that only one exists twice."""
    iterator = iter(rows)
    parts: list[list[pa.Array]] = [[] for _ in _SCHEMA]
    while batch := list(itertools.islice(iterator, _ROWS_AT_ONCE)):
        for part, values, kind in zip(parts, zip(*batch, strict=True), _SCHEMA.types, strict=True):
            part.append(pa.array(values, kind))
    columns = [pa.chunked_array(parts.pop(0), kind) for kind in _SCHEMA.types]
    order = pc.sort_indices(columns[0])
    for place in range(len(columns)):
        columns[place] = columns[place].take(order)
    return pa.table(columns, schema=_SCHEMA)


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are never read."""
    return name.startswith((".", "~$"))  # ~$ are the lock files of an open Word document


def _walk(root: str, rejects: list[Reject]) -> Iterator[Listed]:
    real_root = os.path.realpath(root)
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(f"{root}/{folder}") as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                        continue
                    try:
                        status = _status(entry, real_root)
                    except (ParseError, OSError) as error:
                        rejects.append(reject(entry.path, inputs.why_unreadable(error), "file"))
                        continue
                    if status is not None:
                        yield Listed(f"{folder}{entry.name}", status.st_size, _local_stamp(status))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT):
                raise inputs.InputError(
                    f"{error.filename}: cannot be listed ({inputs.why_unreadable(error)}), and what is in it would count as "
                    "deleted; run the command again when the disk or network answers"
                ) from error
            rejects.append(reject(str(error.filename), inputs.why_unreadable(error), "file", is_transient=True))


def _status(entry: os.DirEntry[str], real_root: str) -> os.stat_result | None:
    """The status of a file; None for a link to a folder inside the root, whose files are read at their real path."""
    try:
        entry.path.encode()
    except UnicodeEncodeError:
        raise ParseError("the file's name is not UTF-8; rename it") from None
    real = Path(os.path.realpath(entry.path))
    if entry.is_symlink() and not real.is_relative_to(real_root):
        raise ParseError("a symlink that leaves the folder is not followed; copy the file instead")
    if entry.is_dir():
        if any(map(is_hidden, real.relative_to(real_root).parts)):
            raise ParseError("a link to a hidden folder is not followed; copy the folder instead")
        return None
    if not entry.is_file():
        raise ParseError("not a regular file, or a broken symlink")
    return entry.stat()


def _find(store: Any, inner: str, root: str) -> Iterator[Listed]:
    """List an object store: folder by folder until there are many, then each with all that is below it in a thread."""
    prefix = f"{inner.rstrip('/')}/"

    def files_of(infos: Iterable[Mapping[str, Any]]) -> list[Listed]:
        named = [(_visible(info, prefix), info) for info in infos if info["type"] == "file"]
        return [
            Listed(name, int(info["size"]), f"{info['size']}-{version}")
            if (version := _version(info)) and info["size"] is not None
            else _stamped(root, name)
            for name, info in named
            if name
        ]

    def below(folder: str) -> list[Listed]:
        found = files_of(store.find(folder, detail=True).values())
        store.invalidate_cache(folder)  # a kilobyte a file
        return found

    def level(folder: str) -> tuple[list[Listed], list[str]]:
        infos = store.ls(folder, detail=True)
        inside = [info for info in infos if str(info["name"]).rstrip("/") != folder.rstrip("/")]
        return files_of(inside), [i["name"] for i in inside if i["type"] == "directory" and _visible(i, prefix)]

    store.invalidate_cache(inner)
    with ThreadPoolExecutor(_THREADS) as threads:
        folders = [inner]
        while 0 < len(folders) < _THREADS:
            levels = list(threads.map(level, folders))
            yield from itertools.chain.from_iterable(files for files, _ in levels)
            folders = [name for _, names in levels for name in names]
        yield from itertools.chain.from_iterable(threads.map(below, folders))


def _visible(info: Mapping[str, Any], prefix: str) -> str:
    """The name below the prefix; "" if any part of it is hidden."""
    name = str(info["name"]).removeprefix(prefix)
    return "" if any(map(is_hidden, name.split("/"))) else name
