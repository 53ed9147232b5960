"""Approximate search at a million vectors: build time, recall, latency and memory against autofaiss's default build.

    python -m bench.ann [--vectors 1000000] [--sets clusters,spectrum] [--kinds auto] [--autofaiss-python PATH]

Two synthetic sets of 384 dimensions: 2,000 Gaussian clusters (`clusters`), and one Gaussian whose spectrum falls as 1/sqrt(i)
(`spectrum`), which is hard. Ours: the same functions that a build calls (train once on a sample, build the shards of
`index.segment_passages` in one process per core, calibrate on held-out vectors to recall@10 >= .95), reading a .npy file and
ending with the saved shards opened by memory mapping. Theirs: `autofaiss.build_index` with its defaults on the same file, in an
environment of its own, since it wants pyarrow < 20 (made with venv and pip where --autofaiss-python is not given). Both are
then asked the same 500 queries that no build has seen, one at a time, on all cores. Nothing is asserted.
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
THEIRS = Path(__file__).with_name("ann_autofaiss.py")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--sets", default="clusters,spectrum")
    parser.add_argument("--kinds", default="auto")
    parser.add_argument("--autofaiss-python", default="")
    parser.add_argument("--without-autofaiss", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        theirs = None if options.without_autofaiss else options.autofaiss_python or _environment(Path(folder))
        print(
            f"{'set':9} {'index':28} {'build s':>8} {'recall@10':>9} {'p50 ms':>7} {'p99 ms':>7}  {'GiB over its shard':>18}"
        )
        for name in options.sets.split(","):
            given = Path(folder) / f"{name}.npy"
            queries, truth = _make(name, options.vectors, given)
            rows = [_ours(given, kind, queries, truth, Path(folder)) for kind in options.kinds.split(",")]
            if theirs:
                rows.append(_theirs(theirs, given, queries, truth, Path(folder)))
            for row in rows:
                _show(name, row)
            if theirs:
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


def _make(name: str, count: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the set; queries of the same distribution and the scores of their nearest vectors, (NUM_QUERIES, CUTOFF)."""
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


def _ours(given: Path, kind: str, queries: np.ndarray, truth: np.ndarray, folder: Path) -> dict[str, Any]:
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
    with _watched(peaks), ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as pool:
        trained = folder / f"{chosen}-trained.faiss"
        pool.submit(_train, given, chosen, sample, trained).result()
        num_shards = math.ceil(len(stored) / Config().index.segment_passages)
        edges = [len(stored) * number // num_shards for number in range(num_shards + 1)]
        queries_held = np.array(stored[held])
        shards = [folder / f"{chosen}-{number}" for number in range(num_shards)]
        work = [
            pool.submit(_build, given, first, last, trained, shard, queries_held)
            for first, last, shard in zip(edges[:-1], edges[1:], shards, strict=True)
        ]
        exact = [each.result() for each in work]
        scores = -np.sort(-np.concatenate(exact, axis=1), axis=1)[:, : search_effort.CUTOFF + 1]
        held_out = search_effort.HeldOut(queries_held, held, scores)
        calibrated = pool.submit(_calibrate, shards, held_out).result()
    seconds = time.perf_counter() - started
    searched = vectors.VectorIndex(_open(shards), calibrated.effort)
    shard_bytes = (edges[1] - edges[0]) * DIMENSION * 4
    return {
        "index": f"ours: {chosen}, {num_shards} shards, {calibrated.effort.lists} lists"
        if chosen.startswith("ivf")
        else f"ours: {chosen}",
        "build_seconds": seconds,
        **_asked(lambda query: searched.search(query, CUTOFF)[0][0], queries, truth),
        "gibibytes": (max(peaks.values()) - shard_bytes) / 2**30,
    }


def _train(given: Path, kind: faiss_index.ConcreteKind, rows: np.ndarray, target: Path) -> None:
    stored = np.load(given, mmap_mode="r")
    faiss_index.save(faiss_index.train(kind, DIMENSION, len(stored), stored[rows], 0), target)


def _build(given: Path, first: int, last: int, trained: Path, shard: Path, held: np.ndarray) -> np.ndarray:
    """One shard, as `segments.write_segment` and the build's task do it."""
    part = np.array(np.load(given, mmap_mode="r")[first:last])
    shard.mkdir(exist_ok=True)
    structure = faiss_index.build(faiss_index.load(trained), part)
    faiss_index.save(structure, shard / "vectors.faiss")
    if faiss_index.is_quantized(faiss_index.kind_of(structure)):
        np.save(shard / "vectors.npy", part)
    return search_effort.exact_neighbors(held, part)


def _open(shards: list[Path]) -> list[vectors.Part]:
    return [
        vectors.Part(
            faiss_index.load(shard / "vectors.faiss", mmap=True),
            np.load(shard / "vectors.npy", mmap_mode="r") if (shard / "vectors.npy").exists() else None,
            "trained",
        )
        for shard in shards
    ]


def _calibrate(shards: list[Path], held_out: search_effort.HeldOut) -> search_effort.MeasuredEffort:
    return search_effort.find_effort(vectors.VectorIndex(_open(shards)), held_out, Config().index.target_recall)


def _theirs(python: str, given: Path, queries: np.ndarray, truth: np.ndarray, folder: Path) -> dict[str, Any]:
    np.savez(folder / "asked.npz", queries=queries, truth=truth)
    command = [python, str(THEIRS), str(given), str(folder / "asked.npz")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _asked(search: Any, queries: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Recall by score (of equal neighbours any will do) and milliseconds, one query at a time."""
    seconds, recalls = [], []
    for query, wanted in zip(queries, truth, strict=True):
        started = time.perf_counter()
        scores = search(query[None])
        seconds.append(time.perf_counter() - started)
        recalls.append(float((scores >= wanted[-1] - 1e-5).sum()) / CUTOFF)
    milliseconds = np.array(seconds) * 1000
    return {
        "recall": float(np.mean(recalls)),
        "p50_milliseconds": float(np.median(milliseconds)),
        "p99_milliseconds": float(np.percentile(milliseconds, 99)),
    }


class _watched:  # noqa: N801  # used as a block
    """Notes the peak resident memory of this process's children, file pages that they map left out."""

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


def _environment(folder: Path) -> str:
    venv.create(folder / "autofaiss", with_pip=True)
    python = str(folder / "autofaiss" / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "autofaiss", "pyarrow<20"], check=True, stdout=sys.stderr
    )
    return python


if __name__ == "__main__":
    main()
