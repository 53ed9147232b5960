"""Metadata of a document file: its place, and what a JSON file beside it says (`report.pdf.meta.json`)."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from typing import Any

from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import parse_json

SUFFIX = ".meta.json"
MAX_BYTES = 2**20
"""Limit on the size of a sidecar."""


def path_of(path: str) -> str:
    """The path of a file's sidecar.

    >>> path_of("a/report.pdf")
    'a/report.pdf.meta.json'
    """
    return path + SUFFIX


def split(names: Iterable[str]) -> tuple[set[str], list[str]]:
    """The names of files that have a sidecar, and all names without those sidecars, in order.

    >>> split(["a.md", "a.md.meta.json", "b.md"])
    ({'a.md'}, ['a.md', 'b.md'])
    """
    found = list(names)
    described = {name for name in found if not name.endswith(SUFFIX)} & {
        name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX)
    }
    return described, [name for name in found if not (name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in described)]


def refuse_lone(name: str) -> None:
    """Raise a ParseError if this is a sidecar, for one whose file is missing."""
    if name.endswith(SUFFIX):
        raise ParseError(f"describes {posixpath.basename(name).removesuffix(SUFFIX)!r}, which is not beside it")


def parse(data: bytes) -> dict[str, Any]:
    """The values of a sidecar.

    Raises:
        ParseError: it is too long, or not a JSON object.
    """
    if len(data) > MAX_BYTES:
        raise ParseError(f"its {SUFFIX} file is longer than {MAX_BYTES:,} bytes")
    try:
        values = parse_json(data)
    except ParseError as error:
        raise ParseError(f"its {SUFFIX} file is {error}") from None
    if not isinstance(values, dict):
        raise ParseError(f"its {SUFFIX} file must contain a JSON object, found {type(values).__name__}")
    return values


def place_of(name: str) -> dict[str, Any]:
    """The metadata that a path below the corpus folder gives: `path`, and in `folder` each folder around the file.

    >>> place_of("missions/apollo/11.md")
    {'path': 'missions/apollo/11.md', 'folder': ['missions', 'missions/apollo']}
    """
    parts = name.split("/")[:-1]
    folders = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return {"path": name, **({"folder": folders} if folders else {})}
