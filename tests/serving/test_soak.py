"""Many index versions, one after another, in a process that never restarts: nothing of the old ones stays."""

import contextlib
import gc
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ragtune_ray import config, schema
from ragtune_ray.index import retention, snapshot, versions
from ragtune_ray.index.retriever import Retriever
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.serving.hot_swap import HotSwap

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")

ENCODER = HashingEncoder("hashing-16")
SETTINGS = config.Config()


@dataclass(frozen=True)
class Opened:
    index: snapshot.Index
    hold: contextlib.ExitStack


def usage() -> tuple[int, int, int]:
    """Open files, threads, and memory-mapped files of an index."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    num_files = len(list(Path("/proc/self/fd").iterdir()))
    return num_files, threading.active_count(), sum("/segments/" in line for line in maps)


def test_swapping_and_searching_again_and_again_leaves_no_file_thread_map_or_hold(
    tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]
) -> None:
    workspace = str(tmp_path)

    def publish(number: int) -> str:
        first = number % 4
        return write_index(tmp_path, passages[first : first + 3], ENCODER, num_segments=1)

    def load(name: str, previous: Opened | None) -> Opened:
        hold = contextlib.ExitStack()
        hold.enter_context(retention.held(workspace, name))
        return Opened(snapshot.open_index(workspace, name, reuse=previous.index if previous else None), hold)

    publish(0)
    current = HotSwap(
        "index version",
        latest=lambda: versions.current_version(workspace),
        load=load,
        release=lambda opened: opened.hold.close(),
    )

    def live(number: int) -> None:
        name = publish(number)
        assert current.refresh()
        with current.lease() as lease:
            retriever = Retriever(lease.resource.index, ENCODER, SETTINGS.retrieval)
            (found,) = retriever.retrieve_passages(["moon"], 2)
            assert len(found[0]) == 2
            assert lease.name == name

    for number in range(1, 5):
        live(number)
    retention.collect(workspace, 1, 0.0)
    before = usage()
    for number in range(5, 25):
        live(number)
    left = [after - first for after, first in zip(usage(), before, strict=True)]
    assert max(left) <= 0, "what an earlier test opened may be closed meanwhile"
    holds = [json.loads(path.read_text())["version"] for path in (tmp_path / "index" / "readers").iterdir()]
    assert holds == [versions.current_version(workspace)], "only the version in use is protected"
    current.stop()
    assert list((tmp_path / "index" / "readers").iterdir()) == []
