"""Scores a changed pair of retriever and generator on the validation questions and decides whether to accept it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import answer, evaluate, retrieve
from ragtune_ray.evaluation.metrics.retrieval import mrr_at_k
from ragtune_ray.index import contents, snapshot
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts
from ragtune_ray.training import examples
from ragtune_ray.tuning import gates

RANKED = 10
"""Number of hits from which the retriever is judged."""


def judge_generator(settings: config.Config, pair: Pair, changed: Pair, num_examples: int) -> gates.Verdict:
    """Judge a changed generator by its answers to the validation questions and the probe questions.

    `pair` is the current pair, `changed` the one to judge; the verdict records `num_examples`.
    """
    metric = settings.compare.metric
    before, after = (
        _scores(each.used_in(settings).with_values({"queries.split": "validation", "answer.arm": "rag"}), metric)
        for each in (pair, changed)
    )
    problems = []
    if settings.tune.probe_path:
        closed_book = [each.used_in(settings).with_values({"answer.arm": "base"}) for each in (pair, changed)]
        probed = [staged_queries.with_all_queries_of(each, settings.tune.probe_path) for each in closed_book]
        known, kept = (_scores(each, metric) for each in probed)
        problems.append(gates.probe_problem(known, kept, settings))
    return gates.judge("generator", metric, before, after, problems, num_examples, settings)


def judge_retriever(settings: config.Config, pair: Pair, changed: Pair, num_examples: int) -> gates.Verdict:
    """Judge a changed retriever by its ranks of answering passages, its hits for the probe questions, and collapse.

    The arguments are those of `judge_generator`.
    """
    before, after = (
        reciprocal_ranks(each.used_in(settings).with_values({"queries.split": "validation"}))
        for each in (pair, changed)
    )
    problems = []
    if changed.workspace != pair.workspace:
        wide, narrow = (gates.mean_cosine(_random_vectors(each.used_in(settings))) for each in (pair, changed))
        problems.append(gates.spread_problem(wide, narrow, settings.tune.max_cosine_rise))
    if settings.tune.retriever_probe_path:
        found, kept = (
            reciprocal_ranks(
                staged_queries.with_all_queries_of(each.used_in(settings), settings.tune.retriever_probe_path)
            )
            for each in (pair, changed)
        )
        problems.append(gates.probe_problem(found, kept, settings))
    return gates.judge("retriever", f"MRR@{RANKED}", before, after, problems, num_examples, settings)


def queries_of(settings: config.Config, split: str) -> list[schema.Query]:
    """The queries of a split, with or without gold answers; InputError if there are none, except in the test split."""
    rows = splits.selected_queries(settings.queries.model_copy(update={"split": split}))
    try:
        found = [row for row in staged_queries.indexed_queries(settings, rows) if isinstance(row, schema.Query)]
    except inputs.InputError:
        if split != "test":
            raise
        return []
    return found[: settings.queries.limit or None]


def _scores(settings: config.Config, metric: str) -> dict[str, float]:
    """query_id -> score of the answer with this config."""
    judged = staged_queries.judged_queries(settings)
    if not config.retrieves(settings.answer.arm):  # nothing tells whether such an answer is right, but gold answers
        judged = [query for query in judged if query.answers is not None]
    scores = evaluate.scores_of(judged, str(answer.answer(settings)), settings)
    return {query_id: values[metric] for query_id, values in scores.items() if metric in values}


def reciprocal_ranks(settings: config.Config) -> dict[str, float]:
    """query_id -> reciprocal rank of the first of ten hits that answers the query; 0 if none does.

    A hit answers a query if its document is relevant or, without qrels, if it contains a gold answer. Queries that have neither
    are left out.
    """
    rows = [row for row in staged_queries.selected_queries(settings) if row.answers != ()]
    hits = hits_of(settings, RANKED)
    unjudged = [row.query_id for row in rows if not splits.positives(row) and row.answers]
    shown = (hit.passage_id for name in unjudged for hit in hits.get(name, []))
    texts = contents.passages_by_id(settings.workspace, shown)
    found = {}
    for row in rows:
        relevant, ranking = set(splits.positives(row)), hits.get(row.query_id, [])
        if not relevant and not row.answers:
            continue
        answering = {
            hit.passage_id: 1.0
            for hit in ranking
            if (
                hit.document_id in relevant
                if relevant
                else examples.holds_answer(texts[hit.passage_id].text, row.answers or ())
            )
        }
        names = [hit.passage_id for hit in ranking]
        found[row.query_id] = mrr_at_k(answering, names, RANKED) if answering else 0.0
    return found


def hits_of(settings: config.Config, depth: int) -> dict[str, list[schema.Hit]]:
    """query_id -> hits, best first."""
    run = str(retrieve.retrieve(settings.with_values({"evaluate.depth": depth})))
    path = artifacts.open_artifact(run, "retrieve").path / "hits.parquet"
    found: dict[str, list[schema.Hit]] = {}
    rows: Iterable[schema.Hit] = schema.from_table(pq.read_table(path), schema.Hit)
    for hit in rows:
        found.setdefault(hit.query_id, []).append(hit)
    return found


def _random_vectors(settings: config.Config) -> np.ndarray:
    index = snapshot.open_part(settings.workspace, settings.cluster.shard_bytes, settings.seed)
    count = min(gates.RANDOM_PASSAGES, index.passages.num_rows)
    drawn = np.random.default_rng(settings.seed).choice(index.passages.num_rows, count, replace=False)
    vectors: np.ndarray = index.vectors.take(np.sort(drawn))
    return vectors
