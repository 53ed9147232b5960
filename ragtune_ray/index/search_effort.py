"""Finds how much of an approximate index a search must look at to reach a recall.

The queries are vectors of the index that are not in the training sample; each is removed from its own results. Vectors of
real questions differ from those of passages, so this measures the approximation, not the quality of retrieval.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np

from ragtune_ray.index import faiss_index, vectors

CUTOFF = 10
"""The k of the recall@k that is calibrated."""
NUM_QUERIES = 500
TIMED_QUERIES = 100
SATURATED = 0.002
"""If doubling the lists gains less recall than this, the codes lose neighbours, so more candidates are re-scored."""
MOST_RESCORED = 64
MOST_GRAPH = 4096


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Queries with known neighbours.

    Attributes:
        queries: (num_queries, dimension) unit vectors.
        ordinals: (num_queries,) of the queries in the index.
        scores: (num_queries, CUTOFF + 1) of the nearest vectors, including the query itself, best first.
    """

    queries: np.ndarray
    ordinals: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class MeasuredEffort:
    """A search effort and what was measured with it.

    Attributes:
        effort: the search effort.
        recall: mean recall@CUTOFF over the held-out queries.
        milliseconds_per_query: median, one query at a time on one thread.
        num_queries: held-out queries.
    """

    effort: vectors.SearchEffort
    recall: float
    milliseconds_per_query: float
    num_queries: int

    def facts(self) -> dict[str, float]:
        """JSON values for the version's manifest."""
        return {
            f"recall@{CUTOFF}": round(self.recall, 4),
            "milliseconds_per_query": round(self.milliseconds_per_query, 3),
            "num_queries": self.num_queries,
        }


def exact_neighbors(queries: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Return the scores of the nearest stored vectors, (num_queries, CUTOFF + 1), best first; -inf if there are fewer."""
    import faiss

    scores = np.full((len(queries), CUTOFF + 1), -np.inf, dtype=np.float32)
    depth = min(CUTOFF + 1, len(stored))
    if depth and len(queries):
        with faiss_index.one_thread():
            found, _ = faiss.knn(queries, stored, depth, metric=faiss.METRIC_INNER_PRODUCT)
        scores[:, :depth] = found
    return scores


def find_effort(searched: vectors.VectorIndex, held_out: HeldOut, target_recall: float) -> MeasuredEffort:
    """Find the least effort whose recall@CUTOFF, minus its standard error, reaches the target.

    Args:
        searched: the whole index.
        held_out: queries with their exact neighbours.
        target_recall: 0 to 1; if no effort reaches it, the largest effort is returned.
    """
    kinds = {faiss_index.kind_of(part.structure) for part in searched.parts}
    if kinds <= set(faiss_index.EXACT_KINDS) or not len(held_out.queries):
        return _measure(searched, held_out, vectors.SearchEffort(), _recalls(searched, held_out, searched.effort))
    lists = max((part.structure.nlist for part in searched.parts if hasattr(part.structure, "nlist")), default=0)
    field, most = ("lists", lists) if lists else ("graph", MOST_GRAPH)
    effort = vectors.SearchEffort(lists=1, graph=16)
    before, failed = 0.0, 0
    while True:
        recalls = _recalls(searched, held_out, effort)
        if _lower_bound(recalls) >= target_recall:
            break
        failed = getattr(effort, field)
        saturated = recalls.mean() - before < SATURATED or failed >= most
        before = float(recalls.mean())
        if saturated and effort.rescored < MOST_RESCORED and kinds & {"ivf_sq", "ivf_pq"}:
            effort = dataclasses.replace(effort, rescored=effort.rescored * 4)
            before = 0.0
        elif failed >= most:
            return _measure(searched, held_out, effort, recalls)
        else:
            effort = dataclasses.replace(effort, **{field: min(most, failed * 2)})
    return _bisect(searched, held_out, effort, field, failed, recalls, target_recall)


def _bisect(
    searched: vectors.VectorIndex,
    held_out: HeldOut,
    effort: vectors.SearchEffort,
    field: str,
    failed: int,
    recalls: np.ndarray,
    target_recall: float,
) -> MeasuredEffort:
    """Bisect between an effort that failed and one that reached the target, to within 1/30."""
    while getattr(effort, field) - failed > max(1, failed // 30):
        middle = (failed + getattr(effort, field)) // 2
        tried = dataclasses.replace(effort, **{field: middle})
        found = _recalls(searched, held_out, tried)
        if _lower_bound(found) >= target_recall:
            effort, recalls = tried, found
        else:
            failed = middle
    return _measure(searched, held_out, effort, recalls)


def _lower_bound(recalls: np.ndarray) -> float:
    """Return the mean minus its standard error; the means of five in six other samples of queries exceed it."""
    return float(recalls.mean() - recalls.std() / math.sqrt(len(recalls)))


def _recalls(searched: vectors.VectorIndex, held_out: HeldOut, effort: vectors.SearchEffort) -> np.ndarray:
    """Return the share of nearest neighbours found per query, compared by score because neighbours may be equal."""
    scores, ordinals = vectors.VectorIndex(searched.parts, effort).search(held_out.queries, CUTOFF + 1)
    own = ordinals == held_out.ordinals[:, None]
    # A query that did not find itself loses its last hit instead.
    own[~own.any(axis=1), -1] = True
    others = scores[~own].reshape(len(scores), CUTOFF)
    expected = held_out.scores[:, 1:]
    num_expected = np.isfinite(expected).sum(axis=1)
    least = np.where(np.isfinite(expected), expected, np.inf).min(axis=1)
    hits = (others >= least[:, None] - 1e-5) & np.isfinite(others)
    shares = np.where(num_expected > 0, hits.sum(axis=1) / np.maximum(1, num_expected), 1.0)
    recalls: np.ndarray = np.minimum(shares, 1.0)
    return recalls


def _measure(
    searched: vectors.VectorIndex, held_out: HeldOut, effort: vectors.SearchEffort, recalls: np.ndarray
) -> MeasuredEffort:
    timed = vectors.VectorIndex(searched.parts, effort)
    seconds = []
    with faiss_index.one_thread():
        for query in held_out.queries[:TIMED_QUERIES]:
            started = time.perf_counter()
            timed.search(query[None], CUTOFF)
            seconds.append(time.perf_counter() - started)
    milliseconds = float(np.median(seconds)) * 1000 if seconds else 0.0
    recall = float(recalls.mean()) if len(recalls) else 1.0
    return MeasuredEffort(effort, recall, milliseconds, len(held_out.queries))
