"""An open version: ordinals, reuse, shards, filters, and indexes of earlier formats."""

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ragtune_ray import config, schema
from ragtune_ray.index import bm25, contents, faiss_index, filters, segments, snapshot, vectors, versions, words
from ragtune_ray.index.retriever import Retriever
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.storage import artifacts
from tests.support.indexes import delete

Write = Callable[..., str]
ENCODER = HashingEncoder("hashing-64")
GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"])
def test_an_index_is_read_as_it_was_written(
    tmp_path: Path,
    passages: list[schema.Passage],
    write_index: Write,
    num_segments: int,
    kind: faiss_index.ConcreteKind,
) -> None:
    version = write_index(tmp_path, passages, ENCODER, num_segments=num_segments, kind=kind)
    opened = snapshot.open_index(str(tmp_path))
    assert opened.version == version == "000001"
    assert list(schema.from_table(opened.passages, schema.Passage)) == passages
    assert opened.take([3, 0, 3]) == [passages[3], passages[0], passages[3]]
    assert opened.take([]) == []
    vectors_ = ENCODER.encode_passages([passage.text for passage in passages])
    scores, ordinals = opened.vectors.search(vectors_, 1)
    assert ordinals[:, 0].tolist() == list(range(len(passages))), "each vector finds its own passage"
    np.testing.assert_allclose(scores, 1, atol=1e-6)
    assert opened.lexical.search(["Phobos and Deimos"], 1)[1].tolist() == [[3]]
    assert opened.manifest["num_passages"] == opened.num_passages == opened.lexical.num_passages == len(passages)


def test_passages_are_taken_from_more_than_2_gib_of_text(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER)
    opened = snapshot.open_index(str(tmp_path))
    long = schema.to_table([dataclasses.replace(passages[0], text="x" * 2**26)], schema.Passage)
    place = long.schema.get_field_index("start")
    # The forty rows share one text, so that 2.5 GiB take 64 MiB.
    table = pa.concat_tables([long.set_column(place, long.schema.field(place), [[number]]) for number in range(40)])
    large = dataclasses.replace(opened, passages=table)
    found = large.take([0, 39, 3])
    assert [passage.start for passage in found] == [0, 39, 3]
    assert {(passage.passage_id, len(passage.text)) for passage in found} == {(passages[0].passage_id, 2**26)}

    class Reranker:
        first_stage_weight = 0.0

        def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
            return np.array([len(text) for _, text in pairs], dtype=np.float32)

    settings = config.Retrieval(mode="lexical", candidates=1)
    (hits,) = Retriever(large, None, settings, Reranker()).retrieve(["q"], ["The Moon"], 1)
    assert [(hit.passage_id, hit.score) for hit in hits] == [(passages[0].passage_id, 2**26)]


def test_passages_are_found_by_id_in_several_segments(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=3)
    delete(str(tmp_path), "mars")
    opened = snapshot.open_index(str(tmp_path))
    wanted = [passages[-1].passage_id, "mars#0", passages[0].passage_id, "nobody#0"]
    assert opened.by_id(wanted) == {row.passage_id: row for row in (passages[0], passages[-1])}


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"])
def test_deleted_passages_are_never_hits_and_results_stay_full(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write, kind: faiss_index.ConcreteKind, mode: str
) -> None:
    write_index(tmp_path, passages, ENCODER, kind=kind)
    delete(str(tmp_path), "mars", "hubble")
    opened = snapshot.open_index(str(tmp_path))
    retriever = Retriever(opened, ENCODER, config.Retrieval(mode=mode))
    left = [passage for passage in passages if passage.document_id not in {"mars", "hubble"}]
    (hits,) = retriever.retrieve(["q"], ["Mars has two moons; the Hubble telescope is no star; 月球 helium"], len(left))
    assert {hit.document_id for hit in hits} <= {passage.document_id for passage in left}
    if mode != "lexical":
        assert len(hits) == len(left)


def test_opening_the_next_version_reuses_common_segments(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER)
    before = snapshot.open_index(str(tmp_path))
    delete(str(tmp_path), "mars")
    after = snapshot.open_index(str(tmp_path), reuse=before)
    assert [id(segment) for segment in after.segments] == [id(segment) for segment in before.segments]
    assert after.num_passages == before.num_passages - 2
    assert before.num_passages == len(passages), "an open version never changes"


def test_filters_and_deletions_both_apply(tmp_path: Path, passages: list[schema.Passage], write_index: Write) -> None:
    marked = [dataclasses.replace(p, metadata=json.dumps({"length": len(p.document_id)})) for p in passages]
    write_index(tmp_path, marked, ENCODER)
    delete(str(tmp_path), "mars")
    opened = snapshot.open_index(str(tmp_path))
    allowed = opened.allowed(filters.parse_filter({"length": {"lte": 4}}))
    found = np.flatnonzero(np.concatenate([np.asarray(mask) for mask in allowed]))
    assert {passages[ordinal].document_id for ordinal in found} == {"moon", "sun"}
    assert opened.allowed(filters.Filter()) is opened.alive


@pytest.mark.parametrize("num_segments", [1, 2, 4])
def test_the_passages_of_documents_are_found_group_by_group(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write, num_segments: int
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=num_segments)
    opened = snapshot.open_index(str(tmp_path))
    names = [passage.document_id for passage in passages]
    assert names == ["moon", "moon", "mars", "mars", "hubble", "sun", "sun", "china"]
    groups = [["sun", "moon"], [], ["unknown"], ["moon", "unknown", "china"], ["mars"], ["moon", "sun"]]
    found = opened.of_documents(groups)
    assert [part.tolist() for part in found] == [[5, 6, 0, 1], [], [], [0, 1, 7], [2, 3], [0, 1, 5, 6]]
    assert all(part.dtype == np.int64 for part in found)
    assert opened.of_documents([]) == []
    assert [passage.passage_id for passage in opened.take(found[0].tolist())] == ["sun#0", "sun#1", "moon#0", "moon#1"]


def test_passages_of_changed_documents_are_the_new_ones(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    # In a changed document, old passages are deleted in the first segment and new ones are in another.
    again = [
        dataclasses.replace(row, passage_id=f"{row.passage_id[:-1]}{number + 7}", text=f"Once more: {row.text}")
        for number, row in enumerate(passages)
        if row.document_id in {"mars", "china"}
    ]
    write_index(tmp_path, again, ENCODER, num_segments=1)
    second = versions.latest_version(str(tmp_path))
    write_index(tmp_path, passages, ENCODER, num_segments=2)
    first = delete(str(tmp_path), "mars", "hubble")
    merged = versions.Draft((*first.entries, *second.entries), {})
    versions.publish_version(str(tmp_path), versions.latest_version(str(tmp_path)), merged)
    opened = snapshot.open_index(str(tmp_path))
    found = opened.of_documents([["mars"], ["hubble"], ["china"], ["moon", "hubble", "mars"]])
    assert [part.tolist() for part in found] == [[8, 9], [], [7, 10], [0, 1, 8, 9]]
    everything = opened.of_documents([[name] for name in ("moon", "mars", "hubble", "sun", "china")])
    assert sorted(ordinal for part in everything for ordinal in part) == np.flatnonzero(_living(opened)).tolist()
    assert len(np.concatenate(everything)) == opened.num_passages == 8


def _living(opened: snapshot.Index) -> np.ndarray:
    return np.concatenate(
        [
            np.ones(segment.num_passages, dtype=bool) if mask is None else mask
            for segment, mask in zip(opened.segments, opened.alive, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"])
def test_the_vectors_of_documents_are_those_that_were_written(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write, kind: faiss_index.ConcreteKind
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=3, kind=kind)
    opened = snapshot.open_index(str(tmp_path))  # memory-mapped: some kinds have another code path for that
    (ordinals,) = opened.of_documents([["sun", "china", "mars"]])
    expected = ENCODER.encode_passages([passages[ordinal].text for ordinal in ordinals])
    np.testing.assert_allclose(opened.vectors.take(ordinals), expected, rtol=0, atol=1e-6)


def test_a_part_has_as_many_random_segments_as_fit(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=4)
    workspace = str(tmp_path)
    version = versions.read_version(workspace, "000001")
    sizes = [
        sum(file["bytes"] for file in segments.read_segment_manifest(workspace, entry.segment_id)["files"].values())
        for entry in version.entries
    ]
    places = {entry.manifest_sha256: place for place, entry in enumerate(version.entries)}

    def drawn(max_bytes: int, seed: int) -> list[int]:
        opened = snapshot.open_part(workspace, max_bytes, seed)
        return [places[segment.manifest_sha256] for segment in opened.segments]

    assert drawn(sum(sizes), 0) == [0, 1, 2, 3]
    without_one = [drawn(sum(sizes) - 1, seed) for seed in range(20)]
    assert {len(each) for each in without_one} == {3}
    assert all(each == sorted(each) for each in without_one)
    assert {place for each in without_one for place in {0, 1, 2, 3}.difference(each)} == {0, 1, 2, 3}
    assert {tuple(drawn(1, seed)) for seed in range(20)} == {(0,), (1,), (2,), (3,)}
    assert drawn(1, 7) == drawn(1, 7)


def test_merged_hits_of_shards_equal_those_of_the_whole(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=4)
    version = delete(str(tmp_path), "sun")
    whole = snapshot.open_index(str(tmp_path))
    queries = ["two moons of Mars", "telescope star helium", "月球 Moon 1969"]
    embedded = ENCODER.encode_queries(queries)
    tokens = {token for row in words.tokens(queries, "en") for token in row}
    places = [[place] for place in range(len(version.entries))]
    parts = [snapshot.open_index(str(tmp_path), shard=shard) for shard in places]
    statistics = bm25.add_statistics([part.lexical.statistics(tokens) for part in parts])
    parts = [snapshot.open_index(str(tmp_path), shard=shard, statistics=statistics) for shard in places]
    first = np.cumsum([0, *(part.passages.num_rows for part in parts)])
    for search in (
        lambda part: part.vectors.search(embedded, 4, part.alive),
        lambda part: part.lexical.search(queries, 4, part.alive),
    ):
        found = [search(part) for part in parts]
        ordinals = [np.where(ids >= 0, ids + start, -1) for (_, ids), start in zip(found, first, strict=False)]
        merged = vectors.top([scores for scores, _ in found], ordinals, 4)
        for one, other in zip(merged, search(whole), strict=True):
            np.testing.assert_array_equal(one, other)


def test_shards_are_consecutive_segments_up_to_a_size(
    tmp_path: Path, passages: list[schema.Passage], write_index: Write
) -> None:
    write_index(tmp_path, passages, ENCODER, num_segments=4)
    version = versions.read_version(str(tmp_path), "000001")
    assert snapshot.shards(str(tmp_path), version, 2**40) == [[0, 1, 2, 3]]
    assert snapshot.shards(str(tmp_path), version, 1) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("sizes", "num_shards", "expected"),
    [
        ([10, 10, 10, 10], 2, [[0, 1], [2, 3]]),
        ([10, 10, 10, 10, 1], 2, [[0, 1], [2, 3, 4]]),  # an upsert's segment moves no other
        ([10, 10, 10, 10, 10, 10], 4, [[0], [1, 2], [3], [4, 5]]),  # middles at 5, 15, 25, 35, 45 and 55 of 60
        ([60, 10, 10, 10, 10], 2, [[0], [1, 2, 3, 4]]),
        ([10], 3, [[], [0], []]),
        ([], 2, [[], []]),
    ],
)
def test_segments_are_divided_into_as_many_shards_as_there_are_processes(
    sizes: list[int], num_shards: int, expected: list[list[int]]
) -> None:
    entries = [{"segment_id": str(n), "manifest_sha256": "", "num_passages": size} for n, size in enumerate(sizes)]
    version = versions.Version("000001", {"segments": entries})
    assert snapshot.divided(version, num_shards) == expected


def test_every_segment_is_in_one_shard_and_none_is_much_larger_than_its_share() -> None:
    draw = np.random.default_rng(0)
    for num_segments, num_shards in ((7, 3), (40, 6), (400, 100)):
        sizes = draw.integers(1, 1000, num_segments)
        entries = [
            {"segment_id": str(n), "manifest_sha256": "", "num_passages": int(size)} for n, size in enumerate(sizes)
        ]
        found = snapshot.divided(versions.Version("000001", {"segments": entries}), num_shards)
        assert [place for shard in found for place in shard] == list(range(num_segments))
        assert max(sizes[shard].sum() for shard in found) <= sizes.sum() / num_shards + sizes.max()


@pytest.mark.parametrize("name", ["format-1-flat", "format-1-ivf"])
def test_an_index_of_format_1_can_be_searched_but_not_filtered(tmp_path: Path, name: str) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    workspace = str(tmp_path / name)
    encoder = HashingEncoder("hashing-16")
    opened = snapshot.open_index(workspace)
    texts = opened.passages["text"].to_pylist()
    assert len(texts) == opened.num_passages == 24
    corpus = [json.loads(line) for line in (GOLDEN / "corpus.jsonl").read_text().splitlines()]
    assert set(opened.passages["document_id"].to_pylist()) == {row["document_id"] for row in corpus}
    _, found = opened.vectors.search(encoder.encode_passages(texts), 1)
    assert [texts[ordinal] for ordinal in found[:, 0]] == texts
    _, found = opened.lexical.search(["secret7"], 1)
    assert opened.take(found[0].tolist())[0].document_id == "d7"
    assert contents.index_problems(workspace) == []
    version = versions.read_version(workspace, "000001")
    for needs_documents in (
        lambda: contents.find_documents(workspace, version, ["d7"]),
        lambda: opened.allowed(filters.parse_filter({"number": 7})),
        lambda: opened.of_documents([["d7"]]),
    ):
        with pytest.raises(artifacts.ArtifactError, match=r"earlier version.*run: ragtune index CONFIG"):
            needs_documents()


def paged(opened: Any, chosen: filters.Filter, limit: int) -> list[snapshot.ListedDocument]:
    """All pages of a list, one after another."""
    found: list[snapshot.ListedDocument] = []
    more = True
    while more:
        page, more = opened.list_documents(chosen, found[-1].document_id if found else "", limit)
        assert 0 < len(page) <= limit or not found
        found += page
    return found


class _InShards:
    """An index whose shards are opened apart."""

    def __init__(self, workspace: str, places: list[list[int]]) -> None:
        self._parts = [snapshot.open_index(workspace, shard=shard) for shard in places]

    def list_documents(
        self, chosen: filters.Filter, after: str, limit: int
    ) -> tuple[list[snapshot.ListedDocument], bool]:
        return snapshot.merge_listed([part.list_documents(chosen, after, limit) for part in self._parts], limit)


def test_a_page_looks_at_its_own_documents_alone() -> None:
    table = pa.table({"first": np.arange(8_000_000)})
    rows = segments.DocumentRows(np.arange(8_000_000, dtype=np.uint64) // 2, table)
    masks = [None, np.arange(8_000_000) % 4 < 2]
    assert len(rows.first) == 8_000_000
    tracemalloc.start()
    try:
        every, second = (snapshot._rows_after(rows, mask, 2_000_001, 3) for mask in masks)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert every[:6].tolist() == list(range(4_000_002, 4_000_008))
    assert second[:6].tolist() == [4_000_004, 4_000_005, 4_000_008, 4_000_009, 4_000_012, 4_000_013]
    assert peak_bytes < 100_000


def test_documents_are_listed_once_each_in_pages(
    tmp_path: Path, write_index: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents with up to 4 passages, which stand apart from each other and across segments; some are deleted."""
    counts = {f"d{number}": 1 + number % 4 for number in range(23)}
    metadata = {name: json.dumps({"even": number % 2 == 0}) for number, name in enumerate(counts)}
    rows = [
        schema.Passage(f"{name}#{part}", name, f"{name} {part}", name.upper(), metadata[name], part, part + 1)
        for part in range(4)
        for name, count in counts.items()
        if part < count
    ]
    write_index(tmp_path, rows, ENCODER, num_segments=3)
    delete(str(tmp_path), "d3", "d6")
    opened = snapshot.open_index(str(tmp_path))
    alive = {name: count for name, count in counts.items() if name not in ("d3", "d6")}
    expected = [snapshot.ListedDocument(name, name.upper(), metadata[name], count) for name, count in alive.items()]
    for limit in (1, 2, 7, 50):
        found = paged(opened, filters.Filter(), limit)
        assert sorted(found, key=lambda each: int(each.document_id[1:])) == expected, limit
        assert found == paged(opened, filters.Filter(), 5), "the order does not depend on the pages"
        even = paged(opened, filters.parse_filter({"even": True}), limit)
        assert even == [each for each in found if int(each.document_id[1:]) % 2 == 0]
        for places in ([[0], [1, 2]], [[0], [1], [2]], [[], [0, 1, 2]]):
            assert paged(_InShards(str(tmp_path), places), filters.Filter(), limit) == found
    after_deleted, _ = opened.list_documents(filters.Filter(), "d3", 50)
    whole = paged(snapshot.open_index(str(tmp_path), "000001"), filters.Filter(), 50)
    place = [each.document_id for each in whole].index("d3")
    assert after_deleted == [each for each in whole[place + 1 :] if each.document_id != "d6"]
    monkeypatch.setattr(snapshot, "LISTED_CHARACTERS", 3 * len(metadata["d0"]))
    assert len(opened.list_documents(filters.Filter(), "", 50)[0]) in (2, 3)
    monkeypatch.setattr(snapshot, "LISTED_CHARACTERS", 1)
    without = [dataclasses.replace(each, metadata=None) for each in found]
    assert paged(opened, filters.Filter(), 50) == without, "metadata that fills a page alone is left out"
    assert paged(_InShards(str(tmp_path), [[0], [1], [2]]), filters.Filter(), 50) == without
    assert snapshot.open_index(str(tmp_path)).list_documents(filters.parse_filter({"none": 1}), "", 5) == ([], False)
