"""Draws the passages of an index version to write questions about."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.config.evaluation import QuestionKind
from ragtune_ray.evaluation.questions.writing import drawing
from ragtune_ray.index import retriever, snapshot

POOL = 50_000
"""Passages among which is drawn; a random part of a larger index, so that clustering takes seconds."""
NEIGHBOURS = 20
"""Hits among which the passage for a comparison is looked for."""


class Drawn(NamedTuple):
    """The usable passages of an index, in the order in which they are to be asked about."""

    passages: list[schema.Passage]
    ordinals: np.ndarray
    """Of the passages, (num_passages,)."""
    vectors: np.ndarray
    """Their embeddings, (num_passages, dimension)."""


def spread_passages(settings: config.Config, opened: snapshot.Index, forbidden: Collection[str] = ()) -> Drawn:
    """Passages in an order any first part of which covers the corpus; see `drawing.spread`.

    Args:
        settings: the whole config.
        opened: the index.
        forbidden: ids of documents that must not be asked about.
    """
    ordinals, passages = _pool(opened, settings, forbidden)
    vectors = opened.vectors.take(ordinals)
    clusters = drawing.clusters_of(vectors, settings.seed) if len(passages) else np.empty(0, dtype=np.int64)
    order = drawing.spread(passages, clusters, settings.seed)
    return Drawn([passages[place] for place in order], ordinals[order], vectors[order])


def drawn(
    settings: config.Config, opened: snapshot.Index, forbidden: Collection[str] = ()
) -> dict[QuestionKind, list[drawing.Seed]]:
    """What to write questions about, by kind: `questions.max_draws` times `questions.count` of them.

    Arguments as for `spread_passages`.

    Raises:
        DrawingError: no passage can be asked about.
    """
    rule, found = settings.questions, spread_passages(settings, opened, forbidden)
    row_of = {passage.passage_id: row for row, passage in enumerate(found.passages)}

    def related(asked: Sequence[schema.Passage]) -> list[str]:
        return _related(opened, found, [row_of[passage.passage_id] for passage in asked])

    counts = drawing.counts_of(rule.count, rule.shares)
    return drawing.seeds_of(found.passages, counts, rule.max_draws, related)


def _pool(
    opened: snapshot.Index, settings: config.Config, forbidden: Collection[str]
) -> tuple[np.ndarray, list[schema.Passage]]:
    """The usable passages that the config's retrievals see, or a random part of them: ordinals and rows."""
    seed = settings.seed
    masks = [
        np.ones(segment.num_passages, dtype=bool) if mask is None else mask
        for segment, mask in zip(opened.segments, opened.allowed(retriever.visible(settings)), strict=True)
    ]
    ordinals = np.flatnonzero(np.concatenate([np.empty(0, dtype=bool), *masks]))
    if len(ordinals) > POOL:
        ordinals = np.sort(np.random.default_rng(seed).choice(ordinals, POOL, replace=False))
    found = opened.take(ordinals.tolist())
    usable = [row for row, each in enumerate(found) if drawing.is_usable(each) and each.document_id not in forbidden]
    return ordinals[usable], [found[row] for row in usable]


def _related(opened: snapshot.Index, known: Drawn, rows: Sequence[int]) -> list[str]:
    """For each of these rows, the most similar usable passage of another document; "" if none is related."""
    if not rows:
        return []
    passages = known.passages
    scores, near = opened.vectors.search(known.vectors[list(rows)], NEIGHBOURS, opened.alive)
    row_of = {int(ordinal): row for row, ordinal in enumerate(known.ordinals)}
    found = []
    for row, row_scores, row_near in zip(rows, scores, near, strict=True):
        others = [
            passages[row_of[int(ordinal)]]
            for score, ordinal in zip(row_scores, row_near, strict=True)
            if int(ordinal) in row_of and drawing.MIN_RELATED <= score <= drawing.MAX_RELATED
        ]
        names = (each.passage_id for each in others if each.document_id != passages[row].document_id)
        found.append(next(names, ""))
    return found
