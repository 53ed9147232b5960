"""Second stage of an index build: embeds passages.

In: the parts of `reading`. Out: per unit, a file with the vectors of the kept rows. Passages without a finite vector are rejects.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ragtune_ray import config, schema
from ragtune_ray.cluster import devices, session, stages
from ragtune_ray.cluster.indexing import reading
from ragtune_ray.models import scripts
from ragtune_ray.storage import checksums, filesystem

if TYPE_CHECKING:
    import ray.data


PROBED_UNITS = 4
"""Units, evenly spread over the input, in which an actor measures which scripts the encoder knows."""


def embed_stage(
    settings: config.Config, build: str, parts: reading.Parts, *, in_process: bool = False
) -> list[dict[str, Any]]:
    """Embed every row group of every part, on Ray or in this process; returns the summaries in the order of the passages."""
    directory = filesystem.join(build, "embed")
    units: list[dict[str, Any]] = []
    for part in parts.summaries:
        dropped = parts.dropped.get(part["unit"], [])
        for group, rows in enumerate(part["row_groups"]):
            unit = {"unit": len(units), "part": part["unit"], "row_group": group, "rows": rows, "dropped": dropped}
            units.append(unit)
    for number in np.linspace(0, len(units) - 1, min(PROBED_UNITS, len(units))).astype(int):
        units[number]["probed"] = True
    count = 1 if in_process else num_workers(settings, len(units))

    def transform(dataset: ray.data.Dataset) -> ray.data.Dataset:
        import ray.data

        return dataset.map_batches(
            EmbedUnit,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=count, initial_size=count, max_tasks_in_flight_per_actor=2
            ),
            fn_constructor_kwargs={"settings": settings.encoder, "build": build},
            **session.worker_options(settings.cluster),
        )

    here = stages.in_process(lambda: EmbedUnit(settings.encoder, build))
    work = here if in_process else stages.on_ray_data(transform)
    return stages.run_stage("embed", directory, units, work, counted="passages", rows_of=lambda unit: int(unit["rows"]))


def num_workers(settings: config.Config, num_units: int) -> int:
    """The number of encoder actors for this many units."""
    return max(1, min(num_units, session.workers(settings.cluster.encoder_workers, settings.cluster.gpus_per_worker)))


class EmbedUnit(stages.UnitWorker):
    """An actor with an encoder that embeds one row group of a part at a time."""

    def __init__(self, settings: config.Encoder, build: str) -> None:
        from ragtune_ray.models.encoder import load_encoder

        devices.use_reserved_devices()
        session.use_one_thread()
        self._encoder = load_encoder(settings)
        self._build = build

    def run(self, unit: dict[str, Any]) -> str:
        """Embed a row group."""
        started = time.monotonic()
        passages = reading.read_row_group(self._build, unit["part"], unit["row_group"])
        kept = ~np.isin(passages["document_number"].to_numpy(), unit["dropped"])
        vectors = np.zeros((passages.num_rows, self._encoder.dimension), dtype=np.float32)
        vectors[kept] = self._encoder.encode_passages(passages.filter(pa.array(kept))["text"].to_pylist())
        finite = np.isfinite(vectors).all(axis=1)
        failed = passages.filter(pa.array(kept & ~finite))["passage_id"].to_pylist()
        rows = np.flatnonzero(kept & finite)
        texts = passages["text"].take(pa.array(rows)).to_pylist() if unit.get("probed") else []
        with tempfile.TemporaryDirectory(prefix="ragtune-embed-") as temporary:
            saved = Path(temporary) / "vectors.npz"
            np.savez(saved, rows=rows, vectors=vectors[rows])
            return stages.commit_unit(
                filesystem.join(self._build, "embed"),
                unit["unit"],
                {"npz": saved},
                part=unit["part"],
                row_group=unit["row_group"],
                rows=len(rows),
                rejects=[
                    {"place": passage_id, "reason": "the encoder returned no finite vector", "kind": "passage"}
                    for passage_id in failed
                ],
                encoder=self._encoder.fingerprint,
                dimension=self._encoder.dimension,
                scripts=scripts.probe(self._encoder, texts, vectors[rows]) if texts else {},
                seconds=round(time.monotonic() - started, 4),
            )


def read_block(build: str, block: dict[str, Any]) -> tuple[pa.Table, np.ndarray]:
    """The embedded passages of a unit, with their documents' fingerprints, and their vectors."""
    rows, vectors = _read_npz(build, block)
    passages = reading.read_row_group(build, block["part"], block["row_group"]).take(pa.array(rows))
    return passages.select([*schema.arrow_schema(schema.Passage).names, "fingerprint"]), vectors


def read_vectors(build: str, block: dict[str, Any]) -> np.ndarray:
    """The vectors of an embedded unit, (num_rows, dimension)."""
    return _read_npz(build, block)[1]


def _read_npz(build: str, block: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    directory = filesystem.join(build, "embed")
    name = Path(stages.unit_file(directory, block["unit"], "npz")).name
    folder = filesystem.local_copy(directory, [name], checksums.digest(directory))
    with np.load(folder / name, allow_pickle=False) as arrays:
        return arrays["rows"], arrays["vectors"]
