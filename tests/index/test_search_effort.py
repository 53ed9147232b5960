"""Search effort: the recall that approximate search reaches."""

import numpy as np
import pytest

from ragtune_ray.index import faiss_index, search_effort, vectors

NUM_VECTORS, DIMENSION = 3000, 16


def clustered() -> np.ndarray:
    source = np.random.default_rng(5)
    centres = source.normal(size=(60, DIMENSION))
    rows = centres[source.integers(0, 60, NUM_VECTORS)] + 0.6 * source.normal(size=(NUM_VECTORS, DIMENSION))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


STORED = clustered()


def searched(kind: faiss_index.ConcreteKind, stored: np.ndarray = STORED, num_segments: int = 3) -> vectors.VectorIndex:
    trained = faiss_index.train(kind, DIMENSION, len(stored), stored, 0)
    exact = faiss_index.is_quantized(kind)
    return vectors.VectorIndex(
        [
            vectors.Part(faiss_index.build(trained, part), part if exact else None, "t")
            for part in np.array_split(stored, num_segments)
        ]
    )


def held_out(ordinals: np.ndarray, stored: np.ndarray = STORED) -> search_effort.HeldOut:
    queries = stored[ordinals]
    return search_effort.HeldOut(queries, ordinals, search_effort.exact_neighbors(queries, stored))


def draws(*counts: int) -> list[np.ndarray]:
    """Draw disjoint ordinals of queries."""
    return np.split(np.random.default_rng(1).permutation(NUM_VECTORS)[: sum(counts)], np.cumsum(counts)[:-1])


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
    found = search_effort.find_effort(whole, held_out(first), target)
    assert found.recall >= target
    assert (found.num_queries, found.milliseconds_per_query > 0) == (400, True)
    _, ordinals = vectors.VectorIndex(whole.parts, found.effort).search(STORED[fresh], search_effort.CUTOFF + 1)
    assert naive_recalls(ordinals, fresh).mean() >= target - 0.03


@pytest.mark.parametrize("kind", ["ivf", "ivf_sq", "ivf_pq"])
def test_a_higher_target_never_takes_fewer_lists(kind: faiss_index.ConcreteKind) -> None:
    whole, asked = searched(kind), held_out(draws(300)[0])
    targets = [0.3, 0.6, 0.8, 0.9, 0.97, 0.99]
    found = [search_effort.find_effort(whole, asked, target) for target in targets]
    lists = [calibrated.effort.lists for calibrated in found]
    assert lists == sorted(lists)
    assert lists[0] < lists[-1] <= faiss_index.num_lists(NUM_VECTORS)
    assert [calibrated.recall >= target for calibrated, target in zip(found, targets, strict=True)] == [True] * 6


def test_a_higher_target_never_takes_a_smaller_part_of_the_graph() -> None:
    whole, asked = searched("hnsw"), held_out(draws(300)[0])
    graph = [search_effort.find_effort(whole, asked, target).effort.graph for target in (0.5, 0.9, 0.99)]
    assert graph == sorted(graph)


def test_one_list_fewer_misses_the_target() -> None:
    whole, asked = searched("ivf"), held_out(draws(300)[0])
    effort = search_effort.find_effort(whole, asked, 0.9).effort
    assert effort.lists > 1
    fewer = search_effort._recalls(whole, asked, vectors.SearchEffort(effort.lists - 1, effort.graph, effort.rescored))
    assert search_effort._lower_bound(fewer) < 0.9


def test_an_unreachable_target_searches_everything() -> None:
    found = search_effort.find_effort(searched("ivf_pq"), held_out(draws(100)[0]), 1.01)
    assert found.effort.lists == faiss_index.num_lists(NUM_VECTORS)
    assert found.effort.rescored == search_effort.MOST_RESCORED
    assert found.recall <= 1


def test_exact_search_has_recall_one() -> None:
    found = search_effort.find_effort(searched("flat"), held_out(draws(100)[0]), 0.95)
    assert found.recall == 1
    assert found.facts() == {
        "recall@10": 1.0,
        "milliseconds_per_query": round(found.milliseconds_per_query, 3),
        "num_queries": 100,
    }


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_pq"])
def test_nothing_is_measured_without_queries(kind: faiss_index.ConcreteKind) -> None:
    found = search_effort.find_effort(searched(kind), held_out(np.empty(0, dtype=np.int64)), 0.95)
    assert (found.num_queries, found.milliseconds_per_query) == (0, 0)


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"])
@pytest.mark.parametrize("lists", [1, 4])
def test_recall_is_the_share_of_the_set_of_nearest_neighbours(kind: faiss_index.ConcreteKind, lists: int) -> None:
    (ordinals,) = draws(200)
    whole, effort = searched(kind), vectors.SearchEffort(lists, graph=8, rescored=2)
    recalls = search_effort._recalls(whole, held_out(ordinals), effort)
    _, found = vectors.VectorIndex(whole.parts, effort).search(STORED[ordinals], search_effort.CUTOFF + 1)
    np.testing.assert_allclose(recalls, naive_recalls(found, ordinals), atol=1e-9)


def test_a_query_that_finds_only_itself_has_found_nothing() -> None:
    asked = search_effort.HeldOut(
        STORED[:1], np.array([0]), search_effort.exact_neighbors(STORED[:1], STORED)
    )  # its neighbours in the whole index
    assert search_effort._recalls(searched("flat", STORED[:1], 1), asked, vectors.SearchEffort()).tolist() == [0]
    asked = search_effort.HeldOut(STORED[:1], np.array([0]), search_effort.exact_neighbors(STORED[:1], STORED[:3]))
    assert search_effort._recalls(searched("flat", STORED[:2], 1), asked, vectors.SearchEffort()).tolist() == [0.5]


def test_duplicates_of_a_query_count_as_neighbours() -> None:
    stored = STORED[[0, 1, 2] + [0] * 20]
    ordinals = np.array([0, 5, 22])
    recalls = search_effort._recalls(searched("flat", stored, 2), held_out(ordinals, stored), vectors.SearchEffort())
    assert recalls.tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 11])
def test_an_index_of_few_vectors_is_calibrated_too(count: int) -> None:
    stored = STORED[:count]
    for kind in ("flat", "ivf", "ivf_sq", "ivf_pq", "hnsw"):
        found = search_effort.find_effort(searched(kind, stored, 1), held_out(np.arange(count), stored), 0.95)
        assert found.recall == 1


def test_too_few_vectors_leave_neighbours_empty() -> None:
    scores = search_effort.exact_neighbors(STORED[:2], STORED[:3])
    assert scores.shape == (2, search_effort.CUTOFF + 1)
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)
    assert np.isneginf(scores[:, 3:]).all()
    assert np.isneginf(search_effort.exact_neighbors(STORED[:2], STORED[:0])).all()
