"""Compares the documents of a build with each other and with an index version, one partition of ids at a time.

A partition holds the ids whose hashes lie in one range, so documents with the same id are always in the same one. Tasks
compare partitions; only numbers, and the places of duplicates and of deleted passages, come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragtune_ray import RagtuneError
from ragtune_ray.cluster import stages
from ragtune_ray.cluster.indexing import units
from ragtune_ray.index import contents, segments, versions

BYTES_PER_DOCUMENT = 400
"""Memory of a task that compares documents."""
Returned = TypeVar("Returned")


class DuplicateError(RagtuneError, ValueError):
    """Two documents with different texts share an id; the message names both places."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document is in the input."""

    unit: int
    """Place of its unit among the keys."""
    text: str
    """As the unit knows it: lines are counted from the start of the unit."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """An exact copy of an earlier document."""

    place: Place
    earlier: Place
    first: int
    """First of its passages in its unit."""
    count: int
    is_known: bool


@dataclass(frozen=True, slots=True)
class Clash:
    """Two documents with the same id and different texts."""

    document_id: str
    place: Place
    earlier: Place


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The repeated ids of a partition."""

    duplicates: list[Duplicate]
    clashes: list[Clash]


@dataclass(slots=True)
class Difference:
    """How the documents of a partition differ from those of a version."""

    num_new: int = 0
    """Documents of the build that its base lacks."""
    num_known: int = 0
    """Distinct documents that its base contains."""
    num_seen: int = 0
    """Of these, how many the version contains."""
    num_changed: int = 0
    """New documents whose id the version contains with other content."""
    num_gone: int = 0
    """Ids of the version that leave it, including changed ones."""
    doomed: dict[str, np.ndarray] = field(default_factory=dict)
    """Segment id -> ordinals of the passages of documents that leave the version."""

    def add(self, other: Difference) -> None:
        """Add what another partition found."""
        for name in ("num_new", "num_known", "num_seen", "num_changed", "num_gone"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for segment_id, ordinals in other.doomed.items():
            before = self.doomed.get(segment_id, np.empty(0, dtype=np.int64))
            self.doomed[segment_id] = np.concatenate([before, ordinals])


def find_duplicates(build: str, keys: Sequence[str], partition: int) -> Duplicates:
    """Find the documents of a partition whose id an earlier document has, in the order of the units `keys`."""
    columns = ["document_id", "text_sha256", "place", "document_number", "first", "count", "is_known"]
    table = units.read_documents(build, keys, partition, columns)
    order, is_later = _order_by_id(table)
    later = np.flatnonzero(is_later)
    # The first of a run of equal ids is the last one before that is not a later one.
    first_of_run = np.maximum.accumulate(np.where(is_later, 0, np.arange(len(order)))) if len(order) else order
    copies = table.take(pa.array(order[later])).to_pylist()
    originals = table.take(pa.array(order[first_of_run[later]])).to_pylist()
    found = Duplicates([], [])
    for copy, original in zip(copies, originals, strict=True):
        place, earlier = Place(copy["unit"], copy["place"]), Place(original["unit"], original["place"])
        if copy["text_sha256"] != original["text_sha256"]:
            found.clashes.append(Clash(copy["document_id"], place, earlier))
        else:
            found.duplicates.append(Duplicate(place, earlier, copy["first"], copy["count"], copy["is_known"]))
    return found


def _order_by_id(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The rows by id and, for each, in the order of the input; and whether an earlier row has the same id."""
    codes = pc.dictionary_encode(table["document_id"].combine_chunks()).indices.to_numpy()
    order = np.lexsort((table["document_number"].to_numpy(), table["unit"].to_numpy(), codes))
    return order, np.concatenate([[False], codes[order][1:] == codes[order][:-1]]) if len(codes) else np.empty(0, bool)


def _first_of_each_id(build: str, keys: Sequence[str], partition: int) -> pa.Table:
    """The documents of a partition, without those whose id an earlier document has."""
    columns = ["document_id", "fingerprint", "is_known", "document_number"]
    table = units.read_documents(build, keys, partition, columns)
    order, is_later = _order_by_id(table)
    return table.take(pa.array(np.sort(order[~is_later])))


def compare(
    build: str, keys: Sequence[str], partition: int, partitions: int, workspace: str, version: str
) -> Difference:
    """Compare the documents of a partition with those of a version; see `Difference`."""
    table = _first_of_each_id(build, keys, partition)
    known = table.filter(table["is_known"])
    expected = np.unique(_fingerprints(known))
    new_ids = set(table.filter(pc.invert(table["is_known"]))["document_id"].to_pylist())
    found = Difference(num_new=len(new_ids), num_known=len(expected))
    seen: list[np.ndarray] = []
    gone: set[str] = set()
    low, high = _range(partition, partitions)
    for entry, rows, alive in contents.live_documents(workspace, versions.read_version(workspace, version)):
        first = np.searchsorted(rows.keys, low)
        last = len(rows.keys) if high is None else np.searchsorted(rows.keys, high)
        here = alive[(alive >= first) & (alive < last)]
        fingerprints = rows.fingerprints()[here]
        stays = np.isin(fingerprints, expected)
        seen.append(fingerprints[stays])
        gone.update(rows.table["document_id"].take(pa.array(here[~stays])).to_pylist())
        if not stays.all():
            found.doomed[entry.segment_id] = rows.passages(here[~stays])
    found.num_seen = len(np.unique(np.concatenate([expected[:0], *seen])))
    found.num_changed, found.num_gone = len(new_ids & gone), len(gone)
    return found


def _range(partition: int, partitions: int) -> tuple[np.uint64, np.uint64 | None]:
    """The first key of a partition, and of the next one."""
    edges = units.partition_edges(partitions)
    low = edges[partition - 1] if partition else np.uint64(0)
    return low, edges[partition] if partition < len(edges) else None


def _fingerprints(table: pa.Table) -> np.ndarray:
    return np.array(table["fingerprint"].to_pylist(), dtype=f"S{segments.FINGERPRINT_BYTES}")


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a build, in the order of its units."""

    build: str
    """Directory of the build."""
    keys: tuple[str, ...]
    """Of all units, in the order of the input."""
    partitions: int
    num_rows: int
    """Documents in all units, duplicates included."""
    in_process: bool
    """Compare without Ray."""

    def duplicates(self) -> Duplicates:
        """The repeated ids of all documents, in the order of the input."""
        found = Duplicates([], [])
        for part in self._of_each_partition(find_duplicates, self.build):
            found.duplicates.extend(part.duplicates)
            found.clashes.extend(part.clashes)
        found.duplicates.sort(key=lambda each: (each.place.unit, each.first, each.place.text))
        found.clashes.sort(key=lambda each: (each.place.unit, each.place.text))
        return found

    def difference(self, workspace: str, version: versions.Version) -> Difference:
        """How the documents differ from those of a version."""
        total = Difference()
        for part in self._of_each_partition(compare, self.build, self.partitions, workspace, version.name):
            total.add(part)
        return total

    def new(self) -> list[str]:
        """The ids of the documents that the base lacks, sorted. The list grows with the input, so this is for upserts."""
        found: set[str] = set()
        for partition in range(self.partitions):
            table = _first_of_each_id(self.build, self.keys, partition)
            found.update(table.filter(pc.invert(table["is_known"]))["document_id"].to_pylist())
        return sorted(found)

    def known(self) -> tuple[list[str], list[bytes]]:
        """The ids and fingerprints of the documents that the base contains."""
        parts = [_first_of_each_id(self.build, self.keys, number) for number in range(self.partitions)]
        table = pa.concat_tables(parts)
        table = table.filter(table["is_known"])
        return table["document_id"].to_pylist(), table["fingerprint"].to_pylist()

    def _of_each_partition(self, function: Callable[..., Returned], build: str, *arguments: object) -> list[Returned]:
        numbers = range(self.partitions)
        if self.in_process:
            return [function(build, self.keys, number, *arguments) for number in numbers]
        import ray

        memory = BYTES_PER_DOCUMENT * self.num_rows // self.partitions
        task, keys = stages.remote(function, memory_bytes=memory), ray.put(self.keys)
        with stages.root_cause_raised("documents"):
            found: list[Returned] = ray.get([task.remote(build, keys, number, *arguments) for number in numbers])
        return found
