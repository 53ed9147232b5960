"""Where retrieval with generation failed, question by question, and what each failure can teach.

In: questions with gold answers, what was answered, and the passages that were shown and found. Out: a route per question, and the
questions that each component learns from, successes mixed in. This module knows nothing of indexes, models, files or Ray.

| route | means | teaches |
|---|---|---|
| success | answered right, or rightly not answered | both components, as what must be kept |
| reading | a shown passage holds the answer, and the reply is wrong | the generator, with those passages |
| retrieval | no shown passage holds it, a deeper one does | the retriever, with that passage |
| unanswerable | known to have no answer, or nothing that was found holds one | the generator, to abstain |
| failed | was not answered at all | nothing |
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ragtune_ray.answering.citations import supporting_citations
from ragtune_ray.ingest.splits import draw, positives
from ragtune_ray.schema import Answer, Passage, Query
from ragtune_ray.training.examples import holds_answer

__all__ = ["Route", "Routed", "generator_queries", "retriever_queries", "route", "route_lines", "routing_table"]

Route = Literal["success", "reading", "retrieval", "unanswerable", "failed"]


@dataclass(frozen=True, slots=True)
class Routed:
    """A question and what became of it."""

    query: Query
    route: Route
    positive: Passage | None = None
    """Route `retrieval`: the passage that should have been retrieved."""


def route(
    query: Query,
    answer: Answer,
    score: float | None,
    passages: Sequence[Passage],
    success_score: float,
    forbidden: Collection[str] = (),
) -> Routed:
    """What became of one question.

    Args:
        query: with gold answers, or `()` where it is known to have none.
        answer: to it.
        score: of the answer; None for a question without answers.
        passages: all that were found, best first, the shown ones among them.
        success_score: from here on an answer is right.
        forbidden: documents that must not be learnt from: those of other splits.
    """
    if answer.status != "ok":
        return Routed(query, "failed")
    if not query.answers:
        return Routed(query, "success" if answer.abstained else "unanswerable")
    if score is not None and score >= success_score:
        return Routed(query, "success")
    shown = set(answer.passage_ids)
    if any(passage.passage_id in shown and holds_answer(passage.text, query.answers) for passage in passages):
        return Routed(query, "reading")
    positive = _positive(query, [each for each in passages if each.passage_id not in shown], forbidden)
    return Routed(query, "retrieval", positive) if positive else Routed(query, "unanswerable")


def _positive(query: Query, found: Sequence[Passage], forbidden: Collection[str]) -> Passage | None:
    """The first passage that answers: of a relevant document where these are known, else one that also speaks of the question.

    A date or a name stands in many passages by chance; a sentence that holds it and half of the question's words seldom does.
    """
    relevant = set(positives(query))
    answers = query.answers or ()
    for passage in found:
        if passage.document_id in forbidden or not holds_answer(passage.text, answers):
            continue
        if passage.document_id in relevant or (not relevant and _speaks_of(query, passage)):
            return passage
    return None


def _speaks_of(query: Query, passage: Passage) -> bool:
    # The longer text, asked with the question, takes the rule of `citations` that looks at the question's words too.
    return any(supporting_citations(f"{query.text} {answer}", [passage], query.text) for answer in query.answers or ())


def generator_queries(routed: Sequence[Routed], success_share: float, seed: int) -> list[Query]:
    """What the generator learns from: failures of reading, abstentions, and successes mixed in; empty: nothing failed."""
    failures = [each.query for each in routed if each.route == "reading"]
    abstentions = [
        dataclasses.replace(each.query, answers=(), document_ids=(), relevances=())
        for each in routed
        if each.route == "unanswerable"
    ]
    return _mixed([*failures, *abstentions], routed, success_share, seed)


def retriever_queries(routed: Sequence[Routed], success_share: float, seed: int) -> list[Query]:
    """What the retriever learns from: questions with the passage that it should have found, and successes mixed in."""
    failures = [
        dataclasses.replace(each.query, document_ids=(each.positive.document_id,), relevances=(1.0,))
        for each in routed
        if each.positive is not None
    ]
    return _mixed(failures, [each for each in routed if each.query.answers], success_share, seed)


def _mixed(failures: list[Query], routed: Iterable[Routed], share: float, seed: int) -> list[Query]:
    """Failures and as many successes as make up the share, drawn by the seed and their ids; in the order of the ids."""
    if not failures:
        return []
    successes = [each.query for each in routed if each.route == "success"]
    successes.sort(key=lambda query: draw(query.query_id, seed))
    count = round(len(failures) * share / (1 - share))
    return sorted([*failures, *successes[:count]], key=lambda query: query.query_id)


def routing_table(routed: Sequence[Routed], num_examples: int = 3) -> dict[str, dict[str, object]]:
    """Route -> how many questions took it, and the first few of them.

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
    """A `routing_table` for a terminal: why answers are wrong.

    >>> route_lines({"reading": {"count": 2, "questions": ["Why?"]}})[1]
    'reading           2  Why?'
    """
    lines = [f"{'route':<12}  {'count':>5}  for example"]
    for name, row in table.items():
        lines.append(f"{name:<12}  {row['count']:>5,}  {next(iter(row['questions']), '')}".rstrip())
    return lines
