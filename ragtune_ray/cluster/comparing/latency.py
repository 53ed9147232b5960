"""Measures how long one answer takes when questions are asked one at a time, without the network.

Bulk answering takes less time per row, because rows are processed in batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.cluster import session
from ragtune_ray.evaluation.comparison import Latency, Percentiles

__all__ = ["measure"]


def measure(settings: config.Config, queries: Sequence[schema.Query], version: str) -> Latency:
    """Answer some queries one at a time, on one otherwise idle machine of the cluster.

    Args:
        settings: of an arm; a Ray session must be open.
        queries: the first one is asked twice, once unmeasured to warm up.
        version: of the index, for arms that retrieve.
    """
    import ray

    options = {**session.worker_options(settings.cluster), "max_retries": 1}
    seconds = np.array(
        ray.get(ray.remote(_answer_one_by_one).options(**options).remote(settings, list(queries), version))
    )
    return Latency(
        retrieval=_percentiles(seconds[:, 0]),
        generation=_percentiles(seconds[:, 1]),
        total=_percentiles(seconds.sum(axis=1)),
        n=len(queries),
    )


def _percentiles(seconds: np.ndarray) -> Percentiles:
    median, high = np.quantile(seconds, [0.5, 0.95])
    return Percentiles(p50_seconds=round(float(median), 4), p95_seconds=round(float(high), 4))


def _answer_one_by_one(settings: config.Config, queries: list[schema.Query], version: str) -> list[tuple[float, float]]:
    """(seconds of retrieval, seconds of generation) per query, on all cores of this machine."""
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
