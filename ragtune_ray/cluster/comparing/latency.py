"""Measures how long one answer takes when questions are asked one at a time, without a network or batches."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ragtune_ray import config, schema
from ragtune_ray.cluster import actors, devices, session
from ragtune_ray.evaluation.comparison import Latency, Percentiles

if TYPE_CHECKING:
    from ragtune_ray.generation.interface import Generator
    from ragtune_ray.index.retriever import Retriever


def measure(arms: Sequence[tuple[config.Config, str]], queries: Sequence[schema.Query]) -> list[Latency]:
    """Answer the queries one at a time in each arm, in a Ray task; a session must be open, and the cluster should be idle.

    Args:
        arms: (config, index version or "" if it does not retrieve) of each arm; consecutive arms with the same generator load
            it once.
        queries: the first one is asked twice per arm, once unmeasured to warm up.
    """
    import ray

    actors.release()
    options = {**session.worker_options(arms[0][0].cluster), "max_retries": 1}
    seconds_of_arms = ray.get(ray.remote(_answer_one_by_one).options(**options).remote(list(arms), list(queries)))
    return [
        Latency(
            retrieval=_percentiles(seconds[:, 0]),
            generation=_percentiles(seconds[:, 1]),
            total=_percentiles(seconds.sum(axis=1)),
            n=len(queries),
        )
        for seconds in seconds_of_arms
    ]


def _percentiles(seconds: np.ndarray) -> Percentiles:
    median, high = np.quantile(seconds, [0.5, 0.95])
    return Percentiles(p50_seconds=round(float(median), 4), p95_seconds=round(float(high), 4))


def _answer_one_by_one(arms: list[tuple[config.Config, str]], queries: list[schema.Query]) -> list[np.ndarray]:
    """Per arm, the seconds of retrieval and of generation on all cores of this machine, (num_queries, 2)."""
    import torch

    from ragtune_ray.generation.generator import open_generator
    from ragtune_ray.index.retriever import open_retriever

    devices.use_reserved_devices()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found, generator, opened = [], None, None
    for settings, version in arms:
        if generator is None or settings.generator != opened:
            generator = None  # free the memory of the previous one first
            generator, opened = open_generator(settings)[0], settings.generator
        retriever = open_retriever(settings, version) if settings.answer.shows_passages else None
        seconds = [_seconds(query, settings, version, retriever, generator) for query in [queries[0], *queries]]
        found.append(np.array(seconds[1:]))
    return found


def _seconds(
    query: schema.Query, settings: config.Config, version: str, retriever: Retriever | None, generator: Generator
) -> tuple[float, float]:
    from ragtune_ray.answering import rewriting, searching
    from ragtune_ray.answering.pipeline import Task, answer_tasks

    started = time.perf_counter()
    task = Task(query)
    if retriever is not None:
        (searches,) = rewriting.write_searches([query], generator, settings)
        ((passages, scores),) = searching.search_passages(
            retriever, [searches.texts], settings.retrieval, settings.retrieval.top_k
        )
        task = Task(query, tuple(passages), tuple(scores), version)
    retrieved = time.perf_counter()
    answer_tasks([task], generator, settings, "")
    return retrieved - started, time.perf_counter() - retrieved
