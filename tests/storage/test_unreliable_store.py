"""An object store whose n-th write fails, for every n: nothing half-published is ever seen, and the next try ends it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ragtune_ray.storage import artifacts, filesystem


class FailingStore(MemoryFileSystem):
    """Objects in memory; the write whose number is `fails_at` fails, after half of the object has arrived."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec keeps the objects of a class there
    pseudo_dirs = [""]  # noqa: RUF012
    num_writes = fails_at = 0

    def _count(self, path: str) -> None:
        type(self).num_writes += 1
        if self.num_writes == self.fails_at:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path)

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        self._count(rpath)
        super().put_file(lpath, rpath, *arguments, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._count(path)
        super().pipe_file(path, value, mode, **options)


@pytest.fixture
def store() -> Iterator[type[FailingStore]]:
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    FailingStore.store.clear()
    FailingStore.num_writes = FailingStore.fails_at = 0
    yield FailingStore
    FailingStore.store.clear()


def publish(url: str, rows: int = 3) -> bool:
    staging = artifacts.stage(url)
    for name in ("a.txt", "b.txt", "c.txt"):
        (staging / name).write_text(name * 9)
    try:
        return artifacts.publish(staging, url, "thing", rows=rows)
    finally:
        assert not staging.exists(), "a store that is down does not fill the local disk"


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_whichever_write_fails_the_artifact_is_not_there_and_the_next_try_publishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: type[FailingStore], fails_at: int
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path))
    url = "failing://bucket/a"
    store.fails_at = fails_at
    with pytest.raises(TimeoutError, match="bucket/a/"):
        publish(url)
    assert not artifacts.is_finished(url)
    with pytest.raises(artifacts.ArtifactError, match="missing or unfinished"):
        artifacts.open_artifact(url)
    assert publish(url)
    assert artifacts.find_problems(url) == []
    assert (artifacts.open_artifact(url).path / "c.txt").read_text() == "c.txt" * 9
    assert not publish(url), "it stays the first one's"


def test_a_pointer_that_cannot_be_written_keeps_its_old_text(store: type[FailingStore]) -> None:
    filesystem.replace_text("failing://bucket/CURRENT", "old")
    store.fails_at = store.num_writes + 1
    with pytest.raises(TimeoutError, match="bucket/CURRENT"):
        filesystem.replace_text("failing://bucket/CURRENT", "new")
    assert filesystem.read_text("failing://bucket/CURRENT") == "old"


def test_of_two_publishers_at_once_in_a_store_the_first_manifest_stays(
    store: type[FailingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "failing://bucket/a"
    real = store.put_file
    others: list[bool] = []

    def overtaken(self: FailingStore, lpath: str, rpath: str, **options: Any) -> None:
        real(self, lpath, rpath, **options)
        if not others:  # this publisher has seen that nothing is there, and now another one is faster
            others.append(False)
            others[0] = publish(url, rows=4)

    monkeypatch.setattr(store, "put_file", overtaken)
    assert not publish(url)
    assert others == [True]
    assert artifacts.read_manifest(url)["rows"] == 4
    assert artifacts.find_problems(url) == []
