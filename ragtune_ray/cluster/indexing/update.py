"""Adds, replaces and deletes documents of an existing index.

A small upsert runs in this process, without Ray. The cost of a change does not grow with the index.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster.indexing import change, compact, pipeline
from ragtune_ray.cluster.indexing.change import Changes, IndexVersion
from ragtune_ray.cluster.indexing.pipeline import Built
from ragtune_ray.index import contents, versions
from ragtune_ray.ingest import input_units, rows
from ragtune_ray.ingest.parsers import SHEETS
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.models import weights
from ragtune_ray.storage import checksums, failpoints, filesystem


class UpdateError(RagtuneError, ValueError):
    """The index cannot be changed as requested."""


def upsert_documents(settings: config.Config, path: str, *, in_process: bool = False) -> IndexVersion:
    """Add the documents of a file or folder to the index, replacing documents with the same ids.

    Args:
        settings: the whole config.
        path: anything that `corpus.path` accepts. Files below `corpus.path` keep the ids that they have there.
        in_process: never use Ray. Needed inside a Ray task, which would wait for resources that may never become free.

    Raises:
        InputError: the path cannot be read at all.
        UpdateError: the index was built with another encoder, chunking or language.
        CorpusError: `corpus.strict` is set, and there are rejects.
        OvertakenError: other processes changed documents of the base version every time.
    """
    started = time.monotonic()
    corpus = settings.corpus
    plan = input_units.plan_units(path, corpus.unit_bytes, _root(corpus.path, path), corpus.fingerprint)
    encoder = weights.resolve(settings.encoder.model)
    in_process = in_process or pipeline.runs_in_process(settings, plan)

    def attempt() -> IndexVersion:
        base = versions.latest_version(settings.workspace)
        _refuse_other_recipe(settings, encoder, base)
        build_id = _build_id(settings, plan, encoder, base)

        def draft(latest: versions.Version | None, built: Built) -> versions.Draft | None:
            _refuse_other_recipe(settings, encoder, latest)
            _refuse_overtaken(settings.workspace, latest, base, built)
            drafted = _draft(settings, latest, built, started)
            if drafted is None and (latest is None or (built.rejects and not built.num_known)):
                raise UpdateError(f"{path}: contains no document that could be indexed{_first_reject(built)}")
            return drafted

        return change.publish_change(settings, plan, encoder, base, build_id, draft, _report, in_process=in_process)

    return change.retry_if_overtaken("upsert", attempt)


def _first_reject(built: Built) -> str:
    return f"; the first reject: {built.rejects[0].place}: {built.rejects[0].reason}" if built.rejects else ""


def _report(version: versions.Version, is_new: bool, built: Built) -> None:
    rejected = f", {len(built.rejects):,} rejected{_first_reject(built)}" if built.rejects else ""
    if is_new:
        counts = version.manifest["change"]
        progress.say(
            f"upsert: version {version.name}: {counts['added']:,} documents added, {counts['changed']:,} replaced, "
            f"{built.num_known:,} unchanged{rejected}"
        )
    else:
        progress.say(f"upsert: all {built.num_known:,} documents are already in version {version.name}{rejected}")


def _build_id(
    settings: config.Config, plan: input_units.Plan, encoder: weights.Model, base: versions.Version | None
) -> str:
    """Digest of everything on which the segments depend, including the folder to which ids of files are relative."""
    content = [input_units.input_fingerprint(plan), plan.units[0].root]
    recipe = [versions.recipe(settings, encoder), *pipeline.segment_settings(settings), versions.reading(settings)]
    # Also the name: after a rollback to the same content, a file may be read that was a transient reject before.
    return checksums.digest(["upsert", recipe, content, [base.content_id, base.name] if base else ""])


def _root(corpus: str, path: str) -> str | None:
    """The corpus folder if it contains the path; ids are then relative to it, as when the corpus is indexed."""
    if not corpus:
        return None
    folder = filesystem.absolute(corpus).rstrip("/")
    return folder if filesystem.absolute(path).startswith(f"{folder}/") else None


def _refuse_other_recipe(settings: config.Config, encoder: weights.Model, base: versions.Version | None) -> None:
    if base is not None and base.manifest.get("recipe") != versions.recipe(settings, encoder):
        raise UpdateError(
            f"index version {base.name} was built with another encoder, chunking, language or format than this config has, so "
            "old and new passages would not be comparable; run: ragtune index CONFIG"
        )


def _draft(
    settings: config.Config, latest: versions.Version | None, built: Built, started: float
) -> versions.Draft | None:
    """The latest version with the new documents; None if it already has them."""
    new_ids = built.documents.new()
    if not new_ids:
        return None
    if latest is not None and {entry.segment_id for entry in built.entries} <= {e.segment_id for e in latest.entries}:
        return None  # this upsert was killed after publishing, and is now repeated
    entries, replaced = _without(settings.workspace, latest, new_ids)
    before = latest.manifest["num_documents"] if latest else 0
    num_changed = len(_normalized(replaced))
    facts: versions.VersionFacts = {
        **built.facts,
        "operation": "upsert",
        "num_documents": before - len(replaced) + len(new_ids),
        **built.reject_facts(),
        "change": {"added": len(new_ids) - num_changed, "changed": num_changed, "removed": 0},
        "seconds": {**built.seconds, "total": round(time.monotonic() - started, 3)},
    }
    if latest is None:
        facts["config"] = settings.model_dump(mode="json")
    return versions.Draft((*entries, *built.entries), facts, {"rejects.jsonl": schema.reject_lines(built.rejects)})


def _refuse_overtaken(
    workspace: str, latest: versions.Version | None, base: versions.Version | None, built: Built
) -> None:
    """Raise `OvertakenError` if the latest version lacks documents that the build took as known."""
    if latest is None or base is None or latest.content_id == base.content_id:
        return
    if not all(contents.KnownDocuments(workspace, latest).contain(*built.documents.known())):
        raise change.overtaken_by(latest)


def _without(
    workspace: str, latest: versions.Version | None, document_ids: Sequence[str]
) -> tuple[tuple[versions.Entry, ...], list[str]]:
    """The segments of a version without these documents, and the ids among these that it contained, as it spells them."""
    if latest is None:
        return (), []
    found = contents.find_documents(workspace, latest, rows.spellings_of_ids(document_ids))
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


def delete_documents(settings: config.Config, ids: Sequence[str]) -> IndexVersion:
    """Delete documents from the index; `changes.missing` has the ids that it does not contain. ArtifactError without an index."""
    versions.current_version(settings.workspace)
    requested = sorted({rows.checked_id(name, "document_id") for name in ids})
    missing: list[str] = []

    def prepare(latest: versions.Version | None) -> versions.Draft | None:
        assert latest is not None
        entries, found = _without(settings.workspace, latest, requested)
        missing[:] = sorted(set(requested) - _normalized(found))
        return versions.Draft(entries, _deletion_facts(latest, found)) if found else None

    version, is_new = versions.publish_rebasing(settings.workspace, prepare)
    assert version is not None
    if not is_new:
        progress.say(
            f"delete: none of {len(requested):,} ids is in index version {version.name} (the first: {missing[0]!r}); nothing to "
            "do. Ids are the `document_id` of hits and citations"
        )
        return IndexVersion.of(settings.workspace, version.name, Changes(missing=tuple(missing)))
    absent = f"; {len(missing):,} are not in the index (the first: {missing[0]!r})" if missing else ""
    progress.say(f"delete: version {version.name}: {len(requested) - len(missing):,} documents deleted{absent}")
    compacted = compact.compact_if_needed(settings, in_process=True)
    changes = Changes(deleted=len(requested) - len(missing), missing=tuple(missing))
    return IndexVersion.of(settings.workspace, (compacted or version).name, changes)


def _normalized(ids: Iterable[str]) -> set[str]:
    return {rows.checked_id(name, "document_id") for name in ids}


def _deletion_facts(latest: versions.Version, found: Sequence[str]) -> versions.VersionFacts:
    return {
        "operation": "delete",
        "num_documents": latest.manifest["num_documents"] - len(found),
        "change": {"added": 0, "changed": 0, "removed": len(found)},
    }


def document_ids(settings: config.Config, names: Sequence[str]) -> list[str]:
    """The ids of the documents that a user names.

    A .jsonl file means the ids in its lines (a string, or an object with an id as in a corpus), a file or folder of the
    corpus means its documents; anything else is an id.

    Raises:
        UpdateError: a line of a .jsonl file names no document.
    """
    found: list[str] = []
    for name in names:
        root = _root(settings.corpus.path, name) if Path(name).exists() else None
        if name.endswith(".jsonl") and Path(name).is_file():
            found += _ids_of_lines(Path(name))
        elif root is not None:
            found += _ids_of_files(settings.corpus, name, root)
        else:
            found.append(name)
    return found


def _ids_of_files(corpus: config.Corpus, name: str, root: str) -> Iterator[str]:
    """The ids of the documents in a file or folder of the corpus; files that hold several documents are read."""
    plan = input_units.plan_units(name, corpus.unit_bytes, root=root)
    for unit in plan.units:
        has_rows = corpus.sheets == "rows" and any(path.lower().endswith(SHEETS) for path in unit.paths)
        if unit.format == "files" and not has_rows:
            yield from (path.removeprefix(f"{root}/") for path in unit.paths)
            continue
        for row in read_documents(unit, corpus):
            if isinstance(row, schema.Reject):
                raise UpdateError(f"{row.place}: {row.reason}; so its documents are unknown: name them by their ids")
            yield row.document_id


def _ids_of_lines(path: Path) -> list[str]:
    ids = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = rows.parse_json(line)
        except ParseError as error:
            raise UpdateError(f"{path}:{number}: {error}; write one id, or one object with an id, per line") from error
        given = [value.get(key) for key in rows.DOCUMENT_IDS] if isinstance(value, dict) else [value]
        named = [each for each in given if isinstance(each, str | int) and not isinstance(each, bool)]
        if not named:
            raise UpdateError(f"{path}:{number}: names no document; a line is an id or an object with `document_id`")
        ids.append(str(named[0]))
    return ids
