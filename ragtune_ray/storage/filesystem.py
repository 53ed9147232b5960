"""Files and folders at a URL, on a local disk or in an object store, through one code path.

In: a URL: a path of this machine, or any that fsspec knows, such as s3://. Out: names, texts, copies. A file that is replaced is
seen old or new, never in part. This module knows nothing of what the files mean, nor of artifacts.
"""

from __future__ import annotations

import contextlib
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

__all__ = [
    "SpaceError",
    "UrlError",
    "cache_directory",
    "commit_file",
    "copy_tree",
    "discarding",
    "exists",
    "fetched",
    "free_bytes",
    "is_local",
    "join",
    "last_change",
    "list_names",
    "local_copy",
    "locate",
    "read_text",
    "remove",
    "replace_text",
    "require_space",
    "save_array",
    "sync",
]


class UrlError(RagtuneError, ValueError):
    """Nothing installed reads such a URL; the message names what to install."""


class SpaceError(RagtuneError, RuntimeError):
    """The disk cannot hold what is about to be written; the message says how much is missing where."""


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """What holds a place, and the path within it.

    Raises:
        UrlError: nothing installed reads such a URL.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UrlError(f"{url}: {error}; for s3:// run: pip install 'ragtune-ray[s3]'") from None
    return filesystem, str(path)


def join(url: str, *parts: str) -> str:
    """A path below a local directory or URL.

    >>> join("s3://bucket/workspace/", "index", "CURRENT")
    's3://bucket/workspace/index/CURRENT'
    """
    return "/".join([url.rstrip("/"), *parts])


@contextlib.contextmanager
def discarding(path: Path) -> Iterator[None]:
    """Remove what is being written at a local path if the block fails: a full disk must not get fuller with every try."""
    try:
        yield
    except BaseException:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def is_local(url: str) -> bool:
    """Whether a URL names a place in this machine's file system."""
    return isinstance(locate(url)[0], LocalFileSystem)


def free_bytes(url: str) -> int | None:
    """Bytes that can still be written at a local place; None where nobody can say, as in an object store."""
    filesystem, path = locate(url)
    if not isinstance(filesystem, LocalFileSystem):
        return None
    place = Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(url: str, num_bytes: int, purpose: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        SpaceError: with what is needed and what is there.
    """
    free = free_bytes(url)
    if free is not None and free < num_bytes:
        raise SpaceError(
            f"{url}: no space for {purpose}: about {num_bytes / 2**20:,.1f} MiB are needed, {free / 2**20:,.1f} MiB are "
            "free; free some and run the command again: finished work is kept"
        )


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    filesystem, path = locate(url)
    return bool(filesystem.exists(path))


def last_change(url: str) -> float | None:
    """When a local file, or the newest in a local directory, was last changed, in seconds since 1970; None: unknown.

    Object stores: the time of the newest object, where the store tells.
    """
    filesystem, path = locate(url)
    if isinstance(filesystem, LocalFileSystem):
        times = []
        for place in [Path(path), *Path(path).rglob("*")]:
            with contextlib.suppress(FileNotFoundError):  # it may be on its way to its final name
                times.append(place.stat().st_mtime)
        return max(times, default=None)
    found = [info.get("LastModified") for info in filesystem.find(path, detail=True).values()]
    return max((time_.timestamp() for time_ in found if time_ is not None), default=None)


def list_names(url: str) -> list[str]:
    """Names directly below a directory, sorted; empty when it does not exist. Staging directories are left out."""
    filesystem, path = locate(url)
    filesystem.invalidate_cache(path)
    try:
        entries = filesystem.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries}
    return sorted(name for name in names if not name.startswith("."))


def read_text(url: str) -> str:
    """A small UTF-8 file.

    Raises:
        FileNotFoundError: it is not there.
    """
    filesystem, path = locate(url)
    return bytes(filesystem.cat_file(path)).decode("utf-8")


def replace_text(url: str, text: str) -> None:
    """Write a small file in one atomic step: a reader sees the old text or the new."""
    filesystem, path = locate(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, text.encode())
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    with discarding(temporary):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(target)
    sync(target.parent)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file as `numpy.save` does, which on a full disk would not say that the disk is full.

    Raises:
        OSError: the disk is full or fails; the operating system's own words.
    """
    with path.open("wb") as file:
        # What is no file of its own numpy writes piece by piece, and leaves the errors alone.
        np.save(types.SimpleNamespace(write=file.write), array, allow_pickle=False)


def commit_file(local: Path, url: str) -> None:
    """Move a finished local file to `url` in one atomic step; the last of several writers stands."""
    filesystem, path = locate(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(local), path)
        local.unlink()
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if local.stat().st_dev != target.parent.stat().st_dev:
        # A rename works within one file system only, and temporary directories are often on another than the workspace.
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
    """Where a file can be read locally within the block; a remote one is downloaded for it, whatever the cache holds.

    For files whose place says nothing of their content, such as the parts of a run: a run that is done again has others there.

    Raises:
        FileNotFoundError: a remote file is not there.
    """
    filesystem, path = locate(url)
    if isinstance(filesystem, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="ragtune-fetched-") as temporary:
        local = Path(temporary) / path.rpartition("/")[2]
        filesystem.get_file(path, str(local))
        yield local


def local_copy(url: str, names: list[str], version: str, *, again: bool = False) -> Path:
    """Where the files of a directory can be read locally; remote ones are downloaded once per `version`.

    Args:
        url: the directory.
        names: files below it, relative.
        version: changes when the content does; part of the cache's path.
        again: download remote files even if they are at hand, and put them in the place of those.

    Raises:
        FileNotFoundError: a remote file is not there.
    """
    filesystem, path = locate(url)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    target = cache_directory() / "artifacts" / version[:32]
    for name in names:
        if again or not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            temporary = target / f"{name}.{uuid.uuid4().hex[:12]}"
            with discarding(temporary):
                filesystem.get_file(f"{path}/{name}", str(temporary))
                temporary.replace(target / name)
    target.mkdir(parents=True, exist_ok=True)
    return target


def cache_directory() -> Path:
    """Where models and copies of remote artifacts are kept: RAGTUNE_CACHE, else the user's cache directory."""
    if os.environ.get("RAGTUNE_CACHE"):
        return Path(os.environ["RAGTUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ragtune-ray"


def remove(url: str) -> None:
    """Delete a file or a directory tree; nothing happens when it is not there."""
    filesystem, path = locate(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def copy_tree(source: str, target: str) -> None:
    """A copy of a directory whose files are never changed in place; what stood at the target is gone.

    On a local disk the copy is of links and takes no room.
    """
    remove(target)
    filesystem, path = locate(source)
    other, copied = locate(target)
    if isinstance(filesystem, LocalFileSystem) and isinstance(other, LocalFileSystem):
        Path(copied).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, copied, copy_function=_link_or_copy)
        return
    for found in filesystem.find(path):
        with filesystem.open(found, "rb") as old, other.open(join(copied, found.removeprefix(f"{path}/")), "wb") as new:
            shutil.copyfileobj(old, new, 2**22)


def sync(path: Path) -> None:
    """Wait until a local file or directory is on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
