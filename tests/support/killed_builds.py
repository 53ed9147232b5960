"""Builds that are killed, and the undisturbed build that they must equal."""

from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.index import contents
from tests.support.corpora import write_corpus
from tests.support.indexes import living, segment_manifests

WORKERS = ("EmbedUnits", "ReadUnits", "CommitUnits", "_build_segment")
"""Names of the processes of Ray that build an index."""


def undisturbed(folder: Path, num_documents: int) -> dict[str, Any]:
    """A config of many small units, and a build of it in this process."""
    write_corpus(folder / "corpus.jsonl", num_documents)
    found = {
        "workspace": str(folder / "workspace"),
        "corpus": {"path": str(folder / "corpus.jsonl"), "unit_bytes": 2000},
        "encoder": {"model": "hashing-64", "unit_passages": 16},
        "chunking": {"size_tokens": 32, "overlap_tokens": 4},
        "index": {"kind": "ivf", "segment_passages": 150},
    }
    build_index(config.Config.model_validate(found))
    return found


def num_steps(settings: dict[str, Any]) -> int:
    """Units and segments of the build, but for the last ones."""
    num_units = Path(settings["corpus"]["path"]).stat().st_size // settings["corpus"]["unit_bytes"]
    return num_units + len(segment_manifests(settings["workspace"])) - 3


def assert_same(workspace: str, settings: dict[str, Any], num_documents: int) -> None:
    """The index has the bytes of the undisturbed one, all documents, and no damage."""
    assert segment_manifests(workspace) == segment_manifests(settings["workspace"])
    assert living(workspace) == {f"d{number}" for number in range(num_documents)}
    assert contents.index_problems(workspace) == []
