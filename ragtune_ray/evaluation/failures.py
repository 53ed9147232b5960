"""Sorts questions by outcome: answered correctly, or why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from ragtune_ray import config
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.ingest.splits import positives
from ragtune_ray.schema import Answer, Query, document_id_of

CORRECT_SCORE = 0.5
"""An answer with at least this score counts as correct in a comparison."""


class Outcome(StrEnum):
    """What became of a question, from best to worst."""

    CORRECT = "correct"
    NOT_RETRIEVED = "not_retrieved"
    MISREAD = "misread"
    ABSTAINED = "abstained"
    WRONG = "wrong"
    FAILED = "failed"


MEANINGS = {
    Outcome.CORRECT: "a gold answer was given",
    Outcome.NOT_RETRIEVED: "the passage with the answer was not retrieved",
    Outcome.MISREAD: "it was retrieved; the answer is still wrong",
    Outcome.ABSTAINED: "no answer, although there is one",
    Outcome.WRONG: "the answer is wrong",
    Outcome.FAILED: "an error instead of an answer",
}
"""Outcome of an answerable question -> its meaning, for people."""


def outcome_of(query: Query, answer: Answer, *, is_correct: bool, was_shown: bool | None) -> Outcome:
    """What became of one question whose gold answers are known.

    For an unanswerable question, `is_correct` means that the answer abstained. `was_shown` means that the prompt contained a
    passage with the answer: for `compare` any passage of a relevant document, for `tune` one whose text contains a gold answer.
    It is None if the arm does not retrieve or no document is judged relevant.
    """
    if answer.status != "ok":
        return Outcome.FAILED
    if is_correct:
        return Outcome.CORRECT
    if not query.answers or was_shown is None:
        return Outcome.ABSTAINED if query.answers and answer.abstained else Outcome.WRONG
    if not was_shown:
        return Outcome.NOT_RETRIEVED
    return Outcome.ABSTAINED if answer.abstained else Outcome.MISREAD


def count_outcomes(
    queries: Iterable[Query], answers: Mapping[str, Answer], scores: PerQuery, metric: str, arm: config.Arm
) -> dict[str, int]:
    """Number of questions per outcome, for one arm of a comparison.

    An answer is correct if its metric (token F1 where that is undefined or its grade failed) is at least `CORRECT_SCORE`, or if
    it contains a gold answer; every query needs known gold answers. The passage with the answer was shown if the prompt
    contained any passage of a relevant document.
    """
    counts = dict.fromkeys(Outcome, 0)
    for query in queries:
        answer, values = answers[query.query_id], scores[query.query_id]
        score = values.get(metric, values.get("token_F1", 0.0))
        relevant = set(positives(query)) if config.retrieves(arm) else set()
        outcome = outcome_of(
            query,
            answer,
            is_correct=max(score, values.get("contains_answer", 0.0)) >= CORRECT_SCORE,
            was_shown=bool(relevant & {document_id_of(name) for name in answer.passage_ids}) if relevant else None,
        )
        counts[outcome] += 1
    return {str(outcome): count for outcome, count in counts.items()}
