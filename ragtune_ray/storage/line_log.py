"""Appends lines to a local file that several processes may share, such as what people decide."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ragtune_ray.storage import filesystem


def append(path: Path, lines: bytes) -> None:
    """Add whole lines, and wait until they are on the disk. If the disk is full, no part of them is left."""
    filesystem.make_directory(path.parent)
    is_new = not path.exists()
    with locked(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        start = os.fstat(descriptor).st_size
        try:
            while lines:
                lines = lines[os.write(descriptor, lines) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)
            raise
    if is_new:
        filesystem.sync(path.parent)


def mend(path: Path, parse: Callable[[bytes], object]) -> Path | None:
    """Repair a last line without a line break, as a killed process leaves it; return the file that it was moved to.

    A line that `parse` reads gets its line break, and None is returned. One for which `parse` raises a ValueError is moved, byte
    for byte, to the file beside it whose name ends with `.torn`.
    """
    if not path.exists():
        return None
    with locked(path, os.O_WRONLY | os.O_APPEND) as descriptor:
        content = path.read_bytes()
        start = content.rfind(b"\n") + 1
        if start == len(content):
            return None
        torn: Path | None = None
        try:
            parse(content[start:])
        except ValueError:
            torn = path.with_name(f"{path.name}.torn")
            append(torn, content[start:] + b"\n")
            os.ftruncate(descriptor, start)
        else:
            os.write(descriptor, b"\n")
        os.fsync(descriptor)
        return torn


@contextlib.contextmanager
def locked(path: Path, flags: int = os.O_RDONLY | os.O_CREAT) -> Iterator[int]:
    """The descriptor of a file to which no other process appends meanwhile."""
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
