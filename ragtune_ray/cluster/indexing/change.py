"""Publishes the segments of a build as the next version of the index, even while other processes publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster.indexing import compact, pipeline
from ragtune_ray.cluster.indexing.pipeline import Built
from ragtune_ray.index import versions
from ragtune_ray.ingest import input_units
from ragtune_ray.models import weights
from ragtune_ray.storage import failpoints, filesystem
from ragtune_ray.storage.results import Result

MAX_ATTEMPTS = 3
"""How often a change is attempted while other processes change the documents that it builds on."""
Returned = TypeVar("Returned")


class OvertakenError(RagtuneError, RuntimeError):
    """During a build, another process changed documents that the build took as known."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What one call did to the documents of an index, without the changes that others made meanwhile."""

    added: int = 0
    replaced: int = 0
    deleted: int = 0
    unchanged: int = 0
    """Documents of the input that the index already contained."""
    missing: tuple[str, ...] = ()
    """Ids to delete that the index did not contain."""
    rejects: tuple[schema.Reject, ...] = ()

    @classmethod
    def of(cls, change: Mapping[str, int], num_documents: int, rejects: Sequence[schema.Reject] = ()) -> Changes:
        """From the `change` of a version's facts ({} if none was published) and the number of documents in the input.

        >>> Changes.of({"added": 1, "changed": 2, "removed": 0}, 5).unchanged
        2
        """
        added, replaced = change.get("added", 0), change.get("changed", 0)
        unchanged = num_documents - added - replaced
        return cls(added, replaced, change.get("removed", 0), unchanged, rejects=tuple(rejects))

    def counts(self) -> dict[str, int]:
        """The number of documents per kind of change."""
        return {
            "added": self.added,
            "replaced": self.replaced,
            "deleted": self.deleted,
            "unchanged": self.unchanged,
        }

    def facts(self) -> dict[str, Any]:
        """The counts, the missing ids, and under `rejected` the place and reason of each reject, as JSON values."""
        rejected = [{"place": reject.place, "reason": reject.reason} for reject in self.rejects]
        return {**self.counts(), "missing": list(self.missing), "rejected": rejected}


@dataclass(frozen=True)
class IndexVersion(Result):
    """A version of the index; `name` is its number, such as "000042"."""

    changes: Changes = field(default=Changes(), compare=False)
    """What the call that returned this did; the version may be one that another call published."""

    @classmethod
    def of(cls, workspace: str, name: str, changes: Changes) -> IndexVersion:
        """The version with this name."""
        return cls(versions.version_url(workspace, name), changes)

    @property
    def name(self) -> str:
        """The name that `versions` lists and `rollback` takes."""
        return self.path.rpartition("/")[2]


def publish_change(
    settings: config.Config,
    plan: input_units.Plan,
    encoder: weights.Model,
    base: versions.Version | None,
    build_id: str,
    draft: Callable[[versions.Version | None, Built], versions.Draft | None],
    report: Callable[[versions.Version, bool, Built], None],
    *,
    in_process: bool,
) -> IndexVersion:
    """Build segments from the input, publish a version with them, compact the index if needed; returns the latest version.

    Args:
        settings: the whole config.
        plan: of the input.
        encoder: the model that the config names.
        base: the version whose documents need no work.
        build_id: names the segments.
        draft: from the latest version and the build to the next version, or None if the latest version needs no change; called
            again if another process publishes first.
        report: prints what happened; its second argument tells whether a version was published.
        in_process: run without Ray.
    """
    with pipeline.session_for(settings, base, in_process=in_process):
        folder = pipeline.directory(settings.workspace, build_id, plan.units[0].root)
        drafted: versions.Draft | None = None

        def prepare(latest: versions.Version | None) -> versions.Draft | None:
            nonlocal drafted
            drafted = draft(latest, built)
            return drafted

        try:
            built = pipeline.build(settings, plan, encoder, base, build_id, in_process=in_process)
            version, is_new = versions.publish_rebasing(settings.workspace, prepare)
        except FileNotFoundError as error:
            if filesystem.exists(folder):
                raise
            raise OvertakenError(
                "another process has finished this build and removed its files; run the command again"
            ) from error
        assert version is not None, "without a version, a draft is never None"
        filesystem.remove(folder)
        failpoints.reach("build.cleaned")
        report(version, is_new, built)
        compacted = compact.compact_if_needed(settings, in_process=in_process)
    # Not from the manifest: the version may be a compaction's, or one that was there before.
    change = drafted.facts["change"] if drafted is not None else {}
    changes = Changes.of(change, built.num_documents, built.rejects)
    return IndexVersion.of(settings.workspace, (compacted or version).name, changes)


def overtaken_by(version: versions.Version) -> OvertakenError:
    """The error for a version without documents that the build took as known."""
    return OvertakenError(
        f"version {version.name} meanwhile changed documents that this build took as known; run the command again"
    )


def retry_if_overtaken(verb: str, work: Callable[[], Returned]) -> Returned:
    """Do work that builds on the latest version, and repeat it on the next version if it is overtaken."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return work()
        except OvertakenError as error:
            progress.say(f"{verb}: {str(error).partition('; run')[0]}; comparing with that version again")
    return work()
