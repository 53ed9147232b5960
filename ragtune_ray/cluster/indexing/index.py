"""Ray Data: a corpus -> an index version that holds exactly its documents.

In: a config that names a corpus and an encoder. Out: a new version of the workspace's index, unless one holds this already. Only
documents that the latest version does not hold are chunked and embedded; what is gone from the corpus, or changed, is deleted
there. An interrupted build ends with the same segments as an undisturbed one: units depend on the input, the config and the
version they build on, never on workers or time.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster.indexing import compact, pipeline
from ragtune_ray.cluster.indexing.pipeline import Built, CorpusError
from ragtune_ray.index import contents, retention, segments, versions
from ragtune_ray.index.plan import outcome_line, planned_for
from ragtune_ray.ingest import input_units
from ragtune_ray.models import weights
from ragtune_ray.storage import checksums, failpoints, filesystem

__all__ = ["CorpusError", "build_index"]


def build_index(settings: config.Config) -> Path | str:
    """Make the index hold exactly the documents of the corpus: publish a new version, or return the one that does.

    Args:
        settings: workspace, corpus, chunking, encoder, index, cluster and seed are used.

    Returns:
        The version's directory.

    Raises:
        inputs.InputError: the corpus cannot be read at all.
        CorpusError: `corpus.strict` met a reject, or nothing was left to index.
        reading.DuplicateError: two documents share an id.
        models.ModelError: the encoder cannot be had.
        stages.StageError: a stage failed.
        versions.ConflictError: other publishers were quicker every time.
        building.OvertakenError: each of them changed documents that were taken as known.
    """
    if not settings.corpus.path:
        raise config.ConfigError("corpus.path is empty; name a folder or file of documents")
    started = time.monotonic()
    plan = input_units.plan_units(settings.corpus.path, settings.corpus.unit_bytes)
    encoder = weights.resolve(settings.encoder.model)
    name = pipeline.again_if_overtaken("index", lambda: _build(settings, plan, encoder, started))
    return versions.version_url(settings.workspace, name)


def _build(settings: config.Config, plan: input_units.Plan, encoder: weights.Model, started: float) -> str:
    base = versions.latest_version(settings.workspace)
    wanted = versions.recipe(settings, encoder)
    corpus_id = versions.corpus_id(settings, plan, encoder)
    published = _published(settings, base, corpus_id)
    if published is not None:
        progress.say(f"index: version {published} already holds this corpus; nothing to do")
        return published
    if base is not None and not _can_keep(settings, base, wanted):
        progress.say("index: chunking, encoder, kind or format have changed: every document is indexed anew")
        base = None
    build_id = checksums.digest([corpus_id, pipeline.segment_settings(settings), base.content_id if base else ""])
    held = retention.held(settings.workspace, base.name if base else "")
    with held, pipeline.session_for(settings, in_process=False):
        built = pipeline.build(settings, plan, encoder, base, build_id)
        if not built.num_passages and not _holds_any(built):
            first = f"; the first: {built.rejects[0].place}: {built.rejects[0].reason}" if built.rejects else ""
            raise CorpusError(
                f"{settings.corpus.path}: nothing was left to index, {len(built.rejects)} inputs were rejected{first}"
            )
        planned = planned_for(settings.workspace, versions.planned_corpus_id(settings, plan, encoder))
        # None too is written: else the plan of an earlier corpus would be inherited.
        facts: versions.VersionFacts = {
            **_facts(settings, plan, built, corpus_id, build_id, started),
            "planned": planned,
        }
        version, _ = versions.publish_rebasing(
            settings.workspace,
            lambda latest: _draft(settings, latest, base, built, facts),
        )
        assert version is not None
        filesystem.remove(pipeline.directory(settings.workspace, build_id))
        failpoints.reach("build.cleaned")
        _summarize(version, built)
        if planned:
            progress.say(outcome_line(planned, version.manifest, built.num_passages))
        compacted = compact.compact_if_needed(settings, in_process=False)
    return compacted.name if compacted else version.name


def _published(settings: config.Config, base: versions.Version | None, corpus_id: str) -> str | None:
    """The latest version if it holds this corpus; else, if an earlier one does, its content published again; else None.

    Raises:
        CorpusError: `corpus.strict`, and rejects were counted when that version was made.
    """
    if base is None:
        return None
    if base.manifest.get("corpus_id") == corpus_id:
        _refuse_rejects(settings, base)
        versions.advance_current(settings.workspace)
        return base.name
    for name in reversed(versions.list_versions(settings.workspace)):
        earlier = versions.read_version(settings.workspace, name)
        if earlier.manifest.get("corpus_id") == corpus_id:
            _refuse_rejects(settings, earlier)
            return versions.roll_back(settings.workspace, name).name
    return None


def _refuse_rejects(settings: config.Config, version: versions.Version) -> None:
    counted = version.manifest.get("num_rejects", {})
    if counted and settings.corpus.strict:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in counted.items())
        raise CorpusError(
            f"corpus.strict: {sum(counted.values()):,} inputs were rejected when this corpus was read for index version "
            f"{version.name} ({kinds}); the rejects.jsonl of the version that read it names them: mend them, or set "
            "corpus.strict=false"
        )


def _can_keep(settings: config.Config, base: versions.Version, wanted: str) -> bool:
    """Whether the documents of a version can be taken over as they are."""
    same_kind = settings.index.kind in {"auto", base.manifest["index_kind"]}
    return base.manifest.get("recipe") == wanted and same_kind


def _holds_any(built: Built) -> bool:
    return any(built.parts.documents["is_known"].to_pylist())


def _facts(
    settings: config.Config, plan: input_units.Plan, built: Built, corpus_id: str, build_id: str, started: float
) -> versions.VersionFacts:
    return {
        **built.facts,
        "operation": "index",
        "corpus_id": corpus_id,
        "build_id": build_id,
        "config": settings.model_dump(mode="json"),
        "input": {"num_files": len(plan.files), "fingerprint": input_units.input_fingerprint(plan)},
        "num_documents": built.parts.documents.num_rows,
        "num_rejects": built.counted_rejects(),
        "seconds": {**built.seconds, "total": round(time.monotonic() - started, 3)},
    }


def _draft(
    settings: config.Config,
    latest: versions.Version | None,
    base: versions.Version | None,
    built: Built,
    facts: versions.VersionFacts,
) -> versions.Draft:
    """The latest version without what is not in the corpus, and the segments of what is new.

    Raises:
        building.OvertakenError: documents that were taken as known are not there any more.
    """
    files = {"rejects.jsonl": schema.reject_lines(built.rejects)}
    documents = built.parts.documents
    new_ids = set(documents.filter(pc.invert(documents["is_known"]))["document_id"].to_pylist())
    if base is None:
        change = {"added": len(new_ids), "changed": 0, "removed": 0, "unchanged": 0}
        return versions.Draft(built.entries, {**facts, "change": change}, files)
    assert latest is not None
    known = documents.filter(documents["is_known"])["fingerprint"].to_pylist()
    wanted = np.sort(np.array(known, dtype=f"S{segments.FINGERPRINT_BYTES}"))
    kept: list[versions.Entry] = []
    seen: set[bytes] = set()
    gone: set[str] = set()
    for entry, rows, alive in contents.live_documents(settings.workspace, latest):
        fingerprints = rows.fingerprints()[alive]
        stays = np.isin(fingerprints, wanted)
        seen.update(fingerprints[stays].tolist())
        gone.update(rows.table["document_id"].take(pa.array(alive[~stays])).to_pylist())
        kept.append(contents.delete_passages(settings.workspace, entry, rows.passages(alive[~stays])))
    failpoints.reach("delete.tombstones")
    if len(seen) < len(np.unique(wanted)) or latest.manifest.get("recipe") != facts["recipe"]:
        raise pipeline.overtaken_by(latest)
    change = {
        "added": len(new_ids - gone),
        "changed": len(new_ids & gone),
        "removed": len(gone - new_ids),
        "unchanged": len(known),
    }
    return versions.Draft((*kept, *built.entries), {**facts, "change": change}, files)


def _summarize(version: versions.Version, built: Built) -> None:
    manifest = version.manifest
    change = {name: count for name, count in manifest["change"].items() if count}
    rejected = f", {len(built.rejects):,} rejected (rejects.jsonl)" if built.rejects else ""
    progress.say(
        f"index: version {version.name}: {manifest['num_documents']:,} documents, {manifest['num_passages']:,} passages"
        f"{rejected}; documents " + ", ".join(f"{name} {count:,}" for name, count in change.items())
    )
