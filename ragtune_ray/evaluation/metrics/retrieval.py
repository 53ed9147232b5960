"""Retrieval metrics of one query."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.schema import Hit


def documents_of(hits: Sequence[Hit]) -> list[str]:
    """Distinct documents of one query's hits (in any order), each at the rank of its best passage.

    Raises:
        MetricError: a rank is repeated, so hits of two queries or two runs are mixed.

    >>> documents_of([Hit("q", "b#1", "b", 2, 0.8), Hit("q", "a#0", "a", 1, 0.9), Hit("q", "a#4", "a", 3, 0.1)])
    ['a', 'b']
    """
    by_rank = {hit.rank: hit.document_id for hit in hits}
    if len(by_rank) < len(hits):
        (rank, count), *_ = Counter(hit.rank for hit in hits).most_common(1)
        raise MetricError(
            f"hits of query {hits[0].query_id!r}: rank {rank} occurs {count} times; pass the hits of one query from one run"
        )
    return list(dict.fromkeys(by_rank[rank] for rank in sorted(by_rank)))


def recall_at_k(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> float:
    """Share of the relevant ids that are among the first k.

    Args:
        qrels: id -> relevance; above 0 is relevant.
        ranking: distinct ids, best first; may be shorter than k.
        k: cutoff, at least 1.

    Raises:
        MetricError: k is below 1, an id is repeated, or nothing is relevant (such a query is not scored).

    >>> recall_at_k({"a": 1, "b": 1}, ["x", "a", "b"], 2)
    0.5
    """
    gains = _gains(qrels, ranking, k)
    return sum(gain > 0 for gain in gains) / len(relevant_only(qrels))


def mrr_at_k(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> float:
    """Reciprocal rank of the first relevant id among the first k, 0 if there is none; its mean over queries is MRR@k.

    Arguments, range and errors are those of `recall_at_k`.

    >>> mrr_at_k({"a": 1, "b": 1}, ["x", "a", "b"], 2)
    0.5
    """
    gains = _gains(qrels, ranking, k)
    return next((1 / rank for rank, gain in enumerate(gains, start=1) if gain > 0), 0.0)


def ndcg_at_k(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> float:
    """Normalised discounted cumulative gain of the first k, as in trec_eval: gain = relevance, discount = log2(rank + 1).

    Arguments, range and errors are those of `recall_at_k`.

    >>> round(ndcg_at_k({"a": 1, "b": 3}, ["a", "b"], 10), 4)  # (1/1 + 3/log2(3)) / (3/1 + 1/log2(3))
    0.7967
    """
    gains = _gains(qrels, ranking, k)
    ideal = sorted(relevant_only(qrels).values(), reverse=True)[:k]
    return _discounted(gains) / _discounted(ideal)


def relevant_only(qrels: Mapping[str, float]) -> dict[str, float]:
    """The qrels above 0."""
    return {name: relevance for name, relevance in qrels.items() if relevance > 0}


def _gains(qrels: Mapping[str, float], ranking: Sequence[str], k: int) -> list[float]:
    if k < 1:
        raise MetricError(f"cutoff k is {k}; it must be at least 1")
    first = ranking[:k]
    if len(set(first)) < len(first):
        name = Counter(first).most_common(1)[0][0]
        raise MetricError(f"id {name!r} occurs twice in the ranking; ids must be distinct")
    if not any(relevance > 0 for relevance in qrels.values()):
        raise MetricError(f"no relevance above 0 among {len(qrels)} qrels; a query without a relevant id is not scored")
    return [max(qrels.get(name, 0.0), 0.0) for name in first]


def _discounted(gains: Iterable[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
