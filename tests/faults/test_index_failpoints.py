"""SIGKILL at every named place of every command that changes an index: the old contents or the new, and the same command ends it.

What needs no Ray is killed in a process forked from one that has imported everything, so that a case takes a fraction of a
second; the other fault tests of the index share its corpus, its commands and its ways to look at a workspace.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import psutil
import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster.indexing import compact as compact_module
from ragtune_ray.cluster.indexing import update
from ragtune_ray.index import contents, retention, snapshot, versions
from ragtune_ray.storage import failpoints
from tests.cluster.conftest import write_corpus
from tests.faults.conftest import DEADLINE_SECONDS, Command, end_remains, eventually, warm_process

Contents = dict[str, str]
"""document_id -> text; {}: nothing is indexed."""

FIRST: Contents = {
    "moon": "the moon orbits the earth and apollo landed on the moon in the year of 1969",
    "mars": "mars is the red planet and its two moons are phobos and deimos",
    "sun": "the sun is a star that fuses hydrogen into helium",
}
SECOND: Contents = {
    "mars": "mars has a thin air and dust storms",
    "rover": "the rover drives over dust and rocks of mars",
}
STANDING: Contents = {name: text for name, text in (FIRST | SECOND).items() if name != "sun"}
"""What the prepared index holds in its third version."""
ADDED: Contents = {
    "moon": "the moon is made of rock and has no air",
    "comet": "a comet is a ball of ice and dust with a tail",
}


def documents_file(folder: Path, documents: Contents, name: str = "documents") -> str:
    path = folder / f"{name}.jsonl"
    rows = [json.dumps({"document_id": each, "text": text}) + "\n" for each, text in documents.items()]
    path.write_text("".join(rows))
    return str(path)


def settings_of(folder: Path) -> config.Config:
    return config.Config().using(
        f"workspace={folder / 'workspace'}",
        "encoder.model=hashing-32",
        "chunking.size_tokens=8",
        "chunking.overlap_tokens=2",
    )


def upsert(folder: Path, documents: Contents = ADDED, *overrides: str) -> None:
    update.upsert_documents(settings_of(folder).using(*overrides), documents_file(folder, documents))


def first(folder: Path) -> None:
    upsert(folder, FIRST, "index.kind=ivf")


def delete(folder: Path) -> None:
    update.delete_documents(settings_of(folder), ["moon", "rover"])


def compact(folder: Path) -> None:
    compact_module.compact(settings_of(folder), in_process=True)


def roll_back(folder: Path) -> None:
    versions.roll_back(settings_of(folder).workspace, "000001")


def collect(folder: Path) -> None:
    retention.collect(settings_of(folder).workspace, keep=1, min_age_seconds=0)


def build_standing(folder: Path) -> None:
    """Three versions, two segments, one of them with a deleted document."""
    upsert(folder, FIRST)
    upsert(folder, SECOND)
    update.delete_documents(settings_of(folder), ["sun"])


@dataclass(frozen=True)
class Change:
    """A command, where it starts, what it makes of that, and the failpoints that it passes, in order."""

    run: Callable[[Path], None]
    start: str
    old: Contents
    new: Contents
    passes: tuple[str, ...]


_BUILD = ("build.read", "build.embedded", "build.trained", "segment.staged", "segment.published", "build.calibrated")
_PUBLISH = ("publish.staged", "publish.version", "publish.current")
_MERGE = ("build.trained", "segment.staged", "segment.published", "build.calibrated")
CHANGES = {
    "first upsert": Change(first, "empty", {}, FIRST, (*_BUILD, *_PUBLISH, "build.cleaned")),
    "upsert": Change(
        upsert, "standing", STANDING, STANDING | ADDED, (*_BUILD, "delete.tombstones", *_PUBLISH, "build.cleaned")
    ),
    "delete": Change(delete, "standing", STANDING, {"mars": SECOND["mars"]}, ("delete.tombstones", *_PUBLISH)),
    "compact": Change(
        compact, "standing", STANDING, STANDING, ("compact.planned", *_MERGE, "compact.merged", *_PUBLISH)
    ),
    "rollback": Change(roll_back, "standing", STANDING, FIRST, _PUBLISH),
    "gc": Change(collect, "compacted", STANDING, STANDING, ("gc.planned", "gc.version", "gc.segment", "gc.rest")),
}
CASES = [(name, failpoint) for name, change in CHANGES.items() for failpoint in change.passes]

IN_DRIVER = ("build.read", "build.embedded", "build.trained", "build.calibrated", "publish.staged", "publish.version")
IN_DRIVER_OF_A_LATER_BUILD = ("delete.tombstones", "publish.current")
IN_DRIVER_AT_THE_END = ("build.cleaned",)
IN_WORKER = ("segment.staged", "segment.published")
WITH_RAY = {*IN_DRIVER, *IN_DRIVER_OF_A_LATER_BUILD, *IN_DRIVER_AT_THE_END, *IN_WORKER}
"""Failpoints of the `index` command, each of which a test below passes with Ray."""


def texts_of(workspace: Path | str, version: str | None = None) -> Contents:
    """What a version holds, its texts put together from their passages again."""
    if version is None and not (Path(workspace) / "index" / "CURRENT").exists():
        return {}
    opened = snapshot.open_index(str(workspace), version)
    texts: Contents = {}
    passages = sorted(schema.from_table(opened.live_passages(), schema.Passage), key=lambda each: each.start)
    for passage in passages:
        text = texts.get(passage.document_id, "")
        texts[passage.document_id] = text[: passage.start].ljust(passage.start) + passage.text
    assert opened.manifest["num_documents"] == len(texts)
    assert opened.manifest["num_passages"] == len(passages)
    return texts


def assert_whole(workspace: Path, *allowed: Contents) -> None:
    """Every version is sound, and the current one holds exactly one of the allowed contents."""
    names = versions.list_versions(str(workspace))
    assert [problem for name in names for problem in contents.index_problems(str(workspace), name)] == []
    assert texts_of(workspace) in allowed


def assert_converged(workspace: Path, new: Contents) -> None:
    """Exactly the new contents, readers see the latest version, and gc leaves nothing that no version names."""
    assert_whole(workspace, new)
    assert versions.list_versions(str(workspace))[-1] == versions.current_version(str(workspace))
    retention.collect(str(workspace), keep=1, min_age_seconds=0)
    assert_whole(workspace, new)
    index = workspace / "index"
    name = versions.current_version(str(workspace))
    entries = versions.read_version(str(workspace), name).entries
    assert {path.name for path in (index / "versions").iterdir()} == {name}
    assert {path.name for path in (index / "segments").iterdir()} == {entry.segment_id for entry in entries}
    deleted = {path.name for path in (index / "deleted").glob("*")}
    assert deleted == {entry.deleted for entry in entries if entry.deleted}
    assert list((index / "building").glob("*")) == []
    assert list(index.rglob(".*")) == [], "staging directories and unfinished files"


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


def work(asked: dict[str, Any]) -> None:
    """What a child of the warm process does."""
    tempfile.tempdir = asked["temporary"]
    CHANGES[asked["change"]].run(Path(asked["folder"]))


Exit = Callable[[str, Path, str], int]


@pytest.fixture(scope="module")
def exit_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exit]:
    """A function that runs a change in a process of its own with a failpoint set; its exit code, negative for a signal."""
    with warm_process("tests.faults.test_index_failpoints", tmp_path_factory.mktemp("warm") / "log.txt") as ask:

        def run(change: str, folder: Path, failpoint: str) -> int:
            asked = {"change": change, "folder": str(folder), "temporary": tempfile.gettempdir()}
            return ask(asked, {"RAGTUNE_FAILPOINT": failpoint})

        yield run


def test_every_failpoint_is_passed_by_a_test() -> None:
    of_index = {name for name in failpoints.NAMES if not name.startswith("tune.")}
    assert {failpoint for _, failpoint in CASES} | WITH_RAY == of_index


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_command_passes_the_failpoints_that_are_tested_and_no_other(
    name: str, starts: dict[str, Path], tmp_path: Path, sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = CHANGES[name]
    passed: list[str] = []
    monkeypatch.setattr(failpoints, "reach", passed.append)
    folder = Path(copytree(starts[change.start], tmp_path / "case"))
    change.run(folder)
    assert tuple(dict.fromkeys(passed)) == change.passes
    assert_converged(folder / "workspace", change.new)


@pytest.mark.slow  # a second each, a minute together
@pytest.mark.parametrize(("name", "failpoint"), CASES)
def test_a_command_killed_anywhere_leaves_old_or_new_contents_and_ends_well_when_run_again(
    name: str, failpoint: str, starts: dict[str, Path], tmp_path: Path, sandbox: Path, exit_at: Exit
) -> None:
    change = CHANGES[name]
    folder = Path(copytree(starts[change.start], tmp_path / "case"))
    assert exit_at(name, folder, failpoint) == -signal.SIGKILL, "the failpoint was reached"
    assert_whole(folder / "workspace", change.old, change.new)
    change.run(folder)
    assert_converged(folder / "workspace", change.new)


def test_a_rollback_killed_before_readers_saw_it_returns_to_the_same_version_when_run_again(
    starts: dict[str, Path], tmp_path: Path, sandbox: Path
) -> None:
    folder = Path(copytree(starts["standing"], tmp_path / "case"))
    workspace = str(folder / "workspace")
    versions.roll_back(workspace)
    (folder / "workspace" / "index" / "CURRENT").write_text("000003\n")  # as if it had been killed at publish.version
    versions.roll_back(workspace)
    assert texts_of(workspace) == FIRST | SECOND, "version 2, which came before what readers took"


def ray_settings(folder: Path, workspace: str = "workspace") -> dict[str, object]:
    return {
        "workspace": str(folder / workspace),
        "corpus": {"path": str(folder / "corpus.jsonl")},
        "encoder": {"model": "hashing-64", "unit_passages": 64},
        "chunking": {"size_tokens": 32, "overlap_tokens": 4},
        "index": {"kind": "ivf", "segment_passages": 250},
        "cluster": {"encoder_workers": 1},
    }


def read_corpus(folder: Path) -> Contents:
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    return {row["document_id"]: row["text"] for row in rows}


def assert_dies(command: Command) -> None:
    """Wait until the driver has killed itself, and end what is left of its Ray: its agents would linger for a minute."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    children: dict[int, psutil.Process] = {}
    while command.process.poll() is None:
        assert time.monotonic() < deadline
        with suppress(psutil.NoSuchProcess):
            children |= {child.pid: child for child in psutil.Process(command.process.pid).children(recursive=True)}
        time.sleep(0.05)
    assert command.process.returncode == -signal.SIGKILL, command.log.read_text()
    end_remains(list(children.values()))


def segment_manifests(workspace: Path, version: str) -> list[str]:
    return [entry.manifest_sha256 for entry in versions.read_version(str(workspace), version).entries]


@pytest.mark.cluster
@pytest.mark.slow
def test_an_index_job_killed_at_every_failpoint_one_after_another_ends_as_an_undisturbed_one(
    tmp_path: Path, run: Callable[..., Command], sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, workspace = ray_settings(tmp_path), tmp_path / "workspace"
    write_corpus(tmp_path / "corpus.jsonl", 150)
    standing: Contents = {}

    def killed_at(*names: str, shown: tuple[Contents, ...]) -> None:
        for name in names:
            once = tmp_path / f"once-{name}"
            with monkeypatch.context() as patch:
                patch.setenv("RAGTUNE_FAILPOINT", name)
                patch.setenv("RAGTUNE_FAILPOINT_ONCE", str(once))
                assert_dies(run("index", settings))
            assert once.exists()
            assert_whole(workspace, *shown)

    killed_at(*IN_DRIVER, shown=(standing,))
    run("index", settings).wait()
    standing = read_corpus(tmp_path)
    assert_whole(workspace, standing)
    assert versions.list_versions(str(workspace)) == ["000001"], "five builds that were killed have published nothing"

    once = tmp_path / "once-in-worker"
    for name in IN_WORKER:
        with monkeypatch.context() as patch:
            patch.setenv("RAGTUNE_FAILPOINT", name)
            patch.setenv("RAGTUNE_FAILPOINT_ONCE", str(once))
            run("index", ray_settings(tmp_path, name)).wait()
        once.unlink()
        assert_whole(tmp_path / name, standing)
        assert segment_manifests(tmp_path / name, "000001") == segment_manifests(workspace, "000001"), name

    write_corpus(tmp_path / "corpus.jsonl", 60, seed=1)
    changed = read_corpus(tmp_path)
    killed_at(*IN_DRIVER_OF_A_LATER_BUILD, shown=(standing, changed))
    run("index", settings).wait()
    assert_whole(workspace, changed)

    write_corpus(tmp_path / "corpus.jsonl", 70, seed=1)
    killed_at(*IN_DRIVER_AT_THE_END, shown=(read_corpus(tmp_path),))
    run("index", settings).wait()
    assert_converged(workspace, read_corpus(tmp_path))


@pytest.mark.cluster
@pytest.mark.slow
def test_an_encoder_worker_killed_three_times_does_not_stop_the_job_nor_change_a_byte(
    tmp_path: Path, run: Callable[..., Command]
) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 150)

    def settings(workspace: str) -> dict[str, object]:
        # Flat, in small units: there is time to kill, and the segments are those of any other run.
        small = {"encoder": {"model": "hashing-64", "unit_passages": 4}, "index": {"segment_passages": 500}}
        return ray_settings(tmp_path, workspace) | small | {"cluster": {"encoder_workers": 2}}

    command = run("index", settings("killed"))
    killed: set[int] = set()
    for progress in (5, 35, 70):
        eventually(lambda: len([*tmp_path.glob("killed/index/building/*/embed/unit-*.json")]) >= progress, command)  # noqa: B023
        eventually(lambda: [each for each in command.workers("EmbedUnit") if each.pid not in killed], command)
        worker = next(each for each in command.workers("EmbedUnit") if each.pid not in killed)
        killed.add(worker.pid)
        worker.send_signal(signal.SIGKILL)
    command.wait()
    run("index", settings("undisturbed")).wait()
    assert_whole(tmp_path / "killed", read_corpus(tmp_path))
    assert segment_manifests(tmp_path / "killed", "000001") == segment_manifests(tmp_path / "undisturbed", "000001")
