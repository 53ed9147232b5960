"""FAISS: choose, train, add, search, save, load.

In: unit vectors, float32, of shape (num_vectors, dimension). Out: a FAISS structure on disk, and for queries the scores
and ordinals of their nearest vectors. The metric is the inner product, so scores are cosines in [-1, 1] and larger is
better; FAISS distances never leave this module. It knows nothing of texts, models or Ray.

The same vectors, kind and seed give the same bytes: each structure is trained and filled by one thread in one `add`, and
parallelism comes from building several at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ragtune_ray import config

__all__ = ["ConcreteKind", "VectorIndex", "build", "choose_kind", "load", "save", "train", "training_sample_size"]

ConcreteKind = Literal["flat", "ivf", "hnsw"]

FLAT_MAX_VECTORS = 100_000
"""Up to here exact search answers in milliseconds, and an approximation would only lose recall."""
HNSW_NEIGHBORS = 32
HNSW_CONSTRUCTION_EFFORT = 200
HNSW_SEARCH_EFFORT = 128
TRAINING_VECTORS_PER_LIST = 64
PROBED_SHARE = 1 / 16
TIED_VECTORS = 64
"""Equal scores at the end of a result list that are still put in the order of their ordinals."""


def choose_kind(kind: config.IndexKind, num_vectors: int) -> ConcreteKind:
    """The structure to build: `auto` is exact up to 100,000 vectors and inverted lists beyond.

    >>> choose_kind("auto", 1_000), choose_kind("auto", 1_000_000), choose_kind("hnsw", 10)
    ('flat', 'ivf', 'hnsw')
    """
    if kind != "auto":
        return kind
    return "flat" if num_vectors <= FLAT_MAX_VECTORS else "ivf"


def num_lists(num_vectors: int) -> int:
    """Inverted lists for so many vectors in the whole index: 4 times the square root, as FAISS's guidelines advise.

    >>> num_lists(1_000_000)
    4000
    """
    return max(1, min(round(4 * math.sqrt(num_vectors)), num_vectors // 39 or 1))


def training_sample_size(kind: ConcreteKind, num_vectors: int) -> int:
    """How many vectors `train` wants to see; 0 when the structure needs no training."""
    return min(num_vectors, TRAINING_VECTORS_PER_LIST * num_lists(num_vectors)) if kind == "ivf" else 0


def train(kind: ConcreteKind, dimension: int, num_vectors: int, sample: np.ndarray, seed: int) -> Any:
    """An empty FAISS index, its centroids trained once on a sample, from which every segment is built.

    Args:
        kind: the structure.
        dimension: length of a vector.
        num_vectors: vectors of the whole index, over all segments.
        sample: (training_sample_size, dimension) unit vectors; empty where none are needed.
        seed: of k-means.
    """
    import faiss

    if kind == "flat":
        return faiss.IndexFlatIP(dimension)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBORS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_CONSTRUCTION_EFFORT
        graph.hnsw.efSearch = HNSW_SEARCH_EFFORT
        return graph
    lists = num_lists(num_vectors)
    inverted: Any = faiss.index_factory(dimension, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    inverted.nprobe = max(1, math.ceil(lists * PROBED_SHARE))
    inverted.cp.seed = seed
    inverted.cp.max_points_per_centroid = TRAINING_VECTORS_PER_LIST
    with _one_thread():
        inverted.train(_checked(sample, dimension))
    return inverted


def build(trained: Any, vectors: np.ndarray) -> Any:
    """A filled copy of a trained, empty structure.

    Raises:
        ValueError: the vectors have another dimension, are not finite or not of length 1.
    """
    import faiss

    structure = faiss.clone_index(trained)
    with _one_thread():
        structure.add(_checked(vectors, structure.d))
    return structure


def save(structure: Any, path: Path) -> None:
    """Write a FAISS structure to a local file."""
    import faiss

    faiss.write_index(structure, str(path))


def load(path: Path) -> Any:
    """Read a FAISS structure whose file has been checked by `storage`.

    Raises:
        ValueError: it is no FAISS file, or its header claims more than the file holds.
    """
    import faiss

    # A forged header could ask for any amount of memory: nothing inside may be larger than the file itself, and whatever
    # FAISS allocates one by one (inverted lists) takes eight bytes or more there.
    faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
    faiss.set_deserialization_loop_limit(max(1, path.stat().st_size // 8))
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: is not a readable FAISS index ({str(error).splitlines()[0]})") from error


class VectorIndex:
    """The vectors of all segments, searched as one; ordinals count through the segments in their order."""

    def __init__(self, structures: Sequence[Any]) -> None:
        # FAISS answers a search of nothing with a bare assertion, and an empty segment has nothing to find.
        self._structures = [structure for structure in structures if structure.ntotal]
        self._first = np.cumsum([0, *(structure.ntotal for structure in self._structures)])

    @property
    def num_vectors(self) -> int:
        """Vectors in all segments."""
        return int(self._first[-1])

    def search(self, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest vectors of each query, best first; equal scores in the order of the ordinals.

        Args:
            queries: (num_queries, dimension) unit vectors, float32.
            top_k: how many; places that cannot be filled hold score -inf and ordinal -1.

        Returns:
            scores (num_queries, top_k) float32 and ordinals (num_queries, top_k) int64.
        """
        scores = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
        ordinals = np.full((len(queries), top_k), -1, dtype=np.int64)
        if not len(queries) or not self.num_vectors:
            return scores, ordinals
        # FAISS keeps any of several vectors with the same score at the end of its list: look a little deeper, so that the
        # cut among equals (copies of a text, say) is made by ordinal, and the same however the vectors are segmented.
        depth = top_k + TIED_VECTORS
        found = [structure.search(queries, min(depth, structure.ntotal)) for structure in self._structures]
        all_scores = np.concatenate([part for part, _ in found], axis=1)
        all_ordinals = np.concatenate(
            [np.where(ids >= 0, ids + first, -1) for (_, ids), first in zip(found, self._first, strict=False)], axis=1
        )
        all_scores[all_ordinals < 0] = -np.inf
        order = np.lexsort((all_ordinals, -all_scores), axis=1)[:, :top_k]
        width = order.shape[1]
        scores[:, :width] = np.take_along_axis(all_scores, order, axis=1)
        ordinals[:, :width] = np.take_along_axis(all_ordinals, order, axis=1)
        return scores, ordinals


def _checked(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """FAISS takes NaN without a word and then never finds the row, and answers a wrong dimension with a bare assertion."""
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise ValueError(f"vectors have shape {vectors.shape}, the index holds dimension {dimension}")
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if len(wrong):
        raise ValueError(f"vector {wrong[0]} has length {norms[wrong[0]]}, every vector must have length 1")
    return np.ascontiguousarray(vectors, dtype=np.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
