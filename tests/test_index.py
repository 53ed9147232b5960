import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import index


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_vectors(count: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def clustered_vectors(count: int, dimension: int = 32) -> np.ndarray:
    source = np.random.default_rng(7)
    centres = source.normal(size=(50, dimension))
    return unit(centres[source.integers(0, 50, count)] + 0.4 * source.normal(size=(count, dimension)))


def built(kind: index.ConcreteKind, vectors: np.ndarray, num_segments: int = 1, seed: int = 0) -> list[Any]:
    trained = index.train(kind, vectors.shape[1], len(vectors), vectors, seed)
    return [index.build(trained, part) for part in np.array_split(vectors, num_segments)]


def brute_force(vectors: np.ndarray, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("num_queries", [3, 40])  # FAISS takes another path from 20 queries on
def test_flat_search_is_brute_force(num_queries: int) -> None:
    vectors, queries = random_vectors(500), random_vectors(num_queries, seed=1)
    scores, ordinals = index.VectorIndex(built("flat", vectors)).search(queries, 20)
    expected_scores, expected = brute_force(vectors, queries, 20)
    np.testing.assert_array_equal(ordinals, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert (scores.dtype, ordinals.dtype) == (np.float32, np.int64)


@given(st.integers(1, 80), st.lists(st.integers(0, 80), max_size=5), st.integers(1, 100), st.integers(0, 10**6))
def test_segments_searched_as_one_equal_the_unsplit_index(count: int, cuts: list[int], top_k: int, seed: int) -> None:
    vectors, queries = random_vectors(count, 8, seed), random_vectors(4, 8, seed + 1)
    trained = index.train("flat", 8, count, vectors[:0], 0)
    parts = np.split(vectors, sorted(min(cut, count) for cut in cuts))  # some of them empty
    split = index.VectorIndex([index.build(trained, part) for part in parts])
    scores, ordinals = split.search(queries, top_k)
    whole_scores, whole_ordinals = index.VectorIndex([index.build(trained, vectors)]).search(queries, top_k)
    np.testing.assert_array_equal(ordinals, whole_ordinals)
    np.testing.assert_allclose(scores, whole_scores, atol=1e-6)
    np.testing.assert_array_equal(ordinals[:, :count], brute_force(vectors, queries, top_k)[1])
    assert split.num_vectors == count


def test_equal_scores_stand_in_the_order_of_the_ordinals() -> None:
    vectors = np.eye(4, dtype=np.float32)[[1, 0, 1, 0, 2, 0]]
    for num_segments in (1, 2, 3):
        scores, ordinals = index.VectorIndex(built("flat", vectors, num_segments)).search(vectors[1:2], 6)
        assert ordinals.tolist() == [[1, 3, 5, 0, 2, 4]]
        assert scores.tolist() == [[1, 1, 1, 0, 0, 0]]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_a_tie_for_the_last_place_goes_to_the_lower_ordinal(top_k: int, num_segments: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    # Only five different cosines, all exact in float32, so that nearly every cut falls among equals.
    vectors, queries = (source.choice([-0.5, 0.5], size=(n, 4)).astype(np.float32) for n in (index.TIED_VECTORS, 25))
    _, ordinals = index.VectorIndex(built("flat", vectors, num_segments)).search(queries, top_k)
    np.testing.assert_array_equal(ordinals, brute_force(vectors, queries, top_k)[1])


def test_places_beyond_the_last_vector_hold_nothing() -> None:
    vectors = random_vectors(3)
    for num_segments in (1, 2):
        scores, ordinals = index.VectorIndex(built("flat", vectors, num_segments)).search(vectors[:2], 5)
        assert sorted(ordinals[0].tolist()) == [-1, -1, 0, 1, 2]
        assert ordinals[:, 3:].tolist() == [[-1, -1]] * 2
        assert np.isneginf(scores[:, 3:]).all()
        assert np.isfinite(scores[:, :3]).all()


def test_an_empty_index_and_no_queries_give_empty_places() -> None:
    scores, ordinals = index.VectorIndex([]).search(random_vectors(2), 3)
    assert ordinals.tolist() == [[-1] * 3] * 2
    assert np.isneginf(scores).all()
    assert index.VectorIndex(built("flat", random_vectors(5))).search(random_vectors(0), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (np.full(16, np.nan), r"vector 7 has length nan"),
        (np.full(16, np.inf), r"vector 7 has length inf"),
        (np.zeros(16), r"vector 7 has length 0\.0"),
        (np.full(16, 0.5), r"vector 7 has length 2\.0"),
    ],
)
def test_vectors_that_are_not_of_length_one_are_refused(
    kind: index.ConcreteKind, row: np.ndarray, message: str
) -> None:
    vectors = random_vectors(100)
    trained = index.train(kind, 16, 100, vectors, 0)
    spoilt = vectors.copy()
    spoilt[7] = row
    with pytest.raises(ValueError, match=message):
        index.build(trained, spoilt)


@pytest.mark.parametrize("shape", [(5, 15), (5, 17), (16,)])
def test_vectors_of_another_dimension_are_refused(shape: tuple[int, ...]) -> None:
    trained = index.train("flat", 16, 5, random_vectors(0), 0)
    with pytest.raises(ValueError, match=r"the index holds dimension 16"):
        index.build(trained, np.ones(shape, dtype=np.float32))


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, kind: index.ConcreteKind) -> None:
    vectors = clustered_vectors(800)
    for name in ("a", "b"):
        index.save(built(kind, vectors, seed=3)[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_seed_moves_the_centroids(tmp_path: Path) -> None:
    vectors = clustered_vectors(800)
    for name, seed in (("a", 3), ("b", 4)):
        index.save(built("ivf", vectors, seed=seed)[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("num_segments", [1, 3])
def test_approximate_search_finds_nine_of_ten_neighbours(kind: index.ConcreteKind, num_segments: int) -> None:
    vectors = clustered_vectors(5000)
    queries = unit(vectors[::100] + 0.05 * np.random.default_rng(2).normal(size=(50, 32)))
    scores, ordinals = index.VectorIndex(built(kind, vectors, num_segments)).search(queries, 10)
    expected = brute_force(vectors, queries, 10)[1]
    found = [len(set(row) & set(exact)) for row, exact in zip(ordinals.tolist(), expected.tolist(), strict=True)]
    assert np.mean(found) / 10 > 0.9
    # Whatever is found carries its true cosine.
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, vectors[ordinals]), atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_saved_index_answers_as_before(tmp_path: Path, kind: index.ConcreteKind) -> None:
    vectors = clustered_vectors(800)
    (structure,) = built(kind, vectors)
    index.save(structure, tmp_path / "x.faiss")
    before = index.VectorIndex([structure]).search(vectors[:5], 10)
    after = index.VectorIndex([index.load(tmp_path / "x.faiss")]).search(vectors[:5], 10)
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(before[0], after[0])


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kind: index.ConcreteKind) -> None:
    path = tmp_path / "x.faiss"
    index.save(built(kind, clustered_vectors(200))[0], path)
    sound = path.read_bytes()
    for size in (0, 3, 20, 45, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:size])
        with pytest.raises(ValueError, match=r"x\.faiss: is not a readable FAISS index"):
            index.load(path)


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.faiss").write_bytes(b"hello, world" * 100)
    with pytest.raises(ValueError, match="is not a readable FAISS index"):
        index.load(tmp_path / "x.faiss")


# Where FAISS writes what: fourcc (4 bytes), dimension (4), number of vectors (8), ..., then at 37 the number of 4-byte codes.
NUM_VECTORS, NUM_CODES = 8, 37


@pytest.mark.parametrize("claim", [2**33, 2**40, 2**62])
@pytest.mark.parametrize("fields", [(NUM_VECTORS,), (NUM_CODES,), (NUM_VECTORS, NUM_CODES)])
def test_a_header_that_claims_more_than_the_file_holds_is_refused_without_allocating_it(
    tmp_path: Path, claim: int, fields: tuple[int, ...]
) -> None:
    path = tmp_path / "x.faiss"
    index.save(built("flat", random_vectors(100))[0], path)
    content = bytearray(path.read_bytes())
    assert struct.unpack_from("<Q", content, NUM_VECTORS) == (100,)
    assert struct.unpack_from("<Q", content, NUM_CODES) == (1600,)
    for field in fields:
        struct.pack_into("<Q", content, field, claim if field == NUM_VECTORS else claim * 16 % 2**64)
    assert_refused_at_once(path, bytes(content))


@pytest.mark.parametrize("claim", [10**7, 2**40])
def test_a_claim_of_endless_inverted_lists_is_refused_without_allocating_them(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "x.faiss"
    index.save(built("ivf", clustered_vectors(200))[0], path)
    content = bytearray(path.read_bytes())
    lists = content.index(b"ilar") + 4
    assert struct.unpack_from("<Q", content, lists) == (index.num_lists(200),)
    struct.pack_into("<Q", content, lists, claim)
    assert_refused_at_once(path, bytes(content))


def assert_refused_at_once(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match="is not a readable FAISS index"):
        index.load(path)
    assert time.monotonic() - started < 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100  # MiB


@pytest.mark.parametrize(
    ("kind", "num_vectors", "expected"),
    [
        ("auto", 0, "flat"),
        ("auto", 100_000, "flat"),
        ("auto", 100_001, "ivf"),
        ("flat", 10**7, "flat"),
        ("ivf", 1, "ivf"),
        ("hnsw", 1, "hnsw"),
    ],
)
def test_the_structure_follows_the_number_of_vectors_unless_it_is_named(
    kind: Any, num_vectors: int, expected: str
) -> None:
    assert index.choose_kind(kind, num_vectors) == expected


def test_a_training_sample_has_enough_vectors_for_every_list() -> None:
    # FAISS warns below 39 vectors per list.
    for num_vectors in (1, 38, 39, 1000, 20_000, 10**6):
        lists = index.num_lists(num_vectors)
        assert 1 <= lists <= 4 * num_vectors**0.5
        sample = index.training_sample_size("ivf", num_vectors)
        assert sample <= num_vectors
        assert sample >= min(39 * lists, num_vectors)
    assert index.training_sample_size("flat", 10**6) == index.training_sample_size("hnsw", 10**6) == 0
