"""Title of reStructuredText; the text stays as it was written, since docutils drops what Sphinx adds to the language."""

from __future__ import annotations

import re

from ragtune_ray.ingest.parsing.text import ParsedFile, count_characters

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])\1*[ \t]*")
_MAX_LINES = 5_000


def parse(text: str) -> ParsedFile:
    r"""Title and text of a page; the title is the first line that is underlined.

    >>> parse(".. comment\n\n=====\nMars\n=====\n\ntext").title
    'Mars'
    """
    lines = text.split("\n", _MAX_LINES)[:_MAX_LINES]
    for above, line, below in zip(["", *lines], lines, lines[1:], strict=False):
        title = line.strip()
        is_underlined = bool(_PUNCTUATION.fullmatch(below)) and len(below.rstrip()) >= min(len(title), 4)
        if title and is_underlined and not _PUNCTUATION.fullmatch(line):
            is_overlined = bool(_PUNCTUATION.fullmatch(above))
            if is_overlined or not line[:1].isspace():
                return ParsedFile(title, text, plain_characters=count_characters(text))
    return ParsedFile("", text, plain_characters=count_characters(text))
