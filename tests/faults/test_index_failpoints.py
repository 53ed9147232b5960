"""SIGKILL at every named place of every command that changes an index: the old contents or the new, and the same command ends it.

What needs no Ray is killed in a process forked from one that has imported everything, so that a case takes a fraction of a
second; the other fault tests of the index share its corpus, its commands and its ways to look at a workspace.
"""

import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shutil import copytree

import psutil
import pytest

from ragtune_ray.index import versions
from ragtune_ray.storage import failpoints
from tests.support.corpora import write_corpus
from tests.support.index_changes import (
    CASES,
    CHANGES,
    FIRST,
    SECOND,
    Contents,
    assert_converged,
    assert_whole,
    texts_of,
)
from tests.support.indexes import segment_manifests
from tests.support.processes import DEADLINE_SECONDS, Command, end_remains, eventually, warm_process

IN_DRIVER = ("build.unit", "build.embedded", "build.trained", "build.calibrated", "publish.staged", "publish.version")
IN_DRIVER_OF_A_LATER_BUILD = ("delete.tombstones", "publish.current")
IN_DRIVER_AT_THE_END = ("build.cleaned",)
IN_WORKER = ("segment.staged", "segment.published")
WITH_RAY = {*IN_DRIVER, *IN_DRIVER_OF_A_LATER_BUILD, *IN_DRIVER_AT_THE_END, *IN_WORKER}
"""Failpoints of the `index` command, each of which a test below passes with Ray."""


Exit = Callable[[str, Path, str], int]


@pytest.fixture(scope="module")
def exit_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exit]:
    """A function that runs a change in a process of its own with a failpoint set; its exit code, negative for a signal."""
    with warm_process("tests.support.index_changes", tmp_path_factory.mktemp("warm") / "log.txt") as ask:

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
        "cluster": {"encoder_workers": 1, "address": "local"},
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
@pytest.mark.long
def test_an_encoder_worker_killed_three_times_does_not_stop_the_job_nor_change_a_byte(
    tmp_path: Path, run: Callable[..., Command]
) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 150)

    def settings(workspace: str) -> dict[str, object]:
        # Flat, in small units: there is time to kill, and the segments are those of any other run.
        corpus = {"path": str(tmp_path / "corpus.jsonl"), "unit_bytes": 300}
        small = {"corpus": corpus, "index": {"segment_passages": 500}}
        return ray_settings(tmp_path, workspace) | small | {"cluster": {"encoder_workers": 2, "address": "local"}}

    command = run("index", settings("killed"))
    killed: set[int] = set()
    for progress in (5, 35, 70):
        eventually(lambda: len([*tmp_path.glob("killed/index/building/*/units/*.json")]) >= progress, command)  # noqa: B023
        eventually(lambda: [each for each in command.workers("EmbedUnits") if each.pid not in killed], command)
        worker = next(each for each in command.workers("EmbedUnits") if each.pid not in killed)
        killed.add(worker.pid)
        worker.send_signal(signal.SIGKILL)
    command.wait()
    run("index", settings("undisturbed")).wait()
    assert_whole(tmp_path / "killed", read_corpus(tmp_path))
    assert segment_manifests(tmp_path / "killed", "000001") == segment_manifests(tmp_path / "undisturbed", "000001")
