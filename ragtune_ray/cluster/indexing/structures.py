"""Trains the FAISS structure that the segments of an index share, and calibrates the effort of its searches."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragtune_ray.cluster.indexing import sampling
from ragtune_ray.index import faiss_index, search_effort, segments, versions
from ragtune_ray.storage import artifacts, filesystem

TRAINED = "structure.faiss"


@dataclass(frozen=True, slots=True)
class Structure:
    """What the segments of a build have in common."""

    kind: faiss_index.ConcreteKind
    """Kind of the whole index."""
    dimension: int
    trained_id: str = ""
    """The trained structure; "" if the kind needs none."""
    held_out: str = ""
    """Names the held-out vectors; "" if the index is not calibrated."""

    def identity(self) -> list[str]:
        """What distinguishes segments of the same passages, as JSON values."""
        return [self.kind, self.trained_id, self.held_out]


def trained_url(workspace: str, trained_id: str) -> str:
    """Directory of a trained structure."""
    return filesystem.join(workspace, "index", "trained", trained_id)


def held_out_url(build: str, name: str) -> str:
    """File of held-out vectors; garbage collection keeps a trained structure while a build has the file of its name."""
    return filesystem.join(build, f"held-out-{name}.npz")


def efforts_url(build: str, segment_id: str) -> str:
    """File of the measured search efforts of a segment."""
    return filesystem.join(build, "segment", f"{segment_id}.efforts.npz")


def train(
    workspace: str,
    build: str,
    name: str,
    training: Sequence[tuple[str, int]],
    structure: Structure,
    num_vectors: int,
    seed: int,
) -> None:
    """Train and publish a structure, if its kind needs that, and store held-out vectors.

    Args:
        workspace: of the index.
        build: directory of the build.
        name: of the held-out vectors, and of the structure.
        training: key and number of sampled rows of each unit that trains.
        structure: to train.
        num_vectors: expected in the whole index.
        seed: of the draws and of k-means.
    """
    url = trained_url(workspace, structure.trained_id) if structure.trained_id else ""
    held_out = held_out_url(build, name)
    if filesystem.exists(held_out) and (not url or artifacts.is_finished(url)):
        return
    drawn = sampling.draw(build, training, structure.kind, num_vectors, seed)
    if url and not artifacts.is_finished(url):
        trained = faiss_index.train(structure.kind, structure.dimension, num_vectors, drawn.sample, seed)
        staging = artifacts.stage(url)
        with filesystem.discarding(staging):
            faiss_index.save(trained, staging / TRAINED)
        artifacts.publish(staging, url, "trained", structure=structure.kind, num_vectors=num_vectors)
    with tempfile.TemporaryDirectory(prefix="ragtune-train-") as temporary:
        saved = Path(temporary) / "held-out.npz"
        sampling.HeldOut(drawn.queries, drawn.keys, drawn.rows).save(saved)
        filesystem.commit_file(saved, held_out)


def load_trained(workspace: str, trained_id: str) -> Any:
    """The trained, empty structure."""
    return faiss_index.load(artifacts.open_artifact(trained_url(workspace, trained_id), "trained").path / TRAINED)


@functools.lru_cache(maxsize=1)
def load_held_out(build: str, name: str) -> sampling.HeldOut:
    """The held-out vectors; kept, because the tasks of a build share a process."""
    with filesystem.fetched(held_out_url(build, name)) as path:
        return sampling.HeldOut.load(path)


def calibrate(workspace: str, build: str, segment_ids: Sequence[str], target_recall: float) -> versions.VersionFacts:
    """The facts about the effort of a search, from what was measured in each segment; opens no segment."""

    def efforts() -> Iterator[search_effort.PartEfforts]:
        for name in segment_ids:
            with filesystem.fetched(efforts_url(build, name)) as path:
                yield search_effort.PartEfforts.load(path)

    calibrated = search_effort.choose_effort(efforts(), target_recall)
    manifests = [segments.read_segment_manifest(workspace, name) for name in segment_ids]
    num_vectors = max(1, sum(manifest["num_passages"] for manifest in manifests))
    searched = sum(manifest["files"][segments.STRUCTURE]["bytes"] for manifest in manifests)
    exact = sum(
        manifest["files"][segments.EXACT]["bytes"] for manifest in manifests if segments.EXACT in manifest["files"]
    )
    return {
        "search": dataclasses.asdict(calibrated.effort),
        "calibration": calibrated.facts(),
        "bytes_per_vector": {
            "searched": round(searched / num_vectors, 1),
            "stored": round((searched + exact) / num_vectors, 1),
        },
    }
