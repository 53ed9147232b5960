"""Measures the quality and the rate of bulk retrieval on SQuAD-shaped data, in each of the three modes.

    python -m bench.retrieval --data SQUAD.json [--encoder hashing-384]

Each context is a document; a question's relevant document is its context. The rate is the number of queries divided by
the time from the start of the first unit to the end of the last, so it excludes the start of the actors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.config import Config
from ragtune_ray.storage import artifacts

SHOWN = ("recall@1", "recall@5", "recall@10", "MRR@10", "nDCG@10")


def main() -> None:
    """Index once, retrieve in each mode and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/squad/squad-v1.1-24articles.json")
    parser.add_argument("--encoder", default=Config().encoder.model)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        settings = Config().using(
            f"corpus.path={options.data}",
            f"queries.path={options.data}",
            f"encoder.model={options.encoder}",
            f"workspace={folder}",
        )
        build_index(settings)
        print(f"{'mode':8} {'queries/s':>9}  " + "  ".join(f"{name:>20}" for name in SHOWN))
        for mode in ("dense", "lexical", "hybrid"):
            run = str(retrieve(settings.using(f"retrieval.mode={mode}")))
            measured = json.loads((Path(run) / "metrics.json").read_text(encoding="utf-8"))
            rate = artifacts.read_manifest(run)["queries_per_second"]
            cells = (measured[name] for name in SHOWN)
            row = "  ".join(f"{cell['value']:.4f} [{cell['low']:.3f},{cell['high']:.3f}]" for cell in cells)
            print(f"{mode:8} {rate:9.0f}  {row}", flush=True)


if __name__ == "__main__":
    main()
