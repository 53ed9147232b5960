"""Ray Data: documents added to, replaced in and taken out of an index that stands.

In: files of documents, or ids. Out: the next version, which differs by them alone. A small upsert runs in this process, without
Ray; the cost of either does not grow with the index. This module knows nothing of how passages are searched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster.indexing import compact, pipeline
from ragtune_ray.cluster.indexing.pipeline import Built
from ragtune_ray.index import contents, retention, versions
from ragtune_ray.ingest import input_units, parsers, rows
from ragtune_ray.models import weights
from ragtune_ray.storage import checksums, failpoints, filesystem

__all__ = ["UpdateError", "delete_documents", "document_ids", "upsert_documents"]


class UpdateError(RagtuneError, ValueError):
    """The index cannot be changed like this; the message says why and what to do."""


def upsert_documents(settings: config.Config, path: str, *, in_process: bool = False) -> Path | str:
    """Add the documents of a file or folder to the index; a document whose id is there already is replaced.

    Args:
        settings: workspace, corpus, chunking, encoder, index, cluster and seed are used.
        path: whatever `corpus.path` may be. Files below `corpus.path` keep the ids they have there.
        in_process: without Ray however much it is, as inside of a task: others would wait for room that it may never get.

    Returns:
        The version's directory.

    Raises:
        inputs.InputError: the path cannot be read at all.
        UpdateError: the index was made with another encoder, chunking or language.
        building.CorpusError: `corpus.strict` met a reject.
        building.OvertakenError: each time other publishers changed documents that were taken as known.
    """
    started = time.monotonic()
    plan = input_units.plan_units(path, settings.corpus.unit_bytes, root=_root(settings.corpus.path, path))
    encoder = weights.resolve(settings.encoder.model)
    in_process = in_process or pipeline.runs_in_process(settings, plan)
    name = pipeline.again_if_overtaken(
        "upsert", lambda: _upsert(settings, path, plan, encoder, started, in_process=in_process)
    )
    return versions.version_url(settings.workspace, name)


def _upsert(
    settings: config.Config,
    path: str,
    plan: input_units.Plan,
    encoder: weights.Model,
    started: float,
    *,
    in_process: bool,
) -> str:
    base = versions.latest_version(settings.workspace)
    _refuse_other_recipe(settings, encoder, base)
    build_id = _build_id(settings, plan, encoder, base)
    held = retention.held(settings.workspace, base.name if base else "")
    with held, pipeline.session_for(settings, in_process=in_process):
        built = pipeline.build(settings, plan, encoder, base, build_id, in_process=in_process)
    version, is_new = versions.publish_rebasing(
        settings.workspace, lambda latest: _upserted(settings, encoder, latest, base, built, started)
    )
    if version is None:
        raise UpdateError(f"{path}: holds no document that could be indexed; see what was rejected: {_first(built)}")
    filesystem.remove(pipeline.directory(settings.workspace, build_id))
    failpoints.reach("build.cleaned")
    unchanged = sum(built.parts.documents["is_known"].to_pylist())
    rejected = f", {len(built.rejects):,} rejected" if built.rejects else ""
    if is_new:
        change = version.manifest["change"]
        progress.say(
            f"upsert: version {version.name}: {change['added']:,} documents added, {change['changed']:,} replaced, "
            f"{unchanged:,} unchanged{rejected}"
        )
    else:
        progress.say(f"upsert: all {unchanged:,} documents are in version {version.name} already{rejected}")
    compacted = compact.compact_if_needed(settings, in_process=in_process)
    return (compacted or version).name


def _build_id(
    settings: config.Config, plan: input_units.Plan, encoder: weights.Model, base: versions.Version | None
) -> str:
    """Of all that the segments of an upsert depend on; the folder too, since ids of files are relative to it."""
    content = [input_units.input_fingerprint(plan), plan.units[0].root]
    recipe = [versions.recipe(settings, encoder), *pipeline.segment_settings(settings)]
    return checksums.digest(["upsert", recipe, content, base.content_id if base else ""])


def _root(corpus: str, path: str) -> str | None:
    """The corpus folder if the path lies in it: ids are then relative to it, as when the corpus is indexed."""
    if not corpus:
        return None
    folder = filesystem.absolute(corpus).rstrip("/")
    return folder if filesystem.absolute(path).startswith(f"{folder}/") else None


def _refuse_other_recipe(settings: config.Config, encoder: weights.Model, base: versions.Version | None) -> None:
    if base is not None and base.manifest.get("recipe") != versions.recipe(settings, encoder):
        raise UpdateError(
            f"index version {base.name} was made with another encoder, chunking, language or format than this config "
            "names, so that old and new passages would not compare; run: ragtune index CONFIG"
        )


def _first(built: Built) -> str:
    return f"{built.rejects[0].place}: {built.rejects[0].reason}" if built.rejects else "nothing"


def _upserted(
    settings: config.Config,
    encoder: weights.Model,
    latest: versions.Version | None,
    base: versions.Version | None,
    built: Built,
    started: float,
) -> versions.Draft | None:
    _refuse_other_recipe(settings, encoder, latest)
    _refuse_overtaken(settings.workspace, latest, base, built)
    documents = built.parts.documents.to_pylist()
    new_ids = sorted({row["document_id"] for row in documents if not row["is_known"]})
    if not new_ids:
        return None
    if latest is not None and {entry.segment_id for entry in built.entries} <= {e.segment_id for e in latest.entries}:
        return None  # a run that was killed after it published, started again
    entries, replaced = _without(settings.workspace, latest, new_ids)
    before = latest.manifest["num_documents"] if latest else 0
    facts: versions.VersionFacts = {
        **built.facts,
        "operation": "upsert",
        "num_documents": before - len(replaced) + len(new_ids),
        "num_rejects": built.counted_rejects(),
        "change": {"added": len(new_ids) - len(replaced), "changed": len(replaced), "removed": 0},
        "seconds": {**built.seconds, "total": round(time.monotonic() - started, 3)},
    }
    if latest is None:
        facts["config"] = settings.model_dump(mode="json")
    return versions.Draft((*entries, *built.entries), facts, {"rejects.jsonl": schema.reject_lines(built.rejects)})


def _refuse_overtaken(
    workspace: str, latest: versions.Version | None, base: versions.Version | None, built: Built
) -> None:
    """Raise `OvertakenError` where documents that the base held are not in the latest version as they were."""
    if latest is None or base is None or latest.content_id == base.content_id:
        return
    documents = built.parts.documents.filter(built.parts.documents["is_known"])
    ids, fingerprints = (documents[name].to_pylist() for name in ("document_id", "fingerprint"))
    if not all(contents.KnownDocuments(workspace, latest).hold(ids, fingerprints)):
        raise pipeline.overtaken_by(latest)


def _without(
    workspace: str, latest: versions.Version | None, document_ids: Sequence[str]
) -> tuple[tuple[versions.Entry, ...], list[str]]:
    """The segments of a version with documents deleted, and which of these were there."""
    if latest is None:
        return (), []
    found = contents.find_documents(workspace, latest, document_ids)
    doomed: dict[str, list[np.ndarray]] = {}
    for places in found.values():
        for segment_id, ordinals in places.items():
            doomed.setdefault(segment_id, []).append(ordinals)
    entries = tuple(
        contents.delete_passages(workspace, entry, np.concatenate(doomed[entry.segment_id]))
        if entry.segment_id in doomed
        else entry
        for entry in latest.entries
    )
    failpoints.reach("delete.tombstones")
    return entries, sorted(found)


def delete_documents(settings: config.Config, ids: Sequence[str]) -> Path | str:
    """Take documents out of the index.

    Args:
        settings: workspace and index are used.
        ids: of the documents; those that are not in the index are counted and passed over.

    Returns:
        The version's directory.

    Raises:
        storage.ArtifactError: there is no index.
    """
    versions.current_version(settings.workspace)
    wanted = sorted(set(ids))
    missing: list[str] = []

    def prepare(latest: versions.Version | None) -> versions.Draft | None:
        assert latest is not None
        entries, found = _without(settings.workspace, latest, wanted)
        missing[:] = sorted(set(wanted) - set(found))
        if not found:
            return None
        return versions.Draft(entries, _deletion_facts(latest, found))

    version, is_new = versions.publish_rebasing(settings.workspace, prepare)
    assert version is not None
    if not is_new:
        progress.say(
            f"delete: none of {len(wanted):,} ids is in index version {version.name} (the first: {missing[0]!r}); nothing to "
            "do. Ids are those of `document_id` in hits and citations"
        )
        return versions.version_url(settings.workspace, version.name)
    absent = f"; {len(missing):,} are not in the index (the first: {missing[0]!r})" if missing else ""
    progress.say(f"delete: version {version.name}: {len(wanted) - len(missing):,} documents deleted{absent}")
    compacted = compact.compact_if_needed(settings, in_process=True)
    return versions.version_url(settings.workspace, (compacted or version).name)


def _deletion_facts(latest: versions.Version, found: Sequence[str]) -> versions.VersionFacts:
    return {
        "operation": "delete",
        "num_documents": latest.manifest["num_documents"] - len(found),
        "change": {"added": 0, "changed": 0, "removed": len(found)},
    }


def document_ids(settings: config.Config, names: Sequence[str]) -> list[str]:
    """What a user calls documents -> their ids.

    A name that ends in .jsonl and is a file stands for the ids in its lines (a string, or an object with an id as in a
    corpus); a file or folder of the corpus stands for the documents in it; anything else is an id.

    Raises:
        UpdateError: a line of a .jsonl file names no document.
    """
    found: list[str] = []
    for name in names:
        root = _root(settings.corpus.path, name) if Path(name).exists() else None
        if name.endswith(".jsonl") and Path(name).is_file():
            found += _ids_of_lines(Path(name))
        elif root is not None:
            plan = input_units.plan_units(name, settings.corpus.unit_bytes, root=root)
            found += [file.path.removeprefix(f"{root}/") for file in plan.files]
        else:
            found.append(name)
    return found


def _ids_of_lines(path: Path) -> list[str]:
    ids = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = rows.parse_json(line)
        except parsers.ParseError as error:
            raise UpdateError(f"{path}:{number}: {error}; write one id, or one object with an id, per line") from error
        given = [value.get(key) for key in rows.DOCUMENT_IDS] if isinstance(value, dict) else [value]
        named = [each for each in given if isinstance(each, str | int) and not isinstance(each, bool)]
        if not named:
            raise UpdateError(f"{path}:{number}: names no document; a line is an id or an object with `document_id`")
        ids.append(str(named[0]))
    return ids
