"""Chooses among the questions that passed their own checks: no two the same, not too many about a document, as many as wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ragtune_ray.config import Language, Normalization
from ragtune_ray.config.evaluation import QuestionKind, Questions
from ragtune_ray.evaluation.metrics.answers import token_f1
from ragtune_ray.evaluation.metrics.normalization import normalize_answer
from ragtune_ray.evaluation.questions.writing.agreement import says_the_same
from ragtune_ray.evaluation.questions.writing.filters import REASONS, Reason
from ragtune_ray.evaluation.questions.writing.making import Outcome
from ragtune_ray.evaluation.questions.writing.rows import documents_of

SAME_WORDS = 0.9
"""Token F1 from which questions about different documents have nearly the same words."""
Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts to unit vectors, (num_texts, dimension)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which questions are kept."""

    kept: tuple[Outcome, ...]
    refused: tuple[tuple[Outcome, Reason], ...]

    def counts(self) -> dict[str, int]:
        """Reason -> number of questions thrown out for it, in the order of the filters."""
        found = Counter(reason for _, reason in self.refused)
        return {reason: found[reason] for reason in REASONS if found[reason]}

    def kinds(self) -> dict[str, int]:
        """Kind -> number of questions kept."""
        return dict(Counter(outcome.seed.kind for outcome in self.kept))


def select(
    outcomes: Sequence[Outcome],
    wanted: Mapping[QuestionKind, int],
    rule: Questions,
    language: Language,
    normalization: Normalization,
    encode: Encode,
) -> Selection:
    """Keep the first good questions of each kind.

    Args:
        outcomes: in the order in which passages were drawn; an earlier one is preferred.
        wanted: number of questions of each kind.
        rule: the section `questions`.
        language: of the questions.
        normalization: `evaluate.normalization`.
        encode: the encoder of queries.
    """
    passed = [outcome for outcome in outcomes if not outcome.reason]
    repeats = _Repeats(rule.near_duplicate, language, normalization, _vectors(passed, encode))
    kept: list[Outcome] = []
    refused = [(outcome, outcome.reason) for outcome in outcomes if outcome.reason]
    per_document: Counter[str] = Counter()
    of_kind: Counter[QuestionKind] = Counter()
    for place, outcome in enumerate(passed):
        documents, kind = documents_of(outcome.seed), outcome.seed.kind
        reason = repeats.problem(place, outcome)
        if not reason and max(per_document[name] for name in documents) >= rule.per_document:
            reason = "enough about its document"
        if not reason and of_kind[kind] >= wanted.get(kind, 0):
            reason = "not needed"
        if reason:
            refused.append((outcome, reason))
            continue
        repeats.add(place, outcome)
        kept.append(outcome)
        per_document.update(documents)
        of_kind[kind] += 1
    return Selection(tuple(kept), tuple(refused))


def _vectors(outcomes: Sequence[Outcome], encode: Encode) -> np.ndarray:
    texts = [outcome.draft.full_question for outcome in outcomes if outcome.draft]
    return encode(texts) if texts else np.empty((0, 0), dtype=np.float32)


class _Repeats:
    """Finds questions that were kept already, in the same words or in others.

    Questions of a corpus are alike in form, so a high cosine alone proves nothing: "When was Apollo 11 launched?" and "When was
    Apollo 12 launched?" are close, and both are wanted. Two questions with a high cosine are the same if they have the same
    answer, or neither has any, and are about one document; across documents, nearly all of their words must be equal, too.
    """

    def __init__(self, threshold: float, language: Language, normalization: Normalization, vectors: np.ndarray) -> None:
        self._threshold, self._language, self._normalization = threshold, language, normalization
        self._vectors = vectors
        self._places: list[int] = []
        self._kept: list[Outcome] = []
        self._words: set[str] = set()

    def problem(self, place: int, outcome: Outcome) -> Reason | None:
        if self._key(outcome) in self._words:
            return "duplicate"
        if not self._places:
            return None
        cosines = self._vectors[self._places] @ self._vectors[place]
        near = np.flatnonzero(cosines >= self._threshold)
        same = (self._same(outcome, self._kept[number]) for number in near)
        return "near duplicate" if any(same) else None

    def add(self, place: int, outcome: Outcome) -> None:
        assert outcome.draft is not None
        self._places.append(place)
        self._kept.append(outcome)
        self._words.add(self._key(outcome))

    def _key(self, outcome: Outcome) -> str:
        assert outcome.draft is not None
        return normalize_answer(outcome.draft.full_question, self._language, self._normalization)

    def _same(self, outcome: Outcome, other: Outcome) -> bool:
        assert outcome.draft is not None
        assert other.draft is not None
        given, known = outcome.draft.answer, other.draft.answer
        if bool(given) != bool(known):
            return False
        if given and not says_the_same(given, [known], self._language, self._normalization):
            return False
        if set(documents_of(outcome.seed)) & set(documents_of(other.seed)):
            return True
        asked = outcome.draft.full_question, [other.draft.full_question]
        return bool(given) and token_f1(*asked, self._language, self._normalization) >= SAME_WORDS
