"""Verification of every artifact in a workspace."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ragtune_ray import schema
from ragtune_ray.index import segments, versions
from ragtune_ray.index.verification import verify_artifact, verify_workspace
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts
from tests.support.indexes import delete


@pytest.fixture
def workspace(tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]) -> Path:
    """Two versions that share no segment, the first of two segments, and one run."""
    path = tmp_path / "workspace"
    encoder = HashingEncoder("hashing-16")
    write_index(path, passages, encoder)
    write_index(path, passages[:3], encoder, num_segments=1)
    run = str(path / "runs" / "answer-1")
    staging = artifacts.stage(run)
    (staging / "answers.parquet").write_bytes(b"rows of answers")
    artifacts.publish(staging, run, "answers", rows=1)
    return path


def test_a_sound_workspace_has_no_problems(workspace: Path) -> None:
    assert verify_workspace(str(workspace)) == ([], 2 + 3 + 1)


def test_a_flipped_byte_in_any_file_of_any_artifact_is_found_and_named(workspace: Path) -> None:
    files = sorted(path for path in workspace.rglob("*") if path.is_file() and path.name != "CURRENT")
    assert len(files) == 2 * 2 + 3 * 10 + 2
    for file in files:
        sound = file.read_bytes()
        middle = len(sound) // 2
        file.write_bytes(sound[:middle] + bytes([sound[middle] ^ 0x10]) + sound[middle + 1 :])
        found, _ = verify_workspace(str(workspace))
        artifact = next(parent for parent in file.parents if (parent / "manifest.json").exists())
        assert any(str(artifact) in problem and file.name in problem for problem in found), file
        assert all(str(artifact) in problem for problem in found), "sound artifacts have no problems"
        assert verify_artifact(str(artifact))[0], file
        file.write_bytes(sound)
    assert verify_workspace(str(workspace))[0] == []


def test_missing_short_and_stray_files_are_found(workspace: Path) -> None:
    run = workspace / "runs" / "answer-1"
    (run / "stray.txt").write_text("?")
    assert verify_workspace(str(workspace))[0] == [f"{run}: stray.txt is not named in its manifest"]
    (run / "stray.txt").unlink()
    (run / "answers.parquet").write_bytes(b"rows")
    assert verify_workspace(str(workspace))[0] == [f"{run}: answers.parquet has 4 bytes, its manifest says 15"]
    (run / "answers.parquet").unlink()
    assert verify_workspace(str(workspace))[0] == [f"{run}: answers.parquet is missing"]


def test_a_segment_that_versions_share_is_hashed_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete(str(workspace), "moon")
    checked: list[str] = []
    plain = artifacts.find_problems

    def spy(url: str) -> list[str]:
        checked.append(url)
        return plain(url)

    monkeypatch.setattr(artifacts, "find_problems", spy)
    assert verify_workspace(str(workspace)) == ([], 3 + 3 + 1)
    assert len(checked) == len(set(checked)) == 3 + 3 + 1


def test_a_run_without_a_manifest_is_unfinished(workspace: Path) -> None:
    (workspace / "runs" / "answer-1" / "manifest.json").unlink()
    (problem,) = verify_workspace(str(workspace))[0]
    assert "answer-1: no manifest.json: the directory is missing or unfinished" in problem


def test_a_missing_segment_is_reported_once(workspace: Path) -> None:
    import shutil

    named = versions.read_version(str(workspace), "000001").manifest["segments"][1]["segment_id"]
    shutil.rmtree(segments.segment_url(str(workspace), named))
    (problem,) = verify_workspace(str(workspace))[0]
    assert f"segments/{named}: no manifest.json" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"000009\n", "CURRENT: names version 000009, which does not exist"),
        (b"00000\x11\n", "CURRENT: is damaged"),
        (None, "has no index"),
    ],
)
def test_a_wrong_current_is_a_problem(workspace: Path, content: bytes | None, message: str) -> None:
    current = workspace / "index" / "CURRENT"
    current.unlink() if content is None else current.write_bytes(content)
    (problem,) = verify_workspace(str(workspace))[0]
    assert message in problem


def test_a_workspace_with_runs_alone_is_verified(tmp_path: Path) -> None:
    run = str(tmp_path / "runs" / "r")
    artifacts.publish(artifacts.stage(run), run, "answers")
    assert verify_workspace(str(tmp_path)) == ([], 1)


def test_an_empty_workspace_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(artifacts.ArtifactError, match="has no index, runs or models; run: ragtune index CONFIG"):
        verify_workspace(str(tmp_path))


def publish(url: Path, content: bytes = b"weights") -> None:
    staging = artifacts.stage(str(url))
    (staging / "model.safetensors").write_bytes(content)
    artifacts.publish(staging, str(url), "model")


def test_models_calibrations_and_the_indexes_of_rounds_are_checked(
    tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]
) -> None:
    model, calibration = tmp_path / "models" / "ft" / "f0", tmp_path / "calibrations" / "rag+ft" / "c0"
    publish(model)
    publish(calibration)
    (model.parent / "CURRENT").write_text("f0\n")
    tuned = tmp_path / "rounds" / "staged-a1" / "01"
    write_index(tuned, passages, HashingEncoder("hashing-16"), num_segments=1)
    (tuned.parent / "ledger.jsonl").write_text("{}")
    assert verify_workspace(str(tmp_path)) == ([], 2 + 2)
    for file in (
        model / "model.safetensors",
        calibration / "model.safetensors",
        *tuned.glob("index/segments/*/vectors.faiss"),
    ):
        file.write_bytes(b"damaged")
        (problem,) = verify_workspace(str(tmp_path))[0]
        assert file.name in problem
        file.write_bytes(b"weights")
    (model.parent / "CURRENT").write_text("f1\n")
    assert f"{model.parent}/CURRENT: names f1, which does not exist" in verify_workspace(str(tmp_path))[0]
