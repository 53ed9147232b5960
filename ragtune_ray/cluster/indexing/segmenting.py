"""Last stage of an index build: builds and publishes segments from vectors, with one trained FAISS structure for all.

In: embedded blocks of a build, or published segments to merge. First, a task trains centroids on a sample. Then segments are
built in parallel, and each records its exact neighbors of some held-out vectors. Last, a task searches for these vectors and
measures how many lists or candidates a search must examine to find the exact neighbors (calibration).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ragtune_ray import config, schema
from ragtune_ray.cluster import actors, stages
from ragtune_ray.cluster.indexing import embedding
from ragtune_ray.index import contents, faiss_index, retention, search_effort, segments, vectors, versions
from ragtune_ray.storage import artifacts, checksums, failpoints, filesystem

if TYPE_CHECKING:
    import ray.data

SMALL_SEGMENT_PASSAGES = 4096
"""Smaller segments are searched exactly in every kind of index: this is as fast, and needs no training."""
HELD_OUT = "held-out.npz"
TRAINED = "structure.faiss"
Source = dict[str, Any]
"""Input of a segment as JSON: a block of a build or the entry of another segment, and its number of `rows`."""


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of all tasks of a build."""

    settings: config.Config
    build: str
    """Directory of the build."""
    build_id: str
    kind: faiss_index.ConcreteKind
    """Kind of the whole index."""
    dimension: int
    words: str
    """Rules of BM25's words."""
    lexical_titles: bool
    """BM25 searches titles, too."""
    trained_id: str
    """The trained structure to build from; "" if none is trained yet or the kind needs none."""
    in_process: bool
    """Run without Ray."""

    @property
    def workspace(self) -> str:
        """Of the index."""
        return self.settings.workspace


def blocks_as_sources(blocks: Sequence[dict[str, Any]]) -> list[Source]:
    """Embedded units as sources; those without passages are left out."""
    return [
        {"block": {name: block[name] for name in ("unit", "part", "row_group")}, "rows": block["rows"]}
        for block in blocks
        if block["rows"]
    ]


def segments_as_sources(entries: Sequence[versions.Entry]) -> list[Source]:
    """Segments as sources; their deleted passages are left out."""
    return [{"entry": dataclasses.asdict(entry), "rows": entry.num_live} for entry in entries]


def build_segments(job: Job, sources: Sequence[Source], *, calibrate: bool) -> tuple[list[str], versions.VersionFacts]:
    """Build and publish segments, in parallel.

    With `calibrate`, the segments are the whole index: its structure is trained, and the effort of a search is calibrated.

    Returns:
        The segments' ids, in order, and facts for the version's manifest: `index_kind`, `trained_id` and, if calibrated,
        `search`, `calibration` and `bytes_per_vector`.
    """
    if calibrate:
        job = dataclasses.replace(job, trained_id=_train(job, sources))
    failpoints.reach("build.trained")
    units = _units(job, sources)
    directory = filesystem.join(job.build, "segment")
    _forget_vanished(job, directory, units)

    def transform(dataset: ray.data.Dataset) -> ray.data.Dataset:
        import ray.data

        return dataset.map_batches(
            _build_units, batch_size=1, compute=ray.data.TaskPoolStrategy(), num_cpus=1, fn_kwargs={"job": job}
        )

    here = stages.in_process(lambda: functools.partial(_build_units, job=job))
    stages.run_stage(
        "segment",
        directory,
        units,
        here if job.in_process else stages.on_ray_data(transform),
        counted="passages",
        rows_of=lambda unit: sum(source["rows"] for source in unit["sources"]),
    )
    names = [str(unit["segment_id"]) for unit in units]
    facts: versions.VersionFacts = {"index_kind": job.kind, "trained_id": job.trained_id}
    if calibrate:
        facts |= _run(job, _calibrate, job, names)
    failpoints.reach("build.calibrated")
    return names, facts


def _run(job: Job, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function as a Ray task, or in this process."""
    if job.in_process:
        return function(*arguments)
    import ray

    actors.release()
    # The arguments only name files, so the driver never loads vectors.
    return ray.get(ray.remote(num_cpus=1)(function).remote(*arguments))


def _units(job: Job, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Consecutive groups of sources with nearly equal numbers of passages, one per segment."""
    total = sum(source["rows"] for source in sources)
    num_segments = max(1, -(-total // job.settings.index.segment_passages))
    groups: list[list[Source]] = [[] for _ in range(num_segments)]
    first = 0
    for source in sources:
        middle = first + source["rows"] / 2
        groups[min(num_segments - 1, int(middle * num_segments / max(1, total)))].append(source)
        first += source["rows"]
    return [
        {"unit": number, "segment_id": checksums.digest([job.build_id, number]), "sources": group}
        for number, group in enumerate(group for group in groups if group)
    ]


def _forget_vanished(job: Job, directory: str, units: Sequence[dict[str, Any]]) -> None:
    """Forget units that have a marker but whose segment is gone, so that they are built again."""
    finished = stages.finished_units(directory)
    for unit in units:
        url = segments.segment_url(job.workspace, unit["segment_id"])
        if unit["unit"] in finished and not artifacts.is_finished(url):
            stages.forget_unit(directory, unit["unit"])


def trained_url(workspace: str, trained_id: str) -> str:
    """Directory of a trained structure."""
    return filesystem.join(workspace, "index", "trained", trained_id)


def _train(job: Job, sources: Sequence[Source]) -> str:
    """Train the structure and draw the held-out vectors; returns the structure's id, "" if the kind needs none."""
    needs_training = faiss_index.training_sample_size(job.kind, 1) > 0
    trained_id = retention.trained_id(job.build_id) if needs_training else ""
    is_trained = not trained_id or artifacts.is_finished(trained_url(job.workspace, trained_id))
    if not is_trained or not filesystem.exists(filesystem.join(job.build, HELD_OUT)):
        _run(job, _train_task, job, list(sources), trained_id)
    return trained_id


def _train_task(job: Job, sources: list[Source], trained_id: str) -> None:
    num_vectors = sum(source["rows"] for source in sources)
    sample_size = faiss_index.training_sample_size(job.kind, num_vectors)
    random = np.random.default_rng(job.settings.seed)
    held_out = min(search_effort.NUM_QUERIES, num_vectors // 2)
    drawn = random.choice(num_vectors, min(num_vectors, sample_size + held_out), replace=False)
    queries = np.sort(drawn[:held_out])
    # A small corpus has no vectors to spare, so its held-out vectors are used for training too.
    can_spare = len(drawn) - held_out >= min(sample_size, num_vectors // 2)
    sampled = np.sort(drawn[held_out:] if can_spare else drawn)
    with tempfile.TemporaryDirectory(prefix="ragtune-train-") as temporary:
        if trained_id:
            sample = _vectors_at(job, sources, sampled)
            trained = faiss_index.train(job.kind, job.dimension, num_vectors, sample, job.settings.seed)
            url = trained_url(job.workspace, trained_id)
            staging = artifacts.stage(url)
            with filesystem.discarding(staging):
                faiss_index.save(trained, staging / TRAINED)
            artifacts.publish(staging, url, "trained", structure=job.kind, num_vectors=num_vectors)
        saved = Path(temporary) / HELD_OUT
        np.savez(saved, ordinals=queries, queries=_vectors_at(job, sources, queries))
        filesystem.commit_file(saved, filesystem.join(job.build, HELD_OUT))


def _vectors_at(job: Job, sources: Sequence[Source], ordinals: np.ndarray) -> np.ndarray:
    """The vectors at ascending ordinals over all sources, (num_ordinals, dimension)."""
    found = [np.empty((0, job.dimension), dtype=np.float32)]
    first = 0
    for source in sources:
        low, high = np.searchsorted(ordinals, [first, first + source["rows"]])
        if high > low:
            found.append(_vectors(job, source)[ordinals[low:high] - first])
        first += source["rows"]
    return np.concatenate(found)


def _vectors(job: Job, source: Source) -> np.ndarray:
    if "block" in source:
        return embedding.read_vectors(job.build, source["block"])
    segment, alive = _open_source(job, source)
    stored = faiss_index.stored_vectors(segment.part.structure, segment.part.exact)
    return stored if alive is None else stored[alive]


def _open_source(job: Job, source: Source) -> tuple[segments.Segment, np.ndarray | None]:
    entry = versions.Entry(**source["entry"])
    segment = segments.open_segment(job.workspace, entry.segment_id, entry.manifest_sha256)
    return segment, contents.live_mask(job.workspace, entry)


def _rows(job: Job, source: Source) -> tuple[pa.Table, np.ndarray]:
    """The passages of a source, with their documents' fingerprints, and their vectors."""
    if "block" in source:
        return embedding.read_block(job.build, source["block"])
    segment, alive = _open_source(job, source)
    passages = segment.passages.append_column("fingerprint", segment.fingerprints())
    if alive is not None:
        passages = passages.filter(pa.array(alive))
    return passages, _vectors(job, source)


def _build_units(batch: dict[str, np.ndarray], job: Job) -> dict[str, list[str]]:
    return {"summary": [_build_unit(json.loads(unit), job) for unit in batch["unit"]]}


def _build_unit(unit: dict[str, Any], job: Job) -> str:
    tables, parts = zip(*(_rows(job, source) for source in unit["sources"]), strict=True)
    passages, embedded = pa.concat_tables(tables), np.concatenate(parts)
    del tables, parts
    url = segments.segment_url(job.workspace, unit["segment_id"])
    if not artifacts.is_finished(url):
        trained = _structure(job, len(embedded))
        staging = artifacts.stage(url, scratch=filesystem.join(job.build, "staging"))
        columns = passages.select(schema.arrow_schema(schema.Passage).names)
        fingerprints = passages["fingerprint"].combine_chunks()
        with filesystem.discarding(staging):
            segments.write_segment(
                staging, columns, fingerprints, embedded, trained, job.words, titles=job.lexical_titles
            )
        trained_id = job.trained_id if faiss_index.kind_of(trained) == job.kind else ""
        segments.publish_segment(staging, url, passages.num_rows, trained_id)
    files: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="ragtune-segment-") as temporary:
        if filesystem.exists(filesystem.join(job.build, HELD_OUT)) and job.kind not in faiss_index.EXACT_KINDS:
            files["exact.npy"] = Path(temporary) / "exact.npy"
            filesystem.save_array(files["exact.npy"], search_effort.exact_neighbors(_held_out(job)[0], embedded))
        directory = filesystem.join(job.build, "segment")
        return stages.commit_unit(directory, unit["unit"], files, segment_id=unit["segment_id"])


def _structure(job: Job, num_vectors: int) -> Any:
    """The empty structure for a segment of this many vectors."""
    is_exact = num_vectors < SMALL_SEGMENT_PASSAGES and not _is_calibrated_here(job)
    if job.trained_id and not is_exact:
        url = trained_url(job.workspace, job.trained_id)
        return faiss_index.load(artifacts.open_artifact(url, "trained").path / TRAINED)
    kind = "flat" if is_exact else job.kind
    return faiss_index.train(kind, job.dimension, num_vectors, np.empty((0, job.dimension)), job.settings.seed)


def _is_calibrated_here(job: Job) -> bool:
    return filesystem.exists(filesystem.join(job.build, HELD_OUT))


def _held_out(job: Job) -> tuple[np.ndarray, np.ndarray]:
    path = filesystem.local_copy(job.build, [HELD_OUT], checksums.digest(job.build)) / HELD_OUT
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["queries"], arrays["ordinals"]


def _calibrate(job: Job, segment_ids: list[str]) -> versions.VersionFacts:
    queries, ordinals = _held_out(job)
    entries = [versions.entry_of(job.workspace, name) for name in segment_ids]
    parts = [segments.open_segment(job.workspace, each.segment_id, each.manifest_sha256).part for each in entries]
    scores = np.zeros((len(queries), search_effort.CUTOFF + 1), dtype=np.float32)
    if job.kind not in faiss_index.EXACT_KINDS:
        found = [_exact_scores(job, number) for number in range(len(segment_ids))]
        scores = -np.sort(-np.concatenate(found, axis=1), axis=1)[:, : search_effort.CUTOFF + 1]
    held_out = search_effort.HeldOut(queries, ordinals, scores)
    calibrated = search_effort.find_effort(vectors.VectorIndex(parts), held_out, job.settings.index.target_recall)
    files = [segments.read_segment_manifest(job.workspace, name)["files"] for name in segment_ids]
    num_vectors = max(1, sum(entry.num_passages for entry in entries))
    searched = sum(each[segments.STRUCTURE]["bytes"] for each in files)
    exact = sum(each[segments.EXACT]["bytes"] for each in files if segments.EXACT in each)
    return {
        "search": dataclasses.asdict(calibrated.effort),
        "calibration": calibrated.facts(),
        "bytes_per_vector": {
            "searched": round(searched / num_vectors, 1),
            "stored": round((searched + exact) / num_vectors, 1),
        },
    }


def _exact_scores(job: Job, unit: int) -> np.ndarray:
    directory = filesystem.join(job.build, "segment")
    name = Path(stages.unit_file(directory, unit, "exact.npy")).name
    path = filesystem.local_copy(directory, [name], checksums.digest(directory)) / name
    scores: np.ndarray = np.load(path, allow_pickle=False)
    return scores
