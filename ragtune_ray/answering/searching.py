"""Searches an index with one or several texts per question, and fuses the hits of several by reciprocal rank.

A question with one text is searched as ever. The texts of a question that was split count alike: a passage's score is the sum of
1 / (constant + rank) over the searches that found it (Cormack, Clarke and Buettcher 2009), with `retrieval.fusion_constant`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ragtune_ray import config, schema

if TYPE_CHECKING:
    from ragtune_ray.index.retriever import Retriever

Texts: TypeAlias = tuple[str, ...]
"""The texts with which the index is searched for one question, as in `schema.Searches`."""
Shown: TypeAlias = tuple[list[schema.Passage], list[float]]
"""The passages for a question's prompt, best first, and their scores."""
Found = TypeVar("Found")


def fused(rankings: Sequence[Sequence[str]], constant: float, top_k: int) -> list[tuple[int, int, float]]:
    """Fuse rankings of ids by reciprocal rank; of equal scores, the id that was found first comes first.

    >>> fused([["a", "b"], ["b", "c"]], 1.0, 2)
    [(0, 1, 0.8333333333333333), (0, 0, 0.5)]

    Returns:
        For each of the best `top_k` ids, a ranking that has it, its place there from 0, and its score.
    """
    scores: dict[str, float] = {}
    places: dict[str, tuple[int, int]] = {}
    for number, ranking in enumerate(rankings):
        for place, name in enumerate(ranking):
            scores[name] = scores.get(name, 0.0) + 1 / (constant + 1 + place)
            places.setdefault(name, (number, place))
    best = sorted(scores, key=lambda name: -scores[name])[:top_k]
    return [(*places[name], scores[name]) for name in best]


def fuse_hits(searched: Sequence[Sequence[schema.Hit]], constant: float, top_k: int) -> list[schema.Hit]:
    """The best hits of a question that was searched with several texts; those of a single text keep their scores."""
    if len(searched) == 1:
        return list(searched[0][:top_k])
    best = fused([[hit.passage_id for hit in hits] for hits in searched], constant, top_k)
    return [
        dataclasses.replace(searched[number][place], rank=rank, score=score)
        for rank, (number, place, score) in enumerate(best, start=1)
    ]


def fuse_passages(searched: Sequence[Shown], constant: float, top_k: int) -> Shown:
    """As `fuse_hits`, for passages with their scores."""
    if len(searched) == 1:
        passages, scores = searched[0]
        return passages[:top_k], scores[:top_k]
    best = fused([[passage.passage_id for passage in passages] for passages, _ in searched], constant, top_k)
    return [searched[number][0][place] for number, place, _ in best], [score for *_, score in best]


def grouped(found: Sequence[Found], asked: Sequence[Texts]) -> list[list[Found]]:
    """Results for all texts in a row, as one list per question.

    >>> grouped(["A", "B", "C"], [("a",), ("b", "c")])
    [['A'], ['B', 'C']]
    """
    each = iter(found)
    return [[next(each) for _ in texts] for texts in asked]


def search_passages(
    retriever: Retriever,
    asked: Sequence[Texts],
    retrieval: config.Retrieval,
    top_k: int,
    own_ids: Sequence[str] | None = None,
) -> list[Shown]:
    """The passages of each question and their scores, best first; `own_ids` as in `Retriever.retrieve_passages`."""

    def search(texts: list[str], names: list[str], depth: int) -> list[Shown]:
        return retriever.retrieve_passages(texts, depth, None if own_ids is None else names)

    parts = _searched(search, asked, own_ids or [""] * len(asked), retrieval, top_k)
    return [fuse_passages(each, retrieval.fusion_constant, top_k) for each in parts]


def search_hits(
    retriever: Retriever,
    query_ids: Sequence[str],
    asked: Sequence[Texts],
    retrieval: config.Retrieval,
    top_k: int,
    *,
    leave_out_own: bool = False,
) -> list[list[schema.Hit]]:
    """The hits of each question, best first; see `Retriever.retrieve`."""

    def search(texts: list[str], names: list[str], depth: int) -> list[list[schema.Hit]]:
        return retriever.retrieve(names, texts, depth, leave_out_own=leave_out_own)

    parts = _searched(search, asked, query_ids, retrieval, top_k)
    return [fuse_hits(each, retrieval.fusion_constant, top_k) for each in parts]


def search_ordinals(
    retriever: Retriever,
    asked: Sequence[Texts],
    retrieval: config.Retrieval,
    top_k: int,
    own_ids: Sequence[str] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """The ordinals of each question's passages and their scores, best first; see `Retriever.search_ordinals`."""

    def search(texts: list[str], names: list[str], depth: int) -> list[tuple[list[int], list[float]]]:
        rows = zip(*retriever.search_ordinals(texts, depth, None if own_ids is None else names), strict=True)
        return [(row[row >= 0].tolist(), scores[row >= 0].tolist()) for scores, row in rows]

    found = []
    for each in _searched(search, asked, own_ids or [""] * len(asked), retrieval, top_k):
        ordinals, scores = each[0]
        if len(each) > 1:
            best = fused([[str(ordinal) for ordinal in row] for row, _ in each], retrieval.fusion_constant, top_k)
            ordinals, scores = [each[number][0][place] for number, place, _ in best], [score for *_, score in best]
        found.append((ordinals[:top_k], scores[:top_k]))
    return found


def _searched(
    search: Callable[[list[str], list[str], int], list[Found]],
    asked: Sequence[Texts],
    query_ids: Sequence[str],
    retrieval: config.Retrieval,
    top_k: int,
) -> list[list[Found]]:
    texts = [text for each in asked for text in each]
    names = [name for name, each in zip(query_ids, asked, strict=True) for _ in each]
    depth = top_k if len(texts) == len(asked) else max(top_k, retrieval.candidates)
    return grouped(search(texts, names, depth), asked)
