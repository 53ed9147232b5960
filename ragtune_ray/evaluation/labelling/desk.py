"""Where a person labels: what comes next, and where grades go. The browser and the terminal both work on one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ragtune_ray.evaluation.labelling import labels
from ragtune_ray.evaluation.labelling.drawing import Item, Source
from ragtune_ray.evaluation.labelling.labels import GRADES, Key, Label, LabelError


@dataclass(slots=True)
class Desk:
    """One person's work on a list of items. Each grade is on the disk before the next item is shown."""

    items: Sequence[Item]
    sources: Callable[[str], Sequence[Source]]
    """The passages that any answer to a question was shown, by query id."""
    path: Path
    """The file of labels."""
    labeller: str
    given: dict[Key, float] = field(init=False)
    """This person's grades, those of earlier sessions included."""

    def __post_init__(self) -> None:
        questions = {item.query_id: item.query for item in self.items}
        found = labels.read(str(self.path)).with_questions(questions).by_labeller()
        self.given = {key: grades[self.labeller] for key, grades in found.items() if self.labeller in grades}

    def next_place(self, skipped: Collection[int] = ()) -> int | None:
        """The first item with an answer that this person has not graded, without the skipped ones; None: there is none."""
        open_places = (place for place, item in enumerate(self.items) if not self._is_done(item))
        return next((place for place in open_places if place not in skipped), None)

    def num_done(self) -> int:
        """Items that this person has graded in full."""
        return sum(map(self._is_done, self.items))

    def grades_at(self, place: int) -> list[float | None]:
        """This person's grades of the answers of an item; None: not graded yet."""
        return [self.given.get(key) for key in self.items[place].keys]

    def grade(self, place: int, grades: Sequence[float]) -> None:
        """Append the grades of an item's answers to the file; they replace earlier ones by the same person.

        Raises:
            LabelError: there is no such item, or not one grade of `GRADES` per answer.
        """
        if not 0 <= place < len(self.items):
            raise LabelError(f"place {place}: there are {len(self.items)} items")
        item = self.items[place]
        if len(grades) != len(item.answers) or any(grade not in GRADES.values() for grade in grades):
            raise LabelError(f"grades {list(grades)}: each of the {len(item.answers)} answers needs 0, 0.5 or 1")
        time = labels.now()
        labels.append(
            self.path,
            [
                Label(item.query_id, item.query, answer, float(grade), self.labeller, time)
                for answer, grade in zip(item.answers, grades, strict=True)
            ],
        )
        self.given |= zip(item.keys, map(float, grades), strict=True)

    def _is_done(self, item: Item) -> bool:
        return all(key in self.given for key in item.keys)
