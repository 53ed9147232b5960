"""Opens zip files of XML (DOCX, PPTX, XLSX, EPUB) within limits, and reads their parts and relationships."""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from ragtune_ray.ingest.parsing.text import ParseError

MAX_UNPACKED = 20
"""An archive may unpack to this many times `max_document_bytes`."""
_STRICT = re.compile(rb"http://purl\.oclc\.org/ooxml/([A-Za-z]+)/")
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
# On broken files zipfile and lxml raise errors without a common base; lxml's XMLSyntaxError is a SyntaxError.
_BROKEN = (OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SyntaxError)


class Package:
    """The parts of an opened archive; every part is read within the limit of `open_package`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.names = set(archive.namelist())

    def read(self, name: str) -> bytes:
        """The bytes of a part; empty if it is missing."""
        return self.archive.read(name) if name in self.names else b""

    def xml(self, name: str) -> Any:
        """The root element of a part; None if it is missing or empty."""
        data = self.read(name)
        return parse_xml(data) if data else None

    def related(self, name: str) -> dict[str, tuple[str, str]]:
        """Relationship id -> (last word of its type, name of the part) of the parts that a part refers to."""
        folder, base = posixpath.split(name)
        root = self.xml(posixpath.join(folder, "_rels", f"{base}.rels"))
        return {
            each.get("Id", ""): (each.get("Type", "").rpartition("/")[2], part_name(folder, each.get("Target", "")))
            for each in (root if root is not None else ())
            if isinstance(each.tag, str) and each.get("TargetMode") != "External"
        }

    def main_part(self) -> str:
        """The name of the part with the document.

        Raises:
            LookupError: there is none.
        """
        for kind, name in self.related("").values():
            if kind == "officeDocument" and name in self.names:
                return name
        raise LookupError("no main part")

    def properties(self) -> dict[str, str]:
        """Title, creator and others of the document's properties, by their local name."""
        name = next((name for kind, name in self.related("").values() if kind == "core-properties"), "")
        root = self.xml(name)
        return {
            local_name(each): each.text.strip()
            for each in (root if root is not None else ())
            if isinstance(each.tag, str) and each.text and each.text.strip()
        }


@contextlib.contextmanager
def open_package(kind: str, data: bytes, max_document_bytes: int) -> Iterator[Package]:
    """Open an archive for the body of the `with`, in which errors of broken files become a `ParseError`.

    Raises:
        ParseError: it is broken, encrypted, or unpacks to more than `MAX_UNPACKED` times `max_document_bytes`.
    """
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise ParseError(f"{kind} is encrypted, or has the format before 2007; save it again without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _refuse_bomb(kind, archive, max_document_bytes)
            yield Package(archive)
    except ParseError:
        raise
    except (zipfile.BadZipFile, zlib.error, *_BROKEN) as error:
        raise ParseError(f"{kind} is broken: {type(error).__name__}: {error}") from None


def _refuse_bomb(kind: str, archive: zipfile.ZipFile, max_document_bytes: int) -> None:
    unpacked_bytes = sum(
        entry.file_size for entry in archive.infolist()
    )  # zipfile reads no more of an entry than it states
    if unpacked_bytes > MAX_UNPACKED * max_document_bytes:
        raise ParseError(
            f"{kind} unpacks to {unpacked_bytes:,} bytes, over {MAX_UNPACKED} x max_document_bytes ({max_document_bytes:,})"
        )


def parse_xml(data: bytes) -> Any:
    """The root element of XML. Entities stay unexpanded, nothing external is read, and nesting is limited by libxml2."""
    from lxml import etree

    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True, remove_pis=True, huge_tree=False
    )
    if b"purl.oclc.org/ooxml" in data[:10_000]:  # the strict variant of OOXML differs in its namespaces alone
        data = _STRICT.sub(rb"http://schemas.openxmlformats.org/\1/2006/", data)
    return etree.fromstring(data, parser)


def part_name(folder: str, target: str) -> str:
    """The name in the archive of a part to which another one in `folder` refers.

    >>> part_name("ppt/slides", "../media/a.png")
    'ppt/media/a.png'
    """
    return posixpath.normpath(posixpath.join("/", folder, target)).lstrip("/")


def local_name(element: Any) -> str:
    """The name of an element without its namespace; empty for an entity."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def relationship(element: Any, name: str = "id") -> str:
    """The relationship id in the attribute `r:NAME`; empty if there is none."""
    return str(element.get(f"{{{_OFFICE}}}{name}", ""))


def integer(value: str | None, default: int) -> int:
    """A number of an attribute; the default if it is missing or none.

    >>> integer("x", 1)
    1
    """
    return int(value) if value and re.fullmatch(r"[+-]?[0-9]{1,9}", value) else default
