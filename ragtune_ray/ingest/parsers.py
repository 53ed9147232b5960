"""Reads one file of any kind: chooses the parser by the file's suffix."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import PurePosixPath

from ragtune_ray.config import Corpus
from ragtune_ray.config.extras import install_command
from ragtune_ray.ingest.parsing import docx, epub, html, mail, markdown, pdf, pptx, sheets
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, TransientError, clean, count_characters, decode

_EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    ".md": ("", ()),
    ".markdown": ("", ()),
    ".txt": ("", ()),
    ".rst": ("", ()),
    ".csv": ("", ()),
    ".html": ("html", ("selectolax",)),
    ".htm": ("html", ("selectolax",)),
    ".xhtml": ("html", ("selectolax",)),
    ".eml": ("html", ("selectolax",)),
    ".epub": ("epub", ("lxml", "selectolax")),
    ".pdf": ("pdf", ("pypdfium2",)),
    ".docx": ("docx", ("lxml",)),
    ".pptx": ("office", ("lxml",)),
    ".xlsx": ("office", ("lxml", "python_calamine")),
}
"""Suffix -> the extra that reads such files, and the libraries that it installs."""
FILE_SUFFIXES = tuple(_EXTRAS)
"""Files of these types are one document each, but for `SHEETS` with `corpus.sheets=rows`."""
SHEETS = (".csv", ".xlsx")
_MAX_MAIL_DEPTH = 3
"""A message may be attached to a message, and so on."""


def missing_extra(suffix: str) -> str | None:
    """The extra to install before files of this suffix can be read; None if nothing is missing."""
    extra, modules = _EXTRAS.get(suffix, ("", ()))
    return extra if any(importlib.util.find_spec(module) is None for module in modules) else None


def parse_file(name: str, data: bytes, corpus: Corpus) -> ParsedFile:
    """Title, text and metadata of one file; the title of a file without one is its name without the suffix.

    >>> parse_file("a/mars.md", b"# Mars", Corpus()).title
    'Mars'

    Raises:
        ParseError: the file is broken, encrypted, nested too deeply, or unpacks to far more than
            `corpus.max_document_bytes`.
    """
    parsed = _parse(_suffix(name), data, corpus, depth=0)
    title = " ".join(clean(parsed.title).split()) or PurePosixPath(name).stem
    return dataclasses.replace(parsed, title=title)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _parse(suffix: str, data: bytes, corpus: Corpus, depth: int) -> ParsedFile:
    """The text is clean already, so that offsets of pages hold."""
    limit = corpus.max_document_bytes
    match suffix:
        case ".pdf":
            return pdf.parse(data, corpus)
        case ".docx":
            return docx.parse(data, limit)
        case ".pptx":
            return pptx.parse(data, limit)
        case ".xlsx":
            return _parse_book(sheets.read_xlsx(data, limit), corpus)
        case ".epub":
            return epub.parse(data, limit)
        case ".html" | ".htm" | ".xhtml":
            return html.parse(data, is_xml=suffix == ".xhtml")
        case ".eml":
            return mail.parse(data, lambda name, attached: _attachment(name, attached, corpus, depth + 1))
    return _parse_text(suffix, clean(decode(data, corpus.encoding)), corpus)


def _parse_book(book: sheets.Workbook, corpus: Corpus) -> ParsedFile:
    return sheets.parse_rows(book) if corpus.sheets == "rows" else sheets.parse(book)


def _parse_text(suffix: str, text: str, corpus: Corpus) -> ParsedFile:
    match suffix:
        case ".md" | ".markdown":
            return markdown.parse(text)
        case ".csv":
            return _parse_book(sheets.read_csv(text), corpus)
        case ".rst":
            return markdown.parse_rst(text)
        case _:
            return ParsedFile("", text, plain_characters=count_characters(text))


def _attachment(name: str, data: bytes, corpus: Corpus, depth: int) -> ParsedFile | None:
    """An attachment; None if files of its type are not read, or it cannot be, which does not spoil the message.

    Raises:
        TransientError: it needs a library that is not installed.
    """
    suffix = _suffix(name)
    if suffix not in _EXTRAS or depth > _MAX_MAIL_DEPTH:
        return None
    extra = missing_extra(suffix)
    if extra:
        raise TransientError(f"attachment {name!r} needs a library that is missing; run: {install_command(extra)}")
    try:
        return _parse(suffix, data, corpus, depth)
    except TransientError:
        raise
    except (ParseError, MemoryError):
        return None
