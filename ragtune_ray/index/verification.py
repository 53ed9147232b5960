"""Every file of a workspace against its checksum.

In: a workspace, or one artifact's directory. Out: what is wrong, one sentence each. This module knows nothing of what the files
mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ragtune_ray.index import contents, versions
from ragtune_ray.storage import artifacts, filesystem

__all__ = ["verify_artifact", "verify_workspace"]


def verify_artifact(url: str) -> tuple[list[str], int]:
    """What is wrong with one artifact, and that one was checked."""
    return artifacts.find_problems(url), 1


def verify_workspace(workspace: str) -> tuple[list[str], int]:
    """What is wrong with the artifacts of a workspace, and how many were checked.

    These are its index versions and their segments, runs, tuned models and calibrations, and the indexes that rounds of a tune
    made for their encoders.

    Raises:
        storage.ArtifactError: the workspace holds none of them.
    """
    found, checked = _index_problems(workspace)
    plain = [
        filesystem.join(workspace, "runs", name) for name in filesystem.list_names(filesystem.join(workspace, "runs"))
    ]
    for kind in ("models", "calibrations"):
        for owner in filesystem.list_names(filesystem.join(workspace, kind)):
            folder = filesystem.join(workspace, kind, owner)
            names = filesystem.list_names(folder)
            found += _pointer_problems(folder, names)
            plain += [filesystem.join(folder, name) for name in names if name != artifacts.CURRENT]
    for url in plain:
        found += artifacts.find_problems(url)
    checked += len(plain)
    for tune in filesystem.list_names(filesystem.join(workspace, "rounds")):
        folder = filesystem.join(workspace, "rounds", tune)
        for name in filesystem.list_names(folder):
            problems, num_checked = _index_problems(filesystem.join(folder, name))
            found += problems
            checked += num_checked
    if not checked:
        raise artifacts.ArtifactError(f"{workspace}: holds no index, runs or models; run: ragtune index CONFIG")
    return list(dict.fromkeys(found)), checked


def _index_problems(workspace: str) -> tuple[list[str], int]:
    """What is wrong with the index, if the workspace has one."""
    found: list[str] = []
    names = filesystem.list_names(filesystem.join(workspace, "index", "versions"))
    if names:
        found += _current_problems(workspace)
    check = functools.cache(artifacts.find_problems)  # versions share segments
    for version in names:
        found += contents.index_problems(workspace, version, check)
    parts = [
        filesystem.join(workspace, "index", kind, name)
        for kind in ("segments", "trained")
        for name in filesystem.list_names(filesystem.join(workspace, "index", kind))
    ]
    for url in parts:
        found += check(url)
    return found, len(names) + len(parts)


def _pointer_problems(folder: str, names: Sequence[str]) -> list[str]:
    """What is wrong with the file that names the last of a folder of models or calibrations."""
    named = artifacts.current(folder)
    if named is None:  # a training that was killed before it named its model; the same command names it
        return []
    name = named.removeprefix(f"{folder}/")
    return [] if name in names else [f"{folder}/{artifacts.CURRENT}: names {name}, which does not exist"]


def _current_problems(workspace: str) -> list[str]:
    try:
        version = versions.current_version(workspace)
    except artifacts.ArtifactError as error:
        return [str(error)]
    if filesystem.exists(versions.version_url(workspace, version)):
        return []
    return [f"{workspace}/index/CURRENT: names version {version}, which does not exist"]
