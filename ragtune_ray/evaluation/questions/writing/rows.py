"""The lines of `questions.jsonl`: queries with their provenance. `queries.path` reads them and ignores what it does not know."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from ragtune_ray.config.evaluation import QuestionKind
from ragtune_ray.evaluation.questions.writing import prompts
from ragtune_ray.evaluation.questions.writing.drafts import Draft
from ragtune_ray.evaluation.questions.writing.drawing import Seed
from ragtune_ray.evaluation.questions.writing.filters import Reason
from ragtune_ray.evaluation.questions.writing.making import Outcome
from ragtune_ray.schema import Citation, Message, Passage, Query, document_id_of


class Evidence(TypedDict):
    """A span of a document on which the answer rests."""

    passage_id: str
    document_id: str
    start: int
    """First character in the document."""
    end: int
    """One past the last character in the document."""
    text: str
    """Exactly these characters of the document."""


class QuestionRow(TypedDict):
    """A question as a JSON object."""

    query_id: str
    text: str
    answers: list[str]
    """Empty for an unanswerable question."""
    document_ids: list[str]
    """Empty for an unanswerable question."""
    split: str
    messages: NotRequired[list[dict[str, str]]]
    kind: QuestionKind
    passage_ids: list[str]
    """What it was written from."""
    evidence: list[Evidence]
    standalone: NotRequired[str]
    """A follow-up question in full."""
    rank: int
    """Place of the first hit of its document when the question is searched for, from 1; 0: not among `retrieval.top_k` hits."""
    generator: str
    prompt_version: int


def row_of(outcome: Outcome, query_id: str, split: str, passages: Mapping[str, Passage], generator: str) -> QuestionRow:
    """The line of a question that passed all filters.

    Args:
        outcome: with a draft.
        query_id: unique in the file.
        split: of the documents that it was written from.
        passages: by id, those that it was written from.
        generator: what wrote it.
    """
    draft, seed = outcome.draft, outcome.seed
    assert draft is not None
    is_answerable = seed.kind != "unanswerable"
    row: QuestionRow = {
        "query_id": query_id,
        "text": draft.question,
        "answers": [draft.answer] if is_answerable else [],
        "document_ids": list(documents_of(seed)) if is_answerable else [],
        "split": split,
        "kind": seed.kind,
        "passage_ids": list(seed.passage_ids),
        "evidence": [_evidence(span, passages[span.passage_id]) for span in outcome.evidence],
        "rank": outcome.rank,
        "generator": generator,
        "prompt_version": prompts.VERSION,
    }
    if draft.messages:
        row["messages"] = [dataclasses.asdict(message) for message in draft.messages]
        row["standalone"] = draft.standalone
    return row


def _evidence(span: Citation, passage: Passage) -> Evidence:
    text = passage.text[span.start - passage.start : span.end - passage.start]
    return {**dataclasses.asdict(span), "text": text}  # type: ignore[typeddict-item]  # the fields of Citation


def documents_of(seed: Seed) -> tuple[str, ...]:
    """The documents of the passages that a question is about, each once."""
    return tuple(dict.fromkeys(map(document_id_of, seed.passage_ids)))


def query_of(outcome: Outcome, query_id: str) -> Query:
    """The question with all documents that it was written from, also where they do not answer it, to draw its split by them."""
    documents = documents_of(outcome.seed)
    return Query(
        query_id, outcome.draft.question if outcome.draft else "", None, documents, (1.0,) * len(documents), "all"
    )


def refused_row(outcome: Outcome, reason: Reason) -> dict[str, object]:
    """The line of `refused.jsonl`: what was thrown out, and why."""
    draft = outcome.draft
    return {
        "reason": reason,
        "detail": outcome.detail,
        "kind": outcome.seed.kind,
        "passage_ids": list(outcome.seed.passage_ids),
        "text": draft.question if draft else "",
        "answer": draft.answer if draft else "",
        "evidence": list(draft.evidence) if draft else [],
    }


def dumped(outcome: Outcome) -> str:
    """An outcome as a line of JSON, for `loaded`."""
    return json.dumps(dataclasses.asdict(outcome), ensure_ascii=False)


def loaded(line: str) -> Outcome:
    """The outcome of a line from `dumped`."""
    value = json.loads(line)
    seed = Seed(**{**value.pop("seed"), "passage_ids": tuple(json.loads(line)["seed"]["passage_ids"])})
    given, evidence = value.pop("draft"), value.pop("evidence")
    draft = None
    if given:
        messages = tuple(Message(**each) for each in given.pop("messages"))
        draft = Draft(**{**given, "evidence": tuple(given["evidence"]), "messages": messages})
    return Outcome(seed, draft, evidence=tuple(Citation(**each) for each in evidence), **value)


def jsonl(rows: Sequence[Mapping[str, object]] | Sequence[QuestionRow]) -> str:
    """Rows as lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
