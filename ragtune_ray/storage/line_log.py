"""Appends lines to a local file that several processes may share, such as what people decide."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ragtune_ray.storage import filesystem


def append(path: Path, lines: str) -> None:
    """Add whole lines, and wait until they are on the disk. If the disk is full, no part of them is left."""
    filesystem.make_directory(path.parent)
    is_new = not path.exists()
    with locked(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        start = os.fstat(descriptor).st_size
        try:
            content = lines.encode("utf-8", "backslashreplace")
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)
            raise
    if is_new:
        filesystem.sync(path.parent)


def mend(path: Path, is_whole: Callable[[bytes], bool]) -> Path | None:
    """Move an incomplete last line, which a killed process left, to the file beside it that ends with `.torn`; return that file.

    A last line that lacks only its line break gets one; None: nothing was moved.
    """
    if not path.exists():
        return None
    with locked(path, os.O_RDWR) as descriptor, path.open("r+b") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        last = content[start:]
        if not last:
            return None
        torn = path.with_name(f"{path.name}.torn")
        if is_whole(last):
            file.write(b"\n")
        else:
            append(torn, last.decode("utf-8", "replace") + "\n")
            file.truncate(start)
        file.flush()
        os.fsync(descriptor)
        return None if is_whole(last) else torn


@contextlib.contextmanager
def locked(path: Path, flags: int = os.O_RDONLY | os.O_CREAT) -> Iterator[int]:
    """The descriptor of a file to which no other process appends meanwhile."""
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
