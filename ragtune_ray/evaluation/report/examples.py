"""Chooses questions on which the arms differ most, and shows each arm's answer with its sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation.comparison import ExampleAnswer, Source
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.schema import Answer, Passage


def most_telling(scores: Mapping[config.Arm, PerQuery], metric: str, count: int) -> list[str]:
    """The ids of at most `count` queries on which the arms differ most in a metric.

    The arms take turns: each chooses the query on which it leads most. Ties follow the order of the queries.
    """
    arms = list(scores)
    ids = [name for name in scores[arms[0]] if all(metric in per_query.get(name, {}) for per_query in scores.values())]
    table = np.array([[scores[arm][query_id][metric] for query_id in ids] for arm in arms])
    leads = table - table.mean(axis=0) if ids else table
    orders = np.argsort(-leads, axis=1, kind="stable")
    turns = (int(order[turn]) for turn in range(len(ids)) for order in orders)
    return [ids[place] for place in dict.fromkeys(turns)][:count]


def most_contested(
    scores: Mapping[config.Arm, PerQuery], metrics: tuple[str, str], arms: tuple[config.Arm, config.Arm], count: int
) -> list[str]:
    """The ids of at most `count` queries on which two metrics differ most about two arms.

    By the first metric the second arm is ahead, by the second metric the first arm; queries with the largest sum of both leads
    come first, and ties follow the order of the queries.
    """
    decides, other = metrics
    ahead, against = (scores[arm] for arm in arms)
    leads = {}
    for name, ours in against.items():
        theirs = ahead.get(name, {})
        if all(metric in row for metric in metrics for row in (ours, theirs)):
            by_rule, by_other = ours[decides] - theirs[decides], theirs[other] - ours[other]
            if by_other > 0 and by_rule + by_other > 0:
                leads[name] = by_rule + by_other
    return sorted(leads, key=lambda name: -leads[name])[:count]


def shown_answer(answer: Answer, score: float, found: Mapping[str, Passage]) -> ExampleAnswer:
    """An answer with its sources; `found` has the passages of its prompt that still exist, by id."""
    cited = Counter(citation.passage_id for citation in answer.citations)
    return ExampleAnswer(
        text=answer.answer,
        score=score,
        abstained=answer.abstained,
        status=answer.status,
        error=answer.error,
        sources=tuple(
            Source(
                number=number,
                title=passage.title,
                document_id=passage.document_id,
                start=passage.start,
                end=passage.end,
                text=passage.text,
                cited=cited[passage.passage_id] > 0,
            )
            for number, passage in enumerate(map(found.get, answer.passage_ids), start=1)
            if passage is not None
        ),
    )
