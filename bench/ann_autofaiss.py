"""Measures autofaiss's default build of a .npy file, then its queries; `bench.ann` runs this in autofaiss's environment.

    python ann_autofaiss.py VECTORS.npy QUERIES.npz

The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from autofaiss import build_index

CUTOFF = 10


def main() -> None:
    """Build the index, ask the queries and print the figures."""
    given, asked = Path(sys.argv[1]), np.load(sys.argv[2])
    with tempfile.TemporaryDirectory(dir=given.parent) as folder:
        (Path(folder) / "embeddings").mkdir()
        os.link(given, Path(folder) / "embeddings" / "0.npy")
        started = time.perf_counter()
        index, facts = build_index(
            f"{folder}/embeddings", index_path=f"{folder}/knn.index", index_infos_path=f"{folder}/infos.json"
        )
        build_seconds = time.perf_counter() - started
        seconds, recalls = [], []
        for query, nearest in zip(asked["queries"], asked["truth"], strict=True):
            started = time.perf_counter()
            scores, _ = index.search(query[None], CUTOFF)
            seconds.append(time.perf_counter() - started)
            recalls.append(float((scores[0] >= nearest[-1] - 1e-5).sum()) / CUTOFF)
    milliseconds = np.array(seconds) * 1000
    print(
        json.dumps(
            {
                "index": f"autofaiss: {facts['index_key']}",
                "build_seconds": build_seconds,
                "recall": float(np.mean(recalls)),
                "p50_milliseconds": float(np.median(milliseconds)),
                "p99_milliseconds": float(np.percentile(milliseconds, 99)),
            }
        )
    )


if __name__ == "__main__":
    main()
