"""A disk whose n-th operation fails, for every n: nothing is half-published, and the same command ends it afterwards."""

import builtins
import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray.storage import artifacts
from tests.support.index_changes import CHANGES, assert_converged, assert_whole

WRITES = ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "copyfile"), (np, "save"))
WRITES_OF_LIBRARIES = ((faiss, "write_index"), (pq.ParquetWriter, "write_table"))
REMOVALS = ((os, "unlink"), (os, "remove"), (os, "rmdir"))
REMOVED = {name for _, name in REMOVALS}
OPENS = ((io, "open"), (builtins, "open"))


class FailingDisk:
    """Counts what is done to the disk, and fails the n-th operation with EIO.

    Args:
        fails_at: n, from 1; 0 fails none.
    """

    def __init__(self, fails_at: int) -> None:
        self.count = 0
        self.failed = ""
        """The operation that failed."""
        self._fails_at = fails_at

    def touch(self, name: str) -> None:
        """One operation more, and EIO if it is the n-th; the path that could not be opened then cannot be opened later."""
        self.count += 1
        if self.count == self._fails_at or (" " in name and name == self.failed):
            self.failed = name
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    def wrap(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            self.touch(name)
            return real(*arguments, **options)

        return operation

    def wrap_open(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Only opening for writing counts."""

        def operation(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & set("wax+"):
                self.touch(f"{name} {file}")
            return real(file, mode, *arguments, **options)

        return operation

    def wrap_mkdir(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Only what does not stand yet counts: pathlib tries first and looks afterwards."""

        def operation(path: Any, *arguments: Any, **options: Any) -> Any:
            if not Path(path).exists():
                self.touch(f"mkdir {path}")
            return real(path, *arguments, **options)

        return operation


@contextlib.contextmanager
def failing_disk(fails_at: int) -> Iterator[FailingDisk]:
    """Everything by which files are written, moved and removed goes through a `FailingDisk` while the block runs."""
    disk = FailingDisk(fails_at)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (*WRITES, *WRITES_OF_LIBRARIES, *REMOVALS):
            patch.setattr(owner, name, disk.wrap(getattr(owner, name), name))
        for owner, name in (*OPENS, (pa, "OSFile")):
            patch.setattr(owner, name, disk.wrap_open(getattr(owner, name), name))
        patch.setattr(os, "mkdir", disk.wrap_mkdir(os.mkdir))
        yield disk


def fails(run: Callable[[], None], disk: FailingDisk) -> bool:
    """Whether a command failed, as it must if an operation did; only what is removed behind the work may fail unsaid."""
    said = ""
    try:
        run()
    except (OSError, artifacts.ArtifactError) as error:
        said = repr(error)
    assert not said or disk.failed, said
    assert said or disk.failed in {"", *REMOVED}
    return bool(said)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_wherever_the_disk_fails_nothing_is_half_published_and_the_next_run_converges(
    name: str,
    starts: dict[str, Path],
    tmp_path: Path,
    sandbox: Path,
) -> None:
    change = CHANGES[name]
    num_failed = 0
    for fails_at in range(1, 2000):
        folder = Path(copytree(starts[change.start], tmp_path / "case"))
        with failing_disk(fails_at) as disk:
            num_failed += fails(lambda: change.run(folder), disk)  # noqa: B023
        assert_whole(folder / "workspace", change.old, change.new)
        if not disk.failed:
            break
        if disk.failed not in REMOVED:
            assert [*(folder / "workspace").rglob(".*")] == [], "a disk that is full does not get fuller with every try"
        # The next run is another process: what the first could not let go of is held no more.
        shutil.rmtree(folder / "workspace" / "index" / "readers", ignore_errors=True)
        change.run(folder)
        assert_converged(folder / "workspace", change.new)
        shutil.rmtree(folder)
    assert not disk.failed
    assert num_failed >= 3
