"""Draws the passages to write questions about: spread over documents, subjects, lengths of documents, and places in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ragtune_ray import RagtuneError
from ragtune_ray.config.evaluation import QuestionKind
from ragtune_ray.schema import Passage

MIN_CHARACTERS = 80
"""Shorter passages, such as headings, have too little to ask about."""
MAX_CLUSTERS = 64
LENGTHS = 3
"""Classes of documents by length, of equal size: short, medium, long."""
MIN_RELATED, MAX_RELATED = 0.3, 0.97
"""Cosines of two passages that a comparison can be about: they share a subject, and are no copies of each other."""
MAX_TURNS = 3
"""A passage is drawn again, and the generator samples another question, when a kind has used all passages."""


class DrawingError(RagtuneError, ValueError):
    """No passage can be asked about."""


@dataclass(frozen=True, slots=True)
class Seed:
    """What one question is to be written about."""

    kind: QuestionKind
    passage_ids: tuple[str, ...]
    """One passage, or two for a comparison."""
    turn: int = 0
    """How often the passage was drawn for this kind before."""


def is_usable(passage: Passage) -> bool:
    """Whether a passage has enough text to ask about."""
    return len(passage.text.strip()) >= MIN_CHARACTERS


def clusters_of(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Group passages by subject with k-means.

    Args:
        vectors: of the passages, (num_passages, dimension) float32.
        seed: of the first centres.

    Returns:
        The number of each passage's cluster, (num_passages,): about sqrt(num_passages / 2) clusters, at most `MAX_CLUSTERS`.
    """
    count = min(MAX_CLUSTERS, max(1, round((len(vectors) / 2) ** 0.5)))
    if count == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    from sklearn.cluster import MiniBatchKMeans

    return np.asarray(MiniBatchKMeans(count, random_state=seed, n_init=3).fit_predict(vectors), dtype=np.int64)


def spread(passages: Sequence[Passage], clusters: np.ndarray, seed: int) -> list[int]:
    """Order passages so that any first part of the order covers the corpus.

    The first passage of every document comes before the second of any. Among equals, clusters of passages and lengths of
    documents take turns; within a document, passages of another cluster come first, at any place in it.

    Args:
        passages: the usable ones.
        clusters: of the passages, (num_passages,).
        seed: of the order among equals.

    Returns:
        Places in `passages`.
    """
    order = np.random.default_rng(seed).permutation(len(passages)).tolist()
    lengths = _length_classes(passages)
    seen: Counter[tuple[str, int]] = Counter()
    in_document = {}
    for place in order:
        key = (passages[place].document_id, int(clusters[place]))
        in_document[place] = seen[key]
        seen[key] += 1
    turns: Counter[str] = Counter()
    strata: Counter[tuple[int, int, int]] = Counter()
    ranked = []
    for number, place in enumerate(sorted(order, key=in_document.__getitem__)):
        document_id = passages[place].document_id
        turn = turns[document_id]
        turns[document_id] += 1
        stratum = (turn, int(clusters[place]), lengths[document_id])
        ranked.append((turn, strata[stratum], number, place))
        strata[stratum] += 1
    return [place for *_, place in sorted(ranked)]


def _length_classes(passages: Sequence[Passage]) -> dict[str, int]:
    """Document -> 0 to `LENGTHS` - 1, from the last character that any of its passages reaches."""
    ends: dict[str, int] = {}
    for passage in passages:
        ends[passage.document_id] = max(passage.end, ends.get(passage.document_id, 0))
    ranked = sorted(ends, key=lambda name: (ends[name], name))
    return {name: place * LENGTHS // len(ranked) for place, name in enumerate(ranked)}


def counts_of(count: int, shares: Mapping[QuestionKind, float]) -> dict[QuestionKind, int]:
    """Divide a number of questions among the kinds, by largest remainder.

    >>> counts_of(10, {"fact": 2, "comparison": 1})
    {'fact': 7, 'comparison': 3}
    """
    total = sum(shares.values())
    exact = {kind: count * share / total for kind, share in shares.items() if share}
    found = {kind: int(value) for kind, value in exact.items()}
    missing = count - sum(found.values())
    for kind in sorted(exact, key=lambda kind: found[kind] - exact[kind])[:missing]:
        found[kind] += 1
    return found


def seeds_of(
    ordered: Sequence[Passage],
    counts: Mapping[QuestionKind, int],
    max_draws: int,
    related: Callable[[Sequence[Passage]], Sequence[str]],
) -> dict[QuestionKind, list[Seed]]:
    """What to ask about, for every kind: `max_draws` times as much as is wanted, as far as the passages reach.

    Each kind begins where the one before ends, so that kinds do not all ask about the same passages.

    Args:
        ordered: the usable passages, in the order of `spread`.
        counts: questions that are wanted of each kind.
        max_draws: passages to try for each.
        related: for each passage, the id of the passage to compare it with; "" if there is none.

    Raises:
        DrawingError: there are no passages.
    """
    if not ordered:
        raise DrawingError(
            f"no passage of {MIN_CHARACTERS} characters or more may be asked about; index more documents"
        )
    found: dict[QuestionKind, list[Seed]] = {}
    start = 0
    for kind, count in counts.items():
        turned = [*ordered[start % len(ordered) :], *ordered[: start % len(ordered)]]
        groups: list[tuple[str, ...]] = [(passage.passage_id,) for passage in turned]
        if kind == "comparison":
            groups = _pairs(turned[: count * max_draws], related)
        wanted = count * max_draws
        drawn = [Seed(kind, group, turn) for turn in range(MAX_TURNS) for group in groups]
        found[kind] = drawn[:wanted]
        start += count
    return found


def _pairs(passages: Sequence[Passage], related: Callable[[Sequence[Passage]], Sequence[str]]) -> list[tuple[str, ...]]:
    """Passages with the one that each is compared with; a pair that occurs in both orders is taken once."""
    seen: dict[frozenset[str], tuple[str, ...]] = {}
    for passage, other in zip(passages, related(passages), strict=True):
        if other:
            seen.setdefault(frozenset((passage.passage_id, other)), (passage.passage_id, other))
    return list(seen.values())
