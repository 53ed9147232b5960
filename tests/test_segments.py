import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ragtune_ray import index, schema, segments, storage
from ragtune_ray.encoder import HashingEncoder

Write = Callable[..., str]


@pytest.fixture(scope="module")
def encoder() -> HashingEncoder:
    return HashingEncoder("hashing-64")


@pytest.fixture
def workspace(tmp_path: Path, passages: list[schema.Passage], encoder: HashingEncoder, write_index: Write) -> str:
    write_index(tmp_path, passages, encoder)
    return str(tmp_path)


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_what_was_written_comes_back(
    tmp_path: Path,
    passages: list[schema.Passage],
    encoder: HashingEncoder,
    write_index: Write,
    num_segments: int,
    kind: index.ConcreteKind,
) -> None:
    version = write_index(tmp_path, passages, encoder, num_segments=num_segments, kind=kind)
    opened = segments.open_index(str(tmp_path))
    assert opened.version == version == "000001"
    assert list(schema.from_table(opened.passages, schema.Passage)) == passages
    assert opened.take([3, 0, 3]) == [passages[3], passages[0], passages[3]]
    assert opened.take([]) == []
    vectors = encoder.encode_passages([passage.text for passage in passages])
    scores, ordinals = opened.vectors.search(vectors, 1)
    assert ordinals[:, 0].tolist() == list(range(len(passages))), "each vector finds its own passage"
    np.testing.assert_allclose(scores, 1, atol=1e-6)
    assert opened.lexical.search(["Phobos and Deimos"], 1)[1].tolist() == [[3]]
    assert opened.manifest["num_passages"] == opened.vectors.num_vectors == opened.lexical.num_passages == len(passages)


def test_vectors_are_kept_bit_for_bit(workspace: str, passages: list[schema.Passage], encoder: HashingEncoder) -> None:
    (first, *_) = segments.open_index(workspace).manifest["segments"]
    structure = index.load(Path(segments.segment_url(workspace, first["segment_id"])) / "vectors.faiss")
    expected = encoder.encode_passages([passage.text for passage in passages])[: first["num_passages"]]
    np.testing.assert_array_equal(structure.reconstruct_n(0, structure.ntotal), expected)


def test_vectors_and_passages_must_be_as_many(tmp_path: Path, passages: list[schema.Passage]) -> None:
    trained = index.train("flat", 4, 2, np.empty((0, 4), dtype=np.float32), 0)
    table = schema.to_table(passages[:2], schema.Passage)
    with pytest.raises(ValueError, match="3 vectors for 2 passages"):
        segments.write_segment(tmp_path, table, np.eye(4, dtype=np.float32)[:3], trained, "en")
    with pytest.raises(schema.SchemaError, match=r"Passage\.text"):
        segments.write_segment(
            tmp_path, pa.table({"passage_id": ["a"], "document_id": ["b"]}), np.eye(1), trained, "en"
        )
    assert list(tmp_path.iterdir()) == []


def test_versions_are_numbered_and_any_of_them_can_be_made_current(
    workspace: str, passages: list[schema.Passage], encoder: HashingEncoder, write_index: Write
) -> None:
    assert write_index(workspace, passages[:4], encoder) == "000002"
    assert write_index(workspace, passages[:2], encoder) == "000003"
    assert segments.list_versions(workspace) == ["000001", "000002", "000003"]
    assert segments.current_version(workspace) == "000003"
    assert segments.open_index(workspace).passages.num_rows == 2
    segments.set_current(workspace, "000001")
    assert segments.current_version(workspace) == "000001"
    assert segments.open_index(workspace).passages.num_rows == len(passages)
    assert segments.open_index(workspace, "000002").passages.num_rows == 4
    assert write_index(workspace, passages[:3], encoder) == "000004", "a number is never used twice"


def test_an_unfinished_version_is_no_version_and_its_number_stays_taken(
    workspace: str, passages: list[schema.Passage], encoder: HashingEncoder, write_index: Write
) -> None:
    unfinished = Path(segments.version_url(workspace, "000002"))
    unfinished.mkdir()
    (unfinished / "rejects.jsonl").write_text("")
    assert segments.list_versions(workspace) == ["000001"]
    assert write_index(workspace, passages, encoder) == "000003"


def test_of_two_publishers_of_one_number_the_first_wins(
    workspace: str,
    passages: list[schema.Passage],
    encoder: HashingEncoder,
    write_index: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = storage.stage

    def overtaken(url: str, scratch: str | None = None) -> Path:
        """The rival publishes after we counted the versions and before we publish ours."""
        staging = stage(url, scratch)
        if url.endswith("versions/000002"):
            monkeypatch.setattr(storage, "stage", stage)
            assert write_index(workspace, passages[:4], encoder) == "000002"
        return staging

    monkeypatch.setattr(storage, "stage", overtaken)
    with pytest.raises(storage.ArtifactError, match=r"000002: another publisher .*run the command again"):
        write_index(workspace, passages[:2], encoder)
    assert segments.current_version(workspace) == "000002"
    assert segments.open_index(workspace).passages.num_rows == 4, "the rival's"
    assert [path.name for path in (Path(workspace) / "index" / "versions").iterdir() if path.name[0] == "."] == []
    assert write_index(workspace, passages[:2], encoder) == "000003"


def test_a_version_of_a_missing_segment_is_not_published(workspace: str) -> None:
    with pytest.raises(storage.ArtifactError, match=r"segments/nowhere: no manifest\.json"):
        segments.publish_version(workspace, ["nowhere"], {}, language="en")
    assert segments.list_versions(workspace) == ["000001"]


def test_a_workspace_without_an_index_says_which_command_makes_one(tmp_path: Path) -> None:
    for read in (segments.current_version, segments.open_index):
        with pytest.raises(storage.ArtifactError, match=r"holds no index; run: ragtune index CONFIG"):
            read(str(tmp_path))
    assert segments.index_problems(str(tmp_path)) == [f"{tmp_path}: holds no index; run: ragtune index CONFIG"]


@pytest.mark.parametrize("content", [b"", b"000001", b"1\n", b"000001\n000002\n", b"\xff\xfe\n", b"../../etc\n"])
def test_a_damaged_current_is_named(workspace: str, content: bytes) -> None:
    (Path(workspace) / "index" / "CURRENT").write_bytes(content)
    with pytest.raises(storage.ArtifactError, match=r"index/CURRENT: is damaged.*run: ragtune index CONFIG"):
        segments.open_index(workspace)
    (problem,) = segments.index_problems(workspace)
    assert "CURRENT: is damaged" in problem


def test_a_current_that_names_no_version_is_refused(workspace: str) -> None:
    segments.set_current(workspace, "000009")
    with pytest.raises(storage.ArtifactError, match=r"versions/000009: no manifest\.json"):
        segments.open_index(workspace)
    assert len(segments.index_problems(workspace)) == 1


def test_another_sound_segment_in_place_of_the_named_one_is_refused(
    workspace: str, passages: list[schema.Passage], encoder: HashingEncoder, write_index: Write
) -> None:
    named = segments.open_index(workspace).manifest["segments"][0]["segment_id"]
    write_index(workspace, passages[:2], encoder, num_segments=1)
    other = segments.open_index(workspace).manifest["segments"][0]["segment_id"]
    assert named != other
    place = Path(segments.segment_url(workspace, named))
    shutil.rmtree(place)
    shutil.copytree(segments.segment_url(workspace, other), place)
    assert storage.problems(str(place)) == [], "in itself it is sound"
    with pytest.raises(storage.ArtifactError, match=rf"{named}: is not the segment that version 000001 names"):
        segments.open_index(workspace, "000001")
    (problem,) = segments.index_problems(workspace, "000001")
    assert f"{named}: is not the segment" in problem


def test_one_flipped_byte_in_any_file_is_found_and_refused(workspace: str) -> None:
    files = sorted(path for path in Path(workspace).rglob("*") if path.is_file() and path.name != "CURRENT")
    assert len(files) == 2 + 2 * 8, "the version's two files and eight per segment"
    assert segments.index_problems(workspace) == []
    for file in files:
        sound = file.read_bytes()
        for position in {0, len(sound) // 3, len(sound) - 1}:
            file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            (problem,) = segments.index_problems(workspace)
            assert file.parent.name in problem or file.parent.parent.name in problem
            assert file.name in problem
            with pytest.raises(storage.ArtifactError):
                segments.open_index(workspace)
        file.write_bytes(sound)
    assert segments.index_problems(workspace) == []


def test_every_damaged_or_replaced_segment_is_reported(workspace: str) -> None:
    first, second = (
        Path(segments.segment_url(workspace, entry["segment_id"]))
        for entry in segments.open_index(workspace).manifest["segments"]
    )
    shutil.rmtree(second)
    shutil.copytree(first, second)
    (first / "passages.arrow").unlink()
    found = segments.index_problems(workspace)
    assert len(found) == 2
    assert "passages.arrow is missing" in found[0]
    assert f"{second}: is not the segment" in found[1]
