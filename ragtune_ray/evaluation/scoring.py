"""Scores every query: retrieval, answers, citations and abstention.

Larger is better except for `false_abstention_rate` and `failed`. A metric that is undefined for a query is left out of that
query's dict, never replaced by a number. Except for the precisions, whether a metric is defined depends on the query alone, so
all arms are scored on the same queries:

| metrics | defined for |
|---|---|
| recall@k, MRR@k, nDCG@k | queries with a relevant document |
| EM, token_F1, ROUGE_L | queries whose `answers` are known |
| contains_answer | queries with at least one gold answer |
| numeric_match | queries of which a gold answer is a number |
| citation_recall | queries with a relevant document that are not known to be unanswerable |
| citation_precision | the same, if the answer cites something |
| abstained, failed | every query |
| abstention_recall; false_abstention_rate | unanswerable; answerable queries |
| abstention_precision | abstaining answers to queries whose `answers` are known |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import intervals
from ragtune_ray.evaluation.metrics import languages, retrieval
from ragtune_ray.evaluation.metrics.answers import contains_answer, exact_match, rouge_l, token_f1
from ragtune_ray.evaluation.metrics.citations import citation_precision, citation_recall
from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.evaluation.metrics.numbers import is_numeric, numeric_match
from ragtune_ray.schema import Answer, Hit, Query

PerQuery = dict[str, dict[str, float]]
"""query_id -> metric -> value; undefined metrics are left out."""


def score_retrieval(queries: Sequence[Query], hits: Sequence[Hit], cutoffs: Sequence[int]) -> PerQuery:
    """recall@k, MRR@k and nDCG@k over documents, for every query with a relevant document.

    Hits of one run may be in any order; those of other queries are ignored, and a query without hits scores 0. A document counts
    once, at its best passage, so k documents may need more than k hits: retrieve deeper than the largest cutoff.

    Raises:
        MetricError: a query id or a rank within a query is repeated, a query does not have one relevance per document,
            or a cutoff is below 1.

    >>> query = Query("q", "Who?", None, ("a",), (1.0,), "all")
    >>> score_retrieval([query], [Hit("q", "b#0", "b", 1, 0.9), Hit("q", "a#0", "a", 2, 0.8)], [1, 5])["q"]["MRR@5"]
    0.5
    """
    hits_by_query: dict[str, list[Hit]] = {query_id: [] for query_id in _distinct_ids(queries)}
    for hit in hits:
        if hit.query_id in hits_by_query:
            hits_by_query[hit.query_id].append(hit)
    scores: PerQuery = {}
    for query in queries:
        if qrels := retrieval.relevant_only(_qrels(query)):
            ranking = retrieval.documents_of(hits_by_query[query.query_id])
            scores[query.query_id] = {
                f"{name}@{k}": metric(qrels, ranking, k)
                for name, metric in (
                    ("recall", retrieval.recall_at_k),
                    ("MRR", retrieval.mrr_at_k),
                    ("nDCG", retrieval.ndcg_at_k),
                )
                for k in cutoffs
            }
    return scores


def score_answers(queries: Sequence[Query], answers: Sequence[Answer], rule: config.Evaluate) -> PerQuery:
    """The metrics of every query that need no model: of its answer, citations and abstention, and whether it failed.

    For an unanswerable query, EM, token_F1 and ROUGE_L are 1 if the answer abstained, else 0 (SQuAD v2). An answer that
    abstained from an answerable query scores 0 in all answer metrics, even if it contains a gold answer. A failed answer is
    not an abstention, cites nothing and scores 0 in every answer metric. For the metrics that a query has see the module
    docstring. Answers may be in any order, and those to other queries are ignored.

    Raises:
        MetricError: a query id is repeated, a query does not have exactly one answer (the message names the ids), or
            it does not have one relevance per document.
    """
    answer_of = _answer_of(queries, answers)
    return {
        query.query_id: {
            **_answer_scores(query, answer_of[query.query_id], rule),
            **_citation_scores(query, answer_of[query.query_id]),
            "abstained": float(_abstained(answer_of[query.query_id])),
            "failed": float(answer_of[query.query_id].status == "failed"),
        }
        for query in queries
    }


def score_abstention(queries: Sequence[Query], answers: Sequence[Answer]) -> PerQuery:
    """Abstention quality per query, as values whose means are the metrics (`intervals.summarize`).

    - abstention_precision: of the abstentions, the share on unanswerable queries;
    - abstention_recall: of the unanswerable queries, the share abstained from;
    - false_abstention_rate: of the answerable queries, the share abstained from (smaller is better).

    Shares without a denominator are left out, and so are precision and recall if no query is unanswerable. Queries whose
    `answers` are None do not count. A failed answer is not an abstention. Arguments and errors are those of `score_answers`.
    """
    answer_of = _answer_of(queries, answers)
    judged = [query for query in queries if query.answers is not None]
    any_unanswerable = any(not query.answers for query in judged)
    scores: PerQuery = {}
    for query in judged:
        abstained = _abstained(answer_of[query.query_id])
        name = "false_abstention_rate" if query.answers else "abstention_recall"
        scores[query.query_id] = {name: float(abstained)}
        if abstained and any_unanswerable:
            scores[query.query_id]["abstention_precision"] = float(not query.answers)
    return scores


def cited_share(answers: Sequence[Answer], settings: config.Evaluate, seed: int) -> intervals.Interval:
    """Share of the answers, without failures and abstentions, that cite a passage; 0 if there are no such answers."""
    given = [answer for answer in answers if answer.status == "ok" and not answer.abstained]
    if not given:
        return intervals.Interval(0.0, 0.0, 0.0, 0)
    cites = np.array([float(bool(answer.citations)) for answer in given])
    return intervals.bootstrap(cites, settings.resamples, settings.confidence, seed)


def language_warnings(
    queries: Sequence[Query], answers: Mapping[str, Iterable[Answer]], language: config.Language
) -> list[str]:
    """One sentence for the gold answers, and one for the answers of each arm, that are clearly not in `evaluate.language`."""
    texts = {"the gold answers": [gold for query in queries for gold in query.answers or ()]}
    for arm, rows in answers.items():
        texts[f"the answers of {arm}"] = [row.answer for row in rows if row.status == "ok" and not row.abstained]
    found = (languages.warning(what, written, language) for what, written in texts.items())
    return [sentence for sentence in found if sentence]


def is_defined(metric: config.DecidingMetric, query: Query, rule: config.Evaluate) -> bool:
    """Whether answers to a query have a metric; `failed` grades apart, this depends on the query alone.

    >>> is_defined("numeric_match", Query("q", "Who?", ("Ada",), (), (), "all"), config.Evaluate())
    False
    """
    match metric:
        case "judge" | "groundedness":
            return True
        case "numeric_match":
            return is_numeric(query.answers or (), rule.language)
        case "contains_answer":
            return bool(query.answers)
        case _:
            return query.answers is not None


def _distinct_ids(queries: Sequence[Query]) -> list[str]:
    counts = Counter(query.query_id for query in queries)
    if repeated := [query_id for query_id, count in counts.items() if count > 1]:
        raise MetricError(f"repeated queries: {_listed(repeated)}; query ids must be distinct")
    return list(counts)


def _answer_of(queries: Sequence[Query], answers: Sequence[Answer]) -> dict[str, Answer]:
    counts = Counter(answer.query_id for answer in answers)
    query_ids = _distinct_ids(queries)
    if missing := [query_id for query_id in query_ids if counts[query_id] == 0]:
        raise MetricError(f"queries without an answer: {_listed(missing)}; answer them, or score fewer queries")
    if repeated := [query_id for query_id in query_ids if counts[query_id] > 1]:
        raise MetricError(f"queries with more than one answer: {_listed(repeated)}; pass the answers of one run")
    return {answer.query_id: answer for answer in answers}


def _listed(ids: Sequence[str]) -> str:
    named = ", ".join(repr(query_id) for query_id in ids[:10])
    return named if len(ids) <= 10 else f"{named} and {len(ids) - 10} more"


def _qrels(query: Query) -> dict[str, float]:
    if len(query.document_ids) != len(query.relevances):
        raise MetricError(
            f"query {query.query_id!r} has {len(query.document_ids)} document_ids and {len(query.relevances)} relevances; "
            "it must have one relevance per document"
        )
    return dict(zip(query.document_ids, query.relevances, strict=True))


def _abstained(answer: Answer) -> bool:
    return answer.abstained and answer.status == "ok"


def _answer_scores(query: Query, answer: Answer, rule: config.Evaluate) -> dict[str, float]:
    if query.answers is None:
        return {}
    metrics: dict[str, Callable[..., float]] = {"EM": exact_match, "token_F1": token_f1, "ROUGE_L": rouge_l}
    if not query.answers:
        return dict.fromkeys(metrics, float(_abstained(answer)))
    metrics["contains_answer"] = contains_answer
    if is_numeric(query.answers, rule.language):
        metrics["numeric_match"] = partial(numeric_match, tolerance=rule.numeric_tolerance)
    if answer.status == "failed" or answer.abstained:
        return dict.fromkeys(metrics, 0.0)
    return {
        name: metric(answer.answer, query.answers, rule.language, rule.normalization)
        for name, metric in metrics.items()
    }


def _citation_scores(query: Query, answer: Answer) -> dict[str, float]:
    qrels = retrieval.relevant_only(_qrels(query))
    if not qrels or query.answers == ():
        return {}
    citations = answer.citations if answer.status == "ok" else ()
    scores = {"citation_recall": citation_recall(citations, qrels)}
    if citations:
        scores["citation_precision"] = citation_precision(citations, qrels)
    return scores
