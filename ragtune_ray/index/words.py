"""Splits texts into the words and stemmed tokens that lexical search uses.

The rules are named for `index.language`, such as "en" or "none", or "en-folded" and so on: without accents and invisible
characters. All indexes are built with folded words now; older ones keep theirs. Where words are folded, so are stop words, and
words are folded before they are stemmed: someone who types activite finds activités.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import get_args

import regex  # type: ignore[import-untyped]  # the library has no stubs

from ragtune_ray.config import WordLanguage
from ragtune_ray.ingest.chunking import UNSPACED_SCRIPTS

_FOLDED = "-folded"
# Soft hyphens, zero-width spaces and joiners, marks of direction, variation selectors, ...
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
# Scripts whose readers leave accents, points or vowel signs out; in others they make another letter (が, й, हि).
_MARKS = regex.compile(r"([\p{Latin}\p{Greek}\p{Hebrew}\p{Arabic}])\p{Mn}+")
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th"})
_LETTERS |= str.maketrans({"ё": "е", "ـ": ""})  # Cyrillic io and ie; the Arabic tatweel
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_ASCII_WORD_EN = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")  # "don't" is one word: stop words contain it
_LETTER = rf"(?:(?![{UNSPACED_SCRIPTS}_])\w)"
_WORD = regex.compile(rf"[{UNSPACED_SCRIPTS}][{UNSPACED_SCRIPTS}\p{{M}}]*|{_LETTER}+")
_WORD_EN = regex.compile(rf"[{UNSPACED_SCRIPTS}][{UNSPACED_SCRIPTS}\p{{M}}]*|{_LETTER}+(?:'{_LETTER}+)*")
_UNSPACED_START = regex.compile(rf"[{UNSPACED_SCRIPTS}]")


def folded(language: str) -> str:
    """Return the rules for words of new indexes.

    >>> folded("en")
    'en-folded'
    """
    return language.removesuffix(_FOLDED) + _FOLDED


def tokens(texts: Sequence[str], rules: str) -> list[list[str]]:
    """Return the query tokens of each text: stemmed, without stop words unless the text has no other words.

    Words are normalized (NFKC) and case-folded. A run of an unspaced script (Chinese, Thai, ...) becomes its overlapping
    pairs of characters, or one token if it is a single character. Rules of a language stem with its Snowball stemmer (English:
    Porter2) and drop its stop words; "none" do neither.

    >>> tokens(["The Moons of 木星人, to be", "To be", "Café"], "en-folded")
    [['moon', '木星', '星人'], ['to', 'be'], ['cafe']]
    >>> tokens(["die Verträge", "Vertrag"], "de-folded")
    [['vertrag'], ['vertrag']]
    """
    term = term_of(rules)
    stop_words = _stop_words_of(rules)
    results = []
    for text in texts:
        words = words_of(text, rules)
        results.append([term(word) for word in words if word not in stop_words] or [term(word) for word in words])
    return results


def words_of(text: str, rules: str) -> list[str]:
    """Split a text into normalized words; stop words are kept and nothing is stemmed."""
    if text.isascii():
        return (_ASCII_WORD_EN if _is_english(rules) else _ASCII_WORD).findall(text.lower())
    if rules.endswith(_FOLDED):
        text = without_accents(unicodedata.normalize("NFKC", visible(text)).casefold())
    else:
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.replace("’", "'")
    words: list[str] = (_WORD_EN if _is_english(rules) else _WORD).findall(text)
    if not _UNSPACED_START.search(text):
        return words
    return list(itertools.chain.from_iterable(map(_pairs, words)))


def visible(text: str) -> str:
    r"""The text without invisible characters, which stand inside words or between them without meaning.

    >>> visible("co\u00adoper\u200bate")
    'cooperate'
    """
    return text if text.isascii() else _INVISIBLE.sub("", text)


def without_accents(text: str) -> str:
    """A case-folded text with letters as people type them to search.

    >>> without_accents("crème smørrebrød über żółw i̇stanbul")
    'creme smorrebrod uber zolw istanbul'
    """
    if text.isascii():
        return text
    plain = _MARKS.sub(r"\1", unicodedata.normalize("NFKD", text))
    return unicodedata.normalize("NFKC", plain).translate(_LETTERS)


def _is_english(rules: str) -> bool:
    return rules.removesuffix(_FOLDED) == "en"


def _pairs(word: str) -> list[str]:
    if len(word) == 1 or not _UNSPACED_START.match(word):
        return [word]
    return [word[i : i + 2] for i in range(len(word) - 1)]


@cache
def stop_words(language: str) -> frozenset[str]:
    """The stop words of a language, by its ISO 639-1 code; empty if there is no list.

    >>> "und" in stop_words("de"), stop_words("fi")
    (True, frozenset())
    """
    here = Path(__file__)
    if language == "en":
        lines = here.with_name("stop_words_en.txt").read_text(encoding="utf-8").splitlines()
        return frozenset(word for line in lines if not line.startswith("#") for word in line.split())
    lines = here.with_name("stop_words_other.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if line.startswith(f"{language}: ") for word in line.split()[1:])


@cache
def _stop_words_of(rules: str) -> frozenset[str]:
    """The stop words as the words of these rules are written; English ones have no accents."""
    words = stop_words(rules.removesuffix(_FOLDED))
    return frozenset(map(without_accents, words)) if rules.endswith(_FOLDED) else words


@cache
def term_of(rules: str) -> Callable[[str], str]:
    """Return the function that maps a word to its index term."""
    language = rules.removesuffix(_FOLDED)
    if language == "none":
        return str
    if language not in get_args(WordLanguage):
        raise ValueError(f"index.language is {rules!r}; it must be one of {', '.join(get_args(WordLanguage))}")
    import Stemmer

    stem: Callable[[str], str] = Stemmer.Stemmer(language).stemWord  # Snowball knows the codes, too
    return stem
