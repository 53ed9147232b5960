"""What is published survives a power cut: contents and names reach the disk before the step that publishes them, and after it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray.storage import artifacts, filesystem

Event = tuple[str, int]
"""What was done to the disk, and the inode of what it was done to; a rename keeps the inode."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every fsync and rename, in order."""
    found: list[Event] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        found.append(("synced", os.fstat(descriptor).st_ino))

    def moving(real: Callable[..., Any]) -> Callable[..., Any]:
        def move(source: Any, target: Any, **options: Any) -> None:
            found.append(("moved", Path(source).stat().st_ino))
            real(source, target, **options)

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moving(os.rename))
    monkeypatch.setattr(os, "replace", moving(os.replace))
    return found


def around_the_move(events: list[Event], moved: Path) -> tuple[set[int], set[int]]:
    """What was synced before the one move, which is that of `moved`, and what was synced after it."""
    (place,) = [place for place, (what, _) in enumerate(events) if what == "moved"]
    assert events[place][1] == moved.stat().st_ino
    return {inode for _, inode in events[:place]}, {inode for _, inode in events[place + 1 :]}


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_an_artifact_is_on_the_disk_before_its_name_is_and_its_name_before_publish_returns(
    tmp_path: Path, events: list[Event]
) -> None:
    url = tmp_path / "new" / "folder" / "a"
    staging = artifacts.stage(str(url))
    assert {inode(tmp_path), inode(tmp_path / "new")} <= {each for _, each in events}, "new folders last, too"
    (staging / "sub").mkdir()
    (staging / "x.txt").write_text("one")
    (staging / "sub" / "y.txt").write_text("two")
    events.clear()
    assert artifacts.publish(staging, str(url), "thing")
    before, after = around_the_move(events, url)
    assert before >= {inode(path) for path in [url, *url.rglob("*")]}, "files and folders, the manifest among them"
    assert inode(url.parent) in after


def test_a_replaced_text_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, events: list[Event]) -> None:
    url = tmp_path / "new" / "CURRENT"
    filesystem.replace_text(str(url), "000001\n")
    before, after = around_the_move(events, url)
    assert {inode(url), inode(tmp_path)} <= before
    assert inode(url.parent) in after


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_committed_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch, is_elsewhere: bool
) -> None:
    local, target = tmp_path / "scratch" / "x", tmp_path / "new" / "x"
    local.parent.mkdir()
    local.write_text("one")
    if is_elsewhere:  # as if the temporary directory were on another file system
        real = Path.stat
        monkeypatch.setattr(Path, "stat", lambda path, **how: Elsewhere(real(path, **how), path == local))
    filesystem.commit_file(local, str(target))
    before, after = around_the_move(events, target)
    assert {inode(target), inode(tmp_path)} <= before
    assert inode(target.parent) in after
    assert target.read_text() == "one"
    assert not local.exists()


class Elsewhere:
    """The status of a file, on another device if it is meant to be."""

    def __init__(self, status: os.stat_result, is_elsewhere: bool) -> None:
        self._status, self.st_dev = status, -1 if is_elsewhere else status.st_dev

    def __getattr__(self, name: str) -> Any:
        return getattr(self._status, name)


def test_a_disk_that_cannot_be_synced_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    staging = artifacts.stage(str(tmp_path / "a"))
    (staging / "x.txt").write_text("one")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        artifacts.publish(staging, str(tmp_path / "a"), "thing")
    with pytest.raises(OSError, match="Input/output error"):
        filesystem.replace_text(str(tmp_path / "CURRENT"), "a\n")
    assert list(tmp_path.iterdir()) == []
