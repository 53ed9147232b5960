"""Titles of Markdown and reStructuredText; the text stays as it was written, which people and models read well.

docutils is no help for reStructuredText: it drops what Sphinx adds to the language.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import tomllib
from typing import Any

import yaml
from markdown_it import MarkdownIt

from ragtune_ray.ingest.parsing.text import ParsedFile, Scalar, count_characters

_FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\n(.*?\n|)(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_MAX_FRONT_MATTER = 64 * 2**10
_MAX_BRACKETS = 500
"""PyYAML needs time quadratic in the depth of brackets."""
_PARTS = (16 * 2**10, 256 * 2**10)
"""Characters in which a heading is looked for, first and at most: the parser reads a megabyte in several seconds."""
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])\1*[ \t]*")
_MAX_LINES = 5_000


def parse(text: str) -> ParsedFile:
    r"""Title and text of CommonMark; front matter in YAML (`---`) or TOML (`+++`) becomes title and metadata.

    >>> parse("---\ntitle: Mars\nyear: 1877\n---\nRed.\n").metadata
    {'year': 1877}
    """
    found, body = front_matter(text)
    title = found.pop("title", "")
    return ParsedFile(str(title) or _first_heading(body), body, found, plain_characters=count_characters(body))


def front_matter(text: str) -> tuple[dict[str, Scalar | list[Scalar]], str]:
    """The front matter of a text and the text after it; what is not a mapping stays in the text."""
    block = _FRONT_MATTER.match(text[:_MAX_FRONT_MATTER])
    if not block or block[2].count("[") + block[2].count("{") > _MAX_BRACKETS:
        return {}, text
    try:
        found = yaml.safe_load(block[2]) if block[1] == "---" else tomllib.loads(block[2])
    except (yaml.YAMLError, ValueError, RecursionError):  # a text may also begin with a rule
        return {}, text
    if not isinstance(found, dict):
        return {}, text
    values = {str(name): value for name, given in found.items() if (value := _value(given)) is not None}
    return values, text[block.end() :].lstrip("\n")


def _value(given: Any) -> Scalar | list[Scalar] | None:
    """A value of metadata: a finite scalar, a date as ISO text, or a list of these; None for anything else."""
    if isinstance(given, list):
        return [value for item in given if (value := _scalar(item)) is not None]
    return _scalar(given)


def _scalar(given: Any) -> Scalar | None:
    if isinstance(given, float) and not math.isfinite(given):
        return None
    if isinstance(given, str | int | float):
        return given
    if isinstance(given, dt.date | dt.time):
        return given.isoformat()
    return None


def _first_heading(text: str) -> str:
    """The text of the first heading of level 1, as CommonMark reads it; empty if there is none near the beginning."""
    markdown = MarkdownIt("commonmark").disable("inline")
    for part in (text[:size] for size in _PARTS):
        tokens = markdown.parse(part)
        heading = next((token for token in tokens if token.type == "heading_open" and token.tag == "h1"), None)
        # The last block of a part may continue after it.
        if heading and heading.map and (len(part) == len(text) or heading.map[1] < part.count("\n")):
            return _plain(tokens[tokens.index(heading) + 1].content)
        if len(part) == len(text):
            break
    return ""


def _plain(source: str) -> str:
    """Inline Markdown without its marks.

    >>> _plain("The *red* [planet](mars.md) `x`")
    'The red planet x'
    """
    inline = MarkdownIt("commonmark").parseInline(source)[0].children or []
    return "".join(
        " " if token.type.endswith("break") else token.content for token in inline if token.type != "html_inline"
    )


def parse_rst(text: str) -> ParsedFile:
    r"""Title and text of a page; the title is the first line that is underlined.

    >>> parse_rst(".. comment\n\n=====\nMars\n=====\n\ntext").title
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
