"""Reads what a generator wrote: a question, its answer and its evidence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ragtune_ray.config.evaluation import QuestionKind
from ragtune_ray.evaluation.grading.asking import ReplyError
from ragtune_ray.ingest.parsing.text import clean
from ragtune_ray.schema import Message

MAX_CHARACTERS = 2_000
"""Longest text of a field."""
MAX_EVIDENCE = 8
_LABEL = re.compile(r"^\W*(?:question|q|问题|問題)\s*\d*\s*[:：]\W*", re.IGNORECASE)
_QUESTION_END = re.compile(r"[?？]")


@dataclass(frozen=True, slots=True)
class Draft:
    """A question as a generator wrote it, before any filter."""

    question: str
    answer: str = ""
    """Empty for an unanswerable question."""
    evidence: tuple[str, ...] = ()
    """Sentences that the generator claims to have copied."""
    messages: tuple[Message, ...] = ()
    """The conversation before a follow-up question."""
    standalone: str = ""
    """A follow-up question in full; otherwise empty."""

    @property
    def full_question(self) -> str:
        """The question in words that make sense without a conversation."""
        return self.standalone or self.question


def draft_of(kind: QuestionKind, value: dict[str, Any]) -> Draft:
    """Make a draft from the JSON object of a reply.

    >>> draft_of("fact", {"question": "How high is it?", "answer": "330 m", "evidence": "It is 330 m high."}).evidence
    ('It is 330 m high.',)

    Raises:
        ReplyError: a field is missing, of another type, blank or too long.
    """
    question = _text(value, "question")
    if kind == "unanswerable":
        return Draft(question)
    answer, evidence = _text(value, "answer"), _evidence(value)
    if kind != "follow_up":
        return Draft(question, answer, evidence)
    first = (
        Message("user", _text(value, "first_question")),
        Message("assistant", _text(value, "first_answer")),
    )
    return Draft(question, answer, evidence, first, _text(value, "standalone"))


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)  # a year or a number, written without quotation marks
    if not isinstance(found, str):
        raise ReplyError(f'"{name}" must be a text, found {"nothing" if found is None else type(found).__name__}')
    text = " ".join(clean(found).split())
    if not text or set(text) == {"."}:
        raise ReplyError(f'"{name}" is empty')
    if len(text) > MAX_CHARACTERS:
        raise ReplyError(f'"{name}" has {len(text):,} characters; write at most {MAX_CHARACTERS:,}')
    return text


def _evidence(value: dict[str, Any]) -> tuple[str, ...]:
    found = value.get("evidence")
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        raise ReplyError('"evidence" must be a list of texts, with at least one')
    if len(found) > MAX_EVIDENCE:
        raise ReplyError(f'"evidence" has {len(found)} texts; copy at most {MAX_EVIDENCE}')
    return tuple(_text({"evidence": each}, "evidence") for each in found)


def question_in(text: str) -> str:
    """Extract the first question from a reply that is plain text, without a label before it; without a question the whole text.

    >>> question_in("Question: Who was first on the Moon? Answer: Armstrong. Who was second?")
    'Who was first on the Moon?'
    """
    plain = _LABEL.sub("", " ".join(text.split()))
    end = _QUESTION_END.search(plain)
    return plain[: end.end()] if end else plain
