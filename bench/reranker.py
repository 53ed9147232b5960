"""Compares retrieval with and without a reranker on test questions: paired intervals, and milliseconds per query.

    python -m bench.reranker CONFIG [section.field=value ...]

Index the corpus first. The reranker is `retrieval.reranker` or, if that is empty, the newest one that `ragtune train CONFIG
training.objective=reranker` trained. The time is that of one question after another in this process, on one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from ragtune_ray import config, schema
from ragtune_ray.cluster.answering.retrieve import retrieve
from ragtune_ray.evaluation import intervals
from ragtune_ray.index.retriever import open_retriever
from ragtune_ray.ingest import splits
from ragtune_ray.models import arms

SHOWN = ("recall@1", "recall@5", "MRR@10")
TIMED_QUERIES = 30


def main() -> None:
    """Retrieve with both, and print the paired differences and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    given = config.load(options.config, ["training.objective=reranker", "queries.split=test", *options.overrides])
    before = given.using("retrieval.reranker=")
    reranker = given.retrieval.reranker or arms.tuned_model(given.workspace, arms.tuned_name(given.training))
    after = given.with_values({"retrieval.reranker": reranker})
    old, new = _scores(before), _scores(after)
    ids = sorted(set(old) & set(new))
    print(f"{'metric':10} {'before':>7} {'after':>7}  difference [95 % interval], {len(ids)} questions")
    for name in SHOWN:
        a, b = (np.array([scores[query][name] for query in ids]) for scores in (old, new))
        found = intervals.paired_bootstrap(a, b, 10_000, 0.95, 0)
        print(f"{name:10} {a.mean():7.4f} {b.mean():7.4f}  {found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")
    print(f"milliseconds per query (median): {_milliseconds(before):.1f} before, {_milliseconds(after):.1f} after")


def _scores(settings: config.Config) -> dict[str, dict[str, float]]:
    """Retrieve and return the metrics of each query."""
    rows = pq.read_table(Path(str(retrieve(settings))) / "scores.parquet").to_pylist()
    return {row.pop("query_id"): row for row in rows}


def _milliseconds(settings: config.Config) -> float:
    torch.set_num_threads(1)
    retriever = open_retriever(settings)
    rows = [row for row in splits.selected_queries(settings.queries) if isinstance(row, schema.Query)]
    seconds = []
    for row in rows[:TIMED_QUERIES]:
        started = time.perf_counter()
        retriever.search([row.text])
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


if __name__ == "__main__":
    main()
