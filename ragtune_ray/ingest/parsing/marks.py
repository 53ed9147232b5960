"""How parsers of every kind write tables, list numbers and raised digits as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RAISED = str.maketrans("0123456789+-−=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ")
_LOWERED = str.maketrans("0123456789+-−=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ")
_HAS_RAISED = re.compile(r"[0-9+\-−=()ni]*[0-9ni]")
_HAS_LOWERED = re.compile(r"[0-9+\-−=()aehijklmnoprstuvx]+")
_WORD = re.compile(r"[^\W\d_]{2,}\.?")
_ROMAN = tuple(
    zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ["m", "cm", "d", "cd", "c", "xc", "l", "xl", "x", "ix", "v", "iv", "i"],
        strict=True,
    )
)
MAX_COLUMNS = 1_000
"""Columns of a table that are read at most; broken files claim any number."""


def table(rows: Sequence[Sequence[str]]) -> str:
    r"""Rows of cells as a Markdown table with the first row as its header; empty rows and columns are left out.

    >>> print(table([["a", "b|c"], ["1", ""], ["", ""]]))
    | a | b\|c |
    |---|---|
    | 1 |  |
    """
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row[:MAX_COLUMNS]] for row in rows]
    cells = [row for row in cells if any(row)]
    width = max(map(len, cells), default=0)
    kept = [column for column in range(width) if any(column < len(row) and row[column] for row in cells)]
    lines = ["| " + " | ".join(row[column] if column < len(row) else "" for column in kept) + " |" for row in cells]
    return "\n".join([*lines[:1], "|" + "---|" * len(kept), *lines[1:]]) if lines else ""


def raised(text: str, before: str) -> str:
    """Superscript text: `^` after a digit, Unicode after a letter; words such as `st`, and footnotes, stay as they are.

    >>> [raised("6", "10"), raised("2", "m"), raised("st", "1"), raised("a+b", "x")]
    ['^6', '²', 'st', '^a+b']
    """
    text = text.strip()
    if not text or _WORD.fullmatch(text) or text[0] in "[(*†‡" or not before.strip():
        return text
    if before[-1:].isdigit() or before[-1:] in ")]":
        return f"^{text}"
    return text.translate(_RAISED) if _HAS_RAISED.fullmatch(text) else f"^{text}"


def lowered(text: str) -> str:
    """Subscript text in Unicode where all its characters exist, else after `_`.

    >>> [lowered("2"), lowered("max"), lowered("A")]
    ['₂', 'ₘₐₓ', '_A']
    """
    text = text.strip()
    return text.translate(_LOWERED) if _HAS_LOWERED.fullmatch(text) else f"_{text}" if text else ""


def number(value: int, form: str) -> str:
    """A number of a list in one of the number formats of Word; as digits if the format is another one.

    >>> [number(4, form) for form in ("decimal", "upperRoman", "lowerLetter", "decimalZero")]
    ['4', 'IV', 'd', '04']
    """
    match form:
        case "upperRoman" | "lowerRoman" if 0 < value < 4000:
            text = ""
            for size, letters in _ROMAN:
                text += letters * (value // size)
                value %= size
            return text.upper() if form == "upperRoman" else text
        case "upperLetter" | "lowerLetter" if 0 < value <= 26 * 26:
            text = chr(ord("a") + (value - 1) % 26) * ((value - 1) // 26 + 1)
            return text.upper() if form == "upperLetter" else text
        case "decimalZero":
            return f"{value:02}"
        case "none":
            return ""
        case _:
            return str(value)
