"""A bulk job's run directory: what identifies it, where it stands, what its manifest says.

In: a config and its staged queries. Out: names, facts, and the parts of a stage in order. This module knows nothing of what the
rows of a run are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress
from ragtune_ray.cluster import staged_queries, stages
from ragtune_ray.index import versions
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem

if TYPE_CHECKING:
    import ray.data

__all__ = [
    "already",
    "common",
    "facts",
    "index_version",
    "living_version",
    "merged",
    "places",
    "pool",
    "query_model_fingerprint",
    "rate",
]

RUN_FORMAT = 2
"""Part of a run's identity: raise it when the same input would give other rows."""


def index_version(settings: config.Config) -> tuple[str, dict[str, Any]]:
    """The version that the whole job uses, and its manifest."""
    version = versions.current_version(settings.workspace)
    opened = versions.read_version(settings.workspace, version)
    return version, {**opened.manifest, "content_id": opened.content_id}


def common(settings: config.Config, staged: staged_queries.StagedQueries, opened: dict[str, Any]) -> dict[str, Any]:
    """What every run depends on: the queries and, where one is used, the index and how queries are encoded."""
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
    """What identifies the encoder of queries where it is another than that of passages; else ""."""
    return _fingerprint(settings.encoder.query_model)


def _fingerprint(model: str) -> str:
    return weights.resolve(model).fingerprint if model else ""


def places(settings: config.Config, name: str) -> tuple[str, str]:
    """Where the finished run stands, and where it is worked on."""
    return (
        filesystem.join(settings.workspace, "runs", name),
        filesystem.join(settings.workspace, "runs", ".work", name),
    )


def already(url: str, verb: str) -> bool:
    """Whether the run is finished; says so if it is."""
    finished = artifacts.is_finished(url)
    if finished:
        progress.say(f"{verb}: this run is already finished; nothing to do")
    return finished


def facts(
    settings: config.Config, version: str, staged: staged_queries.StagedQueries, started: float
) -> dict[str, Any]:
    """What the manifest of every run says."""
    return {
        "config": settings.model_dump(mode="json"),
        "index_version": version,
        "index_content": versions.read_version(settings.workspace, version).content_id if version else "",
        "input": {"fingerprint": staged.fingerprint, "num_queries": staged.num_queries},
        "seconds": {"total": round(time.monotonic() - started, 3)},
    }


def living_version(workspace: str, manifest: Mapping[str, Any]) -> str:
    """The version that a run was made on or, where `gc` has taken that, a later one of the same content.

    A run is known by the content of its index, and a rollback gives one content several names.

    Args:
        workspace: whose index it is.
        manifest: of the run.
    """
    name: str = manifest["index_version"]
    living = versions.list_versions(workspace)
    if not name or name in living:
        return name
    wanted = manifest.get("index_content")
    alike = (each for each in reversed(living) if versions.read_version(workspace, each).content_id == wanted)
    return next(alike, name)


def rate(staged: staged_queries.StagedQueries, summaries: Sequence[dict[str, Any]]) -> float:
    """Queries per second from the first unit's start to the last one's end; the gaps between resumed runs count too."""
    span = max(summary["ended"] for summary in summaries) - min(summary["started"] for summary in summaries)
    return float(round(staged.num_queries / max(span, 1e-9), 3))


def pool(
    dataset: ray.data.Dataset, worker: type, count: int, arguments: dict[str, Any], options: dict[str, Any]
) -> ray.data.Dataset:
    """Run a unit's worker class in an autoscaling pool of at most `count` actors."""
    import ray.data

    compute = ray.data.ActorPoolStrategy(
        min_size=1, max_size=max(1, count), initial_size=max(1, count), max_tasks_in_flight_per_actor=1
    )
    return dataset.map_batches(worker, batch_size=1, compute=compute, fn_constructor_kwargs=arguments, **options)


def merged(directory: str, summaries: Iterable[dict[str, Any]], suffix: str) -> Iterable[pa.Table]:
    """The parts of a stage, one after another, in the order of the queries."""
    for summary in summaries:
        with filesystem.fetched(stages.unit_file(directory, summary["unit"], suffix)) as path:
            table = pq.read_table(path)
        yield table
