"""What indexing a corpus would take: documents, passages, bytes, time and money, from a probe of some of it.

In: a config that names a corpus and an encoder. Out: an artifact `runs/plan-CORPUS-SETTINGS` with `plan.json`; nothing of an
index is built. About 200 documents, spread over the input, are read, chunked, embedded and indexed in this process on one thread;
totals are ratios to what is known exactly of the whole (files, bytes of lines, rows), with a bootstrap interval over the pieces
that were read. This module knows nothing of Ray.

Times are those of this machine's cores, work divided by workers. What is searched among inverted lists grows with the index, so
that part is counted in inner products, whose cost is measured. Writing files and a network are not in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ragtune_ray import chunking, config, index, inputs, lexical, models, planning, progress, readers, schema, storage

if TYPE_CHECKING:
    from ragtune_ray.encoder import Encoder, TokenCounter

__all__ = [
    "ForecastError",
    "Piece",
    "Probe",
    "comparison",
    "corpus_id",
    "costs",
    "estimate",
    "plan_index",
    "planned_for",
    "probe",
    "read_plan",
]

PLAN_FORMAT = 1
"""Part of a plan's identity: raise it when the same input would give other numbers."""
PROBE_DOCUMENTS = 200
PROBE_CHARACTERS = 8 * 2**20
"""Once so much is read the probe ends, whatever the number of documents."""
PROBE_PASSAGES = 512
"""Passages that are embedded and indexed."""
FEWEST_PIECES = 4
HEAD_CHARACTERS = 2**18
"""Of a longer document only the head is chunked, and the rest taken to be alike."""
LINES_AT_ONCE, ROWS_AT_ONCE = 5, 25
RESAMPLES, CONFIDENCE = 1_000, 0.95
RAY_START_SECONDS = 10.0
"""A local Ray, and the workers of its stages; measured on two busy cores."""
PQ_CENTROIDS, PQ_ITERATIONS = 256, 25
GIBIBYTE = 2**30

Read = tuple[str, float, list[schema.Document]]
"""Format and size of a stretch of the input, and its documents."""


class ForecastError(ValueError):
    """Nothing can be said of this corpus; the message names what was read and the next step."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the input that was read: how large it is in what is known of the whole, and what was in it."""

    stratum: str
    """Format of the input it stands for."""
    size: float
    """Files, bytes of lines (jsonl) or rows (parquet, squad)."""
    documents: int
    passages: float
    characters: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured on a part of the corpus, on one thread."""

    pieces: tuple[Piece, ...]
    sizes: Mapping[str, float]
    """Per format, the size of the whole input."""
    num_passages: int
    """That were embedded and indexed."""
    rejects: tuple[schema.Reject, ...]
    dimension: int
    device: str
    passage_characters: float
    text_bytes: float
    """Per passage: its row as it is stored, ids, title and metadata included."""
    postings_bytes: float
    """Per passage, the vocabulary not counted."""
    vocabulary_bytes: float
    """Of all words of the probe."""
    load_seconds: float
    """Until the encoder is loaded."""
    read_seconds: float
    """Per character: read and chunked."""
    embed_seconds: float
    """Per passage."""
    lexical_seconds: float
    """Per passage."""
    kind: index.ConcreteKind
    """That the whole index will have."""
    add_seconds: float
    """Per passage, into a structure of this kind (of ivf_sq for ivf_pq) as small as the probe."""
    product_seconds: float
    """Per inner product of two vectors."""


def corpus_id(settings: config.Config, plan: planning.Plan, encoder: models.Model) -> str:
    """Equal where the same input gives the same passages, vectors and kind of index, so that a plan and a build compare."""
    return storage.digest(
        {
            "input": planning.input_fingerprint(plan),
            "max_document_bytes": settings.corpus.max_document_bytes,
            "chunking": settings.chunking.model_dump(mode="json"),
            "encoder": [encoder.fingerprint, settings.encoder.query_prefix, settings.encoder.passage_prefix],
            "index": [settings.index.kind, settings.index.language],
        }
    )


def planned_for(workspace: str, corpus: str) -> dict[str, Any] | None:
    """The newest plan of this corpus: its `documents`, `passages`, `seconds` and `disk_bytes`; None: there is no sound one.

    Args:
        workspace: where plans stand.
        corpus: from `corpus_id`.
    """
    runs = storage.join(workspace, "runs")
    found = []
    for name in storage.list_names(runs):
        if name.startswith(f"plan-{corpus}-"):
            with contextlib.suppress(storage.ArtifactError):
                found.append(storage.read_manifest(storage.join(runs, name)))
    newest = max(found, key=lambda manifest: str(manifest["created"]), default=None)
    return dict(newest["planned"]) if newest else None


def comparison(planned: Mapping[str, Any], manifest: Mapping[str, Any], num_embedded: int) -> str:
    """One line that puts what was planned beside what happened.

    Args:
        planned: from `planned_for`.
        manifest: of the published version.
        num_embedded: passages that were new to the index.
    """
    were = int(manifest["num_passages"])
    new = "" if num_embedded >= were else f" ({num_embedded:,} of them new)"
    return (
        f"index: planned {planned['passages']:,} passages in {progress.duration(planned['seconds'])}, "
        f"were {were:,}{new} in {progress.duration(manifest['seconds']['total'])}"
    )


def plan_index(settings: config.Config) -> str:
    """Probe the corpus and publish what indexing it would take; a finished plan of the same input and settings is returned.

    Args:
        settings: workspace, seed, corpus, chunking, encoder, index, cluster and prices are used.

    Returns:
        The plan's directory.

    Raises:
        config.ConfigError: no corpus is named.
        inputs.InputError: the corpus cannot be read at all.
        ForecastError: nothing in the probe is a document.
        models.ModelError: the encoder cannot be had.
    """
    if not settings.corpus.path:
        raise config.ConfigError("corpus.path is empty; name a folder or file of documents")
    started = time.monotonic()
    plan = planning.plan_units(settings.corpus.path, settings.corpus.unit_bytes)
    plan_seconds = time.monotonic() - started
    corpus = corpus_id(settings, plan, models.resolve(settings.encoder.model))
    sections = ["seed", "corpus", "encoder", "index", "cluster", "prices"]
    rest = [PLAN_FORMAT, _cores(), settings.model_dump(mode="json", include=set(sections))]
    url = storage.join(settings.workspace, "runs", f"plan-{corpus}-{storage.digest(rest)[:8]}")
    if storage.is_finished(url):
        progress.say("plan: this plan is already finished; here it is again")
        return url
    forecast = estimate(settings, plan, probe(settings, plan), plan_seconds)
    staging = storage.stage(url)
    (staging / "plan.json").write_text(json.dumps(forecast, ensure_ascii=False, indent=1), encoding="utf-8")
    planned = {
        "documents": forecast["documents"]["value"],
        "passages": forecast["passages"]["value"],
        "seconds": forecast["seconds"]["total"],
        "disk_bytes": forecast["disk"]["index"],
    }
    created = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    dumped = settings.model_dump(mode="json")
    storage.publish(staging, url, "plan", corpus_id=corpus, created=created, planned=planned, config=dumped)
    return url


def read_plan(url: str) -> dict[str, Any]:
    """The numbers of a plan.

    Raises:
        storage.ArtifactError: there is no plan, or it is damaged.
    """
    path = storage.open_artifact(url, "plan").path
    found: dict[str, Any] = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    return found


# --- the probe ---------------------------------------------------------------------------------------------------------


def probe(settings: config.Config, plan: planning.Plan) -> Probe:
    """Read, chunk, embed and index a part of the corpus on one thread, and time each step.

    Raises:
        ForecastError: nothing in the probe is a document, or no passage has a finite vector.
    """
    from ragtune_ray.encoder import load_encoder, load_token_counter

    started = time.perf_counter()
    # Without GPUs of their own, workers see none, whatever this machine has.
    encoder = load_encoder(settings.encoder, "auto" if settings.cluster.gpus_per_worker else "cpu")
    load_seconds = time.perf_counter() - started
    counter = load_token_counter(settings.encoder)
    with _one_thread():
        read, rejects, seconds = _read(settings, plan)
        documents = [document for _, _, members in read for document in members]
        if not documents:
            first = f" (the first: {rejects[0].place}: {rejects[0].reason})" if rejects else ""
            raise ForecastError(
                f"{settings.corpus.path}: nothing to plan, none of {len(rejects):,} inputs that were read is a document{first}; "
                "repair the input or name another corpus.path"
            )
        pieces, passages, chunk_seconds = _chunk(settings, counter, read)
        count = _totals(pieces, _sizes(plan), settings.seed)["passages"]["value"]
        kind = index.choose_kind(settings.index.kind, count, encoder.dimension, settings.index.memory_bytes)
        some = passages[:: max(1, math.ceil(len(passages) / PROBE_PASSAGES))]
        measured = _measure(settings, encoder, kind, some)
    return Probe(
        pieces=pieces,
        sizes=_sizes(plan),
        kind=kind,
        rejects=tuple(rejects),
        dimension=encoder.dimension,
        device=str(getattr(encoder, "device", "cpu")),
        load_seconds=load_seconds,
        read_seconds=seconds / sum(len(document.text) for document in documents) + chunk_seconds,
        **measured,
    )


def _chunk(
    settings: config.Config, counter: TokenCounter, read: Sequence[Read]
) -> tuple[tuple[Piece, ...], list[schema.Passage], float]:
    """The pieces with their passages counted, the passages, and seconds per character."""
    documents = [document for _, _, members in read for document in members]
    heads = [dataclasses.replace(each, text=each.text[:HEAD_CHARACTERS]) for each in documents]
    size = settings.chunking.size_tokens - counter.num_added_tokens
    started = time.perf_counter()
    cut = chunking.chunk_all(heads, counter.token_spans, size, settings.chunking.overlap_tokens)
    seconds = time.perf_counter() - started
    counts = iter(len(a.text) / len(b.text) * len(c) for a, b, c in zip(documents, heads, cut, strict=True))
    pieces = tuple(
        Piece(stratum, part, len(some), sum(next(counts) for _ in some), sum(len(each.text) for each in some))
        for stratum, part, some in read
    )
    return pieces, [passage for each in cut for passage in each], seconds / sum(len(head.text) for head in heads)


def _measure(
    settings: config.Config, encoder: Encoder, kind: index.ConcreteKind, passages: Sequence[schema.Passage]
) -> dict[str, Any]:
    """Bytes and seconds of what follows chunking, as fields of `Probe`."""
    count = len(passages)
    texts = [passage.text for passage in passages]
    encoder.encode_passages(texts[:8])  # the first call sets things up
    batch = settings.encoder.unit_passages
    started = time.perf_counter()
    vectors = np.concatenate([encoder.encode_passages(texts[i : i + batch]) for i in range(0, count, batch)])
    embed_seconds = (time.perf_counter() - started) / count
    started = time.perf_counter()
    postings = lexical.build_segment(texts, settings.index.language)
    lexical_seconds = (time.perf_counter() - started) / count
    vectors = vectors[np.isfinite(vectors).all(axis=1)]
    if not len(vectors):
        raise ForecastError(
            f"encoder.model {settings.encoder.model!r} gave no finite vector for any of {count} passages; name another"
        )
    add_seconds, product_seconds = _time_structure(vectors, kind, settings.seed)
    return {
        "num_passages": count,
        "passage_characters": sum(map(len, texts)) / count,
        "text_bytes": schema.to_table(passages, schema.Passage).nbytes / count,
        "postings_bytes": 8 * len(postings.passages) / count + 4,
        "vocabulary_bytes": float(sum(len(word.encode()) + 9 for word in postings.vocabulary)),
        "embed_seconds": embed_seconds,
        "lexical_seconds": lexical_seconds,
        "add_seconds": add_seconds,
        "product_seconds": product_seconds,
    }


def _time_structure(vectors: np.ndarray, kind: index.ConcreteKind, seed: int) -> tuple[float, float]:
    """Seconds per vector to fill a structure, and per inner product."""
    # Product quantisers want more vectors than a probe has; what they add to ivf_sq is counted in inner products.
    trained = index.train("ivf_sq" if kind == "ivf_pq" else kind, vectors.shape[1], len(vectors), vectors, seed)
    started = time.perf_counter()
    index.build(trained, vectors)
    add_seconds = (time.perf_counter() - started) / len(vectors)
    flat = index.build(index.train("flat", vectors.shape[1], len(vectors), vectors, seed), vectors)
    rounds = []
    with index.one_thread():
        for _ in range(3):
            started = time.perf_counter()
            flat.search(vectors, 1)
            rounds.append(time.perf_counter() - started)
    return add_seconds, min(rounds) / len(vectors) ** 2


def _read(settings: config.Config, plan: planning.Plan) -> tuple[list[Read], list[schema.Reject], float]:
    """Stretches of every format with their documents, what was rejected, and the seconds that reading took."""
    read: list[Read] = []
    rejects: list[schema.Reject] = []
    sizes = _sizes(plan)
    wanted = max(FEWEST_PIECES, PROBE_DOCUMENTS // len(sizes))
    seconds = 0.0
    for stratum in sizes:
        items = num_pieces = characters = 0
        for part in _parts([unit for unit in plan.units if unit.format == stratum], settings.seed, wanted):
            started = time.perf_counter()
            found = list(readers.read_documents(part, settings.corpus.max_document_bytes))
            seconds += time.perf_counter() - started
            documents = [item for item in found if isinstance(item, schema.Document)]
            rejects += [item for item in found if isinstance(item, schema.Reject)]
            read.append((stratum, _size(part), documents))
            num_pieces, items = num_pieces + 1, items + len(found)
            characters += sum(len(document.text) for document in documents)
            if items >= wanted or (characters >= PROBE_CHARACTERS // len(sizes) and num_pieces >= FEWEST_PIECES):
                break
    return read, rejects, seconds


def _sizes(plan: planning.Plan) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for unit in plan.units:
        sizes[unit.format] = sizes.get(unit.format, 0.0) + _size(unit)
    return sizes


def _size(unit: planning.Unit) -> float:
    return float(len(unit.paths) if unit.format == "files" else unit.stop - unit.start)


def _parts(units: Sequence[planning.Unit], seed: int, wanted: int) -> Iterator[planning.Unit]:
    """Small parts of units of one format, none twice, evenly spread over the whole wherever one stops taking them."""
    form = units[0].format
    if form == "files":
        files = [dataclasses.replace(unit, paths=(path,)) for unit in units for path in unit.paths]
        yield from (files[number] for number in _spread(len(files), seed))
        return
    total = sum(map(_size, units))
    slot = max(4096.0, total / (2 * wanted)) if form == "jsonl" else max(ROWS_AT_ONCE, total / 40)
    slots = [
        (unit, unit.start + number * (unit.stop - unit.start) // count, number, count)
        for unit in units
        for count in [max(1, round(_size(unit) / slot))]
        for number in range(count)
    ]
    num_lines = max(LINES_AT_ONCE, math.ceil(wanted / len(slots)))
    for place in _spread(len(slots), seed):
        unit, start, number, count = slots[place]
        stop = unit.start + (number + 1) * (unit.stop - unit.start) // count
        if form == "jsonl":
            part = _whole_lines(unit, start, stop, num_lines)
            if part is not None:
                yield part
        else:
            yield dataclasses.replace(unit, start=start, stop=min(stop, start + max(ROWS_AT_ONCE, num_lines)))


def _spread(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order whose every beginning is evenly spread (Weyl's sequence of the golden ratio)."""
    offset = np.random.default_rng(seed).random()
    order: list[int] = np.argsort((offset + np.arange(count) * ((math.sqrt(5) - 1) / 2)) % 1, kind="stable").tolist()
    return order


def _whole_lines(unit: planning.Unit, start: int, stop: int, num_lines: int) -> planning.Unit | None:
    """The first lines of a unit that begin in [start, stop); None where none does."""
    with inputs.open_file(unit.paths[0]) as raw:
        raw.seek(max(unit.start, start - 1))
        file = io.BufferedReader(raw, 2**16)
        if start > unit.start:
            start += _line_bytes(file, stop - start + 1) - 1
        if start >= stop:
            return None
        end, lines = start, 0
        while end < stop and lines < num_lines:
            size = _line_bytes(file, unit.stop - end)
            if not size:
                break
            end, lines = end + size, lines + 1
    return dataclasses.replace(unit, start=start, stop=end) if end > start else None


def _line_bytes(file: io.BufferedReader, limit: int) -> int:
    """Bytes to the end of the line, at most `limit`."""
    size = 0
    while size < limit and (data := file.readline(min(limit - size, inputs.BLOCK_BYTES))):
        size += len(data)
        if data.endswith(b"\n"):
            break
    return size


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tokenisers, torch and FAISS compute on one thread in this block, as each worker does."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        with index.one_thread():
            yield
    finally:
        if torch:
            torch.set_num_threads(threads)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# --- from the probe to the whole -----------------------------------------------------------------------------------------


def estimate(settings: config.Config, plan: planning.Plan, measured: Probe, plan_seconds: float) -> dict[str, Any]:
    """What indexing the whole corpus would take, as JSON values.

    Args:
        settings: of the build.
        plan: of the input.
        measured: on a part of it.
        plan_seconds: that making the plan took: a build does that too.
    """
    totals = _totals(measured.pieces, measured.sizes, settings.seed)
    count = int(totals["passages"]["value"])
    chosen = settings.index
    kind = measured.kind
    workers, workers_from = _workers(settings.cluster)
    sizes = _bytes(measured, count)
    disk = _disk(settings, kind, measured.dimension, count, sizes)
    num_segments = max(1, math.ceil(count / chosen.segment_passages))
    segment_bytes = disk["index"] / num_segments
    units = {
        "read": len(plan.units),
        "embed": max(len(plan.units), math.ceil(count / settings.encoder.unit_passages)),
        "segment": num_segments,
    }
    seconds = _seconds(measured, totals, {name: max(1, min(workers, many)) for name, many in units.items()})
    seconds = {"plan": round(plan_seconds, 3), **seconds}
    seconds["total"] = round(sum(seconds.values()), 3)
    found = {
        "corpus": _corpus(settings, plan),
        "probe": _described(measured),
        **{name: totals[name] for name in ("documents", "passages")},
        "characters_per_passage": round(measured.passage_characters, 1),
        "bytes": sizes,
        "kinds": {each: _footprint(each, measured.dimension, count) for each in get_args(index.ConcreteKind)},
        "auto_kind": index.choose_kind("auto", count, measured.dimension, chosen.memory_bytes),
        "kind": kind,
        "num_segments": num_segments,
        "num_shards": math.ceil(num_segments / max(1, int(settings.cluster.shard_bytes // max(1.0, segment_bytes)))),
        "workers": {"count": workers, "from": workers_from, "gpus_each": settings.cluster.gpus_per_worker},
        "seconds": seconds,
        "disk": disk,
        "cost": costs(settings, workers, seconds["total"], disk["index"]),
    }
    return {**found, "warnings": _warnings(settings, measured, found)}


def _corpus(settings: config.Config, plan: planning.Plan) -> dict[str, Any]:
    return {
        "path": settings.corpus.path,
        "num_files": len(plan.files),
        "bytes": sum(file.size_bytes for file in plan.files),
        "num_units": len(plan.units),
        "num_rejected_files": len(plan.rejects),
    }


def _totals(pieces: Sequence[Piece], whole: Mapping[str, float], seed: int) -> dict[str, dict[str, Any]]:
    """Documents, passages and characters of the whole, each with the ends of its interval (None: one piece tells of none)."""
    names = ["documents", "passages", "characters"]
    value, seen, spread = np.zeros(3), np.zeros(3), np.zeros((RESAMPLES, 3))
    is_known = True
    random = np.random.default_rng(seed)
    for stratum, size in whole.items():
        members = [piece for piece in pieces if piece.stratum == stratum]
        if not members:
            continue
        parts = np.array([[piece.documents, piece.passages, piece.characters] for piece in members], dtype=np.float64)
        sizes = np.array([piece.size for piece in members])
        share = min(1.0, sizes.sum() / size)
        estimated = parts.sum(axis=0) / sizes.sum() * size
        rows = random.integers(len(members), size=(RESAMPLES, len(members)))
        drawn = parts[rows].sum(axis=1) / sizes[rows].sum(axis=1, keepdims=True) * size
        # What was read is known: only the rest is drawn.
        spread += (drawn - estimated) * math.sqrt(1 - share)
        value, seen = value + estimated, seen + parts.sum(axis=0)
        is_known = is_known and (len(members) > 1 or share == 1.0)
    ends = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    low, high = np.maximum(seen, value + ends[0]), np.maximum(seen, value + ends[1])
    return {
        name: {
            "value": round(float(value[place])),
            "low": round(float(low[place])) if is_known else None,
            "high": round(float(high[place])) if is_known else None,
        }
        for place, name in enumerate(names)
    }


def _bytes(measured: Probe, count: int) -> dict[str, int]:
    # A vocabulary grows as the square root of its text, about (Heaps 1978).
    words = measured.vocabulary_bytes * math.sqrt(max(1.0, count / measured.num_passages))
    return {
        "text": round(measured.text_bytes * count),
        "postings": round(measured.postings_bytes * count + words),
        "vectors": 4 * measured.dimension * count,
    }


def _footprint(kind: index.ConcreteKind, dimension: int, count: int) -> dict[str, int]:
    each = index.footprint(kind, dimension)
    return {"memory_bytes": round(each.memory_bytes * count), "disk_bytes": round(each.disk_bytes * count)}


def _disk(
    settings: config.Config, kind: index.ConcreteKind, dimension: int, count: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Bytes on disk while and after the index is built, and bytes that are free."""
    finished = _footprint(kind, dimension, count)["disk_bytes"] + sizes["text"] + sizes["postings"]
    embedded = sizes["vectors"] + 8 * count
    return {
        "parts": sizes["text"],
        "embedded": embedded,
        "index": finished,
        "needed": sizes["text"] + embedded + finished,
        "free": storage.free_bytes(settings.workspace),
    }


def _seconds(measured: Probe, totals: Mapping[str, Mapping[str, Any]], workers: Mapping[str, int]) -> dict[str, float]:
    """Seconds per stage: the work over the workers that can share it."""
    count = int(totals["passages"]["value"])
    alone, shared = _products(measured.kind, count)
    add_seconds = measured.add_seconds
    if measured.kind == "hnsw":  # the way to a vector's neighbours grows with the logarithm
        add_seconds *= max(1.0, math.log(max(2, count)) / math.log(max(2, measured.num_passages)))
    segment = count * (measured.lexical_seconds + add_seconds) + shared * measured.product_seconds
    seconds = {
        "start": RAY_START_SECONDS + measured.load_seconds,
        "read": totals["characters"]["value"] * measured.read_seconds / workers["read"],
        "embed": count * measured.embed_seconds / workers["embed"],
        "segment": alone * measured.product_seconds + segment / workers["segment"],
    }
    return {name: round(value, 3) for name, value in seconds.items()}


def _products(kind: index.ConcreteKind, count: int) -> tuple[float, float]:
    """Inner products to train a structure, as one task, and to assign vectors to lists, which segments share."""
    if kind in {"flat", "hnsw"} or count < 1:
        return 0.0, 0.0
    lists, drawn = index.num_lists(count), index.training_sample_size(kind, count)
    if lists <= index.PLAIN_KMEANS_LISTS:
        training = float(drawn * lists * index.TRAINING_ITERATIONS)
    else:
        top = math.isqrt(lists)
        upper = min(drawn, top * index.TOP_LEVEL_SAMPLE) * top * index.TRAINING_ITERATIONS + drawn * top
        training = upper + drawn * lists / top * index.TRAINING_ITERATIONS
    if kind == "ivf_pq":  # each code's quantiser covers its dimensions: together they are whole inner products
        training += min(drawn, PQ_CENTROIDS * PQ_CENTROIDS) * PQ_CENTROIDS * PQ_ITERATIONS
        return training, float(count) * (lists + PQ_CENTROIDS)
    return training, float(count) * lists


def costs(settings: config.Config, workers: int, total_seconds: float, index_bytes: int) -> dict[str, Any]:
    """Hours that the workers are held, and what they and storing the index cost; None where a price is not known."""
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
    """The probe in plain numbers; rates are per second and worker."""
    documents = sum(piece.documents for piece in measured.pieces)
    probed = sum(piece.size for piece in measured.pieces)
    return {
        "documents": documents,
        "passages": measured.num_passages,
        "rejects": len(measured.rejects),
        "first_reject": f"{measured.rejects[0].place}: {measured.rejects[0].reason}" if measured.rejects else "",
        "is_whole": probed >= sum(measured.sizes.values()),
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
            f"the disk of workspace {settings.workspace} has {disk['free']:,} bytes free, the build needs about "
            f"{disk['needed']:,}: free some, or name another workspace"
        )
    if found["kinds"][found["kind"]]["memory_bytes"] > settings.index.memory_bytes:
        warnings.append(
            f"index.kind {found['kind']} is searched in more than index.memory_bytes ({settings.index.memory_bytes:,}); "
            f"auto would choose {found['auto_kind']}"
        )
    if found["corpus"]["num_rejected_files"]:
        warnings.append(f"{found['corpus']['num_rejected_files']:,} files cannot be read at all and are left out")
    if measured.rejects:
        warnings.append(
            f"{len(measured.rejects):,} of what was probed is rejected; the first: {found['probe']['first_reject']}"
        )
    if settings.cluster.gpus_per_worker and measured.device == "cpu":
        warnings.append("cluster.gpus_per_worker wants GPUs, but the probe ran on a CPU: embedding will be quicker")
    return warnings


def _workers(settings: config.Cluster) -> tuple[int, str]:
    """How many workers a build on a machine like this has, and where the number is from."""
    if settings.encoder_workers:
        return settings.encoder_workers, "cluster.encoder_workers"
    torch = sys.modules.get("torch")
    if settings.gpus_per_worker and torch is not None and torch.cuda.is_available():
        return max(1, int(torch.cuda.device_count() / settings.gpus_per_worker)), "the GPUs of this machine"
    return _cores(), "the cores of this machine"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
