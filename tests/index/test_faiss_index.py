"""FAISS structures: training, equal bytes, refused files and vectors."""

import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray.index import faiss_index
from tests.support.vectors import clustered_vectors, random_vectors

KINDS: list[faiss_index.ConcreteKind] = ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"]


def built(kind: faiss_index.ConcreteKind, vectors: np.ndarray, num_segments: int = 1, seed: int = 0) -> list[Any]:
    trained = faiss_index.train(kind, vectors.shape[1], len(vectors), vectors, seed)
    return [faiss_index.build(trained, part) for part in np.array_split(vectors, num_segments)]


@pytest.mark.parametrize("kind", KINDS)
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
    kind: faiss_index.ConcreteKind, row: np.ndarray, message: str
) -> None:
    vectors = random_vectors(100)
    trained = faiss_index.train(kind, 16, 100, vectors, 0)
    spoilt = vectors.copy()
    spoilt[7] = row
    with pytest.raises(ValueError, match=message):
        faiss_index.build(trained, spoilt)


@pytest.mark.parametrize("shape", [(5, 15), (5, 17), (16,)])
def test_vectors_of_another_dimension_are_refused(shape: tuple[int, ...]) -> None:
    trained = faiss_index.train("flat", 16, 5, random_vectors(0), 0)
    with pytest.raises(ValueError, match=r"the index has dimension 16"):
        faiss_index.build(trained, np.ones(shape, dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_produces_equal_bytes(tmp_path: Path, kind: faiss_index.ConcreteKind) -> None:
    vectors = clustered_vectors(800)
    for name in ("a", "b"):
        faiss_index.save(built(kind, vectors, seed=3)[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_seed_produces_other_centroids(tmp_path: Path) -> None:
    vectors = clustered_vectors(800)
    for name, seed in (("a", 3), ("b", 4)):
        faiss_index.save(built("ivf", vectors, seed=seed)[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kind: faiss_index.ConcreteKind, mmap: bool) -> None:
    path = tmp_path / "x.faiss"
    faiss_index.save(built(kind, clustered_vectors(200))[0], path)
    sound = path.read_bytes()
    # Only the size of mapped lists is checked; the manifest's sha256 detects other damage.
    almost_all = [] if mmap and kind.startswith("ivf") else [len(sound) - 1]
    for size in (0, 3, 20, 45, len(sound) // 2, *almost_all):
        path.write_bytes(sound[:size])
        with pytest.raises(ValueError, match=r"x\.faiss: is not a readable FAISS index"):
            faiss_index.load(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_that_is_not_an_index_is_refused(tmp_path: Path, mmap: bool) -> None:
    (tmp_path / "x.faiss").write_bytes(b"hello, world" * 100)
    with pytest.raises(ValueError, match="is not a readable FAISS index"):
        faiss_index.load(tmp_path / "x.faiss", mmap=mmap)


# FAISS writes: fourcc (4 bytes), dimension (4), number of vectors (8), ..., then at 37 the number of 4-byte codes.
NUM_VECTORS, NUM_CODES = 8, 37


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("claim", [2**33, 2**40, 2**62])
@pytest.mark.parametrize("fields", [(NUM_VECTORS,), (NUM_CODES,), (NUM_VECTORS, NUM_CODES)])
def test_a_header_that_claims_too_much_is_refused_without_allocating(
    tmp_path: Path, claim: int, fields: tuple[int, ...], mmap: bool
) -> None:
    path = tmp_path / "x.faiss"
    faiss_index.save(built("flat", random_vectors(100))[0], path)
    content = bytearray(path.read_bytes())
    assert struct.unpack_from("<Q", content, NUM_VECTORS) == (100,)
    assert struct.unpack_from("<Q", content, NUM_CODES) == (1600,)
    for field in fields:
        struct.pack_into("<Q", content, field, claim if field == NUM_VECTORS else claim * 16 % 2**64)
    assert_refused_at_once(path, bytes(content), mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", ["ivf", "ivf_sq", "ivf_pq"])
@pytest.mark.parametrize("claim", [10**7, 2**40])
def test_a_claim_of_endless_lists_is_refused_without_allocating(
    tmp_path: Path, claim: int, kind: faiss_index.ConcreteKind, mmap: bool
) -> None:
    path = tmp_path / "x.faiss"
    faiss_index.save(built(kind, clustered_vectors(200))[0], path)
    content = bytearray(path.read_bytes())
    lists = content.index(b"ilar") + 4
    assert struct.unpack_from("<Q", content, lists) == (faiss_index.num_lists(200),)
    struct.pack_into("<Q", content, lists, claim)
    assert_refused_at_once(path, bytes(content), mmap=mmap)


def assert_refused_at_once(path: Path, content: bytes, *, mmap: bool) -> None:
    path.write_bytes(content)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match="is not a readable FAISS index"):
        faiss_index.load(path, mmap=mmap)
    assert time.monotonic() - started < 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100  # MiB


@pytest.mark.parametrize(
    ("kind", "num_vectors", "expected"),
    [
        ("auto", 0, "flat"),
        ("auto", 100_000, "flat"),
        ("auto", 100_001, "ivf_sq"),
        ("auto", 2_000_000, "ivf_sq"),
        ("auto", 3_000_000, "ivf_pq"),
        ("flat", 10**7, "flat"),
        ("ivf", 1, "ivf"),
        ("ivf_sq", 1, "ivf_sq"),
        ("ivf_pq", 1, "ivf_pq"),
        ("hnsw", 1, "hnsw"),
    ],
)
def test_auto_chooses_a_kind_by_vectors_and_memory(kind: Any, num_vectors: int, expected: str) -> None:
    assert faiss_index.choose_kind(kind, num_vectors, 384, 2**30) == expected


def test_a_training_sample_has_enough_vectors_for_every_list() -> None:
    for num_vectors in (1, 38, 39, 1000, 20_000, 10**6):
        lists = faiss_index.num_lists(num_vectors)
        assert 1 <= lists <= max(1, 4 * num_vectors**0.5)
        for kind in ("ivf", "ivf_sq", "ivf_pq"):
            sample = faiss_index.training_sample_size(kind, num_vectors)
            assert sample <= num_vectors
            assert sample >= min(faiss_index.TRAINING_VECTORS_PER_LIST * lists, num_vectors)
        # A product quantiser learns 256 centroids, and FAISS warns below 39 vectors for each.
        assert faiss_index.training_sample_size("ivf_pq", num_vectors) >= min(256 * 39, num_vectors)
    assert faiss_index.training_sample_size("flat", 10**6) == faiss_index.training_sample_size("hnsw", 10**6) == 0


@pytest.mark.parametrize("num_vectors", [1, 2, 60, 2000, 12_000])  # the last one is trained in two levels
def test_there_is_one_unit_centroid_per_list(num_vectors: int) -> None:
    trained = faiss_index.train("ivf", 8, num_vectors, random_vectors(num_vectors, 8), 0)
    assert trained.nlist == trained.quantizer.ntotal == faiss_index.num_lists(num_vectors)
    centroids = trained.quantizer.reconstruct_n(0, trained.nlist)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("dimension", [1, 3, 7, 16, 30])
def test_every_kind_works_with_any_dimension_and_few_vectors(dimension: int) -> None:
    for kind in KINDS:
        for count in (1, 2, 5):
            (structure,) = built(kind, random_vectors(count, dimension))
            assert (structure.ntotal, structure.d) == (count, dimension)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_vectors_are_returned_exactly_and_in_order(
    tmp_path: Path, kind: faiss_index.ConcreteKind, mmap: bool
) -> None:
    vectors = clustered_vectors(300)
    faiss_index.save(built(kind, vectors)[0], tmp_path / "x.faiss")
    structure = faiss_index.load(tmp_path / "x.faiss", mmap=mmap)
    beside = vectors if faiss_index.is_quantized(kind) else None
    np.testing.assert_array_equal(faiss_index.stored_vectors(structure, beside), vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_structure_is_recognised(kind: faiss_index.ConcreteKind) -> None:
    assert faiss_index.kind_of(built(kind, random_vectors(100))[0]) == kind
    assert faiss_index.is_quantized(kind) == (kind in {"ivf_sq", "ivf_pq"})


@pytest.mark.parametrize("kind", KINDS)
def test_building_does_not_change_the_trained_structure(kind: faiss_index.ConcreteKind) -> None:
    vectors = random_vectors(100)
    trained = faiss_index.train(kind, 16, 100, vectors, 0)
    assert faiss_index.build(trained, vectors).ntotal == 100
    assert trained.ntotal == 0
