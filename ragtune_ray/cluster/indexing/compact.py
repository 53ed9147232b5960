"""Merges small and half-deleted segments of an index into fewer full ones, without embedding anything again.

The next version has the same documents, passages and vectors. Passages that other processes delete from the old segments
meanwhile are deleted from the new ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from ragtune_ray import config, progress
from ragtune_ray.cluster.indexing import pipeline, segmenting, structures
from ragtune_ray.index import contents, versions
from ragtune_ray.storage import checksums, failpoints, filesystem

MIN_DELETED_PASSAGES = 1000
"""Fewer deleted passages than this slow down a search too little to justify writing a new segment."""


def compact_if_needed(settings: config.Config, *, in_process: bool) -> versions.Version | None:
    """Compact if there are many small segments or one with many deleted passages; returns the new version, if any."""
    latest = versions.latest_version(settings.workspace)
    entries = latest.entries if latest else ()
    num_small = sum(_is_small(settings, entry) for entry in entries)
    if num_small <= settings.index.compact_segments and not any(
        _has_many_deletions(settings, entry) for entry in entries
    ):
        return None
    return compact(settings, in_process=in_process)


def _is_small(settings: config.Config, entry: versions.Entry) -> bool:
    return entry.num_live < settings.index.segment_passages / 2


def _has_many_deletions(settings: config.Config, entry: versions.Entry) -> bool:
    share = entry.num_deleted / max(1, entry.num_passages)
    return entry.num_deleted >= MIN_DELETED_PASSAGES and share > settings.index.compact_deleted_share


def compact(settings: config.Config, *, in_process: bool) -> versions.Version | None:
    """Merge the small segments and those with many deleted passages in the latest version.

    Returns:
        The new version; None if there was nothing to merge, or another process changed the merged segments meanwhile.
    """
    latest = versions.latest_version(settings.workspace)
    entries = latest.entries if latest else ()
    chosen = [entry for entry in entries if _is_small(settings, entry) or _has_many_deletions(settings, entry)]
    if latest is None or not chosen or (len(chosen) == 1 and not chosen[0].num_deleted):
        versions.advance_current(settings.workspace)  # a compaction killed after publishing may have skipped this
        progress.say("compact: nothing to merge")
        return None
    failpoints.reach("compact.planned")
    builder = _builder(settings, latest, chosen, in_process=in_process)
    bytes_each = latest.manifest.get("bytes_per_vector", {}).get("stored", 4 * builder.structure.dimension)
    filesystem.require_space(settings.workspace, int(sum(e.num_live for e in chosen) * bytes_each), "compaction")
    with pipeline.session_for(settings, latest, in_process=in_process):
        for entry in chosen:
            builder.add(segmenting.segment_source(entry))
        names = builder.finish()
    failpoints.reach("compact.merged")
    merged = [versions.entry_of(settings.workspace, name) for name in names]
    version, is_new = versions.publish_rebasing(
        settings.workspace, lambda base: _draft(settings.workspace, base, chosen, merged)
    )
    assert version is not None
    filesystem.remove(builder.job.build)
    if not is_new:
        progress.say(f"compact: version {version.name} changed these segments meanwhile; they are left unchanged")
        return None
    progress.say(f"compact: version {version.name}: {len(chosen)} segments merged into {len(merged)}")
    return version


def _builder(
    settings: config.Config, latest: versions.Version, chosen: Sequence[versions.Entry], *, in_process: bool
) -> segmenting.Builder:
    # The id includes the chosen entries, because the settings that choose them may change before a killed compaction resumes.
    merging = [[entry.segment_id, entry.deleted] for entry in chosen]
    build_id = checksums.digest(["compact", latest.content_id, merging, settings.index.segment_passages, settings.seed])
    manifest = latest.manifest
    titles = manifest.get("lexical_titles", False)
    folder = pipeline.directory(settings.workspace, build_id)
    job = segmenting.Job(settings, folder, build_id, versions.words_of(manifest), titles, in_process)
    return segmenting.Builder(
        job,
        structures.Structure(manifest["index_kind"], manifest["encoder"]["dimension"], manifest.get("trained_id", "")),
    )


def _draft(
    workspace: str, base: versions.Version | None, old: Sequence[versions.Entry], new: Sequence[versions.Entry]
) -> versions.Draft | None:
    """The base with the new segments in place of the old ones; None if the base has changed in a way that prevents this."""
    assert base is not None
    now = {entry.segment_id: entry for entry in base.entries}
    if not all(entry.segment_id in now for entry in old):
        return None  # another compaction or a full build replaced these segments first
    if not all(_still_deleted(workspace, entry, now[entry.segment_id]) for entry in old):
        return None  # a rollback restored passages that the new segments lack
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
    kept_facts = {name: value for name, value in base.manifest.items() if name in versions.CORPUS_FACTS}
    facts = cast(versions.VersionFacts, {**kept_facts, "operation": "compact"})
    return versions.Draft(entries, facts, versions.rejects_of(workspace, base))


def _still_deleted(workspace: str, then: versions.Entry, now: versions.Entry) -> bool:
    """Whether all passages that were deleted then are still deleted."""
    before = contents.deleted_passages(workspace, then)
    return bool(np.isin(before, contents.deleted_passages(workspace, now)).all())


def _deleted_since(workspace: str, then: versions.Entry, now: versions.Entry) -> np.ndarray:
    """For each passage that was alive then, in order: whether it has been deleted since; bool (num_live,)."""
    alive = np.ones(then.num_passages, dtype=bool)
    alive[contents.deleted_passages(workspace, then)] = False
    dead_now = np.zeros(then.num_passages, dtype=bool)
    dead_now[contents.deleted_passages(workspace, now)] = True
    changed: np.ndarray = dead_now[alive]
    return changed
