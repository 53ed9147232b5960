"""Looks up, deletes and compares the documents of index versions.

    WORKSPACE/index/deleted/SEGMENT-HASH.npy       ordinals of a segment's deleted passages, int32, ascending

Nothing here publishes a version: `versions` does.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ragtune_ray import schema
from ragtune_ray.index import segments, versions
from ragtune_ray.storage import artifacts, checksums, filesystem


def _deleted_url(workspace: str, name: str = "") -> str:
    return filesystem.join(workspace, "index", "deleted", *filter(None, [name]))


def deleted_passages(workspace: str, entry: versions.Entry, *, stored: bool = False) -> np.ndarray:
    """Return the ordinals of a segment's deleted passages, ascending, int32; `stored` bypasses the local cache.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    if not entry.deleted:
        return np.empty(0, dtype=np.int32)
    url = _deleted_url(workspace, entry.deleted)
    try:
        content = b"" if stored else _cached(workspace, entry.deleted)
        # A damaged copy in the cache does not mean that the stored file is damaged.
        if checksums.bytes_sha256(content) != entry.deleted_sha256:
            store, path = filesystem.locate(url)
            content = bytes(store.cat_file(path))
    except FileNotFoundError as error:
        raise artifacts.ArtifactError(f"{url}: is missing; run: ragtune rollback CONFIG") from error
    if checksums.bytes_sha256(content) != entry.deleted_sha256:
        raise artifacts.ArtifactError(f"{url}: does not match its sha256; run: ragtune rollback CONFIG")
    ordinals: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return ordinals


def _cached(workspace: str, name: str) -> bytes:
    return (filesystem.local_copy(_deleted_url(workspace), [name], "deleted") / name).read_bytes()


def live_mask(workspace: str, entry: versions.Entry) -> np.ndarray | None:
    """Return which passages of a segment are not deleted, bool (num_passages,); None if none are deleted.

    Raises:
        ArtifactError: the file of deletions is missing, damaged, or does not match the version.
    """
    if not entry.num_deleted:
        return None
    mask = np.ones(entry.num_passages, dtype=bool)
    mask[deleted_passages(workspace, entry)] = False
    if np.count_nonzero(mask) != entry.num_live:
        raise artifacts.ArtifactError(f"{entry.deleted}: does not match its version; run: ragtune rollback CONFIG")
    return mask


def delete_passages(workspace: str, entry: versions.Entry, doomed: np.ndarray) -> versions.Entry:
    """Store `doomed` ordinals as deleted, in addition to earlier ones; return the segment's changed, unpublished entry."""
    before = deleted_passages(workspace, entry)
    ordinals = np.union1d(before, doomed).astype(np.int32)
    if len(ordinals) == len(before):
        return entry
    stream = io.BytesIO()
    np.save(stream, ordinals, allow_pickle=False)
    sha256 = checksums.bytes_sha256(stream.getvalue())
    name = f"{entry.segment_id}-{sha256[:16]}.npy"
    if not filesystem.exists(_deleted_url(workspace, name)):
        with tempfile.TemporaryDirectory(prefix="ragtune-deleted-") as temporary:
            (Path(temporary) / name).write_bytes(stream.getvalue())
            filesystem.commit_file(Path(temporary) / name, _deleted_url(workspace, name))
    return dataclasses.replace(entry, deleted=name, deleted_sha256=sha256, num_deleted=len(ordinals))


def live_documents(
    workspace: str, version: versions.Version
) -> Iterator[tuple[versions.Entry, segments.DocumentRows, np.ndarray]]:
    """Yield the entry of each segment, its documents, and the numbers of their rows that are not deleted."""
    for entry in version.entries:
        yield entry, *_live_rows(workspace, entry)


def _documents(workspace: str, entry: versions.Entry) -> segments.DocumentRows:
    return segments.open_documents(workspace, entry.segment_id, entry.manifest_sha256)


def _live_rows(workspace: str, entry: versions.Entry) -> tuple[segments.DocumentRows, np.ndarray]:
    rows = _documents(workspace, entry)
    return rows, np.flatnonzero(~np.isin(rows.first, deleted_passages(workspace, entry)))


class KnownDocuments:
    """The documents of a version (None: no documents), found by id and fingerprint; opening it reads none of them."""

    def __init__(self, workspace: str, version: versions.Version | None) -> None:
        self._segments = [
            (_documents(workspace, entry), deleted_passages(workspace, entry))
            for entry in (version.entries if version else ())
        ]

    def contain(self, document_ids: Sequence[str], fingerprints: Sequence[bytes]) -> list[bool]:
        """Return for each document whether the version contains it with this fingerprint."""
        found: set[tuple[str, bytes]] = set()
        for rows, deleted in self._segments:
            near = rows.find(document_ids)
            found.update(_id_fingerprints(rows, near[~np.isin(rows.first[near], deleted)]))
        return [key in found for key in zip(document_ids, fingerprints, strict=True)]


def present(workspace: str, version: versions.Version, document_ids: Sequence[str]) -> set[str]:
    """Return those of the documents that a version contains."""
    found: set[str] = set()
    for entry in version.entries:
        rows = _documents(workspace, entry)
        near = rows.find(document_ids)
        near = near[~np.isin(rows.first[near], deleted_passages(workspace, entry))]
        found.update(rows.table["document_id"].take(pa.array(near)).to_pylist())
    return found


def passages_by_id(workspace: str, passage_ids: Iterable[str], version: str | None = None) -> dict[str, schema.Passage]:
    """Return the passages of a version (None: the current one) with these ids; unknown and deleted ones are left out.

    Only documents and texts are opened, of one segment at a time.
    """
    ids = set(passage_ids)
    documents = sorted({schema.document_id_of(name) for name in ids})
    found: dict[str, schema.Passage] = {}
    for entry in versions.read_version(workspace, version or versions.current_version(workspace)).entries:
        rows = _documents(workspace, entry)
        near = rows.find(documents)
        if not len(near):
            continue
        ordinals = np.setdiff1d(rows.passages(near), deleted_passages(workspace, entry))
        table = segments.open_passages(workspace, entry.segment_id, entry.manifest_sha256)
        names = segments.take_rows(table.select(["passage_id"]), ordinals)["passage_id"].to_pylist()
        kept = ordinals[np.array([name in ids for name in names], dtype=bool)]
        passages = schema.from_table(segments.take_rows(table, kept), schema.Passage)
        found.update((passage.passage_id, passage) for passage in passages)
    return found


def find_documents(
    workspace: str, version: versions.Version, document_ids: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Find documents that are not deleted: document_id -> segment_id -> ordinals of its passages in that segment."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for entry, rows, alive in live_documents(workspace, version):
        near = np.intersect1d(rows.find(document_ids), alive)
        names = rows.table["document_id"].take(pa.array(near)).to_pylist()
        for row, name in zip(near, names, strict=True):
            ordinals = rows.passages(np.array([row]))
            places = found.setdefault(name, {})
            places[entry.segment_id] = np.union1d(places.get(entry.segment_id, ordinals), ordinals)
    return found


def difference(workspace: str, old: versions.Version, new: versions.Version) -> dict[str, list[str]]:
    """Return the sorted ids of the documents that were added, removed and changed from one version to another.

    Segments that are the same in both are not read.
    """
    shared = set(old.entries) & set(new.entries)
    before, after = (_fingerprints(workspace, set(version.entries) - shared) for version in (old, new))
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
    }


def fingerprints(workspace: str, version: versions.Version) -> dict[str, bytes]:
    """Return the digest of the content of each document, by id."""
    return _fingerprints(workspace, version.entries)


def _fingerprints(workspace: str, entries: Iterable[versions.Entry]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for entry in entries:
        contents.update(_id_fingerprints(*_live_rows(workspace, entry)))
    return contents


def _id_fingerprints(rows: segments.DocumentRows, numbers: np.ndarray) -> Iterator[tuple[str, bytes]]:
    table = rows.table.select(["document_id", "fingerprint"]).take(pa.array(numbers))
    return zip(*(column.to_pylist() for column in table.columns), strict=True)


def index_problems(
    workspace: str, version: str | None = None, check: Callable[[str], Sequence[str]] = artifacts.find_problems
) -> list[str]:
    """Return the problems of a version (None: the current one), its segments and deletions, one sentence each.

    `check` returns the problems of an artifact; if it caches them, a segment is hashed once for all versions.
    """
    try:
        name = version or versions.current_version(workspace)
        found = list(check(versions.version_url(workspace, name)))
        if found:
            return found
        opened = versions.read_version(workspace, name)
    except artifacts.ArtifactError as error:
        return [str(error)]
    for entry in opened.entries:
        url = segments.segment_url(workspace, entry.segment_id)
        damage = list(check(url))
        if not damage and artifacts.read_manifest(url)["manifest_sha256"] != entry.manifest_sha256:
            damage = [f"{url}: is not the segment that {versions.version_url(workspace, name)} names"]
        try:
            deleted = deleted_passages(workspace, entry, stored=True)
            if len(deleted) != entry.num_deleted:
                damage.append(f"{url}: {len(deleted)} passages are deleted, its version records {entry.num_deleted}")
        except artifacts.ArtifactError as error:
            damage.append(str(error))
        found += damage
    return found
