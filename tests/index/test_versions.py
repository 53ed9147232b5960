"""Versions: numbers, publishers, rollback, a damaged CURRENT."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ragtune_ray import config, schema
from ragtune_ray.index import contents, snapshot, versions
from ragtune_ray.ingest.input_units import content_fingerprint, plan_units
from ragtune_ray.models import weights
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts, filesystem
from tests.support.indexes import delete, latest, living

Write = Callable[..., str]
ENCODER = HashingEncoder("hashing-64")


def test_identities_of_a_corpus_are_pinned(tmp_path: Path) -> None:
    """Builds are resumed and plans found by these digests; other digests would orphan existing files."""
    (tmp_path / "moon.md").write_text("The moon orbits the earth.\n")
    (tmp_path / "mars.jsonl").write_text('{"id": "mars", "text": "Mars has two moons."}\n')
    settings = config.Config(
        workspace="w",
        corpus={"path": str(tmp_path), "max_document_bytes": 1000},
        encoder={"model": "hashing-64", "query_prefix": "query: ", "passage_prefix": "passage: "},
        chunking={"size_tokens": 32, "overlap_tokens": 4},
        index={"kind": "flat", "language": "en"},
    )
    plan, encoder = plan_units(settings.corpus.path, 2**22, fingerprint="sha256"), weights.resolve("hashing-64")
    assert versions.recipe(settings, encoder) == "01b30743eea80167"
    content = content_fingerprint(plan, ["0" * 64, "1" * 64])
    assert versions.corpus_id(settings, content, encoder) == "3d99543c9e8ea9af"
    assert versions.planned_corpus_id(settings, plan, encoder) == "80dcdc3dff1d7e87"


def test_versions_are_numbered_one_after_another(
    workspace: str, passages: list[schema.Passage], write_index: Write
) -> None:
    assert write_index(workspace, passages[:4], ENCODER) == "000002"
    assert write_index(workspace, passages[:2], ENCODER) == "000003"
    assert versions.list_versions(workspace) == ["000001", "000002", "000003"]
    assert versions.current_version(workspace) == latest(workspace).name == "000003"
    assert latest(workspace).manifest["parent"] == "000002"
    assert latest(workspace).manifest["num_passages"] == 2


def test_an_unfinished_directory_with_a_version_number_is_skipped(
    workspace: str, passages: list[schema.Passage], write_index: Write
) -> None:
    unfinished = Path(versions.version_url(workspace, "000002"))
    unfinished.mkdir()
    (unfinished / "rejects.jsonl").write_text("")
    assert versions.list_versions(workspace) == ["000001"]
    assert write_index(workspace, passages, ENCODER) == "000003"


def test_one_of_two_publishers_wins_and_the_other_gets_a_conflict(workspace: str) -> None:
    base = latest(workspace)
    versions.publish_version(workspace, base, versions.Draft(base.entries, {"by": "first"}))
    with pytest.raises(versions.ConflictError, match=r"000002: another publisher took this version first"):
        versions.publish_version(workspace, base, versions.Draft(base.entries, {"by": "second"}))
    assert latest(workspace).manifest["by"] == "first"
    assert [path.name for path in (Path(workspace) / "index" / "versions").iterdir() if path.name[0] == "."] == []


def test_a_publisher_that_is_overtaken_while_it_publishes_gets_a_conflict(
    workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = latest(workspace)

    def overtaken(name: str) -> None:
        if name == "publish.staged":
            monkeypatch.undo()
            versions.publish_version(workspace, base, versions.Draft(base.entries, {"by": "first"}))

    monkeypatch.setattr(versions.failpoints, "reach", overtaken)
    with pytest.raises(versions.ConflictError, match=r"000002: another publisher took this version first"):
        versions.publish_version(workspace, base, versions.Draft(base.entries, {"by": "second"}))
    assert latest(workspace).manifest["by"] == "first"


def test_the_losing_publisher_rebases_its_change(workspace: str, caplog: pytest.LogCaptureFixture) -> None:
    bases = []

    def prepare(base: versions.Version | None) -> versions.Draft:
        assert base is not None
        bases.append(base.name)
        if len(bases) == 1:
            delete(workspace, "mars")  # the other publisher is faster
        found = contents.find_documents(workspace, base, ["moon"])["moon"]
        entries = [
            contents.delete_passages(workspace, entry, found.get(entry.segment_id, np.empty(0, int)))
            for entry in base.entries
        ]
        return versions.Draft(tuple(entries), {})

    version, is_new = versions.publish_rebasing(workspace, prepare)
    assert is_new
    assert version is not None
    assert (version.name, bases) == ("000003", ["000001", "000002"])
    assert living(workspace) == {"hubble", "sun", "china"}, "both deletions apply"
    assert "rebased" in caplog.text


def test_an_empty_change_publishes_nothing_but_advances_current(workspace: str) -> None:
    delete(workspace, "mars")
    current = Path(workspace) / "index" / "CURRENT"
    current.write_text("000001\n")  # as if the publisher was killed before its last step
    version, is_new = versions.publish_rebasing(workspace, lambda _: None)
    assert version is not None
    assert (version.name, is_new) == ("000002", False)
    assert versions.current_version(workspace) == "000002"


def test_a_slow_publisher_cannot_move_current_backwards(workspace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = filesystem.replace_text

    def overtaken(url: str, text: str) -> None:
        monkeypatch.setattr(filesystem, "replace_text", replace)
        delete(workspace, "mars")  # publishes version 3 before version 2 is made current
        replace(url, text)

    base = latest(workspace)
    monkeypatch.setattr(filesystem, "replace_text", overtaken)
    versions.publish_version(workspace, base, versions.Draft(base.entries, {}))
    assert versions.current_version(workspace) == latest(workspace).name == "000003"


def test_a_version_with_a_missing_segment_is_not_published(workspace: str) -> None:
    entry = versions.Entry("nowhere", "0" * 64, 3)
    with pytest.raises(artifacts.ArtifactError, match=r"segments/nowhere: no manifest\.json"):
        versions.publish_version(workspace, latest(workspace), versions.Draft((entry,), {}))
    assert versions.list_versions(workspace) == ["000001"]


def test_segments_with_no_live_passages_are_dropped(workspace: str) -> None:
    version = delete(workspace, "moon", "mars", "hubble", "sun")
    assert len(version.entries) == 1
    assert living(workspace) == {"china"}


def test_rolling_back_publishes_the_content_of_an_earlier_version(workspace: str) -> None:
    everything = living(workspace)
    delete(workspace, "mars")
    delete(workspace, "sun")
    back = versions.roll_back(workspace)
    assert (back.name, back.manifest["restores"]) == ("000004", "000002")
    assert living(workspace) == everything - {"mars"}
    further = versions.roll_back(workspace)
    assert further.manifest["restores"] == "000001", "the version before the current content"
    assert living(workspace) == everything
    assert versions.roll_back(workspace, "000003").content_id == versions.read_version(workspace, "000003").content_id
    assert versions.current_version(workspace) == "000006"


def test_facts_about_the_corpus_that_was_read_belong_to_its_content(workspace: str) -> None:
    base = latest(workspace)
    facts: versions.VersionFacts = {"corpus_id": "c", "kinds": {".md": {"read": 2}}, "num_transient_rejects": 1}
    read = versions.publish_version(workspace, base, versions.Draft(base.entries, facts))
    assert facts.items() <= read.manifest.items()
    assert not facts.keys() & delete(workspace, "mars").manifest.keys()
    assert facts.items() <= versions.roll_back(workspace, read.name).manifest.items()


def test_a_rollback_needs_an_earlier_version(tmp_path: Path, workspace: str) -> None:
    with pytest.raises(artifacts.ArtifactError, match="is the first: nothing to roll back to"):
        versions.roll_back(workspace)
    with pytest.raises(artifacts.ArtifactError, match=r"versions/000009: no manifest\.json"):
        versions.roll_back(workspace, "000009")
    with pytest.raises(artifacts.ArtifactError, match=r"has no index; run: ragtune index CONFIG"):
        versions.roll_back(str(tmp_path / "nothing"))


def test_a_workspace_without_an_index_names_the_command_to_run(tmp_path: Path) -> None:
    for read in (versions.current_version, snapshot.open_index):
        with pytest.raises(artifacts.ArtifactError, match=r"has no index; run: ragtune index CONFIG"):
            read(str(tmp_path))
    assert versions.latest_version(str(tmp_path)) is None
    assert contents.index_problems(str(tmp_path)) == [f"{tmp_path}: has no index; run: ragtune index CONFIG"]


@pytest.mark.parametrize("content", [b"", b"000001", b"1\n", b"000001\n000002\n", b"\xff\xfe\n", b"../../etc\n"])
def test_a_damaged_current_is_refused_and_can_be_repaired(workspace: str, content: bytes) -> None:
    current = Path(workspace) / "index" / "CURRENT"
    current.write_bytes(content)
    with pytest.raises(artifacts.ArtifactError, match=r"index/CURRENT: is damaged.*rollback CONFIG --repair"):
        snapshot.open_index(workspace)
    (problem,) = contents.index_problems(workspace)
    assert "CURRENT: is damaged" in problem
    versions.advance_current(workspace)
    assert current.read_text() == "000001\n"


def test_a_current_without_its_version_is_refused_as_a_base(workspace: str) -> None:
    (Path(workspace) / "index" / "CURRENT").write_text("000009\n")
    with pytest.raises(artifacts.ArtifactError, match=r"versions/000009: no manifest\.json"):
        snapshot.open_index(workspace)
    assert len(contents.index_problems(workspace)) == 1
    with pytest.raises(artifacts.ArtifactError, match=r"000009: the current version is damaged.*ragtune rollback"):
        versions.publish_rebasing(workspace, lambda base: versions.Draft(base.entries if base else (), {}))


def test_a_damaged_current_version_can_be_rolled_back(workspace: str) -> None:
    everything = living(workspace)
    delete(workspace, "mars")
    manifest = Path(versions.version_url(workspace, "000002")) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(artifacts.ArtifactError):
        snapshot.open_index(workspace)
    back = versions.roll_back(workspace)
    assert (back.name, back.manifest["restores"]) == ("000003", "000001")
    assert living(workspace) == everything


def test_a_version_of_a_later_format_is_refused_with_the_next_step(workspace: str) -> None:
    base = latest(workspace)
    staging = artifacts.stage(versions.version_url(workspace, "000002"))
    facts = {name: value for name, value in base.manifest.items() if name in {"segments", "language", "encoder"}}
    artifacts.publish(staging, versions.version_url(workspace, "000002"), "index", **facts, index_format=99)
    with pytest.raises(artifacts.ArtifactError, match=r"index format 99.*upgrade ragtune-ray"):
        versions.read_version(workspace, "000002")


def test_manifests_record_the_operation_as_json(workspace: str) -> None:
    manifest = json.loads((Path(versions.version_url(workspace, "000001")) / "manifest.json").read_text())
    assert manifest["index_format"] == versions.INDEX_FORMAT
    assert [set(entry) for entry in manifest["segments"]] == [
        {"segment_id", "manifest_sha256", "num_passages", "deleted", "deleted_sha256", "num_deleted"}
    ] * 2
