"""Text of Word documents: everything that a reader sees once all tracked changes are accepted.

The walk is our own, since no library that was tried reads content controls, tracked changes, text boxes, headers and list
numbers alike (docs/decisions.md).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from ragtune_ray.ingest.parsing import marks
from ragtune_ray.ingest.parsing.archives import Package, integer, local_name, open_package, relationship
from ragtune_ray.ingest.parsing.docx_numbers import Numbers, W, read_styles
from ragtune_ray.ingest.parsing.drawings import branch, graphic_blocks
from ragtune_ray.ingest.parsing.text import ParsedFile, Scalar, clean, count_characters

_FIXED = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_SKIPPED = frozenset(
    ["del", "moveFrom", "delText", "instrText", "delInstrText", "pPr", "rPr", "sdtPr", "tblPr", "sectPr", "rt"]
)
_NOTES = {"footnoteReference": "footnote", "endnoteReference": "endnote"}
_PLAIN = "//w:t[not(ancestor::mc:Fallback) and not(ancestor::w:moveFrom)]/text()"
_NAMES = {"w": W[1:-1], "mc": "http://schemas.openxmlformats.org/markup-compatibility/2006"}


def parse(data: bytes, max_document_bytes: int) -> ParsedFile:
    """Title and text of a Word document; tables are Markdown, footnotes follow their paragraph.

    Headers come first and footers last, each once. The title is the first paragraph of style Title, else the property.

    Raises:
        ParseError: the file is broken, encrypted, or unpacks to far more than `max_document_bytes`.
    """
    with open_package("DOCX", data, max_document_bytes) as package:
        reader = _Reader(package)
        text = clean("\n".join(reader.whole()))
        properties = package.properties()
        return ParsedFile(
            title=reader.title or properties.get("title", ""),
            text=text,
            metadata=stated(properties),
            plain_characters=count_characters("".join(reader.plain)),
        )


def stated(properties: dict[str, str]) -> dict[str, Scalar | list[Scalar]]:
    """The metadata among the properties of an Office document.

    >>> stated({"creator": "A. Hall", "created": "1877-08-12T00:00:00Z", "revision": "3"})
    {'author': 'A. Hall', 'created': '1877-08-12T00:00:00Z'}
    """
    names = {"creator": "author", "created": "created", "subject": "subject", "keywords": "keywords"}
    return {names[name]: clean(value) for name, value in properties.items() if name in names}


class _Reader:
    """Walks over the parts of one document, in reading order."""

    def __init__(self, package: Package) -> None:
        self.title = ""
        self.plain: list[str] = []
        """Texts of all parts, found without the walk."""
        self._package = package
        self._main = package.main_part()
        self._parts = {self._main: package.related(self._main)}
        self._part = self._main
        kinds = dict(self._parts[self._main].values())
        self._styles = read_styles(package.xml(kinds.get("styles", "")))
        self._numbers = Numbers(package.xml(kinds.get("numbering", "")), self._styles)
        self._notes = {
            (kind, note.get(f"{W}id")): note
            for kind in ("footnote", "endnote")
            for note in self._root(kinds.get(f"{kind}s", ""))
            if isinstance(note.tag, str) and note.get(f"{W}type", "normal") == "normal"
        }
        self._num_notes = 0
        self._padding = marks.Padding()
        self._after: list[str] = []
        """Text boxes and notes of the paragraph that is being read, which follow it."""

    def whole(self) -> Iterator[str]:
        """The blocks of headers, body and footers."""
        root = self._root(self._main)
        yield from self._margins(root, "header")
        yield from self._blocks(root)
        yield from self._margins(root, "footer")

    def _root(self, name: str) -> Any:
        root = self._package.xml(name)
        if root is None:
            return ()
        self.plain += root.xpath(_PLAIN, namespaces=_NAMES)
        return root

    def _margins(self, root: Any, kind: str) -> Iterator[str]:
        seen: set[str] = set()
        for reference in root.iter(f"{W}{kind}Reference"):
            _, name = self._parts[self._main].get(relationship(reference), ("", ""))
            if name in seen:
                continue
            before = len(self.plain)
            self._part = name
            self._parts.setdefault(name, self._package.related(name))
            text = "\n".join(self._blocks(self._root(name)))
            self._part = self._main
            if text in seen:
                del self.plain[before:]
            elif text.strip():
                yield text
            seen |= {name, text}

    def _blocks(self, container: Any) -> Iterator[str]:
        """The paragraphs, tables and other blocks below an element."""
        joined = ""
        for child in container:
            match local_name(child):
                case "p":
                    text, is_merged = self._paragraph(child, joined)
                    joined = text if is_merged else ""
                    if not is_merged:
                        yield text
                        yield from self._pop_after()
                case "tbl":
                    yield from self._table(child)
                case "AlternateContent":
                    yield from self._blocks(branch(child))
                case "oMathPara" | "oMath":
                    yield "".join(self._inline(child))
                case name if name not in _SKIPPED:
                    yield from self._blocks(child)
        if joined:
            yield joined
            yield from self._pop_after()

    def _pop_after(self) -> list[str]:
        after, self._after = self._after, []
        return after

    def _paragraph(self, element: Any, before: str) -> tuple[str, bool]:
        """The text of a paragraph after that of one that runs into it, and whether this one runs into the next.

        A paragraph whose mark is deleted does, in the accepted view.
        """
        properties = element.find(f"{W}pPr")
        style_id = ""
        is_merged = False
        if properties is not None:
            style = properties.find(f"{W}pStyle")
            style_id = "" if style is None else style.get(f"{W}val", "")
            is_merged = properties.find(f"{W}rPr/{W}del") is not None
        text = "".join(self._inline(element))
        label = "" if before else self._numbers.label(properties, style_id)
        known = self._styles.get(style_id)
        if known and known.name == "title" and not self.title:
            self.title = text.strip()
        return before + (label + text if text.strip() else text), is_merged

    def _inline(self, element: Any) -> Iterator[str]:
        """Pieces of the text of a paragraph."""
        shown = ""
        for child in element:
            piece = self._piece(child, shown)
            shown = piece or shown
            if piece:
                yield piece

    def _piece(self, child: Any, before: str) -> str:
        name = local_name(child)
        if name in _SKIPPED:
            return ""
        if name in _FIXED:
            return _FIXED[name]
        match name:
            case "t":
                return child.text or ""
            case "r":
                return self._run(child, before)
            case "AlternateContent":
                return "".join(self._inline(branch(child)))
            case "txbxContent":
                inner, self._after = self._after, []
                inner += self._blocks(child)
                self._after = inner + self._after
                return ""
            case "sup" | "sub" | "den" if child.tag.endswith(f"/math}}{name}"):
                return _script(name, "".join(self._inline(child)))
        return self._reference(child, name)

    def _reference(self, child: Any, name: str) -> str:
        """The text of an element that refers to another part, or the text below any other element."""
        if name in _NOTES:
            note = self._notes.pop((_NOTES[name], child.get(f"{W}id")), None)
            if note is None:
                return ""
            self._num_notes += 1
            mark = f"[{self._num_notes}]"
            after, self._after = self._after, []
            text = "\n".join(self._blocks(note)).strip()
            self._after = [*after, f"{mark} {text}"]
            return mark
        if name in {"chart", "relIds"}:
            self._after += graphic_blocks(self._package, self._parts[self._part], child)
            return ""
        if name == "sym":
            return _symbol(child.get(f"{W}char", ""))
        return "".join(self._inline(child))

    def _run(self, run: Any, before: str) -> str:
        text = "".join(self._inline(run))
        place = run.find(f"{W}rPr/{W}vertAlign")
        if place is None or not text.strip():
            return text
        match place.get(f"{W}val"):
            case "superscript":
                return marks.raised(text, before)
            case "subscript":
                return marks.lowered(text)
        return text

    def _table(self, table: Any) -> Iterator[str]:
        """A table as Markdown; one with a single column, or with tables inside, only arranges blocks."""
        rows = [row for row in _within(table, "tr") if row.find(f"{W}trPr/{W}del") is None]
        cells = [[cell for cell in _within(row, "tc") if cell.find(f"{W}tcPr/{W}cellDel") is None] for row in rows]
        only_arranges = any(next(cell.iter(f"{W}tbl"), None) is not None for row in cells for cell in row)
        if only_arranges or all(len(row) <= 1 for row in cells):
            for row in cells:
                for cell in row:
                    yield from self._blocks(cell)
            return
        texts = []
        for row, listed in zip(rows, cells, strict=True):
            texts.append(self._padding.take(_span(row.find(f"{W}trPr/{W}gridBefore"), 0)))
            for cell in listed:
                merged = cell.find(f"{W}tcPr/{W}vMerge")
                is_continued = merged is not None and merged.get(f"{W}val", "continue") == "continue"
                texts[-1].append("" if is_continued else " ".join(self._blocks(cell)))
                texts[-1] += self._padding.take(_span(cell.find(f"{W}tcPr/{W}gridSpan"), 1) - 1)
        yield marks.table(texts)


def _symbol(code: str) -> str:
    """The character of a hexadecimal code; empty for a malformed one, and for the glyphs of symbol fonts, E000 to F8FF."""
    number = int(code, 16) if re.fullmatch("[0-9A-Fa-f]{1,6}", code) else 0
    return "" if not 0 < number <= sys.maxunicode or 0xE000 <= number <= 0xF8FF else chr(number)


def _script(name: str, text: str) -> str:
    return f"/{text}" if name == "den" else f"{'^' if name == 'sup' else '_'}{text}" if text else ""


def _span(element: Any, default: int) -> int:
    return default if element is None else integer(element.get(f"{W}val"), default)


def _within(element: Any, name: str) -> Iterator[Any]:
    """The rows or cells of a table, also those inside content controls and tracked changes."""
    for child in element:
        found = local_name(child)
        if found == name:
            yield child
        elif found in {"sdt", "sdtContent", "customXml", "ins", "moveTo"}:
            yield from _within(child, name)
