"""Ray Data: documents -> passages -> embeddings -> segments, the pipeline that indexing and upserting share.

In: a plan of the input, and the version whose documents need no work. Out: published segments of what is new, and what was read.
Three stages, each resumable unit by unit, so that a killed worker or driver costs only what was under way:

    read     one unit per stretch of input: documents are read, cleaned and cut into passages
    embed    one unit per `encoder.unit_passages`, in a pool of encoder actors
    segment  one unit per `index.segment_passages`: FAISS and BM25 are built, the segment is published

This module knows nothing of versions being published: its callers do that.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import session
from ragtune_ray.cluster.indexing import embedding, reading, segmenting
from ragtune_ray.index import faiss_index, versions
from ragtune_ray.ingest import input_units
from ragtune_ray.models import weights
from ragtune_ray.storage import failpoints, filesystem

__all__ = [
    "Built",
    "CorpusError",
    "OvertakenError",
    "again_if_overtaken",
    "build",
    "directory",
    "overtaken_by",
    "runs_in_process",
    "segment_settings",
    "session_for",
]

MAX_OVERTAKEN = 3
"""A command that other publishers overtake so often gives up."""
IN_PROCESS_BYTES = 512 * 2**10
"""Input up to here is indexed in this process: Ray would take longer to start than that takes."""

Result = TypeVar("Result")


class CorpusError(RagtuneError, ValueError):
    """The corpus cannot be indexed as it is; the message names the document or the reject and the next step."""


class OvertakenError(RagtuneError, RuntimeError):
    """While documents were read, another publisher changed some that the build took as they were; the next step is named."""


@dataclass(frozen=True, slots=True)
class Built:
    """What a run of the pipeline left."""

    entries: tuple[versions.Entry, ...]
    """Published segments of what is new."""
    parts: reading.Parts
    rejects: list[schema.Reject]
    num_passages: int
    """That were embedded."""
    facts: versions.VersionFacts
    """For the version's manifest."""
    seconds: dict[str, float] = field(default_factory=dict)

    def counted_rejects(self) -> dict[str, int]:
        """Rejects by kind."""
        return dict(sorted(Counter(reject.kind for reject in self.rejects).items()))


def segment_settings(settings: config.Config) -> list[Any]:
    """What decides, beside the input and the recipe, which passages a segment of a build holds: part of the build's id.

    Units and segments that stand are never made again, so a build that would cut them differently must have another id.
    """
    return [settings.index.model_dump(mode="json"), settings.encoder.unit_passages, settings.seed]


def runs_in_process(settings: config.Config, plan: input_units.Plan) -> bool:
    """Whether so little is to be read that starting Ray would take longer."""
    connected = settings.cluster.address or os.environ.get("RAY_ADDRESS")
    return not connected and sum(file.size_bytes for file in plan.files) <= IN_PROCESS_BYTES


@contextlib.contextmanager
def session_for(settings: config.Config, *, in_process: bool) -> Iterator[None]:
    """Ray for the duration of the block, or nothing."""
    with contextlib.nullcontext() if in_process else session.ray_session(settings.cluster):
        yield


def build(
    settings: config.Config,
    plan: input_units.Plan,
    encoder: weights.Model,
    base: versions.Version | None,
    build_id: str,
    *,
    in_process: bool = False,
) -> Built:
    """Read the input, and embed and index what the base does not hold.

    Args:
        settings: workspace, corpus, chunking, encoder, index, cluster and seed are used.
        plan: of the input.
        encoder: that the config names.
        base: its documents are kept; None: all are new, and the structure is trained.
        build_id: names the segments; the same for the same input, settings and base.
        in_process: without Ray.

    Raises:
        reading.DuplicateError: two documents share an id.
        CorpusError: `corpus.strict` met a reject.
        stages.StageError: a stage failed.
        filesystem.SpaceError: the disk cannot hold what is about to be written.
    """
    place = directory(settings.workspace, build_id)
    seconds: dict[str, float] = {}
    filesystem.require_space(settings.workspace, 2 * sum(file.size_bytes for file in plan.files), "the passages")
    base_name = base.name if base else ""
    parts = _timed(seconds, "read", lambda: reading.read_stage(settings, plan, place, base_name, in_process=in_process))
    failpoints.reach("build.read")
    blocks = _timed(seconds, "embed", lambda: embedding.embed_stage(settings, place, parts, in_process=in_process))
    failpoints.reach("build.embedded")
    rejects = [*parts.rejects, *(schema.Reject(**reject) for block in blocks for reject in block["rejects"])]
    if rejects and settings.corpus.strict:
        raise CorpusError(
            f"corpus.strict: {len(rejects)} inputs were rejected; the first: {rejects[0].place}: {rejects[0].reason}"
        )
    sources = segmenting.blocks_as_sources(blocks)
    num_passages = sum(source["rows"] for source in sources)
    facts: versions.VersionFacts = {"recipe": versions.recipe(settings, encoder), "language": settings.index.language}
    if blocks:
        facts["encoder"] = {
            "model": settings.encoder.model,
            "fingerprint": blocks[0]["encoder"],
            "dimension": blocks[0]["dimension"],
        }
        facts["encoding"] = {
            "workers": 1 if in_process else embedding.num_workers(settings, len(blocks)),
            "busy_seconds": round(sum(block["seconds"] for block in blocks), 3),
        }
    if not sources:
        return Built((), parts, rejects, 0, facts, seconds)
    job = _job(settings, place, build_id, base, blocks[0]["dimension"], num_passages, in_process=in_process)
    stored_bytes = num_passages * faiss_index.footprint(job.kind, job.dimension).disk_bytes
    text_bytes = sum(file.size_bytes for file in plan.files)
    filesystem.require_space(settings.workspace, int(stored_bytes + 2 * text_bytes), "the segments")
    names, found = _timed(seconds, "segment", lambda: segmenting.build_segments(job, sources, calibrate=base is None))
    entries = tuple(versions.entry_of(settings.workspace, name) for name in names)
    return Built(entries, parts, rejects, num_passages, facts | (found if base is None else {}), seconds)


def overtaken_by(version: versions.Version) -> OvertakenError:
    """What is raised where a version that another publisher made is not as the build took it to be."""
    return OvertakenError(
        f"version {version.name} changed documents meanwhile that were taken as known; run the command again"
    )


def again_if_overtaken(verb: str, work: Callable[[], Result]) -> Result:
    """Do work that builds on the latest version and publishes, and again on a later version where it is overtaken.

    Args:
        verb: for people, such as "upsert".
        work: begins with the latest version.

    Returns:
        What `work` gave.

    Raises:
        OvertakenError: it was overtaken every time.
    """
    for _ in range(MAX_OVERTAKEN - 1):
        try:
            return work()
        except OvertakenError as error:
            progress.say(f"{verb}: {str(error).partition('; run')[0]}; they are compared again")
    return work()


def directory(workspace: str, build_id: str) -> str:
    """Where a build keeps its finished units until its version is published."""
    return filesystem.join(workspace, "index", "building", build_id)


def _job(
    settings: config.Config,
    place: str,
    build_id: str,
    base: versions.Version | None,
    dimension: int,
    num_passages: int,
    *,
    in_process: bool,
) -> segmenting.Job:
    """What is built on top of a version has its kind and its trained structure."""
    chosen = settings.index
    kind = faiss_index.choose_kind(chosen.kind, num_passages, dimension, chosen.memory_bytes)
    return segmenting.Job(
        workspace=settings.workspace,
        build=place,
        build_id=build_id,
        kind=base.manifest["index_kind"] if base else kind,
        dimension=dimension,
        language=chosen.language,
        segment_passages=chosen.segment_passages,
        target_recall=chosen.target_recall,
        seed=settings.seed,
        trained_id=base.manifest.get("trained_id", "") if base else "",
        in_process=in_process,
    )


def _timed(seconds: dict[str, float], name: str, work: Callable[[], Result]) -> Result:
    started = time.monotonic()
    result = work()
    seconds[name] = round(time.monotonic() - started, 3)
    return result
