"""Scores a changed pair of retriever and generator on the validation questions and decides whether to accept it.

The scores per question come from runs of `answer` and `retrieve`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import answer, evaluate, retrieve
from ragtune_ray.evaluation import metrics
from ragtune_ray.index import snapshot
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts
from ragtune_ray.training import examples
from ragtune_ray.tuning import gates

RANKED = 10
"""Number of hits by which the retriever is judged."""


def judge_generator(settings: config.Config, pair: Pair, changed: Pair, num_examples: int) -> gates.Verdict:
    """Judge a pair with a changed generator by its answers to the validation questions and the probe questions.

    Args:
        settings: config of the tune.
        pair: the current pair.
        changed: the pair with the change.
        num_examples: number of training examples.
    """
    metric = settings.compare.metric
    before, after = (
        _scores(each.used_in(settings).with_values({"queries.split": "validation", "answer.arm": "rag"}), metric)
        for each in (pair, changed)
    )
    problems = []
    if settings.tune.probe_path:
        known, kept = (
            _scores(
                staged_queries.asking(
                    each.used_in(settings).with_values({"answer.arm": "base"}), settings.tune.probe_path
                ),
                metric,
            )
            for each in (pair, changed)
        )
        problems.append(gates.probe_problem(known, kept, settings))
    return gates.judge("generator", metric, before, after, problems, num_examples, settings)


def judge_retriever(settings: config.Config, pair: Pair, changed: Pair, num_examples: int) -> gates.Verdict:
    """Judge a pair with a changed retriever by its ranks of answering passages, the probe questions and collapse.

    The arguments are those of `judge_generator`.
    """
    before, after = (
        reciprocal_ranks(each.used_in(settings).with_values({"queries.split": "validation"}))
        for each in (pair, changed)
    )
    problems = []
    if changed.workspace != pair.workspace:
        wide, narrow = (gates.mean_cosine(_random_vectors(each, settings.seed)) for each in (pair, changed))
        problems.append(gates.spread_problem(wide, narrow, settings.tune.max_cosine_rise))
    if settings.tune.retriever_probe_path:
        found, kept = (
            reciprocal_ranks(staged_queries.asking(each.used_in(settings), settings.tune.retriever_probe_path))
            for each in (pair, changed)
        )
        problems.append(gates.probe_problem(found, kept, settings))
    return gates.judge("retriever", f"MRR@{RANKED}", before, after, problems, num_examples, settings)


def queries_of(settings: config.Config, split: str) -> list[schema.Query]:
    """The queries of a split, including those without gold answers; an empty test split is allowed.

    Raises:
        InputError: they cannot be read, or none has this split.
    """
    selection = settings.queries.model_copy(update={"split": split})
    try:
        found = [row for row in splits.selected_queries(selection) if isinstance(row, schema.Query)]
    except inputs.InputError:
        if split != "test":
            raise
        return []
    return found[: settings.queries.limit or None]


def _scores(settings: config.Config, metric: str) -> dict[str, float]:
    """query_id -> score of the answer with this config."""
    judged = staged_queries.judged_queries(settings)
    scores = evaluate.scores_of(judged, evaluate.read_answers(str(answer.answer(settings))), settings)
    return {query_id: values[metric] for query_id, values in scores.items() if metric in values}


def reciprocal_ranks(settings: config.Config) -> dict[str, float]:
    """query_id -> reciprocal rank of the first of ten hits that answers, 0 if none does.

    A hit answers if its document is relevant or, for queries without qrels, if it contains a gold answer. Queries without
    both are left out.
    """
    rows = [row for row in staged_queries.selected_queries(settings) if row.answers != ()]
    hits = hits_of(settings, RANKED)
    unjudged = [row.query_id for row in rows if not splits.positives(row) and row.answers]
    index = snapshot.open_index(settings.workspace)
    texts = index.by_id(hit.passage_id for name in unjudged for hit in hits.get(name, []))
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
        found[row.query_id] = (
            metrics.mrr_at_k(answering, [hit.passage_id for hit in ranking], RANKED) if answering else 0.0
        )
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


def _random_vectors(pair: Pair, seed: int) -> np.ndarray:
    """Vectors of random passages of a pair's index."""
    index = snapshot.open_index(pair.workspace)
    count = min(gates.RANDOM_PASSAGES, index.passages.num_rows)
    drawn = np.random.default_rng(seed).choice(index.passages.num_rows, count, replace=False)
    vectors: np.ndarray = index.vectors.take(np.sort(drawn))
    return vectors
