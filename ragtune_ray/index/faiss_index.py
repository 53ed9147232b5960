"""Chooses, trains, builds, saves and loads FAISS structures of unit vectors, float32 (num_vectors, dimension).

The metric is the inner product, so scores are cosines in [-1, 1]; distances never leave this module and `vectors`, which
searches. Equal vectors, kind and seed produce equal bytes: one thread trains and fills each structure in one `add`, and
parallelism comes from building several at once.

| kind | what is searched | exact scores from |
|---|---|---|
| `flat` | every vector | the structure |
| `ivf` | the inverted lists nearest to the query (Sivic and Zisserman 2003) | the structure |
| `ivf_sq` | the same, with 8-bit codes per dimension | `vectors.npy` |
| `ivf_pq` | the same, with product-quantized codes (Jegou et al. 2011) | `vectors.npy` |
| `hnsw` | a navigable small-world graph (Malkov and Yashunin 2018) | the structure |
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ragtune_ray import config
from ragtune_ray.index import IndexDataError

ConcreteKind = Literal["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"]

FLAT_MAX_NUMBERS = 100_000 * 384
"""Vectors times dimension up to which exact search takes milliseconds, so that an approximation only loses recall."""
EXACT_KINDS: tuple[ConcreteKind, ...] = ("flat",)
HNSW_NEIGHBORS = 32
HNSW_CONSTRUCTION_EFFORT = 200
TRAINING_VECTORS_PER_LIST = 32
TRAINING_ITERATIONS = 8
PLAIN_KMEANS_LISTS = 256
"""For more centroids, k-means runs in two levels, which takes a fraction of the time for the same recall."""
TOP_LEVEL_SAMPLE = 256
"""Training vectors per cluster of the upper level of k-means."""
PQ_DIMENSIONS = 4
"""Dimensions that one 8-bit code of a product quantizer covers."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Size of one vector of a kind."""

    memory_bytes: float
    """Bytes that searches read, which should be in memory."""
    disk_bytes: float
    """Bytes stored, including the vector for exact re-scoring."""


def choose_kind(kind: config.IndexKind, num_vectors: int, dimension: int, memory_bytes: int) -> ConcreteKind:
    """Return the kind of structure to build for a whole index of `num_vectors`.

    `auto` is exact search while that takes milliseconds, then inverted lists of 8-bit codes or, if these exceed
    `memory_bytes`, of product-quantized codes. Both are re-scored exactly.

    >>> [choose_kind("auto", n, 384, 2**30) for n in (1_000, 1_000_000, 10_000_000)]
    ['flat', 'ivf_sq', 'ivf_pq']
    """
    if kind != "auto":
        return kind
    if num_vectors * dimension <= FLAT_MAX_NUMBERS:
        return "flat"
    fits = num_vectors * footprint("ivf_sq", dimension).memory_bytes <= memory_bytes
    return "ivf_sq" if fits else "ivf_pq"


def footprint(kind: ConcreteKind, dimension: int) -> Footprint:
    """Return the bytes per vector, without centroids.

    >>> footprint("ivf_sq", 384)
    Footprint(memory_bytes=392, disk_bytes=1928)
    """
    exact = 4 * dimension
    match kind:
        case "flat":
            return Footprint(exact, exact)
        case "ivf":
            return Footprint(exact + 8, exact + 8)
        case "ivf_sq":
            return Footprint(dimension + 8, dimension + 8 + exact)
        case "ivf_pq":
            codes = _num_pq_codes(dimension) + 8
            return Footprint(codes, codes + exact)
        case "hnsw":
            # Twice HNSW_NEIGHBORS links on the lowest level, a few on the others, and offsets.
            graph = 4 * HNSW_NEIGHBORS * 2 * (1 + 1 / HNSW_NEIGHBORS) + 16
            return Footprint(exact + graph, exact + graph)


def is_quantized(kind: ConcreteKind) -> bool:
    """Return whether a segment of this kind also stores exact vectors, for re-scoring."""
    return kind in {"ivf_sq", "ivf_pq"}


def num_lists(num_vectors: int) -> int:
    """Return the number of inverted lists for a whole index: 4 times the square root, as FAISS's guidelines advise.

    >>> num_lists(1_000_000)
    4000
    """
    return max(1, min(round(4 * math.sqrt(num_vectors)), num_vectors // 39 or 1))


def training_sample_size(kind: ConcreteKind, num_vectors: int) -> int:
    """Return how many vectors `train` needs; 0 if the structure needs no training."""
    if kind in {"flat", "hnsw"}:
        return 0
    # A product quantizer also learns 256 centroids for each code.
    fewest = 256 * 39 if kind == "ivf_pq" else 0
    return min(num_vectors, max(fewest, TRAINING_VECTORS_PER_LIST * num_lists(num_vectors)))


def train(kind: ConcreteKind, dimension: int, num_vectors: int, sample: np.ndarray, seed: int) -> Any:
    """Train the empty FAISS structure from which every segment is built.

    Args:
        kind: the kind of structure.
        dimension: of a vector.
        num_vectors: number of vectors in the whole index.
        sample: (training_sample_size, dimension) unit vectors; empty if no training is needed.
        seed: of k-means.
    """
    import faiss

    if kind == "flat":
        return faiss.IndexFlatIP(dimension)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBORS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_CONSTRUCTION_EFFORT
        return graph
    sample = _checked(sample, dimension)
    with one_thread():
        quantizer = faiss.IndexFlatIP(dimension)
        quantizer.add(_centroids(sample, min(num_lists(num_vectors), len(sample)), seed))
        inverted = _inverted(kind, quantizer, dimension, max(2, len(sample)))
        # A product quantizer cannot be trained on one vector, but on the same vector twice.
        inverted.train(np.repeat(sample, 2, axis=0) if len(sample) == 1 else sample)
    return inverted


def _inverted(kind: ConcreteKind, quantizer: Any, dimension: int, num_samples: int) -> Any:
    import faiss

    metric, lists = faiss.METRIC_INNER_PRODUCT, quantizer.ntotal
    index: Any
    match kind:
        case "ivf_sq":
            # Codes of vectors instead of residuals, with one range for all dimensions, have the same recall in two
            # thirds of the time, because integers are compared.
            eight_bits = faiss.ScalarQuantizer.QT_8bit_uniform
            index = faiss.IndexIVFScalarQuantizer(quantizer, dimension, lists, eight_bits, metric, False)
        case "ivf_pq":
            bits = min(8, max(1, int(math.log2(num_samples))))
            index = faiss.IndexIVFPQ(quantizer, dimension, lists, _num_pq_codes(dimension), bits, metric)
            # With residuals, FAISS would allocate a table that inner products do not use and that exceeds `load`'s limits.
            index.by_residual = False
        case _:
            index = faiss.IndexIVFFlat(quantizer, dimension, lists, metric)
    # From now on the structure owns its centroids, in C++ too.
    quantizer.this.disown()
    index.own_fields = True
    return index


def _num_pq_codes(dimension: int) -> int:
    """Return the largest number of codes that divides the dimension into `PQ_DIMENSIONS` or more each."""
    return max(codes for codes in range(1, max(2, dimension // PQ_DIMENSIONS + 1)) if dimension % codes == 0)


def _centroids(sample: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the centroids of spherical k-means, (count, dimension); if many, of clusters within clusters."""
    if count <= PLAIN_KMEANS_LISTS:
        return _kmeans(sample, count, seed)
    import faiss

    num_clusters = math.isqrt(count)
    step = max(1, len(sample) // (num_clusters * TOP_LEVEL_SAMPLE))
    clusters = faiss.IndexFlatIP(sample.shape[1])
    clusters.add(_kmeans(np.ascontiguousarray(sample[::step]), num_clusters, seed))
    cluster = clusters.search(sample, 1)[1][:, 0]
    # Each cluster gets centroids in proportion to its vectors; rounding the cumulative sum preserves the total.
    shares = np.diff(np.round(np.cumsum(np.bincount(cluster, minlength=num_clusters)) * count / len(sample)), prepend=0)
    order = np.argsort(cluster, kind="stable")
    members = np.split(order, np.searchsorted(cluster[order], np.arange(1, num_clusters)))
    return np.concatenate(
        [_kmeans(sample[rows], int(share), seed) for rows, share in zip(members, shares, strict=True) if share]
    )


def _kmeans(sample: np.ndarray, count: int, seed: int) -> np.ndarray:
    import faiss

    if len(sample) <= count:
        return sample
    clustering = faiss.Clustering(sample.shape[1], count)
    clustering.niter, clustering.seed, clustering.spherical = TRAINING_ITERATIONS, seed, True
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(sample)
    clustering.train(np.ascontiguousarray(sample), faiss.IndexFlatIP(sample.shape[1]))
    centroids: np.ndarray = faiss.vector_to_array(clustering.centroids).reshape(count, -1)
    return centroids


def build(trained: Any, vectors: np.ndarray) -> Any:
    """Return a copy of a trained, empty structure that contains the vectors.

    Raises:
        IndexDataError: a vector's dimension is wrong, or it is not finite or not of length 1.
    """
    import faiss

    structure = faiss.clone_index(trained)
    with one_thread():
        structure.add(_checked(vectors, structure.d))
    return structure


def save(structure: Any, path: Path) -> None:
    """Write a FAISS structure to a local file."""
    import faiss

    faiss.write_index(structure, str(path))


def load(path: Path, *, mmap: bool = False) -> Any:
    """Read a FAISS structure from a local file whose checksum was verified; `mmap` maps vectors, codes and graphs.

    Raises:
        IndexDataError: the file is not a FAISS file, or its header claims more than the file contains.
    """
    import faiss

    # A forged header could request any amount of memory. Nothing may be larger than the file, and each item of a loop
    # (an inverted list) takes at least eight bytes in it.
    faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
    faiss.set_deserialization_loop_limit(max(1, path.stat().st_size // 8))
    try:
        structure = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
    except RuntimeError as error:
        raise IndexDataError(f"{path}: is not a readable FAISS index ({str(error).splitlines()[0]})") from error
    if isinstance(structure, faiss.IndexIVF):
        # FAISS does not read mapped lists here, so it does not notice that the file is too short for them.
        claimed = structure.ntotal * (structure.code_size + 8) + 4 * structure.nlist * structure.d
        if claimed > path.stat().st_size:
            size = f"{claimed:,} bytes, the file has {path.stat().st_size:,}"
            raise IndexDataError(f"{path}: is not a readable FAISS index (its lists need {size})")
    return structure


def kind_of(structure: Any) -> ConcreteKind:
    """Return the kind of a FAISS structure."""
    import faiss

    kinds: list[tuple[type, ConcreteKind]] = [
        (faiss.IndexIVFScalarQuantizer, "ivf_sq"),
        (faiss.IndexIVFPQ, "ivf_pq"),
        (faiss.IndexIVFFlat, "ivf"),
        (faiss.IndexHNSWFlat, "hnsw"),
        (faiss.IndexFlat, "flat"),
    ]
    for kind, name in kinds:
        if isinstance(structure, kind):
            return name
    names = [name for _, name in kinds]
    raise IndexDataError(f"a FAISS structure of type {type(structure).__name__} is not one of {names}")


def stored_vectors(structure: Any, exact: np.ndarray | None) -> np.ndarray:
    """Return a segment's exact vectors, (num_vectors, dimension) float32: `exact` (vectors.npy), else the structure's."""
    if exact is not None:
        return np.asarray(exact)
    vectors: np.ndarray = structure.reconstruct_n(0, structure.ntotal)
    return vectors


def _checked(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Check vectors that FAISS accepts but never finds (NaN) or refuses with a bare assertion (wrong dimension)."""
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise IndexDataError(f"vectors have shape {vectors.shape}, the index has dimension {dimension}")
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if len(wrong):
        raise IndexDataError(f"vector {wrong[0]} has length {norms[wrong[0]]}; it must have length 1")
    return np.ascontiguousarray(vectors, dtype=np.float32)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run FAISS on one thread in this block, so that sums have one order and bytes do not depend on the machine."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
