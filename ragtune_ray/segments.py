"""An index on disk: versions, each naming immutable segments of passages, vectors and postings.

In: passages with their vectors, and a workspace. Out: segment directories, version manifests, and an open `Index` that finds
passages. This module knows nothing of encoders, prompts or Ray.

    WORKSPACE/index/CURRENT                        "000002": the version that readers take
    WORKSPACE/index/versions/000002/manifest.json  its segments, encoder, counts, the config that made it
    WORKSPACE/index/segments/ID/passages.arrow     `Passage` rows, an Arrow IPC file, read by memory mapping
    WORKSPACE/index/segments/ID/vectors.faiss      one vector per passage, in the same order
    WORKSPACE/index/segments/ID/lexical/           BM25 postings, numpy arrays
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ragtune_ray import index, lexical, schema, storage

__all__ = [
    "Index",
    "current_version",
    "index_problems",
    "list_versions",
    "open_index",
    "publish_version",
    "segment_url",
    "set_current",
    "version_url",
    "write_segment",
]

PASSAGES, VECTORS, LEXICAL = "passages.arrow", "vectors.faiss", "lexical"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """One version, open for searching; ordinals count its passages through the segments in their order."""

    version: str
    manifest: dict[str, Any]
    vectors: index.VectorIndex
    lexical: lexical.LexicalIndex
    passages: pa.Table
    """`Passage` rows; row number = ordinal. Memory-mapped: only what is touched is read."""

    def take(self, ordinals: Sequence[int]) -> list[schema.Passage]:
        """The passages at these ordinals, in this order."""
        return list(schema.from_table(self.passages.take(pa.array(ordinals, pa.int64())), schema.Passage))


def version_url(workspace: str, version: str) -> str:
    """Directory of a version."""
    return storage.join(workspace, "index", "versions", version)


def segment_url(workspace: str, segment_id: str) -> str:
    """Directory of a segment."""
    return storage.join(workspace, "index", "segments", segment_id)


def write_segment(directory: Path, passages: pa.Table, vectors: np.ndarray, trained: Any, language: str) -> None:
    """Write the files of a segment into a staging directory.

    Args:
        directory: from `storage.stage`.
        passages: `Passage` rows.
        vectors: (num_passages, dimension) unit vectors in the same order.
        trained: the empty FAISS structure that all segments of the version share.
        language: of the lexical index.

    Raises:
        ValueError: there are not as many vectors as passages, or a vector is not of length 1.
    """
    if len(vectors) != passages.num_rows:
        raise ValueError(f"segment {directory.name}: {len(vectors)} vectors for {passages.num_rows} passages")
    schema.check(passages.schema, schema.Passage)
    with pa.OSFile(str(directory / PASSAGES), "wb") as sink, pa.ipc.new_file(sink, passages.schema) as writer:
        writer.write_table(passages.combine_chunks())
    index.save(index.build(trained, vectors), directory / VECTORS)
    (directory / LEXICAL).mkdir()
    lexical.build_segment(passages["text"].to_pylist(), language).save(directory / LEXICAL)


def list_versions(workspace: str) -> list[str]:
    """The finished versions, oldest first."""
    names = storage.list_names(storage.join(workspace, "index", "versions"))
    return [name for name in names if storage.is_finished(version_url(workspace, name))]


def current_version(workspace: str) -> str:
    """The version that readers take.

    Raises:
        storage.ArtifactError: nothing is indexed there yet, or CURRENT is damaged.
    """
    url = storage.join(workspace, "index", "CURRENT")
    try:
        text = storage.read_text(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise storage.ArtifactError(f"{workspace}: holds no index; run: ragtune index CONFIG") from error
    except UnicodeDecodeError as error:
        raise storage.ArtifactError(f"{url}: is damaged; run: ragtune index CONFIG") from error
    if not re.fullmatch(r"[0-9]{6}\n", text):
        raise storage.ArtifactError(f"{url}: is damaged (holds {text[:20]!r}); run: ragtune index CONFIG")
    return text.strip()


def set_current(workspace: str, version: str) -> None:
    """Make readers take this version, in one atomic step."""
    storage.replace_text(storage.join(workspace, "index", "CURRENT"), f"{version}\n")


def publish_version(workspace: str, segment_ids: Sequence[str], files: dict[str, str], **facts: Any) -> str:
    """Write the next version and make it current.

    Args:
        workspace: where.
        segment_ids: finished segments, in the order that numbers the passages.
        files: small text files to keep beside the manifest, name -> content.
        **facts: JSON values for the manifest.

    Returns:
        The new version's name.

    Raises:
        storage.ArtifactError: a segment is missing, or another publisher took this number first.
    """
    segments = []
    for segment_id in segment_ids:
        manifest = storage.read_manifest(segment_url(workspace, segment_id))
        segments.append(
            {
                "segment_id": segment_id,
                "manifest_sha256": manifest["manifest_sha256"],
                "num_passages": manifest["num_passages"],
            }
        )
    names = storage.list_names(storage.join(workspace, "index", "versions"))
    version = f"{max((int(name) for name in names if name.isdigit()), default=0) + 1:06d}"
    url = version_url(workspace, version)
    staging = storage.stage(url)
    for name, content in files.items():
        (staging / name).write_text(content, encoding="utf-8")
    facts = {**facts, "version": version, "segments": segments, "deleted_document_ids": []}
    if not storage.publish(staging, url, "index", **facts):
        raise storage.ArtifactError(f"{url}: another publisher took this version first; run the command again")
    set_current(workspace, version)
    return version


def open_index(workspace: str, version: str | None = None) -> Index:
    """Open a version for searching, every file checked against its sha256.

    Args:
        workspace: where the index lies, local or remote.
        version: None takes the current one.

    Raises:
        storage.ArtifactError: it is missing or damaged.
    """
    version = version or current_version(workspace)
    manifest = storage.open_artifact(version_url(workspace, version), "index").manifest
    structures, postings, tables = [], [], []
    for entry in manifest["segments"]:
        url = segment_url(workspace, entry["segment_id"])
        segment = storage.open_artifact(url, "segment")
        if segment.manifest["manifest_sha256"] != entry["manifest_sha256"]:
            raise storage.ArtifactError(f"{url}: is not the segment that version {version} names; build it again")
        structures.append(index.load(segment.path / VECTORS))
        postings.append(lexical.Postings.load(segment.path / LEXICAL, mmap=True))
        tables.append(pa.ipc.open_file(pa.memory_map(str(segment.path / PASSAGES))).read_all())
    passages = pa.concat_tables(tables) if tables else schema.arrow_schema(schema.Passage).empty_table()
    return Index(
        version,
        manifest,
        index.VectorIndex(structures),
        lexical.LexicalIndex(postings, manifest["language"]),
        passages,
    )


def index_problems(workspace: str, version: str | None = None) -> list[str]:
    """Everything wrong with a version and its segments, one sentence each; empty when it is sound."""
    try:
        url = version_url(workspace, version or current_version(workspace))
    except storage.ArtifactError as error:
        return [str(error)]
    found = storage.problems(url)
    if found:
        return found
    for entry in storage.read_manifest(url)["segments"]:
        segment = segment_url(workspace, entry["segment_id"])
        damage = storage.problems(segment)
        if not damage and storage.read_manifest(segment)["manifest_sha256"] != entry["manifest_sha256"]:
            damage = [f"{segment}: is not the segment that {url} names"]
        found += damage
    return found
