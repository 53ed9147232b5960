"""Compaction in this process, without Ray: what was begun with other settings, and what others publish meanwhile."""

import json
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing import compact, segmenting, update
from ragtune_ray.index import retention, snapshot, versions


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    return config.Config().using(
        f"workspace={tmp_path / 'workspace'}",
        "encoder.model=hashing-32",
        "encoder.unit_passages=1",
        "chunking.size_tokens=8",
        "chunking.overlap_tokens=2",
        "index.segment_passages=8",
        "index.compact_segments=100",
    )


def upsert(settings: config.Config, folder: Path, *names: str) -> None:
    path = folder / "documents.jsonl"
    path.write_text(
        "".join(json.dumps({"document_id": each, "text": f"vessel {each} is amber"}) + "\n" for each in names)
    )
    update.upsert_documents(settings, str(path))


def two_segments_of_which_one_has_many_deletions(settings: config.Config, folder: Path) -> None:
    upsert(settings, folder, "one", "two", "four")
    upsert(settings, folder, "three")
    update.delete_documents(settings, ["one"])


def living(settings: config.Config, version: str | None = None) -> list[str]:
    found: list[str] = snapshot.open_index(settings.workspace, version).live_passages()["document_id"].to_pylist()
    return sorted(found)


def stop(*_: Any, **__: Any) -> None:
    raise RuntimeError("killed")


def test_a_killed_compaction_run_again_with_another_share_loses_nothing(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = [f"large{number}" for number in range(8)]
    upsert(settings, tmp_path, *large)
    upsert(settings, tmp_path, "one", "two")
    upsert(settings, tmp_path, "three")
    monkeypatch.setattr(compact, "MIN_DELETED_PASSAGES", 1)
    settings = settings.using("index.compact_deleted_share=0.9")
    update.delete_documents(settings, large[:2])
    with monkeypatch.context() as patched:
        patched.setattr(versions, "publish_rebasing", stop)
        with pytest.raises(RuntimeError, match="killed"):
            compact.compact(settings, in_process=True)
    merged = compact.compact(settings.using("index.compact_deleted_share=0.1"), in_process=True)
    assert merged is not None
    assert living(settings) == sorted([*large[2:], "one", "two", "three"])


@pytest.mark.parametrize("meanwhile", ["rollback", "deletion"])
def test_a_rollback_or_deletion_during_a_compaction_is_kept(
    settings: config.Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meanwhile: str,
) -> None:
    two_segments_of_which_one_has_many_deletions(settings, tmp_path)
    finish = segmenting.Builder.finish

    def overtaken(builder: segmenting.Builder) -> list[str]:
        built = finish(builder)
        if meanwhile == "rollback":
            versions.roll_back(settings.workspace, "000002")
        else:
            update.delete_documents(settings, ["two"])
        return built

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(segmenting.Builder, "finish", overtaken)
        merged = compact.compact(settings, in_process=True)
    said = capsys.readouterr().err
    if meanwhile == "deletion":
        assert merged is not None
        assert merged.name == "000005"
        assert living(settings) == ["four", "three"]
        return
    assert merged is None
    assert "compact: version 000004 changed these segments meanwhile; they are left unchanged" in said
    assert living(settings) == ["four", "one", "three", "two"]
    again = compact.compact(settings, in_process=True)
    assert again is not None
    assert len(again.entries) == 1
    assert living(settings) == ["four", "one", "three", "two"]


def test_the_version_that_is_compacted_outlives_a_gc_meanwhile(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_segments_of_which_one_has_many_deletions(settings, tmp_path)
    finish = segmenting.Builder.finish

    def overtaken(builder: segmenting.Builder) -> list[str]:
        update.delete_documents(settings, ["two"])
        retention.collect(settings.workspace, keep=1, min_age_seconds=0)
        return finish(builder)

    with monkeypatch.context() as patched:
        patched.setattr(segmenting.Builder, "finish", overtaken)
        merged = compact.compact(settings, in_process=True)
    assert merged is not None
    assert living(settings) == ["four", "three"]
