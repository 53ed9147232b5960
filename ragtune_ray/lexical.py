"""BM25 over passages: Robertson & Zaragoza (2009), in Lucene's variant, as bm25s computes it (Lù, 2024).

    score(q, p) = sum over the tokens t of q of  idf(t) * tf / (tf + k1 * (1 - b + b * length(p) / average length))
    idf(t)      = ln(1 + (N - df(t) + 0.5) / (df(t) + 0.5))

In: texts. Out: segments of token counts, and for a query the best passages. A segment holds counts only; N, df and the
average length belong to the whole index, so scores do not depend on how passages fall into segments. Stop words are
counted like any word and left out of queries, unless a query has nothing else. This module knows nothing of FAISS or Ray.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import bm25s
import numpy as np
import numpy.typing as npt
import regex  # type: ignore[import-untyped]  # the library has no stubs
from bm25s.stopwords import STOPWORDS_EN_PLUS

from ragtune_ray.chunking import UNSPACED

__all__ = ["LexicalIndex", "Postings", "build_segment", "tokens"]

_ARRAYS = {"indptr": np.int64, "passages": np.int32, "counts": np.int32, "lengths": np.int32}
_VOCABULARY_FILE = "vocabulary.txt"
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_ASCII_WORD_EN = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")  # "don't" is one word, so that stop words and stemmer know it
_LETTER = rf"(?:(?![{UNSPACED}_])\w)"
_WORD = regex.compile(rf"[{UNSPACED}][{UNSPACED}\p{{M}}]*|{_LETTER}+")
_WORD_EN = regex.compile(rf"[{UNSPACED}][{UNSPACED}\p{{M}}]*|{_LETTER}+(?:'{_LETTER}+)*")
_UNSPACED_START = regex.compile(rf"[{UNSPACED}]")


@dataclass(frozen=True, slots=True)
class Postings:
    """The token counts of one immutable segment, by token: those of token t stand at indptr[t]:indptr[t + 1]."""

    vocabulary: tuple[str, ...]
    """Tokens, sorted."""
    indptr: npt.NDArray[np.int64]
    """(num_tokens + 1,)"""
    passages: npt.NDArray[np.int32]
    """(num_postings,) ordinals of passages within the segment, ascending for each token."""
    counts: npt.NDArray[np.int32]
    """(num_postings,) how often the token stands in that passage."""
    lengths: npt.NDArray[np.int32]
    """(num_passages,) tokens of each passage."""

    def save(self, directory: Path) -> None:
        """Write four .npy files and `vocabulary.txt` (one token a line); the same postings give the same bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)
        (directory / _VOCABULARY_FILE).write_bytes("\n".join(self.vocabulary).encode())

    @classmethod
    def load(cls, directory: Path, *, mmap: bool) -> Postings:
        """Read what `save` wrote; with `mmap` the arrays stay on disk until they are touched.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not belong together.
        """
        mode: Literal["r"] | None = "r" if mmap else None
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in _ARRAYS}
        text = (directory / _VOCABULARY_FILE).read_bytes().decode()
        postings = cls(vocabulary=tuple(text.split("\n")) if text else (), **arrays)
        _check(postings, directory)
        return postings


def tokens(texts: Sequence[str], language: str) -> list[list[str]]:
    """The query tokens of each text: as they are indexed, without stop words unless there is nothing else.

    Words are compatibility-normalised (NFKC) and case-folded; a run of an unspaced script (Chinese, Thai, ...) becomes
    its overlapping character pairs, or the one character it is.

    Args:
        texts: any texts.
        language: "en" stems (Porter2) and knows stop words; "none" does neither.

    Raises:
        ValueError: the language is unknown.

    >>> tokens(["The Moons of 木星人, to be", "To be"], "en")
    [['moon', '木星', '星人'], ['to', 'be']]
    """
    term = _terms(language)
    stop_words = _stop_words() if language == "en" else frozenset()
    results = []
    for text in texts:
        words = _words(text, language)
        results.append([term(word) for word in words if word not in stop_words] or [term(word) for word in words])
    return results


def build_segment(texts: Sequence[str], language: str) -> Postings:
    """Count the tokens of passages, stop words included.

    Args:
        texts: the passages, in the order of their ordinals.
        language: as in `tokens`.

    Raises:
        ValueError: the language is unknown.
    """
    term = _terms(language)
    words = [_words(text, language) for text in texts]
    lengths = np.fromiter(map(len, words), dtype=np.int32, count=len(words))
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(words)))
    terms = [term(word) for word in distinct]
    vocabulary = sorted(set(terms))
    number_of_term = {text: number for number, text in enumerate(vocabulary)}
    number_of_word = {word: number_of_term[text] for word, text in zip(distinct, terms, strict=True)}
    numbers = np.fromiter(
        map(number_of_word.__getitem__, itertools.chain.from_iterable(words)), dtype=np.int64, count=int(lengths.sum())
    )
    passages = np.repeat(np.arange(len(words), dtype=np.int64), lengths)
    keys, counts = np.unique(numbers * max(1, len(words)) + passages, return_counts=True)
    token_of_posting, passage_of_posting = np.divmod(keys, max(1, len(words)))
    return Postings(
        vocabulary=tuple(vocabulary),
        indptr=np.searchsorted(token_of_posting, np.arange(len(vocabulary) + 1)).astype(np.int64),
        passages=passage_of_posting.astype(np.int32),
        counts=counts.astype(np.int32),
        lengths=lengths,
    )


class LexicalIndex:
    """All segments, ready to search: bm25s's eager scores per segment, from the statistics of the whole.

    Args:
        segments: in the order of their passages' ordinals.
        language: the one the segments were built with.
        k1: how slowly repeated tokens saturate.
        b: how much long passages are discounted, 0 to 1.

    Raises:
        ValueError: the language is unknown.
    """

    def __init__(self, segments: Sequence[Postings], language: str, k1: float = 1.5, b: float = 0.75) -> None:
        _terms(language)
        self._language = language
        self._num_passages = sum(len(segment.lengths) for segment in segments)
        num_tokens = sum(int(segment.lengths.sum(dtype=np.int64)) for segment in segments)
        average_length = num_tokens / max(1, self._num_passages)
        frequencies = _document_frequencies(segments)
        self._segments = [
            _bm25(segment, frequencies, self._num_passages, average_length, k1, b) for segment in segments
        ]

    @property
    def num_passages(self) -> int:
        """Passages of all segments."""
        return self._num_passages

    def search(self, queries: Sequence[str], top_k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The best passages of each query.

        Args:
            queries: texts.
            top_k: hits per query, at least 1.

        Returns:
            scores and ids, each (num_queries, top_k). An id is the passage's ordinal over all segments. Ordered by score,
            best first, then by id. Only passages that share a token with the query are hits; places without a hit hold
            score -inf and id -1.

        Raises:
            ValueError: `top_k` is below 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        scores = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), top_k), -1, dtype=np.int64)
        for row, query_tokens in enumerate(tokens(queries, self._language)):
            all_scores = self._scores(query_tokens)
            best = _best(all_scores, top_k)
            scores[row, : len(best)] = all_scores[best]
            ids[row, : len(best)] = best
        return scores, ids

    def _scores(self, query_tokens: list[str]) -> npt.NDArray[np.float32]:
        parts = []
        for segment in self._segments:
            token_ids = segment.get_tokens_ids(query_tokens)
            if token_ids:
                parts.append(segment.get_scores_from_ids(token_ids))
            else:
                parts.append(np.zeros(segment.scores["num_docs"], dtype=np.float32))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _best(scores: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.int64]:
    """Ids of the `top_k` highest scores above 0, equal scores by id; without sorting them all."""
    threshold = np.float32(0)
    if top_k < len(scores):
        threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
    candidates = np.flatnonzero(scores >= threshold if threshold > 0 else scores > 0)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]


def _document_frequencies(segments: Sequence[Postings]) -> dict[str, int]:
    frequencies: dict[str, int] = {}
    for segment in segments:
        for token, frequency in zip(segment.vocabulary, np.diff(segment.indptr).tolist(), strict=True):
            frequencies[token] = frequencies.get(token, 0) + frequency
    return frequencies


def _bm25(
    segment: Postings, frequencies: dict[str, int], num_passages: int, average_length: float, k1: float, b: float
) -> Any:
    """A `bm25s.BM25` whose eager scores come from the statistics of the whole index."""
    idf = np.array(
        [math.log1p((num_passages - frequencies[t] + 0.5) / (frequencies[t] + 0.5)) for t in segment.vocabulary]
    )
    saturation = k1 * (1 - b + b * segment.lengths / max(average_length, 1e-9))  # per passage
    data = np.repeat(idf, np.diff(segment.indptr)) * (segment.counts / (segment.counts + saturation[segment.passages]))
    model = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
    model.nonoccurrence_array = None
    model.vocab_dict = {token: number for number, token in enumerate(segment.vocabulary)}
    model.scores = {
        "data": data.astype(np.float32),
        "indices": segment.passages,
        "indptr": segment.indptr,
        "num_docs": len(segment.lengths),
    }
    return model


def _words(text: str, language: str) -> list[str]:
    """Normalised words, before stop words and stemming."""
    if text.isascii():
        return (_ASCII_WORD_EN if language == "en" else _ASCII_WORD).findall(text.lower())
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("’", "'")
    words: list[str] = (_WORD_EN if language == "en" else _WORD).findall(text)
    if not _UNSPACED_START.search(text):
        return words
    return list(itertools.chain.from_iterable(map(_pairs, words)))


def _pairs(word: str) -> list[str]:
    if len(word) == 1 or not _UNSPACED_START.match(word):
        return [word]
    return [word[i : i + 2] for i in range(len(word) - 1)]


@cache
def _stop_words() -> frozenset[str]:
    return frozenset(STOPWORDS_EN_PLUS)


@cache
def _terms(language: str) -> Callable[[str], str]:
    """Word -> the term under which it is indexed."""
    match language:
        case "en":
            import Stemmer

            stem: Callable[[str], str] = Stemmer.Stemmer("english").stemWord
            return stem
        case "none":
            return str
        case _:
            raise ValueError(f"index.language is {language!r}; it must be 'en' or 'none'")


def _check(postings: Postings, directory: Path) -> None:
    for name, dtype in _ARRAYS.items():
        if getattr(postings, name).dtype != dtype:
            raise ValueError(f"{directory}/{name}.npy holds {getattr(postings, name).dtype}, not {np.dtype(dtype)}")
    num_postings = int(postings.indptr[-1]) if len(postings.indptr) else -1
    if (
        len(postings.indptr) != len(postings.vocabulary) + 1
        or len(postings.passages) != num_postings
        or len(postings.counts) != num_postings
    ):
        raise ValueError(
            f"{directory}: vocabulary of {len(postings.vocabulary)}, indptr of {len(postings.indptr)} and "
            f"{len(postings.passages)} postings do not belong together; build this segment again"
        )
