"""What `gc` removes of models, runs and rounds, and what it keeps; tests/faults covers index versions."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ragtune_ray import schema
from ragtune_ray.index import contents, retention, snapshot, versions
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts

DAY_SECONDS = 24 * 3600.0


@pytest.fixture
def workspace(tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]) -> Path:
    """An index, a tuned mode with its rounds, and a run, a training and a tune that are unfinished."""
    path = tmp_path / "workspace"
    write_index(path, passages, HashingEncoder("hashing-16"))
    for model in ("models/ft/f0", "models/staged/a1"):
        staging = artifacts.stage(str(path / model))
        (staging / "weights").write_bytes(b"weights")
        artifacts.publish(staging, str(path / model), "tuned")
    for file in (
        "runs/.work/answer-1/part.parquet",
        "models/.work/ft-1/train/step-10/weights",
        "models/ft/.staging-f2-0/weights",
        "rounds/staged-a1/ledger.jsonl",
        "rounds/staged-b2/ledger.jsonl",
    ):
        (path / file).parent.mkdir(parents=True)
        (path / file).write_text("{}")
    return path


def age(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (0, 0))


def left(workspace: Path) -> set[str]:
    names = ("runs/.work/*", "models/*/*", "models/.work/*", "rounds/*")
    return {str(path.relative_to(workspace)) for name in names for path in workspace.glob(name)}


FINISHED = {"models/ft/f0", "models/staged/a1", "rounds/staged-a1"}
STAGED = "models/ft/.staging-f2-0"
HALF_WAY = {"runs/.work/answer-1", "models/.work/ft-1", "rounds/staged-b2"}


def test_old_unfinished_work_is_removed_and_finished_work_kept(workspace: Path) -> None:
    for place in ("runs", "models", "rounds"):
        age(workspace / place)
    removed = retention.collect(str(workspace), keep=3, min_age_seconds=DAY_SECONDS)
    assert left(workspace) == FINISHED
    assert removed.num_other >= len(HALF_WAY) + 1
    assert removed.versions == ()


def test_questions_are_kept_while_a_run_continues(workspace: Path) -> None:
    questions = workspace / "runs" / ".work" / "queries-1.parquet"
    questions.write_text("{}")
    age(workspace / "runs")
    part = workspace / "runs" / ".work" / "answer-1" / "next.parquet"
    part.write_text("{}")  # a day newer than the questions, which the run still reads
    retention.collect(str(workspace), keep=3, min_age_seconds=DAY_SECONDS)
    assert questions.exists()
    age(workspace / "runs")
    retention.collect(str(workspace), keep=3, min_age_seconds=DAY_SECONDS)
    assert not questions.exists()


def test_a_trained_structure_is_kept_while_its_build_exists(workspace: Path) -> None:
    build = workspace / "index" / "building" / "b1"
    trained = [workspace / "index" / "trained" / name for name in ("t1", "t2")]
    for folder in (build, *trained):
        folder.mkdir(parents=True)
        (folder / "file").write_text("{}")
    (build / "held-out-t1.npz").write_text("{}")
    for folder in trained:
        age(folder)
    retention.collect(str(workspace), keep=3, min_age_seconds=DAY_SECONDS)
    assert [folder.exists() for folder in trained] == [True, False]


def test_recent_unfinished_work_is_kept(workspace: Path) -> None:
    retention.collect(str(workspace), keep=3, min_age_seconds=DAY_SECONDS)
    assert left(workspace) == {*FINISHED, *HALF_WAY, STAGED}


def test_a_tune_is_kept_while_its_model_trains(workspace: Path) -> None:
    age(workspace / "runs")
    age(workspace / "rounds")
    retention.collect(str(workspace), keep=3, min_age_seconds=DAY_SECONDS)
    assert left(workspace) == {*FINISHED, STAGED, "models/.work/ft-1", "rounds/staged-b2"}


@pytest.fixture
def three_versions(tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]) -> str:
    """An index of three versions without a common segment; gc would keep only the last."""
    for number in range(3):
        write_index(tmp_path, passages[number : number + 2], HashingEncoder("hashing-16"), num_segments=1)
    for path in (tmp_path / "index").rglob("*"):
        os.utime(path, (0, 0))
    return str(tmp_path)


def record_of(workspace: str, name: str, **facts: object) -> Path:
    """Write the file of a job that reads version 000001."""
    path = Path(workspace) / "index" / "readers" / name
    path.parent.mkdir(exist_ok=True)
    here = {"version": "000001", "host": platform.node(), "process": os.getpid(), "since": time.time()}
    path.write_text(json.dumps({**here, **facts}))
    return path


def test_a_version_that_is_read_stays_whole_until_its_reader_ends(three_versions: str) -> None:
    with retention.held(three_versions, "000001"):
        assert retention.collect(three_versions, 1, 0.0).versions == ("000002",)
        assert versions.list_versions(three_versions) == ["000001", "000003"]
        assert snapshot.open_index(three_versions, "000001").num_passages == 2
        assert contents.index_problems(three_versions) == []
    assert retention.collect(three_versions, 1, 0.0).versions == ("000001",)
    assert versions.list_versions(three_versions) == ["000003"]
    assert len(list((Path(three_versions) / "index" / "segments").iterdir())) == 1


def test_the_record_of_a_reader_that_was_killed_protects_nothing_and_is_removed(three_versions: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = record_of(three_versions, "killed.json", process=ended.pid)
    assert retention.collect(three_versions, 1, 0.0).versions == ("000001", "000002")
    assert not path.exists()


@pytest.mark.parametrize(("hours", "is_kept"), [(23, True), (25, False)])
def test_a_reader_on_another_machine_protects_its_version_for_a_day(
    three_versions: str, hours: int, is_kept: bool
) -> None:
    path = record_of(three_versions, "other.json", host="another", process=1, since=time.time() - hours * 3600)
    retention.collect(three_versions, 1, 0.0)
    assert ("000001" in versions.list_versions(three_versions)) is is_kept
    assert path.exists() is is_kept


def test_a_damaged_record_of_a_reader_is_removed_and_said(
    three_versions: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = record_of(three_versions, "damaged.json")
    path.write_text("{")
    assert retention.collect(three_versions, 1, 0.0).versions == ("000001", "000002")
    assert not path.exists()
    assert "damaged.json is damaged" in caplog.text


def test_keep_must_be_at_least_one(three_versions: str) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        retention.collect(three_versions, 0, 0.0)
    assert len(versions.list_versions(three_versions)) == 3


def test_work_of_the_future_is_kept_after_the_clock_was_set_back(workspace: Path) -> None:
    for path in workspace.rglob("*"):
        os.utime(path, (time.time() + DAY_SECONDS,) * 2)
    retention.collect(str(workspace), keep=3, min_age_seconds=0.0)
    assert left(workspace) == {*FINISHED, *HALF_WAY, STAGED}
