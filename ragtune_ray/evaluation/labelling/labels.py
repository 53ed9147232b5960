"""The file of labels: JSON lines, one for each answer and person, appended and never rewritten.

A label belongs to a question and the text of an answer, not to a run, so it holds in every run that gives this answer.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragtune_ray import RagtuneError, config, schema
from ragtune_ray.storage import filesystem, line_log

GRADES: dict[str, float] = {"wrong": 0.0, "partly": 0.5, "right": 1.0}
"""Word for a grade -> its value."""

Key = tuple[str, str, str]
"""Query id, text of the question and text of an answer: another question may have the same id in another file."""


class LabelError(RagtuneError, ValueError):
    """Labels cannot be written, or there is nothing to label; the message names the next step."""


@dataclass(frozen=True, slots=True)
class Label:
    """One person's grade of one answer; a line of the file."""

    query_id: str
    query: str
    answer: str
    grade: float
    """0 wrong, 0.5 partly right, 1 right."""
    labeller: str
    time: str
    """ISO 8601, in UTC."""

    @property
    def key(self) -> Key:
        """What the label is of."""
        return self.query_id, self.query, self.answer


@dataclass(frozen=True, slots=True)
class Labels:
    """The content of a file of labels."""

    rows: tuple[Label, ...] = ()
    """In the order in which they were given."""
    rejects: tuple[str, ...] = ()
    """Lines that are no labels, each with its number and the reason."""
    path: str = ""
    """The file that they are from."""

    def with_questions(self, questions: Mapping[str, str]) -> Labels:
        """The same; a label without the text of its question gets it from `questions`, query id -> text."""
        rows = (
            row if row.query else dataclasses.replace(row, query=questions.get(row.query_id, "")) for row in self.rows
        )
        return dataclasses.replace(self, rows=tuple(rows))

    def by_labeller(self) -> dict[Key, dict[str, float]]:
        """Answer -> labeller -> grade; of several labels by one person the last counts."""
        found: dict[Key, dict[str, float]] = {}
        for row in self.rows:
            found.setdefault(row.key, {})[row.labeller] = row.grade
        return found

    def grades(self) -> dict[Key, float]:
        """Answer -> the mean grade of its labellers, from 0 to 1."""
        return {key: sum(given.values()) / len(given) for key, given in self.by_labeller().items()}

    def identity(self) -> list[list[Any]]:
        """What a comparison depends on, as JSON values: every grade that counts, in any order of the file."""
        return sorted([*key, name, grade] for key, given in self.by_labeller().items() for name, grade in given.items())


def path_of(settings: config.Config) -> str:
    """Where the labels are: `evaluate.labels_path`, by default in the workspace."""
    return settings.evaluate.labels_path or filesystem.join(settings.workspace, "labels.jsonl")


def read(url: str) -> Labels:
    """Read a file of labels; without a file there are no labels. Lines that are no labels are listed, not used."""
    return dataclasses.replace(parse(filesystem.read_bytes(url)) if filesystem.exists(url) else Labels(), path=url)


def parse(content: bytes) -> Labels:
    r"""The labels in the content of a file.

    >>> parse(b'{"query_id": "q", "answer": "A", "grade": 2}\n').rejects
    ('line 1: grade 2 is none of 0, 0.5 and 1',)
    """
    rows, rejects = list[Label](), list[str]()
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_label(line))
        except LabelError as error:
            rejects.append(f"line {number}: {error}")
    return Labels(tuple(rows), tuple(rejects))


def _label(line: bytes) -> Label:
    try:
        found = json.loads(line)
    except ValueError:  # also of bytes that are no UTF-8
        raise LabelError("this is no JSON object") from None
    if not isinstance(found, dict):
        raise LabelError("this is no JSON object")
    for name in ("query_id", "answer"):
        if not isinstance(found.get(name), str):
            raise LabelError(f"{name} must be a text")
    grade = found.get("grade")
    if not isinstance(grade, int | float) or isinstance(grade, bool) or grade not in GRADES.values():
        raise LabelError(f"grade {grade} is none of 0, 0.5 and 1")
    texts = {name: str(found.get(name) or "") for name in ("query", "labeller", "time")}
    return Label(found["query_id"], texts["query"], found["answer"], float(grade), texts["labeller"], texts["time"])


def now() -> str:
    """The time of a label that is given now."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def append(path: Path, given: Iterable[Label]) -> None:
    """Add labels to a file, and wait until they are on the disk. Another process may append at the same time."""
    lines = (json.dumps(dataclasses.asdict(label), ensure_ascii=False) + "\n" for label in given)
    line_log.append(path, "".join(lines).encode("utf-8", "backslashreplace"))


def mend(path: Path) -> str:
    """Move a torn last line, which a crash left, to the file beside it that ends with `.torn`; say so, or return "".

    A last line that lacks only its line break is a label, and gets one.
    """
    torn = line_log.mend(path, _label)
    return (
        f"{path}: its last line was cut off in the middle, and is now in {torn}; give this label again" if torn else ""
    )


def local_path(url: str) -> Path:
    """The local file to which labels are appended.

    Raises:
        LabelError: the labels are in an object store, where nothing can be appended.
    """
    if not filesystem.is_local(url):
        raise LabelError(f"{url}: labels are appended to a local file; set evaluate.labels_path to one")
    return Path(filesystem.locate(url)[1])


def keys(answers: Iterable[schema.Answer]) -> dict[str, Key]:
    """Query id -> what a label of the answer is of."""
    return {row.query_id: (row.query_id, row.query, row.answer) for row in answers}


def of_arms(answers: Mapping[str, Mapping[str, Key]], given: Labels) -> dict[str, dict[str, float]]:
    """Arm -> query id -> the people's grade of the arm's answer; answers without a label are left out.

    Args:
        answers: arm -> query id -> its answer.
        given: the labels, each with the text of its question.
    """
    grades = given.grades()
    return {
        arm: {query_id: grades[key] for query_id, key in keys.items() if key in grades} for arm, keys in answers.items()
    }


def num_others(answers: Mapping[str, Mapping[str, Key]], given: Labels) -> int:
    """The number of labelled answers that no arm gave, such as those of another run."""
    known = {key for keys in answers.values() for key in keys.values()}
    return len(given.by_labeller().keys() - known)


def shared(labelled: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """The questions for which every arm's answer has a label."""
    return sorted(set.intersection(*map(set, labelled.values()))) if labelled else []
