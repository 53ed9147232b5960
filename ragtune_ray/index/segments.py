"""Writes and opens segments, the immutable and self-contained pieces of an index.

WORKSPACE/index/segments/ID/passages.arrow    `Passage` rows, a memory-mapped Arrow IPC file
WORKSPACE/index/segments/ID/documents.arrow   fingerprint and passages of each document, sorted by hash of its id
WORKSPACE/index/segments/ID/attributes.arrow  metadata to filter by, one row per row of documents.arrow
WORKSPACE/index/segments/ID/vectors.faiss     one vector per passage, in the same order
WORKSPACE/index/segments/ID/vectors.npy       exact vectors, if vectors.faiss contains quantized codes
WORKSPACE/index/segments/ID/lexical/          BM25 postings, numpy arrays
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa

from ragtune_ray import schema
from ragtune_ray.index import IndexDataError, bm25, faiss_index, filters, vectors
from ragtune_ray.storage import artifacts, failpoints, filesystem, node_cache

PASSAGES, DOCUMENTS, ATTRIBUTES = "passages.arrow", "documents.arrow", "attributes.arrow"
STRUCTURE, EXACT, LEXICAL = "vectors.faiss", "vectors.npy", "lexical"
FINGERPRINT_BYTES = 16

_DOCUMENTS_COLUMNS = {
    "key": pa.uint64(),
    "document_id": pa.string(),
    "fingerprint": pa.binary(FINGERPRINT_BYTES),
    "first": pa.int64(),
    "count": pa.int64(),
}
_DOCUMENTS_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _DOCUMENTS_COLUMNS.items()])


def segment_url(workspace: str, segment_id: str) -> str:
    """Return the directory of a segment."""
    return filesystem.join(workspace, "index", "segments", segment_id)


class SegmentManifest(TypedDict):
    """The manifest of a segment."""

    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    manifest_sha256: str
    num_passages: int  # deleted ones included
    trained_id: str  # of the structure it was built from; "" if that needs no training


def read_segment_manifest(workspace: str, segment_id: str) -> SegmentManifest:
    """Read the manifest of a finished segment, but none of its files."""
    return cast(SegmentManifest, artifacts.read_manifest(segment_url(workspace, segment_id)))


def document_fingerprint(document: schema.Document) -> bytes:
    """Return the fingerprint of a document's content; if it changes, the document is embedded again."""
    content = [document.document_id, document.title, document.text, document.metadata]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=FINGERPRINT_BYTES).digest()


def write_segment(
    directory: Path,
    passages: pa.Table,
    fingerprints: pa.Array,
    embedded: np.ndarray,
    trained: Any,
    words: str,
    *,
    titles: bool = False,
) -> None:
    """Write the files of a segment into a staging directory.

    Args:
        directory: from `artifacts.stage`.
        passages: `Passage` rows; all passages of a document are consecutive.
        fingerprints: of each passage's document, binary of 16 bytes, (num_passages,).
        embedded: (num_passages, dimension) unit vectors in the same order.
        trained: the empty FAISS structure that the segments of a version share.
        words: rules of the words of the lexical index.
        titles: whether the lexical index searches titles, too.

    Raises:
        IndexDataError: the numbers of vectors and passages differ, or a vector's length is not 1.
    """
    if len(embedded) != passages.num_rows:
        raise IndexDataError(f"segment {directory.name}: {len(embedded)} vectors for {passages.num_rows} passages")
    schema.check(passages.schema, schema.Passage)
    passages = passages.combine_chunks()
    documents, metadata = _documents(passages, fingerprints)
    _write_arrow(directory / PASSAGES, passages)
    _write_arrow(directory / DOCUMENTS, documents)
    _write_arrow(directory / ATTRIBUTES, filters.attributes(metadata))
    structure = faiss_index.build(trained, embedded)
    faiss_index.save(structure, directory / STRUCTURE)
    if faiss_index.is_quantized(faiss_index.kind_of(structure)):
        filesystem.save_array(directory / EXACT, np.ascontiguousarray(embedded, dtype=np.float32))
    del structure
    (directory / LEXICAL).mkdir()
    texts = (text.as_py() for text in passages["text"])
    if titles:
        texts = (f"{title.as_py()}\n{text}" for title, text in zip(passages["title"], texts, strict=True))
    bm25.build_segment(texts, words).save(directory / LEXICAL)


def publish_segment(staging: Path, url: str, num_passages: int, trained_id: str) -> None:
    """Publish the directory that `write_segment` filled, unless the segment already exists.

    `trained_id` is the id of the structure it was built from; "" if that needs no training.
    """
    failpoints.reach("segment.staged")
    artifacts.publish(staging, url, "segment", num_passages=num_passages, trained_id=trained_id)
    failpoints.reach("segment.published")


def _documents(passages: pa.Table, fingerprints: pa.Array) -> tuple[pa.Table, list[str]]:
    """Return a row per run of passages of one document, sorted by hash of the document's id, and their metadata."""
    ids = passages["document_id"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.empty(0, dtype=np.int64)
    counts = np.diff(np.append(starts, len(ids)))
    names = ids[starts]
    keys = document_keys(names)
    order = np.lexsort((starts, keys))
    rows = pa.array(starts[order], pa.int64())
    table = pa.table(
        [
            pa.array(keys[order], pa.uint64()),
            pa.array(names[order], pa.string()),
            fingerprints.take(rows).cast(pa.binary(FINGERPRINT_BYTES)),
            rows,
            pa.array(counts[order], pa.int64()),
        ],
        schema=_DOCUMENTS_SCHEMA,
    )
    metadata = take_rows(passages.select(["metadata"]), starts[order])["metadata"].to_pylist()
    return table, list(map(without_page, metadata))


def without_page(metadata: str) -> str:
    """Return the metadata of a document, from those of one of its passages.

    >>> without_page('{"#page": 2, "year": 1877}')
    '{"year": 1877}'
    """
    if schema.PAGE not in metadata:
        return metadata
    values = json.loads(metadata)
    values.pop(schema.PAGE, None)
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def take_rows(table: pa.Table, numbers: Sequence[int] | np.ndarray) -> pa.Table:
    """Return the rows of a table with these numbers, in this order, without touching other chunks.

    `Table.take` joins all chunks of a text column first: it copies a whole index for a few rows, and fails beyond 2 GiB.
    """
    chosen = np.asarray(numbers, dtype=np.int64)
    outside = chosen[(chosen < 0) | (chosen >= table.num_rows)]
    if len(outside):
        raise IndexError(f"row {outside[0]} is not in the table; it has rows 0 to {table.num_rows - 1}")
    chunks = table.to_batches()
    ends = np.cumsum([chunk.num_rows for chunk in chunks])
    owners = np.searchsorted(ends, chosen, side="right")
    parts = [
        chunks[owner].take(pa.array(chosen[owners == owner] - (ends[owner] - chunks[owner].num_rows)))
        for owner in np.unique(owners)
    ]
    places = np.argsort(np.argsort(owners, kind="stable"))
    return pa.Table.from_batches(parts, table.schema).combine_chunks().take(pa.array(places))


def document_keys(document_ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """Hash each id to 64 bits, (num_ids,) uint64; once sorted, hashes can be searched without reading ids."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in document_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _map_arrow(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as an array, memory-mapped if the file is one batch (`np.asarray` would import pandas)."""
    numbers: np.ndarray = column.combine_chunks().to_numpy(zero_copy_only=False)
    return numbers


@dataclass(frozen=True)
class DocumentRows:
    """Which document owns which passages of a segment; sorted by `keys`.

    Attributes:
        keys: (num_rows,) uint64, hashes of the document ids.
        table: document_id, fingerprint, first, count.
    """

    keys: np.ndarray
    table: pa.Table

    @functools.cached_property
    def first(self) -> np.ndarray:
        """First passage of each row, (num_rows,)."""
        return _numbers(self.table["first"])

    @functools.cached_property
    def count(self) -> np.ndarray:
        """Number of passages of each row, (num_rows,)."""
        return _numbers(self.table["count"])

    def fingerprints(self) -> np.ndarray:
        """Return the fingerprint of each row, (num_rows,) of dtype S16; memory-mapped if the file is one batch."""
        column = self.table["fingerprint"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # an empty table has no chunk to combine
            return np.empty(0, dtype=f"S{FINGERPRINT_BYTES}")
        _, data = column.buffers()
        found: np.ndarray = np.frombuffer(data, dtype=f"S{FINGERPRINT_BYTES}")
        return found[column.offset : column.offset + len(column)]

    def find(self, document_ids: Sequence[str]) -> np.ndarray:
        """Return the numbers of these documents' rows, ascending; unknown ids are ignored."""
        keys = document_keys(document_ids)
        low, high = (np.searchsorted(self.keys, keys, side=side) for side in ("left", "right"))
        ranges = [np.arange(first, last) for first, last in zip(low, high, strict=True)]
        near = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *ranges]))
        # Two ids may share a hash, so compare the ids.
        names = set(document_ids)
        return near[[name in names for name in self.table["document_id"].take(pa.array(near)).to_pylist()]]

    def passages(self, rows: np.ndarray) -> np.ndarray:
        """Return the ordinals of the passages of these rows, ascending."""
        first, count = self.first[rows], self.count[rows]
        offsets = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.sort(np.repeat(first, count) + offsets)


@dataclass(frozen=True)
class Segment:
    """An open segment whose files have been checked."""

    segment_id: str
    manifest_sha256: str
    passages: pa.Table
    """`Passage` rows, memory-mapped."""
    part: vectors.Part
    postings: bm25.Postings
    path: Path
    lease: node_cache.Lease | None
    """Keeps the local copy of a remote segment for what is read at its first use."""

    @property
    def num_passages(self) -> int:
        """Number of passages, including deleted ones."""
        return int(self.passages.num_rows)

    @functools.cached_property
    def documents(self) -> DocumentRows:
        """Which document owns which passages; read at the first use."""
        return _document_rows(self.path)

    @functools.cached_property
    def attributes(self) -> pa.Table:
        """Metadata to filter by, one row per row of `documents`."""
        return _map_arrow(self.path / ATTRIBUTES)

    def fingerprints(self) -> pa.Array:
        """Return the fingerprint of each passage's document, binary of 16 bytes, (num_passages,)."""
        rows = self.documents
        order = np.argsort(rows.first)
        content = np.repeat(rows.fingerprints()[order], rows.count[order]).tobytes()
        return pa.Array.from_buffers(pa.binary(FINGERPRINT_BYTES), self.num_passages, [None, pa.py_buffer(content)])

    def matching(self, chosen: filters.Filter) -> np.ndarray:
        """Return which passages' documents match a filter, bool (num_passages,)."""
        rows = self.documents

        def metadata() -> list[str]:
            found: list[str] = take_rows(self.passages.select(["metadata"]), rows.first)["metadata"].to_pylist()
            return found

        mask = filters.matches(chosen, self.attributes, metadata)
        return filters.spread(mask, rows.first, rows.count, self.num_passages)


def _document_rows(path: Path) -> DocumentRows:
    if not (path / DOCUMENTS).is_file():
        raise artifacts.ArtifactError(
            f"{path}: was written by an earlier version of ragtune-ray, without {DOCUMENTS}, so it can be searched but not "
            "filtered or changed; run: ragtune index CONFIG"
        )
    table = _map_arrow(path / DOCUMENTS)
    return DocumentRows(_numbers(table["key"]), table)


def open_segment(workspace: str, segment_id: str, manifest_sha256: str) -> Segment:
    """Check the files of a segment and open it, memory-mapped.

    Raises:
        ArtifactError: the segment is missing, damaged, or not the one that the version names.
    """
    artifact = _open_checked(workspace, segment_id, manifest_sha256, None)
    exact = artifact.path / EXACT
    return Segment(
        segment_id,
        manifest_sha256,
        _map_arrow(artifact.path / PASSAGES),
        vectors.Part(
            faiss_index.load(artifact.path / STRUCTURE, mmap=True),
            np.load(exact, mmap_mode="r", allow_pickle=False) if exact.is_file() else None,
            artifact.manifest.get("trained_id", ""),
        ),
        bm25.Postings.load(artifact.path / LEXICAL, mmap=True),
        artifact.path,
        artifact.lease,
    )


def open_documents(workspace: str, segment_id: str, manifest_sha256: str) -> DocumentRows:
    """Open the documents of a segment without reading or checking its other files."""
    return _document_rows(_open_checked(workspace, segment_id, manifest_sha256, [DOCUMENTS]).path)


def open_passages(workspace: str, segment_id: str, manifest_sha256: str) -> pa.Table:
    """Open the `Passage` rows of a segment, memory-mapped, without reading or checking its other files."""
    return _map_arrow(_open_checked(workspace, segment_id, manifest_sha256, [PASSAGES]).path / PASSAGES)


def _open_checked(
    workspace: str, segment_id: str, manifest_sha256: str, names: Sequence[str] | None
) -> artifacts.Artifact:
    url = segment_url(workspace, segment_id)
    artifact = artifacts.open_artifact(url, "segment", names)
    if artifact.manifest["manifest_sha256"] != manifest_sha256:
        raise artifacts.ArtifactError(f"{url}: is not the segment that the version names; run: ragtune index CONFIG")
    return artifact
