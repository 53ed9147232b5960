"""What people are asked to label: questions in a random order, and the answers to each, two at a time, without their arms."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ragtune_ray.evaluation.labelling.labels import Key
from ragtune_ray.schema import Passage, Query


@dataclass(frozen=True, slots=True)
class Item:
    """What a person sees at once."""

    query_id: str
    query: str
    golds: tuple[str, ...] | None
    """Gold answers; empty: the documents are known to have none; None: not known."""
    answers: tuple[str, ...]
    """One or two answers to grade."""
    history: tuple[tuple[str, str], ...] = ()
    """(role, content) of the conversation before the question, oldest first."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """What its labels are of."""
        return tuple((self.query_id, self.query, answer) for answer in self.answers)

    @property
    def digest(self) -> str:
        """Tells the item from those of another session, where its place may have another one."""
        return _digest(0, self.query_id, self.query, *self.answers).hex()[:32]


@dataclass(frozen=True, slots=True)
class Source:
    """A passage that an answer could use, shown to judge it."""

    title: str
    document_id: str
    text: str


def ordered(query_ids: Iterable[str], seed: int) -> list[str]:
    """Query ids in a random order that depends on each id and the seed alone.

    So any number of the first is a random sample, more labels extend it, and a question that is added changes no other's place.

    >>> ordered(["a", "b", "c"], seed=0) == [name for name in ordered(["d", "a", "c", "b"], seed=0) if name != "d"]
    True
    """
    return sorted(query_ids, key=lambda name: _digest(seed, name))


def items(queries: Sequence[Query], answers: Mapping[str, Mapping[str, str]], seed: int) -> list[Item]:
    """Everything that is shown for these questions, in order; equal answers of two arms are shown once.

    Args:
        queries: the questions, in the order of `ordered`.
        answers: arm -> query id -> text of its answer.
        seed: of the order of the answers to each question.
    """
    found = []
    for query in queries:
        texts = {texts[query.query_id] for texts in answers.values() if query.query_id in texts}
        mixed = sorted(texts, key=lambda text: _digest(seed, query.query_id, text))
        found += [
            Item(query.query_id, query.text, query.answers, tuple(mixed[start : start + 2]), query.history)
            for start in range(0, len(mixed), 2)
        ]
    return found


def sources_of(passages: Iterable[Sequence[Passage]]) -> list[Source]:
    """The passages of several answers, each once, in the order in which the answers were shown them."""
    found = {passage.passage_id: passage for shown in passages for passage in shown}
    return [Source(each.title, each.document_id, each.text) for each in found.values()]


def _digest(seed: int, *names: str) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *names]).encode("utf-8", "surrogatepass")).digest()
