"""Scores of whole sets of records against ir_measures (trec_eval), and sums done by hand."""

from __future__ import annotations

import collections
import math
import time
from typing import Any

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from ragtune_ray import config
from ragtune_ray.evaluation import intervals, scoring
from ragtune_ray.evaluation.metrics import retrieval
from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.schema import Answer, Citation, Hit, Query

ENGLISH = config.Evaluate()


def make_query(
    query_id: str = "q", answers: tuple[str, ...] | None = None, qrels: dict[str, float] | None = None
) -> Query:
    qrels = qrels or {}
    return Query(query_id, "?", answers, tuple(qrels), tuple(qrels.values()), "all")


def make_answer(query_id: str = "q", text: str = "", cited: tuple[str, ...] = (), **changed: Any) -> Answer:
    citations = tuple(Citation(f"{document_id}#0", document_id, 0, 1) for document_id in cited)
    values: dict[str, Any] = {"abstained": False, "status": "ok", "error": ""} | changed
    return Answer(
        query_id=query_id,
        query="?",
        answer=text,
        citations=citations,
        passage_ids=(),
        scores=(),
        seconds=0.0,
        prompt_tokens=0,
        completion_tokens=0,
        index_version="",
        model="",
        **values,
    )


def make_hits(query_id: str, document_ids: list[str]) -> list[Hit]:
    return [
        Hit(query_id, f"{document_id}#{rank}", document_id, rank, 1 / rank)
        for rank, document_id in enumerate(document_ids, start=1)
    ]


def random_run(seed: int) -> tuple[list[Query], list[Hit]]:
    """60 queries with graded qrels, up to 25 hits each on passages of 12 documents; some queries have no hits."""
    generator = np.random.default_rng(seed)
    documents = [f"d{number}" for number in range(12)]
    queries, hits = [], []
    for number in range(60):
        judged = generator.choice(documents, size=generator.integers(1, 9), replace=False)
        grades = generator.integers(-1, 4, size=judged.size)
        qrels = {str(name): float(grade) for name, grade in zip(judged, grades, strict=True)}
        queries.append(make_query(f"q{number}", qrels=qrels))
        found = generator.choice(documents, size=generator.integers(0, 26))
        hits += make_hits(f"q{number}", [str(name) for name in found])
    return queries, [hits[place] for place in generator.permutation(len(hits))]


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_scores_equal_trec_eval_on_random_runs(seed: int) -> None:
    queries, hits = random_run(seed)
    qrels = {
        query.query_id: {name: int(grade) for name, grade in zip(query.document_ids, query.relevances, strict=True)}
        for query in queries
    }
    run: dict[str, dict[str, float]] = {query.query_id: {} for query in queries}
    for hit in hits:
        run[hit.query_id][hit.document_id] = max(hit.score, run[hit.query_id].get(hit.document_id, 0))
    expected: dict[str, dict[str, float]] = collections.defaultdict(dict)
    names = {"R": "recall", "RR": "MRR", "nDCG": "nDCG"}
    measures = [measure @ k for measure in (R, RR, nDCG) for k in (1, 3, 5, 10, 100)]
    for metric in ir_measures.iter_calc(measures, qrels, run):
        stem, _, k = str(metric.measure).partition("@")
        expected[metric.query_id][f"{names[stem]}@{k}"] = metric.value

    scores = scoring.score_retrieval(queries, hits, [1, 3, 5, 10, 100])

    scored = {query_id for query_id, judged in qrels.items() if max(judged.values()) > 0}
    assert set(scores) == scored
    assert 50 < len(scored) < 60
    for query_id in scored:
        assert scores[query_id] == pytest.approx(expected[query_id], abs=1e-12)


def test_several_hits_of_a_document_count_as_one() -> None:
    query = make_query(qrels={"a": 1.0})
    scores = scoring.score_retrieval([query], make_hits("q", ["b", "b", "b", "a"]), [2])
    assert scores == {"q": {"recall@2": 1.0, "MRR@2": 0.5, "nDCG@2": pytest.approx(1 / math.log2(3))}}


def test_queries_without_hits_score_zero_without_qrels_nothing() -> None:
    queries = [make_query("no hits", qrels={"a": 1.0}), make_query("no qrels"), make_query("zero", qrels={"a": 0.0})]
    scores = scoring.score_retrieval(queries, make_hits("zero", ["a"]) + make_hits("other", ["a"]), [5])
    assert scores == {"no hits": {"recall@5": 0.0, "MRR@5": 0.0, "nDCG@5": 0.0}}


def test_retrieval_input_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(MetricError, match="k is 0"):
        retrieval.recall_at_k({"a": 1}, ["a"], 0)
    with pytest.raises(MetricError, match="'a' occurs twice"):
        retrieval.ndcg_at_k({"a": 1}, ["b", "a", "a"], 3)
    with pytest.raises(MetricError, match="no relevance above 0"):
        retrieval.mrr_at_k({"a": 0}, ["a"], 3)
    query = make_query(qrels={"a": 1.0})
    with pytest.raises(MetricError, match="'q': rank 1 occurs 2 times"):
        scoring.score_retrieval([query], [*make_hits("q", ["a"]), *make_hits("q", ["b"])], [1])
    with pytest.raises(MetricError, match="repeated queries: 'q'"):
        scoring.score_retrieval([query, query], [], [1])
    with pytest.raises(MetricError, match="2 document_ids and 1 relevances"):
        scoring.score_retrieval([Query("q", "?", None, ("a", "b"), (1.0,), "all")], [], [1])


def test_5322_queries_of_20_hits_are_scored_in_two_seconds() -> None:
    queries = [make_query(f"q{number}", qrels={"d19": 1.0}) for number in range(5322)]
    hits = [hit for query in queries for hit in make_hits(query.query_id, [f"d{number}" for number in range(20)])]
    start = time.process_time()
    scores = scoring.score_retrieval(queries, hits, [1, 3, 5, 10])
    assert time.process_time() - start < 2
    assert len(scores) == 5322


RIGHT = {"EM": 1.0, "token_F1": 1.0, "ROUGE_L": 1.0, "contains_answer": 1.0}


WRONG = {"EM": 0.0, "token_F1": 0.0, "ROUGE_L": 0.0, "contains_answer": 0.0}


NO_FLAG = {"abstained": 0.0, "failed": 0.0}


@pytest.mark.parametrize(
    ("query", "answer", "expected"),
    [
        (make_query(answers=("Moon",)), make_answer(text="the moon"), RIGHT | NO_FLAG),
        (
            make_query(answers=("Moon",)),
            make_answer(text="on the moon"),
            {"EM": 0.0, "token_F1": pytest.approx(2 / 3), "ROUGE_L": pytest.approx(2 / 3), "contains_answer": 1.0}
            | NO_FLAG,
        ),
        (
            make_query(answers=("Moon",)),
            make_answer(text="The passages do not mention the Moon.", abstained=True),
            WRONG | {"abstained": 1.0, "failed": 0.0},
        ),
        (
            make_query(answers=("Moon",)),
            make_answer(text="moon", status="failed", error="out of memory"),
            WRONG | {"abstained": 0.0, "failed": 1.0},
        ),
        (
            make_query(answers=()),
            make_answer(abstained=True),
            {"EM": 1.0, "token_F1": 1.0, "ROUGE_L": 1.0, "abstained": 1.0, "failed": 0.0},
        ),
        (make_query(answers=()), make_answer(text="Mars"), {"EM": 0.0, "token_F1": 0.0, "ROUGE_L": 0.0} | NO_FLAG),
        (
            make_query(answers=(), qrels={"a": 1.0}),
            make_answer(abstained=True, status="failed", cited=("a",)),
            {"EM": 0.0, "token_F1": 0.0, "ROUGE_L": 0.0, "abstained": 0.0, "failed": 1.0},
        ),
        (make_query(answers=None), make_answer(text="Mars"), NO_FLAG),
        (
            make_query(qrels={"a": 1.0, "b": 2.0, "c": 0.0}),
            make_answer(cited=("a", "c", "x", "a")),
            {"citation_precision": pytest.approx(1 / 3), "citation_recall": 0.5} | NO_FLAG,
        ),
        (make_query(qrels={"a": 1.0}), make_answer(), {"citation_recall": 0.0} | NO_FLAG),
        (
            make_query(qrels={"a": 1.0}),
            make_answer(cited=("a",), status="failed"),
            {"citation_recall": 0.0, "abstained": 0.0, "failed": 1.0},
        ),
        (make_query(qrels={"a": 0.0}), make_answer(cited=("a",)), NO_FLAG),
    ],
)
def test_answers_have_exactly_the_metrics_defined_for_them(
    query: Query, answer: Answer, expected: dict[str, float]
) -> None:
    assert scoring.score_answers([query], [answer], ENGLISH) == {"q": expected}


def test_missing_and_repeated_answers_are_named() -> None:
    queries = [make_query(f"q{number}") for number in range(14)]
    with pytest.raises(MetricError, match=r"without an answer: 'q1', 'q2', .*'q10' and 3 more"):
        scoring.score_answers(queries, [make_answer("q0")], ENGLISH)
    answers = [make_answer(query.query_id) for query in queries]
    with pytest.raises(MetricError, match="more than one answer: 'q3'"):
        scoring.score_answers(queries, [*answers, answers[3]], ENGLISH)
    with pytest.raises(MetricError, match="repeated queries: 'q0'"):
        scoring.score_abstention([*queries, queries[0]], answers)
    assert list(scoring.score_answers(queries[:2], answers, ENGLISH)) == ["q0", "q1"]


def means(per_query: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: interval.value for name, interval in intervals.summarize(per_query, 100, 0.95, 0).items()}


def test_abstention_metrics_equal_hand_computed_values() -> None:
    gold = {"u": (), "a": ("Moon",), "n": None}
    names = ["u1", "u2", "u3", "a1", "a2", "a3", "a4", "a5", "n1"]
    queries = [make_query(name, answers=gold[name[0]]) for name in names]
    abstaining = {"u1", "u2", "a1", "n1"}
    answers = [make_answer(name, abstained=name in abstaining) for name in names]
    answers[4] = make_answer("a2", abstained=True, status="failed")
    assert means(scoring.score_abstention(queries, answers)) == {
        "abstention_precision": pytest.approx(2 / 3),
        "abstention_recall": pytest.approx(2 / 3),
        "false_abstention_rate": pytest.approx(1 / 5),
    }


def test_abstention_shares_of_nothing_are_left_out() -> None:
    answerable, unanswerable = make_query("a", answers=("Moon",)), make_query("u", answers=())
    says, refuses = make_answer("a", "Moon"), make_answer("u", abstained=True)
    assert means(scoring.score_abstention([answerable], [says])) == {"false_abstention_rate": 0.0}
    assert means(scoring.score_abstention([answerable], [make_answer("a", abstained=True)])) == {
        "false_abstention_rate": 1.0
    }
    assert means(scoring.score_abstention([unanswerable], [make_answer("u", "Mars")])) == {"abstention_recall": 0.0}
    assert means(scoring.score_abstention([unanswerable], [refuses])) == {
        "abstention_precision": 1.0,
        "abstention_recall": 1.0,
    }
    assert scoring.score_abstention([], []) == {}


def test_cited_share_counts_only_given_answers() -> None:
    rows = [
        make_answer("a", "x", ("d1",)),
        make_answer("b", "x"),
        make_answer("c", "x", ("d1",)),
        make_answer("d", "x", ("d1",)),
        make_answer("e", status="failed"),
        make_answer("f", "I don't know", abstained=True),
    ]
    found = scoring.cited_share(rows, config.Evaluate(), 0)
    assert (found.value, found.n) == (0.75, 4)
    assert scoring.cited_share(rows[4:], config.Evaluate(), 0).n == 0
