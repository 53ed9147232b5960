"""Questions that are asked twice: with other answers, or in two splits, so that a model was trained on a test question."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.ingest.chunking import UNSPACED_SCRIPTS
from ragtune_ray.schema import Query

NEAR = 0.85
"""Two questions nearly repeat each other if their words overlap by this share, weighted by how rare the words are here."""
FEWEST_WORDS = 4
"""Shorter questions are compared for equality alone."""
MOST_WITH_WORD = 200
"""A word that more questions have does not lead from one question to others."""
SHOWN = 3
_WORD = regex.compile(rf"[{UNSPACED_SCRIPTS}]\p{{M}}*|[^\W{UNSPACED_SCRIPTS}]+")
Normalize = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Questions that are asked more than once; examples are pairs of query ids."""

    texts: int
    """Texts that several questions have, without case and punctuation."""
    in_two_splits: int
    """Of them, those in two splits."""
    contradicting: int
    """Of them, those with gold answers of which none equals one of the other question."""
    nearly_in_two_splits: int
    """Questions with a nearly equal one in another split."""
    examples: tuple[tuple[str, ...], ...]
    contradicting_examples: tuple[tuple[str, ...], ...]
    near_examples: tuple[tuple[str, ...], ...]


def find_repeats(queries: Sequence[Query], normalize: Normalize) -> Repeats:
    """Find questions that are repeated, with the gold answers compared after `normalize`.

    >>> rows = [Query("a", "Who is it?", ("Ann",), (), (), "train"), Query("b", "who is it", ("Bob",), (), (), "test")]
    >>> found = find_repeats(rows, str.lower)
    >>> found.texts, found.in_two_splits, found.contradicting
    (1, 1, 1)
    """
    texts: dict[str, list[Query]] = {}
    for row in queries:
        texts.setdefault(_plain(row), []).append(row)
    repeated = [rows for rows in texts.values() if len(rows) > 1]
    crossing = [rows for rows in repeated if len({row.split for row in rows}) > 1]
    against = [pair for rows in repeated if (pair := _contradiction(rows, normalize))]
    near = list(_near({text: rows[0] for text, rows in texts.items()}))
    return Repeats(
        len(repeated),
        len(crossing),
        len(against),
        len({pair[0] for pair in near}),
        tuple(tuple(row.query_id for row in rows[:SHOWN]) for rows in (crossing or repeated)[:SHOWN]),
        tuple(against[:SHOWN]),
        tuple(near[:SHOWN]),
    )


def _plain(query: Query) -> str:
    """The words of a question, with those of the conversation before it."""
    said = " ".join([*(message.content for message in query.messages), query.text])
    return " ".join(_WORD.findall(said.casefold())) or query.text


def _contradiction(rows: Sequence[Query], normalize: Normalize) -> tuple[str, ...]:
    """Ids of two of these questions whose gold answers have nothing in common; empty if there are none."""
    known = [row for row in rows if row.answers is not None]
    for row in known[1:]:
        first, second = ({normalize(text) for text in each.answers or ()} for each in (known[0], row))
        if first.isdisjoint(second) and (first or second):
            return known[0].query_id, row.query_id
    return ()


def _near(first: Mapping[str, Query]) -> Iterator[tuple[str, str]]:
    """Pairs of questions of two splits that nearly repeat each other; text -> the first question that has it."""
    if len({row.split for row in first.values()}) < 2:
        return
    bags = {text: frozenset(text.split()) for text in first}
    counts = Counter(word for bag in bags.values() for word in bag)
    weights = {word: math.log1p(len(bags) / count) for word, count in counts.items()}
    having: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for text, bag in bags.items():
        if len(bag) < FEWEST_WORDS:
            continue
        leading = _leading(bag, weights)
        for other in {other for word in leading for other in having[word]}:
            if (
                first[other].split != first[text].split
                and _overlap(bag, bags[other], weights) >= NEAR
                and other not in seen
            ):
                seen.add(other)
                yield first[other].query_id, first[text].query_id
        for word in leading:
            if counts[word] <= MOST_WITH_WORD:
                having[word].append(text)


def _leading(bag: frozenset[str], weights: Mapping[str, float]) -> list[str]:
    """The rarest words of a question, of which one that nearly repeats it must have at least one."""
    words = sorted(bag, key=lambda word: (-weights[word], word))
    left = sum(weights[word] for word in words)
    needed = NEAR * left
    found = []
    for word in words:
        if left < needed:
            break
        found.append(word)
        left -= weights[word]
    return found


def _overlap(one: frozenset[str], other: frozenset[str], weights: Mapping[str, float]) -> float:
    """Weight of the words that both have, divided by that of the words that one has."""
    return sum(weights[word] for word in one & other) / sum(weights[word] for word in one | other)
