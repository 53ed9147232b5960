"""Splits an answer into the sentences that are checked against passages."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ragtune_ray.answering import citations
from ragtune_ray.ingest.chunking import ABBREVIATION

_WORD = re.compile(r"[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_LAST_WORD = re.compile(r"[\w.]*\w(?=\.$)")
_LABEL = re.compile(r"\(?(?:[A-Za-z]|[ivxIVX]{1,5})[.)]+")
"""The label of a list item; those without letters need no pattern."""
_NO_STATEMENT = re.compile(r"#{1,6}\s|(?:`{3,}|~{3,})\w*$")
"""A heading, or the first or last line of a block of code."""

Checked = tuple[str, tuple[str, ...]]
"""A sentence, and the ids of the passages that it cites."""


def checked_sentences(
    answer: str, cited: Sequence[tuple[str, ...]] | None, by_answer: tuple[str, ...]
) -> list[Checked]:
    r"""The sentences of an answer that state something, each with what it cites.

    Joined with what follows on their line: the number of a list item, and what ends in an abbreviation or an initial. Left out:
    what has no word, such as the rule of a table; headings; fences of code. If nothing else remains, the answer is one sentence.

    Args:
        answer: not empty, without citation marks.
        cited: for each sentence as `citations.sentences` splits them, the ids of the passages that it cites; None if unknown.
        by_answer: ids of the passages that the whole answer cites; every sentence cites them if `cited` does not fit.

    >>> checked_sentences("1. It is red\n2. Dr. No said so.\n---", None, ("m#0",))
    [('1. It is red', ('m#0',)), ('2. Dr. No said so.', ('m#0',))]
    """
    spans = citations.sentences(answer)
    each = cited if cited is not None and len(cited) == len(spans) else [by_answer] * len(spans)
    found: list[Checked] = []
    names: tuple[str, ...] = ()
    begun = -1  # start of a sentence that the next part continues
    for place, ((start, end), own) in enumerate(zip(spans, each, strict=True)):
        begun, names = (start if begun < 0 else begun), (*names, *own)
        following = spans[place + 1][0] if place + 1 < len(spans) else len(answer)
        on_same_line = place + 1 < len(spans) and "\n" not in answer[end:following]
        if on_same_line and _is_unfinished(answer[begun:end]):
            continue
        text = answer[begun:end]
        if _WORD.search(text) and not _NO_STATEMENT.match(text):
            found.append((text, tuple(dict.fromkeys(names))))
        begun, names = -1, ()
    return found or [(answer.strip(), by_answer)]


def _is_unfinished(text: str) -> bool:
    """Whether a text is no sentence yet: it has no letter or is a label, or its full stop belongs to an abbreviation."""
    if not _LETTER.search(text) or _LABEL.fullmatch(text):
        return True
    last = _LAST_WORD.search(text)
    return last is not None and ABBREVIATION.fullmatch(last[0]) is not None
