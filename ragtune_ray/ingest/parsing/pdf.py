"""Text of PDF files, page by page; scanned pages through tesseract if that is wanted."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from typing import Any

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, Scalar, TransientError, clean, count_characters

_MAX_PAGES = 5_000
_BETWEEN_PAGES = "\n\n"
_OCR_DOTS_PER_INCH = 300
_MAX_OCR_PIXELS = 40_000_000
_MAX_OCR_SECONDS = 120
"""Per page."""
_DIVIDED = re.compile("[\x02\ufffe](\r?\n)?")
_DATE = re.compile(r"D:([0-9]{4})([0-9]{2})([0-9]{2})")


def parse(data: bytes, corpus: Corpus) -> ParsedFile:
    """Title and text of a PDF; its pages are joined by a blank line.

    Raises:
        TransientError: tesseract is missing, fails or takes too long.
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
        pages = [clean(_page_text(document[number], corpus)) for number in range(len(document))]
        stated = document.get_metadata_dict()
    except pypdfium2.PdfiumError as error:
        raise ParseError(f"PDF is broken: {error}") from None
    finally:
        document.close()
    if not any(page.strip() for page in pages):
        advice = "" if corpus.ocr != "none" else "; for scanned pages set corpus.ocr=tesseract, or run OCR on it first"
        raise ParseError(f"empty document: the PDF contains no text{advice}")
    starts = itertools.accumulate((len(page) + len(_BETWEEN_PAGES) for page in pages[:-1]), initial=0)
    text = _BETWEEN_PAGES.join(pages)
    return ParsedFile(
        title=str(stated.get("Title") or ""),
        text=text,
        metadata=_metadata(stated),
        page_starts=tuple(starts),
        plain_characters=count_characters(text),
    )


def _metadata(stated: dict[str, str]) -> dict[str, Scalar | list[Scalar]]:
    found: dict[str, Scalar | list[Scalar]] = {}
    if author := clean(stated.get("Author") or "").strip():
        found["author"] = author
    if day := _DATE.match(stated.get("CreationDate") or ""):
        found["created"] = "-".join(day.groups())
    return found


def _page_text(page: Any, corpus: Corpus) -> str:
    text_page = page.get_textpage()
    try:
        # PDFium replaces the hyphen of a word divided at the end of a line by one of these characters.
        text: str = _DIVIDED.sub("", text_page.get_text_range())
        return _recognized(page, corpus.ocr_languages) if corpus.ocr == "tesseract" and not text.strip() else text
    finally:
        text_page.close()
        page.close()


def _recognized(page: Any, languages: str) -> str:
    """The text of a page's picture, as tesseract reads it."""
    scale = _OCR_DOTS_PER_INCH / 72
    width, height = page.get_size()
    scale = min(scale, (_MAX_OCR_PIXELS / max(1.0, width * height)) ** 0.5)
    bitmap = page.render(scale=scale, grayscale=True)
    picture = b"P5 %d %d 255\n" % (bitmap.width, bitmap.height) + bitmap.to_numpy().tobytes()
    bitmap.close()
    try:
        done = subprocess.run(
            ["tesseract", "stdin", "stdout", "-l", languages],
            input=picture,
            capture_output=True,
            timeout=_MAX_OCR_SECONDS,
            check=False,
            env={**os.environ, "OMP_THREAD_LIMIT": "1"},  # reading tasks already use every core
        )
    except FileNotFoundError:
        raise TransientError(
            "corpus.ocr is tesseract, but there is no such command; install it (Debian: apt-get install tesseract-ocr)"
        ) from None
    except subprocess.TimeoutExpired:
        raise TransientError(
            f"tesseract took longer than {_MAX_OCR_SECONDS} seconds on one page; run OCR on the file first"
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.decode("utf-8", "replace").split())[:300]
        raise TransientError(f"tesseract failed (corpus.ocr_languages={languages}): {reason}")
    text: str = done.stdout.decode("utf-8", "replace")
    return text.replace("\x0c", "")
