"""Publishes directories atomically, on a local disk or in an object store, and refuses incomplete or damaged ones.

An *artifact* is a directory whose `manifest.json`, written last, contains facts, the size and sha256 of every file, and
its own sha256. On a local disk an artifact appears with one rename; in an object store its files are uploaded first and
its manifest last, with a conditional put. Either way exactly one of two publishers wins, and readers never see a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

import ragtune_ray
from ragtune_ray import RagtuneError
from ragtune_ray.storage import checksums, filesystem, node_cache

MANIFEST = "manifest.json"
CURRENT = "CURRENT"
"""The file that names the artifact of a folder that readers use."""
MANIFEST_FORMAT = 1
RECEIPT_MIN_BYTES = 2**20
"""Smaller files are hashed whenever they are opened: looking for a receipt would take as long."""
RECEIPT_MIN_AGE_NS = 10**9

logger = logging.getLogger(__name__)


class ArtifactError(RagtuneError, RuntimeError):
    """An artifact is missing, unfinished or damaged."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete artifact whose files were checked and can be read at a local path."""

    path: Path
    manifest: dict[str, Any]
    lease: node_cache.Lease | None = field(default=None, compare=False, repr=False)
    """Of a remote artifact's local copy; whoever opens files later keeps it until then."""


def stage(url: str, scratch: str | None = None) -> Path:
    """Create an empty local directory in which to write the artifact for `url` before `publish`.

    If `url` is local, the directory is on the same file system, so that publishing is one rename: in `scratch`, which the
    caller removes after the job with everything that killed workers left in it, or else next to the target.
    """
    store, path = filesystem.locate(url)
    if isinstance(store, LocalFileSystem):
        target = Path(path)
        filesystem.make_directory(target.parent)
        parent = Path(filesystem.locate(scratch)[1]) if scratch else target.parent
        staging = parent / f".staging-{target.name}-{uuid.uuid4().hex[:12]}"
        staging.mkdir(parents=True)
        return staging
    return Path(tempfile.mkdtemp(prefix="ragtune-staging-"))


def publish(staging: Path, url: str, kind: str, **facts: Any) -> bool:
    """Publish a directory from `stage` at `url` atomically, with its manifest; exactly one of two publishers wins.

    Args:
        staging: the directory; it is moved or deleted.
        url: its destination.
        kind: what it is, such as "segment"; `open_artifact` checks it.
        **facts: JSON values for the manifest.

    Returns:
        True if this call published it; False if `url` already had a complete artifact (this one is then discarded).

    Raises:
        ArtifactError: `url` exists and is not a complete artifact.
    """
    names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    manifest = {
        "format": MANIFEST_FORMAT,
        "kind": kind,
        "package_version": ragtune_ray.__version__,
        **facts,
        "files": {
            name: {"bytes": (staging / name).stat().st_size, "sha256": checksums.file_sha256(staging / name)}
            for name in names
        },
    }
    sha256 = checksums.bytes_sha256(checksums.canonical_json(manifest))
    content = checksums.canonical_json({**manifest, "manifest_sha256": sha256})
    store, path = filesystem.locate(url)
    try:
        if isinstance(store, LocalFileSystem):
            return _publish_locally(staging, Path(path), content)
        return _publish_remotely(store, staging, path, names, content)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_artifact(url: str, kind: str | None = None, names: Collection[str] | None = None) -> Artifact:
    """Check the files of an artifact; a remote one is copied into the local cache first.

    A large file is hashed once per machine: a receipt in the cache records that a file with this size, inode and
    modification time had the right sha256. `find_problems` hashes every time. A damaged copy is downloaded again.

    Args:
        url: the artifact's directory.
        kind: refuse an artifact of another kind; None accepts any.
        names: check (and copy) only these files; None means all.

    Raises:
        ArtifactError: it is missing, unfinished, of another kind or damaged.
    """
    manifest = read_manifest(url)
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(f"{url}: is a {manifest['kind']}, not a {kind}; name the directory of a {kind}")
    expected = {name: entry for name, entry in manifest["files"].items() if names is None or name in names}
    version = manifest["manifest_sha256"]
    path = filesystem.local_copy(url, [], version)
    lease = None if filesystem.is_local(url) else node_cache.lease(path)
    found = [problem for name, entry in expected.items() for problem in _copy_and_check(url, name, entry, version)]
    if found:
        raise ArtifactError(f"{url}: damaged: {'; '.join(found)}; run the command that wrote it again")
    return Artifact(path, manifest, lease)


def read_manifest(url: str) -> dict[str, Any]:
    """Read an artifact's manifest and verify its own checksum; the files are not read.

    Raises:
        ArtifactError: there is no manifest, or it was changed after it was written.
    """
    store, path = filesystem.locate(filesystem.join(url, MANIFEST))
    try:
        content = store.cat_file(path)
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
    actual = checksums.bytes_sha256(checksums.canonical_json(manifest))
    if claimed != actual or content != checksums.canonical_json({**manifest, "manifest_sha256": claimed}):
        raise ArtifactError(f"{url}: {MANIFEST} was changed after it was written; run the command that wrote it again")
    if manifest_format != MANIFEST_FORMAT:
        raise ArtifactError(
            f"{url}: has format {manifest_format}, this version reads {MANIFEST_FORMAT}; build it again"
        )
    for name in manifest["files"]:
        if not _stays_below(name):
            raise ArtifactError(
                f"{url}: {MANIFEST} names the file {name!r}, which is outside the directory; do not use it"
            )
    return {**manifest, "manifest_sha256": claimed}


def _stays_below(name: str) -> bool:
    """Whether a relative path in a manifest names a file below the artifact's directory."""
    parts = name.split("/")
    return not {"", ".", ".."} & set(parts) and "\0" not in name and "\\" not in name


def find_problems(url: str) -> list[str]:
    """List the problems of an artifact, one sentence each; its files are read at `url`, not in the local cache."""
    try:
        manifest = read_manifest(url)
    except ArtifactError as error:
        return [str(error)]
    store, root = filesystem.locate(url)
    files = manifest["files"]
    if isinstance(store, LocalFileSystem):
        path = Path(root)
        present = [item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()]
        found = [text for name, entry in files.items() for text in _check_file(path, name, entry)]
    else:
        sizes = _remote_sizes(store, root)
        found = [text for name in files for text in _check_object(store, root, name, files[name], sizes.get(name))]
        present = []  # a publisher that lost the race leaves its uploads next to the winner's files
    strays = sorted(set(present) - {MANIFEST, *files})
    return [f"{url}: {text}" for text in [*found, *(f"{name} is not named in its manifest" for name in strays)]]


def is_finished(url: str) -> bool:
    """Whether `url` is a complete artifact, according to its manifest; the files are not read."""
    try:
        read_manifest(url)
    except ArtifactError:
        return False
    return True


def current(folder: str) -> str | None:
    """The artifact that the CURRENT file of a folder names; None without such a file."""
    pointer = filesystem.join(folder, CURRENT)
    return filesystem.join(folder, filesystem.read_text(pointer).strip()) if filesystem.exists(pointer) else None


def make_current(folder: str, name: str) -> None:
    """Let the CURRENT file of a folder name this artifact, so that readers use it from now on."""
    filesystem.replace_text(filesystem.join(folder, CURRENT), f"{name}\n")


def _check_file(path: Path, name: str, entry: dict[str, Any]) -> list[str]:
    file = path / name
    size = file.stat().st_size if file.is_file() else None
    return _compare(name, entry, size, lambda: checksums.file_sha256(file))


def _compare(name: str, entry: dict[str, Any], size: int | None, sha256: Callable[[], str]) -> list[str]:
    """How a file differs from its manifest entry; it is hashed only if its size is right. Size None: it is missing."""
    if size is None:
        return [f"{name} is missing"]
    if size != entry["bytes"]:
        return [f"{name} has {size} bytes, its manifest says {entry['bytes']}"]
    if sha256() != entry["sha256"]:
        return [f"{name} does not match its sha256"]
    return []


def _remote_sizes(store: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """The size of each object below `root`, by its relative name."""
    store.invalidate_cache()  # this process may have cached a listing before the damage
    found = store.find(root, detail=True)
    # Some tools write an empty object for each folder, whose name ends with a slash.
    return {path.removeprefix(f"{root}/"): int(info["size"]) for path, info in found.items() if not path.endswith("/")}


def _check_object(
    store: fsspec.AbstractFileSystem, root: str, name: str, entry: dict[str, Any], size: int | None
) -> list[str]:
    def sha256() -> str:
        with store.open(f"{root}/{name}", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _compare(name, entry, size, sha256)


def _copy_and_check(url: str, name: str, entry: dict[str, Any], version: str) -> list[str]:
    """What is wrong with a file's local copy, or with the file itself if the artifact is local."""
    try:
        found = _check_once(filesystem.local_copy(url, [name], version), name, entry)
        if found and not filesystem.is_local(url):
            # The copy may have been damaged in the cache: only a fresh download shows whether the artifact is.
            found = _check_once(filesystem.local_copy(url, [name], version, refresh=True), name, entry)
    except FileNotFoundError:
        return [f"{name} is missing"]
    return found


def _check_once(path: Path, name: str, entry: dict[str, Any]) -> list[str]:
    """`_check_file`, unless a receipt shows that this state of the file has passed it before on this machine."""
    try:
        status = (path / name).stat()
    except OSError:
        return _check_file(path, name, entry)
    if status.st_size < RECEIPT_MIN_BYTES:
        return _check_file(path, name, entry)
    state = [str(path / name), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    receipt = filesystem.cache_directory() / "checked" / checksums.digest([*state, entry["sha256"]])
    if receipt.exists():
        return []
    found = _check_file(path, name, entry)
    # A file that changed just now could change again within the clock's resolution, and its receipt would stay valid.
    if not found and time.time_ns() - status.st_ctime_ns > RECEIPT_MIN_AGE_NS:
        with contextlib.suppress(OSError):  # without a writable cache, files are hashed each time
            receipt.parent.mkdir(parents=True, exist_ok=True)
            receipt.touch()
    return found


def _publish_locally(staging: Path, target: Path, content: bytes) -> bool:
    (staging / MANIFEST).write_bytes(content)
    for path in sorted(staging.rglob("*")):
        filesystem.sync(path)
    filesystem.sync(staging)
    try:
        # rename(2) replaces an empty directory, but never one with files in it, so the first publisher wins.
        staging.rename(target)
    except OSError as error:
        if not target.exists():
            raise  # the disk failed; the target is not the reason
        if not is_finished(str(target)):
            raise ArtifactError(f"{target}: cannot be published over: {error.strerror}; move it away") from error
        return False
    filesystem.sync(target.parent)
    return True


def _publish_remotely(
    store: fsspec.AbstractFileSystem, staging: Path, target: str, names: list[str], content: bytes
) -> bool:
    manifest = f"{target}/{MANIFEST}"
    for name in names:
        # Before every file: another process that published meanwhile must keep its own.
        if store.exists(manifest):
            return False
        store.put_file(str(staging / name), f"{target}/{name}")
    try:
        store.pipe_file(manifest, content, mode="create")
    except FileExistsError:
        return False
    return True
