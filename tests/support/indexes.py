"""Ways to change an index and to look into it."""

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
