"""Commands that change a small index, where they start, what they must leave, and checks of the result."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragtune_ray import config, schema
from ragtune_ray.cluster.indexing import compact as compact_module
from ragtune_ray.cluster.indexing import update
from ragtune_ray.index import contents, retention, snapshot, versions

Contents = dict[str, str]
"""document_id -> text; {}: nothing is indexed."""
FIRST: Contents = {
    "moon": "the moon orbits the earth and apollo landed on the moon in the year of 1969",
    "mars": "mars is the red planet and its two moons are phobos and deimos",
    "sun": "the sun is a star that fuses hydrogen into helium",
}
SECOND: Contents = {
    "mars": "mars has a thin air and dust storms",
    "rover": "the rover drives over dust and rocks of mars",
}
STANDING: Contents = {name: text for name, text in (FIRST | SECOND).items() if name != "sun"}
"""What the prepared index holds in its third version."""
ADDED: Contents = {
    "moon": "the moon is made of rock and has no air",
    "comet": "a comet is a ball of ice and dust with a tail",
}


def documents_file(folder: Path, documents: Contents, name: str = "documents") -> str:
    path = folder / f"{name}.jsonl"
    rows = [json.dumps({"document_id": each, "text": text}) + "\n" for each, text in documents.items()]
    path.write_text("".join(rows))
    return str(path)


def settings_of(folder: Path) -> config.Config:
    return config.Config().using(
        f"workspace={folder / 'workspace'}",
        "encoder.model=hashing-32",
        "chunking.size_tokens=8",
        "chunking.overlap_tokens=2",
    )


def upsert(folder: Path, documents: Contents = ADDED, *overrides: str) -> None:
    update.upsert_documents(settings_of(folder).using(*overrides), documents_file(folder, documents))


def first(folder: Path) -> None:
    upsert(folder, FIRST, "index.kind=ivf")


def delete(folder: Path) -> None:
    update.delete_documents(settings_of(folder), ["moon", "rover"])


def compact(folder: Path) -> None:
    compact_module.compact(settings_of(folder), in_process=True)


def roll_back(folder: Path) -> None:
    versions.roll_back(settings_of(folder).workspace, "000001")


def collect(folder: Path) -> None:
    retention.collect(settings_of(folder).workspace, keep=1, min_age_seconds=0)


def build_standing(folder: Path) -> None:
    """Three versions, two segments, one of them with a deleted document."""
    upsert(folder, FIRST)
    upsert(folder, SECOND)
    update.delete_documents(settings_of(folder), ["sun"])


@dataclass(frozen=True)
class Change:
    """A command, where it starts, what it makes of that, and the failpoints that it passes, in order."""

    run: Callable[[Path], None]
    start: str
    old: Contents
    new: Contents
    passes: tuple[str, ...]


_BUILD = ("build.unit", "build.embedded", "build.trained", "segment.staged", "segment.published", "build.calibrated")
_PUBLISH = ("publish.staged", "publish.version", "publish.current")
_MERGE = ("segment.staged", "segment.published")
CHANGES = {
    "first upsert": Change(first, "empty", {}, FIRST, (*_BUILD, *_PUBLISH, "build.cleaned")),
    "upsert": Change(
        upsert, "standing", STANDING, STANDING | ADDED, (*_BUILD, "delete.tombstones", *_PUBLISH, "build.cleaned")
    ),
    "delete": Change(delete, "standing", STANDING, {"mars": SECOND["mars"]}, ("delete.tombstones", *_PUBLISH)),
    "compact": Change(
        compact, "standing", STANDING, STANDING, ("compact.planned", *_MERGE, "compact.merged", *_PUBLISH)
    ),
    "rollback": Change(roll_back, "standing", STANDING, FIRST, _PUBLISH),
    "gc": Change(collect, "compacted", STANDING, STANDING, ("gc.planned", "gc.version", "gc.segment", "gc.rest")),
}
CASES = [(name, failpoint) for name, change in CHANGES.items() for failpoint in change.passes]


def texts_of(workspace: Path | str, version: str | None = None) -> Contents:
    """What a version holds, its texts put together from their passages again."""
    if version is None and not (Path(workspace) / "index" / "CURRENT").exists():
        return {}
    opened = snapshot.open_index(str(workspace), version)
    texts: Contents = {}
    passages = sorted(schema.from_table(opened.live_passages(), schema.Passage), key=lambda each: each.start)
    for passage in passages:
        text = texts.get(passage.document_id, "")
        texts[passage.document_id] = text[: passage.start].ljust(passage.start) + passage.text
    assert opened.manifest["num_documents"] == len(texts)
    assert opened.manifest["num_passages"] == len(passages)
    return texts


def assert_whole(workspace: Path, *allowed: Contents) -> None:
    """Every version is sound, and the current one holds exactly one of the allowed contents."""
    names = versions.list_versions(str(workspace))
    assert [problem for name in names for problem in contents.index_problems(str(workspace), name)] == []
    assert texts_of(workspace) in allowed


def assert_converged(workspace: Path, new: Contents) -> None:
    """Exactly the new contents, readers see the latest version, and gc leaves nothing that no version names."""
    assert_whole(workspace, new)
    assert versions.list_versions(str(workspace))[-1] == versions.current_version(str(workspace))
    retention.collect(str(workspace), keep=1, min_age_seconds=0)
    assert_whole(workspace, new)
    index = workspace / "index"
    name = versions.current_version(str(workspace))
    entries = versions.read_version(str(workspace), name).entries
    assert {path.name for path in (index / "versions").iterdir()} == {name}
    assert {path.name for path in (index / "segments").iterdir()} == {entry.segment_id for entry in entries}
    deleted = {path.name for path in (index / "deleted").glob("*")}
    assert deleted == {entry.deleted for entry in entries if entry.deleted}
    assert list((index / "building").glob("*")) == []
    assert list(index.rglob(".*")) == [], "staging directories and unfinished files"


def work(asked: dict[str, Any]) -> None:
    """What a child of the warm process does."""
    tempfile.tempdir = asked["temporary"]
    CHANGES[asked["change"]].run(Path(asked["folder"]))
