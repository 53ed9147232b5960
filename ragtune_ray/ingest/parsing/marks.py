"""How parsers of every kind write tables, list numbers and raised digits as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RAISED = str.maketrans("0123456789+-−=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ")
_LOWERED = str.maketrans("0123456789+-−=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ")
_HAS_RAISED = re.compile(r"[0-9+\-−=()ni]*[0-9ni]")
_HAS_LOWERED = re.compile(r"[0-9+\-−=()aehijklmnoprstuvx]+")
_UNSAFE = re.compile(r"\||\s{2,}|[^\S ]")
_WORD = re.compile(r"[^\W\d_]{2,}\.?")
_ROMAN = tuple(
    zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ["m", "cm", "d", "cd", "c", "xc", "l", "xl", "x", "ix", "v", "iv", "i"],
        strict=True,
    )
)


class Padding:
    """Empty cells that wide and high cells of tables cover, up to a limit per file, since broken files claim any number."""

    def __init__(self) -> None:
        self._left = 100_000

    def take(self, number: int) -> list[str]:
        """That many empty cells, or as many as are left.

        >>> Padding().take(2)
        ['', '']
        """
        taken = max(0, min(number, self._left))
        self._left -= taken
        return [""] * taken


def table(rows: Sequence[Sequence[str]]) -> str:
    r"""Rows of cells as a Markdown table with the first row as its header; empty rows and columns are left out.

    >>> print(table([["a", "b|c"], ["", "1"], ["2", ""], ["", ""]]))
    | a | b\|c |
    |---|---|
    | | 1 |
    | 2 |
    """
    cells = [[_UNSAFE.sub(_escaped, cell).strip() for cell in row] for row in rows if any(row)]
    used = sorted({column for row in cells for column, cell in enumerate(row) if cell})
    if not used:
        return ""
    kept = [[row[column] for column in used if column < len(row)] for row in cells]
    lines = [_line(row) for row in kept if any(row)]
    lines[0] += " |" * (len(used) - lines[0].count(" |"))  # only the header must have every cell
    return "\n".join([lines[0], "|" + "---|" * len(used), *lines[1:]])


def _escaped(found: re.Match[str]) -> str:
    return "\\|" if found[0] == "|" else " "


def _line(cells: list[str]) -> str:
    while not cells[-1]:
        del cells[-1]
    if "" not in cells:
        return "| " + " | ".join(cells) + " |"
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


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
