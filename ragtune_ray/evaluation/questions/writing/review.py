"""What people decide about written questions: accept, mend or reject. Every decision is kept at once, so a review can be resumed.

`NAME.jsonl` has the accepted and mended questions, and is a valid `queries.path`. `NAME.decisions.jsonl` has every decision, in
order; of two about one question, the later one counts. Several people may review at the same time, and several runs may be
reviewed into one file.
"""

from __future__ import annotations

import json
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
from ragtune_ray.storage import artifacts, filesystem, line_log

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
        ReviewError: the path has another ending or is a file that no review wrote, or a line of the decisions is damaged.
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
        if path.exists() and path.stat().st_size and not self.log.exists():
            raise ReviewError(
                f"{path}: was not written by a review: there is no {self.log.name} beside it. A review would replace it; name "
                "another file with --output"
            )
        line_log.mend(self.log, _decision)  # what was cut off is asked for again
        self._decisions = _read_decisions(self.log)

    def decision_at(self, place: int) -> Decision | None:
        """What was decided about the question at a place."""
        return self._decisions.get(self.questions[place]["query_id"])

    def words_at(self, place: int) -> tuple[str, Sequence[str]]:
        """The question at a place and its answers, as they were mended if they were."""
        row, decision = self.questions[place], self.decision_at(place)
        if decision is not None and decision.verdict == "mended":
            return decision.text, decision.answers
        return row["text"], row["answers"]

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
        line = json.dumps(asdict(decision), ensure_ascii=False) + "\n"
        line_log.append(self.log, line.encode("utf-8", "backslashreplace"))
        self.write()
        return decision

    def write(self) -> None:
        """Write the accepted and mended questions, after those of other runs that are in the file."""
        with line_log.locked(self.log):
            self._decisions = _read_decisions(self.log)  # another person may have decided meanwhile
            before = [json.loads(line) for line in _lines(self.path)] if self.path.exists() else []
            known = {row["query_id"] for row in self.questions}
            others = [row for row in before if row["query_id"] not in known]
            decided = [(row, self._decisions.get(row["query_id"])) for row in self.questions]
            kept = [_reviewed(row, each) for row, each in decided if each and each.verdict != "rejected"]
            filesystem.replace_text(str(self.path), jsonl([*others, *kept]))


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
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            decision = _decision(line)
        except ValueError as error:
            raise ReviewError(f"{path}:{number}: is damaged ({error}); correct or remove the line") from error
        found[decision.query_id] = decision
    return found


def _decision(line: bytes) -> Decision:
    try:
        value = json.loads(line)
        return Decision(**{**value, "answers": tuple(value["answers"])})
    except (TypeError, KeyError) as error:
        raise ReviewError(str(error)) from error


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
    return filesystem.json_lines(path.read_text(encoding="utf-8"))
