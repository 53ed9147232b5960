"""Copies of remote files stay below a bound, are downloaded once, and are never taken from a process that uses them."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from ragtune_ray.storage import artifacts, filesystem, node_cache
from tests.support import stores

KIB = 1024


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies; entries may be removed at any age."""
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(node_cache, "RECENT_SECONDS", 0.0)
    return tmp_path / "cache" / "artifacts"


def folder(tmp_path: Path, name: str, num_bytes: int = 10 * KIB) -> str:
    """A remote folder with a file x of this size, filled with the folder's name."""
    (tmp_path / "store" / name).mkdir(parents=True)
    (tmp_path / "store" / name / "x").write_bytes((name.encode() * num_bytes)[:num_bytes])
    return f"folder://{tmp_path}/store/{name}"


def copy(url: str, *, scratch: bool = False) -> Path:
    return filesystem.local_copy(url, ["x"], url.rpartition("/")[2], scratch=scratch) / "x"


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


def size(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("x"))


def test_least_recently_used_copy_is_removed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE_BYTES", str(35 * KIB))
    for number, name in enumerate(["a", "b", "c"]):
        copy(folder(tmp_path, name))
        os.utime(cache / name, (number, number))
    copy(f"folder://{tmp_path}/store/a")  # used again: now `b` is the oldest
    copy(folder(tmp_path, "d"))
    assert names(cache) == ["a", "c", "d"], "30 KiB of 35"
    assert stores.downloads(tmp_path / "store" / "a") == ["x"]


def test_leased_copy_stays_until_the_lease_ends(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE_BYTES", str(15 * KIB))
    copy(folder(tmp_path, "a"))
    lease = node_cache.lease(cache / "a")
    copy(folder(tmp_path, "b"))
    assert names(cache) == ["a", "b"], "what is used is kept beyond the bound"
    assert "20,480 bytes of copies, more than the bound of 15,360; set RAGTUNE_CACHE_BYTES" in caplog.text
    del lease
    copy(folder(tmp_path, "c"))
    assert names(cache) == ["c"]


def test_open_artifact_keeps_its_files_while_it_lives(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE_BYTES", "1")
    url = f"folder://{tmp_path}/store/thing"
    staging = artifacts.stage(url)
    (staging / "one").write_text("1")
    assert artifacts.publish(staging, url, "thing")
    opened = artifacts.open_artifact(url)
    copy(folder(tmp_path, "a"))
    assert (opened.path / "one").read_text() == "1"
    path = opened.path
    del opened
    copy(folder(tmp_path, "b"))
    assert not path.exists()


def test_copy_used_a_moment_ago_stays(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "RECENT_SECONDS", 60.0)
    monkeypatch.setenv("RAGTUNE_CACHE_BYTES", "1")
    copy(folder(tmp_path, "a"))
    copy(folder(tmp_path, "b"))
    assert names(cache) == ["a", "b"]
    os.utime(cache / "a", (time.time() - 61,) * 2)
    copy(folder(tmp_path, "c"))
    assert names(cache) == ["b", "c"]


def test_without_a_setting_half_of_the_room_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    usage = type("Usage", (), {"free": 600})
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: usage)
    assert node_cache.limit_bytes(cache, 200) == 400


def test_wrong_bound_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE_BYTES", "50 GB")
    with pytest.raises(node_cache.CacheError, match="RAGTUNE_CACHE_BYTES='50 GB': is not a number of bytes; write it"):
        copy(folder(tmp_path, "a"))


def test_copy_that_does_not_fit_on_the_disk_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "free_bytes", lambda _: KIB)
    with pytest.raises(filesystem.SpaceError, match=r"no space for a copy of .*/a/x"):
        copy(folder(tmp_path, "a"))
    assert [*(cache / "a").iterdir()] == []


def hold(pipe: Connection, cache: str, url: str) -> None:
    """Copy a file as scratch, say so, and wait."""
    os.environ["RAGTUNE_CACHE"] = cache
    copy(url, scratch=True)
    pipe.send("copied")
    pipe.recv()


@pytest.fixture
def holder(tmp_path: Path, cache: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """A process that uses scratch of a job."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(there, str(cache.parent), folder(tmp_path, "job")))
    process.start()
    assert here.poll(60)
    yield process
    process.kill()
    process.join()


def test_scratch_is_removed_after_its_last_process_died(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, holder: multiprocessing.process.BaseProcess
) -> None:
    assert names(cache) == ["scratch-job"]
    copy(folder(tmp_path, "a"))
    node_cache._holders.clear()  # begin again, as another process would
    monkeypatch.setenv("RAGTUNE_CACHE_BYTES", "1")
    copy(folder(tmp_path, "b"))
    assert names(cache) == ["b", "scratch-job"], "its process lives"
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    monkeypatch.delenv("RAGTUNE_CACHE_BYTES")
    node_cache._holders.clear()
    copy(f"folder://{tmp_path}/store/b")
    assert names(cache) == ["b"]


def work(cache: str, urls: list[str], limit: int, seed: int) -> int:
    """Copy and read files in an order of one's own; returns the largest size of the cache that was seen."""
    os.environ |= {"RAGTUNE_CACHE": cache, "RAGTUNE_CACHE_BYTES": str(limit)}
    node_cache.RECENT_SECONDS = 0.0
    largest, held = 0, []
    for step in range(40):
        url = urls[(seed * 7 + step * (seed + 1)) % len(urls)]
        name = url.rpartition("/")[2]
        lease = node_cache.lease(Path(cache) / "artifacts" / name)
        content = copy(url).read_bytes()
        assert content == (name.encode() * len(content))[: len(content)]
        assert len(content) == 10 * KIB
        held = [*held[-1:], (lease, copy(url))]
        assert all(path.exists() for _, path in held), "leased files are there"
        with node_cache._exclusive(Path(cache) / "artifacts" / ".lock"):  # nothing is removed while it is measured
            largest = max(largest, sum(path.stat().st_size for path in Path(cache, "artifacts").glob("n*/x")))
    return largest


def test_many_processes_stay_below_the_bound(tmp_path: Path, cache: Path) -> None:
    urls = [folder(tmp_path, f"n{number:02d}") for number in range(24)]
    limit = 120 * KIB  # four processes lease at most two files each, and load a third
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        largest = [*pool.map(work, *zip(*[(str(cache.parent), urls, limit, seed) for seed in range(4)], strict=True))]
    assert max(largest) <= limit
    assert size(cache) <= limit
    assert max(largest) > 60 * KIB, "the cache is used"


def fetch(cache: str, urls: list[str], barrier: Barrier) -> None:
    os.environ["RAGTUNE_CACHE"] = cache
    for url in urls:
        barrier.wait(60)
        assert copy(url).read_bytes() == url[-1:].encode() * 500 * KIB


def test_one_of_many_processes_downloads(tmp_path: Path, cache: Path) -> None:
    urls = [folder(tmp_path, letter, 500 * KIB) for letter in "abcdefghijklmnop"]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    started = [context.Process(target=fetch, args=(str(cache.parent), urls, barrier)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 4
    assert [stores.downloads(tmp_path / "store" / url[-1]) for url in urls] == [["x"]] * len(urls)
