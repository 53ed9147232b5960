"""Opens an index version for searching: vectors, BM25 and passages of all its segments, numbered as one.

An open version never changes. Opening the next one reuses the segments that both have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ragtune_ray import schema
from ragtune_ray.index import bm25, contents, filters, segments, vectors, versions

Selection = Sequence[np.ndarray | None]
"""Per segment, which passages may be hits, bool (num_passages,); None allows all of them."""

LISTED_CHARACTERS = 2**19
"""Maximum length of all metadata in a page of listed documents: even in UTF-8, replicas may send this to each other."""
LISTED_TITLE_CHARACTERS = 500
KEPT_FILTERS = 64
"""Size of the cache of filters, per open version."""


@dataclass(frozen=True, slots=True)
class ListedDocument:
    """A document of an open version, without its text."""

    document_id: str
    title: str
    """At most `LISTED_TITLE_CHARACTERS`."""
    metadata: str | None
    """A JSON object as text; None if it is longer than `LISTED_CHARACTERS`."""
    num_passages: int


@dataclass(frozen=True)
class Index:
    """An open version. Ordinals number its passages through all segments, including deleted ones."""

    version: str
    manifest: versions.IndexManifest
    segments: tuple[segments.Segment, ...]
    alive: Selection
    """Passages that are not deleted."""
    vectors: vectors.VectorIndex
    lexical: bm25.LexicalIndex
    passages: pa.Table
    """`Passage` rows, memory-mapped; the row number is the ordinal."""

    @property
    def num_passages(self) -> int:
        """Number of passages that are not deleted."""
        return sum(
            segment.num_passages if mask is None else int(np.count_nonzero(mask))
            for segment, mask in zip(self.segments, self.alive, strict=True)
        )

    def take(self, ordinals: Sequence[int]) -> list[schema.Passage]:
        """Return the passages with these ordinals, in this order."""
        return list(schema.from_table(segments.take_rows(self.passages, ordinals), schema.Passage))

    def by_id(self, passage_ids: Iterable[str]) -> dict[str, schema.Passage]:
        """Return the passages with these ids; unknown and deleted ones are left out."""
        ids = set(passage_ids)
        (owned,) = self.of_documents([sorted({schema.document_id_of(name) for name in ids})])
        names = segments.take_rows(self.passages.select(["passage_id"]), owned)["passage_id"].to_pylist()
        kept = [ordinal for ordinal, name in zip(owned.tolist(), names, strict=True) if name in ids]
        return {passage.passage_id: passage for passage in self.take(kept)}

    def of_documents(self, document_ids: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return, for each group of documents, the ordinals of its passages in the order of the documents, then ascending.

        Unknown and deleted documents have no passages.
        """
        ids = list(dict.fromkeys(name for group in document_ids for name in group))
        owned: dict[str, list[np.ndarray]] = {}
        first = 0
        for segment, mask in zip(self.segments, self.alive, strict=True):
            rows = segment.documents
            for row in rows.find(ids):
                ordinals = rows.passages(np.array([row]))
                name = rows.table["document_id"][int(row)].as_py()
                owned.setdefault(name, []).append(first + (ordinals if mask is None else ordinals[mask[ordinals]]))
            first += segment.num_passages
        nothing = np.empty(0, dtype=np.int64)
        parts = ([part for name in group for part in owned.get(name, [])] for group in document_ids)
        return [np.concatenate([nothing, *group]) for group in parts]

    def list_documents(self, chosen: filters.Filter, after: str, limit: int) -> tuple[list[ListedDocument], bool]:
        """List the documents that match a filter, in the order of the hashes of their ids, which no change of the index alters.

        Args:
            chosen: which documents to list.
            after: the last id of the previous page, even if it has been deleted meanwhile; "" for the first page.
            limit: maximum number of documents. If their metadata exceed `LISTED_CHARACTERS`, there are fewer, but at least one.

        Returns:
            The documents, and whether more follow.
        """
        start = (int(segments.document_keys([after])[0]), after) if after else (0, "")
        found: dict[tuple[int, str], list[tuple[segments.Segment, int]]] = {}
        for segment, mask in zip(self.segments, self.allowed(chosen), strict=True):
            rows = segment.documents
            numbers = _rows_after(rows, mask, start[0], limit + 2)
            names = rows.table["document_id"].take(pa.array(numbers)).to_pylist()
            for name, key, number in zip(names, rows.keys[numbers].tolist(), numbers.tolist(), strict=True):
                found.setdefault((key, name), []).append((segment, number))
        places = sorted(place for place in found if place > start)
        listed = _one_page(_listed(place[1], found[place]) for place in places[:limit])
        return listed, len(listed) < len(places)

    def live_passages(self) -> pa.Table:
        """Return the `Passage` rows that are not deleted, in the order of their ordinals."""
        tables = [
            segment.passages if mask is None else segment.passages.filter(pa.array(mask))
            for segment, mask in zip(self.segments, self.alive, strict=True)
        ]
        return pa.concat_tables(tables) if tables else self.passages

    def allowed(self, chosen: filters.Filter) -> Selection:
        """Return which passages may be hits: those that are not deleted and match the filter."""
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
    """Check the files of a version and open it for searching, memory-mapped.

    Args:
        workspace: local or remote.
        version: the version's name; None opens the current one.
        reuse: an open version whose segments are reused if this version has them too.
        shard: positions of the segments to open; ordinals then number only their passages. None opens all.
        statistics: BM25 statistics of the whole index, if only a shard is opened.

    Raises:
        ArtifactError: the version is missing or damaged.
    """
    name = version or versions.current_version(workspace)
    opened = versions.read_version(workspace, name)
    manifest = opened.manifest
    entries = opened.entries if shard is None else [opened.entries[place] for place in shard]
    reusable = {segment.manifest_sha256: segment for segment in reuse.segments} if reuse else {}
    found = tuple(
        reusable.get(entry.manifest_sha256) or segments.open_segment(workspace, entry.segment_id, entry.manifest_sha256)
        for entry in entries
    )
    alive = [contents.live_mask(workspace, entry) for entry in entries]
    tables = [segment.passages for segment in found]
    return Index(
        name,
        manifest,
        found,
        alive,
        vectors.VectorIndex([segment.part for segment in found], _effort(manifest, found)),
        lexical_index(manifest, found, alive, statistics),
        pa.concat_tables(tables) if tables else schema.arrow_schema(schema.Passage).empty_table(),
    )


def open_part(workspace: str, max_bytes: int, seed: int, version: str | None = None) -> Index:
    """Open as many segments of a version, drawn at random, as have at most `max_bytes` of files; all if they fit.

    Args:
        workspace: local or remote.
        max_bytes: the limit; one segment is opened even if it is larger.
        seed: for drawing.
        version: the version's name; None means the current one.

    Raises:
        ArtifactError: the version is missing or damaged.
    """
    opened = versions.read_version(workspace, version or versions.current_version(workspace))
    sizes = np.array([_segment_bytes(workspace, entry.segment_id) for entry in opened.entries], dtype=np.int64)
    if sizes.sum() <= max_bytes:
        return open_index(workspace, opened.name)
    order = np.random.default_rng(seed).permutation(len(sizes))
    num_drawn = max(1, int(np.searchsorted(np.cumsum(sizes[order]), max_bytes, side="right")))
    return open_index(workspace, opened.name, shard=sorted(order[:num_drawn].tolist()))


def lexical_index(
    manifest: versions.IndexManifest,
    found: Sequence[segments.Segment],
    alive: Selection,
    statistics: bm25.Statistics | None = None,
) -> bm25.LexicalIndex:
    """Return BM25 over open segments of a version; `statistics` are those of the whole index, if these are only a shard."""
    postings = [segment.postings for segment in found]
    return bm25.LexicalIndex(postings, versions.words_of(manifest), alive=alive, statistics=statistics)


def _effort(manifest: versions.IndexManifest, found: Sequence[segments.Segment]) -> vectors.SearchEffort:
    """Return the calibrated effort; in format 1 the structures contain it."""
    if "search" in manifest:
        return vectors.SearchEffort(**manifest["search"])
    structures = [segment.part.structure for segment in found]
    lists = max((getattr(structure, "nprobe", 1) for structure in structures), default=1)
    graphs = [structure.hnsw.efSearch for structure in structures if hasattr(structure, "hnsw")]
    return vectors.SearchEffort(lists=lists, graph=max(graphs, default=vectors.SearchEffort().graph))


def shards(workspace: str, version: versions.Version, shard_bytes: int) -> list[list[int]]:
    """Group the positions of a version's segments into consecutive shards of at most `shard_bytes` of files.

    A segment that is larger than the limit is a shard of its own.
    """
    groups: list[list[int]] = []
    size = 0
    for place, entry in enumerate(version.entries):
        num_bytes = _segment_bytes(workspace, entry.segment_id)
        if not groups or size + num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(place)
        size += num_bytes
    return groups


@functools.lru_cache(maxsize=2**16)
def _segment_bytes(workspace: str, segment_id: str) -> int:
    """The bytes of a segment's files, which never change, so that they are looked up once."""
    files = segments.read_segment_manifest(workspace, segment_id)["files"]
    return sum(file["bytes"] for file in files.values())


def divided(version: versions.Version, num_shards: int) -> list[list[int]]:
    """Divide the positions of a version's segments into this many consecutive shards of about as many passages each.

    A shard is empty if there are too few segments. An added segment moves few others to another shard, or none.
    """
    sizes = np.array([entry.num_passages for entry in version.entries], dtype=np.int64)
    twice_the_middles = 2 * np.cumsum(sizes) - sizes
    owners = twice_the_middles * num_shards // max(1, 2 * int(sizes.sum()))
    return [np.flatnonzero(owners == number).tolist() for number in range(num_shards)]


def merge_listed(
    pages: Sequence[tuple[Sequence[ListedDocument], bool]], limit: int
) -> tuple[list[ListedDocument], bool]:
    """Merge what `Index.list_documents` returned for the shards of one version; a document may lie in two of them."""
    found: dict[tuple[int, str], ListedDocument] = {}
    ends = []
    for documents, has_more in pages:
        ids = [document.document_id for document in documents]
        places = list(zip(segments.document_keys(ids).tolist(), ids, strict=True))
        for place, document in zip(places, documents, strict=True):
            known = found.get(place)
            num_passages = document.num_passages + (known.num_passages if known else 0)
            found[place] = dataclasses.replace(known or document, num_passages=num_passages)
        if has_more:
            ends.append(places[-1])  # what this shard has after it is not known
    complete = sorted(place for place in found if not ends or place <= min(ends))
    listed = _one_page(found[place] for place in complete[:limit])
    return listed, bool(ends) or len(listed) < len(found)


def _one_page(documents: Iterable[ListedDocument]) -> list[ListedDocument]:
    """The first documents, at least one, whose metadata together have at most `LISTED_CHARACTERS`."""
    page: list[ListedDocument] = []
    num_characters = 0
    for document in documents:
        num_characters += len(document.metadata or "")
        if page and num_characters > LISTED_CHARACTERS:
            break
        page.append(document)
    return page


def _rows_after(rows: segments.DocumentRows, mask: np.ndarray | None, key: int, num_keys: int) -> np.ndarray:
    """The rows of a segment with at least the first so many different keys from `key` on whose passages the mask allows."""
    start = int(np.searchsorted(rows.keys, np.uint64(key)))
    size = num_keys
    while True:
        # Only a part of the rows is looked at, since a segment may have millions.
        numbers = np.arange(start, min(start + size, len(rows.keys)))
        if mask is not None:
            numbers = numbers[mask[rows.first[numbers]]]
        keys = rows.keys[numbers]
        if start + size >= len(rows.keys):
            return numbers
        if len(np.unique(keys)) > num_keys:
            return numbers[: np.searchsorted(keys, keys[-1])]  # the last key may have more rows
        size *= 2  # the mask leaves rows out, and a document has several if others stand between its passages


def _listed(document_id: str, places: Sequence[tuple[segments.Segment, int]]) -> ListedDocument:
    segment, row = places[0]
    first = segments.take_rows(segment.passages.select(["title", "metadata"]), [int(segment.documents.first[row])])
    num_passages = sum(int(segment.documents.count[row]) for segment, row in places)
    title, metadata = first["title"][0].as_py(), segments.without_page(first["metadata"][0].as_py())
    kept = metadata if len(metadata) <= LISTED_CHARACTERS else None
    return ListedDocument(document_id, title[:LISTED_TITLE_CHARACTERS], kept, num_passages)
