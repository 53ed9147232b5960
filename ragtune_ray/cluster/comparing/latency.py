"""How long one answer takes, retrieval and generation apart, when answers are asked for one at a time.

In: the config of an arm and some queries. Out: quantiles of seconds. Bulk answering is faster a row, since rows share passes
through the model; this is what a person who asks would wait, less the network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.cluster import session

__all__ = ["measure"]


def measure(settings: config.Config, queries: Sequence[schema.Query], version: str) -> dict[str, Any]:
    """Answer some queries one at a time, on one machine of the cluster with nothing else to do.

    Args:
        settings: of an arm; the Ray session must be open.
        queries: which are asked; the first one once more, unmeasured, before the others.
        version: of the index, for arms that retrieve.

    Returns:
        {"retrieval", "generation", "total"} -> {"p50_seconds", "p95_seconds"}, and {"n"}: how many queries.
    """
    import ray

    options = {**session.worker_options(settings.cluster), "max_retries": 1}
    asked = ray.remote(_asked_one_by_one).options(**options).remote(settings, list(queries), version)
    seconds = np.array(ray.get(asked))
    parts = {"retrieval": seconds[:, 0], "generation": seconds[:, 1], "total": seconds.sum(axis=1)}
    return {**{name: _quantiles(values) for name, values in parts.items()}, "n": len(queries)}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    median, high = np.quantile(values, [0.5, 0.95])
    return {"p50_seconds": round(float(median), 4), "p95_seconds": round(float(high), 4)}


def _asked_one_by_one(settings: config.Config, queries: list[schema.Query], version: str) -> list[tuple[float, float]]:
    """(seconds of retrieval, seconds of generation) of each query, with all cores of this machine."""
    import torch

    from ragtune_ray.answering.pipeline import Task, answer_tasks
    from ragtune_ray.generation.generator import open_generator
    from ragtune_ray.index.retriever import open_retriever

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    retriever = open_retriever(settings, version) if settings.answer.shows_passages else None
    generator, _ = open_generator(settings)
    seconds = []
    for query in [queries[0], *queries]:
        started = time.perf_counter()
        task = Task(query, (), (), "", "")
        if retriever is not None:
            ((passages, scores),) = retriever.retrieve_passages([query.text], settings.retrieval.top_k)
            task = Task(query, tuple(passages), tuple(scores), version, "")
        retrieved = time.perf_counter()
        answer_tasks([task], generator, settings, "")
        seconds.append((retrieved - started, time.perf_counter() - retrieved))
    return seconds[1:]
