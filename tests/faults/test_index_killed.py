"""SIGKILL in the middle of an index build: nothing half-written is ever read, and the same command ends with the same bytes."""

import signal
from pathlib import Path

import pytest

from ragtune_ray.index import contents, versions
from ragtune_ray.storage import artifacts
from tests.support.corpora import write_corpus
from tests.support.processes import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def settings(tmp_path: Path, workspace: str) -> dict[str, object]:
    corpus = tmp_path / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, 600)
    return {
        "workspace": str(tmp_path / workspace),
        "corpus": {"path": str(corpus), "unit_bytes": 2000},
        "encoder": {"model": "hashing-64", "unit_passages": 16},
        "chunking": {"size_tokens": 32, "overlap_tokens": 4},
        "index": {"segment_passages": 500},
        "cluster": {"encoder_workers": 2, "address": "local"},
    }


def segment_manifests(workspace: Path) -> list[str]:
    version = versions.current_version(str(workspace))
    manifest = artifacts.read_manifest(versions.version_url(str(workspace), version))
    assert contents.index_problems(str(workspace)) == []
    return [entry["manifest_sha256"] for entry in manifest["segments"]]


def finished_units(workspace: Path) -> list[Path]:
    return list(workspace.glob("index/building/*/units/*.json"))


def test_killed_driver_and_killed_workers_cost_only_what_was_under_way(tmp_path: Path, run) -> None:
    run("index", settings(tmp_path, "undisturbed")).wait()
    workspace = tmp_path / "killed"

    command = run("index", settings(tmp_path, "killed"))
    eventually(lambda: len(finished_units(workspace)) >= 10, command)
    command.kill()
    assert versions.list_versions(str(workspace)) == [], "nothing is published by a build that was killed"
    kept = {path.name: path.stat().st_mtime_ns for path in finished_units(workspace)}

    command = run("index", settings(tmp_path, "killed"))
    eventually(lambda: len(finished_units(workspace)) >= len(kept) + 5, command)
    (worker, *_) = command.workers("EmbedUnits")
    worker.send_signal(signal.SIGKILL)
    eventually(lambda: not worker.is_running() or worker.status() == "zombie", command)
    before_end = {path.name: path.stat().st_mtime_ns for path in finished_units(workspace)}
    said = command.wait()

    assert "embed: " in said
    assert "were finished by an earlier run and are skipped" in said
    assert {name: before_end[name] for name in kept} == kept, "finished units are not done again"
    assert segment_manifests(workspace) == segment_manifests(tmp_path / "undisturbed")
    assert not finished_units(workspace), "what was under way is cleared when the version stands"


def test_a_version_stays_current_while_a_later_build_is_killed(tmp_path: Path, run) -> None:
    first = settings(tmp_path, "workspace")
    run("index", first).wait()
    workspace = tmp_path / "workspace"
    before = segment_manifests(workspace)
    write_corpus(tmp_path / "corpus.jsonl", 700)
    command = run("index", first)
    eventually(lambda: finished_units(workspace), command)
    command.kill()
    assert versions.current_version(str(workspace)) == "000001"
    assert segment_manifests(workspace) == before
    run("index", first).wait()
    assert versions.current_version(str(workspace)) == "000002"
