"""Text of e-books: their chapters in reading order."""

from __future__ import annotations

import posixpath
import urllib.parse
from typing import Any

from ragtune_ray.ingest.parsing import html
from ragtune_ray.ingest.parsing.archives import Package, local_name, open_package, part_name
from ragtune_ray.ingest.parsing.text import ParsedFile, Scalar, clean

_METADATA = {"creator": "author", "date": "created", "language": "language"}


def parse(data: bytes, max_document_bytes: int) -> ParsedFile:
    """Title and text of a book; the table of contents is left out, since it repeats the headings.

    Raises:
        ParseError: the file is broken or encrypted, unpacks to far more than `max_document_bytes`, or a chapter cannot be
            read.
    """
    with open_package("EPUB", data, max_document_bytes) as package:
        container = package.xml("META-INF/container.xml")
        main = next((each.get("full-path", "") for each in container.iter() if local_name(each) == "rootfile"), "")
        root = package.xml(main)
        if root is None:
            raise LookupError("no package document")
        chapters = [
            html.parse(package.read(name), is_xml=True, has_furniture=False)
            for name in _spine(package, root, posixpath.dirname(main))
        ]
        texts = [chapter.text for chapter in chapters if chapter.text]
        title, metadata = _stated(root)
        return ParsedFile(
            title, "\n\n".join(texts), metadata, plain_characters=sum(chapter.plain_characters for chapter in chapters)
        )


def _spine(package: Package, root: Any, folder: str) -> list[str]:
    """The names of the chapters in reading order."""
    items = {
        each.get("id", ""): part_name(folder, urllib.parse.unquote(each.get("href", "")))
        for each in root.iter()
        if local_name(each) == "item" and "nav" not in each.get("properties", "").split()
    }
    references = [each.get("idref", "") for each in root.iter() if local_name(each) == "itemref"]
    names = dict.fromkeys(items[reference] for reference in references if reference in items)
    return [name for name in names if name in package.names]


def _stated(root: Any) -> tuple[str, dict[str, Scalar | list[Scalar]]]:
    title = ""
    metadata: dict[str, Scalar | list[Scalar]] = {}
    for each in root.iter():
        name, text = local_name(each), (each.text or "").strip()
        if not text or not str(each.tag).startswith("{http://purl.org/dc/elements/1.1/}"):
            continue
        if name == "title":
            title = title or text
        elif name in _METADATA:
            metadata.setdefault(_METADATA[name], clean(text))
    return title, metadata
