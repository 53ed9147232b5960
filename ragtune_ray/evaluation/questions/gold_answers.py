"""Gold answers that metrics cannot use as they are: equal after normalization, blank, or stated by no document."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from ragtune_ray.config import Language
from ragtune_ray.evaluation.metrics.normalization import plain_marks, plain_numbers
from ragtune_ray.evaluation.questions.answer_kinds import EXTRACTIVE, kind_of
from ragtune_ray.index import contents, segments, versions
from ragtune_ray.ingest.splits import positives
from ragtune_ray.schema import Query

MOST_LOOKED_UP = 5000
_TELLING = frozenset("+#%<>=&@*/^~°$€£¥")
"""Signs that may change what an answer means; other punctuation seldom does."""
_PERCENT = re.compile(r"(?<=\d)\s*(?:%|per ?cent\b)")
_ARTICLES = ("a ", "an ", "the ")
Normalize = Callable[[str], str]


def alike(queries: Sequence[Query], language: Language, normalize: Normalize) -> list[tuple[str, ...]]:
    """Groups of gold answers that differ in a number or a telling sign, and are equal after `normalize`.

    >>> rows = [Query("a", "?", ("4.5", "C++"), (), (), "all"), Query("b", "?", ("45", "c"), (), (), "all")]
    >>> alike(rows, "en", lambda text: "".join(filter(str.isalnum, text.lower())))
    [('4.5', '45'), ('C++', 'c')]
    """
    texts = dict.fromkeys(text for query in queries for text in query.answers or ())
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for text in texts:
        groups[normalize(text)].setdefault(_plain(text, language), text)
    return [tuple(group.values()) for group in groups.values() if len(group) > 1 and _differ(tuple(group))]


def without_words(queries: Sequence[Query], normalize: Normalize) -> list[str]:
    """Ids of the questions with a gold answer of which `normalize` leaves nothing."""
    return [query.query_id for query in queries if any(not normalize(text) for text in query.answers or ())]


def _plain(text: str, language: Language) -> str:
    """A text without what never changes an answer: case, width, separators of thousands, articles before it, marks around it."""
    plain = plain_numbers(" ".join(plain_marks(text).casefold().split()), language)
    plain = _PERCENT.sub("%", plain)
    plain = next((plain.removeprefix(each) for each in _ARTICLES if plain.startswith(each)), plain)
    return plain.strip(" .,;:!?\"'“”‘’«»()[]。，！？")


def _differ(texts: Sequence[str]) -> bool:
    """Whether texts differ in telling signs, or in where their digits are separated."""
    signs = {tuple(sign for sign in text if sign in _TELLING) for text in texts}
    numbers = {tuple("".join(c if c.isdigit() else " " for c in text).split()) for text in texts}
    return len(signs) > 1 or len(numbers) > 1


@dataclasses.dataclass(frozen=True, slots=True)
class Grounding:
    """Whether the documents of questions contain their short gold answers."""

    checked: int
    """Questions that were looked up: a gold answer is a number, a date or a short phrase, and a document is in the index."""
    absent: tuple[str, ...]
    """Ids of those whose documents contain none of their gold answers."""


def look_up(queries: Sequence[Query], workspace: str, language: Language, normalize: Normalize) -> Grounding:
    """Look for short gold answers in the documents of their questions: in sequence, after `normalize`.

    At most `MOST_LOOKED_UP` questions, evenly over all of them, are looked up.

    Raises:
        ArtifactError: the workspace has no sound index.
    """
    version = versions.read_version(workspace, versions.current_version(workspace))
    asked = [query for query in queries if positives(query) and _is_extractive(query, language)]
    asked = asked[:: -(-len(asked) // MOST_LOOKED_UP) or 1]
    names = sorted({name for query in asked for name in positives(query)})
    found_in = contents.find_documents(workspace, version, names)
    used = {segment_id for places in found_in.values() for segment_id in places}
    passages = {
        entry.segment_id: segments.open_passages(workspace, entry.segment_id, entry.manifest_sha256)
        for entry in version.entries
        if entry.segment_id in used
    }
    texts: dict[str, str] = {}
    for name, places in found_in.items():
        parts = [_text(passages[segment_id], ordinals) for segment_id, ordinals in places.items()]
        texts[name] = f" {normalize(chr(10).join(parts))} "
    found = {query.query_id: [texts[name] for name in positives(query) if name in texts] for query in asked}
    absent = [
        query.query_id
        for query in asked
        if found[query.query_id]
        and not any(f" {normalize(gold)} " in text for gold in query.answers or () for text in found[query.query_id])
    ]
    return Grounding(sum(map(bool, found.values())), tuple(absent))


def _is_extractive(query: Query, language: Language) -> bool:
    return kind_of(query, language) in EXTRACTIVE


def _text(passages: pa.Table, ordinals: np.ndarray) -> str:
    """The title and the passages of a document."""
    rows = segments.take_rows(passages.select(["title", "text"]), ordinals).to_pylist()
    return "\n".join([rows[0]["title"], *(row["text"] for row in rows)])
