"""Retrieval: modes, fusion, reranking, refusals."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config, schema
from ragtune_ray.index import snapshot
from ragtune_ray.index.retriever import (
    Candidates,
    Ranking,
    Retriever,
    fuse_ranks,
    fuse_scores,
    merge_candidates,
    open_retriever,
)
from ragtune_ray.models.encoder import HashingEncoder, load_encoder
from ragtune_ray.storage import artifacts

QUERIES = [
    "Are its two moons Phobos and Deimos?",
    "When did Apollo 11 land on the Moon?",
    "hydrogen helium",
    "月球",
    "xylophone",
]


@pytest.fixture(scope="module")
def encoder() -> HashingEncoder:
    return HashingEncoder("hashing-64")


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory,
    passages: list[schema.Passage],
    encoder: HashingEncoder,
    write_index: Callable[..., str],
) -> str:
    path = tmp_path_factory.mktemp("workspace")
    write_index(path, passages, encoder, num_segments=3)
    return str(path)


@pytest.fixture(scope="module")
def opened(workspace: str) -> snapshot.Index:
    return snapshot.open_index(workspace)


def ids(hits: Sequence[schema.Hit]) -> list[str]:
    return [hit.passage_id for hit in hits]


def test_fusion_sums_reciprocal_ranks() -> None:
    # constant 5: ranks 1, 2, 3 are worth 1/6, 1/7, 1/8.
    dense, lexical = np.array([[4, 2, 9]]), np.array([[9, 4, -1]])
    scores, ordinals = fuse_ranks([dense, lexical], 5.0, 4)
    assert ordinals.tolist() == [[4, 9, 2, -1]]
    np.testing.assert_allclose(scores[0, :3], [1 / 6 + 1 / 7, 1 / 8 + 1 / 6, 1 / 7], rtol=1e-6)
    assert np.isneginf(scores[0, 3])
    assert (scores.dtype, ordinals.dtype) == (np.float32, np.int64)


def test_fused_ties_are_ordered_by_ordinal() -> None:
    assert fuse_ranks([np.array([[8, 3]]), np.array([[3, 8]])], 5.0, 2)[1].tolist() == [[3, 8]]


def reference_fusion(lists: list[list[int]], constant: float, top_k: int) -> tuple[list[float], list[int]]:
    totals: dict[int, float] = {}
    for ranked in lists:
        for rank, ordinal in enumerate(ranked, start=1):
            totals[ordinal] = totals.get(ordinal, 0.0) + 1 / (constant + rank)
    best = sorted(totals, key=lambda ordinal: (-totals[ordinal], ordinal))[:top_k]
    missing = top_k - len(best)
    return [totals[o] for o in best] + [-np.inf] * missing, best + [-1] * missing


ranked_lists = st.lists(st.integers(0, 12), unique=True, max_size=8)


@given(
    st.lists(st.tuples(ranked_lists, ranked_lists, ranked_lists), min_size=1, max_size=4),
    st.floats(0, 60),
    st.integers(1, 30),
    st.integers(1, 3),
)
def test_fusion_equals_a_plain_loop(
    queries: list[tuple[list[int], ...]], constant: float, top_k: int, num_lists: int
) -> None:
    lists = [
        np.array([ranked[number] + [-1] * (8 - len(ranked[number])) for ranked in queries])
        for number in range(num_lists)
    ]
    scores, ordinals = fuse_ranks(lists, constant, top_k)
    for row, ranked in enumerate(queries):
        expected_scores, expected = reference_fusion(list(ranked[:num_lists]), constant, top_k)
        assert ordinals[row].tolist() == expected
        np.testing.assert_allclose(scores[row], expected_scores, rtol=1e-6)


def reference_score_fusion(
    dense: dict[int, float], lexical: dict[int, float], candidates: set[int], weight: float, top_k: int
) -> tuple[list[float], list[int]]:
    """From the cosines of all passages and the BM25 of those that share a word with the query."""
    best = max(lexical.values(), default=1.0)
    totals = {o: (1 - weight) * dense[o] + weight * lexical.get(o, 0.0) / best for o in candidates}
    order = sorted(totals, key=lambda ordinal: (-np.float32(totals[ordinal]), ordinal))[:top_k]
    missing = top_k - len(order)
    return [totals[o] for o in order] + [-np.inf] * missing, order + [-1] * missing


def test_score_fusion_weighs_the_cosine_and_the_share_of_the_best_bm25() -> None:
    # Passage 9 is in both lists, 4 and 2 only in the dense one, 5 only in the lexical one; the best BM25 is 10.
    missing = [-1, -np.inf]
    dense = Candidates(np.array([[0.8, 0.6, 0.4]]), np.array([[4, 9, 2]]), np.array([[1.0, 10.0, 0.0]]))
    lexical = Candidates(
        np.array([[10.0, 7.5, missing[1]]]), np.array([[9, 5, missing[0]]]), np.array([[0.6, 0.2, missing[1]]])
    )
    scores, ordinals = fuse_scores(dense, lexical, 0.3, 5)
    assert ordinals.tolist() == [[9, 4, 5, 2, -1]]
    np.testing.assert_allclose(scores[0, :4], [0.42 + 0.3, 0.56 + 0.03, 0.14 + 0.225, 0.28], rtol=1e-6)
    assert np.isneginf(scores[0, 4])
    assert (scores.dtype, ordinals.dtype) == (np.float32, np.int64)
    assert fuse_scores(dense, lexical, 0.0, 2)[1].tolist() == [[4, 9]], "weight 0 is the dense order"
    assert fuse_scores(dense, lexical, 1.0, 2)[1].tolist() == [[9, 5]], "weight 1 is the lexical order"


def test_score_fusion_of_a_query_without_lexical_hits_keeps_the_dense_order() -> None:
    nothing = np.array([[-np.inf, -np.inf]])
    dense = Candidates(np.array([[0.5, -0.1]]), np.array([[3, 8]]), np.array([[0.0, 0.0]]))
    scores, ordinals = fuse_scores(dense, Candidates(nothing, np.array([[-1, -1]]), nothing), 0.25, 3)
    assert ordinals.tolist() == [[3, 8, -1]]
    np.testing.assert_allclose(scores[0, :2], [0.375, -0.075], rtol=1e-6)


@pytest.mark.parametrize("candidates", [2, 4, 50])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_hybrid_scores_every_candidate_by_both_searches(
    opened: snapshot.Index, encoder: HashingEncoder, passages: list[schema.Passage], candidates: int, weight: float
) -> None:
    settings = config.Retrieval(candidates=candidates, lexical_weight=weight)
    scores, ordinals = Retriever(opened, encoder, settings).search_ordinals(QUERIES, 2)
    cosines = encoder.encode_queries(QUERIES) @ encoder.encode_passages([passage.text for passage in passages]).T
    depth = max(candidates, 2)
    near = opened.vectors.search(encoder.encode_queries(QUERIES), depth)[1]
    shared_scores, shared = opened.lexical.search(QUERIES, len(passages))
    for row in range(len(QUERIES)):
        lexical = {int(o): float(s) for o, s in zip(shared[row], shared_scores[row], strict=True) if o >= 0}
        chosen = {int(o) for o in [*near[row], *shared[row][:depth]] if o >= 0}
        dense = dict(enumerate(cosines[row].tolist()))
        expected_scores, expected = reference_score_fusion(dense, lexical, chosen, weight, 2)
        assert ordinals[row].tolist() == expected
        np.testing.assert_allclose(scores[row], expected_scores, rtol=1e-5, atol=1e-6)


def test_a_query_in_a_script_that_the_encoder_does_not_know_leans_on_bm25() -> None:
    settings = config.Retrieval(lexical_weight=0.25, unknown_script_weight=0.75)
    dense = Candidates(np.array([[0.8, 0.4]] * 2), np.array([[3, 5]] * 2), np.array([[0.0, 6.0]] * 2))
    lexical = Candidates(np.array([[6.0, -np.inf]] * 2), np.array([[5, -1]] * 2), np.array([[0.4, -np.inf]] * 2))
    for unknown, expected in (
        (frozenset({"CJK"}), [[5, 3], [3, 5]]),
        (frozenset(), [[3, 5], [3, 5]]),
    ):
        ranking = Ranking(settings, None, unknown)
        scores, ordinals = ranking.rank(["谁来了?", "Who came?"], [dense, lexical], 2, lambda *_: [])
        assert ordinals.tolist() == expected
        # .75 * .8 and .75 * .4 + .25 for the weight .25; .25 * .4 + .75 and .25 * .8 for .75
        np.testing.assert_allclose(scores[0], [0.85, 0.2] if unknown else [0.6, 0.55], rtol=1e-6)
        np.testing.assert_allclose(scores[1], [0.6, 0.55], rtol=1e-6)


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_the_document_with_the_querys_id_is_left_out_where_asked(
    opened: snapshot.Index, encoder: HashingEncoder, mode: config.RetrievalMode
) -> None:
    retriever = Retriever(opened, encoder, config.Retrieval(mode=mode))
    texts = ["Phobos and Deimos are two moons of Mars", "moon", "moon"]
    plain = retriever.retrieve(["mars", "moon", "unknown"], texts, 8)
    assert plain[0][0].document_id == "mars"
    found = retriever.retrieve(["mars", "moon", "unknown"], texts, 2, leave_out_own=True)
    for before, after, own in zip(plain, found, ("mars", "moon", "unknown"), strict=True):
        others = [(hit.passage_id, hit.score) for hit in before if hit.document_id != own][:2]
        assert [(hit.passage_id, hit.score) for hit in after] == others
        assert [hit.rank for hit in after] == list(range(1, len(after) + 1))
    shown = retriever.retrieve_passages(texts, 2, ["mars", "moon", "unknown"])
    assert [[each.passage_id for each in passages] for passages, _ in shown] == [ids(hits) for hits in found]


def test_merged_candidates_are_those_of_one_search() -> None:
    one = Candidates(np.array([[0.9, 0.2]]), np.array([[1, 0]]), np.array([[3.0, 4.0]]))
    other = Candidates(np.array([[0.9, -np.inf]]), np.array([[5, -1]]), np.array([[7.0, -np.inf]]))
    merged = merge_candidates(other, one, 2)
    assert [array.tolist() for array in merged] == [[[0.9, 0.9]], [[1, 5]], [[3.0, 7.0]]]


def test_dense_hits_are_the_nearest_vectors(
    opened: snapshot.Index, encoder: HashingEncoder, passages: list[schema.Passage]
) -> None:
    retriever = Retriever(opened, encoder, config.Retrieval(mode="dense"))
    queries = [passage.text.lower() + " moon" for passage in passages]
    cosines = encoder.encode_queries(queries) @ encoder.encode_passages([passage.text for passage in passages]).T
    for row, hits in enumerate(retriever.retrieve([f"q{n}" for n in range(len(queries))], queries, 3)):
        expected = np.lexsort((np.arange(len(passages)), -cosines[row].round(6)))[:3]
        assert hits[0].passage_id == passages[expected[0]].passage_id
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines[row])[::-1][:3], atol=1e-6)
        assert [hit.rank for hit in hits] == [1, 2, 3]
        assert {hit.query_id for hit in hits} == {f"q{row}"}
        assert [hit.document_id for hit in hits] == [hit.passage_id.partition("#")[0] for hit in hits]


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_every_mode_finds_the_right_passage(
    workspace: str, mode: config.RetrievalMode, passages: list[schema.Passage]
) -> None:
    settings = config.Config(workspace=workspace).using("encoder.model=hashing-64", f"retrieval.mode={mode}")
    found = open_retriever(settings, device="cpu").retrieve(["a", "b", "c"], QUERIES[:3], 2)
    assert [ids(hits)[0] for hits in found] == ["mars#1", "moon#1", "sun#1"]


def test_the_lexical_mode_finds_only_passages_that_share_a_word_and_needs_no_encoder(opened: snapshot.Index) -> None:
    retriever = Retriever(opened, None, config.Retrieval(mode="lexical"))
    found = retriever.retrieve(["m", "x", "t"], ["月球", "xylophone", "moon"], 10)
    assert [ids(hits) for hits in found][:2] == [["china#0"], []]
    assert set(ids(found[2])) == {"moon#0", "moon#1", "mars#1"}
    with pytest.raises(ValueError, match="'hybrid' needs an encoder"):
        Retriever(opened, None, config.Retrieval(mode="hybrid"))


def test_search_returns_passages_in_the_order_of_their_hits(opened: snapshot.Index, encoder: HashingEncoder) -> None:
    retriever = Retriever(opened, encoder, config.Retrieval(top_k=2))
    found = retriever.search(QUERIES)
    expected = retriever.retrieve([""] * len(QUERIES), QUERIES, 2)
    assert [[(hit.rank, hit.score, hit.passage.passage_id) for hit in hits] for hits in found] == [
        [(hit.rank, hit.score, hit.passage_id) for hit in hits] for hits in expected
    ]
    assert [len(hits) for hits in retriever.search(QUERIES, top_k=1)] == [1] * len(QUERIES)
    with pytest.raises(TypeError, match="put it in a list"):
        retriever.search("one question")


def test_hybrid_by_ranks_is_the_fusion_of_dense_and_lexical(opened: snapshot.Index, encoder: HashingEncoder) -> None:
    settings = config.Retrieval(mode="hybrid", candidates=4, fusion="ranks", fusion_constant=2.0)
    scores, ordinals = Retriever(opened, encoder, settings).search_ordinals(QUERIES, 3)
    dense = opened.vectors.search(encoder.encode_queries(QUERIES), 4)[1]
    lexical = opened.lexical.search(QUERIES, 4)[1]
    for row in range(len(QUERIES)):
        lists = [[int(o) for o in part[row] if o >= 0] for part in (dense, lexical)]
        expected_scores, expected = reference_fusion(lists, 2.0, 3)
        assert ordinals[row].tolist() == expected
        np.testing.assert_allclose(scores[row], expected_scores, rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 5, 8, 20])
@pytest.mark.parametrize("candidates", [1, 50])
def test_top_k_is_filled_while_passages_are_left(
    opened: snapshot.Index, encoder: HashingEncoder, passages: list[schema.Passage], top_k: int, candidates: int
) -> None:
    for mode in ("dense", "hybrid"):
        retriever = Retriever(opened, encoder, config.Retrieval(mode=mode, candidates=candidates))
        for hits in retriever.retrieve(["q"] * len(QUERIES), QUERIES, top_k):
            assert len(set(ids(hits))) == len(hits) == min(top_k, len(passages))
            assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_no_queries_give_no_hits(opened: snapshot.Index, encoder: HashingEncoder) -> None:
    for mode in ("dense", "lexical", "hybrid"):
        assert Retriever(opened, encoder, config.Retrieval(mode=mode)).retrieve([], [], 3) == []


def test_another_encoder_is_refused_with_both_named(workspace: str, opened: snapshot.Index) -> None:
    with pytest.raises(
        artifacts.ArtifactError, match=r"built by encoder 'hashing-64' \(hashing-64\), not by this one \(hashing-32\)"
    ):
        Retriever(opened, HashingEncoder("hashing-32"), config.Retrieval())
    settings = config.Config(workspace=workspace).using("encoder.model=hashing-65")
    with pytest.raises(artifacts.ArtifactError, match=r"hashing-65.*run: ragtune index CONFIG"):
        open_retriever(settings)


class BrokenEncoder(HashingEncoder):
    """Returns NaN for the second query, as an overflowing model does."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        vectors = super().encode_queries(texts)
        vectors[1, 3] = np.nan
        return vectors


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_a_query_without_a_finite_vector_is_refused(opened: snapshot.Index, mode: config.RetrievalMode) -> None:
    retriever = Retriever(opened, BrokenEncoder("hashing-64"), config.Retrieval(mode=mode))
    with pytest.raises(ValueError, match=r"no finite vector for the query 'second'"):
        retriever.retrieve(["a", "b", "c"], ["first", "second", "third"], 2)


class LengthReranker:
    """Prefers long passages, an order that no other ranking produces by chance."""

    first_stage_weight = 0.0

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        self.pairs += pairs
        return np.array([len(text) for _, text in pairs], dtype=np.float32)


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_a_reranker_orders_the_candidates(
    opened: snapshot.Index, encoder: HashingEncoder, passages: list[schema.Passage], mode: config.RetrievalMode
) -> None:
    plain = Retriever(opened, encoder, config.Retrieval(mode=mode, candidates=5))
    reranker = LengthReranker()
    reranked = Retriever(opened, encoder, config.Retrieval(mode=mode, candidates=5), reranker)
    text_of = {passage.passage_id: passage.text for passage in passages}
    queries = ["moon", "xylophone", "star helium moon"]
    candidates = plain.retrieve(["a", "b", "c"], queries, 5)
    for query, before, after in zip(queries, candidates, reranked.retrieve(["a", "b", "c"], queries, 2), strict=True):
        # Hybrid takes five from each list, so up to ten distinct passages reach the reranker.
        pool = {text for asked, text in reranker.pairs if asked == query}
        if mode != "hybrid":
            assert pool == {text_of[passage_id] for passage_id in ids(before)}
        assert pool >= {text_of[passage_id] for passage_id in ids(before)}
        expected = sorted(pool, key=len, reverse=True)[:2]
        assert [hit.score for hit in after] == [len(text) for text in expected]
        assert [len(text_of[passage_id]) for passage_id in ids(after)] == [len(text) for text in expected]


def test_only_the_first_hits_are_reranked(opened: snapshot.Index, encoder: HashingEncoder) -> None:
    settings = config.Retrieval(candidates=5, reranker="x", rerank_candidates=3)
    reranker = LengthReranker()
    (first,) = Retriever(opened, encoder, settings).search(["moon"], 5)
    (found,) = Retriever(opened, encoder, settings, reranker).search(["moon"], 5)
    before, after = ([hit.passage.text for hit in hits] for hits in (first, found))
    assert [text for _, text in reranker.pairs] == before[:3]
    assert after == sorted(before[:3], key=len, reverse=True) + before[3:]
    lowest = min(map(len, before[:3]))
    expected = [lowest + (hit.score - first[0].score) / first[0].score for hit in first[3:]]
    assert [hit.score for hit in found[3:]] == pytest.approx(expected, rel=1e-5)
    (shorter,) = Retriever(opened, encoder, settings, reranker).search(["moon"], 2)
    assert shorter == found[:2], "the number of hits changes nothing"


@pytest.mark.parametrize(("top_k", "candidates", "limit", "reranked"), [(2, 3, 0, 3), (4, 3, 0, 4), (2, 4, 9, 4)])
def test_a_deeper_search_reranks_no_more_hits(
    opened: snapshot.Index, encoder: HashingEncoder, top_k: int, candidates: int, limit: int, reranked: int
) -> None:
    settings = config.Retrieval(mode="dense", top_k=top_k, candidates=candidates, rerank_candidates=limit)
    reranker = LengthReranker()
    (first,) = Retriever(opened, encoder, settings).search(["moon"], 6)
    (shown,) = Retriever(opened, encoder, settings, reranker).search(["moon"])
    reranker.pairs.clear()
    (deep,) = Retriever(opened, encoder, settings, reranker).search(["moon"], 6)
    assert len(reranker.pairs) == reranked
    assert deep[:top_k] == shown
    assert [hit.passage for hit in deep[reranked:]] == [hit.passage for hit in first[reranked:]]


@pytest.mark.parametrize(("given", "trained"), [(100.0, 0.0), (None, 100.0)])
def test_a_reranked_hit_keeps_a_share_of_its_retrieval_score(
    opened: snapshot.Index, encoder: HashingEncoder, given: float | None, trained: float
) -> None:
    reranker = LengthReranker()
    reranker.first_stage_weight = trained
    settings = config.Retrieval(mode="dense", candidates=4, first_stage_weight=given)
    first = Retriever(opened, encoder, settings).search(["moon", "star helium moon"], 4)
    found = Retriever(opened, encoder, settings, reranker).search(["moon", "star helium moon"], 4)
    for before, after in zip(first, found, strict=True):
        expected = {
            hit.passage.passage_id: len(hit.passage.text) + 100 * hit.score / abs(before[0].score) for hit in before
        }
        assert {hit.passage.passage_id: hit.score for hit in after} == pytest.approx(expected, rel=1e-5)
        assert [hit.score for hit in after] == sorted((hit.score for hit in after), reverse=True)


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_passages_are_in_the_order_of_hits(
    opened: snapshot.Index, encoder: HashingEncoder, mode: config.RetrievalMode
) -> None:
    retriever = Retriever(opened, encoder, config.Retrieval(mode=mode))
    hits = retriever.retrieve(["q"] * len(QUERIES), QUERIES, 4)
    for row, (found, scores) in zip(hits, retriever.retrieve_passages(QUERIES, 4), strict=True):
        assert [passage.passage_id for passage in found] == ids(row)
        assert scores == [hit.score for hit in row]


def test_a_real_encoder_finds_each_passage_by_its_own_text(
    tmp_path: Path, encoder_directory: Path, passages: list[schema.Passage], write_index: Callable[..., str]
) -> None:
    settings = config.Config(workspace=str(tmp_path)).using(
        f"encoder.model={encoder_directory}", "encoder.precision=float32", "retrieval.mode=dense"
    )
    write_index(tmp_path, passages, load_encoder(settings.encoder, "cpu"), model=str(encoder_directory))
    texts = [
        passage.text for passage in passages if passage.document_id != "china"
    ]  # the model knows none of its letters
    found = open_retriever(settings, device="cpu").retrieve(texts, texts, 1)
    assert [hits[0].passage_id for hits in found] == [p.passage_id for p in passages if p.document_id != "china"]
    np.testing.assert_allclose([hits[0].score for hits in found], 1, atol=1e-5)
