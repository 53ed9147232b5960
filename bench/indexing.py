"""Measures what an index build costs beside its encoder, and whether its stages work at the same time.

    python -m bench.indexing sizes [--sizes 100000,1000000,3000000]   driver memory and seconds of whole builds
    python -m bench.indexing overlap [--megabytes 24]                 reading and embedding together, and each alone
    python -m bench.indexing units [--units 3000]                     the driver's work per unit

`sizes` builds an index of generated documents of one short passage each with the hashing encoder. The driver is a process of its
own, whose largest resident memory is read when it ends. `overlap` replaces the encoder by one that waits as long per passage as
reading took; if both work at the same time, the build takes as long as one of them. `units` does the same units with readers
that return at once, and counts the processor time of the driver.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from bench.living import write_documents
from ragtune_ray import config, schema
from ragtune_ray.cluster import session
from ragtune_ray.cluster.indexing import streaming, units
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.index import versions
from ragtune_ray.ingest.input_units import plan_units

DIMENSION = 384


def main() -> None:
    """Run one of the measurements, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sizes = commands.add_parser("sizes")
    sizes.add_argument("--sizes", default="100000,1000000,3000000")
    one = commands.add_parser("one")
    one.add_argument("corpus")
    one.add_argument("workspace")
    overlap = commands.add_parser("overlap")
    overlap.add_argument("--megabytes", type=int, default=24)
    many = commands.add_parser("units")
    many.add_argument("--units", type=int, default=3000)
    options = parser.parse_args()
    match options.command:
        case "sizes":
            _sizes([int(size) for size in options.sizes.split(",")])
        case "one":
            _one(options.corpus, options.workspace)
        case "overlap":
            _overlap(options.megabytes)
        case _:
            _units(options.units)


def _settings(workspace: str, corpus: str, *overrides: str) -> config.Config:
    return config.Config().using(
        f"workspace={workspace}",
        f"corpus.path={corpus}",
        f"encoder.model=hashing-{DIMENSION}",
        "cluster.address=local",
        *overrides,
    )


def _sizes(sizes: list[int]) -> None:
    print(
        f"{'documents':>10} {'plan s':>8} {'build s':>8} {'ms/passage':>11} {'driver CPU s':>13} {'driver MiB':>11} segments"
    )
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
            corpus = Path(folder) / "corpus.jsonl"
            write_documents(corpus, np.random.default_rng(0), size, "d")
            command = [sys.executable, "-m", "bench.indexing", "one", str(corpus), f"{folder}/workspace"]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(shown.splitlines()[-1])
        per_passage = 1000 * row["seconds"] / size
        print(
            f"{size:10,} {row['plan_seconds']:8.2f} {row['seconds']:8.1f} {per_passage:11.3f} {row['cpu_seconds']:13.1f} "
            f"{row['mebibytes']:11.0f} {row['segments']:,}",
            flush=True,
        )


def _one(corpus: str, workspace: str) -> None:
    settings = _settings(workspace, corpus)
    started = time.perf_counter()
    plan_units(corpus)
    planned = time.perf_counter()
    build_index(settings)
    found = {
        "plan_seconds": planned - started,
        "seconds": time.perf_counter() - planned,
        "cpu_seconds": time.process_time(),
        "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "segments": len(versions.read_version(workspace, "000001").entries),
    }
    print(json.dumps(found))


class WaitingEncoder:
    """Takes the place of the actor with an encoder: waits for each passage."""

    seconds_per_passage = 0.0

    def __init__(self, job: streaming.Job) -> None:
        del job

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add random vectors to each unit of the batch."""
        vectors, facts = [], []
        for passages in batch["passages"]:
            count = streaming.from_bytes(passages).num_rows
            time.sleep(count * self.seconds_per_passage)
            vectors.append(np.random.default_rng(0).normal(size=(count, DIMENSION)).astype(np.float32).tobytes())
            found: units.EmbeddingFacts = {"encoder": "waiting", "dimension": DIMENSION, "scripts": {}, "seconds": 0.0}
            facts.append(json.dumps(found))
        added = batch.append_column("vectors", pa.array(vectors, pa.large_binary()))
        return added.append_column("embedding_facts", pa.array(facts))


def _stream(settings: config.Config, build: str) -> tuple[float, int]:
    """Run all units of a corpus; returns the seconds, and the number of passages."""
    plan = plan_units(settings.corpus.path, settings.corpus.unit_bytes)
    works = [streaming.Work(f"{unit.number:016x}", unit, False, 0.0) for unit in plan.units]
    started = time.perf_counter()
    job = streaming.Job(settings, build, "", 1)
    found = list(streaming.on_ray(job, works, plan.size_bytes // len(works)))
    return time.perf_counter() - started, sum(facts["rows"] for facts in found)


def _overlap(megabytes: int) -> None:
    patched = mock.patch.object(streaming, "EmbedUnits", WaitingEncoder)
    with patched, tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_documents(corpus, np.random.default_rng(0), megabytes * 9_000, "d")
        settings = _settings(f"{folder}/workspace", str(corpus), "cluster.encoder_workers=1")
        with session.ray_session(settings.cluster):
            _stream(settings, f"{folder}/warm")  # starts the processes
            read_seconds, rows = _stream(settings, f"{folder}/read")
            WaitingEncoder.seconds_per_passage = read_seconds / rows
            both_seconds, _ = _stream(settings, f"{folder}/both")
    print(f"{'':24} {'seconds':>8}")
    print(f"{'read and commit':24} {read_seconds:8.1f}")
    print(f"{'embed (waiting)':24} {rows * WaitingEncoder.seconds_per_passage:8.1f}")
    print(f"{'build of both':24} {both_seconds:8.1f}   / the longer one: {both_seconds / read_seconds:.2f}")


class NothingReader:
    """Takes the place of the actor that reads: each unit is empty."""

    def __init__(self, job: streaming.Job) -> None:
        del job

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Read nothing for each unit of the batch."""
        facts: units.ReadFacts = {
            "known": 0, "num_lines": 0, "sha256": "", "kinds": {}, "unread": [], "too_long": 0, "max_tokens": 0,
        }  # fmt: skip
        empty = units.ReadUnit(
            units.PASSAGES_SCHEMA.empty_table(), units.DOCUMENTS_SCHEMA.empty_table(), list[schema.Reject](), facts
        )
        for text in batch["work"].to_pylist():
            yield streaming.row_of(text, empty)


def _units(number: int) -> None:
    patched = mock.patch.object(streaming, "ReadUnits", NothingReader)
    with patched, tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_documents(corpus, np.random.default_rng(0), number, "d")
        unit_bytes = corpus.stat().st_size // number
        settings = _settings(f"{folder}/workspace", str(corpus), f"corpus.unit_bytes={unit_bytes}")
        print(f"{'run':>4} {'units':>8} {'seconds':>8} {'driver CPU ms per unit':>24} {'driver MiB':>11}")
        with session.ray_session(settings.cluster):
            for run in range(3):
                before = time.process_time()
                seconds, _ = _stream(settings, f"{folder}/{run}")
                cpu = time.process_time() - before
                largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{run:4} {number:8,} {seconds:8.1f} {1000 * cpu / number:24.2f} {largest:11.0f}", flush=True)


if __name__ == "__main__":
    main()
