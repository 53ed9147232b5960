"""What `gc` removes of models, runs and rounds, and what it keeps; tests/faults covers index versions."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ragtune_ray import schema
from ragtune_ray.index import retention
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
    trained = [workspace / "index" / "trained" / retention.trained_id(name) for name in ("b1", "b2")]
    for folder in (build, *trained):
        folder.mkdir(parents=True)
        (folder / "file").write_text("{}")
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
