"""`ragtune index`: makes the index contain exactly the documents of a corpus.

Only documents that the latest version does not contain are chunked and embedded; removed and changed documents are deleted. A
resumed build produces the same segments as an uninterrupted one: units depend only on the input, the config and the base version.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster.indexing import change, pipeline
from ragtune_ray.cluster.indexing.change import Changes, IndexVersion
from ragtune_ray.cluster.indexing.pipeline import Built, CorpusError
from ragtune_ray.index import contents, versions
from ragtune_ray.index.plan import outcome_line, planned_for
from ragtune_ray.ingest import input_units
from ragtune_ray.models import weights
from ragtune_ray.storage import checksums, failpoints


def build_index(settings: config.Config) -> IndexVersion:
    """Publish a version that contains exactly the documents of the corpus, or return the version that already does.

    A small corpus is indexed in this process, without Ray (`pipeline.runs_in_process`).

    Raises:
        InputError: the corpus cannot be read at all.
        CorpusError: `corpus.strict` is set and there are rejects, or no document is left to index.
        DuplicateError: two documents share an id.
        ModelError: the encoder cannot be found.
        StageError: a stage failed.
        ConflictError: other processes published first every time.
        OvertakenError: other processes changed documents of the base version every time.
    """
    if not settings.corpus.path:
        raise config.ConfigError("corpus.path is empty; name a folder or file of documents")
    started = time.monotonic()
    corpus = settings.corpus
    plan = input_units.plan_units(corpus.path, corpus.unit_bytes, fingerprint=corpus.fingerprint)
    encoder = weights.resolve(settings.encoder.model)
    return change.retry_if_overtaken("index", lambda: _build(settings, plan, encoder, started))


def _build(settings: config.Config, plan: input_units.Plan, encoder: weights.Model, started: float) -> IndexVersion:
    base = versions.latest_version(settings.workspace)
    listing = versions.listing_id(settings, plan, encoder)
    known = versions.find_corpus(settings.workspace, listing)
    if settings.corpus.strict and plan.rejects:
        known = ""  # the listing has only what can be read; reading names the file that cannot
    published, partial = _published(settings, base, known)
    if published is not None:
        assert base is not None, "a version contains this corpus"
        progress.say(f"index: version {published} already contains this corpus; nothing to do")
        return IndexVersion.of(settings.workspace, published, _changes(settings.workspace, base, published))
    if base is not None and not _can_keep(settings, base, versions.recipe(settings, encoder)):
        progress.say("index: chunking, encoder, kind or format changed; every document is indexed again")
        base = None
    # Not the listing: if an input changes, a build that starts again keeps the finished units of the others.
    settled = [versions.recipe(settings, encoder), versions.reading(settings), pipeline.segment_settings(settings)]
    build_id = checksums.digest(["index", settled, base.content_id if base else "", *partial])
    planned = planned_for(settings.workspace, versions.planned_corpus_id(settings, plan, encoder))

    def draft(latest: versions.Version | None, built: Built) -> versions.Draft | None:
        if not built.num_passages and not built.num_known:
            first = f"; the first: {built.rejects[0].place}: {built.rejects[0].reason}" if built.rejects else ""
            raise CorpusError(
                f"{settings.corpus.path}: nothing was left to index, {len(built.rejects)} inputs were rejected{first}"
            )
        content = input_units.content_fingerprint(plan, built.digests)
        corpus_id = versions.corpus_id(settings, content, encoder)
        versions.record_corpus(settings.workspace, listing, corpus_id)
        facts: versions.VersionFacts = {
            **built.facts,
            "operation": "index",
            "corpus_id": corpus_id,
            "build_id": build_id,
            "config": settings.model_dump(mode="json"),
            "input": {"num_files": len(plan.files), "fingerprint": content},
            "num_documents": built.num_documents,
            **built.reject_facts(),
            "kinds": built.kinds,
            "seconds": {**built.seconds, "total": round(time.monotonic() - started, 3)},
            # Set even if it is None; otherwise the version would inherit the plan of an earlier corpus.
            "planned": planned,
        }
        drafted = _draft(settings, latest, base, built, facts)
        return None if latest is not None and _adds_nothing(latest, drafted) else drafted

    def report(version: versions.Version, is_new: bool, built: Built) -> None:
        _summarize(version, is_new, built)
        if planned and is_new:
            progress.say(outcome_line(planned, version.manifest, built.num_passages))

    in_process = pipeline.runs_in_process(settings, plan)
    return change.publish_change(settings, plan, encoder, base, build_id, draft, report, in_process=in_process)


def _published(settings: config.Config, base: versions.Version | None, corpus_id: str) -> tuple[str | None, list[str]]:
    """The version that contains this corpus: the latest, or an earlier one, which is published again; None if there is none.

    Also the versions that may lack documents of it, because they have transient rejects; its files are then read again. With
    `corpus.strict` so are those of a version with any rejects, which may have been mended or removed since.
    """
    partial: list[str] = []
    for version in _history(settings.workspace, base) if corpus_id else ():
        if version.manifest.get("corpus_id") != corpus_id:
            continue
        facts = version.manifest
        if facts.get("num_transient_rejects") or (settings.corpus.strict and facts.get("num_rejects")):
            partial.append(version.name)
            continue
        if version is not base:
            return versions.roll_back(settings.workspace, version.name).name, partial
        versions.advance_current(settings.workspace)
        return version.name, partial
    return None, partial


def _history(workspace: str, base: versions.Version | None) -> Iterator[versions.Version]:
    """The latest version and all before it; each is read only when it is asked for."""
    if base is not None:
        yield base
        for name in reversed(versions.list_versions(workspace)):
            if name != base.name:
                yield versions.read_version(workspace, name)


def _adds_nothing(latest: versions.Version, drafted: versions.Draft) -> bool:
    """Whether the latest version has the same documents of the same corpus, and the same facts about it."""
    change = drafted.facts["change"]
    is_same = not any(change[name] for name in ("added", "changed", "removed"))
    return is_same and all(latest.manifest.get(name) == drafted.facts.get(name) for name in versions.CORPUS_FACTS)


def _changes(workspace: str, base: versions.Version, published: str) -> Changes:
    """What publishing an earlier version again changes."""
    now = versions.read_version(workspace, published)
    change = {name: len(ids) for name, ids in contents.difference(workspace, base, now).items()}
    return Changes.of(change, now.manifest["num_documents"])


def _can_keep(settings: config.Config, base: versions.Version, recipe: str) -> bool:
    """Whether the next version can keep the segments of this one."""
    same_kind = settings.index.kind in {"auto", base.manifest["index_kind"]}
    return base.manifest.get("recipe") == recipe and same_kind


def _draft(
    settings: config.Config,
    latest: versions.Version | None,
    base: versions.Version | None,
    built: Built,
    facts: versions.VersionFacts,
) -> versions.Draft:
    """The latest version minus the documents that left the corpus, plus the segments of new documents.

    Raises:
        OvertakenError: the latest version lacks documents that the build took as known.
    """
    files = {"rejects.jsonl": schema.reject_lines(built.rejects)}
    if base is None:
        facts["change"] = {"added": built.num_documents, "changed": 0, "removed": 0, "unchanged": 0}
        return versions.Draft(built.entries, facts, files)
    assert latest is not None
    found = built.documents.difference(settings.workspace, latest)
    if found.num_seen < found.num_known or latest.manifest.get("recipe") != facts["recipe"]:
        raise change.overtaken_by(latest)
    none = np.empty(0, dtype=np.int64)
    kept = [
        contents.delete_passages(settings.workspace, entry, found.doomed.get(entry.segment_id, none))
        for entry in latest.entries
    ]
    failpoints.reach("delete.tombstones")
    facts["change"] = {
        "added": found.num_new - found.num_changed,
        "changed": found.num_changed,
        "removed": found.num_gone - found.num_changed,
        "unchanged": built.num_known,
    }
    return versions.Draft((*kept, *built.entries), facts, files)


def _summarize(version: versions.Version, is_new: bool, built: Built) -> None:
    manifest = version.manifest
    rejected = f", {len(built.rejects):,} rejected (rejects.jsonl)" if built.rejects else ""
    if not is_new:
        progress.say(f"index: version {version.name} already contains all that could be read of this corpus{rejected}")
        return
    counts = {name: count for name, count in manifest["change"].items() if count}
    progress.say(
        f"index: version {version.name}: {manifest['num_documents']:,} documents, {manifest['num_passages']:,} passages"
        f"{rejected}; documents " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    )
