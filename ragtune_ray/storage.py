"""Directories that are complete or refused, on a local disk or in an object store, through one code path.

In: files in a staging directory on the local disk. Out: an *artifact*: a directory whose `manifest.json`, written last,
holds facts, the size and sha256 of every file, and a sha256 of itself. A directory without a manifest, or whose files
do not match it, is refused by name. This module knows nothing of what the files mean.

Locally an artifact appears by one rename; in an object store its files are uploaded first and its manifest last, by a
conditional put. Either way exactly one of two publishers wins, and a reader never sees half an artifact.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import types
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

import ragtune_ray

__all__ = [
    "CURRENT",
    "MANIFEST",
    "Artifact",
    "ArtifactError",
    "SpaceError",
    "bytes_sha256",
    "cache_directory",
    "commit_file",
    "copy_tree",
    "current",
    "digest",
    "discarding",
    "exists",
    "file_sha256",
    "free_bytes",
    "is_finished",
    "is_local",
    "join",
    "last_change",
    "list_names",
    "local_copy",
    "make_current",
    "open_artifact",
    "problems",
    "publish",
    "read_manifest",
    "read_text",
    "remove",
    "replace_text",
    "require_space",
    "save_array",
    "stage",
]

MANIFEST = "manifest.json"
CURRENT = "CURRENT"
"""The file of a folder of artifacts that names the one which readers take."""
MANIFEST_FORMAT = 1
RECEIPT_MIN_BYTES = 2**20
"""Smaller files are hashed each time they are opened: that is as quick as finding out that it is not needed."""
RECEIPT_MIN_AGE_NS = 10**9

logger = logging.getLogger(__name__)


class ArtifactError(RuntimeError):
    """An artifact is missing, unfinished or damaged; the message names it and the next step."""


class SpaceError(RuntimeError):
    """The disk cannot hold what is about to be written; the message says how much is missing where."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete artifact, its files checked and readable at a local path."""

    path: Path
    manifest: dict[str, Any]


def join(url: str, *parts: str) -> str:
    """A path below a local directory or URL.

    >>> join("s3://bucket/workspace/", "index", "CURRENT")
    's3://bucket/workspace/index/CURRENT'
    """
    return "/".join([url.rstrip("/"), *parts])


def digest(value: Any) -> str:
    """A short fingerprint of anything JSON can hold; equal values give equal fingerprints.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(_canonical(value)).hexdigest()[:16]


def bytes_sha256(content: bytes) -> str:
    """The sha256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a local file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage(url: str, scratch: str | None = None) -> Path:
    """A new, empty local directory in which the artifact for `url` is written before `publish`.

    For a local `url` it lies on the target's file system, so that publishing is one rename.

    Args:
        url: where the artifact shall stand.
        scratch: a directory on the same file system to stage in, which the caller removes when its job is done, with
            whatever killed workers left there; None stages beside the target.
    """
    filesystem, path = _filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        parent = Path(_filesystem(scratch)[1]) if scratch else target.parent
        staging = parent / f".staging-{target.name}-{uuid.uuid4().hex[:12]}"
        staging.mkdir(parents=True)
        return staging
    return Path(tempfile.mkdtemp(prefix="ragtune-staging-"))


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


def publish(staging: Path, url: str, kind: str, **facts: Any) -> bool:
    """Make a staging directory appear at `url`, whole, with its manifest; exactly one of two publishers wins.

    Args:
        staging: a directory from `stage`; it is consumed.
        url: where the artifact shall stand.
        kind: what it is, such as "segment"; `open_artifact` can ask for it.
        **facts: JSON values for the manifest.

    Returns:
        True if this call published it, False if a complete artifact already stood there (ours is then discarded).

    Raises:
        ArtifactError: something that is no complete artifact stands at `url`.
    """
    names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    manifest = {
        "format": MANIFEST_FORMAT,
        "kind": kind,
        "package_version": ragtune_ray.__version__,
        **facts,
        "files": {
            name: {"bytes": (staging / name).stat().st_size, "sha256": file_sha256(staging / name)} for name in names
        },
    }
    content = _canonical({**manifest, "manifest_sha256": hashlib.sha256(_canonical(manifest)).hexdigest()})
    filesystem, path = _filesystem(url)
    try:
        if isinstance(filesystem, LocalFileSystem):
            return _publish_locally(staging, Path(path), content)
        return _publish_remotely(filesystem, staging, path, names, content)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_artifact(url: str, kind: str | None = None, names: Collection[str] | None = None) -> Artifact:
    """Read an artifact after checking its files; a remote one is copied into the local cache first.

    A file is hashed once per machine and state: a receipt in the cache says that a file of this size, inode and time of
    change had the right sha256, and any write to it makes the receipt void. `problems` hashes every time.

    Args:
        url: the artifact's directory.
        kind: refuse an artifact of another kind; None takes any.
        names: check (and copy) only these files; None: all of them.

    Raises:
        ArtifactError: it is missing, unfinished, of another kind or damaged.
    """
    manifest = read_manifest(url)
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(f"{url}: is a {manifest['kind']}, not a {kind}; name the directory of a {kind}")
    wanted = {name: entry for name, entry in manifest["files"].items() if names is None or name in names}
    path = local_copy(url, list(wanted), manifest["manifest_sha256"])
    found = [problem for name, entry in wanted.items() for problem in _check_once(path, name, entry)]
    if found:
        raise ArtifactError(f"{url}: damaged: {'; '.join(found)}; run the command that wrote it again")
    return Artifact(path, manifest)


def read_manifest(url: str) -> dict[str, Any]:
    """The manifest of an artifact, its own checksum verified; the files are not read.

    Raises:
        ArtifactError: there is no manifest, or it was changed after it was written.
    """
    filesystem, path = _filesystem(join(url, MANIFEST))
    try:
        content = filesystem.cat_file(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(
            f"{url}: no {MANIFEST}: the directory is missing or unfinished; run the command that writes it"
        ) from error
    try:
        manifest = json.loads(content)
        claimed = manifest.pop("manifest_sha256")
        manifest_format, _, _ = manifest["format"], manifest["kind"], manifest["files"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{url}: {MANIFEST} is damaged; run the command that wrote it again") from error
    actual = hashlib.sha256(_canonical(manifest)).hexdigest()
    if claimed != actual or content != _canonical({**manifest, "manifest_sha256": claimed}):
        raise ArtifactError(f"{url}: {MANIFEST} was changed after it was written; run the command that wrote it again")
    if manifest_format != MANIFEST_FORMAT:
        raise ArtifactError(
            f"{url}: written in format {manifest_format}, this version reads {MANIFEST_FORMAT}; build it again"
        )
    return {**manifest, "manifest_sha256": claimed}


def problems(url: str) -> list[str]:
    """Everything wrong with an artifact, one sentence each; empty when it is sound."""
    try:
        manifest = read_manifest(url)
    except ArtifactError as error:
        return [str(error)]
    filesystem, root = _filesystem(url)
    if not isinstance(filesystem, LocalFileSystem):
        try:
            open_artifact(url)
        except ArtifactError as error:
            return [str(error)]
        return []
    path = Path(root)
    found = [f"{url}: {text}" for name, entry in manifest["files"].items() for text in _check_file(path, name, entry)]
    known = {MANIFEST, *manifest["files"]}
    strays = sorted(item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file())
    return found + [f"{url}: {name} is not named in its manifest" for name in strays if name not in known]


def is_finished(url: str) -> bool:
    """Whether a complete artifact stands at `url` (its manifest is sound; the files are not read)."""
    try:
        read_manifest(url)
    except ArtifactError:
        return False
    return True


def is_local(url: str) -> bool:
    """Whether a URL names a place in this machine's file system."""
    return isinstance(_filesystem(url)[0], LocalFileSystem)


def free_bytes(url: str) -> int | None:
    """Bytes that can still be written at a local place; None where nobody can say, as in an object store."""
    filesystem, path = _filesystem(url)
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
    filesystem, path = _filesystem(url)
    return bool(filesystem.exists(path))


def last_change(url: str) -> float | None:
    """When a local file, or the newest in a local directory, was last changed, in seconds since 1970; None: unknown.

    Object stores: the time of the newest object, where the store tells.
    """
    filesystem, path = _filesystem(url)
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
    filesystem, path = _filesystem(url)
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
    filesystem, path = _filesystem(url)
    return bytes(filesystem.cat_file(path)).decode("utf-8")


def replace_text(url: str, text: str) -> None:
    """Write a small file in one atomic step: a reader sees the old text or the new."""
    filesystem, path = _filesystem(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, text.encode())
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    with discarding(temporary):
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(target)
    _sync(target.parent)


def current(folder: str) -> str | None:
    """The artifact of a folder that its CURRENT names; None where it has no such file."""
    pointer = join(folder, CURRENT)
    return join(folder, read_text(pointer).strip()) if exists(pointer) else None


def make_current(folder: str, name: str) -> None:
    """Let readers of a folder take the artifact of this name from now on."""
    replace_text(join(folder, CURRENT), f"{name}\n")


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
    filesystem, path = _filesystem(url)
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
        _sync(local)
        local.replace(target)
    _sync(target.parent)


def local_copy(url: str, names: list[str], version: str) -> Path:
    """Where the files of a directory can be read locally; remote ones are downloaded once per `version`.

    Args:
        url: the directory.
        names: files below it, relative.
        version: changes when the content does; part of the cache's path.
    """
    filesystem, path = _filesystem(url)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    target = cache_directory() / "artifacts" / version[:32]
    for name in names:
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            temporary = target / f"{name}.{uuid.uuid4().hex[:12]}"
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
    filesystem, path = _filesystem(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def copy_tree(source: str, target: str) -> None:
    """A copy of a directory whose files are never changed in place; what stood at the target is gone.

    On a local disk the copy is of links and takes no room.
    """
    remove(target)
    filesystem, path = _filesystem(source)
    other, copied = _filesystem(target)
    if isinstance(filesystem, LocalFileSystem) and isinstance(other, LocalFileSystem):
        Path(copied).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, copied, copy_function=_link_or_copy)
        return
    for found in filesystem.find(path):
        with filesystem.open(found, "rb") as old, other.open(join(copied, found.removeprefix(f"{path}/")), "wb") as new:
            shutil.copyfileobj(old, new, 2**22)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, str(path)


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def _check_file(path: Path, name: str, entry: dict[str, Any]) -> list[str]:
    file = path / name
    if not file.is_file():
        return [f"{name} is missing"]
    size = file.stat().st_size
    if size != entry["bytes"]:
        return [f"{name} has {size} bytes, its manifest says {entry['bytes']}"]
    if file_sha256(file) != entry["sha256"]:
        return [f"{name} does not match its sha256"]
    return []


def _check_once(path: Path, name: str, entry: dict[str, Any]) -> list[str]:
    """`_check_file`, unless this very state of the file has passed it before on this machine."""
    try:
        status = (path / name).stat()
    except OSError:
        return _check_file(path, name, entry)
    if status.st_size < RECEIPT_MIN_BYTES:
        return _check_file(path, name, entry)
    state = [str(path / name), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    receipt = cache_directory() / "checked" / digest([*state, entry["sha256"]])
    if receipt.exists():
        return []
    found = _check_file(path, name, entry)
    # A file that is still being written could change within the clock's resolution; one that rests cannot.
    if not found and time.time_ns() - status.st_ctime_ns > RECEIPT_MIN_AGE_NS:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            receipt.parent.mkdir(parents=True, exist_ok=True)
            receipt.touch()
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish_locally(staging: Path, target: Path, content: bytes) -> bool:
    (staging / MANIFEST).write_bytes(content)
    for path in sorted(staging.rglob("*")):
        _sync(path)
    _sync(staging)
    try:
        # rename(2) replaces an empty directory but never one that holds files, so the first publisher wins.
        staging.rename(target)
    except OSError as error:
        if not target.exists():
            raise  # not that something stands there, but that the disk failed
        if not is_finished(str(target)):
            raise ArtifactError(f"{target}: cannot be published over: {error.strerror}; move it away") from error
        return False
    _sync(target.parent)
    return True


def _publish_remotely(
    filesystem: fsspec.AbstractFileSystem, staging: Path, target: str, names: list[str], content: bytes
) -> bool:
    manifest = f"{target}/{MANIFEST}"
    if filesystem.exists(manifest):
        return False
    for name in names:
        filesystem.put_file(str(staging / name), f"{target}/{name}")
    try:
        filesystem.pipe_file(manifest, content, mode="create")
    except FileExistsError:
        return False
    return True
