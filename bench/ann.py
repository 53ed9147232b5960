"""Compares approximate search over a million vectors with autofaiss: build time, recall, latency and memory.

    python -m bench.ann [--vectors 1000000] [--sets clusters,spectrum] [--kinds auto] [--autofaiss-python PATH]

There are two synthetic sets of 384 dimensions: 2,000 Gaussian clusters (`clusters`), and one Gaussian whose spectrum
falls as 1/sqrt(i) (`spectrum`), which is hard. Our row calls the functions that an index build calls: train once on a
sample, build shards of `index.segment_passages` vectors in one process per core, then calibrate on held-out vectors to
recall@10 >= .95. It reads a .npy file and ends when the saved shards are opened by memory mapping. The other row is
`autofaiss.build_index` with its defaults on the same file. autofaiss needs pyarrow < 20, so it has an environment of
its own, which the benchmark creates with venv and pip unless --autofaiss-python is given. Both indexes then answer the
same 500 unseen queries, one at a time, on all cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
import venv
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import cpu_count, get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ragtune_ray.config import Config
from ragtune_ray.index import faiss_index, search_effort, vectors

DIMENSION, NUM_QUERIES, CUTOFF = 384, 500, 10
AUTOFAISS_SCRIPT = Path(__file__).with_name("ann_autofaiss.py")


def main() -> None:
    """Measure every set and print one row per index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--sets", default="clusters,spectrum")
    parser.add_argument("--kinds", default="auto")
    parser.add_argument("--autofaiss-python", default="")
    parser.add_argument("--without-autofaiss", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        autofaiss_python = (
            None if options.without_autofaiss else options.autofaiss_python or _install_autofaiss(Path(folder))
        )
        print(
            f"{'set':9} {'index':28} {'build s':>8} {'recall@10':>9} {'p50 ms':>7} {'p99 ms':>7}  {'GiB above shard':>18}"
        )
        for name in options.sets.split(","):
            given = Path(folder) / f"{name}.npy"
            queries, truth = _make_set(name, options.vectors, given)
            rows = [_measure_ours(given, kind, queries, truth, Path(folder)) for kind in options.kinds.split(",")]
            if autofaiss_python:
                rows.append(_measure_autofaiss(autofaiss_python, given, queries, truth, Path(folder)))
            for row in rows:
                _show(name, row)
            if autofaiss_python:
                for row in rows[:-1]:
                    ratios = {key: row[key] / rows[-1][key] for key in ("build_seconds", "p50_milliseconds")}
                    shown = f"build {ratios['build_seconds']:.3f}, p50 {ratios['p50_milliseconds']:.3f}"
                    print(f"{name:9} {row['index']} / {rows[-1]['index']}: {shown}", flush=True)
            given.unlink()


def _show(name: str, row: dict[str, Any]) -> None:
    memory = f"{row['gibibytes']:.2f}" if "gibibytes" in row else "-"
    print(
        f"{name:9} {row['index']:28} {row['build_seconds']:8.1f} {row['recall']:9.4f} {row['p50_milliseconds']:7.2f} "
        f"{row['p99_milliseconds']:7.2f}  {memory:>18}",
        flush=True,
    )


def _make_set(name: str, count: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the set and return queries of the same distribution with their best scores, `(NUM_QUERIES, CUTOFF)`."""
    source = np.random.default_rng(0)
    total = count + NUM_QUERIES
    rows = source.standard_normal((total, DIMENSION), dtype=np.float32)
    if name == "clusters":
        centres = source.standard_normal((2_000, DIMENSION), dtype=np.float32)
        rows = centres[source.integers(0, len(centres), total)] + 0.5 * rows
    else:
        rows /= np.sqrt(np.arange(1, DIMENSION + 1, dtype=np.float32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(path, rows[:count])
    queries = rows[count:].copy()
    import faiss

    truth, _ = faiss.knn(queries, rows[:count], CUTOFF, metric=faiss.METRIC_INNER_PRODUCT)
    return queries, truth


def _measure_ours(given: Path, kind: str, queries: np.ndarray, truth: np.ndarray, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    stored = np.load(given, mmap_mode="r")
    chosen = faiss_index.choose_kind(kind, len(stored), DIMENSION, psutil.virtual_memory().total // 2)  # type: ignore[arg-type]  # from the command line
    source = np.random.default_rng(0)
    order = source.permutation(len(stored))[
        : faiss_index.training_sample_size(chosen, len(stored)) + search_effort.NUM_QUERIES
    ]
    held = np.sort(order[: search_effort.NUM_QUERIES])
    sample = np.sort(order[search_effort.NUM_QUERIES :])
    peaks: dict[int, int] = {}
    with _watch_memory(peaks), ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as pool:
        trained = folder / f"{chosen}-trained.faiss"
        pool.submit(_train, given, chosen, sample, trained).result()
        num_shards = math.ceil(len(stored) / Config().index.segment_passages)
        edges = [len(stored) * number // num_shards for number in range(num_shards + 1)]
        queries_held = np.array(stored[held])
        shards = [folder / f"{chosen}-{number}" for number in range(num_shards)]
        work = [
            pool.submit(_build, given, first, last, trained, shard, held, queries_held)
            for first, last, shard in zip(edges[:-1], edges[1:], shards, strict=True)
        ]
        efforts = [each.result() for each in work]
        calibrated = search_effort.choose_effort(efforts, Config().index.target_recall)
    seconds = time.perf_counter() - started
    searched = vectors.VectorIndex(_open(shards), calibrated.effort)
    shard_bytes = (edges[1] - edges[0]) * DIMENSION * 4
    return {
        "index": f"ours: {chosen}, {num_shards} shards, {calibrated.effort.lists} lists"
        if chosen.startswith("ivf")
        else f"ours: {chosen}",
        "build_seconds": seconds,
        **_recall_and_latency(lambda query: searched.search(query, CUTOFF)[0][0], queries, truth),
        "gibibytes": (max(peaks.values()) - shard_bytes) / 2**30,
    }


def _train(given: Path, kind: faiss_index.ConcreteKind, rows: np.ndarray, target: Path) -> None:
    stored = np.load(given, mmap_mode="r")
    faiss_index.save(faiss_index.train(kind, DIMENSION, len(stored), stored[rows], 0), target)


def _build(
    given: Path, first: int, last: int, trained: Path, shard: Path, held: np.ndarray, queries: np.ndarray
) -> search_effort.PartEfforts:
    """Build one shard as an index build does, and measure the efforts of searches for the held-out queries in it."""
    part = np.array(np.load(given, mmap_mode="r")[first:last])
    shard.mkdir(exist_ok=True)
    structure = faiss_index.build(faiss_index.load(trained), part)
    faiss_index.save(structure, shard / "vectors.faiss")
    if faiss_index.is_quantized(faiss_index.kind_of(structure)):
        np.save(shard / "vectors.npy", part)
    loaded = faiss_index.load(shard / "vectors.faiss", mmap=True)
    exact = part if faiss_index.is_quantized(faiss_index.kind_of(loaded)) else None
    own = np.where((held >= first) & (held < last), held - first, -1)
    return search_effort.measure_part(vectors.Part(loaded, exact, "trained"), queries, own)


def _open(shards: list[Path]) -> list[vectors.Part]:
    return [
        vectors.Part(
            faiss_index.load(shard / "vectors.faiss", mmap=True),
            np.load(shard / "vectors.npy", mmap_mode="r") if (shard / "vectors.npy").exists() else None,
            "trained",
        )
        for shard in shards
    ]


def _measure_autofaiss(
    python: str, given: Path, queries: np.ndarray, truth: np.ndarray, folder: Path
) -> dict[str, Any]:
    np.savez(folder / "asked.npz", queries=queries, truth=truth)
    command = [python, str(AUTOFAISS_SCRIPT), str(given), str(folder / "asked.npz")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _recall_and_latency(search: Any, queries: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Ask one query at a time; recall compares scores, so that either of two equally near vectors counts."""
    seconds, recalls = [], []
    for query, nearest in zip(queries, truth, strict=True):
        started = time.perf_counter()
        scores = search(query[None])
        seconds.append(time.perf_counter() - started)
        recalls.append(float((scores >= nearest[-1] - 1e-5).sum()) / CUTOFF)
    milliseconds = np.array(seconds) * 1000
    return {
        "recall": float(np.mean(recalls)),
        "p50_milliseconds": float(np.median(milliseconds)),
        "p99_milliseconds": float(np.percentile(milliseconds, 99)),
    }


class _watch_memory:  # noqa: N801  # a context manager
    """Records the peak resident memory of each child process, without the file pages that it maps."""

    def __init__(self, peaks: dict[int, int]) -> None:
        self._peaks, self._done = peaks, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                try:
                    memory = child.memory_info()
                    self._peaks[child.pid] = max(self._peaks.get(child.pid, 0), memory.rss - memory.shared)
                except psutil.NoSuchProcess:
                    continue


def _install_autofaiss(folder: Path) -> str:
    venv.create(folder / "autofaiss", with_pip=True)
    python = str(folder / "autofaiss" / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "autofaiss", "pyarrow<20"], check=True, stdout=sys.stderr
    )
    return python


if __name__ == "__main__":
    main()
