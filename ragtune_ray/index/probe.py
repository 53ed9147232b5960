"""Reads, chunks, embeds and indexes a small part of a corpus on one thread, and measures each step.

Totals of the corpus are extrapolated from the parts that were read, in proportion to its known size (document files, or bytes
of other formats), with a bootstrap interval over these parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ragtune_ray import RagtuneError, config, schema
from ragtune_ray.index import bm25, faiss_index, words
from ragtune_ray.ingest import chunking, input_units, inputs, readers
from ragtune_ray.ingest.parquet import ALL_ROWS

if TYPE_CHECKING:
    from ragtune_ray.models.encoder import Encoder, TokenCounter

PROBE_DOCUMENTS = 200
PROBE_CHARACTERS = 8 * 2**20
"""The probe ends after this many characters, even if they are in few documents."""
PROBE_PASSAGES = 512
"""Limit on the passages that are indexed."""
EMBED_SECONDS = 4.0
"""About as long passages are embedded, so that a plan takes seconds with a slow encoder, too."""
FEWEST_EMBEDDED = 64
FEWEST_PIECES = 4
HEAD_CHARACTERS = 2**18
"""Only this much of a document is chunked; the rest is assumed to be similar."""
LINES_AT_ONCE, ROWS_AT_ONCE = 5, 25
RESAMPLES, CONFIDENCE = 1_000, 0.95

ROW_SLOTS = 40
"""Places of a corpus of Parquet or SQuAD from which rows are read."""

Read = tuple[str, float, list[schema.Document]]
"""Format and size of a part of the input, and its documents."""


class PlanError(RagtuneError, ValueError):
    """The corpus cannot be planned; the message names what was read and the next step."""


class Part(NamedTuple):
    """A part of the input to read: a unit or, of a unit of rows, the first rows of one of several equal slots."""

    unit: input_units.Unit
    slot: int = 0
    num_slots: int = 1
    most_rows: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the input that was read, and what it contains.

    Attributes:
        stratum: format of the input.
        size: files, or bytes of another format.
        documents: number of documents.
        passages: number of passages; estimated for long documents.
        characters: number of characters.
    """

    stratum: str
    size: float
    documents: int
    passages: float
    characters: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured on a part of the corpus, on one thread.

    Attributes:
        pieces: the parts that were read.
        sizes: size of the whole input per format.
        num_passages: passages that were chunked and whose words were indexed.
        num_vectors: passages that were embedded.
        rejects: rejected inputs.
        dimension: of the vectors.
        device: on which the encoder ran.
        passage_characters: mean length of a passage.
        text_bytes: per passage, its stored row with ids, title and metadata.
        postings_bytes: per passage, without the vocabulary.
        vocabulary_bytes: of all words in the probe.
        load_seconds: to load the encoder.
        read_seconds: per character, to read and chunk.
        embed_seconds: per passage.
        lexical_seconds: per passage.
        kind: of the whole index.
        add_seconds: per passage, for a structure of this kind (ivf_sq for ivf_pq) with the probe's passages.
        product_seconds: per inner product of two vectors.
    """

    pieces: tuple[Piece, ...]
    sizes: Mapping[str, float]
    num_passages: int
    num_vectors: int
    rejects: tuple[schema.Reject, ...]
    dimension: int
    device: str
    passage_characters: float
    text_bytes: float
    postings_bytes: float
    vocabulary_bytes: float
    load_seconds: float
    read_seconds: float
    embed_seconds: float
    lexical_seconds: float
    kind: faiss_index.ConcreteKind
    add_seconds: float
    product_seconds: float


def probe(settings: config.Config, plan: input_units.Plan) -> Probe:
    """Read, chunk, embed and index a part of the corpus on one thread, and time each step.

    Raises:
        PlanError: the probe found no document, or no passage has a finite vector.
    """
    from ragtune_ray.models.encoder import load_encoder, load_token_counter

    started = time.perf_counter()
    # Workers without GPUs of their own use none, even if this machine has some.
    encoder = load_encoder(settings.encoder, "auto" if settings.cluster.gpus_per_worker else "cpu")
    load_seconds = time.perf_counter() - started
    counter = load_token_counter(settings.encoder)
    with _one_thread():
        read, rejects, seconds = _read(settings, plan)
        documents = [document for _, _, members in read for document in members]
        if not documents:
            first = f" (the first: {rejects[0].place}: {rejects[0].reason})" if rejects else ""
            raise PlanError(
                f"{settings.corpus.path}: nothing to plan: none of the {len(rejects):,} inputs that were read is a document"
                f"{first}; repair the input or set another corpus.path"
            )
        pieces, passages, chunk_seconds = _chunk(settings, counter, read)
        count = totals(pieces, sizes(plan), settings.seed)["passages"]["value"]
        kind = faiss_index.choose_kind(settings.index.kind, count, encoder.dimension, settings.index.memory_bytes)
        some = passages[:: max(1, math.ceil(len(passages) / PROBE_PASSAGES))]
        measured = _measure(settings, encoder, kind, some)
    return Probe(
        pieces=pieces,
        sizes=sizes(plan),
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
    """Return the pieces with their passages counted, the passages, and the seconds per character."""
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
    settings: config.Config, encoder: Encoder, kind: faiss_index.ConcreteKind, passages: Sequence[schema.Passage]
) -> dict[str, Any]:
    """Measure the steps after chunking; return fields of `Probe`."""
    count = len(passages)
    texts = [passage.text for passage in passages]
    embedded = _embeddable(encoder, texts)
    batch = settings.encoder.unit_passages
    started = time.perf_counter()
    parts = [encoder.encode_passages(embedded[i : i + batch]) for i in range(0, len(embedded), batch)]
    embed_seconds = (time.perf_counter() - started) / len(embedded)
    vectors = np.concatenate(parts)
    started = time.perf_counter()
    postings = bm25.build_segment(texts, words.folded(settings.index.language))
    lexical_seconds = (time.perf_counter() - started) / count
    vectors = vectors[np.isfinite(vectors).all(axis=1)]
    if not len(vectors):
        raise PlanError(
            f"encoder.model {settings.encoder.model!r} returned no finite vector for any of {len(embedded)} passages; set "
            "another model"
        )
    add_seconds, product_seconds = _time_structure(vectors, kind, settings.seed)
    return {
        "num_passages": count,
        "num_vectors": len(vectors),
        "passage_characters": sum(map(len, texts)) / count,
        "text_bytes": schema.to_table(passages, schema.Passage).nbytes / count,
        "postings_bytes": 8 * len(postings.passages) / count + 4,
        "vocabulary_bytes": float(sum(len(word.encode()) + 9 for word in postings.vocabulary)),
        "embed_seconds": embed_seconds,
        "lexical_seconds": lexical_seconds,
        "add_seconds": add_seconds,
        "product_seconds": product_seconds,
    }


def _embeddable(encoder: Encoder, texts: Sequence[str]) -> Sequence[str]:
    """Texts spread over the corpus, as many as the encoder embeds in `EMBED_SECONDS`; about `FEWEST_EMBEDDED` at least."""
    encoder.encode_passages(texts[:8])  # warm up
    started = time.perf_counter()
    encoder.encode_passages(texts[:8])
    seconds_each = (time.perf_counter() - started) / len(texts[:8])
    wanted = max(FEWEST_EMBEDDED, EMBED_SECONDS / seconds_each)
    return texts[:: max(1, math.ceil(len(texts) / wanted))]


def _time_structure(vectors: np.ndarray, kind: faiss_index.ConcreteKind, seed: int) -> tuple[float, float]:
    """Return the seconds per vector to fill a structure, and per inner product."""
    # A product quantizer needs more vectors than a probe has; its additional work is counted in inner products.
    trained = faiss_index.train("ivf_sq" if kind == "ivf_pq" else kind, vectors.shape[1], len(vectors), vectors, seed)
    started = time.perf_counter()
    faiss_index.build(trained, vectors)
    add_seconds = (time.perf_counter() - started) / len(vectors)
    flat = faiss_index.build(faiss_index.train("flat", vectors.shape[1], len(vectors), vectors, seed), vectors)
    rounds = []
    with faiss_index.one_thread():
        for _ in range(3):
            started = time.perf_counter()
            flat.search(vectors, 1)
            rounds.append(time.perf_counter() - started)
    return add_seconds, min(rounds) / len(vectors) ** 2


def _read(settings: config.Config, plan: input_units.Plan) -> tuple[list[Read], list[schema.Reject], float]:
    """Return the parts read of every format, with their documents; the rejects; and the seconds that reading took."""
    read: list[Read] = []
    rejects: list[schema.Reject] = []
    whole = sizes(plan)
    num_documents = max(FEWEST_PIECES, PROBE_DOCUMENTS // len(whole))
    seconds = 0.0
    for stratum in whole:
        items = num_pieces = characters = 0
        for part in _parts([unit for unit in plan.units if unit.format == stratum], settings.seed, num_documents):
            size, rows = _extent(part)
            if not size:
                continue
            started = time.perf_counter()
            found = list(readers.read_documents(part.unit, settings.corpus, rows=rows))
            seconds += time.perf_counter() - started
            documents = [item for item in found if isinstance(item, schema.Document)]
            rejects += [item for item in found if isinstance(item, schema.Reject)]
            read.append((stratum, size, documents))
            num_pieces, items = num_pieces + 1, items + len(found)
            characters += sum(len(document.text) for document in documents)
            if items >= num_documents or (characters >= PROBE_CHARACTERS // len(whole) and num_pieces >= FEWEST_PIECES):
                break
    return read, rejects, seconds


def sizes(plan: input_units.Plan) -> dict[str, float]:
    """Return the size of the input per format: the number of document files, and bytes of all other formats."""
    found: dict[str, float] = {}
    for unit in plan.units:
        found[unit.format] = found.get(unit.format, 0.0) + _size(unit)
    return found


def _size(unit: input_units.Unit) -> float:
    return float(len(unit.paths) if unit.format == "files" else unit.stop - unit.start)


def _extent(part: Part) -> tuple[float, range]:
    """Return the size of what is read of a part, and its rows (parquet, squad)."""
    unit = part.unit
    if unit.format in {"files", "jsonl"}:
        return _size(unit), ALL_ROWS
    count = readers.num_rows(unit)
    if not count:  # the file is broken, or no row group begins in this unit
        return (0.0 if part.slot else _size(unit)), ALL_ROWS
    first, stop = (count * slot // part.num_slots for slot in (part.slot, part.slot + 1))
    stop = min(stop, first + part.most_rows)
    return _size(unit) * (stop - first) / count, range(first, stop)


def _parts(units: Sequence[input_units.Unit], seed: int, num_documents: int) -> Iterator[Part]:
    """Yield small, distinct parts of units of one format, so that the first n are evenly spread for every n."""
    form = units[0].format
    if form == "files":
        files = [(place, path) for place, unit in enumerate(units) for path in unit.paths]
        for number in _spread(len(files), seed):
            place, path = files[number]
            yield Part(units[place].part(paths=(path,)))
        return
    total = sum(map(_size, units))
    slot = max(4096.0, total / (2 * num_documents)) if form == "jsonl" else total / ROW_SLOTS
    slots = [
        (unit, unit.start + number * (unit.stop - unit.start) // count, number, count)
        for unit in units
        for count in [max(1, round(_size(unit) / slot))]
        for number in range(count)
    ]
    num_lines = max(LINES_AT_ONCE, math.ceil(num_documents / len(slots)))
    for position in _spread(len(slots), seed):
        unit, start, number, count = slots[position]
        stop = unit.start + (number + 1) * (unit.stop - unit.start) // count
        if form == "jsonl":
            part = _whole_lines(unit, start, stop, num_lines)
            if part is not None:
                yield Part(part)
        else:
            yield Part(unit.part(), number, count, max(ROWS_AT_ONCE, num_lines))


def _spread(count: int, seed: int) -> list[int]:
    """Order the numbers below `count` so that every prefix is evenly spread (Weyl sequence of the golden ratio)."""
    offset = np.random.default_rng(seed).random()
    order: list[int] = np.argsort((offset + np.arange(count) * ((math.sqrt(5) - 1) / 2)) % 1, kind="stable").tolist()
    return order


def _whole_lines(unit: input_units.Unit, start: int, stop: int, num_lines: int) -> input_units.Unit | None:
    """Return a unit of the first lines that begin in [start, stop); None if no line does."""
    with inputs.open_file(unit.paths[0]) as raw:
        raw.seek(max(0, start - 1))
        file = io.BufferedReader(raw, 2**16)
        if start > 0:
            start += _line_bytes(file, stop - start + 1) - 1
        if start >= stop:
            return None
        end, lines = start, 0
        while end < stop and lines < num_lines:
            size = _line_bytes(file, sys.maxsize)
            if not size:
                break
            end, lines = end + size, lines + 1
    return unit.part(start=start, stop=end) if end > start else None


def _line_bytes(file: io.BufferedReader, limit: int) -> int:
    """Return the bytes to the end of the line, at most `limit`."""
    size = 0
    while size < limit and (data := file.readline(min(limit - size, inputs.BLOCK_BYTES))):
        size += len(data)
        if data.endswith(b"\n"):
            break
    return size


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run tokenizers, torch and FAISS on one thread in this block, as each worker does."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        with faiss_index.one_thread():
            yield
    finally:
        if torch:
            torch.set_num_threads(threads)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def totals(pieces: Sequence[Piece], whole: Mapping[str, float], seed: int) -> dict[str, dict[str, Any]]:
    """Estimate documents, passages and characters of the whole, with intervals (None if a format has only one piece)."""
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
        # What was read is known, so only the rest varies.
        spread += (drawn - estimated) * math.sqrt(1 - share)
        value, seen = value + estimated, seen + parts.sum(axis=0)
        is_known = is_known and (len(members) > 1 or share == 1.0)
    ends = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    low, high = np.maximum(seen, value + ends[0]), np.maximum(seen, value + ends[1])
    return {
        name: {
            "value": round(float(value[column])),
            "low": round(float(low[column])) if is_known else None,
            "high": round(float(high[column])) if is_known else None,
        }
        for column, name in enumerate(names)
    }
