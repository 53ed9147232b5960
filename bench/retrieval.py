"""Measures the quality and the rate of bulk retrieval on SQuAD-shaped data: dense, BM25, and both fused by ranks and by scores.

    python -m bench.retrieval --data SQUAD.json [--encoder hashing-384] [--set retrieval.lexical_weight=.5]

Each context is a document; a question's relevant document is its context. Below the table, each hybrid is compared with the
better of dense and BM25 on the same questions, with a paired bootstrap interval. The rate is the number of queries divided by
the time from the start of the first unit to the end of the last, so it excludes the start of the actors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.config import Config
from ragtune_ray.evaluation.intervals import paired_bootstrap
from ragtune_ray.storage import artifacts

SHOWN = ("recall@1", "recall@5", "recall@10", "MRR@10", "nDCG@10")
COMPARED = ("nDCG@10", "recall@1")
VARIANTS = {
    "dense": "retrieval.mode=dense",
    "BM25": "retrieval.mode=lexical",
    "ranks": "retrieval.fusion=ranks",
    "scores": "retrieval.fusion=scores",
}


def main() -> None:
    """Index once, retrieve in each variant and print a row for each, then the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/squad/squad-v1.1-24articles.json")
    parser.add_argument("--encoder", default=Config().encoder.model)
    parser.add_argument("--set", action="append", default=[], help="another setting, section.field=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        settings = Config().using(
            f"corpus.path={options.data}",
            f"queries.path={options.data}",
            f"encoder.model={options.encoder}",
            f"workspace={folder}",
            *options.set,
        )
        build_index(settings)
        print(f"{'':8} {'queries/s':>9}  " + "  ".join(f"{name:>20}" for name in SHOWN))
        scores = {name: _measured(settings.using(setting), name) for name, setting in VARIANTS.items()}
    for metric in COMPARED:
        halves = {name: scores[name][metric] for name in ("dense", "BM25")}
        better = max(halves, key=lambda name: halves[name].mean())
        for name in ("ranks", "scores"):
            found = paired_bootstrap(halves[better], scores[name][metric], 10_000, 0.95, 0)
            print(f"{metric}: {name} - {better}: {found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}], n {found.n}")


def _measured(settings: Config, name: str) -> dict[str, np.ndarray]:
    """Retrieve, print a row, and return the metrics of each question, in the order of their ids."""
    run = str(retrieve(settings))
    measured = json.loads((Path(run) / "metrics.json").read_text(encoding="utf-8"))
    rate = artifacts.read_manifest(run)["queries_per_second"]
    cells = (measured[metric] for metric in SHOWN)
    row = "  ".join(f"{cell['value']:.4f} [{cell['low']:.3f},{cell['high']:.3f}]" for cell in cells)
    print(f"{name:8} {rate:9.0f}  {row}", flush=True)
    table = pq.read_table(Path(run) / "scores.parquet").sort_by("query_id")
    return {metric: np.asarray(table[metric], dtype=np.float64) for metric in COMPARED}


if __name__ == "__main__":
    main()
