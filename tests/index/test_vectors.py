"""Vector search over segments: every kind, ties, filters, stored vectors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray.index import faiss_index, vectors
from tests.support.vectors import clustered_vectors, random_vectors, unit

KINDS: list[faiss_index.ConcreteKind] = ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"]
QUANTIZED: list[faiss_index.ConcreteKind] = ["ivf_sq", "ivf_pq"]


def built(
    kind: faiss_index.ConcreteKind, stored: np.ndarray, num_segments: int = 1, trained_id: str = "t"
) -> list[vectors.Part]:
    trained = faiss_index.train(kind, stored.shape[1], len(stored), stored, 0)
    exact = faiss_index.is_quantized(kind)
    return [
        vectors.Part(faiss_index.build(trained, part), part if exact else None, trained_id)
        for part in np.array_split(stored, num_segments)
    ]


def brute_force(stored: np.ndarray, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ stored.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(scores, order, axis=1), order


def split(mask: np.ndarray, parts: Sequence[vectors.Part]) -> list[np.ndarray]:
    return np.split(mask, np.cumsum([part.structure.ntotal for part in parts])[:-1])


@pytest.mark.parametrize("num_queries", [3, 40])  # from 20 queries on, FAISS uses another code path
def test_flat_search_equals_brute_force(num_queries: int) -> None:
    stored, queries = random_vectors(500), random_vectors(num_queries, seed=1)
    scores, ordinals = vectors.VectorIndex(built("flat", stored)).search(queries, 20)
    expected_scores, expected = brute_force(stored, queries, 20)
    np.testing.assert_array_equal(ordinals, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert (scores.dtype, ordinals.dtype) == (np.float32, np.int64)


@given(st.integers(1, 80), st.lists(st.integers(0, 80), max_size=5), st.integers(1, 100), st.integers(0, 10**6))
def test_segments_searched_as_one_equal_the_unsplit_index(count: int, cuts: list[int], top_k: int, seed: int) -> None:
    stored, queries = random_vectors(count, 8, seed), random_vectors(4, 8, seed + 1)
    trained = faiss_index.train("flat", 8, count, stored[:0], 0)
    pieces = np.split(stored, sorted(min(cut, count) for cut in cuts))  # some of them empty
    searched = vectors.VectorIndex([vectors.Part(faiss_index.build(trained, piece), None, "") for piece in pieces])
    scores, ordinals = searched.search(queries, top_k)
    whole_scores, whole_ordinals = vectors.VectorIndex(built("flat", stored)).search(queries, top_k)
    np.testing.assert_array_equal(ordinals, whole_ordinals)
    np.testing.assert_allclose(scores, whole_scores, atol=1e-6)
    np.testing.assert_array_equal(ordinals[:, :count], brute_force(stored, queries, top_k)[1])
    assert searched.num_vectors == count


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_are_ordered_by_ordinal(kind: faiss_index.ConcreteKind) -> None:
    stored = np.eye(4, dtype=np.float32)[[1, 0, 1, 0, 2, 0]]
    for num_segments in (1, 2, 3):
        searched = vectors.VectorIndex(built(kind, stored, num_segments), vectors.SearchEffort(lists=6))
        scores, ordinals = searched.search(stored[1:2], 6)
        assert ordinals.tolist() == [[1, 3, 5, 0, 2, 4]]
        assert scores.tolist() == [[1, 1, 1, 0, 0, 0]]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_a_tie_for_the_last_place_goes_to_the_lower_ordinal(top_k: int, num_segments: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    # Only five different cosines, all exact in float32, so that nearly every cut is between equal scores.
    stored, queries = (source.choice([-0.5, 0.5], size=(n, 4)).astype(np.float32) for n in (vectors.TIED_VECTORS, 25))
    _, ordinals = vectors.VectorIndex(built("flat", stored, num_segments)).search(queries, top_k)
    np.testing.assert_array_equal(ordinals, brute_force(stored, queries, top_k)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_missing_hits_have_no_ordinal(kind: faiss_index.ConcreteKind) -> None:
    stored = random_vectors(3)
    for num_segments in (1, 2):
        scores, ordinals = vectors.VectorIndex(built(kind, stored, num_segments)).search(stored[:2], 5)
        assert sorted(ordinals[0].tolist()) == [-1, -1, 0, 1, 2]
        assert ordinals[:, 3:].tolist() == [[-1, -1]] * 2
        assert np.isneginf(scores[:, 3:]).all()
        assert np.isfinite(scores[:, :3]).all()


def test_an_empty_index_or_no_queries_return_no_hits() -> None:
    scores, ordinals = vectors.VectorIndex([]).search(random_vectors(2), 3)
    assert ordinals.tolist() == [[-1] * 3] * 2
    assert np.isneginf(scores).all()
    assert vectors.VectorIndex(built("flat", random_vectors(5))).search(random_vectors(0), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq", "ivf_pq", "hnsw"])
@pytest.mark.parametrize("num_segments", [1, 3])
def test_approximate_search_finds_nine_of_ten_neighbours(kind: faiss_index.ConcreteKind, num_segments: int) -> None:
    stored = clustered_vectors(5000)
    queries = unit(stored[::100] + 0.05 * np.random.default_rng(2).normal(size=(50, 32)))
    effort = vectors.SearchEffort(lists=16, graph=64, rescored=16)
    scores, ordinals = vectors.VectorIndex(built(kind, stored, num_segments), effort).search(queries, 10)
    expected = brute_force(stored, queries, 10)[1]
    found = [len(set(row) & set(exact)) for row, exact in zip(ordinals.tolist(), expected.tolist(), strict=True)]
    assert np.mean(found) / 10 > 0.9
    # Every hit has its true cosine.
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, stored[ordinals]), atol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_scores_of_quantised_kinds_are_the_exact_inner_products_best_first(kind: faiss_index.ConcreteKind) -> None:
    # More queries than are re-scored at once, and few candidates each.
    stored, queries = random_vectors(700), random_vectors(2 * vectors.QUERIES_AT_ONCE + 3, seed=1)
    scores, ordinals = vectors.VectorIndex(built(kind, stored, 3), vectors.SearchEffort(2)).search(queries, 7)
    assert (ordinals >= 0).all()
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, stored[ordinals]), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq", "ivf_pq"])
def test_parts_that_share_centroids_answer_like_single_parts(kind: faiss_index.ConcreteKind) -> None:
    stored, queries = clustered_vectors(1000), clustered_vectors(1000)[::37]
    effort = vectors.SearchEffort(3)
    shared, alone = (
        vectors.VectorIndex(built(kind, stored, 4, trained_id), effort).search(queries, 10) for trained_id in ("t", "")
    )
    np.testing.assert_array_equal(shared[1], alone[1])
    np.testing.assert_array_equal(shared[0], alone[0])


def test_parts_of_different_kinds_are_searched_together() -> None:
    stored, queries = random_vectors(1000), random_vectors(20, seed=3)
    parts = [
        part
        for number, (kind, piece) in enumerate(zip(KINDS, np.array_split(stored, 5), strict=True))
        for part in built(kind, piece, trained_id=f"t{number}")
    ]
    effort = vectors.SearchEffort(lists=1000, graph=1000, rescored=1000)
    scores, ordinals = vectors.VectorIndex(parts, effort).search(queries, 10)
    expected_scores, expected = brute_force(stored, queries, 10)
    np.testing.assert_array_equal(ordinals, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_segments", [1, 3])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01])
def test_only_allowed_vectors_are_hits_and_the_result_is_full(
    kind: faiss_index.ConcreteKind, num_segments: int, share: float
) -> None:
    stored, queries = clustered_vectors(2000), clustered_vectors(2000)[::61]
    parts = built(kind, stored, num_segments)
    searched = vectors.VectorIndex(parts)
    for seed in range(3):
        mask = np.random.default_rng(seed).random(2000) < share
        mask[:10] = True
        scores, ordinals = searched.search(queries, 10, split(mask, parts))
        assert (ordinals >= 0).all(), "enough is allowed, so the result is full"
        assert mask[ordinals].all()
        assert all(len(set(row)) == 10 for row in ordinals.tolist())
        np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, stored[ordinals]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_allowed", [0, 1, 9, 10, 11])
def test_all_of_few_allowed_vectors_are_found(kind: faiss_index.ConcreteKind, num_allowed: int) -> None:
    stored, queries = clustered_vectors(1500), clustered_vectors(1500)[::97]
    parts = built(kind, stored, 3)
    mask = np.zeros(1500, dtype=bool)
    mask[np.random.default_rng(num_allowed).choice(1500, num_allowed, replace=False)] = True
    _, ordinals = vectors.VectorIndex(parts).search(queries, 10, split(mask, parts))
    allowed = set(np.flatnonzero(mask).tolist())
    for row in ordinals.tolist():
        found = [ordinal for ordinal in row if ordinal >= 0]
        assert len(found) == len(set(found)) == min(10, num_allowed)
        assert set(found) <= allowed
        assert row[len(found) :] == [-1] * (10 - len(found))


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_may_be_excluded_and_another_unrestricted(kind: faiss_index.ConcreteKind) -> None:
    stored, queries = clustered_vectors(600), clustered_vectors(600)[::31]
    parts = built(kind, stored, 3)
    masks = [np.zeros(200, dtype=bool), None, np.arange(200) % 2 == 0]
    _, ordinals = vectors.VectorIndex(parts).search(queries, 10, masks)
    assert ((ordinals >= 200) & ((ordinals < 400) | (ordinals % 2 == 0))).all()


@given(st.integers(1, 120), st.integers(1, 4), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_flat_search_with_a_filter_equals_brute_force(
    count: int, num_segments: int, top_k: int, share: float, seed: int
) -> None:
    stored, queries = random_vectors(count, 8, seed), random_vectors(4, 8, seed + 1)
    mask = np.random.default_rng(seed).random(count) < share
    parts = built("flat", stored, num_segments)
    scores, ordinals = vectors.VectorIndex(parts).search(queries, top_k, split(mask, parts))
    allowed = np.flatnonzero(mask)
    expected_scores, expected = brute_force(stored[allowed], queries, top_k)
    np.testing.assert_array_equal(ordinals[:, : len(allowed)], allowed[expected])
    np.testing.assert_allclose(scores[:, : len(allowed)], expected_scores, atol=1e-6)
    assert (ordinals[:, len(allowed) :] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_saved_index_answers_the_same_in_memory_and_mapped(
    tmp_path: Path, kind: faiss_index.ConcreteKind, masked: bool
) -> None:
    stored = clustered_vectors(800)
    (part,) = built(kind, stored)
    faiss_index.save(part.structure, tmp_path / "x.faiss")
    allowed = [np.arange(800) % 3 == 0] if masked else None
    effort = vectors.SearchEffort(2)
    before = vectors.VectorIndex([part], effort).search(stored[:5], 10, allowed)
    if part.exact is not None:
        np.save(tmp_path / "x.npy", part.exact)
    for mmap in (False, True):
        exact = None if part.exact is None else np.load(tmp_path / "x.npy", mmap_mode="r" if mmap else None)
        loaded = vectors.Part(faiss_index.load(tmp_path / "x.faiss", mmap=mmap), exact, "t")
        after = vectors.VectorIndex([loaded], effort).search(stored[:5], 10, allowed)
        np.testing.assert_array_equal(before[1], after[1])
        np.testing.assert_array_equal(before[0], after[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_segments", [1, 3])
def test_vectors_are_returned_as_they_were_added(kind: faiss_index.ConcreteKind, num_segments: int) -> None:
    stored = clustered_vectors(500)
    searched = vectors.VectorIndex(built(kind, stored, num_segments))
    before = searched.search(stored[:30], 5)
    wanted = np.random.default_rng(4).integers(0, 500, 200)  # unordered, with duplicates
    wanted[:4] = [0, 166, 167, 499]  # where segments begin and end
    found = searched.take(wanted)
    assert (found.dtype, found.shape) == (np.float32, (200, 32))
    np.testing.assert_allclose(found, stored[wanted], rtol=0, atol=1e-6)
    np.testing.assert_allclose(searched.take(np.arange(500)), stored, rtol=0, atol=1e-6)
    assert searched.take(np.empty(0, dtype=np.int64)).shape == (0, 32)
    for one, other in zip(searched.search(stored[:30], 5), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_given_vectors_are_scored_exactly(kind: faiss_index.ConcreteKind) -> None:
    stored, queries = clustered_vectors(500), clustered_vectors(600)[500:]
    searched = vectors.VectorIndex(built(kind, stored, 3))
    wanted = np.random.default_rng(3).integers(-1, 500, (100, 7))
    wanted[70] = -1
    scores = searched.scores_of(queries, wanted)
    expected = np.einsum("qd,qkd->qk", queries.astype(np.float64), stored[wanted].astype(np.float64))
    np.testing.assert_allclose(scores, np.where(wanted < 0, -np.inf, expected), atol=1e-6)
    alone = np.concatenate([searched.scores_of(queries[n : n + 1], wanted[n : n + 1]) for n in range(100)])
    assert scores.tobytes() == alone.tobytes(), "a score does not depend on the other queries"


def test_vectors_are_taken_across_kinds_and_empty_segments() -> None:
    stored = clustered_vectors(500)
    pieces = np.split(stored, [0, 90, 90, 90, 260, 400])
    kinds: list[faiss_index.ConcreteKind] = ["flat", "ivf", "flat", "ivf_pq", "hnsw", "ivf_sq", "flat"]
    parts = []
    for kind, piece in zip(kinds, pieces, strict=True):
        trained = faiss_index.train(kind, 32, 500, stored, 0)
        parts.append(
            vectors.Part(faiss_index.build(trained, piece), piece if faiss_index.is_quantized(kind) else None, "")
        )
    assert [part.structure.ntotal for part in parts] == [0, 90, 0, 0, 170, 140, 100]
    wanted = np.random.default_rng(5).permutation(500)
    np.testing.assert_allclose(vectors.VectorIndex(parts).take(wanted), stored[wanted], rtol=0, atol=1e-6)
    assert vectors.VectorIndex([]).take(np.empty(0, dtype=np.int64)).shape == (0, 0)
    assert vectors.VectorIndex([]).scores_of(stored[:1], np.array([[-1]])).tolist() == [[-np.inf]]
