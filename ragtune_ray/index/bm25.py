"""Ranks passages with BM25: Robertson & Zaragoza (2009), in Lucene's variant, as bm25s computes it (Lù, 2024).

    score(q, p) = sum over the tokens t of q of  idf(t) * tf / (tf + k1 * (1 - b + b * length(p) / average length))
    idf(t)      = ln(1 + (N - df(t) + 0.5) / (df(t) + 0.5))

A segment stores only token counts. N, df and the average length count the live passages of the whole index, so scores do
not depend on segmentation, sharding or deleted passages. Scores are computed at query time from memory-mapped counts, so
an index opens immediately. Stop words are indexed, but dropped from queries that have other words.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ragtune_ray.index import IndexDataError
from ragtune_ray.index.words import term_of, tokens, words_of
from ragtune_ray.storage import filesystem

_Hits: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
_Mask: TypeAlias = npt.NDArray[np.bool_]
_BATCH_PASSAGES = 2000  # bounds memory: until counted, words are Python strings of about 70 bytes
_ARRAYS = {"indptr": np.int64, "passages": np.int32, "counts": np.int32, "lengths": np.int32}
_VOCABULARY_FILE = "vocabulary.txt"


@dataclass(frozen=True, slots=True)
class Postings:
    """Token counts of one immutable segment; the postings of token t are at indptr[t]:indptr[t + 1].

    Attributes:
        vocabulary: tokens, sorted.
        indptr: (num_tokens + 1,).
        passages: (num_postings,) ordinals of passages within the segment, ascending per token.
        counts: (num_postings,) occurrences of the token in that passage.
        lengths: (num_passages,) tokens per passage.
    """

    vocabulary: tuple[str, ...]
    indptr: npt.NDArray[np.int64]
    passages: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]

    def save(self, directory: Path) -> None:
        """Write four .npy files and `vocabulary.txt` (one token per line); equal postings have equal bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            filesystem.save_array(directory / f"{name}.npy", getattr(self, name))
        (directory / _VOCABULARY_FILE).write_bytes("\n".join(self.vocabulary).encode())

    @classmethod
    def load(cls, directory: Path, *, mmap: bool) -> Postings:
        """Read what `save` wrote, memory-mapped if `mmap`; raises an IndexDataError if the files do not match."""
        mode: Literal["r"] | None = "r" if mmap else None
        arrays = {  # plain arrays over the mapped files: slicing a numpy.memmap is ten times slower
            name: np.asarray(np.load(directory / f"{name}.npy", mmap_mode=mode, allow_pickle=False)) for name in _ARRAYS
        }
        text = (directory / _VOCABULARY_FILE).read_bytes().decode()
        postings = cls(vocabulary=tuple(text.split("\n")) if text else (), **arrays)
        _check(postings, directory)
        return postings


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the live passages of an index or a part of it; they determine the scores.

    Attributes:
        num_passages: live passages.
        num_tokens: tokens in all live passages, including repeated ones.
        frequencies: token -> number of live passages that contain it.
    """

    num_passages: int
    num_tokens: int
    frequencies: Mapping[str, int]


def add_statistics(parts: Sequence[Statistics]) -> Statistics:
    """Add the statistics of an index's parts, which must have frequencies of the same tokens.

    >>> add_statistics([Statistics(2, 9, {"moon": 1}), Statistics(1, 4, {"moon": 1})])
    Statistics(num_passages=3, num_tokens=13, frequencies={'moon': 2})
    """
    frequencies: Counter[str] = Counter()
    for part in parts:
        if different := sorted(part.frequencies.keys() ^ parts[0].frequencies.keys()):
            raise ValueError(f"only some parts have a frequency of {different[0]!r}; request the same tokens from each")
        frequencies.update(part.frequencies)
    num_passages, num_tokens = sum(part.num_passages for part in parts), sum(part.num_tokens for part in parts)
    return Statistics(num_passages, num_tokens, dict(frequencies))


def build_segment(texts: Iterable[str], rules: str) -> Postings:
    """Count the tokens of passages, given in the order of their ordinals; the texts are read once, in batches.

    `rules` are those of `index.words`.
    """
    numbers = _TermNumbers(term_of(rules))
    remaining, batches = iter(texts), []
    while batch := list(itertools.islice(remaining, _BATCH_PASSAGES)):
        batches.append(_count([words_of(text, rules) for text in batch], numbers))
    return _merge(batches, list(numbers.of_term))


class LexicalIndex:
    """A searchable list of segments; postings are read only when a search needs them.

    Args:
        segments: in the order of their passages' ordinals.
        rules: those of `index.words` with which the segments were built.
        k1: how slowly repeated tokens saturate.
        b: how strongly long passages are discounted, 0 to 1.
        alive: per segment a mask (num_passages,), False for deleted passages, or None if none are deleted. Deleted
            passages keep their ordinals, but are never hits and not counted in statistics.
        statistics: of the whole index, if the segments are a part of it; None uses those of the segments. Frequencies are
            read at each search, so the mapping may grow between searches.
    """

    def __init__(
        self,
        segments: Sequence[Postings],
        rules: str,
        k1: float = 1.5,
        b: float = 0.75,
        *,
        alive: Sequence[npt.NDArray[np.bool_] | None] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        term_of(rules)
        self._segments = tuple(segments)
        self._rules, self._k1, self._b = rules, k1, b
        self._alive = _masks("alive", alive, self._segments)
        self._index_statistics = statistics
        self._frequencies: dict[str, int] = {}  # a cache, in these segments

    @property
    def num_passages(self) -> int:
        """Number of live passages in these segments."""
        return self._num_passages_and_tokens[0]

    def statistics(self, tokens: Collection[str]) -> Statistics:
        """Return the statistics of these segments, with the frequency of each token, even if it is 0."""
        return Statistics(*self._num_passages_and_tokens, {token: self._frequency(token) for token in tokens})

    def search(
        self, queries: Sequence[str], top_k: int, allowed: Sequence[npt.NDArray[np.bool_] | None] | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return the best passages of each query.

        Args:
            queries: texts.
            top_k: hits per query, at least 1.
            allowed: per segment a mask (num_passages,) of the passages that may be hits; scores do not depend on it. None
                allows all.

        Returns:
            Scores and ids, each (num_queries, top_k), best first, equal scores by id. An id is the passage's ordinal over
            all segments, deleted passages included. Only passages that share a token with the query are hits; missing
            hits have score -inf and id -1.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        masks = [
            mask if other is None else other if mask is None else mask & other
            for mask, other in zip(self._alive, _masks("allowed", allowed, self._segments), strict=True)
        ]
        scores = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), top_k), -1, dtype=np.int64)
        for row, query_tokens in enumerate(tokens(queries, self._rules)):
            best_scores, best_ids = self._best(self._weights(query_tokens), masks, top_k)
            scores[row, : len(best_ids)] = best_scores
            ids[row, : len(best_ids)] = best_ids
        return scores, ids

    def scores_of(self, queries: Sequence[str], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the scores of given passages, (num_queries, depth) like `ids`; the same as those of `search` to the last bit.

        A passage that shares no token with its query scores 0; an id of -1 scores -inf.
        """
        scores = np.where(ids < 0, np.float32(-np.inf), np.float32(0))
        first = np.cumsum([0, *(len(segment.lengths) for segment in self._segments)])
        owners = np.where(ids < 0, -1, np.searchsorted(first, ids, side="right") - 1)
        for row, query_tokens in enumerate(tokens(queries, self._rules)):
            weights = self._weights(query_tokens)
            for number in np.unique(owners[row][owners[row] >= 0]):
                owned = owners[row] == number
                passages = (ids[row, owned] - first[number]).astype(np.int32)
                scores[row, owned] = _scores_of(self._segments[number], self._norms[number], weights, passages)
        return scores

    def _best(self, weights: Mapping[str, np.float32], masks: Sequence[_Mask | None], top_k: int) -> _Hits:
        """Merge the hits of all segments, best first; each segment returns only hits that beat the earlier ones."""
        scores, ids = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        offset = 0
        for segment, norms, mask in zip(self._segments, self._norms, masks, strict=True):
            floor = float(scores[-1]) if len(scores) == top_k else 0.0
            more_scores, passages = _segment_hits(segment, norms, weights, mask, top_k, floor)
            scores, ids = np.concatenate([scores, more_scores]), np.concatenate([ids, passages + offset])
            order = np.argsort(-scores, kind="stable")[:top_k]  # stable: equal scores stay in the order of their ids
            scores, ids = scores[order], ids[order]
            offset += len(segment.lengths)
        return scores, ids

    def _weights(self, query_tokens: list[str]) -> dict[str, np.float32]:
        """Return token -> idf times its count in the query, in the query's order, so that all shards round alike."""
        given = self._index_statistics
        num_passages = self.num_passages if given is None else given.num_passages
        weights = {}
        for token, count in Counter(query_tokens).items():
            frequency = self._frequency(token) if given is None else _given_frequency(given, token)
            weights[token] = np.float32(count * math.log1p((num_passages - frequency + 0.5) / (frequency + 0.5)))
        return weights

    def _frequency(self, token: str) -> int:
        """Return how many live passages of these segments contain the token."""
        frequency = self._frequencies.get(token, 0)
        if not frequency:
            for segment, mask in zip(self._segments, self._alive, strict=True):
                holders = segment.passages[_span(segment, token)]
                frequency += len(holders) if mask is None else int(np.count_nonzero(mask[holders]))
            if frequency:  # unknown tokens are not cached: their number has no limit
                self._frequencies[token] = frequency
        return frequency

    @cached_property
    def _num_passages_and_tokens(self) -> tuple[int, int]:
        """Numbers of live passages in these segments and of their tokens."""
        lengths = [
            segment.lengths if mask is None else segment.lengths[mask]
            for segment, mask in zip(self._segments, self._alive, strict=True)
        ]
        return sum(map(len, lengths)), sum(int(part.sum(dtype=np.int64)) for part in lengths)

    @cached_property
    def _norms(self) -> list[npt.NDArray[np.float32]]:
        """Per segment, k1 * (1 - b + b * length / average length) of each passage."""
        num_passages, num_tokens = self._num_passages_and_tokens
        if self._index_statistics is not None:
            num_passages, num_tokens = self._index_statistics.num_passages, self._index_statistics.num_tokens
        average_length = max(num_tokens / max(1, num_passages), 1e-9)
        slope, least = np.float32(self._k1 * self._b / average_length), np.float32(self._k1 * (1 - self._b))
        return [segment.lengths.astype(np.float32) * slope + least for segment in self._segments]


def _segment_hits(
    segment: Postings,
    norms: npt.NDArray[np.float32],
    weights: Mapping[str, np.float32],
    mask: _Mask | None,
    top_k: int,
    floor: float,
) -> _Hits:
    """Return the passages that score above `floor`, in their order: the `top_k` best, and those that tie with the last."""
    scores = np.zeros(len(segment.lengths), dtype=np.float32)
    for token, weight in weights.items():
        span = _span(segment, token)
        holders = segment.passages[span].astype(np.intp)  # the type of an index; otherwise numpy converts it twice
        impacts = segment.counts[span].astype(np.float32)
        impacts /= impacts + norms[holders]
        impacts *= weight
        np.add.at(scores, holders, impacts)
    passages = np.flatnonzero(scores > floor)
    if mask is not None:
        passages = passages[mask[passages]]
    scores = scores[passages]
    if len(scores) > top_k:
        kept = scores >= np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        scores, passages = scores[kept], passages[kept]
    return scores, passages


def _scores_of(
    segment: Postings,
    norms: npt.NDArray[np.float32],
    weights: Mapping[str, np.float32],
    passages: npt.NDArray[np.int32],
) -> npt.NDArray[np.float32]:
    """Return the scores of passages of a segment; the same operations in the same order as in `_segment_hits`."""
    scores = np.zeros(len(passages), dtype=np.float32)
    for token, weight in weights.items():
        span = _span(segment, token)
        holders = segment.passages[span]
        if not len(holders):
            continue
        places = np.minimum(np.searchsorted(holders, passages), len(holders) - 1)
        found = holders[places] == passages
        impacts = segment.counts[span][places[found]].astype(np.float32)
        impacts /= impacts + norms[passages[found]]
        impacts *= weight
        scores[found] += impacts
    return scores


def _span(segment: Postings, token: str) -> slice:
    """Find the token's postings by binary search in the vocabulary."""
    number = bisect.bisect_left(segment.vocabulary, token)
    if number == len(segment.vocabulary) or segment.vocabulary[number] != token:
        return slice(0, 0)
    return slice(int(segment.indptr[number]), int(segment.indptr[number + 1]))


def _given_frequency(statistics: Statistics, token: str) -> int:
    frequency = statistics.frequencies.get(token)
    if frequency is None:
        raise ValueError(
            f"the given statistics have no frequency of {token!r}, a token of the query; collect them from all parts of the "
            "index for the tokens of all queries"
        )
    if not 0 <= frequency <= statistics.num_passages:
        raise ValueError(
            f"the given statistics count {frequency} of {statistics.num_passages} passages with {token!r}; collect them from "
            "parts of one version"
        )
    return frequency


def _masks(name: str, masks: Sequence[_Mask | None] | None, segments: Sequence[Postings]) -> Sequence[_Mask | None]:
    """Return one mask or None per segment, after checking them."""
    if masks is None:
        return [None] * len(segments)
    if len(masks) != len(segments):
        raise ValueError(f"{name} has {len(masks)} masks for {len(segments)} segments; pass a mask or None per segment")
    for number, (mask, segment) in enumerate(zip(masks, segments, strict=True)):
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != segment.lengths.shape):
            raise ValueError(
                f"{name}[{number}] is {mask.dtype} of shape {mask.shape}; it must be bool of shape "
                f"{segment.lengths.shape}, one entry per passage of its segment"
            )
    return masks


class _TermNumbers(dict[str, int]):
    """Word -> number of its term, in the order in which terms first occur; a new word is stemmed and numbered."""

    def __init__(self, term: Callable[[str], str]) -> None:
        super().__init__()
        self._term = term
        self.of_term: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        number = self[word] = self.of_term.setdefault(self._term(word), len(self.of_term))
        return number


class _Batch(NamedTuple):
    """The postings of consecutive passages, sorted by term number, then passage."""

    terms: npt.NDArray[np.int32]  # (num_distinct_terms,) numbers, ascending
    frequencies: npt.NDArray[np.int32]  # (num_distinct_terms,) postings of each term
    passages: npt.NDArray[np.int32]  # (num_postings,) counted from the batch's first passage
    counts: npt.NDArray[np.int32]  # (num_postings,)
    lengths: npt.NDArray[np.int32]  # (num_passages,)


def _count(words: list[list[str]], numbers: _TermNumbers) -> _Batch:
    lengths = np.fromiter(map(len, words), dtype=np.int32, count=len(words))
    found = map(numbers.__getitem__, itertools.chain.from_iterable(words))
    terms = np.fromiter(found, dtype=np.int64, count=int(lengths.sum()))
    keys = terms * len(words) + np.repeat(np.arange(len(words)), lengths)
    keys, counts = np.unique(keys, return_counts=True)
    terms, passages = np.divmod(keys, len(words))
    terms, frequencies = np.unique(terms, return_counts=True)
    return _Batch(*(array.astype(np.int32) for array in (terms, frequencies, passages, counts, lengths)))


def _merge(batches: list[_Batch], terms: list[str]) -> Postings:
    """Merge consecutive batches into one segment; each is freed once it is merged, which halves the peak of memory."""
    order = sorted(range(len(terms)), key=terms.__getitem__)
    rank = np.empty(len(terms), dtype=np.int64)
    rank[order] = np.arange(len(terms))
    lengths = np.concatenate([np.zeros(0, dtype=np.int32), *(batch.lengths for batch in batches)])
    indptr = np.zeros(len(terms) + 1, dtype=np.int64)
    for batch in batches:
        indptr[rank[batch.terms] + 1] += batch.frequencies
    np.cumsum(indptr, out=indptr)
    passages, counts = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=np.int32)
    free, offset = indptr[:-1].copy(), 0  # position of each term's next posting
    batches.reverse()
    while batches:
        batch = batches.pop()
        tokens = rank[batch.terms]
        starts = np.cumsum(batch.frequencies) - batch.frequencies
        places = np.repeat(free[tokens] - starts, batch.frequencies) + np.arange(len(batch.passages))
        passages[places] = batch.passages + offset
        counts[places] = batch.counts
        free[tokens] += batch.frequencies
        offset += len(batch.lengths)
    return Postings(tuple(terms[number] for number in order), indptr, passages, counts, lengths)


def _check(postings: Postings, directory: Path) -> None:
    for name, dtype in _ARRAYS.items():
        found = getattr(postings, name).dtype
        if found != dtype:
            raise IndexDataError(f"{directory}/{name}.npy contains {found}, not {np.dtype(dtype)}")
    num_postings = int(postings.indptr[-1]) if len(postings.indptr) else -1
    sizes = len(postings.indptr) - 1, len(postings.passages), len(postings.counts)
    if sizes != (len(postings.vocabulary), num_postings, num_postings):
        raise IndexDataError(
            f"{directory}: vocabulary of {len(postings.vocabulary)}, indptr of {len(postings.indptr)} and "
            f"{len(postings.passages)} postings do not belong together; run: ragtune index CONFIG"
        )
