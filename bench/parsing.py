"""Parsers against the bare calls of the libraries that a user would pick instead: MB of file per second on one core.

    python -m bench.parsing [--rounds 5]

Both read the same file by turns. A bare call only extracts text: without furniture rules, tables, list numbers, metadata or the
count of plain characters.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

from ragtune_ray.config import Corpus
from ragtune_ray.ingest.parsers import parse_file
from tests.support.documents import MAKERS, sentences

SENTENCES = 4_000
CORPUS = Corpus(max_document_bytes=2**28)


def bare_docx(data: bytes) -> str:
    """The paragraphs and cells that python-docx lists."""
    import docx

    document = docx.Document(io.BytesIO(data))
    cells = (cell.text for table in document.tables for row in table.rows for cell in row.cells)
    return "\n".join([*(paragraph.text for paragraph in document.paragraphs), *cells])


def bare_pptx(data: bytes) -> str:
    """The text frames and cells that python-pptx lists."""
    import pptx

    texts = []
    for slide in pptx.Presentation(io.BytesIO(data)).slides:
        for shape in slide.shapes:
            if shape.has_text_frame:
                texts.append(shape.text_frame.text)
            elif shape.has_table:
                texts += [cell.text for row in shape.table.rows for cell in row.cells]
    return "\n".join(texts)


def bare_openpyxl(data: bytes) -> str:
    """All cells, by openpyxl."""
    import openpyxl

    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    return "\n".join("\t".join(map(str, row)) for sheet in book for row in sheet.values)


def bare_calamine(data: bytes) -> str:
    """All cells, by calamine."""
    import python_calamine

    book = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(data))
    rows = (row for name in book.sheet_names for row in book.get_sheet_by_name(name).to_python())
    return "\n".join("\t".join(map(str, row)) for row in rows)


def bare_html(data: bytes) -> str:
    """The text of the body, by selectolax."""
    from selectolax.lexbor import LexborHTMLParser

    body = LexborHTMLParser(data.decode()).body
    return body.text(separator="\n") if body else ""


def bare_markdown(data: bytes) -> str:
    """The whole text parsed and rendered by markdown-it-py."""
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark").render(data.decode()))


def bare_pdf(data: bytes) -> str:
    """The pages, by pypdfium2."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    return "\n".join(page.get_textpage().get_text_range() for page in document)


def bare_eml(data: bytes) -> str:
    """The body, by the standard library; attachments are left out."""
    body: Any = email.message_from_bytes(data, policy=email.policy.default)
    part = body.get_body(("plain", "html"))
    return str(part.get_content()) if part else ""


PEERS: list[tuple[str, str, Callable[[bytes], str]]] = [
    (".docx", "python-docx", bare_docx),
    (".pptx", "python-pptx", bare_pptx),
    (".xlsx", "openpyxl", bare_openpyxl),
    (".xlsx", "python-calamine", bare_calamine),
    (".html", "selectolax", bare_html),
    (".md", "markdown-it-py", bare_markdown),
    (".pdf", "pypdfium2", bare_pdf),
    (".eml", "email, body only", bare_eml),
]


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of CPU time of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    """Print a row per kind and peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| kind | peer | MB | own MB/s | bare MB/s | own : bare |\n|---|---|---|---|---|---|")
    for suffix, name, bare in PEERS:
        data = MAKERS[suffix](sentences(0, SENTENCES))
        parse_file(f"x{suffix}", data, CORPUS), bare(data)  # load the libraries
        own: list[float] = []
        other: list[float] = []
        for _ in range(rounds):
            own.append(seconds_of(lambda: parse_file(f"x{suffix}", data, CORPUS)))  # noqa: B023  # called at once
            other.append(seconds_of(lambda: bare(data)))  # noqa: B023
        size, ours, theirs = len(data) / 1e6, statistics.median(own), statistics.median(other)
        print(
            f"| {suffix} | {name} | {size:.2f} | {size / ours:.2f} | {size / theirs:.2f} | {theirs / ours:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
