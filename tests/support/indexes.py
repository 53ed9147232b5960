"""Ways to change an index and to look into it."""

from pathlib import Path

import numpy as np

from ragtune_ray.index import contents, snapshot, versions


def latest(workspace: str) -> versions.Version:
    found = versions.latest_version(workspace)
    assert found is not None
    return found


def delete(workspace: str, *document_ids: str) -> versions.Version:
    base = latest(workspace)
    found = contents.find_documents(workspace, base, document_ids)
    entries = []
    for entry in base.entries:
        doomed = [places[entry.segment_id] for places in found.values() if entry.segment_id in places]
        entries.append(contents.delete_passages(workspace, entry, np.concatenate([np.empty(0, int), *doomed])))
    return versions.publish_version(workspace, base, versions.Draft(tuple(entries), {}))


def living(workspace: str, version: str | None = None) -> set[str]:
    return set(snapshot.open_index(workspace, version).live_passages()["document_id"].to_pylist())


def segment_manifests(workspace: Path | str, version: str | None = None) -> list[str]:
    """Digests of the segments of a version, by default the current one: equal for equal bytes."""
    name = version or versions.current_version(str(workspace))
    return [entry.manifest_sha256 for entry in versions.read_version(str(workspace), name).entries]
