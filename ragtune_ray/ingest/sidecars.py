"""Metadata of a document file: its place, and what a JSON file beside it says (`report.pdf.meta.json`)."""

from __future__ import annotations

import posixpath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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


def places(names: pa.ChunkedArray) -> np.ndarray:
    """For each name, the place of its sidecar among the names; -1 if it has none.

    >>> places(pa.chunked_array([["a.md", "a.md.meta.json", "b.md"]])).tolist()
    [1, -1, -1]
    """
    found = np.full(len(names), -1, dtype=np.int64)
    is_sidecar = np.asarray(pc.ends_with(names, SUFFIX))
    if is_sidecar.any():
        described = [name.removesuffix(SUFFIX) for name in names.filter(pa.array(is_sidecar)).to_pylist()]
        owners = np.asarray(pc.fill_null(pc.index_in(pa.array(described, names.type), value_set=names), -1))
        is_beside = (owners >= 0) & ~is_sidecar[owners]  # a sidecar has none
        found[owners[is_beside]] = np.flatnonzero(is_sidecar)[is_beside]
    return found


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
