"""What bulk jobs share: a directory named by what the result depends on, stages over queries, and a manifest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress
from ragtune_ray.cluster import session, staged_queries, stages
from ragtune_ray.index import retention, versions
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, checksums, filesystem

if TYPE_CHECKING:
    import ray.data

RUN_FORMAT = 2
"""Part of a run's identity: raise it when the same input would produce other rows."""


class RunFacts(TypedDict, total=False):
    """What verbs write into the manifests of their runs; which keys depends on the verb."""

    # Common
    seconds: dict[str, float]
    input: dict[str, Any]
    """Fingerprint and number of the queries; of `examples`, per split."""
    index_version: str
    """Empty if no index was searched."""
    index_content: str
    queries_per_second: float
    num_rejects: int
    created: str
    # retrieve
    num_hits: int
    num_shards: int
    # answer
    arm: config.Arm
    model: str
    """Fingerprint of the generator."""
    num_answers: int
    statuses: dict[str, int]
    busy_seconds: dict[str, float]
    """Summed over the workers."""
    # evaluate, compare
    runs: dict[config.Arm, str]
    evaluated: str
    golden: dict[str, str]
    verdict: dict[str, Any]
    # examples
    num_train: int
    num_validation: int
    kinds: dict[str, int]
    teacher: Mapping[str, Any]


class RunManifest(RunFacts):
    """The manifest of a finished run: what `Run.publish` and `artifacts.publish` write."""

    format: int
    kind: str
    package_version: str
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    manifest_sha256: str


def read_run_manifest(url: str) -> RunManifest:
    """Read the manifest of a finished run."""
    return cast(RunManifest, artifacts.read_manifest(url))


@dataclass(frozen=True, slots=True)
class Run:
    """A job that publishes one artifact under a name made of what its result depends on, so the same job runs only once."""

    settings: config.Config
    kind: str
    url: str
    """Where the finished artifact is published."""
    work: str
    """Where the job keeps unfinished work, so that a killed job continues from there."""
    started: float
    """By `time.monotonic`."""

    @classmethod
    def of(
        cls,
        settings: config.Config,
        kind: str,
        identity: Mapping[str, Any],
        *,
        name: str = "",
        started: float | None = None,
    ) -> Run:
        """The run with this identity.

        Args:
            settings: the config that the manifest records.
            kind: kind of the artifact, such as "answer".
            identity: JSON values that the result depends on.
            name: start of the directory's name; by default `kind`.
            started: when the job began; by default now.
        """
        directory = f"{name or kind}-{checksums.digest(identity)}"
        url = filesystem.join(settings.workspace, "runs", directory)
        work = filesystem.join(settings.workspace, "runs", ".work", directory)
        return cls(settings, kind, url, work, time.monotonic() if started is None else started)

    def is_finished(self, verb: str = "") -> bool:
        """Whether this run was published before; if so, a progress line says it.

        Args:
            verb: how to call the job in that line; by default `kind`.
        """
        return already(self.url, verb or self.kind)

    @contextlib.contextmanager
    def session(self, version: str) -> Iterator[None]:
        """Open a Ray session and protect an index version from garbage collection for the duration of the block.

        Args:
            version: "" if the job uses no index.
        """
        with retention.held(self.settings.workspace, version), session.ray_session(self.settings.cluster):
            yield

    def seconds(self) -> dict[str, float]:
        """The time since the job began."""
        return {"total": round(time.monotonic() - self.started, 3)}

    def publish(self, staging: Path, facts: RunFacts) -> None:
        """Publish the staged files with the config, the time taken and these facts, then remove the unfinished work."""
        complete: RunFacts = {"seconds": self.seconds(), **facts}
        artifacts.publish(staging, self.url, self.kind, config=self.settings.model_dump(mode="json"), **complete)
        filesystem.remove(self.work)


def read_manifest(url: str) -> RunManifest:
    """The manifest of a finished run.

    Raises:
        ArtifactError: there is no sound manifest.
    """
    return cast(RunManifest, artifacts.read_manifest(url))


def already(url: str, verb: str) -> bool:
    """Whether an artifact is finished; if so, a progress line says it."""
    finished = artifacts.is_finished(url)
    if finished:
        progress.say(f"{verb}: this run is already finished; nothing to do")
    return finished


def index_version(settings: config.Config) -> tuple[str, dict[str, Any]]:
    """The index version that the whole job uses, and its manifest with `content_id`."""
    version = versions.current_version(settings.workspace)
    opened = versions.read_version(settings.workspace, version)
    return version, {**opened.manifest, "content_id": opened.content_id}


def inputs_identity(
    settings: config.Config, staged: staged_queries.StagedQueries, opened: Mapping[str, Any]
) -> dict[str, Any]:
    """The inputs that a run's identity depends on: its queries and, if it searches, the index and the query encoder."""
    return {
        "format": RUN_FORMAT,
        "queries": staged.fingerprint,
        "index": opened.get("content_id"),
        "tenant": [settings.index.tenant_field, settings.retrieval.tenant],
        "encoder": settings.encoder.model_dump(mode="json", exclude={"model", "query_model"}) if opened else None,
        "query_model": query_model_fingerprint(settings),
        "reranker": _fingerprint(settings.retrieval.reranker if opened else ""),
    }


def query_model_fingerprint(settings: config.Config) -> str:
    """Fingerprint of the encoder for queries if it differs from the one for passages; else ""."""
    return _fingerprint(settings.encoder.query_model)


def _fingerprint(model: str) -> str:
    return weights.resolve(model).fingerprint if model else ""


def index_facts(settings: config.Config, version: str, staged: staged_queries.StagedQueries) -> RunFacts:
    """What the manifest of a run says of its index and queries."""
    return {
        "index_version": version,
        "index_content": versions.read_version(settings.workspace, version).content_id if version else "",
        "input": {"fingerprint": staged.fingerprint, "num_queries": staged.num_queries},
    }


def living_version(workspace: str, manifest: Mapping[str, Any]) -> str:
    """The index version that a run used or, if `gc` has removed it, a later version with the same content.

    A run is identified by the content of its index, and a rollback publishes the same content under a new name.

    Args:
        workspace: of the index.
        manifest: of the run.
    """
    name: str = manifest["index_version"]
    living = versions.list_versions(workspace)
    if not name or name in living:
        return name
    content = manifest.get("index_content")
    same = (each for each in reversed(living) if versions.read_version(workspace, each).content_id == content)
    return next(same, name)


def rate(staged: staged_queries.StagedQueries, summaries: Sequence[stages.Summary]) -> float:
    """Queries per second from the start of the first unit to the end of the last, pauses between resumed runs included."""
    span = max(summary["ended"] for summary in summaries) - min(summary["started"] for summary in summaries)
    return float(round(staged.num_queries / max(span, 1e-9), 3))


def run_over_queries(
    name: str,
    directory: str,
    units: Sequence[dict[str, Any]],
    worker: type,
    arguments: dict[str, Any],
    cluster: config.Cluster,
    *,
    counted: str = "queries",
) -> list[stages.Summary]:
    """Run a stage whose units are ranges of queries in a pool of encoder workers.

    Args:
        name: for progress lines.
        directory: of the stage.
        units: from `staged_queries.units`; one without a range counts as one.
        worker: an actor class that takes one unit at a time.
        arguments: of its constructor.
        cluster: how many workers, and what each reserves.
        counted: what progress lines count.

    Returns:
        The summaries of all units, in their order.
    """

    def transform(dataset: ray.data.Dataset) -> ray.data.Dataset:
        count = min(len(units), session.workers(cluster.encoder_workers, cluster.gpus_per_worker))
        return pool(dataset, worker, count, arguments, session.worker_options(cluster))

    return stages.run_stage(name, directory, units, transform, counted=counted, rows_of=num_queries)


def num_queries(unit: dict[str, Any]) -> int:
    """How many queries a unit of a stage holds; 1 for units that are no range of queries."""
    return int(unit["stop"] - unit["start"]) if "stop" in unit else 1


def pool(
    dataset: ray.data.Dataset, worker: type, count: int, arguments: dict[str, Any], options: dict[str, Any]
) -> ray.data.Dataset:
    """Run a worker class in an autoscaling pool of at most `count` actors."""
    import ray.data

    compute = ray.data.ActorPoolStrategy(
        min_size=1, max_size=max(1, count), initial_size=max(1, count), max_tasks_in_flight_per_actor=1
    )
    return dataset.map_batches(worker, batch_size=1, compute=compute, fn_constructor_kwargs=arguments, **options)


def merged(directory: str, summaries: Iterable[stages.Summary], suffix: str) -> Iterable[pa.Table]:
    """The parts of a stage, one after another, in the order of the queries."""
    for summary in summaries:
        with filesystem.fetched(stages.unit_file(directory, summary["unit"], suffix)) as path:
            table = pq.read_table(path)
        yield table
