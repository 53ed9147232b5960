"""Ray Data: documents -> passages -> embeddings -> index version.

In: a config that names a corpus and an encoder. Out: a new version of the workspace's index. Three stages, each resumable
unit by unit, so that a killed worker or driver costs only what was under way:

    read     one unit per stretch of input: documents are read, cleaned and cut into passages
    embed    one unit per `encoder.unit_passages`, in a pool of encoder actors
    segment  one unit per `index.segment_passages`: FAISS and BM25 are built, the segment is published

Then the version manifest is published and CURRENT moves. Units depend on the input and the config alone, never on workers
or time, so an interrupted build ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ragtune_ray import config, index, models, planning, progress, schema, segments, storage
from ragtune_ray.cluster import embedding, reading, session, stages

if TYPE_CHECKING:
    import ray.data

__all__ = ["build_index"]

INDEX_FORMAT = 1
"""Part of a build's identity: raise it when the same input would give other segment files."""

logger = logging.getLogger(__name__)


class CorpusError(ValueError):
    """The corpus cannot be indexed as it is; the message names the document or the reject and the next step."""


def build_index(settings: config.Config) -> Path | str:
    """Index the corpus: publish a new version, or return the one that already holds exactly this corpus and config.

    Args:
        settings: workspace, corpus, chunking, encoder, index, cluster and seed are used.

    Returns:
        The version's directory.

    Raises:
        inputs.InputError: the corpus cannot be read at all.
        CorpusError: two documents share an id, or `corpus.strict` met a reject, or nothing was left to index.
        models.ModelError: the encoder cannot be had.
        stages.StageError: a stage failed.
    """
    if not settings.corpus.path:
        raise config.ConfigError("corpus.path is empty; name a folder or file of documents")
    started = time.monotonic()
    plan = planning.plan_units(settings.corpus.path, settings.corpus.unit_bytes)
    encoder = models.resolve(settings.encoder.model)
    build_id = _build_id(settings, plan, encoder)
    published = _published(settings.workspace, build_id)
    if published is not None:
        progress.say(f"index: version {published} already holds this corpus; nothing to do")
        return segments.version_url(settings.workspace, published)
    build = storage.join(settings.workspace, "index", "building", build_id)
    seconds: dict[str, float] = {}
    with session.ray_session(settings.cluster):
        count = session.workers(settings.cluster.encoder_workers, settings.cluster.gpus_per_worker)
        parts = _timed(seconds, "read", lambda: reading.read_stage(settings, plan, build))
        blocks = _timed(seconds, "embed", lambda: embedding.embed_stage(settings, build, parts))
        num_vectors = sum(block["rows"] for block in blocks)
        rejects = [*parts.rejects, *(schema.Reject(**reject) for block in blocks for reject in block["rejects"])]
        _refuse(settings, rejects, num_vectors)
        kind = index.choose_kind(settings.index.kind, num_vectors)
        segment_ids = _timed(seconds, "segment", lambda: _segment_stage(settings, build, build_id, blocks, kind))
    version = segments.publish_version(
        settings.workspace,
        segment_ids,
        {"rejects.jsonl": schema.reject_lines(rejects)},
        build_id=build_id,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        config=settings.model_dump(mode="json"),
        encoder={
            "model": settings.encoder.model,
            "fingerprint": blocks[0]["encoder"],
            "dimension": blocks[0]["dimension"],
        },
        index_kind=kind,
        language=settings.index.language,
        input={"num_files": len(plan.files), "fingerprint": _input_fingerprint(plan)},
        num_documents=parts.num_documents,
        num_passages=num_vectors,
        num_rejects=dict(sorted(Counter(reject.kind for reject in rejects).items())),
        encoding={
            "workers": count,
            "busy_seconds": round(sum(block["seconds"] for block in blocks), 3),
        },
        seconds={name: round(value, 3) for name, value in seconds.items()}
        | {"total": round(time.monotonic() - started, 3)},
    )
    storage.remove(build)
    _summarize(version, parts.num_documents, num_vectors, rejects)
    return segments.version_url(settings.workspace, version)


def _build_id(settings: config.Config, plan: planning.Plan, encoder: models.Model) -> str:
    """What the segments depend on; the place of the files, the cluster and the time do not belong to it."""
    return storage.digest(
        {
            "format": INDEX_FORMAT,
            "input": _input_fingerprint(plan),
            "corpus": settings.corpus.model_dump(mode="json", exclude={"path", "strict"}),
            "chunking": settings.chunking.model_dump(mode="json"),
            "encoder": settings.encoder.model_dump(mode="json", exclude={"model"})
            | {"fingerprint": encoder.fingerprint},
            "index": settings.index.model_dump(mode="json"),
            "seed": settings.seed,
        }
    )


def _input_fingerprint(plan: planning.Plan) -> str:
    """Of the files' contents and their paths below the corpus folder, since those are in the ids of documents."""
    root = plan.units[0].root.rstrip("/") + "/" if plan.units else ""
    return storage.digest(
        [[file.path.removeprefix(root), file.size_bytes, file.sha256] for file in plan.files]
        + [[u.format, [path.removeprefix(root) for path in u.paths], u.start, u.stop] for u in plan.units]
    )


def _published(workspace: str, build_id: str) -> str | None:
    """The current version if this build made it, else any version it made (then made current again), else None."""
    versions = segments.list_versions(workspace)
    made = [v for v in versions if storage.read_manifest(segments.version_url(workspace, v))["build_id"] == build_id]
    if not made:
        return None
    try:
        current: str | None = segments.current_version(workspace)
    except storage.ArtifactError:
        current = None
    if current in made:
        return current
    segments.set_current(workspace, made[-1])
    return made[-1]


def _timed(seconds: dict[str, float], name: str, work: Any) -> Any:
    started = time.monotonic()
    result = work()
    seconds[name] = time.monotonic() - started
    return result


def _refuse(settings: config.Config, rejects: list[schema.Reject], num_vectors: int) -> None:
    first = f"the first: {rejects[0].place}: {rejects[0].reason}" if rejects else ""
    if rejects and settings.corpus.strict:
        raise CorpusError(f"corpus.strict: {len(rejects)} inputs were rejected; {first}")
    if not num_vectors:
        raise CorpusError(
            f"{settings.corpus.path}: nothing was left to index, {len(rejects)} inputs were rejected; {first}"
        )


def _summarize(version: str, num_documents: int, num_passages: int, rejects: list[schema.Reject]) -> None:
    rejected = f", {len(rejects):,} rejected (rejects.jsonl)" if rejects else ""
    progress.say(f"index: version {version}: {num_documents:,} documents, {num_passages:,} passages{rejected}")


def _segment_stage(
    settings: config.Config, build: str, build_id: str, blocks: list[dict[str, Any]], kind: index.ConcreteKind
) -> list[str]:
    """Build and publish the segments in parallel from one trained structure; their ids, in the order of the passages."""
    _train(settings, build, blocks, kind)
    units = [
        {"unit": number, "segment_id": storage.digest([build_id, number]), "blocks": group}
        for number, group in enumerate(_grouped(blocks, settings.index.segment_passages))
    ]

    def transform(dataset: ray.data.Dataset) -> ray.data.Dataset:
        import ray.data

        return dataset.map_batches(
            _build_segments,
            batch_size=1,
            compute=ray.data.TaskPoolStrategy(),
            num_cpus=1,
            fn_kwargs={"workspace": settings.workspace, "build": build, "language": settings.index.language},
        )

    stages.run_stage(
        "segment",
        storage.join(build, "segment"),
        units,
        transform,
        counted="passages",
        rows_of=lambda unit: sum(block["rows"] for block in unit["blocks"]),
    )
    return [str(unit["segment_id"]) for unit in units]


def _grouped(blocks: list[dict[str, Any]], segment_passages: int) -> Iterator[list[dict[str, Any]]]:
    """Consecutive blocks, about `segment_passages` rows to a group."""
    group: list[dict[str, Any]] = []
    for block in blocks:
        if group and sum(each["rows"] for each in group) + block["rows"] > segment_passages:
            yield group
            group = []
        group.append({name: block[name] for name in ("unit", "part", "row_group", "rows")})
    if group:
        yield group


def _train(settings: config.Config, build: str, blocks: list[dict[str, Any]], kind: index.ConcreteKind) -> None:
    """Train the structure once, on a sample of all blocks, as a task of its own: the driver never holds vectors."""
    target = storage.join(build, "trained.faiss")
    if storage.exists(target):
        return
    import ray

    # Blocks of the corpus travel by name, not by value: the task reads what it samples.
    ray.get(ray.remote(num_cpus=1)(_train_task).remote(build, blocks, kind, settings.seed))


def _train_task(build: str, blocks: list[dict[str, Any]], kind: index.ConcreteKind, seed: int) -> None:
    num_vectors = sum(block["rows"] for block in blocks)
    wanted = index.training_sample_size(kind, num_vectors)
    chosen = np.sort(np.random.default_rng(seed).choice(num_vectors, wanted, replace=False))
    samples = [np.empty((0, blocks[0]["dimension"]), dtype=np.float32)]
    first = 0
    for block in blocks:
        rows = chosen[(chosen >= first) & (chosen < first + block["rows"])] - first
        first += block["rows"]
        if len(rows):
            samples.append(embedding.read_block(build, block)[1][rows])
    trained = index.train(kind, blocks[0]["dimension"], num_vectors, np.concatenate(samples), seed)
    with tempfile.TemporaryDirectory(prefix="ragtune-train-") as temporary:
        index.save(trained, Path(temporary) / "trained.faiss")
        storage.commit_file(Path(temporary) / "trained.faiss", storage.join(build, "trained.faiss"))


def _build_segments(batch: dict[str, np.ndarray], workspace: str, build: str, language: str) -> dict[str, list[str]]:
    return {"summary": [_build_segment(json.loads(unit), workspace, build, language) for unit in batch["unit"]]}


def _build_segment(unit: dict[str, Any], workspace: str, build: str, language: str) -> str:
    url = segments.segment_url(workspace, unit["segment_id"])
    if not storage.is_finished(url):
        tables, vectors = zip(*(embedding.read_block(build, block) for block in unit["blocks"]), strict=True)
        passages = pa.concat_tables(tables)
        trained = index.load(storage.local_copy(build, ["trained.faiss"], storage.digest(build)) / "trained.faiss")
        staging = storage.stage(url, scratch=storage.join(build, "staging"))
        segments.write_segment(staging, passages, np.concatenate(vectors), trained, language)
        storage.publish(staging, url, "segment", num_passages=passages.num_rows)
    return stages.commit_unit(storage.join(build, "segment"), unit["unit"], {}, segment_id=unit["segment_id"])
