"""Checks every file of a workspace against its checksum."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ragtune_ray.index import contents, versions
from ragtune_ray.storage import artifacts, filesystem


def verify_artifact(url: str) -> tuple[list[str], int]:
    """Return the problems of one artifact, and the number of artifacts checked, which is 1."""
    return artifacts.find_problems(url), 1


def verify_workspace(workspace: str) -> tuple[list[str], int]:
    """Return the problems of all artifacts in a workspace, one sentence each, and the number of artifacts checked.

    Artifacts are index versions, segments, trained structures, runs, models, calibrations and the indexes of tuning rounds.

    Raises:
        ArtifactError: the workspace contains no artifacts.
    """
    found, checked = _index_problems(workspace)
    runs = filesystem.join(workspace, "runs")
    plain = [filesystem.join(runs, name) for name in filesystem.list_names(runs)]
    for kind in ("models", "calibrations"):
        for owner in filesystem.list_names(filesystem.join(workspace, kind)):
            folder = filesystem.join(workspace, kind, owner)
            names = filesystem.list_names(folder)
            found += _pointer_problems(folder, names)
            plain += [filesystem.join(folder, name) for name in names if name != artifacts.CURRENT]
    found += [problem for url in plain for problem in artifacts.find_problems(url)]
    checked += len(plain)
    for tune in filesystem.list_names(filesystem.join(workspace, "rounds")):
        folder = filesystem.join(workspace, "rounds", tune)
        for name in filesystem.list_names(folder):
            problems, num_checked = _index_problems(filesystem.join(folder, name))
            found += problems
            checked += num_checked
    if not checked:
        raise artifacts.ArtifactError(f"{workspace}: has no index, runs or models; run: ragtune index CONFIG")
    return list(dict.fromkeys(found)), checked


def _index_problems(workspace: str) -> tuple[list[str], int]:
    """Return the problems of a workspace's index, if it has one, and the number of artifacts checked."""
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
    found += [problem for url in parts for problem in check(url)]
    return found, len(names) + len(parts)


def _pointer_problems(folder: str, names: Sequence[str]) -> list[str]:
    """Check the file that names the current model or calibration of a folder."""
    named = artifacts.current(folder)
    if named is None:  # a training was killed before it wrote this file; the same command writes it
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
