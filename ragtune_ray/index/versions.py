"""Publishes and reads versions of an index: small manifests that name immutable segments and their deleted passages.

    WORKSPACE/index/CURRENT                        "000002": the version that readers use
    WORKSPACE/index/versions/000002/manifest.json  its segments, deletions, encoder, counts, and the config of the build
    WORKSPACE/index/listings/ID.json               which corpus was read from the files of a listing

History is linear: a version's number is that of its base plus 1, and each number is published once. The publisher that
loses the race for a number gets a ConflictError and rebases its change. A rollback publishes old content under a new
number, so CURRENT only moves forward, and no publisher silently undoes another's work.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict, cast

from ragtune_ray import config
from ragtune_ray.index import faiss_index, segments
from ragtune_ray.ingest import input_units
from ragtune_ray.models import scripts, weights
from ragtune_ray.storage import artifacts, checksums, failpoints, filesystem

INDEX_FORMAT = 2
"""Format of version manifests and segment files; earlier formats can be read."""
READING_FORMAT = 3
"""Raise it when a code change makes the same files lead to other documents."""
MAX_REBASES = 20
"""Attempts to publish a change before giving up."""

logger = logging.getLogger(__name__)


class ConflictError(artifacts.ArtifactError):
    """Another publisher published the next version first; the message names it."""


class EncoderFacts(TypedDict):
    """The encoder that embedded an index."""

    model: str
    fingerprint: str
    dimension: int


class PlannedFacts(TypedDict):
    """What `ragtune plan` estimated for a corpus."""

    documents: int
    passages: int
    seconds: float
    disk_bytes: int


class VersionFacts(TypedDict, total=False):
    """What an operation records in the manifest of the version that it publishes."""

    operation: Literal["index", "upsert", "delete", "compact", "rollback"]
    restores: str  # of a rollback: the version whose content this is
    change: dict[str, int]  # documents added, changed, removed, unchanged
    config: dict[str, Any]
    input: dict[str, Any]  # num_files, fingerprint
    recipe: str
    corpus_id: str
    build_id: str
    language: str
    words: str  # rules of `index.words`; missing from older versions, whose rules are the language
    lexical_titles: bool  # missing from older versions, whose BM25 does not search titles
    index_kind: faiss_index.ConcreteKind
    trained_id: str
    search: dict[str, int]  # the fields of a SearchEffort
    calibration: dict[str, float]
    bytes_per_vector: dict[str, float]  # searched, stored
    encoder: EncoderFacts
    encoding: dict[str, float]  # workers, busy_seconds
    scripts: dict[str, scripts.ScriptFacts]  # what the encoder knows; missing from older versions
    num_documents: int
    num_rejects: dict[str, int]  # by kind
    num_transient_rejects: int  # of them; missing from older versions
    kinds: dict[str, dict[str, int]]  # of files: what was read (`ingest.parsing.tally`); missing from older versions
    seconds: dict[str, float]  # by stage, and total
    planned: PlannedFacts | None


class IndexManifest(VersionFacts):
    """The manifest of an index version."""

    version: str
    created: str
    segments: list[dict[str, Any]]  # the fields of an Entry each
    num_passages: int  # that are not deleted
    manifest_sha256: str
    index_format: NotRequired[int]  # this and the next are missing from manifests of format 1
    parent: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A segment in one version."""

    segment_id: str
    manifest_sha256: str
    num_passages: int
    deleted: str = ""
    """File that lists its deleted passages; "" if none are deleted."""
    deleted_sha256: str = ""
    num_deleted: int = 0

    @property
    def num_live(self) -> int:
        """Number of passages that are not deleted."""
        return self.num_passages - self.num_deleted


@dataclass(frozen=True, slots=True)
class Version:
    """A published version."""

    name: str
    manifest: IndexManifest

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its segments, in the order in which passages are numbered."""
        return tuple(Entry(**entry) for entry in self.manifest["segments"])

    @property
    def content_id(self) -> str:
        """Identity of the content; versions with the same one return the same hits."""
        content = [[entry.segment_id, entry.deleted] for entry in self.entries]
        return checksums.digest([content, self.manifest.get("search")])


@dataclass(frozen=True, slots=True)
class Draft:
    """The next version, before it is published."""

    entries: tuple[Entry, ...]
    facts: VersionFacts
    """For the manifest, in addition to the facts that are inherited from the base."""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Small text files to store next to the manifest: name -> content."""


def recipe(settings: config.Config, encoder: weights.Model) -> str:
    """Return the identity of all settings that determine a document's passages and vectors.

    A build reuses documents of an earlier version only if both have the same recipe.
    """
    return _fingerprint(settings, encoder, format=INDEX_FORMAT, language=settings.index.language)


def corpus_id(settings: config.Config, content: str, encoder: weights.Model) -> str:
    """Return the identity of an index of a corpus with this `input_units.content_fingerprint`, wherever it is stored."""
    scope = {"kind": settings.index.kind, "input": content, "reading": reading(settings)}
    return checksums.digest({"recipe": recipe(settings, encoder), **scope})


def listing_id(settings: config.Config, plan: input_units.Plan, encoder: weights.Model) -> str:
    """Return the identity of an index of the files that were listed, before they are read."""
    return corpus_id(settings, input_units.input_fingerprint(plan), encoder)


def record_corpus(workspace: str, listing: str, corpus: str) -> None:
    """Record which corpus was read from the files of a `listing_id`, so that equal files need not be read again."""
    filesystem.replace_text(_listing_url(workspace, listing), json.dumps({"corpus_id": corpus}) + "\n")


def find_corpus(workspace: str, listing: str) -> str:
    """Return the `corpus_id` that was read from the files of a `listing_id`; "" if it is unknown."""
    try:
        return str(json.loads(filesystem.read_text(_listing_url(workspace, listing)))["corpus_id"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is damaged; the corpus is read again", _listing_url(workspace, listing))
        return ""


def forget_corpora(workspace: str, kept: Collection[str | None]) -> int:
    """Remove the records of corpora that are not among those `kept`; return how many."""
    folder = filesystem.join(workspace, "index", "listings")
    listings = [name.removesuffix(".json") for name in filesystem.list_names(folder)]
    gone = [listing for listing in listings if find_corpus(workspace, listing) not in kept]
    for listing in gone:
        filesystem.remove(_listing_url(workspace, listing))
    return len(gone)


def _listing_url(workspace: str, listing: str) -> str:
    return filesystem.join(workspace, "index", "listings", f"{listing}.json")


def reading(settings: config.Config) -> list[Any]:
    """Return what decides, besides the recipe, which documents the files of a corpus become.

    If it changes, `ragtune index` reads the corpus again, but embeds only documents that differ.
    """
    return [READING_FORMAT, settings.index.tenant_field, settings.corpus.encoding, settings.corpus.file_times]


def planned_corpus_id(settings: config.Config, plan: input_units.Plan, encoder: weights.Model) -> str:
    """Return the part of a plan's name by which a build of the same corpus finds it."""
    chosen = [settings.index.kind, settings.index.language]
    return _fingerprint(settings, encoder, input=input_units.input_fingerprint(plan), index=chosen)


def _fingerprint(settings: config.Config, encoder: weights.Model, **scope: Any) -> str:
    """Digest the settings of reading, chunking and embedding together with the given values."""
    chunking = settings.chunking.model_dump(mode="json")
    prefixed = weights.with_prompts(settings.encoder, encoder.directory)
    embedding = [encoder.fingerprint, prefixed.query_prefix, prefixed.passage_prefix]
    limit = settings.corpus.max_document_bytes
    # Only settings that differ from their defaults, so that indexes that are older than these settings keep their identity.
    reading = settings.corpus.model_dump(mode="json", include={"sheets", "ocr", "ocr_languages"}, exclude_defaults=True)
    scope |= {"reading": reading} if reading else {}
    return checksums.digest({"max_document_bytes": limit, "chunking": chunking, "encoder": embedding, **scope})


def words_of(manifest: IndexManifest) -> str:
    """Return the rules by which the words of an index are made; see `index.words`."""
    return manifest.get("words", manifest["language"])


def version_url(workspace: str, version: str) -> str:
    """Return the directory of a version."""
    return filesystem.join(workspace, "index", "versions", version)


def _numbers(workspace: str) -> list[str]:
    names = filesystem.list_names(filesystem.join(workspace, "index", "versions"))
    return [name for name in names if re.fullmatch(r"[0-9]{6,}", name)]


def list_versions(workspace: str) -> list[str]:
    """Return the names of all finished versions, oldest first."""
    return [name for name in _numbers(workspace) if artifacts.is_finished(version_url(workspace, name))]


def latest_version(workspace: str) -> Version | None:
    """Return the newest version, the base of the next one; None if there is no version."""
    for name in reversed(_numbers(workspace)):
        if artifacts.is_finished(version_url(workspace, name)):
            return read_version(workspace, name)
    return None


def read_version(workspace: str, name: str) -> Version:
    """Read a version; raises an ArtifactError if it is missing, damaged, or written in a later format."""
    url = version_url(workspace, name)
    manifest = cast(IndexManifest, artifacts.read_manifest(url))
    if manifest.get("index_format", 1) > INDEX_FORMAT:
        raise artifacts.ArtifactError(
            f"{url}: index format {manifest['index_format']} is newer than {INDEX_FORMAT}, the latest that this version "
            "of ragtune-ray reads; upgrade ragtune-ray"
        )
    return Version(name, manifest)


def current_version(workspace: str) -> str:
    """Return the name of the version that readers use.

    Raises:
        ArtifactError: the workspace has no index, or CURRENT is damaged.
    """
    url = filesystem.join(workspace, "index", "CURRENT")
    try:
        text = filesystem.read_text(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise artifacts.ArtifactError(f"{workspace}: has no index; run: ragtune index CONFIG") from error
    except UnicodeDecodeError as error:
        raise artifacts.ArtifactError(f"{url}: is damaged; run: ragtune rollback CONFIG --repair") from error
    if not re.fullmatch(r"[0-9]{6,}\n", text):
        raise artifacts.ArtifactError(f"{url}: is damaged ({text[:20]!r}); run: ragtune rollback CONFIG --repair")
    return text.strip()


def advance_current(workspace: str) -> None:
    """Make CURRENT name the latest version, in one atomic step.

    A slow publisher may write an older number after a faster one has written, so each checks again after it writes.
    """
    url = filesystem.join(workspace, "index", "CURRENT")
    while (latest := latest_version(workspace)) is not None:
        try:
            if filesystem.read_text(url) == f"{latest.name}\n":
                return
        except (FileNotFoundError, UnicodeDecodeError):
            logger.debug("%s is missing or damaged and is written again", url)
        filesystem.replace_text(url, f"{latest.name}\n")


def entry_of(workspace: str, segment_id: str) -> Entry:
    """Return the entry of a finished segment, without deleted passages."""
    manifest = segments.read_segment_manifest(workspace, segment_id)
    return Entry(segment_id, manifest["manifest_sha256"], manifest["num_passages"])


def publish_version(workspace: str, base: Version | None, draft: Draft) -> Version:
    """Publish the version after `base` and make it current.

    Args:
        workspace: the index's workspace.
        base: the latest version when the draft was made; None for the first version.
        draft: the new version; segments whose passages are all deleted are left out.

    Raises:
        ConflictError: another publisher published that number first.
        ArtifactError: a segment is missing.
    """
    for entry in draft.entries:
        found = segments.read_segment_manifest(workspace, entry.segment_id)["manifest_sha256"]
        if found != entry.manifest_sha256:
            raise artifacts.ArtifactError(f"{entry.segment_id}: has changed since it was built; run the command again")
    name = _next_name(workspace, base)
    url = version_url(workspace, name)
    staging = artifacts.stage(url)
    with filesystem.discarding(staging):
        for file_name, content in draft.files.items():
            # In an object store, two publishers write into one directory until one wins, so they need unique file names.
            unique = file_name if filesystem.is_local(url) else f"{checksums.digest(content)}-{file_name}"
            (staging / unique).write_text(content, encoding="utf-8")
    kept = tuple(entry for entry in draft.entries if entry.num_live)
    inherited = {key: value for key, value in (base.manifest.items() if base else ()) if key not in _OWN_FACTS}
    facts = {
        **inherited,
        **draft.facts,
        "index_format": INDEX_FORMAT,
        "version": name,
        "parent": base.name if base else "",
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "segments": [dataclasses.asdict(entry) for entry in kept],
        "num_passages": sum(entry.num_live for entry in kept),
    }
    failpoints.reach("publish.staged")
    if not artifacts.publish(staging, url, "index", **facts):
        raise ConflictError(f"{url}: another publisher took this version first; run the command again")
    failpoints.reach("publish.version")
    advance_current(workspace)
    failpoints.reach("publish.current")
    return read_version(workspace, name)


CORPUS_FACTS = ("corpus_id", "num_rejects", "num_transient_rejects", "kinds")
"""What a version says about the corpus that was read for it; versions with the same content say the same."""
_OWN_FACTS = {
    "format", "kind", "package_version", "files", "manifest_sha256", "version", "parent", "created", "segments",
    "restores", "operation", "change", "seconds", "rejects", "build_id", "planned", *CORPUS_FACTS,
}  # fmt: skip
"""Facts of one version; all other facts are inherited by the next version."""


def _next_name(workspace: str, base: Version | None) -> str:
    """Return the first unused number after the base's.

    On a disk, versions appear atomically, so an unfinished one is damaged and its number is skipped. In an object store
    another publisher may be writing it; the manifest's conditional put then decides who wins.
    """
    number = int(base.name) + 1 if base else 1
    while True:
        url = version_url(workspace, f"{number:06d}")
        marker = url if filesystem.is_local(url) else filesystem.join(url, artifacts.MANIFEST)
        if not filesystem.exists(marker):
            return f"{number:06d}"
        if artifacts.is_finished(url):
            raise ConflictError(f"{url}: another publisher took this version first; run the command again")
        number += 1


def publish_rebasing(workspace: str, prepare: Callable[[Version | None], Draft | None]) -> tuple[Version | None, bool]:
    """Publish a change on top of the latest version; rebase and retry if another publisher was faster.

    Args:
        workspace: the index's workspace.
        prepare: returns the draft of the next version for the latest one, or None if there is nothing to change.

    Returns:
        The latest version, and whether this call published it.

    Raises:
        ConflictError: other publishers were faster in every attempt.
        ArtifactError: CURRENT names a damaged version, which must be repaired first.
    """
    for attempt in range(MAX_REBASES):
        base = latest_version(workspace)
        _refuse_damaged(workspace, base)
        draft = prepare(base)
        if draft is None:
            advance_current(workspace)
            return base, False
        try:
            return publish_version(workspace, base, draft), True
        except ConflictError as error:
            if attempt == MAX_REBASES - 1:
                raise
            logger.warning("%s; this change is rebased on it", str(error).partition("; run")[0])
    raise AssertionError("unreachable")


def _refuse_damaged(workspace: str, base: Version | None) -> None:
    try:
        current = current_version(workspace)
    except artifacts.ArtifactError:
        return  # there is no index yet, or CURRENT is damaged and is about to be rewritten
    if base is None or int(current) > int(base.name):
        raise artifacts.ArtifactError(
            f"{version_url(workspace, current)}: the current version is damaged or missing; run: ragtune rollback CONFIG"
        )


def roll_back(workspace: str, target: str | None = None) -> Version:
    """Publish the content of an earlier version under a new number.

    Args:
        workspace: the index's workspace.
        target: the version to restore; None restores the version before the current content.

    Raises:
        ArtifactError: the version does not exist, or its segments were removed.
    """
    base = latest_version(workspace)
    if base is None:
        raise artifacts.ArtifactError(f"{workspace}: has no index; run: ragtune index CONFIG")
    name = target if target is not None else _previous_name(workspace, base)
    restored = read_version(workspace, name)
    of_content = {"build_id", *CORPUS_FACTS}
    kept = {key: value for key, value in restored.manifest.items() if key not in _OWN_FACTS or key in of_content}
    facts = cast(VersionFacts, {**kept, "operation": "rollback", "restores": name})
    return publish_version(workspace, base, Draft(restored.entries, facts, rejects_of(workspace, restored)))


def rejects_of(workspace: str, version: Version) -> dict[str, str]:
    """The file of rejects of a version, for another one of the same corpus; empty if it has none."""
    url = filesystem.join(version_url(workspace, version.name), "rejects.jsonl")
    return {"rejects.jsonl": filesystem.read_text(url)} if filesystem.exists(url) else {}


def _previous_name(workspace: str, base: Version) -> str:
    current = current_version(workspace)
    if int(current) > int(base.name) or not artifacts.is_finished(version_url(workspace, current)):
        return base.name  # the current version is damaged: restore the latest sound one
    # If a publisher was killed before it moved CURRENT, the version to leave is the one that readers use.
    used = read_version(workspace, current)
    content = read_version(workspace, used.manifest["restores"]) if used.manifest.get("restores") else used
    if not content.manifest.get("parent"):
        raise artifacts.ArtifactError(f"{workspace}: version {content.name} is the first: nothing to roll back to")
    return content.manifest["parent"]
