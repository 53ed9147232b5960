"""What stands beside the verdict: where each arm loses its points, and its answers side by side.

In: queries, answers and scores of the arms. Out: plain values for `comparison.json` and the report. This module knows nothing of
models, files or Ray.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation import intervals
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.ingest.splits import positives
from ragtune_ray.schema import Answer, Passage, Query, document_id_of

__all__ = ["as_json", "cited_share", "interval_of", "losses", "most_telling", "shown_answer", "subset"]

RIGHT = 0.5
"""An answer that scores as much, or holds a gold answer, counts as correct where losses are sorted."""


def losses(
    queries: Sequence[Query], answers: Mapping[str, Answer], scores: PerQuery, metric: str, arm: config.Arm
) -> dict[str, int]:
    """How many answers are right, and why the others are not.

    - correct: the metric is at least `RIGHT`, or the answer contains a gold one; of unanswerable queries, it abstained;
    - failed: there is no answer;
    - abstained: it did, although there is an answer, which it was shown or which it would have had to know;
    - not_retrieved: no passage of a relevant document was shown;
    - misread: one was, and the answer is wrong all the same;
    - wrong: anything else, such as answering what has no answer, or what no document is judged relevant to.

    Args:
        queries: judged ones.
        answers: query_id -> answer of the arm.
        scores: of the same queries.
        metric: which counts.
        arm: decides whether passages were shown.
    """
    counts = dict.fromkeys(("correct", "not_retrieved", "misread", "abstained", "wrong", "failed"), 0)
    for query in queries:
        counts[_fate(query, answers[query.query_id], scores[query.query_id], metric, arm)] += 1
    return counts


def _fate(query: Query, answer: Answer, values: Mapping[str, float], metric: str, arm: config.Arm) -> str:
    relevant = set(positives(query))
    if answer.status == "failed":
        return "failed"
    if max(values.get(metric, 0.0), values.get("contains_answer", 0.0)) >= RIGHT:
        return "correct"
    if not query.answers or not (relevant and config.retrieves(arm)):
        return "abstained" if query.answers and answer.abstained else "wrong"
    if not relevant & {document_id_of(name) for name in answer.passage_ids}:
        return "not_retrieved"
    return "abstained" if answer.abstained else "misread"


def cited_share(answers: Sequence[Answer], settings: config.Evaluate, seed: int) -> intervals.Interval:
    """Of the answers that were given (not failed, not abstained), the share that cites a passage; 0 where none was given."""
    given = [answer for answer in answers if answer.status == "ok" and not answer.abstained]
    cites = np.array([float(bool(answer.citations)) for answer in given])
    if not len(cites):
        return intervals.Interval(0.0, 0.0, 0.0, 0)
    return intervals.bootstrap(cites, settings.resamples, settings.confidence, seed)


def subset(scores: PerQuery, query_ids: set[str]) -> PerQuery:
    """The scores of some queries."""
    return {query_id: values for query_id, values in scores.items() if query_id in query_ids}


def interval_of(scores: PerQuery, metric: str, settings: config.Config) -> intervals.Interval | None:
    """The mean of one metric with its interval; None where no query has the metric."""
    values = np.array([row[metric] for row in scores.values() if metric in row])
    if not len(values):
        return None
    evaluate = settings.evaluate
    return intervals.bootstrap(values, evaluate.resamples, evaluate.confidence, settings.seed)


def most_telling(scores: Mapping[config.Arm, PerQuery], metric: str, count: int) -> list[str]:
    """The queries whose answers tell the arms apart most, no arm favoured: in turn, those on which each arm does best.

    Args:
        scores: arm -> scores of the same queries.
        metric: which counts.
        count: most queries to give.

    Returns:
        Query ids; ties in the order of the queries.
    """
    arms = list(scores)
    ids = [query_id for query_id, values in scores[arms[0]].items() if metric in values]
    table = np.array([[scores[arm][query_id][metric] for query_id in ids] for arm in arms])
    orders = [_best_of(table, place) for place in range(len(arms))]
    turns = (order[turn] for turn in range(len(ids)) for order in orders)
    return [ids[place] for place in dict.fromkeys(turns)][:count]


def _best_of(table: np.ndarray, place: int) -> list[int]:
    """The columns, first those in which this row is furthest above the mean of all."""
    lead = table[place] - table.mean(axis=0)
    return [int(column) for column in np.argsort(-lead, kind="stable")]


def shown_answer(answer: Answer, score: float, found: Mapping[str, Passage]) -> dict[str, Any]:
    """An answer with its sources, as JSON values.

    Args:
        answer: of one arm.
        score: of its metric.
        found: the passages it was shown, by passage id, as far as they are still there.
    """
    cited = Counter(citation.passage_id for citation in answer.citations)
    return {
        "text": answer.answer,
        "score": score,
        "abstained": answer.abstained,
        "status": answer.status,
        "error": answer.error,
        "sources": [
            {
                "number": number,
                "title": found[name].title,
                "document_id": found[name].document_id,
                "start": found[name].start,
                "end": found[name].end,
                "text": found[name].text,
                "cited": cited[name] > 0,
            }
            for number, name in enumerate(answer.passage_ids, start=1)
            if name in found
        ],
    }


def as_json(value: Any) -> Any:
    """Dataclasses as objects, and what never happens as null: JSON has no infinity.

    >>> as_json({"a": [1.0, float("inf")], "b": intervals.Interval(0.5, 0.25, 0.75, 8)})
    {'a': [1.0, None], 'b': {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 8}}
    """
    match value:
        case Mapping():
            return {str(name): as_json(each) for name, each in value.items()}
        case list() | tuple():
            return [as_json(each) for each in value]
        case float() if not math.isfinite(value):
            return None
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return as_json({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        case _:
            return value
