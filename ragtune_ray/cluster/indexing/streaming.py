"""Runs the units of a build through one stream of Ray Data: read and chunk, embed, commit.

The three operators work at the same time, so that a GPU embeds while CPUs read. A row of the stream is a unit. Ray Data holds
readers back while the encoders are behind. Each unit is committed on its own, so a killed build repeats only what was under way.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ragtune_ray import config, schema
from ragtune_ray.cluster import actors, devices, session, stages
from ragtune_ray.cluster.indexing import embedding, reading, units
from ragtune_ray.index import contents, versions
from ragtune_ray.ingest import input_units
from ragtune_ray.models import weights

if TYPE_CHECKING:
    import ray.data

ENCODER_CPUS, READER_CPUS, COMMITTER_CPUS = 0.7, 0.2, 0.1
"""Reserved by an actor of each operator on CPUs: a core for one of each, of which the encoder takes nearly all."""
BYTES_PER_BYTE = 16
"""Memory that a reader or committer reserves, per byte of input: texts, token ids, passages and vectors, some of them twice."""
MOST_COMMITTERS = 8
"""Actors that commit, if there are not more encoders when the build begins: each has work for many encoders."""
BUNDLE_BYTES = 4 * 2**20
MOST_BUNDLED = 16
"""Small units travel together, up to so many bytes and units, because Ray Data spends about 12 milliseconds on each block."""
LEAST_BUNDLES = 64

_ROW_SCHEMA = pa.schema(
    [
        pa.field("work", pa.string()),
        pa.field("passages", pa.large_binary()),
        pa.field("documents", pa.large_binary()),
        pa.field("rejects", pa.large_string()),
        pa.field("facts", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Job:
    """What all tasks of a build need to know."""

    settings: config.Config
    build: str
    """Directory of the build."""
    base: str
    """Version whose documents need no work; "" for none."""
    partitions: int
    """Of documents, by the hash of their ids."""
    models: dict[str, str] = field(default_factory=dict)
    """Where other machines find the models (`session.models`)."""

    def known_documents(self) -> contents.KnownDocuments:
        """The documents of the base."""
        base = versions.read_version(self.settings.workspace, self.base) if self.base else None
        return contents.KnownDocuments(self.settings.workspace, base)


@dataclass(frozen=True, slots=True)
class Work:
    """A unit to do."""

    key: str
    unit: input_units.Unit
    is_probed: bool
    """Measure which scripts the encoder knows."""
    sample_share: float
    """Of the vectors, to train with."""

    def to_json(self) -> str:
        """As text, for a row."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        """The work that `to_json` described."""
        values = json.loads(text)
        return cls(**{**values, "unit": input_units.Unit.from_json(values["unit"])})


def in_process(job: Job, pending: Sequence[Work]) -> Iterator[units.UnitFacts]:
    """Do units one by one in this process; yields the facts of each when it is committed."""
    if not pending:
        return
    embedder, known = embedding.Embedder(job.settings.encoder), job.known_documents()
    for work in pending:
        read = reading.read_unit(work.unit, job.settings, known)
        embedded = embedder.embed(read.passages, is_probed=work.is_probed)
        yield _commit_unit(job, work, read, embedded)


def on_ray(job: Job, pending: Sequence[Work], unit_bytes: int) -> Iterator[units.UnitFacts]:
    """Do units with Ray Data; yields the facts of each when it is committed, in any order.

    A node that joins and cannot open the models ends the stream: a new one leaves it out and does the units that are left.

    Args:
        job: of the build.
        pending: units, in the order in which they should begin.
        unit_bytes: input bytes of a unit.

    Raises:
        StageError: a unit failed permanently.
    """
    if not pending:
        return
    actors.release()
    job = dataclasses.replace(job, models=session.models(job.settings))
    unfinished = {work.key: work for work in pending}
    with stages.root_cause_raised("index"):
        session.leave_out_nodes_without(job.models)
    while unfinished:
        try:
            for facts in _stream(job, [*unfinished.values()], unit_bytes):
                del unfinished[facts["key"]]
                yield facts
            return
        except stages.StageError:
            num_left_out = len(actors.left_out)
            with stages.root_cause_raised("index"):
                session.leave_out_nodes_without(job.models)
            if len(actors.left_out) == num_left_out:
                raise


def _stream(job: Job, pending: Sequence[Work], unit_bytes: int) -> Iterator[units.UnitFacts]:
    import ray.data

    rows = [{"work": work.to_json()} for work in pending]
    bundled = max(1, min(MOST_BUNDLED, BUNDLE_BYTES // max(1, unit_bytes), len(rows) // LEAST_BUNDLES))
    num_bundles = -(-len(rows) // bundled)
    dataset = ray.data.from_items(rows, override_num_blocks=num_bundles)
    with stages.root_cause_raised("index"):
        for row in _operators(dataset, job, num_bundles, BYTES_PER_BYTE * bundled * unit_bytes).iter_rows():
            facts: units.UnitFacts = json.loads(row["facts"])
            yield facts


def _operators(dataset: ray.data.Dataset, job: Job, num_bundles: int, memory_bytes: int) -> ray.data.Dataset:
    cluster = job.settings.cluster
    fewest = num_encoders(cluster, num_bundles)
    most = max(fewest, session.max_workers(cluster.encoder_workers, cluster.gpus_per_worker, num_bundles))
    # What Ray Data keeps for more committers than are ever needed, it would not give to encoders on nodes that join.
    committers = min(most, max(MOST_COMMITTERS, fewest))
    # Actors, not tasks: Ray ends idle processes of tasks beyond the number of cores, with the indexes that they have open.
    memory = {"memory": stages.available_bytes(memory_bytes)}
    # An encoder on a GPU reserves no core, so the others have whole ones.
    cpus = (1.0, 1.0) if cluster.gpus_per_worker else (READER_CPUS, COMMITTER_CPUS)
    where = actors.elsewhere()
    return (
        dataset.map_batches(ReadUnits, **_pool(job, fewest, most), num_cpus=cpus[0], **memory, **where)
        .map_batches(EmbedUnits, **_pool(job, fewest, most), **encoder_options(cluster), **where)
        .map_batches(CommitUnits, **_pool(job, 1, committers), num_cpus=cpus[1], **memory, **where)
    )


def _pool(job: Job, fewest: int, most: int) -> dict[str, Any]:
    """The options of an operator whose actors take whole blocks."""
    import ray.data

    pool = ray.data.ActorPoolStrategy(
        min_size=fewest, max_size=most, initial_size=fewest, max_tasks_in_flight_per_actor=2
    )
    return {"batch_size": None, "batch_format": "pyarrow", "compute": pool, "fn_constructor_kwargs": {"job": job}}


def num_encoders(cluster: config.Cluster, num_units: int) -> int:
    """The number of encoders that work when a build begins."""
    return max(1, min(num_units, session.workers(cluster.encoder_workers, cluster.gpus_per_worker)))


def encoder_options(cluster: config.Cluster) -> dict[str, Any]:
    """The resources that an encoder reserves: a GPU or most of a core, not both, which Ray schedules badly."""
    options = session.worker_options(cluster)
    if "num_gpus" in options:
        return options | {"num_cpus": 0}
    return options | {"num_cpus": ENCODER_CPUS}


class ReadUnits:
    """An actor that reads and chunks units."""

    def __init__(self, job: Job) -> None:
        session.use_one_thread()
        weights.use_staged(job.models)
        self._settings, self._known = job.settings, job.known_documents()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Read each unit of the batch."""
        for text in batch["work"].to_pylist():
            yield row_of(text, reading.read_unit(Work.from_json(text).unit, self._settings, self._known))


def row_of(work: str, read: units.ReadUnit) -> pa.Table:
    """What reading a unit returned, as a row of the stream."""
    row = {
        "work": [work],
        "passages": [to_bytes(read.passages)],
        "documents": [to_bytes(read.documents)],
        "rejects": [schema.reject_lines(read.rejects)],
        "facts": [json.dumps(read.facts)],
    }
    return pa.table(row, schema=_ROW_SCHEMA)


class EmbedUnits:
    """An actor with an encoder."""

    def __init__(self, job: Job) -> None:
        devices.use_reserved_devices()
        session.use_one_thread()
        weights.use_staged(job.models)
        self._embedder = embedding.Embedder(job.settings.encoder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add the vectors of each unit of the batch."""
        found = [
            self._embedder.embed(from_bytes(passages), is_probed=Work.from_json(text.as_py()).is_probed)
            for text, passages in zip(batch["work"], batch["passages"], strict=True)
        ]
        # All vectors of a unit are one value, so that Ray Data never divides them.
        vectors = pa.array([each.vectors.tobytes() for each in found], pa.large_binary())
        embedding_facts = pa.array([json.dumps(each.facts) for each in found])
        return batch.append_column("vectors", vectors).append_column("embedding_facts", embedding_facts)


class CommitUnits:
    """An actor that commits units."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Commit each unit of the batch; returns their facts."""
        facts = [_commit_row(batch.slice(row, 1), self._job) for row in range(batch.num_rows)]
        return pa.table({"facts": [json.dumps(each) for each in facts]})


def _commit_row(row: pa.Table, job: Job) -> units.UnitFacts:
    values = {name: row[name][0] for name in row.column_names}
    lines = values["rejects"].as_py().split("\n")
    rejects = [schema.Reject(**json.loads(line)) for line in lines if line]
    facts: units.EmbeddingFacts = json.loads(values["embedding_facts"].as_py())
    read = units.ReadUnit(
        from_bytes(values["passages"]), from_bytes(values["documents"]), rejects, json.loads(values["facts"].as_py())
    )
    vectors = np.frombuffer(values["vectors"].as_buffer(), dtype=np.float32).reshape(-1, facts["dimension"])
    return _commit_unit(job, Work.from_json(values["work"].as_py()), read, units.Embedded(vectors, facts))


def _commit_unit(job: Job, work: Work, read: units.ReadUnit, embedded: units.Embedded) -> units.UnitFacts:
    return units.commit(job.build, work.key, read, embedded, partitions=job.partitions, sample_share=work.sample_share)


def to_bytes(table: pa.Table) -> memoryview:
    """A table as an Arrow stream."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return memoryview(stream.getvalue())


def from_bytes(value: pa.Scalar) -> pa.Table:
    """The table of an Arrow stream, without copying it."""
    with pa.ipc.open_stream(value.as_buffer()) as reader:
        return reader.read_all()
