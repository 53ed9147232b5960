"""Finds the exact neighbours of queries in a part, and the lists that contain them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragtune_ray.index import faiss_index, vectors

CUTOFF = 10
"""The k of the recall@k that is calibrated."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Queries and their exact neighbours in a part."""

    queries: np.ndarray
    """(num_queries, dimension) unit vectors, contiguous, float32."""
    own: np.ndarray
    """(num_queries,) their positions in the part; -1 for those of other parts."""
    nearest: np.ndarray
    """(num_queries, CUTOFF + 1) scores, best first; -inf for missing ones."""
    places: np.ndarray
    """(num_queries, CUTOFF + 1) positions; -1 for missing ones."""
    homes: np.ndarray
    """(num_queries, CUTOFF + 1) numbers of their lists; -1 for missing ones and without lists."""
    worst: np.ndarray
    """(num_queries,) score of the worst of them by its code; inf if vectors are not quantized."""

    def rows(self, chosen: slice) -> Asked:
        """Return some of the queries."""
        return Asked(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def exact_neighbors(queries: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and positions of the nearest stored vectors, (num_queries, CUTOFF + 1); missing ones are -inf and -1."""
    import faiss

    scores = np.full((len(queries), CUTOFF + 1), -np.inf, dtype=np.float32)
    places = np.full(scores.shape, -1, dtype=np.int64)
    depth = min(CUTOFF + 1, len(stored))
    if depth and len(queries):
        with faiss_index.one_thread():
            found = faiss.knn(queries, stored, depth, metric=faiss.METRIC_INNER_PRODUCT)
        scores[:, :depth], places[:, :depth] = found
    return scores, places


def ask(part: vectors.Part, queries: np.ndarray, own: np.ndarray) -> Asked:
    """Find the queries' neighbours in a part; of a quantized one, `exact` is read once as a whole."""
    structure = part.structure
    nearest, places = exact_neighbors(queries, faiss_index.stored_vectors(structure, part.exact))
    homes, worst = np.full(places.shape, -1), np.full(len(places), np.inf, dtype=np.float32)
    if hasattr(structure, "nlist"):
        known, within = places >= 0, np.maximum(places, 0)
        structure.make_direct_map()
        homes = np.where(known, _lists_of(structure, within), -1)
        if part.exact is not None:
            decoded = structure.reconstruct_batch(within.ravel()).reshape(*within.shape, -1)
            worst = np.where(known, np.einsum("qnd,qd->qn", decoded, queries), np.inf).min(axis=1)
        # The structure may be saved after this, without the map.
        structure.set_direct_map_type(0)
    return Asked(queries, own, nearest, places, homes, worst)


def _lists_of(structure: Any, places: np.ndarray) -> np.ndarray:
    """Return the numbers of the lists that contain vectors; the map has them in the upper half of each number."""
    import faiss

    lists: np.ndarray = faiss.vector_to_array(structure.direct_map.array)[places] >> 32
    return lists
