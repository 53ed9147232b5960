"""Every file of a workspace against its checksum.

In: a workspace, or one artifact's directory. Out: what is wrong, one sentence each. This module knows nothing of what the files
mean.
"""

from __future__ import annotations

from ragtune_ray import segments, storage, versions

__all__ = ["verify_artifact", "verify_workspace"]


def verify_artifact(url: str) -> tuple[list[str], int]:
    """What is wrong with one artifact, and that one was checked."""
    return storage.problems(url), 1


def verify_workspace(workspace: str) -> tuple[list[str], int]:
    """What is wrong with the index versions, their segments and the runs of a workspace, and how many were checked.

    Raises:
        storage.ArtifactError: the workspace holds neither an index nor runs.
    """
    found: list[str] = []
    checked = 0
    names = storage.list_names(storage.join(workspace, "index", "versions"))
    if names:
        found += _current_problems(workspace)
    for version in names:
        found += versions.index_problems(workspace, version)
        checked += 1
    for name in storage.list_names(storage.join(workspace, "index", "segments")):
        checked += 1
        found += storage.problems(segments.segment_url(workspace, name))
    for name in storage.list_names(storage.join(workspace, "index", "trained")):
        checked += 1
        found += storage.problems(storage.join(workspace, "index", "trained", name))
    for name in storage.list_names(storage.join(workspace, "runs")):
        checked += 1
        found += storage.problems(storage.join(workspace, "runs", name))
    if not checked:
        raise storage.ArtifactError(f"{workspace}: holds neither an index nor runs; run: ragtune index CONFIG")
    return list(dict.fromkeys(found)), checked


def _current_problems(workspace: str) -> list[str]:
    try:
        version = versions.current_version(workspace)
    except storage.ArtifactError as error:
        return [str(error)]
    if storage.exists(versions.version_url(workspace, version)):
        return []
    return [f"{workspace}/index/CURRENT: names version {version}, which does not exist"]
