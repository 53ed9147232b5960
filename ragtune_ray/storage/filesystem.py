"""Reads and writes files at a URL, on a local disk or in an object store, through one code path.

A URL is a path on this machine or any URL that fsspec supports, such as s3://. A file is replaced atomically: a reader
sees the old content or the new, never a part of either.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import tempfile
import types
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from ragtune_ray import RagtuneError
from ragtune_ray.config.extras import install_command
from ragtune_ray.storage import node_cache

S3_ATTEMPTS = 8
"""How often a request to S3 is made before its failure is an error."""


class UrlError(RagtuneError, ValueError):
    """No installed package reads this kind of URL."""


class SpaceError(RagtuneError, RuntimeError):
    """The disk has too little space for the next write; the message names the bytes needed and where."""


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path within it.

    Raises:
        UrlError: no installed package reads this kind of URL.
    """
    if "://" not in url:  # fsspec would read a `::` in a local file name as a chain of file systems
        return LocalFileSystem(), str(Path(url).expanduser().absolute())
    try:
        store, path = fsspec.core.url_to_fs(url, **_retries(url))
    except ImportError as error:
        hint = f"; run: {install_command('s3')}" if url.startswith("s3://") else ""
        raise UrlError(f"{url}: {error}{hint}") from None
    except ValueError as error:
        raise UrlError(f"{url}: {error}") from None
    return store, str(path)


def _retries(url: str) -> dict[str, object]:
    """Options that repeat requests to S3 which fail for a moment, unless AWS_MAX_ATTEMPTS is set."""
    if not url.startswith("s3://") or "AWS_MAX_ATTEMPTS" in os.environ:
        return {}
    return {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": S3_ATTEMPTS}}}


def json_lines(text: str) -> list[str]:
    r"""The lines of a text of JSON lines. `splitlines` also splits at separators such as U+2028, which JSON strings may contain.

    >>> json_lines('{"a": 1}\n{"b": 2}\n')
    ['{"a": 1}', '{"b": 2}']
    """
    return [line for line in text.split("\n") if line]


def absolute(url: str) -> str:
    """The URL under which another process finds the same file or folder.

    >>> absolute("s3://bucket/corpus/")
    's3://bucket/corpus'
    """
    if "://" in url:
        return url.rstrip("/")
    # Remove `..`, so that the path of a file begins with the path of its folder. Keep symlinks as the user wrote them,
    # except before `..`, which means the parent of the link's target.
    path = Path(url).expanduser().absolute()
    plain = Path(os.path.normpath(path))
    if not path.exists() or (plain.exists() and plain.samefile(path)):
        return str(plain)
    return str(path.resolve())


def join(url: str, *parts: str) -> str:
    """A path below a local directory or URL.

    >>> join("s3://bucket/workspace/", "index", "CURRENT")
    's3://bucket/workspace/index/CURRENT'
    """
    return "/".join([url.rstrip("/"), *parts])


@contextlib.contextmanager
def discarding(path: Path) -> Iterator[None]:
    """Remove a partly written local file or directory if the block fails, so that retries do not fill the disk."""
    try:
        yield
    except BaseException:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def is_local(url: str) -> bool:
    """Whether a URL names a path on this machine."""
    return isinstance(locate(url)[0], LocalFileSystem)


def free_bytes(url: str) -> int | None:
    """Free bytes on the disk of a local path; None for an object store, which has no such limit."""
    store, path = locate(url)
    if not isinstance(store, LocalFileSystem):
        return None
    place = Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(url: str, num_bytes: int, purpose: str) -> None:
    """Raise a SpaceError if the disk has fewer than `num_bytes` free."""
    free = free_bytes(url)
    if free is not None and free < num_bytes:
        raise SpaceError(
            f"{url}: no space for {purpose}: about {num_bytes / 2**20:,.1f} MiB are needed, {free / 2**20:,.1f} MiB are "
            "free; free some and run the command again: finished work is kept"
        )


def exists(url: str) -> bool:
    """Whether a file or directory exists."""
    store, path = locate(url)
    return bool(store.exists(path))


def last_change(url: str) -> float | None:
    """When a file, or the newest file of a directory, was last modified: seconds since 1970, or None if unknown."""
    store, path = locate(url)
    if isinstance(store, LocalFileSystem):
        times = []
        for place in [Path(path), *Path(path).rglob("*")]:
            with contextlib.suppress(FileNotFoundError):  # it may have been renamed to its final name meanwhile
                times.append(place.stat().st_mtime)
        return max(times, default=None)
    found = (info.get("LastModified") for info in store.find(path, detail=True).values())
    return max((changed.timestamp() for changed in found if changed is not None), default=None)


def modified(url: str) -> str:
    """When a file was last modified, as ISO 8601 in UTC and whole seconds; "" if its store does not say."""
    store, path = locate(url)
    info = store.info(path)
    when = info.get("mtime", info.get("LastModified"))
    if isinstance(when, int | float):
        when = dt.datetime.fromtimestamp(when, dt.UTC)
    return when.astimezone(dt.UTC).isoformat(timespec="seconds") if isinstance(when, dt.datetime) else ""


def list_names(url: str) -> list[str]:
    """Sorted names directly below a directory, without hidden ones such as staging; empty if it does not exist."""
    store, path = locate(url)
    store.invalidate_cache(path)
    try:
        entries = store.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries}
    return sorted(name for name in names if not name.startswith("."))


def read_bytes(url: str) -> bytes:
    """The content of a small file."""
    store, path = locate(url)
    return bytes(store.cat_file(path))


def read_text(url: str) -> str:
    """The content of a small UTF-8 file."""
    return read_bytes(url).decode("utf-8")


def replace_text(url: str, text: str) -> None:
    """Write a small file atomically: a reader sees the old text or the new."""
    store, path = locate(url)
    if not isinstance(store, LocalFileSystem):
        store.pipe_file(path, text.encode())
        return
    target = Path(path)
    make_directory(target.parent)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    with discarding(temporary):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(target)
    sync(target.parent)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file like `numpy.save`, but raise the operating system's error when the disk is full."""
    with path.open("wb") as file:
        # numpy writes to a non-file object in pieces, so write errors are raised.
        np.save(types.SimpleNamespace(write=file.write), array, allow_pickle=False)


def commit_file(local: Path, url: str) -> None:
    """Move a finished local file to `url` atomically; of several writers the last one wins."""
    store, path = locate(url)
    if not isinstance(store, LocalFileSystem):
        store.put_file(str(local), path)
        local.unlink()
        return
    target = Path(path)
    make_directory(target.parent)
    if local.stat().st_dev != target.parent.stat().st_dev:
        # A rename works only within one file system, and the temporary directory is often on another than the workspace.
        near = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
        with discarding(near):
            shutil.copyfile(local, near)
            local.unlink()
        local = near
    with discarding(local):
        sync(local)
        local.replace(target)
    sync(target.parent)


@contextlib.contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A local path to a file for the duration of the block; a remote file is downloaded each time, bypassing the cache.

    For files whose content may change under the same name, such as the parts of a run that is repeated.
    """
    store, path = locate(url)
    if isinstance(store, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="ragtune-fetched-") as temporary:
        local = Path(temporary) / path.rpartition("/")[2]
        store.get_file(path, str(local))
        yield local


def local_copy(url: str, names: list[str], version: str, *, refresh: bool = False, scratch: bool = False) -> Path:
    """A local directory with the given files of `url`; remote files are downloaded once per machine and `version`.

    Args:
        url: the directory.
        names: relative paths of files in it.
        version: names the content; part of the cache's path.
        refresh: download remote files even if the cache has them.
        scratch: the files are of one job. This process keeps them until it ends; they are removed after the last one that
            uses them. Without it, open what is returned at once, or hold a `node_cache.lease` of it.

    Raises:
        SpaceError: the disk has too little space for a copy.
    """
    store, path = locate(url)
    if isinstance(store, LocalFileSystem):
        return Path(path)
    target = cache_directory() / "artifacts" / f"{node_cache.SCRATCH if scratch else ''}{version[:32]}"
    if scratch:
        node_cache.keep(target)
    lease = node_cache.lease(target)
    for name in names:
        if refresh or not (target / name).exists():
            with node_cache.locked(target):
                if refresh or not (target / name).exists():
                    _download(store, f"{path}/{name}", target, name)
    del lease
    return target


def _download(store: fsspec.AbstractFileSystem, path: str, entry: Path, name: str) -> None:
    """Download a file into an entry of the cache."""
    size = int(store.size(path) or 0)
    with node_cache.downloading(entry, size) as part:
        require_space(str(entry), size, f"a copy of {path}")
        store.get_file(path, str(part))
        (entry / name).parent.mkdir(parents=True, exist_ok=True)
        part.replace(entry / name)


def cache_directory() -> Path:
    """Where models and copies of remote artifacts are cached: RAGTUNE_CACHE, else the user's cache directory."""
    if os.environ.get("RAGTUNE_CACHE"):
        return Path(os.environ["RAGTUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ragtune-ray"


def remove(url: str) -> None:
    """Delete a file or a directory tree, if it exists."""
    store, path = locate(url)
    if store.exists(path):
        store.rm(path, recursive=True)


def copy_tree(source: str, target: str) -> None:
    """Copy a directory and replace the target; within an object store, its server copies.

    Local files become hard links, so they must never be changed in place.
    """
    remove(target)
    source_store, source_path = locate(source)
    target_store, target_path = locate(target)
    if isinstance(source_store, LocalFileSystem) and isinstance(target_store, LocalFileSystem):
        Path(target_path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source_path, target_path, copy_function=_link_or_copy)
        return
    for path in source_store.find(source_path):
        copied = join(target_path, path.removeprefix(f"{source_path}/"))
        if source_store is target_store:
            source_store.cp_file(path, copied)
            continue
        with source_store.open(path, "rb") as old, target_store.open(copied, "wb") as new:
            shutil.copyfileobj(old, new, 2**22)


def make_directory(path: Path) -> None:
    """Create a local directory and its missing parents, and wait until their entries are written to the disk."""
    missing = [place for place in [path, *path.parents] if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


def sync(path: Path) -> None:
    """Wait until a local file or directory is written to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
