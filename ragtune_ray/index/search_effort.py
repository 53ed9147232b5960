"""Finds how much of an approximate index a search must look at to reach a recall.

The queries are vectors of the index that are not in the training sample; each is removed from its own results. Vectors of
real questions differ from those of passages, so this measures the approximation, not the quality of retrieval.

Each part of the index is measured alone (`measure_part`): which candidates a search nominates for each query, and with
how little effort. These measurements are small and can be merged, so `choose_effort` knows what a search of the whole
index would find with any effort, but opens no part of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragtune_ray.index import IndexDataError, faiss_index, vectors
from ragtune_ray.index.measuring import neighbors, nominations, timings

CUTOFF = neighbors.CUTOFF
"""The k of the recall@k that is calibrated."""
NUM_QUERIES = 500
GROWTH = 1.17
"""Each effort that is tried is larger than the one before by this factor."""
LEAST_GRAPH = 16
MOST_GRAPH = 4096
RESCORED = (4, 16, 64)
"""Candidates to re-score per hit that are tried."""
SATURATED = 0.002
"""If doubling the lists gains less recall than this, the codes lose neighbours, so more candidates are re-scored."""
ENOUGH_IN_PART = 0.995
"""Recall within a part from which more candidates to re-score are not measured."""
NEVER = 255
"""In `PartEfforts.first`: no candidate."""


@dataclass(frozen=True, slots=True)
class MeasuredEffort:
    """A search effort and what was measured with it.

    Attributes:
        effort: the search effort.
        recall: mean recall@CUTOFF over the held-out queries.
        milliseconds_per_query: mean on one thread, over all parts.
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


@dataclass(frozen=True, slots=True)
class PartEfforts:
    """What searches of one part, or of several merged parts, find for the held-out queries.

    A search with more effort finds all that one with less finds, so a candidate needs only the effort that first
    nominates it; how many better ones then crowd it out follows from their scores.

    Attributes:
        kind: kind of structure.
        num_vectors: in the parts.
        efforts: (num_efforts,) numbers of lists or of candidates in a graph walk, ascending.
        nearest: (num_queries, CUTOFF + 1) exact scores of the nearest vectors, best first; -inf if there are fewer.
        found: (num_queries, any width) scores by which the structure nominates candidates, best first.
        exact: of the same shape, their exact scores; inf for the query itself, which takes a place but is no hit.
        first: of the same shape, uint8, the number of the first effort that nominates them; `num_efforts` if only a
            search of every vector does.
        seconds: (num_efforts,) per query on one thread.
        overhead: (2,) seconds that do not grow with the number of parts: to compare a query with centroids, and to
            re-score a candidate.
    """

    kind: faiss_index.ConcreteKind
    num_vectors: int
    efforts: np.ndarray
    nearest: np.ndarray
    found: np.ndarray
    exact: np.ndarray
    first: np.ndarray
    seconds: np.ndarray
    overhead: np.ndarray

    def save(self, path: Path) -> None:
        """Write the measurements to a local file."""
        with path.open("wb") as file:
            np.savez_compressed(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: Path) -> PartEfforts:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            values = {field.name: arrays[field.name] for field in dataclasses.fields(cls)}
        return cls(**values | {"kind": str(values["kind"]), "num_vectors": int(values["num_vectors"])})

    def recalls(self, number: int, rescored: int) -> np.ndarray:
        """Return the share of nearest neighbours that a search finds per query with the effort of this number."""
        present = self.first <= number
        # A search that finds too few vectors is repeated in all of them.
        short = present.sum(axis=1) < min(CUTOFF + 1, self.num_vectors)
        present[short] = self.first[short] != NEVER
        kept = present & (np.cumsum(present, axis=1) <= _num_nominated(self.kind, rescored))
        expected = self.nearest[:, 1:]
        num_expected = np.isfinite(expected).sum(axis=1)
        least = np.where(np.isfinite(expected), expected, np.inf).min(axis=1)
        hits = (kept & np.isfinite(self.exact) & (self.exact >= least[:, None] - nominations.TOLERANCE)).sum(axis=1)
        shares: np.ndarray = np.where(num_expected > 0, np.minimum(1, hits / np.maximum(1, num_expected)), 1.0)
        return shares

    def milliseconds(self, number: int, rescored: int) -> float:
        """Return the mean time per query with the effort of this number, on one thread."""
        num_rescored = _num_nominated(self.kind, rescored) if faiss_index.is_quantized(self.kind) else 0
        return 1000 * float(self.seconds[number] + self.overhead[0] + self.overhead[1] * num_rescored)


def measure_part(part: vectors.Part, queries: np.ndarray, own: np.ndarray) -> PartEfforts:
    """Measure what searches of one part find, on one thread.

    Args:
        part: of a quantized one, `exact` is read once as a whole.
        queries: (num_queries, dimension) unit vectors, the same for all parts of an index.
        own: (num_queries,) positions of the queries in this part; -1 if they are in another part.
    """
    kind = faiss_index.kind_of(part.structure)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    with faiss_index.one_thread():
        efforts = _efforts(kind, part.structure)
        empty = _empty(part, queries, efforts)
        if kind in faiss_index.EXACT_KINDS or not part.structure.ntotal or not len(queries):
            return empty
        asked = neighbors.ask(part, queries, own)
        blocks: list[PartEfforts] = []
        level = 0
        for start in range(0, len(queries), vectors.QUERIES_AT_ONCE):
            block = asked.rows(slice(start, start + vectors.QUERIES_AT_ONCE))
            measured = _measure_block(part, block, empty, RESCORED[level])
            while (
                faiss_index.is_quantized(kind)
                and level + 1 < len(RESCORED)
                and measured.recalls(len(efforts), RESCORED[level]).mean() < ENOUGH_IN_PART
            ):
                level += 1
                measured = _measure_block(part, block, empty, RESCORED[level])
            blocks.append(measured)
    found, exact, first = (_stacked([getattr(block, name) for block in blocks]) for name in ("found", "exact", "first"))
    return dataclasses.replace(empty, nearest=asked.nearest, found=found, exact=exact, first=first)


def choose_effort(parts: Iterable[PartEfforts], target_recall: float) -> MeasuredEffort:
    """Choose the least effort whose recall@CUTOFF in all parts, minus its standard error, reaches the target.

    Args:
        parts: measurements of all parts, in the order of the parts; read one at a time.
        target_recall: 0 to 1; if no effort reaches it, the largest effort is chosen.

    Raises:
        IndexDataError: the parts' structures or queries differ.
    """
    whole = None
    for part in parts:
        whole = part if whole is None else _merged(whole, part)
    if whole is None or not len(whole.nearest) or whole.kind in faiss_index.EXACT_KINDS:
        num_queries = 0 if whole is None else len(whole.nearest)
        milliseconds = whole.milliseconds(0, RESCORED[0]) if whole and num_queries else 0.0
        return MeasuredEffort(vectors.SearchEffort(), 1.0, milliseconds, num_queries)
    levels = RESCORED if faiss_index.is_quantized(whole.kind) else RESCORED[:1]
    number, rescored = len(whole.efforts) - 1, levels[-1]
    for tried in levels:
        reached = _least_number(whole, tried, target_recall, is_last=tried == levels[-1])
        if reached is not None:
            number, rescored = reached, tried
            break
    field = "graph" if whole.kind == "hnsw" else "lists"
    effort = dataclasses.replace(
        vectors.SearchEffort(lists=1, graph=LEAST_GRAPH, rescored=rescored), **{field: int(whole.efforts[number])}
    )
    recall = float(whole.recalls(number, rescored).mean())
    return MeasuredEffort(effort, recall, whole.milliseconds(number, rescored), len(whole.nearest))


def _least_number(whole: PartEfforts, rescored: int, target_recall: float, *, is_last: bool) -> int | None:
    """Return the number of the least effort that reaches the target; None if re-scoring more candidates would gain more."""
    means: list[float] = []
    for number, effort in enumerate(whole.efforts):
        recalls = whole.recalls(number, rescored)
        # The means of five in six other samples of queries exceed the mean minus its standard error.
        if recalls.mean() - recalls.std() / math.sqrt(len(recalls)) >= target_recall:
            return number
        means.append(float(recalls.mean()))
        half = int(np.searchsorted(whole.efforts, effort / 2, side="right")) - 1
        if not is_last and half >= 0 and means[number] - means[half] < SATURATED:
            return None
    return None


def _num_nominated(kind: faiss_index.ConcreteKind, rescored: int) -> int:
    """Return how many candidates of a whole index can become hits."""
    if not faiss_index.is_quantized(kind):
        return CUTOFF + 1
    return vectors.SearchEffort(rescored=rescored).num_candidates(CUTOFF + 1)


def _efforts(kind: faiss_index.ConcreteKind, structure: Any) -> np.ndarray:
    if kind in faiss_index.EXACT_KINDS:
        return np.array([1])
    # A walk keeps as many candidates as it must return, so lower numbers make no difference.
    shortest_walk = CUTOFF + 1 + vectors.TIED_VECTORS
    first, most = (round(shortest_walk * GROWTH), MOST_GRAPH) if kind == "hnsw" else (1, structure.nlist)
    efforts = [first]
    while efforts[-1] < most:
        efforts.append(min(most, max(efforts[-1] + 1, round(efforts[-1] * GROWTH))))
    return np.array([LEAST_GRAPH, *efforts] if kind == "hnsw" else efforts)


def _empty(part: vectors.Part, queries: np.ndarray, efforts: np.ndarray) -> PartEfforts:
    """Return the measurements of a part in which nothing is found."""
    none = np.empty((len(queries), 0), dtype=np.float32)
    seconds, overhead = timings.seconds_per_query(part, queries[: timings.TIMED_QUERIES], efforts)
    return PartEfforts(
        faiss_index.kind_of(part.structure),
        part.structure.ntotal,
        efforts,
        np.full((len(queries), CUTOFF + 1), -np.inf, dtype=np.float32),
        none,
        none,
        none.astype(np.uint8),
        seconds,
        overhead,
    )


def _measure_block(part: vectors.Part, asked: neighbors.Asked, empty: PartEfforts, rescored: int) -> PartEfforts:
    """Measure some of the queries."""
    most = _num_nominated(empty.kind, rescored)
    nominate = nominations.in_graph if empty.kind == "hnsw" else nominations.in_lists
    steps = list(nominate(part, asked, empty.efforts, min(most, empty.num_vectors)))
    found = np.concatenate([scores for _, scores, _ in steps], axis=1)
    places = np.concatenate([places for _, _, places in steps], axis=1)
    first = np.concatenate([np.full(places.shape, number, dtype=np.uint8) for number, _, places in steps], axis=1)
    first[places < 0] = NEVER
    found[places < 0] = -np.inf
    order = np.lexsort((places, -found), axis=1)
    first, found, places = _pruned(most, *(np.take_along_axis(each, order, axis=1) for each in (first, found, places)))
    exact = found.copy()
    if part.exact is not None:
        exact = vectors.VectorIndex([part]).scores_of(asked.queries, np.where(first == NEVER, -1, places))
    exact[(places == asked.own[:, None]) & (places >= 0)] = np.inf
    return dataclasses.replace(empty, nearest=asked.nearest, found=found, exact=exact, first=first)


def _pruned(most: int, first: np.ndarray, found: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Drop candidates that no effort nominates among the `most` best; returns the others of `first`, `found`, `others`."""
    kept = np.zeros(first.shape, dtype=bool)
    for number in np.unique(first[first != NEVER]):
        kept |= (first == number) & (np.cumsum(first <= number, axis=1) <= most)
    width = int(kept.sum(axis=1).max(initial=0))
    order = np.argsort(~kept, axis=1, kind="stable")[:, :width]
    arrays = (np.where(kept, first, NEVER).astype(np.uint8), np.where(kept, found, -np.inf).astype(np.float32), *others)
    return tuple(np.take_along_axis(each, order, axis=1) for each in arrays)


def _merged(left: PartEfforts, right: PartEfforts) -> PartEfforts:
    """Merge measurements of consecutive parts."""
    for name in ("kind", "efforts"):
        if not np.array_equal(getattr(left, name), getattr(right, name)):
            raise IndexDataError(
                f"parts of one index were measured with {name} {getattr(left, name)} and {getattr(right, name)};"
                " they must share a trained structure: build the index again"
            )
    if len(left.nearest) != len(right.nearest):
        raise IndexDataError(
            f"parts of one index were measured with {len(left.nearest)} and {len(right.nearest)} queries; measure all"
            " with the same"
        )
    first, found, exact = (
        np.concatenate([getattr(left, name), getattr(right, name)], axis=1) for name in ("first", "found", "exact")
    )
    # Equal scores stay in the order of parts, as in a search.
    order = np.argsort(-found, axis=1, kind="stable")
    first, found, exact = _pruned(
        _num_nominated(left.kind, RESCORED[-1]),
        *(np.take_along_axis(each, order, axis=1) for each in (first, found, exact)),
    )
    return PartEfforts(
        left.kind,
        left.num_vectors + right.num_vectors,
        left.efforts,
        -np.sort(-np.concatenate([left.nearest, right.nearest], axis=1), axis=1)[:, : CUTOFF + 1],
        found,
        exact,
        first,
        left.seconds + right.seconds,
        np.maximum(left.overhead, right.overhead),
    )


def _stacked(blocks: list[np.ndarray]) -> np.ndarray:
    """Stack rows of different widths; missing candidates are at the end."""
    width = max(block.shape[1] for block in blocks)
    missing = NEVER if blocks[0].dtype == np.uint8 else -np.inf
    return np.concatenate(
        [np.pad(block, ((0, 0), (0, width - block.shape[1])), constant_values=missing) for block in blocks]
    )
