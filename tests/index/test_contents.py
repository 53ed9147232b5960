"""Documents of a version: lookup, deletions, differences, damage."""

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ragtune_ray import schema
from ragtune_ray.index import contents, segments, snapshot, versions
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts, checksums
from tests.support.indexes import delete, latest, living

Write = Callable[..., str]
ENCODER = HashingEncoder("hashing-64")


def test_deleted_documents_are_found_only_in_older_versions(workspace: str) -> None:
    everything = living(workspace)
    version = delete(workspace, "mars", "sun", "nobody")
    assert living(workspace) == everything - {"mars", "sun"}
    assert living(workspace, "000001") == everything
    assert contents.find_documents(workspace, version, ["mars"]) == {}
    assert sum(entry.num_deleted for entry in version.entries) == 4
    again = delete(workspace, "mars")
    assert again.entries == version.entries, "deleting twice changes nothing"


def test_passages_are_found_by_id_without_opening_the_index(
    workspace: str, passages: list[schema.Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    delete(workspace, "mars")

    def refuse(*_: object) -> segments.Segment:
        raise AssertionError("vectors and postings are not needed")

    monkeypatch.setattr(segments, "open_segment", refuse)
    asked = [*(row.passage_id for row in passages[::2]), "nobody#0", "moon#99"]
    wanted = {row.passage_id: row for row in passages[::2]}
    assert contents.passages_by_id(workspace, asked, "000001") == wanted
    gone = {name for name, row in wanted.items() if row.document_id == "mars"}
    assert gone
    assert contents.passages_by_id(workspace, asked) == {name: row for name, row in wanted.items() if name not in gone}


def test_a_document_is_known_if_not_deleted_and_unchanged(workspace: str) -> None:
    base = latest(workspace)
    marks = {}
    for entry, rows, alive in contents.live_documents(workspace, base):
        assert len(alive) == len(rows.keys), entry
        marks.update(zip(*(rows.table[name].to_pylist() for name in ("document_id", "fingerprint")), strict=True))
    ids = [*marks, "nobody"]
    given = [*marks.values(), b"?" * 16]
    assert contents.KnownDocuments(workspace, base).contain(ids, given) == [True] * len(marks) + [False]
    assert not any(contents.KnownDocuments(workspace, base).contain(ids, [b"?" * 16] * len(ids)))
    assert not any(contents.KnownDocuments(workspace, None).contain(ids, given))
    known = contents.KnownDocuments(workspace, delete(workspace, "mars")).contain(ids, given)
    assert [name for name, is_known in zip(ids, known, strict=True) if not is_known] == ["mars", "nobody"]


def test_the_difference_names_documents(workspace: str, passages: list[schema.Passage], write_index: Write) -> None:
    first = latest(workspace)
    changed = [
        dataclasses.replace(passage, title="Luna") if passage.document_id == "moon" else passage
        for passage in passages
        if passage.document_id != "sun"
    ]
    write_index(workspace, changed, ENCODER, num_segments=1)
    found = contents.difference(workspace, first, latest(workspace))
    assert found == {"added": [], "removed": ["sun"], "changed": ["moon"]}
    assert contents.difference(workspace, latest(workspace), first) == {
        "added": ["sun"],
        "removed": [],
        "changed": ["moon"],
    }
    assert contents.difference(workspace, first, first) == {"added": [], "removed": [], "changed": []}
    deleted = delete(workspace, "mars")
    assert contents.difference(workspace, versions.read_version(workspace, "000002"), deleted)["removed"] == ["mars"]


def test_one_flipped_byte_in_any_file_is_found_and_refused(workspace: str) -> None:
    delete(workspace, "mars")
    shutil.rmtree(versions.version_url(workspace, "000001"))
    files = sorted(path for path in Path(workspace).rglob("*") if path.is_file() and path.name != "CURRENT")
    assert len(files) == 1 + 2 * 10 + 1, "the version's manifest, ten files per segment, and the deletions"
    assert contents.index_problems(workspace) == []
    for file in files:
        sound = file.read_bytes()
        for position in {0, len(sound) // 3, len(sound) - 1}:
            file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            problems = contents.index_problems(workspace)
            assert any(file.name in problem for problem in problems), file
            with pytest.raises(artifacts.ArtifactError):
                snapshot.open_index(workspace)
        file.write_bytes(sound)
    assert contents.index_problems(workspace) == []


def test_deletions_in_an_object_store_are_verified_there_not_in_the_cache(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    workspace, store = f"memory://{tmp_path}", fsspec.filesystem("memory")
    write_index(workspace, passages, ENCODER)
    delete(workspace, "mars")
    everything = {passage.document_id for passage in passages}
    assert living(workspace) == everything - {"mars"}
    assert contents.index_problems(workspace) == []
    (copy,) = (tmp_path / "cache").rglob("deleted/*.npy")
    copy.write_bytes(b"damaged")
    assert living(workspace) == everything - {"mars"}
    assert contents.index_problems(workspace) == []
    (deleted,) = store.glob(f"{tmp_path}/index/deleted/*.npy")
    copy.write_bytes(store.cat_file(deleted))
    store.pipe_file(deleted, b"damaged")
    (problem,) = contents.index_problems(workspace)
    assert copy.name in problem
    assert "does not match its sha256" in problem
    store.rm_file(deleted)
    (problem,) = contents.index_problems(workspace)
    assert f"{copy.name}: is missing" in problem


def test_every_damaged_or_replaced_segment_is_reported(workspace: str) -> None:
    first, second = (Path(segments.segment_url(workspace, entry.segment_id)) for entry in latest(workspace).entries)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    (first / "passages.arrow").unlink()
    found = contents.index_problems(workspace)
    assert len(found) == 2
    assert "passages.arrow is missing" in found[0]
    assert f"{second}: is not the segment" in found[1]


def test_deletions_that_contain_objects_are_not_unpickled(workspace: str) -> None:
    """Whoever can write a workspace can also write the right sha256, but must not run code in those who read it."""
    entry = next(entry for entry in delete(workspace, "mars").entries if entry.deleted)
    written = io.BytesIO()
    np.save(written, np.array([print], dtype=object), allow_pickle=True)
    path = Path(workspace) / "index" / "deleted" / entry.deleted
    path.write_bytes(written.getvalue())
    forged = dataclasses.replace(entry, deleted_sha256=checksums.bytes_sha256(written.getvalue()))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        contents.live_mask(workspace, forged)
