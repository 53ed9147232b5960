"""Reads a file after planning has hashed its blocks, and returns only bytes that still have these hashes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from ragtune_ray.ingest import inputs

BLOCK_BYTES = 2**20
"""Bytes that share a digest; the last block of a file may be shorter."""
_CACHED_BLOCKS = 8
_DIGEST_CHARACTERS = 32

Blocks = tuple[tuple[int, str], ...]
"""Numbers of blocks, counted from 0, and their digests."""


def block_digest(block: bytes) -> str:
    """The digest of a block: half of its sha256, because there are many."""
    return hashlib.sha256(block).hexdigest()[:_DIGEST_CHARACTERS]


def blocks_of(start: int, stop: int, num_blocks: int) -> Iterable[int]:
    """Numbers of the blocks that contain bytes `start` to `stop` of a file.

    >>> list(blocks_of(0, BLOCK_BYTES + 1, 9))
    [0, 1]
    """
    return range(max(start, 0) // BLOCK_BYTES, min(-(-stop // BLOCK_BYTES), num_blocks))


@contextlib.contextmanager
def opened(raw: Any, path: str, blocks: Blocks) -> Iterator[Any]:
    """A buffered `PlannedFile`, or `raw` itself if `blocks` is empty.

    Raises:
        ChangedError: a read in the block of code found a change; also if that code raised another error because of it.
    """
    if not blocks:
        yield raw
        return
    planned = PlannedFile(raw, path, blocks)
    try:
        yield io.BufferedReader(planned)
    except Exception as error:
        if planned.error is None:
            raise
        raise planned.error from error


class PlannedFile(io.RawIOBase):
    """A seekable file whose blocks are compared with their digests before any of their bytes are returned.

    Args:
        raw: the file, open for reading; stays open when this one is closed.
        path: for the error.
        blocks: of the bytes that may be read.

    Reading raises a ChangedError if a block has another digest, or none.
    """

    def __init__(self, raw: Any, path: str, blocks: Blocks) -> None:
        super().__init__()
        self._raw, self._path, self._digests = raw, path, dict(blocks)
        self._size_bytes = raw.seek(0, os.SEEK_END)
        self._position = 0
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self.error: inputs.ChangedError | None = None
        """What a read has raised. Libraries in C++ may turn it into an error of their own."""

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position; returns it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with bytes of one block; returns their number."""
        if self._position >= self._size_bytes or not len(buffer):
            return 0
        number, offset = divmod(self._position, BLOCK_BYTES)
        part = self._block(number)[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _block(self, number: int) -> bytes:
        if number not in self._cache:
            self._raw.seek(number * BLOCK_BYTES)
            block: bytes = self._raw.read(BLOCK_BYTES)
            if block_digest(block) != self._digests.get(number):
                self.error = inputs.changed(self._path)
                raise self.error
            self._cache[number] = block
            if len(self._cache) > _CACHED_BLOCKS:
                self._cache.popitem(last=False)
        return self._cache[number]
