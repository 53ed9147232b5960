"""Segments: their files, documents, filters and checks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import schema
from ragtune_ray.index import bm25, faiss_index, filters, segments, versions
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts

Write = Callable[..., str]
ENCODER = HashingEncoder("hashing-64")


def only_entries(workspace: Path) -> tuple[versions.Entry, ...]:
    latest = versions.latest_version(str(workspace))
    assert latest is not None
    return latest.entries


def marks(count: int) -> pa.Array:
    return pa.array([bytes([number]) * 16 for number in range(count)], pa.binary(16))


@given(chunks=st.lists(st.lists(st.text(max_size=3), max_size=4), max_size=6), data=st.data())
def test_rows_from_chunks_equal_rows_from_one_table(chunks: list[list[str]], data: st.DataObject) -> None:
    texts = pa.chunked_array(chunks, pa.string())
    table = pa.table({"text": texts, "number": pa.array(range(len(texts)), pa.int64())})  # this column in one chunk
    numbers = data.draw(st.lists(st.integers(0, len(texts) - 1)) if len(texts) else st.just([]))
    assert segments.take_rows(table, numbers).equals(table.take(pa.array(numbers, pa.int64())))


@pytest.mark.parametrize("number", [-1, 3])
def test_a_row_out_of_range_is_refused(number: int) -> None:
    table = pa.table({"text": pa.chunked_array([["a"], [], ["b", "c"]], pa.string())})
    with pytest.raises(IndexError, match=f"row {number} is not in the table; it has rows 0 to 2"):
        segments.take_rows(table, [0, number])


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"])
def test_a_segment_is_read_as_it_was_written(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write, kind: faiss_index.ConcreteKind
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=1, kind=kind)
    (entry,) = only_entries(tmp_path)
    segment = segments.open_segment(str(tmp_path), entry.segment_id, entry.manifest_sha256)
    assert list(schema.from_table(segment.passages, schema.Passage)) == passages
    expected = ENCODER.encode_passages([passage.text for passage in passages])
    stored = faiss_index.stored_vectors(segment.part.structure, segment.part.exact)
    np.testing.assert_array_equal(stored, expected)
    assert faiss_index.kind_of(segment.part.structure) == kind
    assert (segment.part.exact is not None) == faiss_index.is_quantized(kind)


def test_documents_are_found_by_id_with_their_passages(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=1)
    (entry,) = only_entries(tmp_path)
    rows = segments.open_documents(str(tmp_path), entry.segment_id, entry.manifest_sha256)
    for document_id in {passage.document_id for passage in passages}:
        expected = [n for n, passage in enumerate(passages) if passage.document_id == document_id]
        assert rows.passages(rows.find([document_id])).tolist() == expected
    assert rows.find(["nobody", ""]).tolist() == []
    assert rows.find([]).tolist() == []
    every = sorted({passage.document_id for passage in passages})
    assert rows.passages(rows.find(every)).tolist() == list(range(len(passages)))


def test_a_document_in_two_places_has_two_rows_and_all_passages(tmp_path: Path, passages: list[schema.Passage]) -> None:
    """Merging segments can lead to this if a document was cut between them."""
    chosen = [passages[0], passages[2], passages[1]]
    assert [passage.document_id for passage in chosen] == ["moon", "mars", "moon"]
    url = segments.segment_url(str(tmp_path), "s")
    staging = artifacts.stage(url)
    embedded = ENCODER.encode_passages([passage.text for passage in chosen])
    trained = faiss_index.train("flat", 64, 3, embedded, 0)
    moon, mars = b"m" * 16, b"a" * 16
    fingerprints = pa.array([moon, mars, moon], pa.binary(16))
    segments.write_segment(staging, schema.to_table(chosen, schema.Passage), fingerprints, embedded, trained, "en")
    segments.publish_segment(staging, url, 3, "")
    segment = segments.open_segment(str(tmp_path), "s", artifacts.read_manifest(url)["manifest_sha256"])
    assert segment.documents.passages(segment.documents.find(["moon"])).tolist() == [0, 2]
    assert segment.fingerprints().to_pylist() == [moon, mars, moon]


def test_fingerprints_depend_on_all_content_of_passages() -> None:
    first = schema.Document("d", "text", "title", "{}", "here")
    others = [
        schema.Document("e", "text", "title", "{}", "here"),
        schema.Document("d", "texts", "title", "{}", "here"),
        schema.Document("d", "text", "titles", "{}", "here"),
        schema.Document("d", "text", "title", '{"a": 1}', "here"),
        schema.Document("dt", "ext", "title", "{}", "here"),
    ]
    found = {segments.document_fingerprint(document) for document in [first, *others]}
    assert len(found) == len(others) + 1
    moved = schema.Document("d", "text", "title", "{}", "elsewhere")
    assert segments.document_fingerprint(moved) == segments.document_fingerprint(first)


def test_a_filter_matches_the_passages_of_its_documents(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    import dataclasses

    marked = [
        dataclasses.replace(passage, metadata='{"kind": "planet"}' if passage.document_id == "mars" else "{}")
        for passage in passages
    ]
    write_index(tmp_path, marked, ENCODER, num_segments=1)
    (entry,) = only_entries(tmp_path)
    segment = segments.open_segment(str(tmp_path), entry.segment_id, entry.manifest_sha256)
    mask = segment.matching(filters.parse_filter({"kind": "planet"}))
    assert mask.tolist() == [passage.document_id == "mars" for passage in passages]


def test_numbers_of_vectors_and_passages_must_be_equal(tmp_path: Path, passages: list[schema.Passage]) -> None:
    trained = faiss_index.train("flat", 4, 2, np.empty((0, 4), dtype=np.float32), 0)
    table = schema.to_table(passages[:2], schema.Passage)
    with pytest.raises(ValueError, match="3 vectors for 2 passages"):
        segments.write_segment(tmp_path, table, marks(2), np.eye(4, dtype=np.float32)[:3], trained, "en")
    with pytest.raises(schema.SchemaError, match=r"Passage\.text"):
        segments.write_segment(
            tmp_path, pa.table({"passage_id": ["a"], "document_id": ["b"]}), marks(1), np.eye(1), trained, "en"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_sound_segment_with_another_checksum_is_refused(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=1)
    (entry,) = only_entries(tmp_path)
    with pytest.raises(artifacts.ArtifactError, match="is not the segment that the version names"):
        segments.open_segment(str(tmp_path), entry.segment_id, "0" * 64)


@pytest.mark.parametrize("titles", [False, True])
def test_titles_are_searched_where_they_are_asked_for(
    tmp_path: Path, passages: list[schema.Passage], titles: bool
) -> None:
    table = schema.to_table([dataclasses.replace(each, title="Zeppelins") for each in passages], schema.Passage)
    trained = faiss_index.train("flat", 64, len(passages), np.empty((0, 64)), 0)
    vectors = ENCODER.encode_passages([passage.text for passage in passages])
    segments.write_segment(tmp_path, table, marks(len(passages)), vectors, trained, "en", titles=titles)
    postings = bm25.Postings.load(tmp_path / segments.LEXICAL, mmap=False)
    plain = bm25.build_segment([passage.text for passage in passages], "en")
    found = bm25.LexicalIndex([postings], "en").search(["zeppelin"], len(passages))[1]
    assert (found >= 0).all() == titles
    assert (postings.lengths - plain.lengths).tolist() == [int(titles)] * len(passages)
