"""Extracts the title and text of a .md, .txt, .html, .pdf or .docx file."""

from __future__ import annotations

import importlib.util
import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ragtune_ray import RagtuneError

FILE_SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".pdf", ".docx")
"""Files of these types are one document each."""
_EXTRAS = {".pdf": ("pypdfium2", "pdf"), ".docx": ("docx", "docx")}  # suffix -> library, and the extra that installs it
_EXTRAS |= dict.fromkeys((".html", ".htm"), ("selectolax", "html"))
_MAX_PDF_PAGES = 5_000
_MAX_ZIP_RATIO = 20
# Building a tree of nested blocks takes time quadratic in its depth: 0.03 s at 5,000, 15 s at 80,000.
_MAX_HTML_DEPTH = 5_000
_HTML_TAG = re.compile(r"<(/?)([A-Za-z][^\s/<>]*)([^<>]*)")
_UNSAFE = re.compile("[\x00\ud800-\udfff]")
_DROPPED_TAGS = ["script", "style", "nav", "footer", "header", "aside", "template", "noscript"]
# The end tags of these elements are optional or do not exist, so an unclosed one does not mean nesting.
_TAGS_WITHOUT_END = (
    "area,base,body,br,caption,col,colgroup,dd,dt,embed,head,hr,html,img,input,li,link,meta,optgroup,option,p,param,rp,rt,"
    "source,tbody,td,tfoot,th,thead,tr,track,wbr"
)
_BLOCK_TAGS = (
    "address,article,blockquote,br,caption,dd,details,div,dl,dt,fieldset,figcaption,figure,form,h1,h2,h3,h4,h5,h6,hr,"
    "li,main,ol,p,pre,section,summary,table,tbody,thead,tr,ul"
)


class ParseError(RagtuneError, ValueError):
    """A row or file cannot be read; the caller adds its location and makes a `Reject`."""


def clean(text: str) -> str:
    r"""Make a text safe for Arrow and tokenizers: no BOM, NUL or lone surrogate, and only `\n` as newline; no NFC.

    >>> clean("\ufeffa\r\nb\x00")
    'a\nb\ufffd'
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNSAFE.sub("\ufffd", text.removeprefix("\ufeff"))


def decode(data: bytes) -> str:
    """Decode UTF-8, or another encoding if charset-normalizer finds exactly one that fits.

    Most Western texts fit several single-byte encodings; a wrong guess would silently swap letters, so none is made.

    Raises:
        ParseError: the encoding is not certain.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        from charset_normalizer import from_bytes

        candidates = from_bytes(data)
        best = candidates.best()
        if best is None or len(candidates) > 1:
            raise ParseError(
                f"not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}), and no other encoding is certain; convert it: "
                "iconv -f ENCODING -t UTF-8 FILE"
            ) from None
        return str(best)


def missing_extra(suffix: str) -> str | None:
    """The extra to install before files of this suffix can be read; None if nothing is missing."""
    module, extra = _EXTRAS.get(suffix, ("", ""))
    return extra if module and importlib.util.find_spec(module) is None else None


def parse_file(name: str, data: bytes, max_document_bytes: int) -> tuple[str, str]:
    """The title and text of one file; the title of a file without one is its name without the suffix.

    >>> parse_file("a/mars.md", b"# Mars", 100)
    ('Mars', '# Mars')

    Raises:
        ParseError: the file is broken, encrypted, nested too deeply, or unpacks to far more than `max_document_bytes`.
    """
    match PurePosixPath(name).suffix.lower():
        case ".pdf":
            title, text = _parse_pdf(data)
        case ".docx":
            title, text = _parse_docx(data, max_document_bytes)
        case ".html" | ".htm":
            title, text = _parse_html(decode(data))
        case ".md" | ".markdown":
            text = clean(decode(data))
            title = _markdown_title(text)
        case _:
            title, text = "", decode(data)
    return " ".join(clean(title).split()) or PurePosixPath(name).stem, clean(text)


def _markdown_title(text: str) -> str:
    in_code = False
    for line in text.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            in_code = not in_code
        elif line.startswith("# ") and not in_code:
            return re.sub(r"\s#+\s*$", "", line[2:])
    return ""


def _html_depth(source: str) -> int:
    """The nesting depth of a page's tags, found in one pass before the parser builds its tree."""
    without_end = frozenset(_TAGS_WITHOUT_END.split(","))
    depth = deepest = 0
    num_open: Counter[str] = Counter()
    for slash, name, rest in _HTML_TAG.findall(source) if source.count("<") > _MAX_HTML_DEPTH else ():
        tag = name.lower()
        if tag in without_end:
            continue
        if not slash and not rest.endswith("/"):
            num_open[tag] += 1
            depth += 1
            deepest = max(deepest, depth)
        elif slash and num_open[tag]:  # an end tag without a start tag closes nothing
            num_open[tag] -= 1
            depth -= 1
    return deepest


def _parse_html(source: str) -> tuple[str, str]:
    from selectolax.lexbor import LexborHTMLParser

    depth = _html_depth(source)
    if depth > _MAX_HTML_DEPTH:
        raise ParseError(
            f"HTML nested {depth:,} elements deep; at most {_MAX_HTML_DEPTH:,} are read; save it as plain text"
        )
    mark = "\x1e"  # marks a line break, since newlines in the source are only spaces
    tree = LexborHTMLParser(source.replace(mark, " "))
    heading = tree.css_first("title") or tree.css_first("h1")
    title = heading.text() if heading else ""
    tree.strip_tags(_DROPPED_TAGS)
    for node in tree.css("pre"):
        node.replace_with(mark + node.text().replace("\n", mark) + mark)
    for node in tree.css(_BLOCK_TAGS):
        node.insert_before(mark)
        node.insert_after(mark)
    for node in tree.css("td,th"):
        node.insert_after(" ")
    text = re.sub(r"[ \t\n\r\f]+", " ", tree.body.text() if tree.body else "")
    return title, re.sub(rf" ?{mark}[ {mark}]*", "\n", text).strip()


def _parse_pdf(data: bytes) -> tuple[str, str]:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        reason = "it is encrypted; remove the password" if "password" in str(error).lower() else str(error)
        raise ParseError(f"PDF cannot be opened: {reason}") from None
    try:
        if len(document) > _MAX_PDF_PAGES:
            raise ParseError(f"PDF of {len(document):,} pages; at most {_MAX_PDF_PAGES:,} are read; split it")
        pages = [_pdf_page_text(document[number]) for number in range(len(document))]
        title = str(document.get_metadata_dict().get("Title") or "")
    except pypdfium2.PdfiumError as error:
        raise ParseError(f"PDF is broken: {error}") from None
    finally:
        document.close()
    if not any(page.strip() for page in pages):
        raise ParseError("empty document: the PDF contains no text, perhaps scanned pages; run OCR on it first")
    return title, "\n\n".join(pages)


def _pdf_page_text(page: Any) -> str:
    text_page = page.get_textpage()
    try:
        # PDFium replaces the hyphen of a word divided at the end of a line by one of these characters.
        return re.sub("[\x02\ufffe](\r?\n)?", "", text_page.get_text_range())
    finally:
        text_page.close()
        page.close()


def _parse_docx(data: bytes, max_document_bytes: int) -> tuple[str, str]:
    import docx
    from docx.opc.exceptions import OpcError

    # On broken files, python-docx and lxml raise errors without a common base; lxml's XMLSyntaxError is a SyntaxError.
    python_errors = (OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SyntaxError)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
        is_bomb = unpacked_bytes > _MAX_ZIP_RATIO * max_document_bytes
        document = None if is_bomb else docx.Document(io.BytesIO(data))
        text = "\n".join(_docx_blocks(document)) if document else ""
        title = document.core_properties.title if document else ""
    except (zipfile.BadZipFile, zlib.error, OpcError, *python_errors) as error:
        raise ParseError(f"DOCX is broken: {type(error).__name__}: {error}") from None
    if is_bomb:
        raise ParseError(
            f"DOCX unpacks to {unpacked_bytes:,} bytes, over {_MAX_ZIP_RATIO} x max_document_bytes "
            f"({max_document_bytes:,})"
        )
    return title or "", text


def _docx_blocks(container: Any) -> Iterator[str]:
    for block in container.iter_inner_content():
        if not hasattr(block, "rows"):
            yield block.text
            continue
        for row in block.rows:
            # A merged cell is listed once for every column that it spans.
            cells = {cell._tc: cell for cell in row.cells}.values()  # noqa: SLF001  (python-docx has no other identity)
            yield "\t".join(" ".join(_docx_blocks(cell)) for cell in cells)
