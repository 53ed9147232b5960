"""Ray Data: many small or half-empty segments -> few full ones; nothing is embedded again.

In: the latest version of an index. Out: the next one, with the same documents, passages and vectors in fewer segments. What
others publish meanwhile is kept: passages that were deleted in the old segments are deleted in the new ones too. This module
knows nothing of documents' sources or encoders.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ragtune_ray import config, progress
from ragtune_ray.cluster.indexing import pipeline, segmenting
from ragtune_ray.index import contents, retention, versions
from ragtune_ray.storage import checksums, failpoints, filesystem

__all__ = ["compact", "compact_if_needed"]

HOLLOW_MIN_PASSAGES = 1000
"""Fewer deleted passages than this cost a search nothing that would be worth writing a segment for."""


def compact_if_needed(settings: config.Config, *, in_process: bool) -> versions.Version | None:
    """Compact if small segments have piled up or much is deleted; the new version, None if nothing was done."""
    latest = versions.latest_version(settings.workspace)
    if latest is None or not _needs_it(settings, latest):
        return None
    return compact(settings, in_process=in_process)


def _is_small(settings: config.Config, entry: versions.Entry) -> bool:
    return entry.num_live < settings.index.segment_passages / 2


def _is_hollow(settings: config.Config, entry: versions.Entry) -> bool:
    share = entry.num_deleted / max(1, entry.num_passages)
    return entry.num_deleted >= HOLLOW_MIN_PASSAGES and share > settings.index.compact_deleted_share


def _needs_it(settings: config.Config, version: versions.Version) -> bool:
    small = sum(_is_small(settings, entry) for entry in version.entries)
    return small > settings.index.compact_segments or any(_is_hollow(settings, entry) for entry in version.entries)


def compact(settings: config.Config, *, in_process: bool) -> versions.Version | None:
    """Merge the small and the hollow segments of the latest version.

    Returns:
        The new version; None if there was nothing to merge, or another publisher changed what was merged meanwhile.

    Raises:
        storage.ArtifactError: a segment is damaged or of an earlier format.
        stages.StageError: a segment could not be built.
        filesystem.SpaceError: the disk cannot hold the new segments.
    """
    latest = versions.latest_version(settings.workspace)
    chosen = [
        entry
        for entry in (latest.entries if latest else ())
        if _is_small(settings, entry) or _is_hollow(settings, entry)
    ]
    if latest is None or not chosen or (len(chosen) == 1 and not chosen[0].num_deleted):
        versions.advance_current(settings.workspace)  # as one that was killed after it published may not have done
        progress.say("compact: nothing to merge")
        return None
    failpoints.reach("compact.planned")
    # The settings that chose these entries may change before a compaction that was killed is run again.
    merging = [[entry.segment_id, entry.deleted] for entry in chosen]
    build_id = checksums.digest(["compact", latest.content_id, merging, settings.index.segment_passages, settings.seed])
    job = segmenting.Job(
        workspace=settings.workspace,
        build=pipeline.directory(settings.workspace, build_id),
        build_id=build_id,
        kind=latest.manifest["index_kind"],
        dimension=latest.manifest["encoder"]["dimension"],
        language=latest.manifest["language"],
        segment_passages=settings.index.segment_passages,
        target_recall=settings.index.target_recall,
        seed=settings.seed,
        trained_id=latest.manifest.get("trained_id", ""),
        in_process=in_process,
    )
    bytes_each = latest.manifest.get("bytes_per_vector", {}).get("stored", 4 * job.dimension)
    filesystem.require_space(settings.workspace, int(sum(e.num_live for e in chosen) * bytes_each), "compaction")
    with retention.held(settings.workspace, latest.name), pipeline.session_for(settings, in_process=in_process):
        names, _ = segmenting.build_segments(job, segmenting.segments_as_sources(chosen), calibrate=False)
    failpoints.reach("compact.merged")
    merged = [versions.entry_of(settings.workspace, name) for name in names]
    version, is_new = versions.publish_rebasing(
        settings.workspace, lambda base: _draft(settings.workspace, base, chosen, merged)
    )
    assert version is not None
    filesystem.remove(job.build)
    if not is_new:
        progress.say(f"compact: version {version.name} changed these segments meanwhile; they are left as they are")
        return None
    progress.say(f"compact: version {version.name}: {len(chosen)} segments merged into {len(merged)}")
    return version


def _draft(
    workspace: str, base: versions.Version | None, old: Sequence[versions.Entry], new: Sequence[versions.Entry]
) -> versions.Draft | None:
    """The base with the new segments in place of the old ones.

    None if it does not have all of the old ones any more, or has passages of them that were deleted when they were merged.
    """
    assert base is not None
    now = {entry.segment_id: entry for entry in base.entries}
    if not all(entry.segment_id in now for entry in old):
        return None  # another compaction, or a whole new build, was quicker: these segments are no longer wanted
    if not all(_still_deleted(workspace, entry, now[entry.segment_id]) for entry in old):
        return None  # a rollback restored passages that the new segments were built without
    changed = np.concatenate([_deleted_since(workspace, entry, now[entry.segment_id]) for entry in old])
    doomed = np.flatnonzero(changed)
    edges = np.cumsum([0, *(entry.num_passages for entry in new)])
    replaced = [
        contents.delete_passages(workspace, entry, doomed[(doomed >= first) & (doomed < last)] - first)
        for entry, first, last in zip(new, edges[:-1], edges[1:], strict=True)
    ]
    names = {entry.segment_id for entry in old}
    place = next(number for number, entry in enumerate(base.entries) if entry.segment_id in names)
    kept = [entry for entry in base.entries if entry.segment_id not in names]
    before = sum(entry.segment_id not in names for entry in base.entries[:place])
    entries = (*kept[:before], *replaced, *kept[before:])
    facts: versions.VersionFacts = {"operation": "compact"}
    if "corpus_id" in base.manifest:
        facts["corpus_id"] = base.manifest["corpus_id"]
    if "num_rejects" in base.manifest:
        facts["num_rejects"] = base.manifest["num_rejects"]
    return versions.Draft(entries, facts)


def _still_deleted(workspace: str, then: versions.Entry, now: versions.Entry) -> bool:
    """Whether all passages that were deleted then are so now."""
    before = contents.deleted_passages(workspace, then)
    return bool(np.isin(before, contents.deleted_passages(workspace, now)).all())


def _deleted_since(workspace: str, then: versions.Entry, now: versions.Entry) -> np.ndarray:
    """Of the passages that were alive, in order: which have been deleted since, bool (num_live then,)."""
    alive = np.ones(then.num_passages, dtype=bool)
    alive[contents.deleted_passages(workspace, then)] = False
    dead_now = np.zeros(then.num_passages, dtype=bool)
    dead_now[contents.deleted_passages(workspace, now)] = True
    changed: np.ndarray = dead_now[alive]
    return changed
