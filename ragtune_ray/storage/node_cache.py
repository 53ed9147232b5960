"""Bounds what a machine keeps of remote files, and knows which of these copies a living process uses.

The cache is a folder of *entries*: directories with the files of one artifact, or with the scratch files of one job. A process
leases an entry while it uses it. Its leases are lines of a file that it keeps locked, so they end with it, however it dies.
Before a download exceeds the bound, entries without a lease are removed, the least recently used first. Scratch that no living
process uses is removed when the next process begins to use the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ragtune_ray import RagtuneError

LIMIT = "RAGTUNE_CACHE_BYTES"
"""The environment variable with the bound in bytes. Without it: half of what the disk would have free with an empty cache. The
other half is for staging, for objects that Ray spills, and for the machine's other work."""
TARGET_SHARE = 0.9
"""Entries are removed down to this share of the bound, so that not every download has to look at all of them."""
RECENT_SECONDS = 300.0
"""An entry that was used so recently is not removed: somebody may be about to open a path that was just returned."""
SCRATCH = "scratch-"
"""Prefix of the entries of jobs."""

logger = logging.getLogger(__name__)


class CacheError(RagtuneError, ValueError):
    """The environment variable with the bound of the cache is not a number of bytes."""


class Lease:
    """Keeps an entry from being removed for as long as this object lives, but not longer than its process."""

    def __init__(self, entry: Path, ended: deque[str]) -> None:
        self._name, self._ended = entry.name, ended

    def __del__(self) -> None:
        self._ended.append(self._name)  # no locks here: the garbage collector may call this at any moment


@dataclass(eq=False, slots=True)
class _Holder:
    """The leases of this process in one cache."""

    file: IO[str]
    leases: Counter[str] = field(default_factory=Counter)
    """Name of an entry -> number of its leases; those that ended may still count."""
    ended: deque[str] = field(default_factory=deque)

    def add(self, entry: Path) -> Lease:
        """Note a lease, and forget those that ended."""
        self.leases[entry.name] += 1
        is_new, is_less = self.leases[entry.name] == 1, False
        while self.ended:
            name = self.ended.popleft()
            self.leases[name] -= 1
            if not self.leases[name]:
                del self.leases[name]
                is_less = True
        if is_less:
            self.file.truncate(0)
            self.file.writelines(f"{name}\n" for name in self.leases)
        elif is_new:
            self.file.write(f"{entry.name}\n")
        self.file.flush()
        return Lease(entry, self.ended)


_holders: dict[tuple[Path, int], _Holder] = {}
"""Cache and process id (a forked process has its own) -> leases."""
_kept: dict[Path, Lease] = {}
"""Leases until the end of the process."""
_threads = threading.Lock()


def lease(entry: Path) -> Lease:
    """Create an entry if it does not exist, note that it is used now, and lease it."""
    root = entry.parent
    with _threads, _exclusive(root / ".lock"):
        holder = _holders.get((root, os.getpid()))
        if holder is None:
            holder = _holders[root, os.getpid()] = _new_holder(root)
        made = holder.add(entry)
        entry.mkdir(exist_ok=True)
        os.utime(entry)
    return made


def keep(entry: Path) -> None:
    """Lease an entry until the end of the process."""
    if entry not in _kept:
        _kept[entry] = lease(entry)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time fetch what belongs at `path`; the others wait, and then find it there."""
    with _exclusive(path.parent / ".locks" / path.name):
        yield


@contextlib.contextmanager
def downloading(entry: Path, num_bytes: int) -> Iterator[Path]:
    """Make room for a file of a leased entry; gives a path to write it to, which the block renames.

    Call it within `locked(entry)`.
    """
    for left in entry.glob(".part-*"):  # of a process that died
        left.unlink()
    part = entry / f".part-{uuid.uuid4().hex[:12]}"
    reserved = part.with_name(f"{part.name}-reserved")
    try:
        _make_room(entry.parent, num_bytes, reserved)
        yield part
    finally:
        for path in (part, reserved):
            path.unlink(missing_ok=True)


def limit_bytes(root: Path, used: int) -> int:
    """The bound of a cache that contains `used` bytes.

    Raises:
        CacheError: RAGTUNE_CACHE_BYTES is not a number of bytes.
    """
    text = os.environ.get(LIMIT, "")
    if not text:
        return (shutil.disk_usage(root).free + used) // 2
    if not text.isascii() or not text.isdigit():
        raise CacheError(f"{LIMIT}={text!r}: is not a number of bytes; write it in digits, such as 50000000000")
    return int(text)


def _make_room(root: Path, num_bytes: int, reserved: Path) -> None:
    """Count a coming download, and remove entries if it would exceed the bound.

    The file `reserved` takes no space, but has the size of the download for a process that looks for room meanwhile.
    """
    doomed: list[Path] = []
    with _exclusive(root / ".lock"):
        usage = root / ".usage"
        # Counts too much after failed downloads, until entries are looked at again.
        used = int(usage.read_text(encoding="utf-8") or 0) if usage.exists() else 0
        if used + num_bytes > limit_bytes(root, used):
            used, doomed = _remove_entries(root, num_bytes)
        usage.write_text(str(used + num_bytes), encoding="utf-8")
        reserved.touch()
        os.truncate(reserved, num_bytes)
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def _remove_entries(root: Path, num_bytes: int) -> tuple[int, list[Path]]:
    """Move entries out of the way until a download fits; returns the bytes of the others, and what is to be deleted."""
    doomed = [*root.glob(".removed-*")]  # of a process that died
    used_by, sizes = _in_use(root), {}
    for entry in _entries(root):
        sizes[entry] = _size(entry)
    used = sum(sizes.values())
    limit = limit_bytes(root, used)
    for entry in sorted(sizes, key=lambda each: (not each.name.startswith(SCRATCH), each.stat().st_mtime)):
        if used + num_bytes <= TARGET_SHARE * limit:
            break
        if entry.name not in used_by and time.time() - entry.stat().st_mtime >= RECENT_SECONDS:
            used -= sizes[entry]
            doomed.append(_set_aside(entry))
    if used + num_bytes > limit:
        logger.warning(
            "%s: running jobs need %s bytes of copies, more than the bound of %s; set %s on this machine, or use a larger disk",
            *(root, f"{used + num_bytes:,}", f"{limit:,}", LIMIT),
        )
    return used, doomed


def _new_holder(root: Path) -> _Holder:
    """Register this process; removes scratch that no living process uses."""
    in_use = _in_use(root)
    for entry in _entries(root):
        if entry.name.startswith(SCRATCH) and entry.name not in in_use:
            shutil.rmtree(_set_aside(entry), ignore_errors=True)
    path = root / ".leases" / uuid.uuid4().hex
    path.parent.mkdir(exist_ok=True)
    file = path.open("a", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    return _Holder(file)


def _in_use(root: Path) -> set[str]:
    """Names of the entries that living processes lease; removes what dead ones left."""
    names: set[str] = set()
    for path in (root / ".leases").glob("*"):
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its process lives
                names.update(file.read().splitlines())
            else:
                path.unlink()
    return names


def _entries(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if not path.name.startswith(".")]


def _size(entry: Path) -> int:
    """Bytes of the files of an entry; other processes may rename some meanwhile."""
    total = 0
    for path in entry.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _set_aside(entry: Path) -> Path:
    """Rename an entry at once, so that nobody sees a part of it; returns the path to delete."""
    (entry.parent / ".locks" / entry.name).unlink(missing_ok=True)
    return entry.rename(entry.with_name(f".removed-{uuid.uuid4().hex[:12]}"))


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
