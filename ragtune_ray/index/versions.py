"""Versions of an index: small manifests that name immutable segments and what is deleted in them.

In: segments and changes to them. Out: the next version, published by exactly one of several publishers; CURRENT. This module
knows nothing of FAISS, encoders or Ray; which documents a version holds is in `contents`.

    WORKSPACE/index/CURRENT                        "000002": the version that readers take
    WORKSPACE/index/versions/000002/manifest.json  its segments, deletions, encoder, counts, the config that made it

History is a line: each version has the number after its base's, and a number can be taken once. Who loses the race for it
learns so and applies his change to the winner's version. Rolling back publishes the old content under a new number, so
CURRENT only ever moves forwards and no publisher can undo another's work unseen.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict, cast

from ragtune_ray import config
from ragtune_ray.index import faiss_index, segments
from ragtune_ray.ingest import input_units
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, checksums, failpoints, filesystem

__all__ = [
    "INDEX_FORMAT",
    "ConflictError",
    "Draft",
    "EncoderFacts",
    "Entry",
    "IndexManifest",
    "PlannedFacts",
    "Version",
    "VersionFacts",
    "advance_current",
    "corpus_id",
    "current_version",
    "entry_of",
    "latest_version",
    "list_versions",
    "planned_corpus_id",
    "publish_rebasing",
    "publish_version",
    "read_version",
    "recipe",
    "roll_back",
    "version_url",
]

INDEX_FORMAT = 2
"""Of a version's manifest and its segments' files; earlier ones can be read."""
MAX_REBASES = 20

logger = logging.getLogger(__name__)


class ConflictError(artifacts.ArtifactError):
    """Another publisher took the number of the next version; the message names it."""


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
    index_kind: faiss_index.ConcreteKind
    trained_id: str
    search: dict[str, int]  # the fields of a SearchEffort
    calibration: dict[str, float]
    bytes_per_vector: dict[str, float]  # searched, stored
    encoder: EncoderFacts
    encoding: dict[str, float]  # workers, busy_seconds
    num_documents: int
    num_rejects: dict[str, int]  # by kind
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
    """A segment as one version sees it."""

    segment_id: str
    manifest_sha256: str
    num_passages: int
    deleted: str = ""
    """Name of the file of its deleted passages; "" when all are alive."""
    deleted_sha256: str = ""
    num_deleted: int = 0

    @property
    def num_live(self) -> int:
        """Passages that are not deleted."""
        return self.num_passages - self.num_deleted


@dataclass(frozen=True, slots=True)
class Version:
    """A published version."""

    name: str
    manifest: IndexManifest

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its segments, in the order that numbers the passages."""
        return tuple(Entry(**entry) for entry in self.manifest["segments"])

    @property
    def content_id(self) -> str:
        """Equal for versions in which every search finds the same."""
        content = [[entry.segment_id, entry.deleted] for entry in self.entries]
        return checksums.digest([content, self.manifest.get("search")])


@dataclass(frozen=True, slots=True)
class Draft:
    """What the next version shall be."""

    entries: tuple[Entry, ...]
    facts: VersionFacts
    """For the manifest; those of the base that are not named here are kept."""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Small text files to stand beside the manifest, name -> content."""


def recipe(settings: config.Config, encoder: weights.Model) -> str:
    """Identity of everything but a document itself that its passages and vectors depend on.

    A build keeps the documents of an earlier version only if both have the same recipe.
    """
    return _fingerprint(settings, encoder, format=INDEX_FORMAT, language=settings.index.language)


def corpus_id(settings: config.Config, plan: input_units.Plan, encoder: weights.Model) -> str:
    """Identity of what an index of this corpus contains, wherever the corpus's files are stored."""
    content = {"kind": settings.index.kind, "input": input_units.input_fingerprint(plan)}
    return checksums.digest({"recipe": recipe(settings, encoder), **content})


def planned_corpus_id(settings: config.Config, plan: input_units.Plan, encoder: weights.Model) -> str:
    """Identity of what a plan is about; equal to that of a build exactly if the build's `corpus_id` is the same.

    It is a digest of its own because the names of finished plans contain it.
    """
    chosen = [settings.index.kind, settings.index.language]
    return _fingerprint(settings, encoder, input=input_units.input_fingerprint(plan), index=chosen)


def _fingerprint(settings: config.Config, encoder: weights.Model, **scope: Any) -> str:
    """Digest of how documents are read, chunked and embedded, and of the given facts."""
    chunking = settings.chunking.model_dump(mode="json")
    embedding = [encoder.fingerprint, settings.encoder.query_prefix, settings.encoder.passage_prefix]
    limit = settings.corpus.max_document_bytes
    return checksums.digest({"max_document_bytes": limit, "chunking": chunking, "encoder": embedding, **scope})


def version_url(workspace: str, version: str) -> str:
    """Directory of a version."""
    return filesystem.join(workspace, "index", "versions", version)


def _numbers(workspace: str) -> list[str]:
    names = filesystem.list_names(filesystem.join(workspace, "index", "versions"))
    return [name for name in names if re.fullmatch(r"[0-9]{6,}", name)]


def list_versions(workspace: str) -> list[str]:
    """The finished versions, oldest first."""
    return [name for name in _numbers(workspace) if artifacts.is_finished(version_url(workspace, name))]


def latest_version(workspace: str) -> Version | None:
    """The latest version, on which the next one is based; None when there is none."""
    for name in reversed(_numbers(workspace)):
        if artifacts.is_finished(version_url(workspace, name)):
            return read_version(workspace, name)
    return None


def read_version(workspace: str, name: str) -> Version:
    """A version by name.

    Raises:
        storage.ArtifactError: it is missing, damaged, or of a later format.
    """
    url = version_url(workspace, name)
    manifest = cast(IndexManifest, artifacts.read_manifest(url))
    if manifest.get("index_format", 1) > INDEX_FORMAT:
        raise artifacts.ArtifactError(
            f"{url}: index format {manifest['index_format']}, this version of ragtune-ray reads up to {INDEX_FORMAT}; "
            "upgrade ragtune-ray"
        )
    return Version(name, manifest)


def current_version(workspace: str) -> str:
    """The version that readers take.

    Raises:
        storage.ArtifactError: nothing is indexed there yet, or CURRENT is damaged.
    """
    url = filesystem.join(workspace, "index", "CURRENT")
    try:
        text = filesystem.read_text(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise artifacts.ArtifactError(f"{workspace}: holds no index; run: ragtune index CONFIG") from error
    except UnicodeDecodeError as error:
        raise artifacts.ArtifactError(f"{url}: is damaged; run: ragtune rollback CONFIG --repair") from error
    if not re.fullmatch(r"[0-9]{6,}\n", text):
        raise artifacts.ArtifactError(f"{url}: is damaged (holds {text[:20]!r}); run: ragtune rollback CONFIG --repair")
    return text.strip()


def advance_current(workspace: str) -> None:
    """Make readers take the latest version, in one atomic step.

    A publisher that was slow may write an older number after a quicker one: whoever writes looks again afterwards, so
    that the last to write has seen the latest.
    """
    url = filesystem.join(workspace, "index", "CURRENT")
    while (latest := latest_version(workspace)) is not None:
        try:
            if filesystem.read_text(url) == f"{latest.name}\n":
                return
        except (FileNotFoundError, UnicodeDecodeError):
            logger.debug("%s does not stand yet, or is damaged; it is written", url)
        filesystem.replace_text(url, f"{latest.name}\n")


def entry_of(workspace: str, segment_id: str) -> Entry:
    """A finished segment, all of its passages alive.

    Raises:
        storage.ArtifactError: it is missing.
    """
    manifest = segments.read_segment_manifest(workspace, segment_id)
    return Entry(segment_id, manifest["manifest_sha256"], manifest["num_passages"])


def publish_version(workspace: str, base: Version | None, draft: Draft) -> Version:
    """Write the version after `base` and make it current.

    Args:
        workspace: where.
        base: the latest version when the draft was made.
        draft: what it shall be; segments without a living passage are left out.

    Raises:
        ConflictError: another publisher took that number first.
        storage.ArtifactError: a segment is missing.
    """
    for entry in draft.entries:
        found = segments.read_segment_manifest(workspace, entry.segment_id)["manifest_sha256"]
        if found != entry.manifest_sha256:
            raise artifacts.ArtifactError(f"{entry.segment_id}: is not the segment that was to be published; run again")
    name = _next_name(workspace, base)
    url = version_url(workspace, name)
    staging = artifacts.stage(url)
    with filesystem.discarding(staging):
        for file_name, content in draft.files.items():
            # In an object store two publishers write into one directory until one of them wins: never the same file.
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


_OWN_FACTS = {
    "format", "kind", "package_version", "files", "manifest_sha256", "version", "parent", "created", "segments",
    "restores", "operation", "change", "seconds", "rejects", "num_rejects", "build_id", "corpus_id", "planned",
}  # fmt: skip
"""Facts that belong to one version alone; all others are inherited by the next."""


def _next_name(workspace: str, base: Version | None) -> str:
    """The number after the base's at which nothing stands.

    What stands there without being finished is damage, since on a disk versions appear whole, and is passed over; in an
    object store it may be a publisher at work, with whom the manifest's conditional put decides.
    """
    number = int(base.name) + 1 if base else 1
    while True:
        url = version_url(workspace, f"{number:06d}")
        place = url if filesystem.is_local(url) else filesystem.join(url, artifacts.MANIFEST)
        if not filesystem.exists(place):
            return f"{number:06d}"
        if artifacts.is_finished(url):
            raise ConflictError(f"{url}: another publisher took this version first; run the command again")
        number += 1


def publish_rebasing(workspace: str, prepare: Callable[[Version | None], Draft | None]) -> tuple[Version | None, bool]:
    """Publish a change on top of whatever is the latest version, again if another publisher was quicker.

    Args:
        workspace: where.
        prepare: from the latest version to the draft of the next; None: the version already is as it shall be.

    Returns:
        the latest version, and whether this call published it.

    Raises:
        ConflictError: others were quicker every time.
        storage.ArtifactError: CURRENT names a version that is damaged, which must be seen to first.
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
        return  # nothing is indexed yet, or CURRENT is damaged and is about to be written anew
    if base is None or int(current) > int(base.name):
        raise artifacts.ArtifactError(
            f"{version_url(workspace, current)}: the current version is damaged or missing; run: ragtune rollback CONFIG"
        )


def roll_back(workspace: str, target: str | None = None) -> Version:
    """Publish the content of an earlier version under a new number.

    Args:
        workspace: where.
        target: the version to return to; None: the one before what is current.

    Raises:
        storage.ArtifactError: there is no such version, or its segments are gone.
    """
    base = latest_version(workspace)
    if base is None:
        raise artifacts.ArtifactError(f"{workspace}: holds no index; run: ragtune index CONFIG")
    name = target if target is not None else _previous(workspace, base)
    wanted = read_version(workspace, name)
    of_content = {"corpus_id", "build_id", "num_rejects"}
    kept = {key: value for key, value in wanted.manifest.items() if key not in _OWN_FACTS or key in of_content}
    facts = cast(VersionFacts, {**kept, "operation": "rollback", "restores": name})
    return publish_version(workspace, base, Draft(wanted.entries, facts))


def _previous(workspace: str, base: Version) -> str:
    current = current_version(workspace)
    if int(current) > int(base.name) or not artifacts.is_finished(version_url(workspace, current)):
        return base.name  # what CURRENT names is damaged: the latest sound one is what comes before it
    # Readers may see less than the latest version, if its publisher was killed: what they see is what is left behind.
    seen = read_version(workspace, current)
    content = read_version(workspace, seen.manifest["restores"]) if seen.manifest.get("restores") else seen
    if not content.manifest.get("parent"):
        raise artifacts.ArtifactError(f"{workspace}: version {content.name} has no version before it to return to")
    return content.manifest["parent"]
