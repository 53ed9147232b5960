"""Text of PDF files, page by page."""

from __future__ import annotations

import itertools
import re
from typing import Any

from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, clean, count_characters

_MAX_PAGES = 5_000
_BETWEEN_PAGES = "\n\n"


def parse(data: bytes) -> ParsedFile:
    """Title and text of a PDF; its pages are joined by a blank line.

    Raises:
        ParseError: the PDF is broken, encrypted, has too many pages or no text.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        reason = "it is encrypted; remove the password" if "password" in str(error).lower() else str(error)
        raise ParseError(f"PDF cannot be opened: {reason}") from None
    try:
        if len(document) > _MAX_PAGES:
            raise ParseError(f"PDF of {len(document):,} pages; at most {_MAX_PAGES:,} are read; split it")
        pages = [clean(_page_text(document[number])) for number in range(len(document))]
        title = str(document.get_metadata_dict().get("Title") or "")
    except pypdfium2.PdfiumError as error:
        raise ParseError(f"PDF is broken: {error}") from None
    finally:
        document.close()
    if not any(page.strip() for page in pages):
        raise ParseError("empty document: the PDF contains no text, perhaps scanned pages; run OCR on it first")
    starts = itertools.accumulate((len(page) + len(_BETWEEN_PAGES) for page in pages[:-1]), initial=0)
    text = _BETWEEN_PAGES.join(pages)
    return ParsedFile(title, text, page_starts=tuple(starts), plain_characters=count_characters(text))


def _page_text(page: Any) -> str:
    text_page = page.get_textpage()
    try:
        # PDFium replaces the hyphen of a word divided at the end of a line by one of these characters.
        return re.sub("[\x02\ufffe](\r?\n)?", "", text_page.get_text_range())
    finally:
        text_page.close()
        page.close()
