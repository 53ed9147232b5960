"""What the fault tests share: the command in a process of its own, which can be killed, and how to find its workers."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.index_changes import build_standing, compact
from tests.support.processes import Command


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """A function that starts `ragtune VERB` with a config; commands that still run at the end of the test are ended."""
    started: list[Command] = []

    def start(verb: str, settings: dict[str, object], *overrides: str) -> Command:
        path = tmp_path / f"config-{len(started)}.yaml"
        path.write_text(yaml.safe_dump(settings))
        command = Command([verb, str(path), *overrides], tmp_path / f"log-{len(started)}.txt")
        started.append(command)
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.kill()


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per state that a change starts from; its tests copy it."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("empty", "standing", "compacted")}
    for name in ("standing", "compacted"):
        build_standing(folders[name])
    compact(folders["compacted"])
    return folders


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of the test's own, so that its gc never meets what other processes stage; no waiting for disks."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place
