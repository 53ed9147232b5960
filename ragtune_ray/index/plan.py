"""Estimates what indexing a corpus would take (passages, bytes, time and money) without building an index.

In: a config that names a corpus and an encoder. Out: an artifact `runs/plan-CORPUS-SETTINGS` with `plan.json`.

The estimates extrapolate from a `probe` of about 200 documents. Times assume cores like this machine's, and divide the work
by the number of workers. The time to compare a vector with the inverted lists grows with the index, so that part is counted
in inner products of measured cost. Writing files and network transfers are not included.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, get_args

from ragtune_ray import config, progress
from ragtune_ray.index import faiss_index, versions
from ragtune_ray.index.probe import Probe, probe, totals
from ragtune_ray.ingest import input_units
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, checksums, filesystem

PLAN_FORMAT = 1
"""Part of a plan's identity: raise it when the same input would lead to other numbers."""
RAY_START_SECONDS = 10.0
"""Start of a local Ray and the workers of its stages, measured on two busy cores."""
PQ_CENTROIDS, PQ_ITERATIONS = 256, 25
GIBIBYTE = 2**30


def planned_for(workspace: str, corpus: str) -> versions.PlannedFacts | None:
    """Return the totals of a workspace's newest sound plan of a corpus (`versions.planned_corpus_id`), or None."""
    runs = filesystem.join(workspace, "runs")
    found = []
    for name in filesystem.list_names(runs):
        if name.startswith(f"plan-{corpus}-"):
            with contextlib.suppress(artifacts.ArtifactError):
                found.append(artifacts.read_manifest(filesystem.join(runs, name)))
    newest = max(found, key=lambda manifest: str(manifest["created"]), default=None)
    return newest["planned"] if newest else None


def outcome_line(planned: versions.PlannedFacts, manifest: versions.IndexManifest, num_embedded: int) -> str:
    """Return a line that compares a plan with the published version, for which `num_embedded` passages were new."""
    actual = manifest["num_passages"]
    new = "" if num_embedded >= actual else f" ({num_embedded:,} of them new)"
    return (
        f"index: planned {planned['passages']:,} passages in {progress.duration(planned['seconds'])}, "
        f"actual {actual:,}{new} in {progress.duration(manifest['seconds']['total'])}"
    )


def plan_index(settings: config.Config) -> str:
    """Probe the corpus and publish a plan, unless there is one for the same input and settings; return its directory.

    Raises:
        ConfigError: `corpus.path` is empty.
        InputError: the corpus cannot be read.
        PlanError: the probe found no document.
        ModelError: the encoder is not available.
    """
    if not settings.corpus.path:
        raise config.ConfigError("corpus.path is empty; name a folder or file of documents")
    started = time.monotonic()
    plan = input_units.plan_units(
        settings.corpus.path, settings.corpus.unit_bytes, fingerprint=settings.corpus.fingerprint
    )
    plan_seconds = time.monotonic() - started
    corpus = versions.planned_corpus_id(settings, plan, weights.resolve(settings.encoder.model))
    sections = ["seed", "corpus", "encoder", "index", "cluster", "prices"]
    rest = [PLAN_FORMAT, _cores(), settings.model_dump(mode="json", include=set(sections))]
    url = filesystem.join(settings.workspace, "runs", f"plan-{corpus}-{checksums.digest(rest)[:8]}")
    if artifacts.is_finished(url):
        progress.say("plan: this plan is already finished; nothing to do")
        return url
    estimated = estimate(settings, plan, probe(settings, plan), plan_seconds)
    staging = artifacts.stage(url)
    (staging / "plan.json").write_text(json.dumps(estimated, ensure_ascii=False, indent=1), encoding="utf-8")
    planned: versions.PlannedFacts = {
        "documents": estimated["documents"]["value"],
        "passages": estimated["passages"]["value"],
        "seconds": estimated["seconds"]["total"],
        "disk_bytes": estimated["disk"]["index"],
    }
    created = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    dumped = settings.model_dump(mode="json")
    artifacts.publish(staging, url, "plan", corpus_id=corpus, created=created, planned=planned, config=dumped)
    return url


def read_plan(url: str) -> dict[str, Any]:
    """Read the estimates of a plan, from the directory that `plan_index` returned."""
    path = artifacts.open_artifact(url, "plan").path
    found: dict[str, Any] = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    return found


def estimate(settings: config.Config, plan: input_units.Plan, measured: Probe, plan_seconds: float) -> dict[str, Any]:
    """Estimate what indexing the whole corpus would take, as JSON values; `plan_seconds` is the time to plan its units."""
    found_totals = totals(measured.pieces, measured.sizes, settings.seed)
    count = int(found_totals["passages"]["value"])
    chosen = settings.index
    kind = measured.kind
    workers, workers_from = _workers(settings.cluster)
    sizes = _bytes(measured, count)
    disk = _disk(settings, kind, measured.dimension, count, sizes)
    num_segments = max(1, math.ceil(count / chosen.segment_passages))
    segment_bytes = disk["index"] / num_segments
    units = {
        "read": len(plan.units),
        "embed": len(plan.units),
        "segment": num_segments,
    }
    seconds = _seconds(measured, found_totals, {name: max(1, min(workers, many)) for name, many in units.items()})
    seconds = {"plan": round(plan_seconds, 3), **seconds}
    seconds["total"] = round(sum(seconds.values()), 3)
    found = {
        "corpus": _corpus(settings, plan),
        "probe": _described(measured),
        **{name: found_totals[name] for name in ("documents", "passages")},
        "characters_per_passage": round(measured.passage_characters, 1),
        "bytes": sizes,
        "kinds": {each: _footprint(each, measured.dimension, count) for each in get_args(faiss_index.ConcreteKind)},
        "auto_kind": faiss_index.choose_kind("auto", count, measured.dimension, chosen.memory_bytes),
        "kind": kind,
        "num_segments": num_segments,
        "num_shards": math.ceil(num_segments / max(1, int(settings.cluster.shard_bytes // max(1.0, segment_bytes)))),
        "workers": {"count": workers, "from": workers_from, "gpus_each": settings.cluster.gpus_per_worker},
        "seconds": seconds,
        "disk": disk,
        "cost": costs(settings, workers, seconds["total"], disk["index"]),
    }
    return {**found, "warnings": _warnings(settings, measured, found)}


def _corpus(settings: config.Config, plan: input_units.Plan) -> dict[str, Any]:
    return {
        "path": settings.corpus.path,
        "num_files": len(plan.files),
        "bytes": plan.size_bytes,
        "num_units": len(plan.units),
        "num_rejected_files": len(plan.rejects),
    }


def _bytes(measured: Probe, count: int) -> dict[str, int]:
    # A vocabulary grows roughly with the square root of its text (Heaps 1978).
    words = measured.vocabulary_bytes * math.sqrt(max(1.0, count / measured.num_passages))
    return {
        "text": round(measured.text_bytes * count),
        "postings": round(measured.postings_bytes * count + words),
        "vectors": 4 * measured.dimension * count,
    }


def _footprint(kind: faiss_index.ConcreteKind, dimension: int, count: int) -> dict[str, int]:
    each = faiss_index.footprint(kind, dimension)
    return {"memory_bytes": round(each.memory_bytes * count), "disk_bytes": round(each.disk_bytes * count)}


def _disk(
    settings: config.Config, kind: faiss_index.ConcreteKind, dimension: int, count: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the bytes on disk during and after the build, and the free bytes."""
    finished = _footprint(kind, dimension, count)["disk_bytes"] + sizes["text"] + sizes["postings"]
    embedded = sizes["vectors"] + 8 * count
    return {
        "parts": sizes["text"],
        "embedded": embedded,
        "index": finished,
        "needed": sizes["text"] + embedded + finished,
        "free": filesystem.free_bytes(settings.workspace),
    }


def _seconds(measured: Probe, totals: Mapping[str, Mapping[str, Any]], workers: Mapping[str, int]) -> dict[str, float]:
    """Return the seconds per stage: its work divided by the workers that can share it."""
    count = int(totals["passages"]["value"])
    alone, shared = _products(measured.kind, count)
    add_seconds = measured.add_seconds
    if measured.kind == "hnsw":  # the path to a vector's neighbours grows logarithmically
        add_seconds *= max(1.0, math.log(max(2, count)) / math.log(max(2, measured.num_vectors)))
    segment = count * (measured.lexical_seconds + add_seconds) + shared * measured.product_seconds
    seconds = {
        "start": RAY_START_SECONDS + measured.load_seconds,
        "read": totals["characters"]["value"] * measured.read_seconds / workers["read"],
        "embed": count * measured.embed_seconds / workers["embed"],
        "segment": alone * measured.product_seconds + segment / workers["segment"],
    }
    return {name: round(value, 3) for name, value in seconds.items()}


def _products(kind: faiss_index.ConcreteKind, count: int) -> tuple[float, float]:
    """Return the inner products to train a structure (one task) and to assign vectors to lists (parallel)."""
    if kind in {"flat", "hnsw"} or count < 1:
        return 0.0, 0.0
    lists, drawn = faiss_index.num_lists(count), faiss_index.training_sample_size(kind, count)
    if lists <= faiss_index.PLAIN_KMEANS_LISTS:
        training = float(drawn * lists * faiss_index.TRAINING_ITERATIONS)
    else:
        top = math.isqrt(lists)
        upper = min(drawn, top * faiss_index.TOP_LEVEL_SAMPLE) * top * faiss_index.TRAINING_ITERATIONS + drawn * top
        training = upper + drawn * lists / top * faiss_index.TRAINING_ITERATIONS
    if kind == "ivf_pq":  # the quantizers of all codes together compute whole inner products
        training += min(drawn, PQ_CENTROIDS * PQ_CENTROIDS) * PQ_CENTROIDS * PQ_ITERATIONS
        return training, float(count) * (lists + PQ_CENTROIDS)
    return training, float(count) * lists


def costs(settings: config.Config, workers: int, total_seconds: float, index_bytes: int) -> dict[str, Any]:
    """Return the hours of the workers, and what they and the index's storage cost; None if a price is not set."""
    prices = settings.prices
    core_hours = workers * total_seconds / 3600
    gpu_hours = core_hours * settings.cluster.gpus_per_worker
    is_priced = prices.core_hour > 0 and (prices.gpu_hour > 0 or gpu_hours == 0)
    stored = index_bytes / GIBIBYTE * prices.gibibyte_month
    return {
        "core_hours": core_hours,
        "gpu_hours": gpu_hours,
        "compute": core_hours * prices.core_hour + gpu_hours * prices.gpu_hour if is_priced else None,
        "storage_month": stored if prices.gibibyte_month > 0 else None,
        "currency": prices.currency,
    }


def _described(measured: Probe) -> dict[str, Any]:
    """Describe the probe; rates are per second and worker."""
    documents = sum(piece.documents for piece in measured.pieces)
    probed = sum(piece.size for piece in measured.pieces)
    return {
        "documents": documents,
        "passages": measured.num_passages,
        "rejects": len(measured.rejects),
        "first_reject": f"{measured.rejects[0].place}: {measured.rejects[0].reason}" if measured.rejects else "",
        "is_whole": probed >= sum(measured.sizes.values()) * (1 - 1e-9),
        "device": measured.device,
        "dimension": measured.dimension,
        "characters_per_second": round(1 / max(measured.read_seconds, 1e-12)),
        "embedded_per_second": round(1 / max(measured.embed_seconds, 1e-12), 1),
        "lexical_per_second": round(1 / max(measured.lexical_seconds, 1e-12), 1),
        "added_per_second": round(1 / max(measured.add_seconds, 1e-12), 1),
    }


def _warnings(settings: config.Config, measured: Probe, found: Mapping[str, Any]) -> list[str]:
    warnings = []
    disk = found["disk"]
    if disk["free"] is not None and disk["free"] < disk["needed"]:
        warnings.append(
            f"the disk of workspace {settings.workspace} has {disk['free']:,} bytes free, but the build needs about "
            f"{disk['needed']:,}; free some space, or set another workspace"
        )
    if found["kinds"][found["kind"]]["memory_bytes"] > settings.index.memory_bytes:
        warnings.append(
            f"index.kind {found['kind']} needs more memory than index.memory_bytes ({settings.index.memory_bytes:,}); auto "
            f"would choose {found['auto_kind']}"
        )
    if found["corpus"]["num_rejected_files"]:
        warnings.append(f"{found['corpus']['num_rejected_files']:,} files cannot be read and are left out")
    if measured.rejects:
        first = found["probe"]["first_reject"]
        warnings.append(f"{len(measured.rejects):,} probed inputs are rejected; the first: {first}")
    if settings.cluster.gpus_per_worker and measured.device == "cpu":
        warnings.append("cluster.gpus_per_worker asks for GPUs, but the probe ran on a CPU; embedding will be faster")
    return warnings


def _workers(settings: config.Cluster) -> tuple[int, str]:
    """Return the number of workers of a build on a machine like this, and where the number comes from."""
    if settings.encoder_workers:
        return settings.encoder_workers, "cluster.encoder_workers"
    torch = sys.modules.get("torch")
    if settings.gpus_per_worker and torch is not None and torch.cuda.is_available():
        return max(1, int(torch.cuda.device_count() / settings.gpus_per_worker)), "the GPUs of this machine"
    return _cores(), "the cores of this machine"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
