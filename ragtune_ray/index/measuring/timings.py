"""Times searches of a part."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ragtune_ray.index import vectors
from ragtune_ray.index.measuring.neighbors import CUTOFF

TIMED_QUERIES = 10


def seconds_per_query(part: vectors.Part, queries: np.ndarray, efforts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Time every fourth effort on one thread.

    Returns:
        `seconds` and `overhead` of `search_effort.PartEfforts`.
    """
    structure = part.structure
    if not len(queries) or not structure.ntotal:
        return np.zeros(len(efforts)), np.zeros(2)
    depth = min(CUTOFF + 1 + vectors.TIED_VECTORS, structure.ntotal)
    numbers = np.unique([*range(0, len(efforts), 4), len(efforts) - 1])
    comparing, nearest = 0.0, None
    if hasattr(structure, "nlist"):
        comparing = _seconds_of(lambda: structure.quantizer.search(queries, 1))
        nearest = structure.quantizer.search(queries, structure.nlist)

    def search(effort: int) -> float:
        if nearest is not None:
            lists = (np.ascontiguousarray(nearest[0][:, :effort]), np.ascontiguousarray(nearest[1][:, :effort]))
            return _seconds_of(lambda: vectors.search_lists(structure, queries, lists, depth))
        batch = vectors.QueryBatch(queries, vectors.SearchEffort(graph=effort), 1.0, every_list=False)
        return _seconds_of(lambda: batch.search(part, depth, None))

    seconds = np.interp(efforts, efforts[numbers], [search(effort) for effort in efforts[numbers].tolist()])
    rescoring = 0.0
    if part.exact is not None:
        places = np.random.default_rng(0).integers(0, structure.ntotal, (len(queries), depth))
        rescoring = _seconds_of(lambda: vectors.VectorIndex([part]).scores_of(queries, places)) / depth
    return seconds / len(queries), np.array([comparing, rescoring]) / len(queries)


def _seconds_of(work: Callable[[], object]) -> float:
    """Return seconds of this thread, since other work on the same cores should not count."""
    started = time.thread_time()
    work()
    return time.thread_time() - started
