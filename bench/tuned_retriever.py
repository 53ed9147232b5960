"""Compares a fine-tuned retriever with its start on test questions: dense and hybrid, with paired intervals.

    python -m bench.tuned_retriever CONFIG [section.field=value ...]

Train the model (`ragtune train CONFIG training.objective=contrastive`) and index the corpus first. The benchmark
indexes the corpus again with the tuned encoder, in a workspace of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ragtune_ray import config
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.evaluation import intervals
from ragtune_ray.models import arms

SHOWN = ("recall@1", "recall@5", "MRR@10")


def main() -> None:
    """Retrieve with both encoders and print the paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    before = config.load(options.config, ["queries.split=test", *options.overrides])
    tuned = arms.tuned_model(before.workspace, arms.tuned_name(before.training))
    with tempfile.TemporaryDirectory(prefix="ragtune-bench-") as folder:
        if before.training.objective == "query_side":
            after = before.using(f"encoder.query_model={tuned}")
        else:
            after = before.using(f"workspace={folder}", f"encoder.model={tuned}")
            build_index(after)
        print(f"{'mode':8} {'metric':10} {'start':>7} {'tuned':>7}  difference [95 % interval], questions")
        for mode in ("dense", "hybrid"):
            old, new = (_scores(each.using(f"retrieval.mode={mode}")) for each in (before, after))
            ids = sorted(set(old) & set(new))
            for name in SHOWN:
                a, b = (np.array([scores[query][name] for query in ids]) for scores in (old, new))
                difference = intervals.paired_bootstrap(a, b, 10_000, 0.95, 0)
                print(
                    f"{mode:8} {name:10} {a.mean():7.4f} {b.mean():7.4f}  "
                    f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}], {len(ids)}",
                    flush=True,
                )


def _scores(settings: config.Config) -> dict[str, dict[str, float]]:
    """Retrieve and return the metrics of each query."""
    rows = pq.read_table(Path(str(retrieve(settings))) / "scores.parquet").to_pylist()
    return {row.pop("query_id"): row for row in rows}


if __name__ == "__main__":
    main()
