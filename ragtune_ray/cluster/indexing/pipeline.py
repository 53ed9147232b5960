"""Turns documents into index segments in three stages, each of which can be resumed unit by unit.

    read     one unit per `corpus.unit_bytes`: read and clean documents, cut them into passages
    embed    one unit per `encoder.unit_passages`: embed them in a pool of encoder actors
    segment  one unit per `index.segment_passages`: build FAISS and BM25, publish the segment

If a worker or the driver is killed, only its unfinished units are repeated. `change` publishes the version.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import session
from ragtune_ray.cluster.indexing import embedding, reading, segmenting
from ragtune_ray.index import faiss_index, retention, versions, words
from ragtune_ray.ingest import input_units
from ragtune_ray.models import scripts, weights
from ragtune_ray.storage import failpoints, filesystem

IN_PROCESS_BYTES = 512 * 2**10
"""Inputs up to this size are indexed without Ray, because starting it would take longer."""


class CorpusError(RagtuneError, ValueError):
    """The corpus cannot be indexed in its current state; `rejects` has the inputs at fault, if any."""

    def __init__(self, message: str, rejects: Sequence[schema.Reject] = ()) -> None:
        super().__init__(message)
        self.rejects = tuple(rejects)


@dataclass(frozen=True, slots=True)
class Built:
    """The result of the pipeline."""

    entries: tuple[versions.Entry, ...]
    """Published segments of the new passages."""
    parts: reading.Parts
    rejects: list[schema.Reject]
    num_passages: int
    """Number of embedded passages."""
    facts: versions.VersionFacts
    """For the version's manifest."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Per stage."""

    @property
    def num_known(self) -> int:
        """Documents of the input that the base version already contains."""
        return sum(self.parts.documents["is_known"].to_pylist())

    def reject_facts(self) -> versions.VersionFacts:
        """For the version's manifest, the numbers of rejects."""
        return {
            "num_rejects": dict(sorted(Counter(reject.kind for reject in self.rejects).items())),
            "num_transient_rejects": sum(reject.is_transient for reject in self.rejects),
        }


def segment_settings(settings: config.Config) -> list[Any]:
    """The settings, in addition to the recipe, that decide which passages a segment contains.

    They are part of a build's id: finished units are never rebuilt, so a build with other units needs another id.
    """
    return [settings.index.identity(), settings.encoder.unit_passages, settings.seed]


def runs_in_process(settings: config.Config, plan: input_units.Plan) -> bool:
    """Whether the input is at most `IN_PROCESS_BYTES` and no cluster is configured."""
    configured = settings.cluster.address or os.environ.get("RAY_ADDRESS")
    return not configured and plan.size_bytes <= IN_PROCESS_BYTES


@contextlib.contextmanager
def session_for(settings: config.Config, base: versions.Version | None, *, in_process: bool) -> Iterator[None]:
    """Protect the base version from garbage collection and, unless `in_process`, open a Ray session."""
    opened = session.one_thread() if in_process else session.ray_session(settings.cluster)
    with retention.held(settings.workspace, base.name if base else ""), opened:
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
    """Read the input, and embed and index the documents that the base does not contain.

    Without a base, all documents are new, and the FAISS structure is trained. `build_id` names the segments; it is the same for
    the same input, settings and base.

    Raises:
        DuplicateError: two documents share an id.
        CorpusError: `corpus.strict` is set, and there are rejects.
        SpaceError: the disk has too little space.
    """
    folder = directory(settings.workspace, build_id)
    seconds: dict[str, float] = {}
    text_bytes = plan.size_bytes
    filesystem.require_space(settings.workspace, 2 * text_bytes, "the passages")
    base_name = base.name if base else ""
    with _timed(seconds, "read"):
        parts = reading.read_stage(settings, plan, folder, base_name, in_process=in_process)
    failpoints.reach("build.read")
    with _timed(seconds, "embed"):
        blocks = embedding.embed_stage(settings, folder, parts, in_process=in_process)
    failpoints.reach("build.embedded")
    rejects = [*parts.rejects, *(schema.Reject(**reject) for block in blocks for reject in block["rejects"])]
    sources = segmenting.blocks_as_sources(blocks)
    is_refused = bool(rejects) and settings.corpus.strict
    if (is_refused or not sources) and any(reject.is_transient for reject in rejects):
        filesystem.remove(folder)  # the next run reads these files again
    if is_refused:
        raise CorpusError(
            f"corpus.strict: {len(rejects)} inputs were rejected; the first: {rejects[0].place}: {rejects[0].reason}",
            rejects,
        )
    facts = _facts(settings, encoder, blocks, in_process=in_process)
    facts["scripts"] = _scripts(settings, base, blocks)
    if not sources:
        return Built((), parts, rejects, 0, facts, seconds)
    num_passages = sum(source["rows"] for source in sources)
    chosen, dimension = settings.index, blocks[0]["dimension"]
    # A build on a base uses its kind and trained structure, makes words as the base does, and searches titles if it does.
    kind = faiss_index.choose_kind(chosen.kind, num_passages, dimension, chosen.memory_bytes)
    kind, trained_id = (base.manifest["index_kind"], base.manifest.get("trained_id", "")) if base else (kind, "")
    titles = base.manifest.get("lexical_titles", False) if base else chosen.lexical_titles
    facts["lexical_titles"] = titles
    facts["words"] = rules = versions.words_of(base.manifest) if base else words.folded(chosen.language)
    job = segmenting.Job(settings, folder, build_id, kind, dimension, rules, titles, trained_id, in_process)
    stored_bytes = num_passages * faiss_index.footprint(job.kind, job.dimension).disk_bytes
    filesystem.require_space(settings.workspace, int(stored_bytes + 2 * text_bytes), "the segments")
    with _timed(seconds, "segment"):
        names, found = segmenting.build_segments(job, sources, calibrate=base is None)
    entries = tuple(versions.entry_of(settings.workspace, name) for name in names)
    return Built(entries, parts, rejects, num_passages, facts | (found if base is None else {}), seconds)


def directory(workspace: str, build_id: str) -> str:
    """Where a build keeps its finished units until its version is published."""
    return filesystem.join(workspace, "index", "building", build_id)


def _facts(
    settings: config.Config, encoder: weights.Model, blocks: list[dict[str, Any]], *, in_process: bool
) -> versions.VersionFacts:
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
    return facts


def _scripts(
    settings: config.Config, base: versions.Version | None, blocks: list[dict[str, Any]]
) -> dict[str, scripts.ScriptFacts]:
    """What the probes of this build and of its base found; says which scripts the encoder does not know."""
    before = base.manifest.get("scripts", {}) if base else {}
    found = scripts.add_facts([before, *(block.get("scripts", {}) for block in blocks)])
    for name in sorted(scripts.unknown_scripts(found) - scripts.unknown_scripts(before)):
        progress.say(
            f"index: {settings.encoder.model} does not know the script {name}: given one sentence, it finds the passage in "
            f"{found[name]['found']} of {found[name]['passages']} cases; for questions in this script, hybrid retrieval gives "
            f"BM25 the weight {settings.retrieval.unknown_script_weight} (retrieval.unknown_script_weight)"
        )
    return found


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 3)
