"""One version of an index, open for searching.

In: a workspace and a version's name. Out: an `Index`: vectors, BM25 and passages of all its segments, numbered as one, and which
of them may be found. An open version never changes; opening the next one reuses the segments both have, so that it costs
what is new. This module knows nothing of encoders, prompts or Ray.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ragtune_ray import schema
from ragtune_ray.index import bm25, contents, filters, segments, vectors, versions
from ragtune_ray.storage import artifacts

__all__ = ["Index", "Selection", "open_index", "shards"]

Selection = Sequence[np.ndarray | None]
"""Per segment the passages that may be found, bool (num_passages,); None: all of them."""

KEPT_FILTERS = 64
"""Filters whose passages are remembered per open version."""


@dataclass(frozen=True)
class Index:
    """One version, open for searching; ordinals count its passages through the segments, deleted ones included."""

    version: str
    manifest: versions.IndexManifest
    segments: tuple[segments.Segment, ...]
    alive: Selection
    """What is not deleted."""
    vectors: vectors.VectorIndex
    lexical: bm25.LexicalIndex
    passages: pa.Table
    """`Passage` rows; row number = ordinal. Memory-mapped: only what is touched is read."""

    @property
    def num_passages(self) -> int:
        """Passages that are not deleted."""
        return sum(
            segment.num_passages if mask is None else int(np.count_nonzero(mask))
            for segment, mask in zip(self.segments, self.alive, strict=True)
        )

    def take(self, ordinals: Sequence[int]) -> list[schema.Passage]:
        """The passages at these ordinals, in this order.

        Raises:
            IndexError: there is no such ordinal.
        """
        return list(schema.from_table(segments.take_rows(self.passages, ordinals), schema.Passage))

    def by_id(self, passage_ids: Iterable[str]) -> dict[str, schema.Passage]:
        """The living passages of these ids; unknown ones are left out.

        Raises:
            storage.ArtifactError: a segment is too old to name its documents.
        """
        wanted = set(passage_ids)
        (owned,) = self.of_documents([sorted({schema.document_id_of(name) for name in wanted})])
        names = segments.take_rows(self.passages.select(["passage_id"]), owned)["passage_id"].to_pylist()
        kept = [ordinal for ordinal, name in zip(owned.tolist(), names, strict=True) if name in wanted]
        return {passage.passage_id: passage for passage in self.take(kept)}

    def of_documents(self, document_ids: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """The ordinals of the passages of each group of documents; those that are deleted or unknown have none.

        They stand in the order of the group's documents, and ascend within each.

        Raises:
            storage.ArtifactError: a segment is too old to name its documents.
        """
        wanted = list(dict.fromkeys(name for group in document_ids for name in group))
        owned: dict[str, list[np.ndarray]] = {}
        first = 0
        for segment, mask in zip(self.segments, self.alive, strict=True):
            rows = segment.documents
            for row in rows.find(wanted):
                ordinals = rows.passages(np.array([row]))
                name = rows.table["document_id"][int(row)].as_py()
                owned.setdefault(name, []).append(first + (ordinals if mask is None else ordinals[mask[ordinals]]))
            first += segment.num_passages
        nothing = np.empty(0, dtype=np.int64)
        return [
            np.concatenate([nothing, *(part for name in group for part in owned.get(name, []))])
            for group in document_ids
        ]

    def live_passages(self) -> pa.Table:
        """`Passage` rows of what is not deleted, in the order of the ordinals."""
        tables = [
            segment.passages if mask is None else segment.passages.filter(pa.array(mask))
            for segment, mask in zip(self.segments, self.alive, strict=True)
        ]
        return pa.concat_tables(tables) if tables else self.passages

    def allowed(self, chosen: filters.Filter) -> Selection:
        """What may be found: what is alive and, if the filter has conditions, let through by it.

        Raises:
            storage.ArtifactError: a segment is too old to be filtered.
        """
        return self._filtered(chosen) if chosen else self.alive

    @functools.cached_property
    def _filtered(self) -> Any:
        @functools.lru_cache(maxsize=KEPT_FILTERS)
        def filtered(chosen: filters.Filter) -> Selection:
            masks = [segment.matching(chosen) for segment in self.segments]
            return [mask if alive is None else mask & alive for mask, alive in zip(masks, self.alive, strict=True)]

        return filtered


def open_index(
    workspace: str,
    version: str | None = None,
    *,
    reuse: Index | None = None,
    shard: Sequence[int] | None = None,
    statistics: bm25.Statistics | None = None,
) -> Index:
    """Open a version for searching, its files checked and memory-mapped.

    Args:
        workspace: where the index lies, local or remote.
        version: None takes the current one.
        reuse: a version that is open already, whose segments are taken over where both have them.
        shard: open only the segments at these places of the version; ordinals then count through those alone.
        statistics: BM25 statistics of the whole index, where this is a shard of it.

    Raises:
        storage.ArtifactError: it is missing or damaged.
    """
    name = version or versions.current_version(workspace)
    opened = versions.read_version(workspace, name)
    manifest = opened.manifest
    entries = opened.entries if shard is None else [opened.entries[place] for place in shard]
    at_hand = {segment.manifest_sha256: segment for segment in reuse.segments} if reuse else {}
    found = tuple(
        at_hand.get(entry.manifest_sha256) or segments.open_segment(workspace, entry.segment_id, entry.manifest_sha256)
        for entry in entries
    )
    alive = [_alive(workspace, entry) for entry in entries]
    tables = [segment.passages for segment in found]
    return Index(
        name,
        manifest,
        found,
        alive,
        vectors.VectorIndex([segment.part for segment in found], _effort(manifest, found)),
        bm25.LexicalIndex(
            [segment.postings for segment in found], manifest["language"], alive=alive, statistics=statistics
        ),
        pa.concat_tables(tables) if tables else schema.arrow_schema(schema.Passage).empty_table(),
    )


def _alive(workspace: str, entry: versions.Entry) -> np.ndarray | None:
    if not entry.num_deleted:
        return None
    mask = np.ones(entry.num_passages, dtype=bool)
    mask[contents.deleted_passages(workspace, entry)] = False
    if np.count_nonzero(mask) != entry.num_live:
        raise artifacts.ArtifactError(
            f"{entry.deleted}: deletes other passages than the version says; run: ragtune rollback CONFIG"
        )
    return mask


def _effort(manifest: versions.IndexManifest, found: Sequence[segments.Segment]) -> vectors.SearchEffort:
    """As calibrated; versions of before that was done carry it in their structures."""
    if "search" in manifest:
        return vectors.SearchEffort(**manifest["search"])
    structures = [segment.part.structure for segment in found]
    lists = max((getattr(structure, "nprobe", 1) for structure in structures), default=1)
    graphs = [structure.hnsw.efSearch for structure in structures if hasattr(structure, "hnsw")]
    return vectors.SearchEffort(lists=lists, graph=max(graphs, default=vectors.SearchEffort().graph))


def shards(workspace: str, version: versions.Version, shard_bytes: int) -> list[list[int]]:
    """The places of a version's segments, in consecutive groups of at most so many bytes of files.

    A segment that is larger than that has a shard of its own.
    """
    groups: list[list[int]] = []
    size = 0
    for place, entry in enumerate(version.entries):
        files = segments.read_segment_manifest(workspace, entry.segment_id)["files"]
        num_bytes = sum(file["bytes"] for file in files.values())
        if not groups or size + num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(place)
        size += num_bytes
    return groups
