"""What a grader reads and returns: an answer without its origin, and its grade."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ragtune_ray import RagtuneError
from ragtune_ray.schema import Answer, Query


class GradingError(RagtuneError, ValueError):
    """Answers cannot be graded; the message names the setting to change."""


@dataclass(frozen=True, slots=True)
class Task:
    """An answer to grade. Nothing in it tells which arm it is from, so equal answers of two arms are one task."""

    query: str
    """The question, after the conversation before it."""
    golds: tuple[str, ...]
    """Gold answers; empty if none is known."""
    answer: str
    passages: tuple[str, ...] = ()
    """Texts of the passages against which it is checked, best first; empty if the metric needs none."""
    sentences: tuple[str, ...] = ()
    """Of the answer, where each of them is checked."""
    cited: tuple[tuple[int, ...], ...] = ()
    """For each sentence, places in `passages` that it cites."""

    def key(self) -> str:
        """The sha256 of its content, as hexadecimal digits."""
        text = json.dumps(dataclasses.astuple(self), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader found for one task."""

    values: Mapping[str, float] = field(default_factory=dict)
    """Metric -> value from 0 to 1; empty if grading failed."""
    reason: str = ""
    """The grader's reason in a sentence, if it gives one."""
    error: str = ""
    """Why grading failed; empty if it succeeded."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    """Prompts sent to a language model for it."""


class Grader(Protocol):
    """Grades answers by one metric."""

    def grade(self, tasks: Sequence[Task]) -> list[Grade]:
        """One grade per task, in the same order; a task that fails gets a grade with an `error`."""


def fixed_value(query: Query, answer: Answer) -> float | None:
    """The value of an answer that no model needs to read; None if one must.

    As for EM: a failed answer is 0. To an unanswerable question, abstaining is right (1) and any answer wrong (0). Abstaining
    from any other question is 0, and so is an empty answer.
    """
    abstained = answer.abstained and answer.status == "ok"
    if query.answers == ():
        return float(abstained)
    if abstained or answer.status == "failed" or not answer.answer.strip():
        return 0.0
    return None


def grade_from(found: Mapping[str, Any]) -> Grade:
    """A grade from its JSON object.

    Raises:
        GradingError: it has no values, or one is not from 0 to 1.
    """
    grade = Grade(**found)
    if not grade.values or not all(map(is_share, grade.values.values())):
        raise GradingError(f"grade {dict(grade.values)}: every value must be a number from 0 to 1")
    return grade


def is_share(value: object) -> bool:
    """Whether a JSON value is a number from 0 to 1.

    >>> is_share(0.5), is_share(True), is_share(float("nan"))
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
