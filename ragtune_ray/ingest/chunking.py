"""Splits documents into passages at natural boundaries.

A passage is an exact slice of its document. It ends in the last third of its window at a paragraph break, else at the
end of a sentence, else at a clause mark, else at a space or a character of an unspaced script (Chinese, Japanese, Thai,
...). Subword tokenizers may count the tokens of a slice differently than in context, so every passage is tokenized again
by itself and shortened until it fits. Each step looks at one window only, so time is linear in the text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray import RagtuneError
from ragtune_ray.schema import Document, Passage

Spans = npt.NDArray[np.int32]
TokenSpans = Callable[[list[str]], list[npt.NDArray[np.int32]]]
"""Texts -> for each text an int array (num_tokens, 2): first character of each token, and one past its last."""

UNSPACED_SCRIPTS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u30fc\uff70\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Javanese}\p{Balinese}"
)
"""Letters of scripts without spaces between words, as the inside of a `regex` character set; see also `UNSPACED_BLOCKS` of
`answering.citations`, which are Unicode blocks with punctuation."""

_WINDOW_CHARACTERS = 2**15  # tokenizers slow down on longer texts, and use ~100 bytes per token of a batch
_BATCH_CHARACTERS = 2**18
_PEEK = 32  # characters beyond a window that decide whether its end is a boundary

_CLOSERS = r"[\"'”’»\)\]\}」』】》〉）］]"
_UNSPACED_MARKS = r"\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_JOINS_LEFT = r"(?![\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=ZWJ}])"  # no cut inside a grapheme cluster (UAX 29)
_JOINS_RIGHT = r"(?<![\p{GCB=ZWJ}\p{GCB=Prepend}\u1039\u17d2\u1a60\ua9c0])"
_PARAGRAPH = r"\n[^\S\n]*\n"
_PARAGRAPH_BREAK = regex.compile(_PARAGRAPH)
_SENTENCE_BREAK = regex.compile(
    rf"(?P<mark>[.!?…؟۔।॥።։]+){_CLOSERS}*(?!\S)"
    rf"|[。！？；｡︒။។།…]+[。！？!?…]*{_CLOSERS}*{_JOINS_LEFT}|(?P<paragraph>{_PARAGRAPH})"
)
_CLAUSE_BREAK = regex.compile(rf"[,;:—–،؛]{_CLOSERS}*(?!\S)|[，、：]{_CLOSERS}*{_JOINS_LEFT}")
# The lookahead comes first, so that a long run of marks is not scanned backwards from each mark.
_WORD_BREAK = regex.compile(
    rf"\s+|{_JOINS_LEFT}(?![\p{{Pe}}\p{{Pf}}。！？；，、：…]){_JOINS_RIGHT}(?<![\p{{Ps}}\p{{Pi}}])"
    rf"(?:(?<=\S)(?=[{UNSPACED_SCRIPTS}])|(?=\S)(?<=[{UNSPACED_SCRIPTS}{_UNSPACED_MARKS}]\p{{M}}*))"
)
_GRAPHEME = regex.compile(r"\X")
LONGEST_TOKEN_CHARACTERS = 64
"""A longer token is counted as several."""

_IN_WORD = regex.compile(r"(?<=\w)(?=\w)")
_NON_SPACE = re.compile(r"\S")  # `re`, not `regex`: like str.strip it counts U+001C to U+001F as whitespace
_LAST_WORD = regex.compile(r"[\w.]+$")
ABBREVIATION = regex.compile(
    r"\p{Lu}|\p{L}(?:\.\p{L})+"  # "J", "U.S", "e.g", "a.m"
    r"|(?i:al|approx|apr|aug|ave|ca|capt|cf|ch|co|col|corp|dec|dept|dr|eds?|eq|est|etc|feb|figs?|ft|gen|gov|hon|inc|jan|jr"
    r"|jul|jun|lt|ltd|maj|mar|messrs|mrs?|ms|mt|nos?|nov|oct|op|pp?|pres|prof|ref|rep|rev|sec|sen|sept?|sgt|sr|st|viz|vol|vs)"
)
"""A word, without its last full stop, after which a full stop ends no sentence; initials, too."""
_WORD = regex.compile(rf"[{UNSPACED_SCRIPTS}]\p{{M}}*|(?:(?![{UNSPACED_SCRIPTS}])\w)+|\S")
_MARK_KIND, _WORD_KIND = 1, 2
_ASCII_KINDS = np.array(
    [
        0 if chr(code) in " \t\n\v\f\r" else _WORD_KIND if re.match(r"\w", chr(code)) else _MARK_KIND
        for code in range(128)
    ],
    dtype=np.uint8,
)
"""Of each ASCII character: a space, a mark, or part of a word, as `_WORD` takes it."""


class TokenizerError(RagtuneError, TypeError):
    """The tokenizer reports no character offsets."""


def tokenizer_spans(tokenizer: Any) -> TokenSpans:
    """Token offsets from a fast Hugging Face tokenizer, without special and empty tokens, truncation or padding.

    Args:
        tokenizer: a `tokenizers.Tokenizer` or a fast transformers tokenizer; it is copied, never changed.

    Raises:
        TokenizerError: the tokenizer has no fast backend, so it reports no offsets.
    """
    from tokenizers import Tokenizer

    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise TokenizerError(f"{type(tokenizer).__name__} reports no character offsets; load it with use_fast=True")
    private = Tokenizer.from_str(backend.to_str())
    private.no_truncation()
    private.no_padding()

    def spans(texts: list[str]) -> list[Spans]:
        return [_offsets(encoding.offsets) for encoding in private.encode_batch(texts, add_special_tokens=False)]

    return spans


def word_spans(texts: list[str]) -> list[Spans]:
    """Token offsets without a tokenizer: words, punctuation marks, and each character of an unspaced script.

    >>> word_spans(["So, 你好"])[0].tolist()
    [[0, 2], [2, 3], [4, 5], [5, 6]]
    """
    of_ascii = iter(_ascii_word_spans([text for text in texts if text.isascii()]))
    return [
        next(of_ascii) if text.isascii() else _offsets([match.span() for match in _WORD.finditer(text)])
        for text in texts
    ]


def _ascii_word_spans(texts: Sequence[str]) -> list[Spans]:
    """What `_WORD` finds in texts of ASCII characters, twenty times as fast."""
    kinds = _ASCII_KINDS[np.frombuffer(" ".join(texts).encode(), dtype=np.uint8)]
    is_word, is_mark = kinds == _WORD_KIND, kinds == _MARK_KIND
    starts = np.flatnonzero(is_mark | (is_word & ~np.append(False, is_word)[:-1])).astype(np.int32)
    ends = np.flatnonzero(is_mark | (is_word & ~np.append(is_word, False)[1:])).astype(np.int32) + 1
    spans = np.stack([starts, ends], axis=1)
    first = np.cumsum([0, *(len(text) + 1 for text in texts)], dtype=np.int32)
    parts = np.split(spans, np.searchsorted(starts, first[1:-1]))
    return [_without_long_tokens(part - start) for part, start in zip(parts, first, strict=False)]


def chunk(document: Document, token_spans: TokenSpans, size_tokens: int, overlap_tokens: int) -> list[Passage]:
    """Split one document; see `chunk_all`, which is faster for many.

    >>> document = Document("d", "One two. Three four. Five six.", "", "{}", "")
    >>> [passage.text for passage in chunk(document, word_spans, 6, 0)]
    ['One two. Three four.', 'Five six.']
    """
    return chunk_all([document], token_spans, size_tokens, overlap_tokens)[0]


def chunk_all(
    documents: Sequence[Document], token_spans: TokenSpans, size_tokens: int, overlap_tokens: int
) -> list[list[Passage]]:
    """Split each document into passages that cover all of it except leading and trailing whitespace.

    A word or grapheme cluster is split only if it alone is longer than `size_tokens`.

    Args:
        documents: in any order; a document of only whitespace has no passages.
        token_spans: how to count tokens: `tokenizer_spans(...)` or `word_spans`.
        size_tokens: maximum tokens of a passage, counted on its own text; a single character is never split.
        overlap_tokens: maximum tokens that a passage shares with the previous one, below `size_tokens`; the overlap begins
            at the start of a sentence if possible, else of a word, and is at most half of the previous passage.

    Raises:
        ValueError: a size is out of range.
    """
    if not 0 <= overlap_tokens < size_tokens:
        raise ValueError(
            f"chunking needs 0 <= overlap_tokens < size_tokens, got {overlap_tokens} and {size_tokens}; "
            "lower chunking.overlap_tokens or raise chunking.size_tokens"
        )
    texts = [document.text.strip() for document in documents]
    results = []
    for document, text, spans in zip(documents, texts, _tokenize(texts, token_spans), strict=True):
        starts, ends = (np.maximum.accumulate(column) for column in spans.T)
        source = _Source(text, starts, ends, token_spans, size_tokens, overlap_tokens)
        offset = len(document.text) - len(document.text.lstrip())
        ranges = _ranges(source)
        results.append([_passage(document, number, offset + a, offset + b) for number, (a, b) in enumerate(ranges)])
    return results


@dataclass(frozen=True, slots=True)
class _Source:
    """A stripped text, the offsets of its tokens, and the requested sizes."""

    text: str
    starts: Spans
    ends: Spans
    token_spans: TokenSpans
    size: int
    overlap: int


def _passage(document: Document, number: int, start: int, end: int) -> Passage:
    name, text = document.document_id, document.text[start:end]
    return Passage(f"{name}#{number}", name, text, document.title, document.metadata, start, end)


def _offsets(pairs: Sequence[tuple[int, int]]) -> Spans:
    flat = np.fromiter(itertools.chain.from_iterable(pairs), dtype=np.int32, count=2 * len(pairs))
    spans = flat.reshape(-1, 2)
    return _without_long_tokens(spans[spans[:, 1] > spans[:, 0]])


def _without_long_tokens(spans: Spans) -> Spans:
    """The spans, with those of more than `LONGEST_TOKEN_CHARACTERS` in pieces."""
    widths = spans[:, 1] - spans[:, 0]
    if not (widths > LONGEST_TOKEN_CHARACTERS).any():
        return spans
    # A tokenizer may return a megabyte without spaces as one unknown token, which would become one passage.
    pieces = -(-widths // LONGEST_TOKEN_CHARACTERS)
    places = np.arange(pieces.sum(), dtype=np.int32) - np.repeat(np.cumsum(pieces) - pieces, pieces).astype(np.int32)
    starts = np.repeat(spans[:, 0], pieces) + places * LONGEST_TOKEN_CHARACTERS
    ends = np.minimum(starts + LONGEST_TOKEN_CHARACTERS, np.repeat(spans[:, 1], pieces))
    return np.stack([starts, ends], axis=1).astype(np.int32)


def _tokenize(texts: Sequence[str], token_spans: TokenSpans) -> Iterator[Spans]:
    """Tokenize long texts in windows and short ones together; yields the spans of each text."""
    parts: list[Spans] = []
    for batch in _batches(texts):
        windows = [texts[number][start:end] for number, start, end in batch]
        for (number, start, end), spans in zip(batch, token_spans(windows), strict=True):
            parts.append(spans + np.int32(start))
            if end == len(texts[number]):
                yield np.concatenate(parts)
                parts = []


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, int, int]]]:
    batch: list[tuple[int, int, int]] = []
    num_characters = 0
    for number, text in enumerate(texts):
        for start, end in _windows(text):
            batch.append((number, start, end))
            num_characters += end - start
            if num_characters >= _BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
    if batch:
        yield batch


def _windows(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while len(text) - start > _WINDOW_CHARACTERS:
        middle, end = start + _WINDOW_CHARACTERS // 2, start + _WINDOW_CHARACTERS
        end = 1 + max(text.rfind(" ", middle, end), text.rfind("\n", middle, end)) or end
        yield start, end
        start = end
    yield start, len(text)


def _ranges(source: _Source) -> Iterator[tuple[int, int]]:
    text = source.text
    # The tokens of a text within one window were counted on the whole text.
    if len(source.starts) <= source.size and len(text) <= _WINDOW_CHARACTERS:
        if text:
            yield 0, len(text)
        return
    start, end = 0, _end(source, 0)[0]
    yield start, end
    while end < len(text):
        start, end = _next(source, start, end)
        yield start, end


def _next(source: _Source, previous_start: int, previous_end: int) -> tuple[int, int]:
    """The range of the next passage; it overlaps the previous one if there is room for new text."""
    fresh = _skip_space(source.text, previous_end)
    budget = source.overlap
    while budget > 0:
        start = _overlap_start(source, previous_start, previous_end, budget)
        if start >= previous_end:
            break
        end, own_spans = _end(source, start)
        if end <= fresh:
            break
        excess = int(np.count_nonzero(own_spans[:, 0] < previous_end - start)) - source.overlap
        if excess <= 0:
            return start, end
        budget -= excess
    return fresh, _end(source, fresh)[0]


def _overlap_start(source: _Source, start: int, end: int, budget: int) -> int:
    """The first start of a sentence, else of a word, in the last `budget` tokens of [start, end); `end` if none."""
    first = _count(source.ends, start, "right")
    last = _count(source.starts, end, "left")
    budget = min(budget, (last - first) // 2)
    if budget == 0:
        return end
    low = max(start + 1, int(source.starts[last - budget]))
    before = max(start, low - _PEEK)
    for pattern in (_SENTENCE_BREAK, _WORD_BREAK):
        for match in pattern.finditer(source.text, before, end):
            position = _skip_space(source.text, match.end())
            if low <= position < end and _is_break(source.text, match):
                return position
    return end


def _end(source: _Source, start: int) -> tuple[int, Spans]:
    """The end of the passage that begins at `start`, and the token spans of its own text."""
    text, size = source.text, source.size
    first = _count(source.ends, start, "right")
    upcoming = source.starts[first : first + size + size // 4 + 1]
    is_last = first + len(upcoming) == len(source.starts)
    while True:
        cut = _cut(source, start, upcoming, is_last=is_last)
        end = start + len(text[start:cut].rstrip())
        own_spans = source.token_spans([text[start:end]])[0]
        if len(own_spans) <= size or end - start == 1:
            return end, own_spans
        upcoming, is_last = start + own_spans[:, 0], end == len(text)


def _cut(source: _Source, start: int, upcoming: Spans, *, is_last: bool) -> int:
    """The best end of a passage from `start`, given the starts of the next tokens; `is_last`: no more tokens follow."""
    text, size, num_upcoming = source.text, source.size, len(upcoming)
    if is_last and num_upcoming <= size:
        return len(text)
    half = (num_upcoming + source.overlap + 1) // 2
    if is_last and num_upcoming <= size + size // 4 and half < size:  # otherwise the last passage would be tiny
        low = min(half, max(2 * half // 3, num_upcoming + source.overlap - size))
        cut = _near_boundary(text, max(start, int(upcoming[low])), int(upcoming[half]))
        if cut is not None:
            return cut
    high = max(start + 1, int(upcoming[size]))
    cut = _near_boundary(text, max(start, int(upcoming[2 * size // 3])), high)
    return _far_boundary(text, start, high) if cut is None else cut


def _near_boundary(text: str, low: int, high: int) -> int | None:
    """The last paragraph break in (low, high]; else sentence end, clause mark or word boundary; None if there is none."""
    for pattern in (_PARAGRAPH_BREAK, _SENTENCE_BREAK, _CLAUSE_BREAK, _WORD_BREAK):
        position = _last_break(pattern, text, low, high)
        if position is not None:
            return position
    return None


def _far_boundary(text: str, start: int, high: int) -> int:
    """The last word boundary in (start, high]; if there is none, a boundary inside the word that fills the window."""
    position = _last_break(_WORD_BREAK, text, start, high)
    if position is not None:
        return position
    window = text[start : high + _PEEK]  # a slice, since \X pairs flag characters from the beginning of its text
    ends: list[int] = [start + match.end() for match in _GRAPHEME.finditer(window)]
    graphemes = [end for end in ends if end <= high]
    between = [end for end in graphemes if not _IN_WORD.match(text, end)]
    return (between or graphemes or [high])[-1]


def _last_break(pattern: regex.Pattern[str], text: str, low: int, high: int) -> int | None:
    last = None
    for match in pattern.finditer(text, low, min(len(text), high + _PEEK)):
        position = match.start() if match[0].isspace() else match.end()
        if position > high:
            break
        if position > low and _is_break(text, match):
            last = position
    return last


def _is_break(text: str, match: regex.Match[str]) -> bool:
    """False for a full stop after an abbreviation, an initial or a list number, or before a lower-case letter."""
    if match.re is not _SENTENCE_BREAK or match["mark"] != ".":
        return True
    if text[match.end() : match.end() + _PEEK].lstrip()[:1].islower():
        return False
    before = text[max(0, match.start() - _PEEK) : match.start()]
    word = _LAST_WORD.search(before)
    if word is None:
        return True
    if word[0].isdecimal():
        return bool(before[: word.start()].rstrip(" \t")[-1:].strip())
    return not ABBREVIATION.fullmatch(word[0])


def _skip_space(text: str, position: int) -> int:
    match = _NON_SPACE.search(text, position)
    return int(match.start()) if match else len(text)


def _count(positions: Spans, position: int, side: Literal["left", "right"]) -> int:
    """The number of sorted positions less than `position`; side "right" also counts equal ones."""
    return int(np.searchsorted(positions, np.int32(position), side))  # a Python int would copy the array to int64
