"""Retrieves hits for queries: dense, lexical, or both fused, and optionally reranked.

Fusion is by score or by rank (`retrieval.fusion`). By score, a passage's score is (1 - w) * cosine + w * BM25 / best BM25
of the query, where both are computed for every candidate, whichever list it is from. By reciprocal rank (Cormack, Clarke and
Buettcher 2009), it is the sum of 1 / (constant + rank) over the lists that contain it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.index import IndexDataError, filters, segments, snapshot, vectors, versions
from ragtune_ray.models import scripts
from ragtune_ray.models.encoder import Encoder, load_encoder
from ragtune_ray.models.reranker import Reranker
from ragtune_ray.storage import artifacts

Ranked: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Scores (float32) and passage ordinals, each (num_queries, depth), best first; missing hits are -inf and -1."""


class Candidates(NamedTuple):
    """The list that one search found; every array is (num_queries, depth), best first."""

    scores: np.ndarray
    """Float32; -inf for missing hits."""
    ordinals: np.ndarray
    """Of passages; -1 for missing hits."""
    others: np.ndarray
    """The scores that the other search gives to the same passages; zeros unless scores are fused."""


OWN_PASSAGES = 8
"""Extra hits to find where those of one document are left out; if that document has more passages, fewer hits may remain."""
Column: TypeAlias = Callable[[str, np.ndarray], list[str]]
"""Returns the values of a column of `Passage` at given ordinals."""


def open_retriever(
    settings: config.Config, version: str | None = None, device: str = "auto", *, shard: Sequence[int] | None = None
) -> Retriever:
    """Open the retriever that a config describes, on an index version (None: the current one).

    `shard` has the positions of the segments to search; None means all.

    Raises:
        ArtifactError: the index is missing or damaged, or another encoder built it.
    """
    opened = snapshot.open_index(settings.workspace, version, shard=shard)
    encoder = None if settings.retrieval.mode == "lexical" else load_encoder(settings.encoder, device)
    return Retriever(opened, encoder, settings.retrieval, load_reranker(settings.retrieval, device), visible(settings))


def load_ranking(settings: config.Retrieval, manifest: versions.IndexManifest, device: str = "auto") -> Ranking:
    """Return the ranking that a config describes for an index version, with its reranker loaded."""
    return Ranking(settings, load_reranker(settings, device), unknown_scripts(manifest))


def unknown_scripts(manifest: versions.IndexManifest) -> frozenset[str]:
    """Return the scripts that the encoder of an index version does not know; empty if that was not measured."""
    return scripts.unknown_scripts(manifest.get("scripts", {}))


def load_reranker(settings: config.Retrieval, device: str = "auto") -> Reranker | None:
    """Load the cross-encoder that a config names; None if it names none."""
    return Reranker(settings.reranker, device) if settings.reranker else None


def visible(settings: config.Config) -> filters.Filter:
    """Return the filter of a config's retrievals: `retrieval.filter` and, if documents have tenants, the tenant.

    Raises:
        ConfigError: the filter is invalid, or only one of `index.tenant_field` and `retrieval.tenant` is set.
    """
    field, tenant = settings.index.tenant_field, settings.retrieval.tenant
    if bool(field) != bool(tenant):
        raise config.ConfigError(
            f"index.tenant_field is {field!r} and retrieval.tenant is {tenant!r}: set both, or neither"
        )
    try:
        chosen = filters.parse_filter(settings.retrieval.filter)
        return filters.combine(chosen, filters.tenant_filter(field, tenant)) if field else chosen
    except ValueError as error:
        raise config.ConfigError(f"retrieval.filter: {error}") from error


@dataclass(frozen=True, slots=True)
class PassageHit:
    """A retrieved passage with its text."""

    rank: int
    """1 is best."""
    score: float
    """Larger is better."""
    passage: schema.Passage


class Retriever:
    """Searches one index version with the encoder that built it."""

    def __init__(
        self,
        opened: snapshot.Index,
        encoder: Encoder | None,
        settings: config.Retrieval,
        reranker: Reranker | None = None,
        chosen: filters.Filter | None = None,
    ) -> None:
        if encoder is None and settings.mode != "lexical":
            raise ValueError(f"retrieval.mode {settings.mode!r} needs an encoder; only 'lexical' needs none")
        if encoder is not None:
            check_encoder(encoder, opened.version, opened.manifest)
        self.index = opened
        self._allowed = opened.allowed(chosen) if chosen else opened.alive
        self.encoder = encoder
        self._settings = settings
        self._ranking = Ranking(settings, reranker, unknown_scripts(opened.manifest))

    @staticmethod
    def open(settings: config.Config, version: str | None = None, device: str = "auto") -> Retriever:
        """Open an index version of the workspace; see `open_retriever`."""
        return open_retriever(settings, version, device)

    def search(self, texts: Sequence[str], top_k: int | None = None) -> list[list[PassageHit]]:
        """Return the passages for each question, best first; fewer than `top_k` only if fewer match.

        `top_k` None means `retrieval.top_k`.
        """
        if isinstance(texts, str):
            raise TypeError(f"search takes a list of questions, got the string {texts!r}; put it in a list")
        return [
            [PassageHit(rank, score, passage) for rank, (passage, score) in enumerate(zip(*row, strict=True), start=1)]
            for row in self.retrieve_passages(texts, self._settings.top_k if top_k is None else top_k)
        ]

    def retrieve(
        self, query_ids: Sequence[str], texts: Sequence[str], top_k: int, *, leave_out_own: bool = False
    ) -> list[list[schema.Hit]]:
        """Return the hits of each query, best first; fewer than `top_k` only if fewer match.

        `leave_out_own`: passages of the document with the query's id are not hits.
        """
        scores, ordinals = self.search_ordinals(texts, top_k, query_ids if leave_out_own else None)
        return to_hits(query_ids, scores, ordinals, self._column)

    def retrieve_passages(
        self, texts: Sequence[str], top_k: int, own_ids: Sequence[str] | None = None
    ) -> list[tuple[list[schema.Passage], list[float]]]:
        """Return the passages of each query's hits and their scores, best first; for `own_ids` see `search_ordinals`."""
        rows = zip(*self.search_ordinals(texts, top_k, own_ids), strict=True)
        return [(self.index.take(row[row >= 0].tolist()), score[row >= 0].tolist()) for score, row in rows]

    def search_ordinals(
        self, texts: Sequence[str], top_k: int, own_ids: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and passage ordinals, each (num_queries, top_k), best first; missing hits are -inf and -1.

        `own_ids` names for each query a document that is not among its hits; None: every document may be.
        """
        searched = top_k if own_ids is None else top_k + OWN_PASSAGES
        depth = self._ranking.depth(searched)
        embedded = None if self._settings.mode == "lexical" else encode_queries(self.encoder, texts)
        lists = search_lists(self.index, self._settings, texts, embedded, depth, self._allowed)
        ranked = self._ranking.rank(texts, lists, searched, self._column)
        return ranked if own_ids is None else without_own(own_ids, ranked, top_k, self._column)

    def _column(self, name: str, ordinals: np.ndarray) -> list[str]:
        values: list[str] = segments.take_rows(self.index.passages.select([name]), ordinals)[name].to_pylist()
        return values


class Ranking:
    """Turns the lists found for queries into one: fuses two, reranks, and keeps the best."""

    def __init__(
        self, settings: config.Retrieval, reranker: Reranker | None, unknown: frozenset[str] = frozenset()
    ) -> None:
        self._settings = settings
        self._reranker = reranker
        self._unknown = unknown  # scripts

    def depth(self, top_k: int) -> int:
        """Return the length of the lists from which `top_k` hits are made."""
        return list_depth(self._settings, top_k, reranks=self._reranker is not None)

    def rank(self, texts: Sequence[str], lists: Sequence[Candidates], top_k: int, column: Column) -> Ranked:
        """Return scores and ordinals, each (num_queries, top_k), from the lists that `search_lists` found.

        Args:
            texts: the queries.
            lists: one, or two to fuse, of length `depth(top_k)`.
            top_k: hits to keep per query.
            column: returns the texts of passages, for the reranker.
        """
        kept = self.depth(top_k) if self._reranker else top_k
        if len(lists) == 1:
            scores, ordinals, _ = lists[0]
        elif self._settings.fuses_scores:
            dense, lexical = lists
            scores, ordinals = fuse_scores(dense, lexical, self._lexical_weights(texts), kept)
        else:
            scores, ordinals = fuse_ranks([each.ordinals for each in lists], self._settings.fusion_constant, kept)
        if self._reranker is not None:
            scores, ordinals = _rerank(self._reranker, self._settings, texts, scores, ordinals, column)
        return scores[:, :top_k], ordinals[:, :top_k]

    def _lexical_weights(self, texts: Sequence[str]) -> np.ndarray:
        """Return the weight of BM25 for each query, (num_queries, 1)."""
        chosen = self._settings
        unknown = [bool(self._unknown) and scripts.script_of(text) in self._unknown for text in texts]
        return np.where(np.array(unknown, dtype=bool), chosen.unknown_script_weight, chosen.lexical_weight)[:, None]


def list_depth(settings: config.Retrieval, top_k: int, *, reranks: bool) -> int:
    """Return the length of the lists from which `top_k` hits are made."""
    return max(top_k, settings.candidates) if settings.mode == "hybrid" or reranks else top_k


def search_lists(
    opened: snapshot.Index,
    settings: config.Retrieval,
    texts: Sequence[str],
    embedded: np.ndarray | None,
    depth: int,
    allowed: snapshot.Selection,
) -> list[Candidates]:
    """Search an index, or a shard of one, and return a dense list, a lexical one, or both in this order.

    `embedded` are the vectors of the queries, which mode `lexical` does not need; `depth` is the length of each list.
    """
    found: list[Ranked] = []
    if settings.mode != "lexical":
        assert embedded is not None
        found.append(opened.vectors.search(embedded, depth, allowed))
    if settings.mode != "dense":
        found.append(opened.lexical.search(texts, depth, allowed))
    if not settings.fuses_scores:
        return [Candidates(*each, np.zeros_like(each[0])) for each in found]
    assert embedded is not None
    dense, lexical = found
    return [
        Candidates(*dense, opened.lexical.scores_of(texts, dense[1])),
        Candidates(*lexical, opened.vectors.scores_of(embedded, lexical[1])),
    ]


def merge_candidates(one: Candidates, other: Candidates, depth: int) -> Candidates:
    """Merge the lists of one search over two shards; their ordinals differ."""
    both = Candidates(*(np.concatenate(arrays, axis=1) for arrays in zip(one, other, strict=True)))
    order = np.lexsort((both.ordinals, -both.scores), axis=1)[:, :depth]
    return Candidates(*(np.take_along_axis(array, order, axis=1) for array in both))


def check_encoder(encoder: Encoder, version: str, manifest: versions.IndexManifest) -> None:
    """Raise an ArtifactError if another encoder built an index version."""
    built_by = manifest["encoder"]
    if encoder.fingerprint != built_by["fingerprint"]:
        raise artifacts.ArtifactError(
            f"index version {version} was built by encoder {built_by['model']!r} ({built_by['fingerprint']}), "
            f"not by this one ({encoder.fingerprint}); their vectors cannot be compared; run: ragtune index CONFIG"
        )


def encode_queries(encoder: Encoder | None, texts: Sequence[str]) -> np.ndarray:
    """Return the vectors of queries, (num_texts, dimension); raises an IndexDataError if one is not finite."""
    assert encoder is not None
    vectors = encoder.encode_queries(texts)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise IndexDataError(f"the encoder returned no finite vector for the query {texts[wrong[0]]!r}")
    return vectors


def without_own(own_ids: Sequence[str], ranked: Ranked, top_k: int, column: Column) -> Ranked:
    """Remove the hits that are passages of the document named for their query, and keep the best `top_k` of the others."""
    scores, ordinals = ranked
    found = np.unique(ordinals)
    owners = np.array(["" if ordinal < 0 else None for ordinal in found], dtype=object)
    owners[found >= 0] = column("document_id", found[found >= 0])
    own = owners[np.searchsorted(found, ordinals)] == np.array(own_ids, dtype=object)[:, None]
    scores, ordinals = np.where(own, -np.inf, scores), np.where(own, -1, ordinals)
    order = np.argsort(ordinals < 0, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ordinals, order, axis=1)


def to_hits(
    query_ids: Sequence[str], scores: np.ndarray, ordinals: np.ndarray, column: Column
) -> list[list[schema.Hit]]:
    """Turn scores and ordinals, each (num_queries, top_k), into the hits of each query."""
    found = np.unique(ordinals[ordinals >= 0])
    passage_ids = np.array(column("passage_id", found), dtype=object)
    document_ids = np.array(column("document_id", found), dtype=object)
    positions = np.searchsorted(found, ordinals)
    return [
        [
            schema.Hit(query_id, passage_ids[position], document_ids[position], rank + 1, float(score))
            for rank, (position, score, ordinal) in enumerate(zip(*row, strict=True))
            if ordinal >= 0
        ]
        for query_id, *row in zip(query_ids, positions, scores, ordinals, strict=True)
    ]


def _rerank(
    reranker: Reranker,
    settings: config.Retrieval,
    texts: Sequence[str],
    first: np.ndarray,
    ordinals: np.ndarray,
    column: Column,
) -> Ranked:
    """Order the first `num_reranked` hits by the reranker's score plus the weighted retrieval score `first`.

    Retrieval scores are divided by the query's best. The other hits keep their order and score below these.
    """
    given = settings.first_stage_weight
    weight = reranker.first_stage_weight if given is None else given
    found = ordinals >= 0
    best = np.abs(first[:, :1], where=found[:, :1], out=np.ones((len(first), 1), np.float32))
    relative = np.divide(first, np.where(best > 0, best, 1), where=found, out=np.zeros_like(first))
    reranked = found & (np.arange(ordinals.shape[1]) < settings.num_reranked)
    rows, columns = np.nonzero(reranked)
    passages = column("text", ordinals[rows, columns])
    scores = np.full(ordinals.shape, -np.inf, dtype=np.float32)
    scores[rows, columns] = reranker.score([(texts[int(row)], text) for row, text in zip(rows, passages, strict=True)])
    scores[rows, columns] += weight * relative[rows, columns]
    lowest = np.min(scores, axis=1, where=reranked, initial=np.inf)
    behind, columns = np.nonzero(found & ~reranked)
    scores[behind, columns] = lowest[behind] + relative[behind, columns] - relative[behind, 0]
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ordinals, order, axis=1)


def fuse_scores(dense: Candidates, lexical: Candidates, lexical_weight: float | np.ndarray, top_k: int) -> Ranked:
    """Fuse a dense and a lexical list of the same queries by (1 - w) * cosine + w * BM25 / best BM25 of the query.

    >>> dense = Candidates(np.array([[0.9, 0.5]]), np.array([[7, 3]]), np.array([[0.0, 8.0]]))
    >>> lexical = Candidates(np.array([[8.0, -np.inf]]), np.array([[3, -1]]), np.array([[0.5, -np.inf]]))
    >>> scores, ordinals = fuse_scores(dense, lexical, 0.25, 3)
    >>> ordinals.tolist(), [round(score, 3) for score in scores[0].tolist()]
    ([[7, 3, -1]], [0.675, 0.625, -inf])

    Args:
        dense: its scores are cosines.
        lexical: its scores are BM25. If it is empty for a query, the query's hits are ordered by their cosines.
        lexical_weight: w, 0 to 1; one for all queries, or (num_queries, 1).
        top_k: hits to keep per query.

    Returns:
        Scores (float32) and ordinals, each (num_queries, top_k), best first; equal scores are ordered by ordinal.
    """
    best = np.where(lexical.ordinals[:, :1] >= 0, lexical.scores[:, :1], 1.0).astype(np.float64)
    ordinals = np.concatenate([dense.ordinals, lexical.ordinals], axis=1)
    cosines = np.concatenate([dense.scores, lexical.others], axis=1).astype(np.float64)
    words = np.concatenate([dense.others, lexical.scores], axis=1) / best
    found = _is_first(ordinals)
    cosines, words = np.where(found, cosines, 0.0), np.where(found, words, 0.0)
    fused = (1 - lexical_weight) * cosines + lexical_weight * words
    return vectors.top([fused], [np.where(found, ordinals, -1)], top_k)


def _is_first(ordinals: np.ndarray) -> np.ndarray:
    """Return for each ordinal of a row whether it is the first of its value, and not -1."""
    order = np.argsort(ordinals, axis=1, kind="stable")
    ordered = np.take_along_axis(ordinals, order, axis=1)
    fresh = np.ones(ordinals.shape, dtype=bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(fresh)
    np.put_along_axis(first, order, fresh, axis=1)
    return first & (ordinals >= 0)


def fuse_ranks(lists: Sequence[np.ndarray], constant: float, top_k: int) -> Ranked:
    """Fuse several ranked lists of the same queries by reciprocal rank.

    >>> scores, ordinals = fuse_ranks([np.array([[7, 3]]), np.array([[3, -1]])], 1.0, 3)
    >>> ordinals.tolist(), [round(score, 3) for score in scores[0].tolist()]
    ([[3, 7, -1]], [0.833, 0.5, -inf])

    Args:
        lists: ordinals, each (num_queries, depth), best first; -1 for missing hits.
        constant: a larger one reduces the weight of the first ranks.
        top_k: hits to keep per query.

    Returns:
        Scores (float32) and ordinals, each (num_queries, top_k), best first; equal scores are ordered by ordinal.
    """
    ordinals = np.concatenate(lists, axis=1)
    parts = [np.broadcast_to(1 / (constant + 1 + np.arange(part.shape[1])), part.shape) for part in lists]
    shares = np.concatenate(parts, axis=1)
    shares = np.where(ordinals >= 0, shares, 0.0)
    order = np.argsort(ordinals, axis=1, kind="stable")
    ordinals, shares = np.take_along_axis(ordinals, order, axis=1), np.take_along_axis(shares, order, axis=1)
    # Equal ordinals are now adjacent, at most one per list: add their shares to the first of them.
    first = np.ones_like(ordinals, dtype=bool)
    first[:, 1:] = ordinals[:, 1:] != ordinals[:, :-1]
    totals = shares.copy()
    for step in range(1, len(lists)):
        same = ordinals[:, step:] == ordinals[:, :-step]
        totals[:, :-step] += np.where(same, shares[:, step:], 0.0)
    totals = np.where(first & (ordinals >= 0), totals, -np.inf)
    best = np.lexsort((ordinals, -totals), axis=1)[:, :top_k]
    scores = np.full((len(ordinals), top_k), -np.inf, dtype=np.float32)
    kept = np.full((len(ordinals), top_k), -1, dtype=np.int64)
    width = best.shape[1]
    scores[:, :width] = np.take_along_axis(totals, best, axis=1)
    kept[:, :width] = np.take_along_axis(ordinals, best, axis=1)
    kept[np.isneginf(scores)] = -1
    return scores, kept
