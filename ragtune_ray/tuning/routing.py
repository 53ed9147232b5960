"""Sorts the failures of retrieval and generation by the component that can learn from them.

| route | means | teaches |
|---|---|---|
| success | answered correctly, or correctly not answered | both components, so that they keep it |
| reading | a shown passage contains the answer, and the reply is wrong | the generator, with those passages |
| retrieval | no shown passage contains the answer, a lower-ranked one does | the retriever, with that passage |
| unanswerable | there is no answer, or no retrieved passage contains one | the generator, to abstain |
| failed | an error instead of an answer | nothing |
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ragtune_ray.answering.citations import supporting_citations
from ragtune_ray.evaluation.failures import Outcome, outcome_of
from ragtune_ray.ingest.splits import draw, positives
from ragtune_ray.schema import Answer, Passage, Query
from ragtune_ray.training.examples import holds_answer

Route = Literal["success", "reading", "retrieval", "unanswerable", "failed"]

_ROUTES: dict[Outcome, Route] = {
    Outcome.CORRECT: "success",
    Outcome.MISREAD: "reading",
    Outcome.ABSTAINED: "reading",
    Outcome.NOT_RETRIEVED: "retrieval",
    Outcome.WRONG: "unanswerable",
    Outcome.FAILED: "failed",
}
"""Outcome -> route, with a lower-ranked passage in the case of NOT_RETRIEVED."""


@dataclass(frozen=True, slots=True)
class Routed:
    """A question and its route."""

    query: Query
    route: Route
    positive: Passage | None = None
    """For the route `retrieval`: the passage that should have been shown."""


def route(
    query: Query,
    answer: Answer,
    score: float | None,
    passages: Sequence[Passage],
    success_score: float,
    forbidden: Collection[str] = (),
) -> Routed:
    """Choose the route of one question with known answers.

    `score` is None for an unanswerable question; an answer is correct from `success_score` on. `passages` are all retrieved ones,
    best first, including the shown ones. `forbidden` are the documents of other splits.
    """
    golds, shown = query.answers or (), set(answer.passage_ids)
    outcome = outcome_of(
        query,
        answer,
        is_correct=score is not None and score >= success_score if golds else answer.abstained,
        was_shown=any(passage.passage_id in shown and holds_answer(passage.text, golds) for passage in passages),
    )
    if outcome != Outcome.NOT_RETRIEVED:
        return Routed(query, _ROUTES[outcome])
    positive = _positive(query, [each for each in passages if each.passage_id not in shown], forbidden)
    return Routed(query, _ROUTES[outcome], positive) if positive else Routed(query, "unanswerable")


def _positive(query: Query, found: Sequence[Passage], forbidden: Collection[str]) -> Passage | None:
    """The first passage that contains an answer: of a relevant document if these are known, else one that matches the question.

    Many passages contain a date or a name by chance; few have it in a sentence with half of the question's words.
    """
    relevant = set(positives(query))
    answers = query.answers or ()
    for passage in found:
        if passage.document_id in forbidden or not holds_answer(passage.text, answers):
            continue
        if passage.document_id in relevant or (not relevant and _matches_question(query, passage)):
            return passage
    return None


def _matches_question(query: Query, passage: Passage) -> bool:
    # Question and answer as one text make `supporting_citations` also compare the question's words.
    return any(supporting_citations(f"{query.text} {answer}", [passage], query.text) for answer in query.answers or ())


def generator_queries(routed: Sequence[Routed], success_share: float, seed: int) -> list[Query]:
    """Training questions of the generator: reading failures, abstentions and a share of successes; empty without failures."""
    failures = [each.query for each in routed if each.route == "reading"]
    abstentions = [
        dataclasses.replace(each.query, answers=(), document_ids=(), relevances=())
        for each in routed
        if each.route == "unanswerable"
    ]
    return _with_successes([*failures, *abstentions], routed, success_share, seed)


def retriever_queries(routed: Sequence[Routed], success_share: float, seed: int) -> list[Query]:
    """Training questions of the retriever: those with the passage it should have found, and a share of successes."""
    failures = [
        dataclasses.replace(each.query, document_ids=(each.positive.document_id,), relevances=(1.0,))
        for each in routed
        if each.positive is not None
    ]
    return _with_successes(failures, [each for each in routed if each.query.answers], success_share, seed)


def _with_successes(failures: list[Query], routed: Iterable[Routed], share: float, seed: int) -> list[Query]:
    """Failures plus a share of successes, drawn by the seed and their ids; sorted by id."""
    if not failures:
        return []
    successes = [each.query for each in routed if each.route == "success"]
    successes.sort(key=lambda query: draw(query.query_id, seed))
    count = round(len(failures) * share / (1 - share))
    return sorted([*failures, *successes[:count]], key=lambda query: query.query_id)


def routing_table(routed: Sequence[Routed], num_examples: int = 3) -> dict[str, dict[str, object]]:
    """Route -> its number of questions, and the first few of them.

    >>> routing_table([Routed(Query("q", "Why?", (), (), (), "train"), "success")])["success"]
    {'count': 1, 'questions': ['Why?']}
    """
    counts = Counter(each.route for each in routed)
    return {
        name: {
            "count": counts[name],
            "questions": [each.query.text for each in routed if each.route == name][:num_examples],
        }
        for name in get_args(Route)
    }


def route_lines(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A `routing_table` as lines for a terminal.

    >>> route_lines({"reading": {"count": 2, "questions": ["Why?"]}})[1]
    'reading           2  Why?'
    """
    lines = [f"{'route':<12}  {'count':>5}  for example"]
    for name, row in table.items():
        lines.append(f"{name:<12}  {row['count']:>5,}  {next(iter(row['questions']), '')}".rstrip())
    return lines
