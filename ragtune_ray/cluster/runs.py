"""What bulk jobs share: a run directory named by a digest of the job's inputs, stages over queries, and a manifest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, progress
from ragtune_ray.cluster import session, staged_queries, stages
from ragtune_ray.index import retention, versions
from ragtune_ray.models import scripts, weights
from ragtune_ray.storage import artifacts, checksums, filesystem

RUN_FORMAT = 2
"""Part of a run's identity: raise it when a code change makes the same input produce other rows."""


class RunFacts(TypedDict, total=False):
    """The facts in the manifest of a run; each verb writes some of them."""

    # Common
    seconds: dict[str, float]
    input: dict[str, Any]
    """Fingerprint and number of the queries; in `examples`, by split."""
    index_version: str
    """Empty if no index was searched."""
    index_content: str
    queries_per_second: float
    num_rejects: int
    created: str
    rewriting: Mapping[str, Any]
    """What writing the texts for the searches cost: the facts of a run of `rewrite`, and its `path`; absent without one."""
    # rewrite
    method: str
    """Digest of all that the texts depend on except the queries."""
    num_rewritten: int
    num_split: int
    fallbacks: dict[str, int]
    """Reason -> number of texts of the generator that were not usable."""
    prompt_tokens: int
    completion_tokens: int
    # retrieve
    num_hits: int
    num_shards: int
    # answer
    arm: config.Arm
    model: str
    """Fingerprint of the generator."""
    num_answers: int
    statuses: dict[str, int]
    num_cut: int
    """Answers that ended at `generator.max_new_tokens`; absent in older runs."""
    busy_seconds: dict[str, float]
    """Summed over the workers."""
    # evaluate, compare
    runs: dict[config.Arm, str]
    grading: dict[str, dict[str, int]]
    """Metric -> what its grades took; absent without `evaluate.metrics`."""
    evaluated: str
    golden: dict[str, str]
    verdict: dict[str, Any]
    # questions
    num_questions: int
    num_drawn: int
    """Passages, or pairs of them, about which a question was asked for."""
    refused: dict[str, int]
    """Reason -> number of questions thrown out for it, in the order of the filters."""
    malformed_replies: int
    """Replies of another form than the one asked for, also those that a further attempt mended."""
    found: dict[str, int]
    """Kept questions whose document was among `retrieval.top_k` hits, and those that have a document."""
    splits: dict[str, int]
    usage: dict[str, int]
    generator: str
    notice: str
    """What to know before using the result; empty if there is nothing."""
    # examples
    num_train: int
    num_validation: int
    split_record_id: str
    """Identity of the draw in `queries.split_record`, if there is one."""
    kinds: dict[str, int]
    teacher: Mapping[str, Any]


class RunManifest(RunFacts):
    """The manifest of a finished run: its facts, and what `artifacts.publish` adds."""

    format: int
    kind: str
    package_version: str
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Run:
    """A job that publishes one artifact, named by a digest of the job's inputs, so the same job runs only once."""

    settings: config.Config
    kind: str
    url: str
    """Where the finished artifact is published."""
    work: str
    """Directory of unfinished work, from which a killed job resumes."""
    started: float
    """Monotonic time."""

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
            identity: JSON values on which the result depends.
            name: prefix of the directory's name; by default `kind`.
            started: monotonic time when the job began; by default now.
        """
        directory = f"{name or kind}-{checksums.digest(identity)}"
        url = filesystem.join(settings.workspace, "runs", directory)
        work = filesystem.join(settings.workspace, "runs", ".work", directory)
        return cls(settings, kind, url, work, time.monotonic() if started is None else started)

    def is_finished(self, verb: str = "") -> bool:
        """Whether this run is already published; if so, print a progress line that calls it `verb` (by default `kind`)."""
        return say_if_finished(self.url, verb or self.kind)

    @contextlib.contextmanager
    def session(self, version: str) -> Iterator[None]:
        """Open a Ray session and protect an index version ("" for none) from garbage collection during the block."""
        with retention.held(self.settings.workspace, version), session.ray_session(self.settings.cluster):
            yield

    def seconds(self) -> dict[str, float]:
        """Time since the job began, as in manifests."""
        return {"total": round(time.monotonic() - self.started, 3)}

    def publish(self, staging: Path, facts: RunFacts) -> None:
        """Publish the staged files with the config, the duration and these facts, then remove the unfinished work."""
        complete: RunFacts = {"seconds": self.seconds(), **facts}
        artifacts.publish(staging, self.url, self.kind, config=self.settings.model_dump(mode="json"), **complete)
        filesystem.remove(self.work)


def read_manifest(url: str) -> RunManifest:
    """The manifest of a finished run; ArtifactError if it is missing or damaged."""
    return cast(RunManifest, artifacts.read_manifest(url))


def cut_notice(facts: Mapping[str, Any], max_new_tokens: int) -> str:
    """How many answers of a run of `answer` were cut, and which setting to raise; empty if none was."""
    num_cut = facts.get("num_cut", 0)
    if not num_cut:
        return ""
    return (
        f"{num_cut:,} of {facts['num_answers']:,} answers were cut at generator.max_new_tokens={max_new_tokens}; "
        "raise it for longer answers"
    )


def say_if_finished(url: str, verb: str) -> bool:
    """Whether an artifact is finished; if so, print a progress line."""
    finished = artifacts.is_finished(url)
    if finished:
        progress.say(f"{verb}: this run is already finished; nothing to do")
    return finished


def index_version(settings: config.Config) -> tuple[str, dict[str, Any]]:
    """The current index version, and its manifest with `content_id`."""
    name = versions.current_version(settings.workspace)
    version = versions.read_version(settings.workspace, name)
    return name, {**version.manifest, "content_id": version.content_id}


def inputs_identity(
    settings: config.Config, staged: staged_queries.StagedQueries, index_manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of a run's identity for its queries and, if it searches, the index (`index_manifest`) and the query encoder."""
    return {
        "format": RUN_FORMAT,
        "queries": staged.fingerprint,
        **({"own_documents": "left out"} if staged.stand_in_corpus and index_manifest else {}),
        "index": index_manifest.get("content_id"),
        "tenant": [settings.index.tenant_field, settings.retrieval.tenant],
        "encoder": encoder_identity(settings) if index_manifest else None,
        "query_model": query_model_fingerprint(settings),
        "reranker": _fingerprint(settings.retrieval.reranker if index_manifest else ""),
    }


def encoder_identity(settings: config.Config) -> dict[str, Any]:
    """The part of a run's identity for the encoder's settings; `query_model_fingerprint` and the index identify the models."""
    searches_vectors = settings.retrieval.mode != "lexical"
    directory = weights.resolve(settings.encoder.model).directory if searches_vectors else None
    return weights.with_prompts(settings.encoder, directory).model_dump(mode="json", exclude={"model", "query_model"})


def retrieval_identity(
    settings: config.Config, index_manifest: Mapping[str, Any], num_follow_ups: int = 0, rewriting: str = ""
) -> dict[str, Any]:
    """The part of a run's identity for how hits are ranked.

    Args:
        settings: the whole config.
        index_manifest: of the index version.
        num_follow_ups: queries with a conversation before them; without any, `retrieval.rewrite` changes nothing.
        rewriting: the run of `rewrite` that wrote the texts for the searches; empty: none.
    """
    unknown = scripts.unknown_scripts(index_manifest.get("scripts", {})) if settings.retrieval.fuses_scores else ()
    identity = settings.retrieval.identity()
    if not num_follow_ups:
        identity.pop("rewrite", None)
    return {
        **identity,
        **({"unknown_scripts": sorted(unknown)} if unknown else {}),
        **({"rewriting": rewriting.rpartition("/")[2]} if rewriting else {}),
    }


def generator_fingerprint(settings: config.Generator) -> str:
    """Digest of the generator's files, or the URL of its server and the model's name there."""
    match settings.engine:
        case "transformers" | "vllm":
            return weights.resolve(settings.model).fingerprint
        case "openai":
            return f"{settings.base_url}#{settings.model}"


def query_model_fingerprint(settings: config.Config) -> str:
    """Fingerprint of `encoder.query_model`, or "" if queries and passages share one encoder."""
    return _fingerprint(settings.encoder.query_model)


def _fingerprint(model: str) -> str:
    return weights.resolve(model).fingerprint if model else ""


def index_facts(settings: config.Config, version: str, staged: staged_queries.StagedQueries) -> RunFacts:
    """The facts about the index and the queries in a run's manifest."""
    return {
        "index_version": version,
        "index_content": versions.read_version(settings.workspace, version).content_id if version else "",
        "input": {"fingerprint": staged.fingerprint, "num_queries": staged.num_queries},
    }


def living_version(workspace: str, manifest: Mapping[str, Any]) -> str:
    """The index version that a run used or, if `gc` has removed it, the latest version with the same content.

    After a rollback, the same content has a new version name, and a finished run of the old name is reused.
    """
    name: str = manifest["index_version"]
    living = versions.list_versions(workspace)
    if not name or name in living:
        return name
    content = manifest.get("index_content")
    same = (each for each in reversed(living) if versions.read_version(workspace, each).content_id == content)
    return next(same, name)


def rate(staged: staged_queries.StagedQueries, *phases: Sequence[stages.Summary]) -> float:
    """Queries per second of phases that followed each other, each from the start of its first unit to the end of its last.

    Pauses between resumed runs count, loading the models between two phases does not.
    """
    spans = (
        max(summary["ended"] for summary in phase) - min(summary["started"] for summary in phase)
        for phase in phases
        if phase
    )
    return float(round(staged.num_queries / max(sum(spans), 1e-9), 3))


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
    """Run a stage over ranges of queries in a pool of actors, and return the summaries of all units, in order.

    Args:
        name: for progress lines.
        directory: of the stage.
        units: from `staged_queries.units`.
        worker: a `stages.UnitWorker`.
        arguments: of its constructor.
        cluster: number and resources of the actors.
        counted: what progress lines count.
    """
    pool = session.pool(worker, arguments, cluster.encoder_workers, cluster)
    return stages.run_stage(name, directory, units, stages.on_actors(pool), counted=counted, rows_of=num_queries)


def num_queries(unit: dict[str, Any]) -> int:
    """Number of queries in a unit of a stage; 1 if the unit is not a range of queries."""
    return int(unit["stop"] - unit["start"]) if "stop" in unit else 1


def merged(directory: str, summaries: Iterable[stages.Summary], suffix: str) -> Iterable[pa.Table]:
    """The tables that the units of a stage wrote, one at a time, in order."""
    for summary in summaries:
        with filesystem.fetched(stages.unit_file(directory, summary["unit"], suffix)) as path:
            table = pq.read_table(path)
        yield table
