"""What people decide about written questions: accept, mend or reject. Every decision is kept at once, so a review can be resumed.

`NAME.jsonl` has the accepted and mended questions, and is a valid `queries.path`. `NAME.decisions.jsonl` has every decision, in
order; of two about one question, the later one counts.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ragtune_ray import RagtuneError
from ragtune_ray.evaluation.questions.writing.rows import QuestionRow, jsonl
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import query_from_row
from ragtune_ray.storage import artifacts, filesystem

Verdict = Literal["accepted", "mended", "rejected"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class ReviewError(RagtuneError, ValueError):
    """A review cannot begin or go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person decided about a question."""

    query_id: str
    verdict: Verdict
    reviewer: str
    time: str
    """In UTC, such as 2026-11-30T12:00:00Z."""
    text: str = ""
    """The mended question; empty if it was not mended."""
    answers: tuple[str, ...] = ()
    """The mended answers."""


class Desk:
    """The questions to review, and the decisions so far.

    Args:
        questions: in the order in which they are shown.
        passages: passage id -> text and title, as in `passages.jsonl`.
        path: `NAME.jsonl`, where accepted and mended questions go.
        reviewer: who decides.

    Raises:
        ReviewError: the path has another ending, or a line of the decisions is damaged.
    """

    def __init__(
        self, questions: Sequence[QuestionRow], passages: dict[str, dict[str, Any]], path: Path, reviewer: str
    ) -> None:
        if path.suffix != ".jsonl":
            raise ReviewError(f"{path}: reviewed questions are written as .jsonl; name such a file")
        if not questions:
            raise ReviewError("there are no questions to review")
        self.questions, self.passages, self.path, self.reviewer = list(questions), passages, path, reviewer
        self.log = path.with_suffix(".decisions.jsonl")
        self._decisions = _read_decisions(self.log)
        known = {row["query_id"] for row in self.questions}
        self.num_foreign = len(self._decisions.keys() - known)
        """Decisions about questions that are not in this file; they are kept, and change nothing."""

    def decision_at(self, place: int) -> Decision | None:
        """What was decided about the question at a place."""
        return self._decisions.get(self.questions[place]["query_id"])

    def num_done(self) -> int:
        """Number of these questions that are decided."""
        return sum(row["query_id"] in self._decisions for row in self.questions)

    def counts(self) -> dict[str, int]:
        """Verdict -> number of questions."""
        found = Counter(each.verdict for place in range(len(self.questions)) if (each := self.decision_at(place)))
        return {verdict: found[verdict] for verdict in VERDICTS}

    def next_place(self, skipped: Collection[int] = ()) -> int | None:
        """The first question that is neither decided nor skipped, or else the first that is not decided; None if all are."""
        pending = [place for place in range(len(self.questions)) if self.decision_at(place) is None]
        return next((place for place in pending if place not in skipped), pending[0] if pending else None)

    def decide(self, place: int, verdict: Verdict, text: str = "", answers: Sequence[str] = ()) -> Decision:
        """Keep a decision, and write the file of reviewed questions.

        Args:
            place: of the question.
            verdict: a mended question needs a `text`, and `answers` unless it is unanswerable.
            text: the mended question.
            answers: the mended answers.

        Raises:
            ReviewError: there is no such question, or the mended one is not a valid query.
        """
        if not 0 <= place < len(self.questions):
            raise ReviewError(f"there are {len(self.questions)} questions; number {place} is not one of them")
        row = self.questions[place]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        decision = Decision(row["query_id"], verdict, self.reviewer, now)
        if verdict == "mended":
            kept = tuple(answer.strip() for answer in answers if answer.strip())
            decision = Decision(row["query_id"], verdict, self.reviewer, now, text.strip(), kept)
            try:
                query_from_row(_reviewed(row, decision))
            except ParseError as error:
                raise ReviewError(f"the mended question cannot be used: {error}") from error
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(decision), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._decisions[decision.query_id] = decision
        self.write()
        return decision

    def write(self) -> None:
        """Write the accepted and mended questions."""
        decided = [(row, self._decisions.get(row["query_id"])) for row in self.questions]
        kept = [_reviewed(row, each) for row, each in decided if each and each.verdict != "rejected"]
        filesystem.replace_text(str(self.path), jsonl(kept))


def _reviewed(row: QuestionRow, decision: Decision) -> dict[str, object]:
    """A question as it was decided, with who decided it and when."""
    changes = {"text": decision.text, "answers": list(decision.answers)} if decision.verdict == "mended" else {}
    if changes and "standalone" in row:
        changes["standalone"] = ""  # it belonged to the old words
    return {
        **row,
        **changes,
        "review": {"verdict": decision.verdict, "reviewer": decision.reviewer, "time": decision.time},
    }


def _read_decisions(path: Path) -> dict[str, Decision]:
    if not path.exists():
        return {}
    found: dict[str, Decision] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            continue  # the process was killed while it wrote; that decision is asked for again
        try:
            value = json.loads(line)
            decision = Decision(**{**value, "answers": tuple(value["answers"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ReviewError(f"{path}:{number}: is damaged ({error}); correct or remove the line") from error
        found[decision.query_id] = decision
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
    return found


def open_desk(source: str, path: Path, reviewer: str) -> Desk:
    """Open the questions of a run of `ragtune questions`, or of the file `questions.jsonl` in it, for a review.

    Raises:
        ReviewError: the source is neither.
        ArtifactError: the run is damaged.
    """
    url = source.rstrip("/").removesuffix("/questions.jsonl")
    try:
        folder = artifacts.open_artifact(url, "questions").path
    except artifacts.ArtifactError as error:
        raise ReviewError(f"{source}: is not a run of `ragtune questions`: {error}") from error
    rows: list[QuestionRow] = [json.loads(line) for line in _lines(folder / "questions.jsonl")]
    passages = {row["passage_id"]: row for row in map(json.loads, _lines(folder / "passages.jsonl"))}
    return Desk(rows, passages, path, reviewer)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
