"""What counts in a text when words are compared: no invisible characters, no accents."""

from __future__ import annotations

import unicodedata

import regex  # type: ignore[import-untyped]  # the library has no stubs

# Soft hyphens, zero-width spaces and joiners, marks of direction, variation selectors, ...
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
# Scripts whose readers leave accents, points or vowel signs out; in others they make another letter (が, й, हि).
_MARKS = regex.compile(r"([\p{Latin}\p{Greek}\p{Hebrew}\p{Arabic}])\p{Mn}+")
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th"})
_LETTERS |= str.maketrans({"ё": "е", "ـ": ""})  # Cyrillic io and ie; the Arabic tatweel


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
