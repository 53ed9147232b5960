"""Text of Word documents."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, clean, count_characters

_MAX_ZIP_RATIO = 20


def parse(data: bytes, max_document_bytes: int) -> ParsedFile:
    """Title and text of a Word document, a line per paragraph or table row.

    Raises:
        ParseError: the file is broken, or unpacks to far more than `max_document_bytes`.
    """
    import docx
    from docx.opc.exceptions import OpcError

    # On broken files, python-docx and lxml raise errors without a common base; lxml's XMLSyntaxError is a SyntaxError.
    python_errors = (OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SyntaxError)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
        is_bomb = unpacked_bytes > _MAX_ZIP_RATIO * max_document_bytes
        document = None if is_bomb else docx.Document(io.BytesIO(data))
        text = "\n".join(_blocks(document)) if document else ""
        title = document.core_properties.title if document else ""
    except (zipfile.BadZipFile, zlib.error, OpcError, *python_errors) as error:
        raise ParseError(f"DOCX is broken: {type(error).__name__}: {error}") from None
    if is_bomb:
        raise ParseError(
            f"DOCX unpacks to {unpacked_bytes:,} bytes, over {_MAX_ZIP_RATIO} x max_document_bytes "
            f"({max_document_bytes:,})"
        )
    text = clean(text)
    return ParsedFile(title or "", text, plain_characters=count_characters(text))


def _blocks(container: Any) -> Iterator[str]:
    for block in container.iter_inner_content():
        if not hasattr(block, "rows"):
            yield block.text
            continue
        for row in block.rows:
            # A merged cell is listed once for every column that it spans.
            cells = {cell._tc: cell for cell in row.cells}.values()  # noqa: SLF001  (python-docx has no other identity)
            yield "\t".join(" ".join(_blocks(cell)) for cell in cells)
