"""Checksums: of files and bytes, and of any value that JSON can hold.

In: content. Out: hexadecimal digits that are equal where the content is. This module knows nothing of where content lies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["bytes_sha256", "canonical_json", "digest", "file_sha256"]


def digest(value: Any) -> str:
    """A short fingerprint of anything JSON can hold; equal values give equal fingerprints.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


def canonical_json(value: Any) -> bytes:
    """The one way in which a value is written: keys sorted, UTF-8, no NaN."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def bytes_sha256(content: bytes) -> str:
    """The sha256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a local file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
