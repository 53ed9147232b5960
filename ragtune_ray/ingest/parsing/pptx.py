"""Text of presentations: the shapes of every slide and its notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ragtune_ray.ingest.parsing import marks
from ragtune_ray.ingest.parsing.archives import Package, integer, local_name, open_package, relationship
from ragtune_ray.ingest.parsing.docx import stated
from ragtune_ray.ingest.parsing.drawings import A, branch, graphic_blocks
from ragtune_ray.ingest.parsing.text import ParsedFile, clean, count_characters

_P = "{http://schemas.openxmlformats.org/presentationml/2006/main}"
_BETWEEN_SLIDES = "\n\n"
_FIELDS = frozenset({"sldNum", "dt", "sldImg", "hdr"})
"""Placeholders without content: slide number, date, picture of the slide."""
_FORMS = {"alphaLc": "lowerLetter", "alphaUc": "upperLetter", "romanLc": "lowerRoman", "romanUc": "upperRoman"}
_PLAIN = "//a:t[not(ancestor::mc:Fallback) and not(ancestor::a:fld)]/text()"
_NAMES = {"a": A[1:-1], "mc": "http://schemas.openxmlformats.org/markup-compatibility/2006"}


def parse(data: bytes, max_document_bytes: int) -> ParsedFile:
    """Title and text of a presentation; slides are its pages. Notes follow their slide; footers are read once.

    Raises:
        ParseError: the file is broken, encrypted, or unpacks to far more than `max_document_bytes`.
    """
    with open_package("PPTX", data, max_document_bytes) as package:
        main = package.main_part()
        related = package.related(main)
        root = package.xml(main)
        reader = _Reader(package)
        names = [related.get(relationship(slide), ("", ""))[1] for slide in root.iter(f"{_P}sldId")]
        slides = [clean("\n".join(reader.slide(name))) for name in dict.fromkeys(names)]
        properties = package.properties()
        starts, place = [], 0
        for slide in slides:
            starts.append(place)
            place += len(slide) + len(_BETWEEN_SLIDES)
        return ParsedFile(
            title=properties.get("title", "") or reader.title,
            text=_BETWEEN_SLIDES.join(slides),
            metadata=stated(properties),
            page_starts=tuple(starts),
            plain_characters=count_characters("".join(reader.plain)),
        )


class _Reader:
    """Walks over the shapes of one presentation."""

    def __init__(self, package: Package) -> None:
        self.title = ""
        self.plain: list[str] = []
        self._package = package
        self._related: dict[str, tuple[str, str]] = {}
        self._footers: set[str] = set()
        self._padding = marks.Padding()

    def slide(self, name: str) -> Iterator[str]:
        """The blocks of a slide, its title first, then its notes."""
        root = self._package.xml(name)
        if root is None:
            return
        self._related = self._package.related(name)
        self.plain += root.xpath(_PLAIN, namespaces=_NAMES)
        tree = root.find(f"{_P}cSld/{_P}spTree")
        shapes = list(tree if tree is not None else ())
        shapes.sort(key=lambda shape: _placeholder(shape) not in {"title", "ctrTitle"})
        for place, shape in enumerate(shapes):
            blocks = list(self._blocks([shape]))
            if place == 0 and blocks and not self.title and _placeholder(shape) in {"title", "ctrTitle"}:
                self.title = " ".join(blocks)
            yield from blocks
        for kind, target in self._related.values():
            if kind == "notesSlide":
                yield from self._notes(target)

    def _notes(self, name: str) -> Iterator[str]:
        root = self._package.xml(name)
        for shape in root.iter(f"{_P}sp") if root is not None else ():
            if _placeholder(shape) == "body":
                self.plain += shape.xpath(".//a:t[not(ancestor::a:fld)]/text()", namespaces=_NAMES)
                yield from self._blocks([shape])

    def _blocks(self, container: Any) -> Iterator[str]:
        for child in container:
            match local_name(child):
                case "sp" if _placeholder(child) in _FIELDS:
                    continue
                case "sp" if _placeholder(child) == "ftr":
                    yield from self._footer(child)
                case "txBody":
                    yield from self._paragraphs(child)
                case "tbl":
                    yield self._table(child)
                case "relIds" | "chart":
                    yield from graphic_blocks(self._package, self._related, child)
                case "AlternateContent":
                    yield from self._blocks(branch(child))
                case _:
                    yield from self._blocks(child)

    def _footer(self, shape: Any) -> Iterator[str]:
        text = "\n".join(self._blocks(shape))
        if text not in self._footers:
            yield text
        self._footers.add(text)

    def _paragraphs(self, body: Any) -> Iterator[str]:
        counts: Counter[int] = Counter()
        for paragraph in body.iter(f"{A}p"):
            text = "".join(_pieces(paragraph)).strip()
            properties = paragraph.find(f"{A}pPr")
            level = 0 if properties is None else integer(properties.get("lvl"), 0)
            bullet = None if properties is None else properties.find(f"{A}buAutoNum")
            for deeper in [each for each in counts if each > level or (bullet is None and each == level)]:
                del counts[deeper]
            if bullet is not None and text:
                counts[level] += 1
                value = counts[level] + integer(bullet.get("startAt"), 1) - 1
                kind = bullet.get("type", "")
                form = next((form for name, form in _FORMS.items() if kind.startswith(name)), "decimal")
                text = f"{marks.number(value, form)}{')' if 'Paren' in kind else '.'} {text}"
            if text:
                yield text

    def _table(self, table: Any) -> str:
        rows: list[list[str]] = []
        for row in table.iter(f"{A}tr"):
            rows.append([])
            for cell in row.iterfind(f"{A}tc"):
                is_covered = cell.get("hMerge") == "1" or cell.get("vMerge") == "1"
                rows[-1].append("" if is_covered else " ".join(self._blocks(cell)))
        return marks.table(rows)


def _placeholder(shape: Any) -> str:
    """The kind of placeholder that a shape fills; empty if it is none."""
    found = shape.find(f"{_P}nvSpPr/{_P}nvPr/{_P}ph")
    return "" if found is None else str(found.get("type", "body"))


def _pieces(paragraph: Any) -> Iterator[str]:
    before = ""
    for child in paragraph:
        piece = ""
        match local_name(child):
            case "br":
                piece = "\n"
            case "r":
                piece = _run(child, before)
            case "AlternateContent":
                piece = "".join(each.text or "" for each in branch(child).iter() if local_name(each) == "t")
            case "fld" | "m":
                piece = "".join(each.text or "" for each in child.iter() if local_name(each) == "t")
        before = piece or before
        yield piece


def _run(run: Any, before: str) -> str:
    text = "".join(each.text or "" for each in run.iterfind(f"{A}t"))
    properties = run.find(f"{A}rPr")
    shift = 0 if properties is None else integer(properties.get("baseline"), 0)
    if not shift or not text.strip():
        return text
    return marks.raised(text, before) if shift > 0 else marks.lowered(text)
