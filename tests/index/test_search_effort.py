"""Search effort: the recall that approximate search reaches."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray.index import IndexDataError, faiss_index, search_effort, vectors
from ragtune_ray.index.measuring import neighbors

NUM_VECTORS, DIMENSION = 3000, 16


def clustered() -> np.ndarray:
    source = np.random.default_rng(5)
    centres = source.normal(size=(60, DIMENSION))
    rows = centres[source.integers(0, 60, NUM_VECTORS)] + 0.6 * source.normal(size=(NUM_VECTORS, DIMENSION))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def scattered() -> np.ndarray:
    """Draw vectors without clusters, whose codes lose many neighbours."""
    rows = np.random.default_rng(6).normal(size=(NUM_VECTORS, 4 * DIMENSION))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


STORED, SCATTERED = clustered(), scattered()
DUPLICATES = np.concatenate([STORED[:1500], STORED[:1000], np.repeat(STORED[:20], 25, axis=0)])


@functools.cache
def trained(kind: faiss_index.ConcreteKind, count: int, dimension: int) -> Any:
    """Train on the scattered vectors if these have the dimension; few of them leave coarse codes."""
    stored = SCATTERED[:64] if dimension == SCATTERED.shape[1] else STORED[:count]
    return faiss_index.train(kind, dimension, count, stored, 0)


def searched(kind: faiss_index.ConcreteKind, stored: np.ndarray = STORED, num_segments: int = 3) -> vectors.VectorIndex:
    empty = trained(kind, *stored.shape)
    exact = faiss_index.is_quantized(kind)
    return vectors.VectorIndex(
        [
            vectors.Part(faiss_index.build(empty, part), part if exact else None, "t")
            for part in np.array_split(stored, num_segments)
        ]
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Queries, their ordinals in the index, and the scores of their nearest vectors, best first."""

    queries: np.ndarray
    ordinals: np.ndarray
    scores: np.ndarray


def held_out(ordinals: np.ndarray, stored: np.ndarray = STORED) -> HeldOut:
    queries = stored[ordinals]
    return HeldOut(queries, ordinals, neighbors.exact_neighbors(queries, stored)[0])


def find_effort(searched: vectors.VectorIndex, asked: HeldOut, target_recall: float) -> search_effort.MeasuredEffort:
    """Measure every part of an open index and choose its effort."""
    parts, first = [], 0
    for part in searched.parts:
        places = asked.ordinals - first
        own = np.where((places >= 0) & (places < part.structure.ntotal), places, -1)
        parts.append(search_effort.measure_part(part, asked.queries, own))
        first += part.structure.ntotal
    return search_effort.choose_effort(parts, target_recall)


def draws(*counts: int) -> list[np.ndarray]:
    """Draw disjoint ordinals of queries."""
    return np.split(np.random.default_rng(1).permutation(NUM_VECTORS)[: sum(counts)], np.cumsum(counts)[:-1])


def measured(whole: vectors.VectorIndex, queries: np.ndarray, ordinals: np.ndarray) -> list[search_effort.PartEfforts]:
    """Measure each part alone, as the task does that has built it."""
    parts, first = [], 0
    for part in whole.parts:
        places = ordinals - first
        inside = (places >= 0) & (places < part.structure.ntotal)
        parts.append(search_effort.measure_part(part, queries, np.where(inside, places, -1)))
        first += part.structure.ntotal
    return parts


def searched_recalls(whole: vectors.VectorIndex, asked: HeldOut, effort: vectors.SearchEffort) -> np.ndarray:
    """Search the whole index, remove each query from its hits, and compare scores with the exact neighbours."""
    scores, ordinals = vectors.VectorIndex(whole.parts, effort).search(asked.queries, search_effort.CUTOFF + 1)
    own = ordinals == asked.ordinals[:, None]
    own[~own.any(axis=1), -1] = True  # a query that did not find itself loses its last hit instead
    others = scores[~own].reshape(len(scores), search_effort.CUTOFF)
    recalls = []
    for found, nearest in zip(others, asked.scores[:, 1:], strict=True):
        expected = nearest[np.isfinite(nearest)]
        hits = int((found[np.isfinite(found)] >= expected.min(initial=np.inf) - 1e-5).sum())
        recalls.append(min(1.0, hits / len(expected)) if len(expected) else 1.0)
    return np.array(recalls)


def naive_recalls(found: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
    scores = STORED[ordinals].astype(np.float64) @ STORED.astype(np.float64).T
    scores[np.arange(len(ordinals)), ordinals] = -np.inf
    recalls = []
    for row, own, nearest in zip(found.tolist(), ordinals.tolist(), np.argsort(-scores, axis=1), strict=True):
        others = [ordinal for ordinal in row if ordinal != own][: search_effort.CUTOFF]
        wanted = set(nearest[: search_effort.CUTOFF].tolist())
        recalls.append(len(wanted & set(others)) / search_effort.CUTOFF)
    return np.array(recalls)


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq", "ivf_pq", "hnsw"])
@pytest.mark.parametrize("target", [0.8, 0.95])
def test_fresh_queries_find_what_was_calibrated(kind: faiss_index.ConcreteKind, target: float) -> None:
    first, fresh = draws(400, 400)
    whole = searched(kind)
    found = find_effort(whole, held_out(first), target)
    assert found.recall >= target
    assert (found.num_queries, found.milliseconds_per_query > 0) == (400, True)
    _, ordinals = vectors.VectorIndex(whole.parts, found.effort).search(STORED[fresh], search_effort.CUTOFF + 1)
    assert naive_recalls(ordinals, fresh).mean() >= target - 0.03


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq", "ivf_pq"])
def test_a_higher_target_never_takes_fewer_lists(kind: faiss_index.ConcreteKind) -> None:
    whole, asked = searched(kind), held_out(draws(300)[0])
    targets = [0.3, 0.6, 0.8, 0.9, 0.97, 0.99]
    found = [find_effort(whole, asked, target) for target in targets]
    lists = [(calibrated.effort.rescored, calibrated.effort.lists) for calibrated in found]
    assert lists == sorted(lists)
    assert lists[0] < lists[-1] <= (search_effort.RESCORED[-1], faiss_index.num_lists(NUM_VECTORS))
    assert [calibrated.recall >= target for calibrated, target in zip(found, targets, strict=True)] == [True] * 6


def test_a_higher_target_never_takes_a_smaller_part_of_the_graph() -> None:
    whole, asked = searched("hnsw"), held_out(draws(300)[0])
    graph = [find_effort(whole, asked, target).effort.graph for target in (0.5, 0.9, 0.99)]
    assert graph == sorted(graph)


@pytest.mark.parametrize(("kind", "target"), [("ivf", 0.9), ("ivf_sq", 0.9), ("ivf_pq", 0.8)])
def test_one_step_less_misses_the_target(kind: faiss_index.ConcreteKind, target: float) -> None:
    whole, asked = searched(kind, SCATTERED, 1), held_out(draws(300)[0], SCATTERED)
    found = find_effort(whole, asked, target)
    (part,) = measured(whole, asked.queries, asked.ordinals)
    number = part.efforts.tolist().index(found.effort.lists)
    fewer = dataclasses.replace(found.effort, lists=int(part.efforts[number - 1]))
    assert number > 0
    assert part.efforts[number] <= max(part.efforts[number - 1] + 1, 1.2 * part.efforts[number - 1])
    reached, missed = (searched_recalls(whole, asked, effort) for effort in (found.effort, fewer))
    assert reached.mean() - reached.std() / 300**0.5 >= target
    assert missed.mean() - missed.std() / 300**0.5 < target


def test_an_unreachable_target_searches_everything() -> None:
    found = find_effort(searched("ivf_pq"), held_out(draws(100)[0]), 1.01)
    assert found.effort.lists == faiss_index.num_lists(NUM_VECTORS)
    assert found.effort.rescored == search_effort.RESCORED[-1]
    assert found.recall <= 1


def test_exact_search_has_recall_one() -> None:
    found = find_effort(searched("flat"), held_out(draws(100)[0]), 0.95)
    assert found.recall == 1
    assert found.facts() == {
        "recall@10": 1.0,
        "milliseconds_per_query": round(found.milliseconds_per_query, 3),
        "num_queries": 100,
    }


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_pq"])
def test_nothing_is_measured_without_queries(kind: faiss_index.ConcreteKind) -> None:
    found = find_effort(searched(kind), held_out(np.empty(0, dtype=np.int64)), 0.95)
    assert (found.num_queries, found.milliseconds_per_query) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "stored", "num_parts"),
    [
        *((kind, "scattered", num_parts) for kind in ("ivf", "ivf_sq", "ivf_pq", "hnsw") for num_parts in (1, 3, 7)),
        *((kind, "clustered", 3) for kind in ("ivf", "ivf_sq", "ivf_pq", "hnsw")),
        # Coarser codes of different vectors are equal too, and FAISS keeps any of them.
        *((kind, "duplicates", 3) for kind in ("ivf", "ivf_sq", "hnsw")),
    ],
)
def test_merged_parts_find_what_a_search_of_all_finds(
    kind: faiss_index.ConcreteKind, stored: str, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        search_effort, "ENOUGH_IN_PART", 2
    )  # so that all numbers of candidates to re-score are measured
    rows = {"clustered": STORED, "scattered": SCATTERED, "duplicates": DUPLICATES}[stored]
    whole, asked = searched(kind, rows, num_parts), held_out(draws(100)[0], rows)
    merged = functools.reduce(search_effort._merged, measured(whole, asked.queries, asked.ordinals))
    assert merged.num_vectors == len(rows)
    levels = search_effort.RESCORED if faiss_index.is_quantized(kind) else search_effort.RESCORED[:1]
    for number in range(0, len(merged.efforts), 3):
        for rescored in levels:
            value = int(merged.efforts[number])
            expected = searched_recalls(whole, asked, vectors.SearchEffort(value, value, rescored))
            np.testing.assert_allclose(merged.recalls(number, rescored), expected, atol=1e-9)


def test_codes_lose_neighbors_until_more_candidates_are_rescored() -> None:
    whole, asked = searched("ivf_pq", SCATTERED, 1), held_out(draws(150)[0], SCATTERED)
    (part,) = measured(whole, asked.queries, asked.ordinals)
    last = len(part.efforts) - 1
    means = [part.recalls(last, rescored).mean() for rescored in search_effort.RESCORED]
    assert means[0] < 0.9 < means[1] < means[2]
    assert search_effort.choose_effort([part], 0.9).effort.rescored > search_effort.RESCORED[0]


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"])
def test_saved_measurements_choose_the_same_effort(kind: faiss_index.ConcreteKind, tmp_path: Path) -> None:
    whole, asked = searched(kind), held_out(draws(100)[0])
    parts = measured(whole, asked.queries, asked.ordinals)
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.npz")
    loaded = (search_effort.PartEfforts.load(tmp_path / f"{number}.npz") for number in range(len(parts)))
    assert search_effort.choose_effort(loaded, 0.9) == search_effort.choose_effort(parts, 0.9)


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq"])
def test_measuring_leaves_the_structure_as_it_was(kind: faiss_index.ConcreteKind, tmp_path: Path) -> None:
    (part,) = searched(kind, STORED, 1).parts
    faiss_index.save(part.structure, tmp_path / "before")
    search_effort.measure_part(part, STORED[:20], np.arange(20))
    faiss_index.save(part.structure, tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_parts_of_different_structures_or_queries_are_refused() -> None:
    asked = held_out(draws(50)[0])
    (inverted,) = measured(searched("ivf", STORED, 1), asked.queries, asked.ordinals)
    (graph,) = measured(searched("hnsw", STORED, 1), asked.queries, asked.ordinals)
    (fewer_lists,) = measured(searched("ivf", STORED[:1000], 1), asked.queries, asked.ordinals)
    (fewer_queries,) = measured(searched("ivf", STORED, 1), asked.queries[:9], asked.ordinals[:9])
    for other, named in [(graph, "kind"), (fewer_lists, "efforts"), (fewer_queries, "50 and 9 queries")]:
        with pytest.raises(IndexDataError, match=named):
            search_effort.choose_effort([inverted, other], 0.9)


def test_time_adds_up_over_parts_but_queries_meet_shared_centroids_once() -> None:
    whole, asked = searched("ivf_sq"), held_out(draws(50)[0])
    parts = [
        dataclasses.replace(part, seconds=np.full(len(part.efforts), 0.002), overhead=np.array([0.001, 0.00001]))
        for part in measured(whole, asked.queries, asked.ordinals)
    ]
    # Three parts of 2 ms, 1 ms for the centroids, and 75 candidates of 10 microseconds.
    found = search_effort.choose_effort(parts, 0.5)
    assert found.effort.rescored == 4
    assert found.milliseconds_per_query == pytest.approx(3 * 2 + 1 + 0.75)


def recalls_with_fewer(stored: np.ndarray, neighbors_in: np.ndarray) -> list[float]:
    """The first vector asks one part, while its neighbours are those in other vectors."""
    (part,) = measured(searched("ivf", stored, 1), stored[:1], np.array([0]))
    asked = dataclasses.replace(part, nearest=neighbors.exact_neighbors(stored[:1], neighbors_in)[0])
    shares: list[float] = asked.recalls(len(part.efforts) - 1, 4).tolist()
    return shares


def test_a_query_that_finds_only_itself_has_found_nothing() -> None:
    assert recalls_with_fewer(STORED[:1], STORED) == [0]
    assert recalls_with_fewer(STORED[:2], STORED[:3]) == [0.5]


def test_a_search_that_finds_too_few_is_repeated_everywhere() -> None:
    (part,) = measured(searched("ivf", STORED, 1), STORED[:1], np.array([0]))
    scores = np.linspace(1, 0.5, 11, dtype=np.float32)[None]
    exact = np.where(scores == 1, np.inf, scores)  # the best is the query itself
    # The first effort finds the query and nine others, the second all eleven; or the first finds ten of a part of ten.
    part = dataclasses.replace(part, nearest=scores, found=scores, exact=exact, num_vectors=3000)
    ten = dataclasses.replace(part, first=np.array([[0] * 10 + [1]], dtype=np.uint8))
    assert ten.recalls(0, 4).tolist() == [1]
    assert dataclasses.replace(ten, num_vectors=10).recalls(0, 4).tolist() == [0.9]


def test_duplicates_of_a_query_count_as_neighbours() -> None:
    stored = STORED[[0, 1, 2] + [0] * 20]
    ordinals = np.array([0, 5, 22])
    parts = measured(searched("ivf", stored, 2), stored[ordinals], ordinals)
    merged = search_effort._merged(*parts)
    assert merged.recalls(len(merged.efforts) - 1, 4).tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 11])
def test_an_index_of_few_vectors_is_calibrated_too(count: int) -> None:
    stored = STORED[:count]
    for kind in ("flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"):
        found = find_effort(searched(kind, stored, 1), held_out(np.arange(count), stored), 0.95)
        assert found.recall == 1


def test_too_few_vectors_leave_neighbours_empty() -> None:
    scores, _ = neighbors.exact_neighbors(STORED[:2], STORED[:3])
    assert scores.shape == (2, search_effort.CUTOFF + 1)
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    assert np.isneginf(scores[:, 3:]).all()
    assert np.isneginf(neighbors.exact_neighbors(STORED[:2], STORED[:0])[0]).all()
