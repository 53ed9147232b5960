"""A segment: an immutable piece of an index, complete in itself.

In: passages with their vectors. Out: a directory of files, and the same opened again. This module knows nothing of versions,
encoders, prompts or Ray.

    WORKSPACE/index/segments/ID/passages.arrow    `Passage` rows, an Arrow IPC file, read by memory mapping
    WORKSPACE/index/segments/ID/documents.arrow   which document owns which passages, by hash of its id, and its fingerprint
    WORKSPACE/index/segments/ID/attributes.arrow  what documents can be filtered by, a row for each row of documents.arrow
    WORKSPACE/index/segments/ID/vectors.faiss     one vector per passage, in the same order
    WORKSPACE/index/segments/ID/vectors.npy       the vectors themselves, where vectors.faiss holds quantised codes
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
from ragtune_ray.storage import artifacts, failpoints, filesystem

__all__ = [
    "EXACT",
    "FINGERPRINT_BYTES",
    "STRUCTURE",
    "DocumentRows",
    "Segment",
    "SegmentManifest",
    "document_fingerprint",
    "open_documents",
    "open_segment",
    "publish_segment",
    "read_segment_manifest",
    "segment_url",
    "take_rows",
    "write_segment",
]

PASSAGES, DOCUMENTS, ATTRIBUTES = "passages.arrow", "documents.arrow", "attributes.arrow"
STRUCTURE, EXACT, LEXICAL = "vectors.faiss", "vectors.npy", "lexical"
FINGERPRINT_BYTES = 16

_DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("fingerprint", pa.binary(FINGERPRINT_BYTES), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
    ]
)


def segment_url(workspace: str, segment_id: str) -> str:
    """Directory of a segment."""
    return filesystem.join(workspace, "index", "segments", segment_id)


class SegmentManifest(TypedDict):
    """The manifest of a segment."""

    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    manifest_sha256: str
    num_passages: int  # deleted ones included
    trained_id: str  # of the structure it was built from; "" where nothing in it was trained


def read_segment_manifest(workspace: str, segment_id: str) -> SegmentManifest:
    """The manifest of a finished segment, without reading the segment's files.

    Raises:
        ArtifactError: the segment is missing or its manifest is damaged.
    """
    return cast(SegmentManifest, artifacts.read_manifest(segment_url(workspace, segment_id)))


def document_fingerprint(document: schema.Document) -> bytes:
    """What a document's passages depend on: another fingerprint, and it is embedded again.

    >>> len(document_fingerprint(schema.Document("d", "text", "", "{}", "a.md")))
    16
    """
    content = [document.document_id, document.title, document.text, document.metadata]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=FINGERPRINT_BYTES).digest()


def write_segment(
    directory: Path, passages: pa.Table, fingerprints: pa.Array, embedded: np.ndarray, trained: Any, language: str
) -> None:
    """Write the files of a segment into a staging directory.

    Args:
        directory: from `storage.stage`.
        passages: `Passage` rows; those of a document stand together.
        fingerprints: of each passage's document, binary of 16 bytes, (num_passages,).
        embedded: (num_passages, dimension) unit vectors in the same order.
        trained: the empty FAISS structure that segments of the version share.
        language: of the lexical index.

    Raises:
        IndexDataError: there are not as many vectors as passages, or a vector is not of length 1.
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
    bm25.build_segment((text.as_py() for text in passages["text"]), language).save(directory / LEXICAL)


def publish_segment(staging: Path, url: str, num_passages: int, trained_id: str) -> None:
    """Make a written segment appear, unless it already stands there.

    Args:
        staging: what `write_segment` filled.
        url: from `segment_url`.
        num_passages: in it.
        trained_id: of the structure it was built from; "" where that holds nothing trained.
    """
    failpoints.reach("segment.staged")
    artifacts.publish(staging, url, "segment", num_passages=num_passages, trained_id=trained_id)
    failpoints.reach("segment.published")


def _documents(passages: pa.Table, fingerprints: pa.Array) -> tuple[pa.Table, list[str]]:
    """A row for each run of passages of one document, sorted by the hash of its id; and the metadata of each."""
    ids = passages["document_id"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.empty(0, dtype=np.int64)
    counts = np.diff(np.append(starts, len(ids)))
    names = ids[starts]
    keys = _keys(names)
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
    return table, take_rows(passages.select(["metadata"]), starts[order])["metadata"].to_pylist()


def take_rows(table: pa.Table, numbers: Sequence[int] | np.ndarray) -> pa.Table:
    """The rows of a table at these numbers, in this order; chunks that hold none of them are not touched.

    `Table.take` would join all chunks of a column of texts first: a copy of a whole index for a few of its rows, and an error
    where they hold more than 2 GiB.

    Raises:
        IndexError: the table has no such row.
    """
    wanted = np.asarray(numbers, dtype=np.int64)
    outside = wanted[(wanted < 0) | (wanted >= table.num_rows)]
    if len(outside):
        raise IndexError(f"row {outside[0]}: the table has {table.num_rows} rows, counted from 0; ask for one of them")
    chunks = table.to_batches()
    ends = np.cumsum([chunk.num_rows for chunk in chunks])
    owners = np.searchsorted(ends, wanted, side="right")
    parts = [
        chunks[owner].take(pa.array(wanted[owners == owner] - (ends[owner] - chunks[owner].num_rows)))
        for owner in np.unique(owners)
    ]
    places = np.argsort(np.argsort(owners, kind="stable"))
    return pa.Table.from_batches(parts, table.schema).combine_chunks().take(pa.array(places))


def _keys(document_ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """64 bits of a hash of each id: sorted, they are searched without reading the ids themselves."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in document_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _map_arrow(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column as an array, memory-mapped where the file is one batch (`np.asarray` would import pandas first)."""
    found: np.ndarray = column.combine_chunks().to_numpy(zero_copy_only=False)
    return found


@dataclass(frozen=True)
class DocumentRows:
    """Which document owns which passages of a segment; sorted by `keys`."""

    keys: np.ndarray
    """(num_rows,) uint64."""
    table: pa.Table
    """document_id, fingerprint, first, count."""

    @functools.cached_property
    def first(self) -> np.ndarray:
        """(num_rows,) first passage of each row."""
        return _numbers(self.table["first"])

    @functools.cached_property
    def count(self) -> np.ndarray:
        """(num_rows,) passages of each row."""
        return _numbers(self.table["count"])

    def fingerprints(self) -> np.ndarray:
        """(num_rows,) of dtype S16; memory-mapped where the file is one batch."""
        column = self.table["fingerprint"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # an empty table has no chunk to combine
            return np.empty(0, dtype=f"S{FINGERPRINT_BYTES}")
        _, data = column.buffers()
        found: np.ndarray = np.frombuffer(data, dtype=f"S{FINGERPRINT_BYTES}")
        return found[column.offset : column.offset + len(column)]

    def find(self, document_ids: Sequence[str]) -> np.ndarray:
        """The rows of these documents, ascending; ids that are not here have none."""
        wanted = _keys(document_ids)
        low, high = (np.searchsorted(self.keys, wanted, side=side) for side in ("left", "right"))
        ranges = [np.arange(first, last) for first, last in zip(low, high, strict=True)]
        near = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *ranges]))
        # Two ids may share a hash: the ids themselves decide.
        names = set(document_ids)
        return near[[name in names for name in self.table["document_id"].take(pa.array(near)).to_pylist()]]

    def passages(self, rows: np.ndarray) -> np.ndarray:
        """The ordinals of the passages of these rows, ascending."""
        first, count = self.first[rows], self.count[rows]
        offsets = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.sort(np.repeat(first, count) + offsets)


@dataclass(frozen=True)
class Segment:
    """A segment's files, checked and open."""

    segment_id: str
    manifest_sha256: str
    passages: pa.Table
    """`Passage` rows; memory-mapped: only what is touched is read."""
    part: vectors.Part
    postings: bm25.Postings
    path: Path

    @property
    def num_passages(self) -> int:
        """Passages, those that are deleted included."""
        return int(self.passages.num_rows)

    @functools.cached_property
    def documents(self) -> DocumentRows:
        """Which document owns which passages; read when first asked for."""
        return _document_rows(self.path)

    @functools.cached_property
    def attributes(self) -> pa.Table:
        """What documents can be filtered by, a row for each row of `documents`."""
        return _map_arrow(self.path / ATTRIBUTES)

    def fingerprints(self) -> pa.Array:
        """The fingerprint of each passage's document, binary of 16 bytes, (num_passages,)."""
        rows = self.documents
        order = np.argsort(rows.first)
        content = np.repeat(rows.fingerprints()[order], rows.count[order]).tobytes()
        return pa.Array.from_buffers(pa.binary(FINGERPRINT_BYTES), self.num_passages, [None, pa.py_buffer(content)])

    def matching(self, chosen: filters.Filter) -> np.ndarray:
        """The passages whose documents a filter lets through, bool (num_passages,)."""
        rows = self.documents

        def metadata() -> list[str]:
            found: list[str] = take_rows(self.passages.select(["metadata"]), rows.first)["metadata"].to_pylist()
            return found

        mask = filters.matches(chosen, self.attributes, metadata)
        return filters.spread(mask, rows.first, rows.count, self.num_passages)


def _document_rows(path: Path) -> DocumentRows:
    if not (path / DOCUMENTS).is_file():
        raise artifacts.ArtifactError(
            f"{path}: was written by an earlier version of ragtune-ray, without {DOCUMENTS}: it can be searched, but not "
            "filtered or changed; run: ragtune index CONFIG"
        )
    table = _map_arrow(path / DOCUMENTS)
    return DocumentRows(_numbers(table["key"]), table)


def open_segment(workspace: str, segment_id: str, manifest_sha256: str) -> Segment:
    """Open a segment, its files checked and memory-mapped.

    Args:
        workspace: where the index lies, local or remote.
        segment_id: which.
        manifest_sha256: what the version expects of it.

    Raises:
        storage.ArtifactError: it is missing, damaged, or another segment than the version names.
    """
    artifact = _expected(workspace, segment_id, manifest_sha256, None)
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
    )


def open_documents(workspace: str, segment_id: str, manifest_sha256: str) -> DocumentRows:
    """The documents of a segment, without reading or checking its other files.

    Raises:
        storage.ArtifactError: as for `open_segment`, or the segment is too old to name its documents.
    """
    return _document_rows(_expected(workspace, segment_id, manifest_sha256, [DOCUMENTS]).path)


def _expected(workspace: str, segment_id: str, manifest_sha256: str, names: Sequence[str] | None) -> artifacts.Artifact:
    url = segment_url(workspace, segment_id)
    artifact = artifacts.open_artifact(url, "segment", names)
    if artifact.manifest["manifest_sha256"] != manifest_sha256:
        raise artifacts.ArtifactError(f"{url}: is not the segment that the version names; build it again")
    return artifact
