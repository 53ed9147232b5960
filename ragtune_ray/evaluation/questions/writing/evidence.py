"""Finds a quotation in a passage, exactly or despite other spacing and quotation marks, and gives its place in the document."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ragtune_ray.schema import Citation, Passage

MIN_CHARACTERS = 4
"""A shorter quotation is no evidence of anything."""
_MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
)
"""Typographic marks that generators write as ASCII, or the other way round; one character each, so that places are kept."""


def find_quotation(quotation: str, text: str) -> tuple[int, int] | None:
    r"""The (start, end) of a quotation in a text, so that `text[start:end]` is what was quoted; None if it is not there.

    Runs of spaces and line breaks are equal, and so are typographic marks and their ASCII forms. Nothing else may differ: not a
    letter, not its case, not a digit.

    >>> find_quotation('It  is "high".', "Yes.\nIt is\n\u201chigh\u201d. No.")
    (5, 18)
    """
    words = quotation.translate(_MARKS).split()
    if sum(map(len, words)) < MIN_CHARACTERS:
        return None
    found = re.search(r"\s+".join(map(re.escape, words)), text.translate(_MARKS))
    return found.span() if found else None


def cited(quotations: Sequence[str], passages: Sequence[Passage]) -> tuple[Citation, ...] | None:
    """The places of quotations in their documents; None if no passage contains one of them."""
    found: list[Citation] = []
    for quotation in quotations:
        spans = ((passage, find_quotation(quotation, passage.text)) for passage in passages)
        place = next(((passage, span) for passage, span in spans if span is not None), None)
        if place is None:
            return None
        passage, (start, end) = place
        found.append(Citation(passage.passage_id, passage.document_id, passage.start + start, passage.start + end))
    return tuple(dict.fromkeys(found))
