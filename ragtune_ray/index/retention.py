"""Removes old index versions and everything that no version, reader or resumable build needs.

A job protects the version it reads with a small file in `index/readers/`, which is valid as long as the job's process
exists or, if that process runs on another machine, for a day.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ragtune_ray.index import segments, versions
from ragtune_ray.storage import artifacts, failpoints, filesystem

HOLD_SECONDS = 24 * 3600
"""How long a job on another machine protects its version if it is killed before it removes its file."""

STAGED = tuple(
    f"{place}/.staging-*"
    for place in ("index/*", "runs", "models/*", "calibrations/*", "rounds/*/*/index/*", "rounds/*/*/runs")
)
"""Staging directories of unpublished artifacts, below a workspace."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed."""

    versions: tuple[str, ...]
    num_segments: int
    num_other: int
    """Deletions, trained structures, staging directories, and abandoned builds, runs, trainings and tunes."""


@contextlib.contextmanager
def held(workspace: str, version: str) -> Iterator[None]:
    """Protect a version from removal while the block runs; "" protects nothing."""
    if not version:
        yield
        return
    url = filesystem.join(workspace, "index", "readers", f"{version}-{uuid.uuid4().hex[:12]}.json")
    reader = {"version": version, "host": platform.node(), "process": os.getpid(), "since": time.time()}
    filesystem.replace_text(url, json.dumps(reader))
    try:
        yield
    finally:
        filesystem.remove(url)


def collect(workspace: str, keep: int, min_age_seconds: float) -> Removed:
    """Remove all but the newest versions, and everything that is no longer needed.

    Args:
        workspace: the index's workspace.
        keep: number of newest versions to keep, at least 1; the current one and those being read are kept too.
        min_age_seconds: keep unfinished work that changed more recently than this; it may still be running.

    Raises:
        ArtifactError: the workspace has no index.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; it must be at least 1")
    current = versions.current_version(workspace)
    names = versions.list_versions(workspace)
    kept = {*names[-keep:], current, *_versions_in_use(workspace)}
    failpoints.reach("gc.planned")
    doomed = tuple(name for name in names if name not in kept)
    for name in doomed:
        # Remove the manifest first, so that a partly removed version does not look finished.
        filesystem.remove(filesystem.join(versions.version_url(workspace, name), artifacts.MANIFEST))
        failpoints.reach("gc.version")
        filesystem.remove(versions.version_url(workspace, name))
    other = _remove_abandoned(workspace, min_age_seconds) + _remove_partial(workspace, names[-1], min_age_seconds)
    # Builds before versions: one that publishes in between is then among the versions, which are listed again.
    building = _segments_of_builds(workspace)
    opened = [versions.read_version(workspace, name) for name in versions.list_versions(workspace)]
    needed = {entry.segment_id for version in opened for entry in version.entries} | building
    num_segments = 0
    for name in filesystem.list_names(filesystem.join(workspace, "index", "segments")):
        url = segments.segment_url(workspace, name)
        if name not in needed and _is_old(url, min_age_seconds):
            filesystem.remove(filesystem.join(url, artifacts.MANIFEST))
            failpoints.reach("gc.segment")
            filesystem.remove(url)
            num_segments += 1
    other += _remove_unnamed(workspace, opened, min_age_seconds)
    other += versions.forget_corpora(workspace, {version.manifest.get("corpus_id") for version in opened})
    failpoints.reach("gc.rest")
    return Removed(doomed, num_segments, other + _remove_staging(workspace, min_age_seconds))


def _versions_in_use(workspace: str) -> set[str]:
    """Return the versions that running jobs read; remove the files of jobs that ended."""
    found: set[str] = set()
    folder = filesystem.join(workspace, "index", "readers")
    for name in filesystem.list_names(folder):
        try:
            reader = json.loads(filesystem.read_text(filesystem.join(folder, name)))
            is_here = reader["host"] == platform.node()
            alive = psutil.pid_exists(reader["process"]) if is_here else time.time() - reader["since"] < HOLD_SECONDS
            version = str(reader["version"])
        except FileNotFoundError:
            continue  # the job has just ended
        except (ValueError, KeyError, TypeError):
            logger.warning("%s/%s is damaged and is removed", folder, name)
            alive, version = False, ""
        if alive:
            found.add(version)
        else:
            filesystem.remove(filesystem.join(folder, name))
    return found


def _is_old(url: str, min_age_seconds: float) -> bool:
    changed = filesystem.last_change(url)
    return changed is None or time.time() - changed >= min_age_seconds


def _remove_partial(workspace: str, newest: str, min_age_seconds: float) -> int:
    """Remove versions whose manifest alone was removed by a killed process."""
    folder = filesystem.join(workspace, "index", "versions")
    urls = [versions.version_url(workspace, name) for name in filesystem.list_names(folder) if name < newest]
    partial = [url for url in urls if not filesystem.exists(filesystem.join(url, artifacts.MANIFEST))]
    old = [url for url in partial if _is_old(url, min_age_seconds)]
    for url in old:
        filesystem.remove(url)
    return len(old)


def _remove_abandoned(workspace: str, min_age_seconds: float) -> int:
    """Remove unfinished builds, runs, trainings and tunes that have not changed recently.

    The rounds of a finished tune are kept, because their models may be in use.
    """
    unfinished = [
        filesystem.join(workspace, *place, name)
        for place in (("index", "building"), ("runs", ".work"), ("models", ".work"))
        for name in filesystem.list_names(filesystem.join(workspace, *place))
    ]
    old = [url for url in unfinished if _is_old(url, min_age_seconds)]
    if any(_is_work(url) for url in unfinished if url not in old):
        # A running job needs the questions that it wrote when it started.
        old = [url for url in old if not _is_questions(url)]
    if old == unfinished:  # a tune's own files do not change while it trains a model
        for name in filesystem.list_names(filesystem.join(workspace, "rounds")):
            mode, _, identity = name.rpartition("-")
            url = filesystem.join(workspace, "rounds", name)
            model = filesystem.join(workspace, "models", mode, identity)
            if _is_old(url, min_age_seconds) and not artifacts.is_finished(model):
                old.append(url)
    for url in old:
        filesystem.remove(url)
    return len(old)


def _is_work(url: str) -> bool:
    return "/runs/.work/" in url and not _is_questions(url)


def _is_questions(url: str) -> bool:
    return url.rpartition("/")[2].startswith("queries-")


def _segments_of_builds(workspace: str) -> set[str]:
    """Return the finished segments of builds that can be resumed."""
    folder = filesystem.join(workspace, "index", "building")
    found: set[str] = set()
    for build in filesystem.list_names(folder):
        stage = filesystem.join(folder, build, "segment")
        found.update(name.removesuffix(".json") for name in filesystem.list_names(stage) if name.endswith(".json"))
    return found


def _structures_of_builds(workspace: str) -> set[str]:
    """Return the structures of builds that can be resumed; each is named as the file of its held-out vectors."""
    folder = filesystem.join(workspace, "index", "building")
    names = (name for build in filesystem.list_names(folder) for name in filesystem.list_names(f"{folder}/{build}"))
    return {found[1] for name in names if (found := re.fullmatch(r"held-out-(.+)\.npz", name))}


def _remove_unnamed(workspace: str, opened: list[versions.Version], min_age_seconds: float) -> int:
    """Remove deletions and trained structures that no version names."""
    named = {
        "deleted": {entry.deleted for version in opened for entry in version.entries},
        "trained": {version.manifest.get("trained_id", "") for version in opened} | _structures_of_builds(workspace),
    }
    num_removed = 0
    for kind, needed in named.items():
        folder = filesystem.join(workspace, "index", kind)
        for name in filesystem.list_names(folder):
            url = filesystem.join(folder, name)
            if name not in needed and _is_old(url, min_age_seconds):
                filesystem.remove(url)
                num_removed += 1
    return num_removed


def _remove_staging(workspace: str, min_age_seconds: float) -> int:
    """Remove staging directories of killed processes, in the workspace and in this machine's temporary directory."""
    if not filesystem.is_local(workspace):
        return 0
    left = [path for pattern in STAGED for path in Path(workspace).glob(pattern)]
    temporary = Path(tempfile.gettempdir())
    left += [path for kind in ("staging", "checkpoint") for path in temporary.glob(f"ragtune-{kind}-*")]
    old = [path for path in left if _is_old(str(path), min_age_seconds)]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return len(old)
