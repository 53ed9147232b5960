"""The finished units of a build: what each part of the input became, in files that are committed together.

    BUILD/units/KEY.passages.parquet   passages, with the number and fingerprint of their document
    BUILD/units/KEY.vectors.npy        their vectors, in the same order
    BUILD/units/KEY.documents.arrow    documents, sorted by the hash of their id, one record batch per partition
    BUILD/units/KEY.rejects.jsonl      if there are any
    BUILD/units/KEY.sample.npz         of some units: a random part of the vectors, in random order
    BUILD/units/KEY.json               the marker, written last: a unit without it is done again

A key names the input, and everything else on which the files depend. A build that starts again after one input has changed
therefore repeats only the units of that input.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import schema
from ragtune_ray.index import segments
from ragtune_ray.ingest.parsing import tally
from ragtune_ray.models import scripts
from ragtune_ray.storage import filesystem

logger = logging.getLogger(__name__)

FINGERPRINT = pa.field("fingerprint", pa.binary(segments.FINGERPRINT_BYTES), nullable=False)
PASSAGES_SCHEMA = (
    schema.arrow_schema(schema.Passage)
    .append(pa.field("document_number", pa.int64(), nullable=False))
    .append(FINGERPRINT)
)
DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        FINGERPRINT,
        pa.field("is_known", pa.bool_(), nullable=False),
        pa.field("text_sha256", pa.binary(32), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("document_number", pa.int64(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
    ]
)
"""`key` is the hash of the id; `first` and `count` are the document's passages in the unit."""

PARTITION_BYTES = 2**30
"""Input bytes per partition of documents."""
_READERS = 32
"""Small files that are read at once: in an object store each takes tens of milliseconds."""


class ReadFacts(TypedDict):
    """What reading knows of a unit."""

    known: int  # documents of the base version
    num_lines: int
    sha256: str  # of the bytes that were read
    kinds: tally.Counts
    unread: list[str]  # columns
    too_long: int  # passages longer than the encoder's input
    max_tokens: int  # of the encoder's input


class EmbeddingFacts(TypedDict):
    """What embedding knows of a unit."""

    encoder: str  # fingerprint
    dimension: int
    scripts: dict[str, scripts.ScriptFacts]
    seconds: float


class UnitFacts(ReadFacts, EmbeddingFacts):
    """The summary of a finished unit, in its marker."""

    key: str
    files: list[str]
    rows: int  # passages with a vector
    sampled: int  # vectors of these in the sample
    documents: int
    rejected: int
    transient: int  # rejects of these that another run may be able to read


@dataclass(frozen=True, slots=True)
class ReadUnit:
    """What reading a unit returns."""

    passages: pa.Table
    """Of `PASSAGES_SCHEMA`; with a column `tokens` if the encoder takes token ids."""
    documents: pa.Table
    """Of `DOCUMENTS_SCHEMA`, in the order of the input."""
    rejects: list[schema.Reject]
    facts: ReadFacts


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors of a unit's passages."""

    vectors: np.ndarray
    """(num_passages, dimension) float32; a row that is not finite has failed."""
    facts: EmbeddingFacts


def num_partitions(size_bytes: int) -> int:
    """The number of partitions of the documents of an input: a power of two.

    >>> num_partitions(1), num_partitions(10**12)
    (1, 1024)
    """
    return 1 << max(0, (max(1, size_bytes) - 1) // PARTITION_BYTES).bit_length()


def partition_edges(partitions: int) -> np.ndarray:
    """The first key of each partition but the first, (partitions - 1,) uint64.

    >>> [hex(edge) for edge in partition_edges(4)]
    ['0x4000000000000000', '0x8000000000000000', '0xc000000000000000']
    """
    return np.array([number * 2**64 // partitions for number in range(1, partitions)], dtype=np.uint64)


def directory(build: str) -> str:
    """Where the units of a build are."""
    return filesystem.join(build, "units")


def commit(
    build: str, key: str, read: ReadUnit, embedded: Embedded, *, partitions: int, sample_share: float
) -> UnitFacts:
    """Write the files of a unit, then its marker. Passages without a finite vector become rejects.

    Args:
        build: directory of the build.
        key: of the unit.
        read: what reading returned.
        embedded: the vectors of its passages.
        partitions: of documents.
        sample_share: of the vectors, to be stored apart, too; if it is 1, the vectors themselves are the sample.
    """
    finite = np.isfinite(embedded.vectors).all(axis=1)
    reason = "the encoder returned no finite vector"
    failed = read.passages.filter(pa.array(~finite))["passage_id"].to_pylist()
    rejects = [*read.rejects, *(schema.Reject(passage_id, reason, "passage") for passage_id in failed)]
    passages = read.passages.select(PASSAGES_SCHEMA.names).filter(pa.array(finite))
    with tempfile.TemporaryDirectory(prefix="ragtune-unit-") as temporary:
        folder = Path(temporary)
        files = {name: folder / name for name in ("passages.parquet", "vectors.npy", "documents.arrow")}
        pq.write_table(passages, files["passages.parquet"], write_page_checksum=True)
        vectors = np.ascontiguousarray(embedded.vectors[finite])
        filesystem.save_array(files["vectors.npy"], vectors)
        sampled = math.ceil(sample_share * len(vectors))
        if 0 < sampled < len(vectors):
            files["sample.npz"] = folder / "sample.npz"
            rows = np.random.default_rng(int(key[:16], 16)).permutation(len(vectors))[:sampled]
            np.savez(files["sample.npz"], rows=rows, vectors=vectors[rows])
        _write_documents(files["documents.arrow"], placed(read.documents, passages), partitions)
        if rejects:
            files["rejects.jsonl"] = folder / "rejects.jsonl"
            files["rejects.jsonl"].write_text(schema.reject_lines(rejects), encoding="utf-8")
        for name, local in files.items():
            filesystem.commit_file(local, _file(build, key, name))
    facts: UnitFacts = {
        **read.facts,
        **embedded.facts,
        "key": key,
        "files": sorted(files),
        "rows": passages.num_rows,
        "sampled": sampled,
        "documents": read.documents.num_rows,
        "rejected": len(rejects),
        "transient": sum(reject.is_transient for reject in rejects),
    }
    filesystem.replace_text(_file(build, key, "json"), json.dumps(facts, sort_keys=True))
    return facts


def placed(documents: pa.Table, passages: pa.Table) -> pa.Table:
    """The documents of a unit with the places of their passages, sorted by key, then by number."""
    numbers = documents["document_number"].to_numpy()
    owners = passages["document_number"].to_numpy()
    first, last = (np.searchsorted(owners, numbers, side=side) for side in ("left", "right"))
    values = {"first": first, "count": last - first}
    for name, column in values.items():
        place = documents.schema.get_field_index(name)
        documents = documents.set_column(place, DOCUMENTS_SCHEMA.field(name), pa.array(column, pa.int64()))
    order = np.lexsort((numbers, documents["key"].to_numpy()))
    return documents.take(pa.array(order))


def _write_documents(path: Path, documents: pa.Table, partitions: int) -> None:
    edges = np.searchsorted(documents["key"].to_numpy(), partition_edges(partitions), side="left")
    bounds = [0, *edges.tolist(), documents.num_rows]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, documents.schema) as writer:
        for first, last in itertools.pairwise(bounds):
            part = documents.slice(first, last - first).combine_chunks().to_batches()
            writer.write_batch(part[0] if part else pa.RecordBatch.from_pylist([], schema=documents.schema))


def finished(build: str, keys: Collection[str]) -> Iterator[UnitFacts]:
    """The facts of the finished units among these; a unit with a damaged marker or a missing file is not finished."""
    names = set(filesystem.list_names(directory(build)))
    marked = [key for key in keys if f"{key}.json" in names]

    def read(key: str) -> UnitFacts | None:
        try:
            facts: UnitFacts = json.loads(filesystem.read_text(_file(build, key, "json")))
            is_whole = all(f"{key}.{name}" in names for name in facts["files"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; its unit is repeated", _file(build, key, "json"))
            return None
        return facts if is_whole else None

    with ThreadPoolExecutor(_READERS) as pool:
        yield from (facts for facts in pool.map(read, marked) if facts is not None)


def forget(build: str, key: str) -> None:
    """Let the next run do a unit again."""
    filesystem.remove(_file(build, key, "json"))


def read_passages(build: str, key: str, first: int, last: int) -> pa.Table:
    """The passages `first` to `last` of a unit: `Passage` rows with the fingerprint of their document."""
    with filesystem.fetched(_file(build, key, "passages.parquet")) as path:
        names = [*schema.arrow_schema(schema.Passage).names, "fingerprint"]
        table = pq.read_table(path, columns=names, page_checksum_verification=True)
    return table.slice(first, last - first)


def read_vectors(build: str, key: str, first: int, last: int) -> np.ndarray:
    """The vectors `first` to `last` of a unit, (last - first, dimension) float32."""
    with filesystem.fetched(_file(build, key, "vectors.npy")) as path:
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[first:last])


def read_sample(build: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a unit's sample, (num_sampled,), and their vectors, (num_sampled, dimension)."""
    if not filesystem.exists(_file(build, key, "sample.npz")):
        with filesystem.fetched(_file(build, key, "vectors.npy")) as path:
            vectors: np.ndarray = np.load(path, allow_pickle=False)
        return np.arange(len(vectors)), vectors
    with filesystem.fetched(_file(build, key, "sample.npz")) as path, np.load(path, allow_pickle=False) as arrays:
        return arrays["rows"], arrays["vectors"]


def read_rejects(build: str, key: str) -> list[schema.Reject]:
    """The rejects of a unit that has some."""
    text = filesystem.read_text(_file(build, key, "rejects.jsonl"))
    return [schema.Reject(**json.loads(line)) for line in filesystem.json_lines(text)]


def read_documents(build: str, keys: Sequence[str], partition: int, columns: Sequence[str]) -> pa.Table:
    """One partition of the documents of these units, with the place of their unit in `keys` as column `unit`."""

    def read(number: int) -> pa.Table:
        store, path = filesystem.locate(_file(build, keys[number], "documents.arrow"))
        with store.open(path, "rb") as file, pa.ipc.open_file(file) as reader:
            batch = reader.get_batch(partition).select(list(columns))
            return pa.table(batch).append_column("unit", pa.array(np.full(batch.num_rows, number)))

    with ThreadPoolExecutor(_READERS) as pool:
        return pa.concat_tables(pool.map(read, range(len(keys))))


def _file(build: str, key: str, name: str) -> str:
    return filesystem.join(directory(build), f"{key}.{name}")
