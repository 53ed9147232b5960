"""Builds and publishes segments from the vectors of finished units, or from other segments, as soon as there are enough.

A segment is cut after `index.segment_passages` passages in the order of the input, so its content does not depend on which unit
was finished first.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import stages
from ragtune_ray.cluster.indexing import structures, units
from ragtune_ray.cluster.indexing.structures import Structure
from ragtune_ray.index import contents, faiss_index, search_effort, segments, vectors, versions
from ragtune_ray.storage import artifacts, checksums, filesystem

SMALL_SEGMENT_PASSAGES = 4096
"""Smaller segments are searched exactly in every kind of index: this is as fast, and needs no training."""
BYTES_PER_PASSAGE = 8 * 2**10
"""Memory of a task that builds a segment, for the text, its postings and its codes; and the vectors four times."""
MAX_RETRIES = 10
"""A task is started again so many times if its process or node is lost."""


@dataclass(frozen=True, slots=True)
class Source:
    """Consecutive passages of a finished unit, or the passages of a published segment that are not deleted."""

    rows: int
    unit: str = ""
    """Key of the unit; "" for a segment."""
    content: str = ""
    """What the unit was read from, wherever that is: its paths below the corpus folder, and the sha256 of the bytes."""
    first: int = 0
    """First row of the unit."""
    entry: versions.Entry | None = None
    """The segment."""

    def identity(self) -> list[Any]:
        """What the passages are, as JSON values."""
        return [self.content, self.first, self.rows, dataclasses.asdict(self.entry) if self.entry else None]


@dataclass(frozen=True, slots=True)
class Job:
    """What all tasks that build segments need to know."""

    settings: config.Config
    build: str
    """Directory of the build."""
    build_id: str
    words: str
    """Rules of BM25's words."""
    lexical_titles: bool
    """BM25 searches titles, too."""
    in_process: bool
    """Run without Ray."""

    @property
    def workspace(self) -> str:
        """Of the index."""
        return self.settings.workspace


@dataclass(slots=True)
class Builder:
    """Takes sources in order and builds a segment whenever it has enough passages for one."""

    job: Job
    structure: Structure
    names: list[str] = field(default_factory=list)
    """Ids of the segments so far, in order."""
    sizes: list[int] = field(default_factory=list)
    """Their numbers of passages."""
    _waiting: list[Source] = field(default_factory=list)
    _started: dict[Any, int] = field(default_factory=dict)
    """Reference to the result of a Ray task -> passages of its segment."""
    _undone: list[tuple[str, list[Source]]] = field(default_factory=list)
    """Segments to build in this process at the end."""
    _num_skipped: int = 0
    _num_built: int = 0
    """Passages in segments that an earlier run built, and that this one did."""
    _finished: frozenset[str] | None = None

    def add(self, source: Source) -> None:
        """Take the next passages. A unit is cut where a segment is full; segments are joined whole."""
        most = self.job.settings.index.segment_passages
        if source.entry is not None and self._num_waiting + source.rows > most:
            self._begin()
        while source.rows:
            rows = source.rows if source.entry else min(most - self._num_waiting, source.rows)
            self._waiting.append(dataclasses.replace(source, rows=rows))
            if self._num_waiting >= most:
                self._begin()
            source = dataclasses.replace(source, first=source.first + rows, rows=source.rows - rows)

    def finish(self) -> list[str]:
        """Build the last segment, and wait for all; returns their ids, in order.

        Raises:
            StageError: a task failed permanently.
        """
        self._begin()
        with progress.stage("segment", sum(self.sizes), "passages", self._num_skipped) as shown:
            shown.advance(self._num_built)
            for name, sources in self._undone:
                _build_segment(self.job, self.structure, name, sources)
                shown.advance(sum(source.rows for source in sources))
            while self._started:
                shown.advance(self.collect(timeout_seconds=None))
        return self.names

    def collect(self, timeout_seconds: float | None = 0.0) -> int:
        """Wait for a running task, at most so long; returns the number of passages in segments that are now finished."""
        if not self._started:
            return 0
        import ray

        done, _ = ray.wait([*self._started], num_returns=1, timeout=timeout_seconds)
        with stages.root_cause_raised("segment"):
            ray.get(done)
        built = sum(self._started.pop(reference) for reference in done)
        self._num_built += built
        return built

    @property
    def _num_waiting(self) -> int:
        return sum(source.rows for source in self._waiting)

    def _begin(self) -> None:
        """Start to build a segment of the waiting sources, unless it exists."""
        rows, sources, self._waiting = self._num_waiting, self._waiting, []
        if not sources:
            return
        name = checksums.digest(
            [self.job.build_id, *self.structure.identity(), [source.identity() for source in sources]]
        )
        self.names.append(name)
        self.sizes.append(rows)
        if self._is_finished(name):
            self._num_skipped += rows
        elif self.job.in_process:
            self._undone.append((name, sources))
        else:
            memory = rows * (BYTES_PER_PASSAGE + 16 * self.structure.dimension)
            task = stages.remote(_build_segment, memory_bytes=memory, max_retries=MAX_RETRIES)
            self._started[task.remote(self.job, self.structure, name, sources)] = rows

    def _is_finished(self, name: str) -> bool:
        if self._finished is None:
            self._finished = frozenset(filesystem.list_names(directory(self.job.build)))
        return f"{name}.json" in self._finished and artifacts.is_finished(
            segments.segment_url(self.job.workspace, name)
        )


def directory(build: str) -> str:
    """Where the markers of a build's segments are."""
    return filesystem.join(build, "segment")


def unit_source(facts: units.UnitFacts, content: str) -> Source:
    """All passages of a finished unit."""
    return Source(facts["rows"], unit=facts["key"], content=content)


def segment_source(entry: versions.Entry) -> Source:
    """The passages of a segment that are not deleted."""
    return Source(entry.num_live, entry=entry)


def _rows(job: Job, source: Source) -> tuple[pa.Table, np.ndarray]:
    """The passages of a source, with their documents' fingerprints, and their vectors."""
    if source.entry is None:
        last = source.first + source.rows
        return (
            units.read_passages(job.build, source.unit, source.first, last),
            units.read_vectors(job.build, source.unit, source.first, last),
        )
    segment = segments.open_segment(job.workspace, source.entry.segment_id, source.entry.manifest_sha256)
    alive = contents.live_mask(job.workspace, source.entry)
    passages = segment.passages.append_column("fingerprint", segment.fingerprints())
    stored = faiss_index.stored_vectors(segment.part.structure, segment.part.exact)
    return (passages, stored) if alive is None else (passages.filter(pa.array(alive)), stored[alive])


def _build_segment(job: Job, structure: Structure, name: str, sources: Sequence[Source]) -> None:
    """Build and publish a segment, measure its search efforts, and mark it as finished."""
    tables, parts = zip(*(_rows(job, source) for source in sources), strict=True)
    passages, embedded = pa.concat_tables(tables), np.concatenate(parts)
    del tables, parts
    url = segments.segment_url(job.workspace, name)
    if not artifacts.is_finished(url):
        trained = _empty_structure(job, structure, len(embedded))
        staging = artifacts.stage(url, scratch=filesystem.join(job.build, "staging"))
        columns = passages.select(schema.arrow_schema(schema.Passage).names)
        fingerprints = passages["fingerprint"].combine_chunks()
        with filesystem.discarding(staging):
            segments.write_segment(
                staging, columns, fingerprints, embedded, trained, job.words, titles=job.lexical_titles
            )
            _measure(job, structure, name, sources, staging, embedded)
        trained_id = structure.trained_id if faiss_index.kind_of(trained) == structure.kind else ""
        segments.publish_segment(staging, url, passages.num_rows, trained_id)
    elif structure.held_out:
        entry = versions.entry_of(job.workspace, name)
        opened = segments.open_segment(job.workspace, name, entry.manifest_sha256)
        _measure(job, structure, name, sources, opened.path, embedded)
    marker = filesystem.join(directory(job.build), f"{name}.json")
    filesystem.replace_text(marker, json.dumps({"segment_id": name}))


def _empty_structure(job: Job, structure: Structure, num_vectors: int) -> Any:
    """The empty structure for a segment of this many vectors."""
    is_exact = num_vectors < SMALL_SEGMENT_PASSAGES and not structure.held_out
    if structure.trained_id and not is_exact:
        return structures.load_trained(job.workspace, structure.trained_id)
    kind = "flat" if is_exact else structure.kind
    return faiss_index.train(
        kind, structure.dimension, num_vectors, np.empty((0, structure.dimension)), job.settings.seed
    )


def _measure(
    job: Job, structure: Structure, name: str, sources: Sequence[Source], folder: Path, embedded: np.ndarray
) -> None:
    """Store what searches of a segment find of the held-out vectors, if the index is being calibrated."""
    if not structure.held_out:
        return
    held_out = structures.load_held_out(job.build, structure.held_out)
    own = np.full(len(held_out.rows), -1, dtype=np.int64)
    offset = 0
    for source in sources:
        is_here = (held_out.keys == source.unit) & (held_out.rows >= source.first)
        is_here &= held_out.rows < source.first + source.rows
        own[is_here] = held_out.rows[is_here] - source.first + offset
        offset += source.rows
    loaded = faiss_index.load(folder / segments.STRUCTURE, mmap=True)
    exact = embedded if faiss_index.is_quantized(faiss_index.kind_of(loaded)) else None
    efforts = search_effort.measure_part(vectors.Part(loaded, exact, structure.trained_id), held_out.queries, own)
    with tempfile.TemporaryDirectory(prefix="ragtune-segment-") as temporary:
        saved = Path(temporary) / "efforts.npz"
        efforts.save(saved)
        filesystem.commit_file(saved, structures.efforts_url(job.build, name))
