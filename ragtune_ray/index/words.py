"""Splits texts into the words and stemmed tokens that lexical search uses."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.ingest.chunking import UNSPACED_SCRIPTS

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_ASCII_WORD_EN = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")  # "don't" is one word: stop words contain it
_LETTER = rf"(?:(?![{UNSPACED_SCRIPTS}_])\w)"
_WORD = regex.compile(rf"[{UNSPACED_SCRIPTS}][{UNSPACED_SCRIPTS}\p{{M}}]*|{_LETTER}+")
_WORD_EN = regex.compile(rf"[{UNSPACED_SCRIPTS}][{UNSPACED_SCRIPTS}\p{{M}}]*|{_LETTER}+(?:'{_LETTER}+)*")
_UNSPACED_START = regex.compile(rf"[{UNSPACED_SCRIPTS}]")


def tokens(texts: Sequence[str], language: str) -> list[list[str]]:
    """Return the query tokens of each text: stemmed, without stop words unless the text has no other words.

    Words are normalized (NFKC) and case-folded. A run of an unspaced script (Chinese, Thai, ...) becomes its overlapping
    pairs of characters, or one token if it is a single character. `language` "en" stems (Porter2) and drops stop words;
    "none" does neither.

    >>> tokens(["The Moons of 木星人, to be", "To be"], "en")
    [['moon', '木星', '星人'], ['to', 'be']]
    """
    term = term_of(language)
    stop_words = _stop_words() if language == "en" else frozenset()
    results = []
    for text in texts:
        words = words_of(text, language)
        results.append([term(word) for word in words if word not in stop_words] or [term(word) for word in words])
    return results


def words_of(text: str, language: str) -> list[str]:
    """Split a text into normalized words; stop words are kept and nothing is stemmed."""
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
    lines = Path(__file__).with_name("stop_words_en.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


@cache
def term_of(language: str) -> Callable[[str], str]:
    """Return the function that maps a word to its index term."""
    match language:
        case "en":
            import Stemmer

            stem: Callable[[str], str] = Stemmer.Stemmer("english").stemWord
            return stem
        case "none":
            return str
        case _:
            raise ValueError(f"index.language is {language!r}; it must be 'en' or 'none'")
