"""Finds which candidates a search of a part nominates, and with how little effort."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ragtune_ray.index import vectors
from ragtune_ray.index.measuring.neighbors import CUTOFF, Asked

FEWEST_LISTS = 4
"""Lists of a quantized part that are searched at least, and twice as many as the last that changed anything."""
TOLERANCE = 1e-5
"""Neighbours are compared by score because they may be equal; sums of products differ by less than this."""

Nominations = Iterator[tuple[int, np.ndarray, np.ndarray]]
"""Number of an effort, and scores and positions, (num_queries, any width), of what it nominates first; -1 for nothing."""


def in_lists(part: vectors.Part, asked: Asked, efforts: np.ndarray, depth: int) -> Nominations:
    """Search each list once: those that an effort adds, for the queries that may need them."""
    structure = part.structure
    nearness, lists = structure.quantizer.search(asked.queries, structure.nlist)
    rank = np.empty_like(lists)
    np.put_along_axis(rank, lists, np.arange(structure.nlist)[None], axis=1)
    until = np.where(asked.homes >= 0, np.take_along_axis(rank, np.maximum(asked.homes, 0), axis=1), 0).max(axis=1) + 1
    if part.exact is not None:
        # Codes of farther vectors may crowd out neighbours.
        until = 2 * np.maximum(until, FEWEST_LISTS)
    before = 0
    for number, effort in enumerate(efforts.tolist()):
        rows = np.flatnonzero(until > before)
        if not len(rows):
            return
        added = tuple(np.ascontiguousarray(each[rows, before:effort]) for each in (nearness, lists))
        scores, places = vectors.search_lists(structure, asked.queries[rows], (added[0], added[1]), depth)
        crowds = ((places >= 0) & (scores > asked.worst[rows, None])).any(axis=1)
        until[rows[crowds]] = np.maximum(until[rows[crowds]], 2 * effort)
        width = int((places >= 0).sum(axis=1).max())
        yield number, *_spread(rows, len(asked.queries), scores[:, :width], places[:, :width])
        before = effort


def in_graph(part: vectors.Part, asked: Asked, efforts: np.ndarray, depth: int) -> Nominations:
    """Walk the graph with growing effort until a query has found its neighbours."""
    seen = np.empty((len(asked.places), 0), dtype=np.int64)
    rows = np.arange(len(seen))
    for number, effort in enumerate(efforts.tolist()):
        walk = vectors.SearchEffort(graph=max(effort, CUTOFF + 1 + vectors.TIED_VECTORS))
        batch = vectors.QueryBatch(asked.queries[rows], walk, 1.0, every_list=False)
        scores, places = batch.search(part, depth, None)
        new = (places[:, :, None] != seen[rows, None, :]).all(axis=2)
        added = _spread(rows, len(seen), scores, np.where(new, places, -1))
        seen = np.concatenate([seen, added[1]], axis=1)
        yield number, *added
        rows = rows[scores[:, -1] < asked.nearest[rows, depth - 1] - TOLERANCE]
        if not len(rows):
            break
    new = (asked.places[:, :, None] != seen[:, None, :]).all(axis=2)
    yield len(efforts), asked.nearest, np.where(new, asked.places, -1)


def _spread(rows: np.ndarray, count: int, scores: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return hits of some rows as hits of `count` rows."""
    all_scores = np.full((count, scores.shape[1]), -np.inf, dtype=np.float32)
    all_places = np.full(all_scores.shape, -1, dtype=np.int64)
    all_scores[rows], all_places[rows] = scores, places
    return all_scores, all_places
