"""Reads one file of any kind: chooses the parser by the file's suffix."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import PurePosixPath

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.parsing import docx, html, markdown, pdf
from ragtune_ray.ingest.parsing.text import ParsedFile, clean, count_characters, decode

FILE_SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".pdf", ".docx")
"""Files of these types are one document each."""
_EXTRAS = {".pdf": ("pypdfium2", "pdf"), ".docx": ("lxml", "docx")}  # suffix -> library, and the extra that installs it
_EXTRAS |= dict.fromkeys((".html", ".htm"), ("selectolax", "html"))


def missing_extra(suffix: str) -> str | None:
    """The extra to install before files of this suffix can be read; None if nothing is missing."""
    module, extra = _EXTRAS.get(suffix, ("", ""))
    return extra if module and importlib.util.find_spec(module) is None else None


def parse_file(name: str, data: bytes, corpus: Corpus) -> ParsedFile:
    """Title, text and metadata of one file; the title of a file without one is its name without the suffix.

    >>> parse_file("a/mars.md", b"# Mars", Corpus()).title
    'Mars'

    Raises:
        ParseError: the file is broken, encrypted, nested too deeply, or unpacks to far more than
            `corpus.max_document_bytes`.
    """
    parsed = _parse(PurePosixPath(name).suffix.lower(), data, corpus)
    title = " ".join(clean(parsed.title).split()) or PurePosixPath(name).stem
    return dataclasses.replace(parsed, title=title)


def _parse(suffix: str, data: bytes, corpus: Corpus) -> ParsedFile:
    """The text is clean already, so that offsets of pages hold."""
    match suffix:
        case ".pdf":
            return pdf.parse(data)
        case ".docx":
            return docx.parse(data, corpus.max_document_bytes)
        case ".html" | ".htm":
            return html.parse(data)
        case ".md" | ".markdown":
            return markdown.parse(clean(decode(data)))
        case _:
            text = clean(decode(data))
            return ParsedFile("", text, plain_characters=count_characters(text))
