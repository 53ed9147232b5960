"""What an index still needs, and the rest removed.

In: a workspace. Out: old versions, and segments, deletions, trained structures and leftovers that nothing names, are gone, with
what killed runs, trainings and tunes left half-way.
Nothing is removed that a kept version, a job that reads, or a build that can be resumed needs. This module knows nothing of
Ray.

A job that reads a version holds it by a small file in `index/readers/`, which counts while its process lives or, on another
machine, for a day.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ragtune_ray.index import segments, versions
from ragtune_ray.storage import artifacts, checksums, failpoints, filesystem

__all__ = ["Removed", "collect", "held", "trained_id"]

HOLD_SECONDS = 24 * 3600
"""How long a job of another machine is taken to go on, if it does not say that it has ended."""

STAGED = tuple(
    f"{place}/.staging-*"
    for place in ("index/*", "runs", "models/*", "calibrations/*", "rounds/*/*/index/*", "rounds/*/*/runs")
)
"""Where what is being written stands until it is published, below a workspace."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removed:
    """How much is gone."""

    versions: tuple[str, ...]
    num_segments: int
    num_other: int
    """Deletions, trained structures, staging directories, and builds, runs, trainings and tunes left half-way."""


@contextlib.contextmanager
def held(workspace: str, version: str) -> Iterator[None]:
    """Keep a version from being removed while the block runs; "" holds nothing."""
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
    """Remove all but the newest versions, and whatever nothing needs any more.

    Args:
        workspace: where.
        keep: how many of the newest versions stay, at least 1; the current one and those that are read stay too.
        min_age_seconds: what is unfinished and was touched since then may still be at work.

    Raises:
        ValueError: `keep` is below 1.
        storage.ArtifactError: there is no index.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one version must stay")
    current = versions.current_version(workspace)
    names = versions.list_versions(workspace)
    kept = {*names[-keep:], current, *_read_versions(workspace)}
    failpoints.reach("gc.planned")
    doomed = tuple(name for name in names if name not in kept)
    for name in doomed:
        # The manifest goes first: without it the rest is no version.
        filesystem.remove(filesystem.join(versions.version_url(workspace, name), artifacts.MANIFEST))
        failpoints.reach("gc.version")
        filesystem.remove(versions.version_url(workspace, name))
    other = _remove_abandoned(workspace, min_age_seconds) + _remove_remains(workspace, names[-1], min_age_seconds)
    # Read again: what was published meanwhile is needed too.
    opened = [versions.read_version(workspace, name) for name in versions.list_versions(workspace)]
    building = _segments_of_builds(workspace)
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
    failpoints.reach("gc.rest")
    return Removed(doomed, num_segments, other + _remove_staging(workspace, min_age_seconds))


def _read_versions(workspace: str) -> set[str]:
    """Versions that a living job holds; the files of dead ones are removed."""
    found = set()
    folder = filesystem.join(workspace, "index", "readers")
    for name in filesystem.list_names(folder):
        try:
            reader = json.loads(filesystem.read_text(filesystem.join(folder, name)))
            is_here = reader["host"] == platform.node()
            alive = psutil.pid_exists(reader["process"]) if is_here else time.time() - reader["since"] < HOLD_SECONDS
            version = str(reader["version"])
        except FileNotFoundError:
            continue  # it has ended just now
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


def _remove_remains(workspace: str, newest: str, min_age_seconds: float) -> int:
    """Versions of which a run that was killed removed no more than the manifest."""
    folder = filesystem.join(workspace, "index", "versions")
    urls = [versions.version_url(workspace, name) for name in filesystem.list_names(folder) if name < newest]
    remains = [url for url in urls if not filesystem.exists(filesystem.join(url, artifacts.MANIFEST))]
    old = [url for url in remains if _is_old(url, min_age_seconds)]
    for url in old:
        filesystem.remove(url)
    return len(old)


def _remove_abandoned(workspace: str, min_age_seconds: float) -> int:
    """Builds, runs, trainings and tunes that were left half-way and have not gone on since.

    What is finished stays: a model, and the rounds of a tune whose models may be in use.
    """
    unfinished = [
        filesystem.join(workspace, *place, name)
        for place in (("index", "building"), ("runs", ".work"), ("models", ".work"))
        for name in filesystem.list_names(filesystem.join(workspace, *place))
    ]
    old = [url for url in unfinished if _is_old(url, min_age_seconds)]
    if any(_is_work(url) for url in unfinished if url not in old):
        # A job reads its questions to its end, and writes them at its beginning alone.
        old = [url for url in old if not _is_questions(url)]
    if old == unfinished:  # a tune writes nothing of its own while a model of it trains
        for name in filesystem.list_names(filesystem.join(workspace, "rounds")):
            mode, _, identity = name.rpartition("-")
            url = filesystem.join(workspace, "rounds", name)
            if _is_old(url, min_age_seconds) and not artifacts.is_finished(
                filesystem.join(workspace, "models", mode, identity)
            ):
                old.append(url)
    for url in old:
        filesystem.remove(url)
    return len(old)


def _is_work(url: str) -> bool:
    return "/runs/.work/" in url and not _is_questions(url)


def _is_questions(url: str) -> bool:
    return url.rpartition("/")[2].startswith("queries-")


def _segments_of_builds(workspace: str) -> set[str]:
    """Segments that builds which can be resumed have finished."""
    folder = filesystem.join(workspace, "index", "building")
    found = set()
    for build in filesystem.list_names(folder):
        stage = filesystem.join(folder, build, "segment")
        for name in filesystem.list_names(stage):
            if name.endswith(".json"):
                with contextlib.suppress(ValueError, FileNotFoundError):
                    found.add(str(json.loads(filesystem.read_text(filesystem.join(stage, name))).get("segment_id")))
    return found


def _trained_of_builds(workspace: str) -> set[str]:
    """Trained structures of builds that stand; see `cluster.structures`."""
    builds = filesystem.list_names(filesystem.join(workspace, "index", "building"))
    return {trained_id(build) for build in builds}


def trained_id(build_id: str) -> str:
    """The name of the structure that a build trains."""
    return checksums.digest([build_id, "trained"])


def _remove_unnamed(workspace: str, opened: list[versions.Version], min_age_seconds: float) -> int:
    """Deletions and trained structures that no version names."""
    named = {
        "deleted": {entry.deleted for version in opened for entry in version.entries},
        "trained": {version.manifest.get("trained_id", "") for version in opened} | _trained_of_builds(workspace),
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
    """Staging directories that killed processes left, here and in the temporary directory of this machine."""
    if not filesystem.is_local(workspace):
        return 0
    left = [path for pattern in STAGED for path in Path(workspace).glob(pattern)]
    left += [
        path for kind in ("staging", "checkpoint") for path in Path(tempfile.gettempdir()).glob(f"ragtune-{kind}-*")
    ]
    old = [path for path in left if _is_old(str(path), min_age_seconds)]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return len(old)
