"""Retrieval metrics of one query, against hand-computed values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray.evaluation.metrics.retrieval import documents_of, mrr_at_k, ndcg_at_k, recall_at_k
from ragtune_ray.schema import Hit


def make_hits(query_id: str, document_ids: list[str]) -> list[Hit]:
    return [
        Hit(query_id, f"{document_id}#{rank}", document_id, rank, 1 / rank)
        for rank, document_id in enumerate(document_ids, start=1)
    ]


def test_retrieval_metrics_equal_hand_computed_values() -> None:
    qrels = {"a": 3.0, "b": 0.0, "c": 1.0, "d": 0.5}
    ranking = ["x", "b", "c", "a"]
    assert recall_at_k(qrels, ranking, 2) == 0
    assert recall_at_k(qrels, ranking, 4) == pytest.approx(2 / 3)
    assert mrr_at_k(qrels, ranking, 2) == 0
    assert mrr_at_k(qrels, ranking, 10) == pytest.approx(1 / 3)
    gain = 1 / 2 + 3 / math.log2(5)
    assert ndcg_at_k(qrels, ranking, 4) == pytest.approx(gain / (3 + 1 / math.log2(3) + 0.5 / 2))
    assert ndcg_at_k(qrels, ["a", "c", "d"], 2) == 1
    assert ndcg_at_k({"a": 1.0, "b": -2.0}, ["b", "a"], 2) == pytest.approx(1 / math.log2(3))


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 3), min_size=1).filter(lambda q: max(q.values()) > 0.01),
    st.permutations("abcdefgh"),
    st.integers(1, 9),
)
def test_metrics_stay_in_range_and_a_perfect_ranking_has_ndcg_1(
    qrels: dict[str, float], ranking: list[str], k: int
) -> None:
    for metric in (recall_at_k, mrr_at_k, ndcg_at_k):
        assert 0 <= metric(qrels, ranking, k) <= 1 + 1e-12
    ranking = sorted(ranking, key=lambda name: -qrels.get(name, 0))
    assert ndcg_at_k(qrels, ranking, k) == pytest.approx(1)
    assert mrr_at_k(qrels, ranking, k) == 1
    assert recall_at_k(qrels, ranking, 8) == 1


def test_documents_rank_by_their_best_passage() -> None:
    hits = make_hits("q", ["b", "a", "b", "c", "a"])
    assert documents_of(hits) == ["b", "a", "c"]
    assert documents_of(hits[::-1]) == ["b", "a", "c"]
    assert documents_of([]) == []
