"""Searches the vectors of all segments as one index.

Scores are cosines; ordinals number the vectors through the segments in their order. Deleted and filtered vectors are
skipped before ranking, so a result is complete whenever enough vectors are allowed. Quantized segments only nominate
candidates, whose scores are then computed from the stored vectors.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

Allowed = Sequence[np.ndarray | None]
"""Per segment, which vectors may be hits, bool (num_vectors,); None allows all of them."""

TIED_VECTORS = 64
"""Equal scores at the end of a result that are still ordered by ordinal."""
QUERIES_AT_ONCE = 64
"""Queries re-scored together; limits the memory for their candidates' vectors."""
GRAPH_SHARE = 0.2
"""If less than this share of a graph is allowed, all its vectors are searched: a walk would end with too few hits."""


@dataclass(frozen=True, slots=True)
class Part:
    """The vectors of one segment."""

    structure: Any
    """FAISS structure from `faiss_index.build`."""
    exact: np.ndarray | None
    """(num_vectors, dimension) float32, memory-mapped, to re-score quantized codes; None if the structure is exact."""
    trained_id: str
    """Parts with the same id share centroids, with which a query is compared only once; "": not shared."""


@dataclass(frozen=True, slots=True)
class SearchEffort:
    """How much of an approximate index a search looks at; `search_effort.choose_effort` chooses it."""

    lists: int = 1
    """Inverted lists to search, FAISS's `nprobe`."""
    graph: int = 128
    """Candidates to keep during a graph walk, FAISS's `efSearch`."""
    rescored: int = 4
    """Candidates to re-score per requested hit, if codes are quantized."""

    def num_candidates(self, top_k: int) -> int:
        """Return how many candidates of all quantized parts together are re-scored for `top_k` hits."""
        return max(top_k + TIED_VECTORS, self.rescored * top_k)


class VectorIndex:
    """The vectors of all segments.

    Args:
        parts: in the order in which passages are numbered.
        effort: for approximate parts; None uses the defaults.
    """

    def __init__(self, parts: Sequence[Part], effort: SearchEffort | None = None) -> None:
        self.parts = tuple(parts)
        self.effort = effort or SearchEffort()
        self._first = np.cumsum([0, *(part.structure.ntotal for part in parts)])

    @property
    def num_vectors(self) -> int:
        """Number of vectors in all segments, including deleted ones."""
        return int(self._first[-1])

    def search(self, queries: np.ndarray, top_k: int, allowed: Allowed | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest allowed vectors of each query, best first; equal scores are ordered by ordinal.

        Args:
            queries: (num_queries, dimension) unit vectors, float32.
            top_k: hits per query.
            allowed: None allows all vectors.

        Returns:
            Scores (float32) and ordinals (int64), each (num_queries, top_k); missing hits are -inf and -1.
        """
        if not len(queries) or not self.num_vectors:
            return top([np.empty((len(queries), 0))], [np.empty((len(queries), 0))], top_k)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        masks = list(allowed) if allowed is not None else [None] * len(self.parts)
        counts = [
            part.structure.ntotal if mask is None else int(np.count_nonzero(mask))
            for part, mask in zip(self.parts, masks, strict=True)
        ]
        scores, ordinals = self._search(queries, top_k, masks, counts, every_list=False)
        short = np.flatnonzero((ordinals >= 0).sum(axis=1) < min(top_k, sum(counts)))
        if len(short):
            # The searched lists or neighbourhoods contain too few allowed vectors: search everything.
            scores[short], ordinals[short] = self._search(queries[short], top_k, masks, counts, every_list=True)
        return scores, ordinals

    def take(self, ordinals: np.ndarray) -> np.ndarray:
        """Return the exact vectors with these ordinals, (num_ordinals, dimension) float32."""
        dimension = self.parts[0].structure.d if self.parts else 0
        found = np.empty((len(ordinals), dimension), dtype=np.float32)
        which = np.searchsorted(self._first, ordinals, side="right") - 1
        for number in np.unique(which):
            chosen = which == number
            found[chosen] = _stored(self.parts[number], ordinals[chosen] - self._first[number])
        return found

    def _search(
        self,
        queries: np.ndarray,
        top_k: int,
        masks: Sequence[np.ndarray | None],
        counts: list[int],
        *,
        every_list: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        # Among equal scores at the end of its list, FAISS keeps arbitrary ones. With a slightly deeper search, equal
        # vectors (of duplicate texts) are cut off by ordinal, independently of the segments.
        depth = top_k + TIED_VECTORS
        batch = QueryBatch(queries, self.effort, sum(counts) / self.num_vectors, every_list=every_list)
        num_candidates = self.effort.num_candidates(top_k)

        def search_part(number: int) -> tuple[np.ndarray, np.ndarray]:
            part = self.parts[number]
            most = min(depth if part.exact is None else num_candidates, part.structure.ntotal)
            scores, found = batch.search(part, most, masks[number])
            return scores, np.where(found >= 0, found + self._first[number], -1)

        # FAISS fails with an assertion if nothing is allowed, so such parts are left out.
        numbers = [number for number, count in enumerate(counts) if count]
        found = list(_search_parts(search_part, numbers, len(queries)))
        exact = [hits for number, hits in zip(numbers, found, strict=True) if self.parts[number].exact is None]
        coded = [hits for number, hits in zip(numbers, found, strict=True) if self.parts[number].exact is not None]
        if coded:
            nominated = _merged(coded, num_candidates)[1]
            exact.append((self.scores_of(queries, nominated), nominated))
        if not exact:
            return top([np.empty((len(queries), 0))], [np.empty((len(queries), 0))], top_k)
        return _merged(exact, top_k)

    def scores_of(self, queries: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Return inner products of queries and stored vectors for (num_queries, depth) ordinals; -inf for -1."""
        scores = np.full(ordinals.shape, -np.inf, dtype=np.float32)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            rows, columns = np.nonzero(ordinals[start : start + QUERIES_AT_ONCE] >= 0)
            if not len(rows):
                continue
            rows += start
            stored = self.take(ordinals[rows, columns])
            scores[rows, columns] = np.einsum("nd,nd->n", stored, queries[rows])
        return scores


def _stored(part: Part, places: np.ndarray) -> np.ndarray:
    """Return the vectors at these positions of a part, float32."""
    if part.exact is not None:
        return np.asarray(part.exact[places])
    if isinstance(part.structure, _faiss().IndexIVF):
        part.structure.make_direct_map()  # maps vectors to their positions in lists; made once
    return np.asarray(part.structure.reconstruct_batch(places))


class QueryBatch:
    """Searches one batch of queries in each part; compares it only once with centroids that parts share.

    Args:
        queries: (num_queries, dimension) unit vectors, contiguous, float32.
        effort: for approximate parts.
        share: of the vectors that are allowed; more lists are searched if it is small.
        every_list: search every vector of every part.
    """

    def __init__(self, queries: np.ndarray, effort: SearchEffort, share: float, *, every_list: bool) -> None:
        self._queries, self._effort, self._share, self._every_list = queries, effort, share, every_list
        self._nearest: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._comparing = threading.Lock()

    def search(self, part: Part, depth: int, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and positions within the part, (num_queries, depth)."""
        faiss = _faiss()
        selector, bits = _selector(mask)
        if isinstance(part.structure, faiss.IndexIVF):
            found = self._search_lists(part, depth, selector)
        elif isinstance(part.structure, faiss.IndexHNSW):
            found = self._search_graph(part, depth, selector, mask)
        else:
            found = part.structure.search(self._queries, depth, params=faiss.SearchParameters(sel=selector))
        del bits  # the selector points to it, so it must live until here
        scores, places = found
        scores[places < 0] = -np.inf
        return scores, places

    def _search_lists(self, part: Part, depth: int, selector: Any) -> tuple[np.ndarray, np.ndarray]:
        lists = part.structure.nlist
        # With a filter, search more lists, so that as many allowed vectors are compared as without one.
        probed = lists if self._every_list else min(lists, round(self._effort.lists / max(self._share, 1e-9)))
        key = part.trained_id or str(id(part))
        with self._comparing:
            if key not in self._nearest:
                self._nearest[key] = part.structure.quantizer.search(self._queries, probed)
        return search_lists(part.structure, self._queries, self._nearest[key], depth, selector)

    def _search_graph(
        self, part: Part, depth: int, selector: Any, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        faiss = _faiss()
        if self._every_list or (mask is not None and np.count_nonzero(mask) < GRAPH_SHARE * len(mask)):
            every_vector = faiss.downcast_index(part.structure.storage)
            scores, places = every_vector.search(self._queries, depth, params=faiss.SearchParameters(sel=selector))
        else:
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(self._effort.graph, depth))
            scores, places = part.structure.search(self._queries, depth, params=parameters)
        return scores, places


def search_lists(
    structure: Any, queries: np.ndarray, nearest: tuple[np.ndarray, np.ndarray], depth: int, selector: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Search the given inverted lists of each query; returns scores and positions, (num_queries, depth).

    Args:
        structure: a FAISS structure with inverted lists.
        queries: (num_queries, dimension), contiguous, float32.
        nearest: how near the lists' centroids are, and the lists' numbers, each (num_queries, num_lists), contiguous.
        depth: hits per query; missing ones have position -1.
        selector: of the vectors that are allowed.
    """
    faiss = _faiss()
    nearness, lists = nearest
    scores = np.empty((len(queries), depth), dtype=np.float32)
    places = np.empty((len(queries), depth), dtype=np.int64)
    # For some kinds the Python wrapper takes no selector, so call the C++ method.
    structure.search_preassigned_c(
        len(queries),
        faiss.swig_ptr(queries),
        depth,
        faiss.swig_ptr(lists),
        faiss.swig_ptr(nearness),
        faiss.swig_ptr(scores),
        faiss.swig_ptr(places),
        False,
        faiss.SearchParametersIVF(sel=selector, nprobe=lists.shape[1]),
    )
    return scores, places


def _search_parts(
    search_part: Callable[[int], tuple[np.ndarray, np.ndarray]], numbers: Sequence[int], num_queries: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Return the parts' results in order. FAISS parallelises over queries; for a single query, parts run in parallel."""
    threads = _faiss().omp_get_max_threads()
    if num_queries > 1 or threads == 1 or len(numbers) < 2:
        return map(search_part, numbers)
    return _pool(threads).map(search_part, numbers)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ragtune-search")


# A forked child has none of its parent's threads and must not wait for them.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _merged(found: Sequence[tuple[np.ndarray, np.ndarray]], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    return top([scores for scores, _ in found], [ordinals for _, ordinals in found], top_k)


def _faiss() -> Any:
    """Import FAISS late, and without its stubs, which lack the arguments of search parameters."""
    import faiss

    return faiss


def _selector(mask: np.ndarray | None) -> tuple[Any, np.ndarray | None]:
    """Return a FAISS selector for a mask, and the bits it points to; both are None without a mask."""
    if mask is None:
        return None, None
    faiss = _faiss()
    bits = np.packbits(mask, bitorder="little")
    return faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(bits)), bits


def top(scores: Sequence[np.ndarray], ordinals: Sequence[np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge several lists of hits of the same queries.

    >>> scores, ordinals = top([np.array([[0.5, 0.1]]), np.array([[0.4]])], [np.array([[3, 1]]), np.array([[7]])], 2)
    >>> ordinals.tolist(), [round(float(score), 1) for score in scores[0]]
    ([[3, 7]], [0.5, 0.4])

    Args:
        scores: (num_queries, any depth) each, larger is better.
        ordinals: of the same shapes; -1 for missing hits.
        top_k: hits to keep per query.

    Returns:
        Scores (float32) and ordinals (int64), each (num_queries, top_k), best first, equal scores by ordinal; missing
        hits are -inf and -1.
    """
    all_scores = np.concatenate(scores, axis=1).astype(np.float32, copy=False)
    all_ordinals = np.concatenate(ordinals, axis=1).astype(np.int64, copy=False)
    all_scores = np.where(all_ordinals < 0, np.float32(-np.inf), all_scores)
    order = np.lexsort((all_ordinals, -all_scores), axis=1)[:, :top_k]
    best_scores = np.full((len(all_scores), top_k), -np.inf, dtype=np.float32)
    best = np.full((len(all_scores), top_k), -1, dtype=np.int64)
    best_scores[:, : order.shape[1]] = np.take_along_axis(all_scores, order, axis=1)
    best[:, : order.shape[1]] = np.take_along_axis(all_ordinals, order, axis=1)
    return best_scores, best
