"""The parts of a run in order, in a workspace on a disk and in an object store."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragtune_ray import config, schema
from ragtune_ray.cluster import runs, stages
from ragtune_ray.cluster.indexing.update import delete_documents
from ragtune_ray.index import retention, versions
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts, filesystem


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_repeated_run_merges_only_its_new_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    directory = str(tmp_path / "work") if store == "local" else f"memory://{tmp_path}/work"
    for rows in (["failed", "failed"], ["ok", "ok"]):
        for number, row in enumerate(rows):
            local = tmp_path / "part.parquet"
            pq.write_table(pa.table({"number": [number], "status": [row]}), local)
            stages.commit_unit(directory, number, {"parquet": local})
        summaries = stages.finished_units(directory)
        tables = runs.merged(directory, [summaries[number] for number in (1, 0)], "parquet")
        assert [table.to_pylist() for table in tables] == [
            [{"number": number, "status": rows[number]}] for number in (1, 0)
        ]
        filesystem.remove(directory)


def test_a_run_finds_its_index_content_under_a_later_name(
    tmp_path: Path, passages: list[schema.Passage], write_index: Callable[..., str]
) -> None:
    workspace = str(tmp_path)
    write_index(tmp_path, passages, HashingEncoder("hashing-16"))
    first = versions.read_version(workspace, "000001")
    manifest = {"index_version": "000001", "index_content": first.content_id}
    delete_documents(config.Config().using(f"workspace={workspace}"), [passages[0].document_id])
    assert runs.living_version(workspace, manifest) == "000001"
    assert versions.roll_back(workspace, "000001").name == "000003"
    retention.collect(workspace, keep=1, min_age_seconds=0)
    assert versions.list_versions(workspace) == ["000003"]
    assert runs.living_version(workspace, manifest) == "000003"
    # Of content that is gone the name stays: whoever opens it says so.
    assert runs.living_version(workspace, {"index_version": "000002", "index_content": "other"}) == "000002"
    assert runs.living_version(workspace, {"index_version": ""}) == ""


def test_a_run_is_named_by_its_identity_and_published_once(tmp_path: Path) -> None:
    settings = config.Config().using(f"workspace={tmp_path}")
    run = runs.Run.of(settings, "answer", {"seed": 1}, name="answer-rag")
    assert run.url == runs.Run.of(settings, "answer", {"seed": 1}, name="answer-rag").url
    assert run.url != runs.Run.of(settings, "answer", {"seed": 2}, name="answer-rag").url
    assert not run.is_finished()
    filesystem.replace_text(filesystem.join(run.work, "unit.json"), "{}")
    run.publish(artifacts.stage(run.url), {"num_answers": 3})
    assert run.is_finished()
    assert not filesystem.exists(run.work)
    manifest = runs.read_manifest(run.url)
    assert (manifest["kind"], manifest["num_answers"]) == ("answer", 3)
    assert manifest["config"] == settings.model_dump(mode="json")
    assert set(manifest["seconds"]) == {"total"}


def test_cut_answers_are_told_with_the_setting_to_raise() -> None:
    assert runs.cut_notice({"num_answers": 1200}, 48) == "", "a run of an earlier version"
    assert runs.cut_notice({"num_answers": 1200, "num_cut": 0}, 48) == ""
    told = "1,100 of 1,200 answers were cut at generator.max_new_tokens=48; raise it for longer answers"
    assert runs.cut_notice({"num_answers": 1200, "num_cut": 1100}, 48) == told
